"""A cache of latents and conditioning tokens gives the objective what encoding online gives, and no other model's."""

import errno
import json
import multiprocessing
import shutil

import jax
import numpy as np
import pytest
import records_toy
import toy
from flax import linen as nn
from flax.linen import meta
from PIL import Image

from refine_jax import cached_pictures, checkpoint, cli, conditioning, flow, loading, objectives, parallel, prompts
from refine_jax.data import cache, cache_build, loader, records
from refine_jax.errors import RefineError
from refine_jax.model import decode_latents
from refine_jax.refine_programs import generate
from refine_jax.train import train

MESH = parallel.make_mesh({"fsdp": 1}, jax.devices()[:1])


def config_of(folder, dataset):
    config = toy.refine_config("")
    config.init_from, config.model, config.train_encoder = str(folder), {}, False
    config.lora = dict(rank=2, alpha=2.0, targets="blocks/attn/to_q")
    config.instruction_dropout = 0.4
    config.data = dict(
        source="records", path=str(dataset), buckets=((32, 64),), text_length=112, workers=0, max_corrupt=0
    )
    return config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(configuration, folder of the caches, the cache) of a toy model and ten pairs."""
    folder = tmp_path_factory.mktemp("cache")
    toy.write_model(folder / "model")
    records_toy.write(folder / "set", 10, 2)
    config = config_of(folder / "model", folder / "set")
    return config, folder / "caches", cache_build.build(config, folder / "caches", batch=2)


def wanted(config, model=None):
    model = model or objectives.make(config).model
    return cache.made_with(config, model, cache.fingerprint(cache.load_encoders(config, model)))


def test_the_cache_gives_what_encoding_online_gives(made):
    config, folder, _ = made
    opened = cache.open_cache(folder, wanted(config))
    objective = objectives.make(config)
    model, online = objective.model, objective.batches()
    cached = cache.batches(opened, config.seed, config.batch_size, dropout=config.instruction_dropout)
    variables = cache.load_encoders(config, model, MESH)
    band = cache_build.Band(config.boundary.r_out, config.boundary.r_in)

    def encode(batch):
        prompt = batch.pop("prompt")
        inputs = parallel.shard_batch({"pairs": batch, "prompt": prompt, "silent": prompt}, MESH)
        with jax.set_mesh(MESH), nn.logical_axis_rules(parallel.make_rules(config.rules)):
            made = jax.device_get(cache_build.encode(variables, inputs, model=model, band=band))
        return {name: value for name, value in made.items() if "silent" not in name}

    # Batches may be put together otherwise (a cache knows its buckets only), so rows are compared, by their targets.
    steps = 12
    seen = {}
    for _ in range(steps):
        for row in _rows(encode(next(online))):
            seen.setdefault(_name(row["target"]), []).append(row)
    found = silent = 0
    for _ in range(steps):
        for row in _rows(next(cached)):
            same = seen.get(_name(row["target"]), [])
            pairs = [other for other in same if other["text_mask"].sum() == row["text_mask"].sum()]
            assert len(same) > 0
            for other in pairs[:1]:
                found += 1
                silent += len({o["text_mask"].sum() for o in same}) > 1
                assert row.keys() == other.keys()
                for name in row:
                    if name == "reference" and not row["has_reference"]:
                        continue
                    a, b = (r[name][r["text_mask"]] if name == "text" else r[name] for r in (row, other))
                    np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)
    assert found >= 8 and silent  # with and without its instruction


def _rows(batch):
    return [{name: value[k] for name, value in batch.items()} for k in range(len(batch["target"]))]


def _name(target) -> tuple:
    return (target.shape, tuple(np.round(target.astype(np.float64).ravel()[:4], 2).tolist()))


def test_batches_are_those_of_the_seed_on_any_hosts_and_workers(made):
    *_, opened = made
    before = set(multiprocessing.active_children())
    whole = cache.batches(opened, 3, 4, dropout=0.4)
    parts = [cache.batches(opened, 3, 4, dropout=0.4, rows=rows) for rows in ((0, 1), (2, 3))]
    worked = cache.batches(opened, 3, 4, dropout=0.4, workers=1, start=1)
    seen = []
    try:
        for step in range(7):
            batch, shares = next(whole), [next(part) for part in parts]
            seen += [_name(target) for target in batch["target"]]
            for name, value in batch.items():
                assert np.array_equal(value, np.concatenate([share[name] for share in shares]))
            if step:
                other = next(worked)
                if step == 1:  # another takes over
                    for worker in set(multiprocessing.active_children()) - before:
                        worker.kill()
                assert all(np.array_equal(batch[name], other[name]) for name in batch)
    finally:
        worked.close()
    assert worked._deaths == 1 and len(set(seen)) == 10


def test_no_room_in_shared_memory_is_said(made, monkeypatch):
    class Full:
        def __next__(self):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            pass

    *_, opened = made
    worked = cache.batches(opened, 3, 4, workers=2)
    monkeypatch.setattr(worked, "_build", Full)
    with pytest.raises(RefineError, match=r"data.workers 2: no room .*\(/dev/shm\), for 4 rows a batch"):
        next(worked)
    worked.close()


def test_a_damaged_entry_is_left_out_and_counted(made, tmp_path):
    *_, opened = made
    shutil.copytree(opened.folder, tmp_path / "copy")
    copy = cache.Cache(tmp_path / "copy")
    for number in (3, 7):
        records_toy.damage(copy.place(number)[0], opened[number]["target"].tobytes())
    good, bad = (cache.batches(c, 3, 4, dropout=0.4, max_corrupt=2) for c in (opened, cache.Cache(copy.folder)))
    lost = {_name(opened[number]["target"]) for number in (3, 7)}
    replaced = 0
    for _ in range(good.plan.steps):
        a, b = next(good), next(bad)
        assert a.keys() == b.keys() and "skipped" not in a
        for before, after in zip(map(_name, a["target"]), map(_name, b["target"])):
            assert after not in lost and (after == before or before in lost)
            replaced += before in lost
    assert replaced >= 2 and bad.corrupt == {3, 7} and not good.corrupt
    strict = cache.batches(cache.Cache(copy.folder), 3, 4, dropout=0.4, max_corrupt=1)
    with pytest.raises(RefineError, match="2 corrupt records, data.max_corrupt allows 1: .*record .*record"):
        for _ in range(good.plan.steps):
            next(strict)


def test_the_wrong_cache_is_refused_before_the_encoder_is_read(made, monkeypatch):
    config, folder, _ = made
    wrong = config.copy_and_resolve_references()
    wrong.data.source, wrong.data.path, wrong.data.text_length = "cache", str(folder), 128
    monkeypatch.setattr(cache, "load_encoders", None)
    with pytest.raises(RefineError, match="text_length was 112, is 128"):
        objectives.make(wrong).batches()


def test_a_cache_of_other_weights_or_settings_is_refused(made, tmp_path):
    config, folder, opened = made
    model = objectives.make(config).model
    right = wanted(config, model)
    assert cache.open_cache(opened.folder, right).folder == opened.folder
    weights = dict(toy.random_variables(toy.model_config()))
    weights["vl"] = jax.tree.map(np.copy, weights["vl"])
    leaf = jax.tree.leaves(weights["vl"])[3]
    leaf.reshape(-1)[1] += 1e-3  # one value
    toy.write_model(tmp_path / "other")
    checkpoint.save_model(tmp_path / "other", toy.model_config().to_manifest(), weights)
    other = config.copy_and_resolve_references()
    other.init_from = str(tmp_path / "other")
    with pytest.raises(
        RefineError, match=r"another model or settings \(weights was \"[0-9a-f]{16}\", is .*build it again"
    ):
        cache.open_cache(folder, wanted(other))
    with pytest.raises(RefineError, match="text_length was 112, is 128"):
        cache.open_cache(folder, {**right, "text_length": 128})
    with pytest.raises(RefineError, match="no finished cache there"):
        cache.open_cache(tmp_path, right)
    with pytest.raises(RefineError, match="dataset.json: format 'refine_jax cache'"):
        records.Dataset(opened.folder)


def test_the_fingerprint_sees_every_value_and_its_place():
    tree = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(3, np.float32)}
    known = cache.fingerprint(tree)
    assert known == cache.fingerprint({name: jax.numpy.asarray(leaf) for name, leaf in tree.items()})
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    assert known == cache.fingerprint(placed)
    for change in (
        {**tree, "a": tree["a"][:, ::-1]},
        {**tree, "a": tree["a"].reshape(4, 3)},
        {**tree, "c": tree["b"]},
        {"a": tree["a"], "d": tree["b"]},
        {**tree, "b": np.array([1, 1, np.nextafter(np.float32(1), np.float32(2))], np.float32)},
        {**tree, "b": -tree["b"]},
    ):
        assert cache.fingerprint(change) != known


def test_a_killed_build_continues_and_a_second_one_finds_it(made, tmp_path, monkeypatch):
    config, _, opened = made
    monkeypatch.setattr(cache_build, "_ENTRIES", 4)
    calls = []
    real = cache_build._Encoder._encoded

    def encoded(self, entries, group):
        calls.append(entries)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, entries, group)

    monkeypatch.setattr(cache_build._Encoder, "_encoded", encoded)
    with pytest.raises(KeyboardInterrupt):
        cache_build.build(config, tmp_path, batch=2)
    finished = list(tmp_path.glob("*/shards/*.json"))
    assert finished
    again = cache_build.build(config, tmp_path, batch=2)
    assert again.folder.name == opened.folder.name  # by content
    for number in range(10):
        a, b = again[number], opened[number]
        assert np.array_equal(again.index[number], opened.index[number]) and a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) for name in a)
    before = len(calls)
    cache_build.build(config, tmp_path, batch=2)
    assert len(calls) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(train_encoder=True, lora=None), "keeps its encoder frozen"),
        ({"data.source": "synth"}, "data.source is 'synth'"),
        ({"data.margin_jitter": 0.2}, "data.margin_jitter 0.2"),
        ({"data.reference_dropout": 0.2}, "data.reference_dropout 0.2"),
        (dict(conditioning="rvr", prompt="rvr-training"), "conditioning 'rvr' trains from records"),
    ],
)
def test_what_cannot_be_cached_is_said(made, tmp_path, change, message):
    config = made[0].copy_and_resolve_references()
    with config.unlocked():
        for name, value in change.items():
            group = config.data if name.startswith("data.") else config
            group[name.removeprefix("data.")] = value
    with pytest.raises(RefineError, match=message):
        cache_build.build(config, tmp_path, batch=2)


def test_the_command(made, tmp_path, capsys):
    config, folder, opened = made
    file = tmp_path / "config.py"
    text = f"ml_collections.ConfigDict(json.loads({config.to_json()!r}))"
    file.write_text(f"import json, ml_collections\ndef get_config():\n    return {text}\n")
    shutil.copytree(folder, tmp_path / "caches")
    words = ["data", "cache", "--config", str(file), "--output", str(tmp_path / "caches"), "--quiet", "--batch", "4"]
    assert cli.main(words) == 0
    assert opened.folder.name in capsys.readouterr().out
    assert cli.main([*words, "--config.data.path=/nowhere"]) == 2
    assert "/nowhere" in capsys.readouterr().err
    assert cli.main([*words[:-1], "0"]) == 2
    assert cli.main(["data", "check", "x", "--config.seed=1"]) == 2
    assert "only for" in capsys.readouterr().err
    assert json.loads((opened.folder / "dataset.json").read_text())["recipe"]["data"]["digest"]


def test_samples_of_the_cache_are_what_the_pictures_give(made):
    """One whose reference is there and one without, against the sampler from pixels on the same noise."""
    config, folder, opened = made
    rows = cache.rows(opened, 10)
    assert len(rows) == 10 and [len(cache.rows(opened, count)) for count in (0, 3, 99)] == [0, 3, 10]
    wanted = [next(k for k, row in enumerate(rows) if row["has_reference"] == there) for there in (True, False)]
    config = config.copy_and_resolve_references()
    config.data.source, config.data.path = "cache", str(folder)
    objective = objectives.make(config)
    model = objective.model
    source = loading.open_model(config.init_from)
    names = ("mmdit", "vae", "vl")
    variables = source.parameters(model.abstract(names), parallel.param_shardings(model.boxed(names), MESH), "float32")
    with jax.set_mesh(MESH), nn.logical_axis_rules(parallel.make_rules(config.rules)):
        samples = cached_pictures.decoded(model, variables["vae"], [rows[k] for k in wanted], MESH)
        found = cached_pictures.painted(model, variables, {}, samples, MESH, 7)
    dataset = records.Dataset(made[0].data.path)
    tokenizer = source.tokenizer()
    for number, (k, sample, picture) in enumerate(zip(wanted, samples, found)):
        number_of, *sides = (int(v) for v in opened.index[k])
        size, shown = tuple(sides[:2]), tuple(sides[2:]) if sides[2] else tuple(sides[:2])
        pair = loader.pair(dataset[number_of], size, shown, model.margin, 96)
        text, here = loader.decode_instruction(pair["instruction"]), bool(pair["has_reference"])
        grids = [model.vl_grid(shape[1] / shape[0]) for shape in (size, shown, size)]
        prompt = model.fit_prompt(tokenizer, text, grids, [True, here, True], config.data.text_length)
        batch = {name: np.float32(value)[None] for name, value in pair.items() if name in ("image", "reference")}
        batch["mask"] = np.repeat(np.float32(pair["mask"])[None, ..., None], 3, axis=-1)
        looks = [batch[name] for name in ("image", "reference", "mask")]
        views = [conditioning.view(x[0], None, model.vl_sizes(x.shape[2] / x.shape[1])) for x in looks]
        noise = np.random.default_rng([7, number]).standard_normal(rows[k]["image"].shape, dtype=np.float32)[None]
        inputs = {
            "prompt": vars(prompts.pad_prompts([prompt], config.data.text_length)),
            "noise": noise,
            "sigmas": flow.schedule(model.scheduler, model.steps, noise[0, ..., 0].size // model.mmdit.patch_size**2),
        }
        present = [None, np.array([here]), None]
        run = jax.jit(lambda v, i, s, r: generate(model, v, {}, i, s, present, [x[None] for x in r])[1])  # noqa: B023
        expected = np.asarray(run(variables, inputs, looks, views))[0]
        apart = np.abs(np.asarray(picture, np.float32) - expected)
        assert apart.max() <= 1 and apart.mean() < 0.01 and expected.std() > 5
        once = lambda x: np.asarray(decode_latents(model, variables, x[None]))[0]  # noqa: E731
        for name in ("image", "target"):
            assert np.abs(np.asarray(sample[name], np.float32) - once(rows[k][name])).max() <= 1


def test_a_lora_is_trained_from_the_cache(made, tmp_path):
    """Loss and update are those of training on the pictures, batch for batch; the encoders are not in the program."""
    config, folder, _ = made
    config = config.copy_and_resolve_references()
    config.steps, config.batch_size = 1, 2
    online = objectives.make(config)
    config.data.source, config.data.path = "cache", str(folder)
    objective = objectives.make(config)
    assert set(objective.frozen) == {"mmdit"}
    batches = objective.batches()
    batch = next(batches)
    batches.close()
    shapes = objective.batch_shapes()[0]
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: (v.shape, v.dtype) for k, v in shapes.items()}

    config.pictures, config.data.validation = dict(every=1, count=3), str(tmp_path / "nothing")
    with pytest.raises(RefineError, match="data.validation '.*nothing': no finished cache"):
        objectives.make(config).batches()
    config.data.validation, config.validation = str(folder), dict(every=1, batches=1)
    with pytest.raises(RefineError, match="validation.every 1: .* not trained on; set data.validation to a cache"):
        objectives.make(config).held_out()
    other = tmp_path / "other"
    other.symlink_to(folder)
    config.data.validation = str(other)
    with pytest.raises(RefineError, match="not trained on"):
        objectives.make(config).held_out()
    other.unlink()
    shutil.copytree(folder, other)
    train(config, tmp_path / "cached", progress=False)
    told = [json.loads(line) for line in (tmp_path / "cached" / "validation.jsonl").open()]
    assert [line["step"] for line in told] == [0, 1] and told[0]["loss"] > 0 and told[0].keys() == told[1].keys()
    with Image.open(tmp_path / "cached" / "pictures" / "00000001.png") as shown:  # three rows of three pictures
        assert shown.size[1] == 3 * (128 + 4) and len(shown.getcolors(2**24)) > 1000
    line = json.loads((tmp_path / "cached" / "metrics.jsonl").read_text())
    params = jax.eval_shape(online.init, jax.random.key(config.seed))
    placed = parallel.param_shardings(params, None)
    frozen = objective.load(parallel.param_shardings(objective.frozen, None))
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    start = meta.unbox(jax.jit(online.init)(jax.random.key(config.seed)))
    assert jax.tree.structure(start) == jax.tree.structure(placed)
    loss, _ = jax.jit(objective.loss)(start, frozen, batch, key)
    np.testing.assert_allclose(line["loss"], loss, rtol=1e-5)
    assert (tmp_path / "cached" / "model" / objectives.LORA_FILE).is_file()
    config.train_encoder = True
    with pytest.raises(RefineError, match="train_encoder=False"):
        objectives.make(config)
