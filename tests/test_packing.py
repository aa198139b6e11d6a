"""BAGEL's training: what is read, how it is packed, and that the loss of a packed row is the authors'."""

import dataclasses
import functools
import json
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import records_toy
import test_bagel as reference
import toy
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

from refine_jax import bagel, bagel_objective, checkpoint, cli, flow, loading, objectives, parallel, recipes
from refine_jax.bagel import BagelModel
from refine_jax.data import packing, sequences, world
from refine_jax.data.packing import Bucket, Packing
from refine_jax.data.sequences import Painted, Seen, Text
from refine_jax.errors import RefineError
from refine_jax.model import ModelConfig
from refine_jax.models.bagel import patchify
from refine_jax.models.flux_vae import FluxVAE, FluxVAEConfig, normalize
from refine_jax.regenerate import Regenerator
from refine_jax.train import train

WORDING = sequences.Wording("look, then paint anew", "two {} cups")
VAE = FluxVAEConfig(ch=4, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=4, num_groups=2)
MODEL = BagelModel(bagel=reference.CONFIG, vae=VAE, vae_sides=(32, 16), vit_sides=(16, 4))
SIZE, VIEW, GRID = (32, 32), (16, 16), (2, 2)


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# ------------------------------------------------------------------------------------------------------------ the loss

# Samples in the words of test_bagel's `batch_of`, whose layout and losses are proven against the authors' code, and
# in ours: an RvR pair, one shown latents too, text to image, understanding. Pictures of one size each.
THEIRS = [
    [
        ("text", "look, then paint anew", 0),
        ("vit", ("bad", *VIEW)),
        ("text", "two red cups", 0),
        ("vae", ("good", *GRID), 1),
    ],
    [("vae", ("old", *GRID), 0), ("vit", ("old", *VIEW)), ("text", "bluer", 0), ("vae", ("new", *GRID), 1)],
    [("text", "a cat", 0), ("vae", ("cat", *GRID), 1)],
    [("vit", ("dog", *VIEW)), ("text", "what is it", 0), ("text", "a small dog", 1)],
]
OURS = [
    (WORDING.rvr("red"), ("bad", "good")),
    ((Painted(0, clean=True), Seen(0), Text("bluer"), Painted(1)), ("old", "new")),
    (sequences.text_to_image("a cat"), ("cat",)),
    (
        sequences.conversation(
            [{"from": "human", "value": "<image>\nwhat is it"}, {"from": "gpt", "value": "a small dog"}], 1
        ),
        ("dog",),
    ),
]


def encode(text: str) -> np.ndarray:
    return np.array([reference.BOS, *reference.encode(text), reference.EOS], np.int32)


def packed_row() -> dict[str, np.ndarray]:
    row = packing.Row(Bucket(SIZE, VIEW, 4, 96, 20))
    for number, (items, names) in enumerate(OURS):
        pictures = [np.asarray(reference.picture(name, *VIEW)) for name in names]
        row.add(number, items, pictures, encode, (reference.START, reference.END))
    return row.arrays()


def test_a_row_is_laid_out_as_the_authors_do():
    """Token for token; padding is of no sample."""
    theirs, ours = reference.batch_of([THEIRS]), packed_row()
    count = theirs.ids.shape[1]
    np.testing.assert_array_equal(ours["text_ids"][:count], theirs.ids[0])
    np.testing.assert_array_equal(ours["text_scored"][ours["text_scored"] >= 0], np.flatnonzero(theirs.loss[0]))
    for field in dataclasses.fields(theirs.text):
        np.testing.assert_array_equal(ours[f"text_{field.name}"][:count], getattr(theirs.text, field.name)[0])
    assert (ours["text_sample"][count:] == -1).all()
    batch = {name: jnp.asarray(value)[None] for name, value in ours.items()}
    for name, tokens, segments in (("seen", 16, theirs.vit), ("painted", 4, theirs.gen)):
        found = bagel_objective.picture_segments(batch, name, tokens)
        count = segments.sample.shape[1]
        for field in dataclasses.fields(segments):
            np.testing.assert_array_equal(getattr(found, field.name)[:, :count], getattr(segments, field.name))
        assert (found.sample[:, count:] == -1).all()


def test_the_loss_of_a_row_is_the_authors():
    """Value and gradient against `test_bagel.training_losses`; what stands in empty places does not matter."""
    theirs = reference.batch_of([THEIRS])
    params = reference.variables()["params"]
    clean, eps = theirs.latents, reference.noise("epsilon", 16, 16)[None]
    times = np.array([[0.3, 0.9, 0.6, 0.2]], np.float32)  # good, (old, which is clean), new, cat
    spread = np.repeat(times, 4, axis=1)
    spread[0, 4:8] = 0
    inputs = (theirs, clean, eps, spread, theirs.gen.noisy[0])
    (loss, (mse, ce)), gradient = jax.jit(
        jax.value_and_grad(lambda p: reference.training_losses(p, inputs), has_aux=True)
    )(params)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def ours(params, batch, clean, noise, t):
        parts = bagel_objective.row_losses(MODEL, {"bagel": params}, {}, batch, clean, noise, t)
        return parts["mse"] + 0.25 * parts["ce"], parts

    row = packed_row()
    names = [name for _, names in OURS for name in names]
    for slot, name in enumerate(("bad", "old", "dog")):
        row["seen_pixels"][slot] = reference.picture(name, *VIEW)
    assert names.count("old") == 1
    # A second row with nothing in it, and garbage where nothing is.
    rng = np.random.default_rng(0)
    empty = {name: np.zeros_like(value) for name, value in row.items()}
    for name in ("text_sample", "text_scored", "seen_sample", "painted_sample"):
        empty[name] -= 1
    empty["seen_pixels"] += 77
    batch = {name: np.stack([value, empty[name]]) for name, value in row.items()}
    pad = lambda x: np.concatenate([x, rng.standard_normal(x.shape).astype(np.float32)])
    (found, parts), slope = ours(params, batch, pad(clean), pad(eps), np.abs(pad(times)))
    np.testing.assert_allclose(
        [found, parts["mse"], parts["ce"]], [loss, np.mean(np.asarray(mse)), np.mean(np.asarray(ce))], rtol=1e-5
    )
    scale = float(jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient))))
    difference = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), gradient, slope)
    assert float(jnp.sqrt(sum(jax.tree.leaves(difference)))) <= 1e-5 * scale


def test_each_painted_picture_meets_its_own_latents():
    """`packed_losses` of two rows with several pictures each: `row_losses` of latents that were made one by one."""
    row = packed_row()
    count = row["painted_pixels"].shape[0]
    pixels = np.stack([[np.asarray(reference.picture(f"{b} {m}", *SIZE)) for m in range(count)] for b in range(2)])
    batch = {name: jnp.asarray(np.stack([value] * 2)) for name, value in row.items()} | {"painted_pixels": pixels}
    vae = jax.tree.map(
        lambda x: 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), MODEL.abstract(("vae",))["vae"]
    )
    variables = {"bagel": reference.variables()["params"], "vae": vae}
    key, sigma = jax.random.key(3), dict(distribution="logit_normal", shift=4.0)
    found = jax.jit(lambda b: bagel_objective.packed_losses(MODEL, variables, {}, b, key, sigma))(batch)

    k_vae, k_time, k_noise = jax.random.split(key, 3)
    encode = jax.jit(lambda x: FluxVAE(VAE).apply({"params": vae}, x / 127.5 - 1.0, method="encode"))
    clean = []
    for b in range(2):
        tokens = []
        for m, one in enumerate(jax.random.split(k_vae, count)):
            mean, log_variance = encode(jnp.asarray(pixels[b, m][None], jnp.float32))
            drawn = jax.random.normal(one, (2, *mean.shape[1:]))[b]
            z = normalize(mean[0] + jnp.exp(0.5 * log_variance[0]) * drawn, VAE)
            tokens.append(patchify(z[None], MODEL.bagel)[0])
        clean.append(jnp.concatenate(tokens))
    clean = jnp.stack(clean)
    assert float(jnp.abs(clean[0, :4] - clean[0, 4:8]).max()) > 0.1
    t, noise = flow.sample_sigma(k_time, (2, count), **sigma), jax.random.normal(k_noise, clean.shape)
    expected = jax.jit(lambda b: bagel_objective.row_losses(MODEL, variables, {}, b, clean, noise, t))(batch)
    for name in ("mse", "ce"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


def test_parts_of_a_batch_count_as_the_whole():
    """`optimizer.accumulate`: rows with few and with many scored tokens, and one with none."""
    row = packed_row()
    rng = np.random.default_rng(2)
    batch = {name: np.stack([value] * 4) for name, value in row.items()}
    batch["text_scored"][1, 1:], batch["painted_noisy"][1, 1:] = -1, False
    batch["text_scored"][2], batch["painted_noisy"][2] = -1, False
    batch["seen_pixels"] = rng.integers(0, 256, batch["seen_pixels"].shape, np.uint8)
    clean, noise = rng.standard_normal((2, 4, 4 * batch["painted_noisy"].shape[1], 16)).astype(np.float32)
    t = rng.uniform(0.1, 0.9, batch["painted_noisy"].shape).astype(np.float32)
    variables = {"bagel": reference.variables()["params"]}
    losses = jax.jit(lambda *inputs: bagel_objective.row_losses(MODEL, variables, {}, *inputs))
    whole = losses(batch, clean, noise, t)
    shared = bagel_objective.shared_counts(MODEL, batch, 2)
    take = lambda k: jax.tree.map(lambda x: x[k::2], (shared, clean, noise, t))
    parts = [losses(*take(k)) for k in range(2)]
    for name in ("mse", "ce"):
        assert abs(parts[0][name] - parts[1][name]) > 1e-3
        np.testing.assert_allclose(np.mean([part[name] for part in parts]), whole[name], rtol=1e-5)


# -------------------------------------------------------------------------------------------------------------- packing

BUCKETS = [Bucket((64, 64), (56, 56), 3, 50, 30), Bucket((32, 64), (28, 56), 4, 50, 30)]


@st.composite
def indices(draw):
    """Sources of pictures of any shape and texts up to more than a row holds."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        rng = np.random.default_rng(draw(st.integers(0, 10**6)))
        count = draw(st.integers(60, 200))
        seen, painted = rng.integers(0, 3, count), rng.integers(0, 3, count)
        pictures = (seen + painted > 0)[:, None] * rng.integers(20, 200, (count, 2))
        text = rng.integers(1, 60, count)
        found.append(np.column_stack([seen, painted, text, text // rng.integers(1, 9, count), pictures]))
    return found


@settings(max_examples=25, deadline=None)
@given(indices(), st.integers(0, 99), st.integers(1, 4))
def test_rows_hold_what_fits_and_nothing_is_lost(found, seed, batch_size):
    weights = [2.0, 1.0, 1.0][: len(found)]
    plan = Packing(found, weights, batch_size, BUCKETS, seed)
    other = pickle.loads(pickle.dumps(plan))
    long = [(index[:, 2] > 50) | (index[:, 3] > 30) for index in found]
    assert plan.left_out == [int(which.sum()) for which in long]
    steps = 60
    # A position does not depend on what was asked before.
    late = other.rows(steps - 1)
    counts = [np.zeros(len(index), int) for index in found]
    for step in range(steps):
        bucket, rows = plan.rows(step)
        assert len(rows) == batch_size and other.rows(step) == (bucket, rows)
        for row in rows:
            need = sum((found[source][number][:4] for source, number in row), np.zeros(4))
            assert (need <= bucket.room).all()
            for source, number in row:
                counts[source][number] += 1
                size = found[source][number][4:]
                if size.all():
                    distances = [np.abs(np.log(size / b.painted[::-1])).sum() for b in BUCKETS]
                    assert bucket == BUCKETS[np.argmin(distances)]
    assert plan.rows(steps - 1) == late
    waiting = 2 * (50 + 4 * batch_size * 4)
    for which, drawn in zip(long, counts):
        usable = drawn[~which]
        # Each pass has every sample once; some of it is still being filled in.
        assert not drawn[which].any() and usable.max() * len(usable) - usable.sum() <= len(usable) + waiting


def test_the_mix_and_the_passes():
    """Sources are drawn by weight; each is passed through once before it begins again; rows are well filled; a bucket
    that few samples are for comes too."""
    rng = np.random.default_rng(0)
    sizes = np.tile([64, 64], (300, 1))
    sizes[:9] = [64, 32]
    pairs = np.column_stack([np.ones((300, 2), int), rng.integers(20, 60, 300), np.zeros(300, int), sizes])
    none = np.zeros(80, int)
    alone = np.column_stack([none, none + 1, rng.integers(5, 20, 80), none, np.full((80, 2), 64)])
    buckets = [Bucket((64, 64), (56, 56), 4, 400, 0), Bucket((32, 64), (28, 56), 4, 400, 0)]
    plan = Packing([pairs, alone], [2.0, 1.0], 2, buckets, 1)
    batches = [plan.rows(step) for step in range(400)]
    samples = [sample for _, rows in batches for row in rows for sample in row]
    counts = np.bincount([source for source, _ in samples])
    assert 1.9 < counts[0] / counts[1] < 2.1
    drawn = np.bincount([number for source, number in samples if source == 0], minlength=300)
    assert drawn.max() - drawn[9:].min() <= 2 and drawn[:9].min() >= drawn.max() / 2
    assert np.mean([len(row) for _, rows in batches for row in rows]) >= 3.9
    assert {bucket for bucket, _ in batches} == set(buckets)
    few = Packing([pairs[9:14]], [1.0], 64, buckets[:1], 1)
    assert {number for row in few.rows(7)[1] for _, number in row} == set(range(5))
    with pytest.raises(RefineError, match="no sample of 0 fits"):
        Packing([pairs], [1.0], 1, [buckets[0]._replace(text=10)], 1)
    with pytest.raises(RefineError, match="stands there twice"):
        Packing([pairs], [1.0], 1, buckets[:1] * 2, 1)


def test_pictures_go_to_the_size_that_they_would_be_painted_at():
    """A small picture is enlarged to the shortest side and no further."""
    model = BagelModel()
    buckets = [Bucket(size, model.seen_size(size), 1, 100, 0) for size in recipes.RVR_BUCKETS]
    sizes = [(300, 300), (1024, 1024), (4000, 3000), (1280, 720), (640, 480), (500, 2000)]
    index = [np.array([[1, 1, 10, 0, *size]]) for size in sizes]
    found = [Packing([one], [1.0], 1, buckets, 0, model.painted_size).rows(0)[0].painted for one in index]
    assert found == [(512, 512), (1024, 1024), (768, 1024), (576, 1024), (512, 704), (1024, 512)]


# -------------------------------------------------------------------------------------------------------------- sources


def picture_file(path, size, colour):
    Image.new("RGB", size, colour).save(path)
    return path.name


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A folder laid out as the released data."""
    import pyarrow
    import pyarrow.parquet

    root = tmp_path_factory.mktemp("released")
    names = [picture_file(root / f"{k}.png", (40 + k, 30), (k, 9, 200)) for k in range(8)]
    write = lambda name, **columns: pyarrow.parquet.write_table(pyarrow.table(columns), root / name, row_group_size=2)
    write(
        "rvr.parquet",
        image_list=[[names[k], names[k + 1]] for k in range(4)],
        user_prompt=[[f"prompt {k}"] for k in range(4)],
    )
    write("as_text.parquet", image_list=[str(names[:2])], user_prompt=["一只猫"])
    write("alone.parquet", cache_image=names[:3], user_prompt=["a", "b", "c"])
    write("three.parquet", image_list=[names[:3]], user_prompt=["x"])
    write("gone.parquet", image_list=[[names[0], "nowhere.png"]], user_prompt=["x"])
    write("other.parquet", prompt=["x"])
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A picture."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    lines = [{"image": names[3], "conversations": turns}, {"conversations": turns[2:]}]
    (root / "talk.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def opened(folder, name, task, form="parquet", **more):
    return sequences.open_source("it", dict(format=form, task=task, path=str(folder / name), **more), WORDING)


def test_the_released_formats(released):
    length = lambda text: len(text) + 2
    source = opened(released, "rvr.parquet", "rvr")
    items, pictures = source.sample(1)
    assert (
        items
        == WORDING.rvr("prompt 1")
        == (
            Text("look, then paint anew"),
            Seen(0),
            Text("two prompt 1 cups"),
            Painted(1),
        )
    )
    assert [p.shape for p in pictures] == [(30, 41, 3), (30, 42, 3)] and pictures[0][0, 0].tolist() == [1, 9, 200]
    assert source.index(length).tolist()[1] == [1, 1, 23 + 2 + 19 + 2, 0, 42, 30]
    assert len(opened(released, "as_text.parquet", "rvr")) == 1
    source = opened(released, "alone.parquet", "text_to_image", root=str(released))
    assert source.sample(2)[0] == (Text("c", optional=True), Painted(0)) and len(source) == 3
    talk = opened(released, "talk.jsonl", "understanding", "jsonl")
    assert talk.sample(0)[0] == (
        Seen(0),
        Text("What is it?"),
        Text("A picture.", scored=True),
        Text("Sure?"),
        Text("Yes.", scored=True),
    )
    assert talk.index(length).tolist()[1] == [0, 0, 7 + 6, 5, 0, 0] and talk.sample(1)[1] == []


def test_what_cannot_be_used_is_named(released, tmp_path):
    cases = [
        (dict(name="three.parquet", task="rvr"), "three.parquet row 0: 3 pictures"),
        (dict(name="gone.parquet", task="rvr"), "gone.parquet row 0.*nowhere.png.*set root"),
        (dict(name="other.parquet", task="rvr"), "has columns prompt"),
        (dict(name="nothing", task="rvr"), "no .parquet file"),
        (dict(name="rvr.parquet", task="understanding"), r"task 'understanding': of parquet choose"),
        (dict(name="rvr.parquet", task="rvr", form="csv"), "format 'csv': choose one of"),
        (dict(name="rvr.parquet", task="rvr", sidde=3), "sources.it.sidde"),
        (dict(name="pairs", task="rvr", form="records", root="x"), "sources.it.root: no such setting here"),
        (dict(name="x", task="rvr", form="world"), "sources.it.path: no such setting here"),
        (dict(name="x.jsonl", task="understanding", form="jsonl"), "cannot be read"),
    ]
    for arguments, message in cases:
        with pytest.raises(RefineError, match=message):
            opened(released, **arguments)
    tokenizer = ModelConfig.byte_tokenizer()
    length = lambda text: len(bagel.text_ids(tokenizer, text))
    good = '{"conversations": [{"from": "gpt", "value": "a\u2028b"}]}\n'
    marked = '{"conversations": [{"from": "gpt", "value": "say <|im_end|>"}]}\n'
    lines = {
        "{": "line 1",
        '{"conversations": [{"from": "gpt", "value": 5}]}': "no text: 5",
        '{"image": [{"path": 1}], "conversations": []}': "are to be paths",
        '{"image": null, "conversations": [{"from": "human", "value": "<image>"}]}': "1 times <image> for 0",
        '{"conversations": []}': "to learn from",
        '{"video": "x", "conversations": []}': "a video",
        '{"image": "0.png", "conversations": [{"from": "gpt", "value": "x"}]}': "0 times <image> for 1",
        "[]": "line 1",
    }
    for line, message in lines.items():
        (tmp_path / "bad.jsonl").write_text(line)
        with pytest.raises(RefineError, match=message):
            opened(tmp_path, "bad.jsonl", "understanding", "jsonl")
        # Among enough good ones it is left out and named.
        (tmp_path / "bad.jsonl").write_text(line + "\n" + marked + good * 300)
        source = opened(tmp_path, "bad.jsonl", "understanding", "jsonl")
        index = source.index(length)
        assert len(source) == len(index) == 300 and len(source.corrupt) == 2
        assert re.search(message, source.corrupt[0]) and "line 2" in source.corrupt[1]


def test_our_records_and_the_small_world(tmp_path):
    records_toy.write(tmp_path / "data", 4, 1)
    source = opened(tmp_path, "data", "rvr", "records")
    (_, _, prompt, _), (image, target) = source.sample(2)
    assert image.shape == target.shape and (image != target).any() and "two" in prompt.text
    for number, row in enumerate(source.index(len)):
        items, pictures = source.sample(number)
        exact = sequences._counts(items, pictures[-1].shape[1::-1], len)
        assert exact[:2] == tuple(row[:2]) and exact[2] <= row[2] and exact[3:] == tuple(row[3:])
    for task in sequences.TASKS:
        drawn = sequences.open_source("w", dict(format="world", task=task, count=9, seed=3), WORDING)
        pair = world.sample(3, 5)
        items, pictures = drawn.sample(5)
        np.testing.assert_array_equal(pictures[-1], pair["image"])
        assert any(isinstance(item, Text) and pair["prompt"] in item.text for item in items)
        size = lambda text: len(text.encode()) + 2
        index = drawn.index(size)
        assert len(index) == 9 and (np.array(sequences._counts(items, (64, 64), size)) <= index[5]).all()


# ------------------------------------------------------------------------------------------------------------- training


def configuration(**changes):
    config = toy.shipped("bagel_debug")
    config.steps, config.save_every, config.log_every = 2, 2, 1
    config.data.tokens, config.data.text_length, config.data.answer_length = 1110, 832, 300
    for name, value in changes.items():
        with config.ignore_type():
            config[name] = value
    return config


def test_batches_resume_and_are_shared_by_hosts(monkeypatch, capsys):
    config = configuration()
    objective = objectives.make(config)
    batches = objective.batches()
    found = [next(batches) for _ in range(3)]
    shapes = objective.batch_shapes()[0]
    assert {name: (x.shape, x.dtype) for name, x in found[0].items()} == {
        name: (x.shape, x.dtype) for name, x in shapes.items()
    }
    again = objective.batches()
    again.set_state({"step": 2})
    following = next(again)
    for name, value in found[2].items():
        np.testing.assert_array_equal(following[name], value)
    present = [x["text_sample"].max(axis=1) for x in found]
    assert min(map(min, present)) >= 1  # several samples in every row
    assert any((x["text_scored"] >= 0).any() for x in found) and all(x["painted_noisy"].any() for x in found)
    # Two hosts have its halves.
    for host in range(2):
        monkeypatch.setattr(parallel, "own_rows", lambda *_, host=host: (host,))
        half = objectives.make(config).batches()
        for whole in found:
            for name, value in next(half).items():
                np.testing.assert_array_equal(value, whole[name][host : host + 1])
        half.close()
    # Others than before: said, and gone on with.
    again.set_state({"step": 1, "data": "other"})
    assert "the samples are others than before" in capsys.readouterr().err
    for iterator in (batches, again):
        iterator.close()
    config.pictures = dict(every=1, count=1)
    config.data.sources.rvr.weight = config.data.sources.text_to_image.weight = 0.0
    with pytest.raises(RefineError, match="pictures: no source"):
        objectives.make(config).batches()
    # What a run shows: pairs of the source that regenerates, with the prompt as its user said it.
    drawn = config.data.sources.rvr
    for number, sample in enumerate(objective.samples(2)):
        pair = world.sample(drawn.get("seed", 0), number, "train", drawn.get("side", 64))
        assert sample["prompt"] == pair["prompt"]
        np.testing.assert_array_equal(np.asarray(sample["image"]), pair["misaligned_image"])
        np.testing.assert_array_equal(np.asarray(sample["target"]), pair["image"])


def test_pictures_that_cannot_be_read_are_counted(released, tmp_path):
    plan = Packing([np.tile([1, 1, 80, 0, 64, 64], (8, 1))], [1.0], 2, [Bucket((32, 32), (16, 16), 2, 200, 0)], 0)
    source = opened(released, "rvr.parquet", "rvr")

    class Broken:
        def __len__(self):
            return 8

        def sample(self, number):
            if number % 2:
                raise RefineError(f"number {number} is damaged")
            items, pictures = source.sample(number // 2)
            return (*items, Text("spelled" if number == 6 else "fine")), pictures

    def picky(text):
        if text == "spelled":
            raise RefineError("a mark")
        return encode(text)

    make = packing.Rows(plan, (Broken(),), picky, (1, 2), 0.0, 0)
    batches = packing.PackedBatches(make, 2, 0.9, "x")
    for _ in range(30):
        batch = next(batches)
        assert (batch["text_sample"] < 2).all()
    assert batches.corrupt == 5 and "skipped" not in batch
    strict = packing.PackedBatches(make, 2, 0.1, "x")
    with pytest.raises(RefineError, match="could not be read, data.max_corrupt allows 0.8.*number . is damaged"):
        for _ in range(60):
            next(strict)


def test_it_is_trained_whole_and_by_lora(tmp_path):
    """From scratch; what comes out paints, and is the base of an adapter."""
    folder = train(configuration(), tmp_path / "run", progress=False)
    frozen = objectives.make(configuration()).load({"vae": None})["vae"]
    written = load_file(folder / checkpoint.WEIGHTS)
    for path, value in traverse_util.flatten_dict(frozen, sep="/").items():
        np.testing.assert_array_equal(written[f"vae/{path}"], value)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["loss"] == pytest.approx(line["mse"] + 0.25 * line["ce"], rel=1e-5) for line in lines)
    assert Regenerator.load(folder).generate("a cat", (64, 64), steps=2).size == (64, 64)

    lora = dict(rank=2, alpha=4.0, targets="decoder/layers/(und|gen)/(q|o)_proj")
    config = configuration(init_from=str(folder), model={}, lora=lora, ema_decay=0.0)
    config.optimizer.update(learning_rate=0.1, warmup=0)  # two steps are to be seen
    config.pictures, config.validation = dict(every=2, count=2), dict(every=1, batches=1)
    with pytest.raises(RefineError, match="validation.every: .*set data.validation to a dataset"):
        train(config, tmp_path / "lora", progress=False)
    config.data.validation = str(tmp_path / "pairs")
    assert cli.main(["data", "synth", "--output", config.data.validation, "--count", "2", "--size", "256,256"]) == 0
    out = train(config, tmp_path / "lora", progress=False)
    with Image.open(tmp_path / "lora" / "pictures" / "00000002.png") as shown:
        assert shown.size == (3 * (128 + 4), 2 * (128 + 4))  # input, result, target
    told = [json.loads(line) for line in (tmp_path / "lora" / "validation.jsonl").open()]
    assert [line["step"] for line in told] == [0, 1, 2] and all(line["loss"] == line["mse"] for line in told)
    loaded = loading.load(folder, adapters=out / objectives.LORA_FILE)
    leaves = jax.tree.leaves(loaded.lora["bagel"])
    assert leaves and all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in leaves)  # b begins as zeros
    config.quantize = "int8"
    small = objectives.make(config)
    placed = parallel.param_shardings(small.frozen, None)
    kernel = small.load(placed)["bagel"]["decoder"]["layers"]["gen"]["q_proj"]["kernel"]
    assert kernel.dtype == jnp.int8
    adapted = Regenerator.load(folder, lora=out / objectives.LORA_FILE).generate("a", (64, 64), steps=2)
    assert adapted.size == (64, 64)
    assert adapted.tobytes() != Regenerator.load(folder).generate("a", (64, 64), steps=2).tobytes()


def test_settings_that_do_not_go_together_are_refused(tmp_path):
    cases = [
        (dict(lora=dict(rank=2, alpha=2.0, targets=".*")), "lora: nothing to adapt"),
        (dict(init_from="tiny", model={}), "is no BAGEL or RvR model"),
        (dict(init_from="tiny"), "init_from and model are both set"),
        (dict(conditioning="refine"), "conditioning 'refine'"),
    ]
    for changes, message in cases:
        with pytest.raises(RefineError, match=message):
            objectives.make(configuration(**changes))
    config = configuration()
    config.data.buckets = ((60, 64),)
    with pytest.raises(RefineError, match="multiples of"):
        objectives.make(config)
    config.data.buckets, config.data.tokens = ((64, 64),), 400
    with pytest.raises(RefineError, match="data.tokens 400"):
        objectives.make(config)
    assert bagel.SYSTEM_TRAINING.startswith("Analyze")
