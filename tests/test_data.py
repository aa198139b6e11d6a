"""The procedural pairs: deterministic, damaged inside the mask only, split by asset, resumable."""

import importlib
import importlib.metadata
import json
import multiprocessing
import os
import signal
import string

import numpy as np
import pytest
from PIL import Image

from refine_jax.data import assets, degrade, loader, picture, synth
from refine_jax.errors import RefineError

BUCKETS = tuple(synth.BUCKETS)


def _held_out_installed() -> bool:
    try:
        return bool(assets.faces("eval") and assets.photo_files("eval"))
    except RefineError:
        return False


held_out = pytest.mark.skipif(not _held_out_installed(), reason="the packages of the extra `eval` are missing")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("bucket", BUCKETS)
def test_sample_has_the_promised_form(bucket):
    seen = set()
    for index in range(12):
        pair = synth.sample(3, index, bucket)
        for name in ("image", "target", "reference"):
            assert pair[name].shape == (*bucket, 3) and pair[name].dtype == np.uint8
        assert pair["mask"].shape == bucket and pair["mask"].dtype == np.uint8
        assert set(np.unique(pair["mask"])) == {0, 255}
        assert pair["has_reference"] == bool(pair["reference"].any())
        assert pair["word"] in pair["instruction"]
        assert (pair["kind"] == "logo") == (pair["font"] == "")
        assert pair["degradation"] in degrade.DEGRADATIONS
        inside = pair["mask"] > 0
        assert (pair["image"][inside] != pair["target"][inside]).any()
        seen.add(pair["target"].tobytes())
    assert len(seen) == 12


def test_sample_is_a_function_of_its_arguments():
    args = (11, 5, (32, 96))
    first = synth.sample(*args)
    assets.font.cache_clear()
    assets.photo.cache_clear()
    for index in range(3):  # other samples between leave no trace
        synth.sample(0, index, (64, 64))
    assert same(first, synth.sample(*args))
    for other in ((12, 5, (32, 96)), (11, 6, (32, 96)), (11, 5, (32, 128))):
        assert not np.array_equal(first["target"], synth.sample(*other)["target"])


def test_reference_share_changes_nothing_else():
    for index in range(4):
        without = synth.sample(1, index, (32, 96), reference_share=0.0)
        with_ = synth.sample(1, index, (32, 96), reference_share=1.0)
        assert with_["has_reference"] and not without["has_reference"]
        for name in ("image", "target", "mask", "instruction", "word"):
            assert np.array_equal(with_[name], without[name])


@pytest.mark.parametrize("bucket", (*BUCKETS, (64, 96)))
def test_labels_say_which_letter_is_where(bucket):
    """A cell is shared out; letters stand in the order of the word, and what differs from the background lies in their
    boxes; a logo has one label. Asking for labels changes nothing else."""
    kinds = "\0\1" + string.ascii_letters + string.digits  # background, logo
    for index in range(12):
        plain, pair = (synth.sample(2, index, bucket, reference_share=0.0, cell=cell) for cell in (0, 4))
        labels = pair.pop("labels")
        assert same(plain, pair)
        assert labels.shape == (bucket[0] // 4, bucket[1] // 4, synth.LABELS) and labels.dtype == np.uint8
        assert (labels.astype(int).sum(-1) == 255).all()
        shares = labels / 255
        if pair["kind"] == "logo":
            assert shares[..., 1].sum() > 4 and not shares[..., 2:].any()
            continue
        assert not shares[..., 1].any()
        lines = pair["word"].split(" ")
        letters = {letter for letter in pair["word"].replace(" ", "")}
        found = {kinds[k] for k in range(2, len(kinds)) if shares[..., k].any()}
        assert found <= letters and len(found) >= 0.7 * len({letter for letter in letters if letter in kinds})
        if len(lines) == 1 and len(set(lines[0])) == len(lines[0]):
            columns = np.arange(shares.shape[1])
            centres = [
                (shares[..., kinds.index(letter)].sum(0) * columns).sum() / shares[..., kinds.index(letter)].sum()
                for letter in lines[0]
                if letter in found
            ]
            assert centres == sorted(centres)
        outside = np.kron(shares[..., 0], np.ones((4, 4))) == 1
        changed = np.abs(pair["target"].astype(int) - np.median(pair["target"], axis=(0, 1))).sum(-1)
        assert changed[~outside].mean() > 0.5 * changed[outside].mean()
    batch = next(loader.refine_batches(2, 2, (bucket,), reference_share=0.0, labels=True))
    assert not batch["has_reference"].any()
    for row in range(2):
        np.testing.assert_array_equal(batch["labels"][row], synth.sample(2, row, bucket, cell=4)["labels"])


@pytest.mark.parametrize("bucket", BUCKETS)
def test_crop_is_the_box_of_the_mask_plus_a_margin_that_rounds_to_the_bucket(bucket):
    for index in range(20):
        rng = np.random.default_rng(index)
        _, layout = synth._plan(rng, "train", bucket, 1.7)
        height, width = layout.size
        # Rounding to multiples of 32 at an area of 64², as the released geometry does at 1024².
        area_width = np.sqrt(64 * 64 * width / height)
        rounded = tuple(int(round(side / 32) * 32) for side in (area_width * height / width, area_width))
        assert rounded == bucket
        ink = Image.new("L", (width, height), 255)
        mask = picture.scribble(rng, layout, ink)
        assert mask.getbbox() == layout.box
        margins = (layout.box[0], layout.box[1], width - layout.box[2], height - layout.box[3])
        assert len(set(margins)) == 1 and 0.05 <= margins[0] / min(height, width) <= 0.18
        assert layout.quad.min() >= 0 and (layout.quad <= (width, height)).all()


# ---------------------------------------------------------------------------------------------- degradations


@pytest.mark.parametrize("name", degrade.DEGRADATIONS)
def test_degradation_alters_the_inside_only(name):
    rng = np.random.default_rng(4)
    target = picture.photo_window(rng, "train", (60, 150), (0.7, 1.0))
    other = picture.photo_window(rng, "train", (60, 150), (0.7, 1.0))
    mask = Image.new("L", target.size)
    mask.paste(255, (20, 10, 130, 50))
    before = target.tobytes()
    image, drawn = degrade.degrade(rng, target, mask, 30.0, lambda: other, (name,))
    assert drawn == name and image.size == target.size and target.tobytes() == before
    inside = np.asarray(mask) > 0
    changed = (np.asarray(image) != np.asarray(target)).any(-1)
    assert not changed[~inside].any()
    assert changed[inside].mean() > 0.3


@pytest.mark.parametrize("split", ["train", pytest.param("eval", marks=held_out)])
def test_scene_equals_its_target_outside_the_masks(split):
    for index in range(3):
        scene = synth.scene(2, index, split)
        count, height, width = scene["masks"].shape
        assert scene["image"].shape == scene["target"].shape == (height, width, 3)
        assert 1 <= count <= 3 and 256 <= min(height, width) and max(height, width) <= 512
        painted = scene["masks"].max(0) > 0
        assert np.array_equal(scene["image"][~painted], scene["target"][~painted])
        for mask, box, crop, reference in zip(scene["masks"], scene["boxes"], scene["crops"], scene["references"]):
            assert Image.fromarray(mask).getbbox() == tuple(box)
            inside = mask > 0
            assert (scene["image"][inside] != scene["target"][inside]).any()
            assert reference.shape == (crop[3] - crop[1], crop[2] - crop[0], 3)
        for name in ("instructions", "words", "fonts", "kinds", "degradations"):
            assert len(scene[name]) == count
        again = synth.scene(2, index, split)
        assert np.array_equal(scene["image"], again["image"]) and scene["words"] == again["words"]


# ---------------------------------------------------------------------------------------------- assets


@held_out
def test_splits_share_no_font_logo_photo_or_word():
    for parts in (
        lambda split: {face.family for face in assets.faces(split)},
        lambda split: {face.path for face in assets.faces(split)},
        lambda split: {logo.slug for logo in assets.logos(split)},
        lambda split: set(assets.photo_files(split)),
        lambda split: set(assets.words(split)),
    ):
        train, others = parts("train"), parts("eval")
        assert train and others and not train & others
    assert len(assets.words("train")) + len(assets.words("eval")) >= 1500
    assert len(assets.photo_files("train")) == 10


@held_out
def test_samples_use_their_split_only():
    fonts = {split: {face.name for face in assets.faces(split)} for split in assets.SPLITS}
    for split in assets.SPLITS:
        for index in range(10):
            pair = synth.sample(0, index, BUCKETS[index % 3], split)
            assert pair["kind"] == "logo" or pair["font"] in fonts[split]


def test_bad_arguments():
    with pytest.raises(RefineError, match="split.*'test'"):
        synth.sample(0, 0, (32, 96), "test")
    with pytest.raises(RefineError, match="batch_size"):
        loader.refine_batches(0, 3, rows=(3,))
    with pytest.raises(RefineError, match="weights"):
        loader.refine_batches(0, 2, buckets=BUCKETS, weights=[1.0])


@pytest.mark.parametrize(
    ("find", "split", "message"),
    [
        (assets.faces, "train", r"deckr-fonts is not installed.*refine-jax\[data\]"),
        (assets.faces, "eval", r"font-caladea is not installed.*refine-jax\[eval\]"),
        (assets.logos, "train", r"resvg-py is not installed.*refine-jax\[data\]"),
        (assets.photo_files, "eval", r"scikit-image is not installed.*refine-jax\[eval\]"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, find, split, message):
    def no_distribution(name):
        raise importlib.metadata.PackageNotFoundError(name)

    def no_module(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib.metadata, "files", no_distribution)
    monkeypatch.setattr(importlib, "import_module", no_module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RefineError, match=message):
        find.__wrapped__(split)


# ---------------------------------------------------------------------------------------------- loader


def test_batches_resume_and_keep_one_bucket():
    run = loader.refine_batches(7, 2)
    batches = []
    for step in range(6):
        if step == 3:
            state = json.loads(json.dumps(run.get_state()))
        batches.append(next(run))
    assert {batch["image"].shape[1:3] for batch in batches} == set(BUCKETS)
    for batch in batches:
        height, width = batch["image"].shape[1:3]
        assert batch["image"].shape == batch["target"].shape == batch["reference"].shape == (2, height, width, 3)
        assert batch["mask"].shape == (2, height, width) and batch["mask"].dtype == np.uint8
        assert batch["has_reference"].dtype == np.bool_ and batch["instruction"].shape == (2, 96)
        assert loader.decode_instruction(batch["instruction"][0])
    resumed = loader.refine_batches(7, 2)
    resumed.set_state(state)
    assert all(same(next(resumed), batch) for batch in batches[3:])
    run.set_state(state)
    assert same(next(run), batches[3])
    assert same(next(loader.refine_batches(7, 2, start=5)), batches[5])
    assert not same(next(loader.refine_batches(8, 2)), batches[0])


def test_hosts_share_out_the_global_batch():
    whole = next(loader.refine_batches(7, 4, start=1))
    parts = [next(loader.refine_batches(7, 4, start=1, rows=rows)) for rows in ((0, 1), (2, 3))]
    for name, value in whole.items():
        assert np.array_equal(value, np.concatenate([part[name] for part in parts]))
    assert not np.array_equal(parts[0]["target"], parts[1]["target"])


def test_workers_that_are_told_to_end_or_killed(monkeypatch):
    """A machine that shuts down tells workers too, and the step that is to be saved needs them; one that is killed is
    replaced, and the order stays."""
    expected = [next(found)["image"] for found in [loader.vae_batches(3, 2, source="world")] for _ in range(12)]
    run = loader.vae_batches(3, 2, source="world", workers=1)
    before = set(multiprocessing.active_children())
    own = lambda: set(multiprocessing.active_children()) - before
    try:
        for step, image in enumerate(expected):
            assert np.array_equal(next(run)["image"], image), step
            if step == 1:
                (first,) = own()
                os.kill(first.pid, signal.SIGTERM)
            elif step == 5:
                assert own() == {first}
                os.kill(first.pid, signal.SIGKILL)
        (second,) = own()
        assert second is not first
        monkeypatch.setattr(loader, "_DEATHS", 1)
        os.kill(second.pid, signal.SIGKILL)
        with pytest.raises(RefineError, match="data.workers 1: a worker process died 2 times"):
            for _ in range(9):
                next(run)
    finally:
        run.close()


def test_schedule_keeps_the_weights():
    order = loader.schedule(BUCKETS, [2.0, 1.0, 1.0])
    assert len(order) == 120 and order.count(BUCKETS[0]) == 60 and order[:4].count(BUCKETS[0]) == 2


@pytest.mark.parametrize("source", ["synth", "world"])
def test_vae_batches(source):
    run = loader.vae_batches(0, 3, source=source)
    first, second = next(run)["image"], next(run)["image"]
    assert first.shape == (3, 64, 64, 3) and first.dtype == np.uint8
    assert np.array_equal(next(loader.vae_batches(0, 3, source=source, start=1))["image"], second)
    assert len({picture.tobytes() for picture in np.concatenate([first, second])}) == 6


def test_vae_batches_of_nothing_known():
    with pytest.raises(RefineError, match="data.source 'photos': .*'synth' or 'world'"):
        loader.vae_batches(0, 3, source="photos")


def test_instructions_survive_the_fixed_width():
    assert loader.decode_instruction(loader.encode_instruction("Refine the logo 'ŠKODA'")) == "Refine the logo 'ŠKODA'"
    long = loader.decode_instruction(loader.encode_instruction("é" * 60))
    assert long == "é" * 48
