"""BAGEL's decoder against numbers of the authors' code, against transformers, and against itself."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_jax import parallel
from refine_jax.convert import keys_bagel
from refine_jax.convert.mapping import assign, reference_shapes, to_reference, to_tree
from refine_jax.errors import RefineError
from refine_jax.models import bagel
from refine_jax.models.bagel import Bagel, BagelConfig, Segments, attention_mask, join, segment
from refine_jax.models.layers import init_lora
from refine_jax.models.siglip import pixels_to_patches, position_ids

DATA = Path(__file__).parent / "data"

# tests/data/bagel_rvr.npz holds what modeling/bagel and inferencer.py of github.com/LeapLabTHU/RvR computed on a CPU
# (transformers 4.49, torch.bfloat16 replaced by torch.float32, flash_attn_varlen_func by a plain float32 softmax with
# grouped heads and a bottom-right causal mask, SDPA on its "math" backend) for the configuration LLM, VIT, MODEL with
# `weight` as its weights and the inputs below: all come from numpy's generators, so that only results are stored.
# Gradients are one vector, tensors in the order of their names, each number without the last byte of its float32.
# tests/data/bagel_full_size.json lists that code's state dict for RELEASED_* on the "meta" device: count, then shape.
LLM = dict(
    hidden_size=24,
    intermediate_size=28,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=48,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
)
VIT = dict(
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=2,
    patch_size=4,
    image_size=24,
)
MODEL = dict(
    latent_patch_size=2,
    max_latent_size=5,
    vit_max_num_patch_per_side=6,
    connector_act="gelu_pytorch_tanh",
    vae_config=dict(z_channels=4, downsample=8),
)
BOS, EOS, START, END = 44, 45, 46, 47
SHIFT = 4.0
CONFIG = BagelConfig.from_dict(LLM, VIT, MODEL)
# Compiling is most of the time here, and the arithmetic is the same at any level.
QUICK = {"xla_backend_optimization_level": 0}


def encode(text: str) -> list[int]:
    """A tokenizer for the tests: a letter is a token."""
    return [ord(letter) % 44 for letter in text]


def noise(name: str, *shape: int) -> np.ndarray:
    """Standard normal float32, another stream for every name."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)


def weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """A value for a tensor of the reference: nothing is 0 or 1, activations stay of order one."""
    value = noise(key, *shape)
    if key.endswith("bias"):
        return 0.2 * value
    if len(shape) == 1:
        return 1 + 0.3 * value
    return value / np.float32(np.sqrt(1 if "embed_tokens" in key or "position_embedding" in key else shape[1]))


def picture(name: str, height: int, width: int) -> np.ndarray:
    """Pixels in 0..255 [H, W, 3] uint8."""
    return np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (height, width, 3), np.uint8)


# The packed training sequence: samples of (kind, what, …). A "vae" of loss 0 is a clean condition.
SAMPLES = [
    # an RvR pair
    [
        ("text", "look, then paint anew", 0),
        ("vit", ("bad", 16, 12)),
        ("text", "two red cups", 0),
        ("vae", ("good", 3, 4), 1),
    ],
    # text to image
    [("text", "a cat", 0), ("vae", ("cat", 2, 3), 1)],
    # understanding
    [("vit", ("dog", 12, 20)), ("text", "what is it", 0), ("text", "a small dog", 1)],
    # editing: the paper's ablation
    [("vae", ("old", 2, 2), 0), ("vit", ("old", 16, 16)), ("text", "bluer", 0), ("vae", ("new", 2, 2), 1)],
]
TIMES_SEED = 7  # of np.random.seed, from which the authors' pack_sequence draws one normal a target


def latent(name: str, h: int, w: int) -> np.ndarray:
    """A clean latent as the VAE gives it, channels first: [C, 2h, 2w]."""
    return noise("latent " + name, 4, 2 * h, 2 * w)


# What stands before the target in the authors' guidance contexts (inferencer.py with align_output, wo_vae): everything;
# all before the last text; the texts alone. Then with the image's latents, and with nothing at all.
_SYSTEM, _IMAGE, _PROMPT = ("text", "paint it anew"), ("vit", ("bad", 16, 12)), ("text", "two cups. ")
CONTEXTS = {
    "full": [_SYSTEM, _IMAGE, _PROMPT],
    "text-dropped": [_SYSTEM, _IMAGE],
    "image-dropped": [_SYSTEM, _PROMPT],
    "latents": [_SYSTEM, ("vae", ("old", 2, 3)), _IMAGE, _PROMPT],
    "empty": [],
}
TARGET, TIMES = (3, 4), (1.0, 0.25)  # tokens; t
QUESTION = [("vit", ("dog", 12, 20)), ("text", "what is it?")]
TEXT_LENGTH = 12
LAYER_TEXT, LAYER_POSITIONS = 5, [0, 1, 2, 3, 4] + [5] * 6  # a text, then a mark, four latents, a mark

RELEASED_LLM = dict(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
)
RELEASED_VIT = dict(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    patch_size=14,
    image_size=980,
)
RELEASED_MODEL = dict(
    latent_patch_size=2,
    max_latent_size=64,
    vit_max_num_patch_per_side=70,
    vae_config=dict(z_channels=16, downsample=8),
)


# -------------------------------------------------------------------------------------------------------------- helpers
@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(DATA / "bagel_rvr.npz") as file:
        return dict(file)


@functools.cache
def boxed(config: BagelConfig):
    """Abstract parameters with their logical axes."""
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    some = lambda size: jax.eval_shape(lambda: segment(size, count=size, segment=0, position=0))
    arguments = (ints(1, 3), some(3), floats(1, 1, 4, config.vit.patch_dim), ints(1, 1, 4), some(4))
    arguments += (floats(1, 2, config.latent_dim), floats(1), ints(1, 2), some(2))
    return jax.eval_shape(Bagel(config).init, jax.random.key(0), *arguments)["params"]


@functools.cache
def state(config: BagelConfig = CONFIG) -> dict[str, np.ndarray]:
    """The reference's tensors, with the tables of positions."""
    shapes = reference_shapes(keys_bagel.TABLE, nn.meta.unbox(boxed(config)))
    return {key: weight(key, shape) for key, shape in shapes.items()} | keys_bagel.position_tables(config)


@functools.cache
def variables(config: BagelConfig = CONFIG) -> dict:
    return {"params": to_tree(state(config), keys_bagel.TABLE, nn.meta.unbox(boxed(config)))}


def relative(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape and np.isfinite(ours).all()
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@dataclasses.dataclass
class Batch:
    """Rows of packed samples as arrays, padded with what must not matter; loss: which text tokens have one."""

    ids: np.ndarray
    text: Segments
    patches: np.ndarray
    patch_positions: np.ndarray
    vit: Segments
    latents: np.ndarray
    latent_positions: np.ndarray
    gen: Segments
    loss: np.ndarray

    def arguments(self, t, latents=None) -> tuple:
        latents = self.latents if latents is None else latents
        head = (self.ids, self.text, self.patches, self.patch_positions, self.vit)
        return (*head, latents, np.asarray(t, np.float32), self.latent_positions, self.gen)


jax.tree_util.register_dataclass(
    Batch, [field.name for field in dataclasses.fields(Batch) if field.name != "loss"], ["loss"]
)


def batch_of(rows, extra: int = 0) -> Batch:
    """rows: [[sample, …], …], a sample as in SAMPLES or CONTEXTS. Written out token by token; `extra` more padding."""
    streams = {"text": [], "vit": [], "gen": []}
    images = []
    for row in rows:
        und, gen, slots = [], [], []
        for sample, items in enumerate(row):
            place = order = 0
            for number, (kind, what, *loss) in enumerate(items):
                noisy = kind == "vae" and loss == [1]
                token = dict(sample=sample, segment=number, causal=kind == "text", noisy=noisy)
                if kind == "text":
                    for i, value in enumerate([BOS, *encode(what), EOS]):
                        # Every token but the last predicts the next one.
                        scored = loss == [1] and i <= len(what)
                        und.append(dict(token, index=order, position=place, value=value, loss=scored))
                        order, place = order + 1, place + 1
                    continue
                for value in (START, END):
                    und.append(dict(token, index=order, position=place, value=value, loss=False))
                name, h, w = what
                if kind == "vit":
                    patches = np.asarray(pixels_to_patches(jnp.asarray(picture(name, h, w))[None], CONFIG.vit)[0])
                    cells = position_ids(h // 4, w // 4, CONFIG.vit)
                    slots.append(
                        [dict(token, index=order, position=place, value=(p, c)) for p, c in zip(patches, cells)]
                    )
                else:
                    tokens = bagel.patchify(latent(name, h, w).transpose(1, 2, 0)[None], CONFIG)[0]
                    cells = bagel.latent_position_ids((h, w), CONFIG)
                    gen += [dict(token, index=order, position=place, value=(x, c)) for x, c in zip(tokens, cells)]
                order += 1
                # After the target nothing follows; a text that did would stand at its position.
                place += not noisy
        streams["text"].append(und)
        streams["gen"].append(gen)
        images.append(slots)
    slots = max(1, max(map(len, images)))
    size = max([len(image) for row in images for image in row] + [1]) + extra
    garbage = np.random.default_rng(0)
    none = dict(sample=-1, segment=0, index=0, position=0, causal=False, noisy=False, value=None, loss=False)
    pad = lambda row, length: row + [none] * (length - len(row))
    for row in images:
        padded = [pad(image, size) for image in row] + [[none] * size] * (slots - len(row))
        streams["vit"].append([token for image in padded for token in image])
    for name in ("text", "gen"):
        length = max(1, max(map(len, streams[name]))) + extra
        streams[name] = [pad(row, length) for row in streams[name]]
    column = lambda name, key, kind: np.array([[token[key] for token in row] for row in streams[name]], kind)
    segments = {
        name: Segments(
            *(
                column(name, f.name, bool if f.name in ("causal", "noisy") else np.int32)
                for f in dataclasses.fields(Segments)
            )
        )
        for name in streams
    }

    def pairs(name: str, features: int) -> tuple[np.ndarray, np.ndarray]:
        values = [[token["value"] for token in row] for row in streams[name]]
        some = lambda: (10 * garbage.standard_normal(features), garbage.integers(0, 1000))
        values = [[some() if value is None else value for value in row] for row in values]
        first = np.array([[value[0] for value in row] for row in values], np.float32)
        return first, np.array([[value[1] for value in row] for row in values], np.int32)

    patches, patch_positions = pairs("vit", CONFIG.vit.patch_dim)
    latents, latent_positions = pairs("gen", CONFIG.latent_dim)
    ids = [[garbage.integers(0, 44) if t["value"] is None else t["value"] for t in row] for row in streams["text"]]
    shape = (len(rows), slots, size)
    return Batch(
        np.array(ids, np.int32),
        segments["text"],
        patches.reshape(*shape, -1),
        patch_positions.reshape(shape),
        segments["vit"],
        latents,
        latent_positions,
        segments["gen"],
        column("text", "loss", bool),
    )


def prefix(batch: Batch, module: Bagel, cache=None) -> bagel.Cache:
    """Everything of a batch without a target is read at once, the images' latents with t = 0."""
    mask = (batch.vit.sample >= 0).reshape(batch.patch_positions.shape)
    features = module.vit_tokens(batch.patches, batch.patch_positions, mask)
    und = jnp.concatenate([module.text_embeddings(batch.ids), features.reshape(*batch.vit.sample.shape, -1)], axis=1)
    gen = module.latent_tokens(batch.latents, jnp.zeros(len(batch.ids)), batch.latent_positions)
    return module.decode(und, join(batch.text, batch.vit), gen, batch.gen, cache, keep=True)[2]


def target_of(contexts) -> tuple[Segments, Segments]:
    """Segments of the target's marks and latents behind each context."""
    h, w = TARGET
    place = [sum(len(i[1]) + 2 if i[0] == "text" else 1 for i in items) for items in contexts]
    common = dict(segment=np.array([len(items) for items in contexts]), position=np.array(place), noisy=True)
    return segment(2, count=2, **common), segment(h * w, count=h * w, **common)


def target_velocity(module: Bagel, x, t, segments, cache, uniform: bool = True):
    marks = jnp.broadcast_to(jnp.array([START, END]), segments[0].sample.shape)
    cells = jnp.broadcast_to(bagel.latent_position_ids(TARGET, CONFIG), segments[1].sample.shape)
    x = jnp.broadcast_to(x, (*cells.shape, CONFIG.latent_dim))
    t = jnp.full(len(cells), t)
    _, hidden, same = module.decode(
        module.text_embeddings(marks),
        segments[0],
        module.latent_tokens(x, t, cells),
        segments[1],
        cache,
        uniform=uniform,
    )
    assert same is cache
    return module.velocity(hidden)


# ---------------------------------------------------------------------------------------------------- the authors' code
def test_layer_in_both_modes():
    """One layer: a causal text, then an image with its marks behind the cached text, and both at once."""
    x, marks = noise("layer", 11, 24)[None], [*range(LAYER_TEXT + 1), 10]
    latents = list(range(LAYER_TEXT + 1, 10))
    of_text = np.arange(11) < LAYER_TEXT
    every = Segments(
        sample=np.zeros((1, 11), np.int32),
        segment=1 - of_text[None].astype(np.int32),
        index=np.arange(11, dtype=np.int32)[None],
        position=np.array(LAYER_POSITIONS, np.int32)[None],
        causal=of_text[None],
        noisy=~of_text[None],
    )
    part = lambda *which: jax.tree.map(lambda leaf: leaf[:, list(which)], every)
    params = jax.tree.map(lambda leaf: leaf[1], variables()["params"]["decoder"]["layers"])
    turns = lambda s: bagel.rotary_angles(s.position[..., None], (CONFIG.head_dim,), CONFIG.rope_theta)

    def run(und, gen, cached, before, keep=False):
        parts = [None if not which else part(*which) for which in (und, gen)]
        streams = tuple(None if not which else x[:, which] for which in (und, gen))
        queries = join(*parts)
        mask = attention_mask(queries, queries if before is None else join(before, queries))
        layer = bagel.Layer(CONFIG, keep)
        return layer.apply({"params": params}, streams, cached, tuple(s and turns(s) for s in parts), mask)

    text = list(range(LAYER_TEXT))

    @jax.jit
    def both():
        (first, none), kept = run(text, [], None, None, keep=True)
        assert none is None and kept[0].shape == (1, LAYER_TEXT, 2, 4)
        rest, nothing = run([LAYER_TEXT, 10], latents, kept, part(*text))
        assert nothing is None
        return run(marks, latents, None, None)[0], (first, *rest)

    (und, gen), (first, second, last) = both()
    whole = np.zeros_like(x)
    whole[:, marks], whole[:, latents] = und, gen
    assert relative(whole[0], golden()["layer train"]) <= 1e-5
    cached = np.concatenate([first, second[:, :1], last, second[:, 1:]], axis=1)
    assert relative(cached[0], golden()["layer"]) <= 1e-5


def test_velocity_in_every_guidance_context():
    """All contexts as one batch: prefixes of different lengths, padded, read once; then two steps from the cache."""
    contexts = list(CONTEXTS.values())
    batch, segments = batch_of([[items] for items in contexts], extra=2), target_of(contexts)
    x = noise("x", 12, 16)
    model = Bagel(CONFIG)
    read = jax.jit(lambda v, b: model.apply(v, b, method=lambda m, b: prefix(b, m)))
    step = jax.jit(lambda v, t, c: model.apply(v, x, t, segments, c, method=target_velocity))
    cache = read(variables(), batch)
    for t in TIMES:
        ours = step(variables(), t, cache)
        for i, name in enumerate(CONTEXTS):
            assert relative(ours[i], golden()[f"velocity {name} {t}"]) <= 1e-4, name
    # By the general mask, and padding that holds anything.
    general = jax.jit(
        lambda v, c: model.apply(v, x, TIMES[1], segments, c, False, method=target_velocity), compiler_options=QUICK
    )
    hidden = (np.asarray(cache.segments.sample) < 0)[None, :, :, None, None]
    spoilt = cache.replace(key=np.where(hidden, 50.0, cache.key), value=np.where(hidden, -70.0, cache.value))
    assert relative(general(variables(), spoilt), ours) <= 1e-5


def packed_inputs() -> tuple[Batch, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The packed sequence, the clean latents, noise, t of every latent token, and which of them are scored."""
    batch = batch_of([SAMPLES])
    draws = iter(np.random.RandomState(TIMES_SEED).randn(10))
    times = []
    for item in (item for sample in SAMPLES for item in sample if item[0] == "vae"):
        _, h, w = item[1]
        t = 1 / (1 + np.exp(-next(draws))) if item[2] else 0.0
        times += [SHIFT * t / (1 + (SHIFT - 1) * t)] * (h * w)
    clean, eps = batch.latents, noise("epsilon", len(times), 16)[None]
    return batch, clean, eps, np.array(times, np.float32)[None], batch.gen.noisy[0]


def training_losses(params, inputs, config: BagelConfig = CONFIG):
    batch, clean, eps, t, scored = inputs
    noised = (1 - t[..., None]) * clean + t[..., None] * eps
    model = Bagel(config)
    hidden, velocity = model.apply({"params": params}, *batch.arguments(t, noised))
    mse = jnp.square(velocity - (eps - clean))[0, scored]
    at = np.flatnonzero(batch.loss[0])
    logits = model.apply({"params": params}, hidden[0, at], method=Bagel.logits)
    labels = batch.ids[0, at + 1]
    ce = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    return jnp.mean(mse) + 0.25 * jnp.mean(ce), (mse, ce)


@pytest.mark.parametrize("remat", [None, "attention"])
def test_training_losses_and_gradients(remat):
    """An RvR pair, text to image, understanding and an edit in one packed sequence."""
    inputs = packed_inputs()
    config = dataclasses.replace(CONFIG, remat=remat, vit=dataclasses.replace(CONFIG.vit, remat=remat and "full"))
    losses = lambda params: training_losses(params, inputs, config)
    (_, (mse, ce)), gradient = jax.jit(jax.value_and_grad(losses, has_aux=True))(variables()["params"])
    assert relative(mse, golden()["mse"]) <= 1e-4 and relative(ce, golden()["ce"]) <= 1e-4
    ours = to_reference(gradient, keys_bagel.TABLE)
    stored = np.zeros((golden()["gradients"].shape[1], 4), np.uint8)
    stored[:, 1:] = golden()["gradients"].T
    stored, start = stored.view(np.float32)[:, 0], 0
    for key in sorted(ours):
        end = start + ours[key].size
        theirs = stored[start:end].reshape(ours[key].shape)
        if key.startswith("vit_model") and key.endswith("k_proj.bias"):
            # Nothing depends on it: softmax does not see what all keys share. Both are rounding.
            assert max(np.abs(ours[key]).max(), np.abs(theirs).max()) <= 1e-8, key
        else:
            assert relative(ours[key], theirs) <= 1e-4, key
        start = end
    assert start == len(stored)


def test_mask_of_the_packed_sequence():
    """Equal to what `prepare_attention_mask_per_sample` and `create_sparse_mask` say of it."""
    batch = batch_of([SAMPLES])
    length = int(golden()["length"])
    theirs = np.unpackbits(golden()["mask"])[: length**2].reshape(length, length).astype(bool)
    segments = jax.tree.map(lambda *x: np.concatenate(x, axis=1), batch.text, batch.vit, batch.gen)
    exists = np.flatnonzero(segments.sample[0] >= 0)
    # Their order: samples, their segments, and in an image the first mark, the tokens, the second mark.
    texts = batch.ids.shape[1]
    closes = np.zeros(segments.sample.shape[1], bool)
    closes[:texts] = batch.ids[0] == END
    opens = np.zeros_like(closes)
    opens[:texts] = batch.ids[0] == START
    rank = np.where(opens, 0, np.where(closes, 2, 1))[exists]
    own = np.where(segments.causal[0], segments.index[0], 0)[exists]
    keys = (np.arange(len(exists)), own, rank, segments.segment[0][exists], segments.sample[0][exists])
    order = exists[np.lexsort(keys)]
    ours = np.asarray(attention_mask(segments, segments))[0, 0]
    np.testing.assert_array_equal(ours[np.ix_(order, order)], theirs)
    assert not ours[np.setdiff1d(np.arange(len(ours)), exists)].any()


def test_greedy_text():
    model = Bagel(CONFIG)
    shorter = [("text", "a", 0)]
    batch = batch_of([[QUESTION], [shorter]], extra=1)

    @jax.jit
    def answer(v, b, end, key=None):
        cache = model.apply(v, b, method=lambda m, b: prefix(b, m))
        at = dict(segment_index=jnp.array([2, 1]), position=jnp.array([14, 3]))
        cold = {} if key is None else dict(temperature=1.0, key=key)
        return bagel.generate_text(model, v, cache, BOS, end, length=TEXT_LENGTH, **at, **cold)

    ids = np.asarray(answer(variables(), batch, -1))
    np.testing.assert_array_equal(ids[0], golden()["text"])
    # The other row has a shorter prefix; by itself it says the same, computing everything anew for every token.
    said: list[int] = []
    whole = jax.jit(
        lambda v, ids, segments: model.apply(v, ids, segments, method=lambda m, i, s: m.logits(m(i, s)[0])),
        compiler_options=QUICK,
    )
    for step in range(5):
        row = np.array([[BOS, *encode("a"), EOS, BOS, *said, *[0] * (8 - len(said))]], np.int32)
        text = join(
            segment(3, count=3, segment=0, position=0, causal=True),
            segment(9, count=1 + step, segment=1, position=3, index=3, causal=True),
        )
        said.append(int(np.argmax(whole(variables(), row, text)[0, 3 + step])))
    assert said == ids[1, :5].tolist()
    # A row that has ended stays so, the other goes on.
    end = int(ids[0, 2])
    ended = np.asarray(answer(variables(), batch, end))
    stop = ids[0].tolist().index(end)
    assert (ended[0, stop:] == end).all() and (ended[0, :stop] == ids[0, :stop]).all()
    other = ids[1].tolist()
    stop = other.index(end) if end in other else TEXT_LENGTH
    assert (ended[1, :stop] == ids[1, :stop]).all() and (ended[1, stop:] == end).all()
    drawn = [np.asarray(answer(variables(), batch, -1, jax.random.key(i))) for i in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any() and (drawn[0] >= 0).all() and (drawn[0] < 48).all()
    with pytest.raises(RefineError, match="needs a key"):
        bagel.generate_text(
            model, {}, None, BOS, EOS, length=1, temperature=0.5, segment_index=jnp.array([1]), position=jnp.array([0])
        )


# ----------------------------------------------------------------------------------------------------------- the mask
def allowed(query: dict, key: dict) -> bool:
    """The rule in plain words, of a token and another."""
    if query["sample"] == -1 or key["sample"] == -1 or query["sample"] != key["sample"]:
        return False  # padding, or a neighbour in the packed row
    if key["segment"] == query["segment"]:
        return not query["causal"] or key["index"] <= query["index"]
    return key["segment"] < query["segment"] and not key["noisy"]


@st.composite
def sequences(draw):
    """Tokens of packed samples in any order, with padding in between."""
    tokens = []
    for sample in range(draw(st.integers(0, 3))):
        index = 0
        for number in range(draw(st.integers(1, 4))):
            kind = draw(st.sampled_from(["causal", "full", "noise"]))
            for _ in range(draw(st.integers(0, 3))):
                flags = dict(causal=kind == "causal", noisy=kind == "noise")
                tokens.append(dict(flags, sample=sample, segment=number, index=index, position=0))
                index += 1
    tokens += [
        dict(sample=-1, segment=draw(st.integers(0, 3)), index=0, position=0, causal=draw(st.booleans()), noisy=False)
        for _ in range(draw(st.integers(0, 3)))
    ]
    return draw(st.permutations(tokens))


def segments_of(tokens: list[dict]) -> Segments:
    kinds = {f.name: bool if f.name in ("causal", "noisy") else np.int32 for f in dataclasses.fields(Segments)}
    return Segments(**{name: np.array([[token[name] for token in tokens]], kind) for name, kind in kinds.items()})


@settings(max_examples=60, deadline=None)
@given(sequences(), sequences())
def test_mask_is_the_rule(queries, keys):
    with jax.disable_jit():
        ours = np.asarray(attention_mask(segments_of(queries), segments_of(keys)))
    assert ours.shape == (1, 1, len(queries), len(keys)) and ours.dtype == bool
    for i, query in enumerate(queries):
        assert ours[0, 0, i].tolist() == [allowed(query, key) for key in keys]


def test_segment_helper():
    text = segment(4, count=[3, 0], segment=2, position=[5, 9], sample=1, index=[7, 0], causal=True)
    assert text.sample.tolist() == [[1, 1, 1, -1], [-1] * 4] and text.segment.tolist() == [[2] * 4] * 2
    assert text.position.tolist() == [[5, 6, 7, 8], [9, 10, 11, 12]] and text.index[0].tolist() == [7, 8, 9, 10]
    image = segment(2, count=2, segment=[0, 1], position=3, noisy=True)
    assert image.position.tolist() == [[3, 3]] * 2 and image.sample.tolist() == [[0, 0]] * 2
    assert image.noisy.all() and not image.causal.any() and text.causal.all() and not text.noisy.any()
    both = join(text, None, image)
    assert both.sample.shape == (2, 6) and both.segment[1].tolist() == [2, 2, 2, 2, 1, 1]
    assert {leaf.dtype for leaf in jax.tree.leaves(both)} == {np.dtype(np.int32), np.dtype(bool)}


# -------------------------------------------------------------------------------------------------------- invariances
@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def forward(config, variables, arguments):
    return Bagel(config).apply(variables, *arguments)


def recomputed(contexts, x, t) -> np.ndarray:
    """The velocity `[contexts, tokens, 16]` of one noisy target behind each context, all of it read as one sequence."""
    rows, whole, target = len(contexts), batch_of([[items] for items in contexts]), target_of(contexts)
    marks = np.tile(np.array([START, END], np.int32), (rows, 1))
    cells = np.tile(bagel.latent_position_ids(TARGET, CONFIG), (rows, 1))
    times = np.concatenate([np.zeros(whole.gen.sample.shape), np.full(cells.shape, t)], axis=1)
    arguments = list(whole.arguments(times, np.concatenate([whole.latents, np.stack([x] * rows)], axis=1)))
    arguments[0], arguments[1] = np.concatenate([whole.ids, marks], axis=1), join(whole.text, target[0])
    arguments[7] = np.concatenate([whole.latent_positions, cells], axis=1)
    arguments[8] = join(whole.gen, target[1])
    hidden, velocity = forward(CONFIG, variables(), arguments)
    assert hidden.shape == (rows, arguments[0].shape[1], 24) and velocity.dtype == jnp.float32
    return np.asarray(velocity[:, -cells.shape[1] :])


def test_cached_equals_recomputing_the_whole_sequence():
    """Segment by segment into the cache, all at once, and without any: two rows of different lengths."""
    contexts = [CONTEXTS["latents"], CONTEXTS["full"]]
    # Row by row the same kinds in turn: the second row has nothing where the first has latents.
    turns = [[items[:1] for items in contexts], [contexts[0][1:2], []], [contexts[0][2:3], contexts[1][1:2]]]
    turns.append([items[-1:] for items in contexts])
    model, x, t = Bagel(CONFIG), noise("x", 12, 16), 0.4
    target = target_of(contexts)
    counts = np.cumsum([[len(items) for items in turn] for turn in turns], axis=0)
    places = np.cumsum(
        [[sum(len(i[1]) + 2 if i[0] == "text" else 1 for i in items) for items in turn] for turn in turns], axis=0
    )

    def moved(part: Batch, segments: np.ndarray, places: np.ndarray) -> Batch:
        shift = lambda s: s.replace(segment=s.segment + segments[:, None], position=s.position + places[:, None])
        return dataclasses.replace(part, text=shift(part.text), vit=shift(part.vit), gen=shift(part.gen))

    parts = []
    for i, turn in enumerate(turns):
        before = (counts[i - 1], places[i - 1]) if i else (np.zeros(2, int), np.zeros(2, int))
        parts.append(moved(batch_of([[items] for items in turn], extra=1), *before))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def piecewise(v, parts):
        def run(module):
            cache = None
            for part in parts:
                cache = prefix(part, module, cache)
            return target_velocity(module, x, t, target, cache)

        return model.apply(v, method=run)

    cached = piecewise(variables(), parts)
    assert relative(recomputed(contexts, x, t), cached) <= 1e-5


def test_padding_and_neighbours_do_not_matter():
    """Samples packed into one row, each in a row of its own, and with twice the padding."""
    t = {"good": 0.3, "cat": 0.9, "old": 0.0, "new": 0.6}
    rows = [[sample] for sample in SAMPLES]

    def run(rows, extra):
        batch = batch_of(rows, extra=extra)
        times = np.zeros(batch.gen.sample.shape, np.float32)
        for i, row in enumerate(rows):
            images = [item[1] for sample in row for item in sample if item[0] == "vae"]
            flat = [t[name] for name, h, w in images for _ in range(h * w)]
            times[i, : len(flat)] = flat
        hidden, velocity = forward(CONFIG, variables(), batch.arguments(times))
        return np.asarray(hidden)[batch.text.sample >= 0], np.asarray(velocity)[batch.gen.sample >= 0]

    packed = run([SAMPLES], 0)
    for other in (run(rows, 0), run(rows, 5)):
        assert all(relative(a, b) <= 1e-5 for a, b in zip(other, packed))
    alone = run(rows[1:2], 1)
    assert relative(alone[1], packed[1][12:18]) <= 1e-5


def test_uniform_where_padding_stands_first_or_last():
    """A mask by key in place of one by query: rows of a target with padding before, within and behind it."""
    before = segment(4, count=[4, 2, 3], segment=0, position=0, causal=True)
    own = segment(5, count=5, segment=[1, 1, 1], position=4, noisy=True)
    exists = np.array([[0, 1, 1, 1, 1], [1, 1, 0, 1, 1], [1, 1, 1, 0, 0]], bool)
    own = own.replace(sample=jnp.where(exists, own.sample, -1))
    part = lambda *columns: jax.tree.map(lambda leaf: leaf[:, slice(*columns)], own)
    tokens = noise("uniform", 3, 9, 24)

    def run(module):
        _, _, cache = module.decode(tokens[:, :4], before, keep=True)
        arguments = tokens[:, 4:6], part(0, 2), tokens[:, 6:], part(2, 5), cache
        return [jnp.concatenate(module.decode(*arguments, uniform=flag)[:2], axis=1) for flag in (True, False)]

    model = Bagel(CONFIG)
    uniform, general = jax.jit(lambda v: model.apply(v, method=run))(variables())
    assert relative(np.asarray(uniform)[exists], np.asarray(general)[exists]) <= 1e-6


def test_noisy_tokens_in_a_cache_are_never_seen():
    """A target that was kept by mistake changes nothing for what is read after it."""
    text = segment(3, count=3, segment=0, position=0, causal=True)
    noisy = segment(2, count=2, segment=1, position=3, noisy=True)
    after = segment(3, count=3, segment=2, position=3, causal=True)
    tokens = noise("tokens", 1, 8, 24)

    def run(module):
        _, _, first = module.decode(tokens[:, :3], text, keep=True)
        _, _, cache = module.decode(None, None, tokens[:, 3:5], noisy, first, keep=True)
        # Not even by a later try of the same segment.
        assert cache.segments.sample.shape == (1, 5)
        tries = [module.decode(None, None, tokens[:, 5:7], noisy, c)[1] for c in (cache, first)]
        return *tries, *(module.decode(tokens[:, 5:], after, cache=c)[0] for c in (cache, first))

    model = Bagel(CONFIG)
    tried, anew, with_it, without = jax.jit(lambda v: model.apply(v, method=run))(variables())
    assert relative(tried, anew) <= 1e-6 and relative(with_it, without) <= 1e-6
    with pytest.raises(ValueError, match="no token"):
        model.apply(variables(), None, None, method=Bagel.decode)


def unstack(params: dict) -> dict:
    """A scanned tree as one of single layers."""
    decoder = dict(params["decoder"])
    layers = decoder.pop("layers")
    for i in range(CONFIG.num_hidden_layers):
        decoder[f"layers_{i}"] = jax.tree.map(lambda leaf: leaf[i], layers)  # noqa: B023
    return params | {"decoder": decoder}


def test_layers_one_by_one_are_the_scan():
    """Without scan, and the cache too."""
    text, config = segment(4, count=4, segment=0, position=0, causal=True), dataclasses.replace(CONFIG, scan=False)
    read = lambda module: module.decode(module.text_embeddings(jnp.array([[1, 2, 3, 4]])), text, keep=True)
    scanned = jax.jit(lambda v: Bagel(CONFIG).apply(v, method=read))(variables())
    singly = jax.jit(lambda v: Bagel(config).apply(v, method=read))({"params": unstack(variables()["params"])})
    assert relative(singly[0], scanned[0]) <= 1e-6 and singly[1] is scanned[1] is None
    assert relative(singly[2].key, scanned[2].key) <= 1e-6 and relative(singly[2].value, scanned[2].value) <= 1e-6


def test_bfloat16_stays_close():
    batch = batch_of([SAMPLES])
    t = np.full(batch.gen.sample.shape, 0.5, np.float32)
    half = dict(dtype="bfloat16", param_dtype="bfloat16")
    config = dataclasses.replace(CONFIG, dtype="bfloat16", vit=dataclasses.replace(CONFIG.vit, **half))
    full = forward(CONFIG, variables(), batch.arguments(t))
    low = forward(config, variables(), batch.arguments(t))
    assert low[0].dtype == jnp.bfloat16 and low[1].dtype == jnp.float32
    for a, b in zip(low, full):
        assert 1e-5 < relative(np.asarray(a, np.float32), b) <= 2e-2


def test_lora_reaches_both_streams():
    batch = batch_of([SAMPLES])
    arguments = batch.arguments(np.full(batch.gen.sample.shape, 0.5, np.float32))
    base = forward(CONFIG, variables(), arguments)
    for stream in ("und", "gen"):
        fresh = init_lora(
            jax.random.key(0), variables()["params"], rf"decoder/layers/{stream}/((q|k|v|o)_proj|mlp/.*)", 2
        )
        assert fresh["decoder"]["layers"][stream]["q_proj"]["a"].shape == (2, 24, 2)
        same = forward(CONFIG, variables() | {"lora": fresh}, arguments)
        assert all(relative(a, b) == 0 for a, b in zip(same, base))
        moved = jax.tree.map(lambda leaf: leaf + 0.2 * noise(str(leaf.shape), *leaf.shape), fresh)
        adapted = forward(CONFIG, variables() | {"lora": moved}, arguments)
        assert relative(adapted[1], base[1]) > 1e-2
        # What reads no latents is the same whatever paints them: all texts but those after clean latents.
        texts = (batch.text.sample < 3) & ~batch.text.noisy
        apart = relative(np.asarray(adapted[0])[texts], np.asarray(base[0])[texts])
        assert apart > 1e-2 if stream == "und" else apart <= 1e-6


# ------------------------------------------------------------------------------------------ names, shapes, positions
def test_full_size_names_shapes_and_count():
    full = json.loads((DATA / "bagel_full_size.json").read_text())
    config = BagelConfig.from_dict(RELEASED_LLM, RELEASED_VIT, RELEASED_MODEL)
    assert config == BagelConfig() == BagelConfig.from_dict(RELEASED_LLM, RELEASED_VIT)
    theirs = {}
    for name, (count, *shape) in full["listing"].items():
        theirs |= {name.replace("{i}", str(i)): tuple(shape) for i in range(count)}
    assert len(theirs) == full["tensors"] == 1223
    abstract = nn.meta.unbox(boxed(config))
    assign(theirs, keys_bagel.TABLE, abstract)
    side, hidden = config.max_latent_size, config.hidden_size
    tables = {"latent_pos_embed.pos_embed": (side**2, hidden), "vit_pos_embed.pos_embed": (70**2, hidden)}
    assert reference_shapes(keys_bagel.TABLE, abstract) | tables == theirs
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract))
    assert count + sum(a * b for a, b in tables.values()) == full["numbers"] == 14_607_260_128


def test_state_dict_round_trip():
    given = state()
    back = to_reference(variables()["params"], keys_bagel.TABLE) | keys_bagel.position_tables(CONFIG)
    assert back.keys() == given.keys()
    for key in given:
        assert back[key].dtype == given[key].dtype and np.array_equal(back[key], given[key]), key
    abstract = nn.meta.unbox(boxed(CONFIG))
    for change, words in (
        (lambda s: s.pop("language_model.model.layers.1.mlp_moe_gen.up_proj.weight"), r"gen/mlp/up_proj/kernel\[1\]"),
        (lambda s: s.pop("language_model.model.norm_moe_gen.weight"), "missing leaves: decoder/norm_gen/scale"),
        (lambda s: s.update({"language_model.model.layers.2.mlp.up_proj.weight": given["llm2vae.bias"]}), "unknown"),
        (lambda s: s.update({"language_model.model.rotary.inv_freq": given["llm2vae.bias"]}), "unknown keys: lang"),
        (lambda s: s.update({"llm2vae.bias": given["vae2llm.bias"]}), "wrong shapes: llm2vae.bias"),
    ):
        broken = dict(given)
        change(broken)
        with pytest.raises(RefineError, match=words):
            to_tree(broken, keys_bagel.TABLE, abstract)


def test_position_tables():
    """Equal to the authors', to the embedding of single cells, and to the formula; a file with others is refused."""
    tables = keys_bagel.position_tables(CONFIG)
    for key, table in tables.items():
        np.testing.assert_allclose(table, golden()[f"table {key}"], rtol=0, atol=1e-6)
    side, width = CONFIG.vit_max_num_patch_per_side, CONFIG.hidden_size
    ids = np.arange(side**2).reshape(2, -1)
    cells = bagel.position_features(jnp.asarray(ids), side, width)
    np.testing.assert_array_equal(cells.reshape(-1, width), tables["vit_pos_embed.pos_embed"])
    row, column, quarter = 4, 2, width // 4
    angles = [10000.0 ** (-i / quarter) for i in range(quarter)]
    formula = [f(n * a) for n in (column, row) for f in (np.sin, np.cos) for a in angles]
    np.testing.assert_allclose(tables["vit_pos_embed.pos_embed"][row * side + column], formula, atol=1e-6)

    shapes = {k: v.shape for k, v in tables.items()}
    assert keys_bagel.grid_sides(shapes) == dict(max_latent_size=5, vit_max_num_patch_per_side=6)
    assert keys_bagel.grid_sides({}) == {}
    with pytest.raises(RefineError, match="latent_pos_embed.pos_embed has 24 rows"):
        keys_bagel.grid_sides({"latent_pos_embed.pos_embed": (24, 24)})
    rounded = {k: v.astype(jnp.bfloat16) for k, v in tables.items()}
    keys_bagel.check_position_tables(rounded, CONFIG)
    keys_bagel.check_position_tables({}, CONFIG)
    larger = {"latent_pos_embed.pos_embed": np.zeros((36, 24), np.float32)}
    with pytest.raises(RefineError, match="max_latent_size 5 gives .25, 24.; correct max_latent_size"):
        keys_bagel.check_position_tables(larger, CONFIG)
    for wrong in (np.nan, 0.5):
        spoilt = tables["vit_pos_embed.pos_embed"].copy()
        spoilt[7, 3] += wrong
        with pytest.raises(RefineError, match="rvr.safetensors: vit_pos_embed.pos_embed is off the sine-cosine table"):
            keys_bagel.check_position_tables({"vit_pos_embed.pos_embed": spoilt}, CONFIG, "rvr.safetensors")


def test_latent_tokens_and_cells():
    h, w = 3, 2
    chw = latent("any", h, w)
    tokens = bagel.patchify(chw.transpose(1, 2, 0)[None], CONFIG)
    expected = np.einsum("chpwq->hwpqc", chw.reshape(4, h, 2, w, 2)).reshape(h * w, -1)
    np.testing.assert_array_equal(tokens[0], expected)
    np.testing.assert_array_equal(bagel.unpatchify(tokens, (h, w), CONFIG)[0], chw.transpose(1, 2, 0))
    assert bagel.latent_position_ids((2, 3), CONFIG).tolist() == [0, 1, 2, 5, 6, 7]
    for grid in ((6, 1), (1, 6), (0, 3)):
        with pytest.raises(RefineError, match=f"latent grid {grid[0]}x{grid[1]}"):
            bagel.latent_position_ids(grid, CONFIG)


def test_configuration_is_checked():
    config = BagelConfig.from_dict(LLM, VIT, MODEL, dtype="bfloat16", remat="dots")
    assert (config.dtype, config.vit.dtype, config.remat, config.vit.remat) == ("bfloat16", "bfloat16", "dots", "dots")
    assert (config.latent_channels, config.max_latent_size, config.vit.num_layers) == (4, 5, 2)
    published = dict(
        LLM, hidden_act="silu", layer_module="Qwen2DecoderLayer", use_sliding_window=False, rope_scaling=None
    )
    assert BagelConfig.from_dict(published, VIT, MODEL) == CONFIG
    theta = {k: v for k, v in LLM.items() if k != "rope_theta"} | {"rope_parameters": {"rope_theta": 1e6}}
    assert BagelConfig.from_dict(theta, VIT, MODEL) == CONFIG
    for llm, model, words in (
        (dict(LLM, use_sliding_window=True), MODEL, "use_sliding_window True"),
        (dict(LLM, hidden_act="gelu"), MODEL, "hidden_act 'gelu'"),
        (dict(LLM, layer_module="Qwen2MoEDecoderLayer"), MODEL, "layer_module 'Qwen2MoEDecoderLayer'"),
        (dict(LLM, rope_scaling={"type": "yarn"}), MODEL, "rope_scaling 'yarn'"),
        ({k: v for k, v in LLM.items() if k != "vocab_size"}, MODEL, "lacks vocab_size"),
        (dict(LLM, num_key_value_heads=4), MODEL, "num_key_value_heads 4"),
        (dict(LLM, hidden_size=18), MODEL, "hidden_size 18"),
        (LLM, dict(MODEL, interpolate_pos=True), "interpolate_pos True"),
        (LLM, dict(MODEL, connector_act="relu"), "connector_act 'relu'"),
    ):
        with pytest.raises(RefineError, match=words):
            BagelConfig.from_dict(llm, VIT, model)
    with pytest.raises(RefineError, match="remat 'most'"):
        dataclasses.replace(CONFIG, remat="most")


def test_every_parameter_names_its_axes():
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
    rules = dict(parallel.DEFAULT_RULES)
    for path, leaf in jax.tree_util.tree_leaves_with_path(boxed(CONFIG), is_leaf=is_box):
        if path[0].key == "vit_model":
            continue
        assert is_box(leaf) and len(leaf.names) == leaf.value.ndim, path
        assert set(leaf.names) <= rules.keys() and len(set(leaf.names)) == len(leaf.names), (path, leaf.names)
        assert (leaf.names[0] == "layers") == ("layers" in [part.key for part in path[:2]]), path


# ------------------------------------------------------------------------------------------------ transformers, devices
def test_text_alone_is_a_qwen3_with_biases():
    """The reading stream against transformers: `Qwen3ForCausalLM` with attention_bias, its output bias set to 0."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    sizes = {name: value for name, value in LLM.items() if name != "rope_theta"}
    config = transformers.Qwen3Config(
        **sizes,
        head_dim=CONFIG.head_dim,
        attention_bias=True,
        tie_word_embeddings=False,
        rope_parameters=dict(rope_type="default", rope_theta=LLM["rope_theta"]),
        attn_implementation="eager",
    )
    reference = transformers.Qwen3ForCausalLM(config).eval()
    given = {
        key.removeprefix("language_model."): torch.from_numpy(value)
        for key, value in state().items()
        if key.startswith("language_model.") and "moe_gen" not in key
    }
    missing, unexpected = reference.load_state_dict(given, strict=False)
    assert not unexpected and all(key.endswith("o_proj.bias") for key in missing) and len(missing) == 2
    for key in missing:
        torch.nn.init.zeros_(reference.get_parameter(key))
    ids = np.random.default_rng(0).integers(0, 48, (2, 13))
    with torch.no_grad():
        theirs = reference(torch.from_numpy(ids)).logits
    text = segment(13, count=[13, 13], segment=0, position=0, causal=True)
    model = Bagel(CONFIG)
    ours = jax.jit(lambda v: model.apply(v, method=lambda m: m.logits(m(ids, text)[0])))(variables())
    assert relative(ours, theirs.numpy()) <= 1e-4


def eight_devices() -> None:
    """Runs in a process of its own: prints how far results and gradients on eight devices are from those on one."""
    rows = [SAMPLES[:2], SAMPLES[2:]]
    batch, model = batch_of(rows, extra=1), Bagel(CONFIG)
    arguments = batch.arguments(np.full(len(rows), 0.5))
    params = variables()["params"]

    def loss(params, arguments):
        hidden, velocity = model.apply({"params": params}, *arguments)
        texts, latents = ((s.sample >= 0)[..., None] for s in (batch.text, batch.gen))
        return jnp.sum(jnp.square(velocity) * latents) / 100, (hidden * texts, velocity * latents)

    def run(axes):
        mesh = parallel.make_mesh(axes, jax.devices()[: 8 if axes else 1])
        declared = parallel.param_shardings(boxed(CONFIG), mesh)
        with jax.set_mesh(mesh), nn.logical_axis_rules(parallel.DEFAULT_RULES):
            given = jax.device_put(params, declared), parallel.shard_batch(arguments, mesh)
            lowered = jax.jit(jax.value_and_grad(loss, has_aux=True), out_shardings=(None, declared)).lower(*given)
            (_, out), gradient = lowered.compile()(*given)
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(gradient))])
        split = sum(not s.is_fully_replicated for s in jax.tree.leaves(declared["decoder"]))
        return [*map(np.asarray, out), flat], split, lowered.as_text().count("sharding_constraint")

    one, *_ = run({})
    eight, split, constraints = run(dict(fsdp=2, tensor=2, context=2))
    apart = [relative(a, b) for a, b in zip(eight, one)]
    print(json.dumps(dict(apart=apart, split=split, constraints=constraints)), flush=True)


def test_eight_devices_compute_what_one_does():
    here = Path(__file__).parent
    environment = os.environ | {
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{here}{os.pathsep}{here.parent}",
    }
    command = [sys.executable, "-c", "import test_bagel; test_bagel.eight_devices()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert max(found["apart"]) <= 1e-5 and found["split"] >= 14 and found["constraints"] >= 10, found
