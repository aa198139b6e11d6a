"""The attention kernels against all scores at once: the CPU's blocks, splash (interpreted), cuDNN's order of keys; and
masks by segment through each of them.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_utils import randn, relative_error

from refine_jax.models import attention as door
from refine_jax.models import blockwise, splash
from refine_jax.models.segments import BROKEN, Segments, in_span, join, segment_mask

quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def results(attend, q, k, v):
    """What comes out, and the gradients of a loss that sees every element of it differently."""
    weights = randn(9, *q.shape)

    @quick
    def run(q, k, v):
        out, back = jax.vjp(attend, q, k, v)
        return out, *back(weights)

    return run(q, k, v)


def some_keys(batch: int, keys: int, one_item_wholly: bool = False) -> np.ndarray:
    mask = np.random.default_rng(3).random((batch, 1, 1, keys)) < 0.6
    mask[..., 0] = True
    if one_item_wholly:
        mask[1] = False
    return mask


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("length, keys, masked", [(40, 40, "nothing"), (16, 21, "some"), (33, 7, "one item wholly")])
def test_blocks_equal_the_whole(monkeypatch, length, keys, masked, kv_heads):
    monkeypatch.setattr(door, "_MANY_SCORES_CPU", 1)
    monkeypatch.setattr(door, "_BLOCK", 16)
    q, k, v = randn(0, 2, length, 6, 8), randn(1, 2, keys, kv_heads, 8), randn(2, 2, keys, kv_heads, 8)
    mask = None if masked == "nothing" else some_keys(2, keys, masked == "one item wholly")
    blocks = lambda q, k, v: door.attention(q, k, v, mask=mask)
    whole = lambda q, k, v: door.attention(q, k, v, mask=mask, impl="xla")
    assert "while" in quick(blocks).trace(q, k, v).lower(lowering_platforms=("cpu",)).as_text()
    for a, b, bound in zip(results(blocks, q, k, v), results(whole, q, k, v), (1e-6, 1e-5, 1e-5, 1e-5), strict=True):
        assert relative_error(a, b) <= bound


def test_a_gpus_float32_goes_by_blocks_where_all_scores_are_too_many(monkeypatch):
    monkeypatch.setattr(door, "_MANY_SCORES", 1)
    monkeypatch.setattr(door, "_MANY_SCORES_CPU", 1)
    monkeypatch.setattr(door, "mesh_platform", lambda: "cuda")
    q = randn(0, 2, 40, 4, 8)
    text = lambda: jax.jit(lambda x: door.attention(x, x, x)).trace(q).lower(lowering_platforms=("cuda",)).as_text()
    assert "while" not in text()
    monkeypatch.setattr(door, "_MOST_SCORES", 2 * 4 * 40 * 40 - 1)
    assert "while" in text()


def test_other_masks_go_whole(monkeypatch):
    monkeypatch.setattr(door, "_MANY_SCORES_CPU", 1)
    monkeypatch.setattr(door, "_blocked_attention", None)
    q = randn(0, 2, 9, 4, 8)
    causal = np.tril(np.ones((9, 9), bool))[None, None]
    assert door.attention(q, q, q, mask=causal).shape == q.shape
    for impl in ("splash", "cudnn"):
        with pytest.raises(ValueError, match="masks by key"):
            door.attention(q, q, q, mask=causal, impl=impl)


def test_pieces_are_their_concatenation():
    q, k, v = randn(0, 2, 9, 4, 8), randn(1, 2, 9, 4, 8), randn(2, 2, 9, 4, 8)
    mask = some_keys(2, 9)
    cut = lambda x: (x[:, :4], x[:, 4:])
    first, second = door.attention(cut(q), cut(k), cut(v), mask=mask)
    assert first.shape[1] == 4
    np.testing.assert_array_equal(jnp.concatenate([first, second], 1), door.attention(q, k, v, mask=mask))


# -------------------------------------------------------------------------------------------------------------- splash


@pytest.mark.parametrize(
    "length, keys, heads, depth, masked",
    [
        (130, 300, (2, 2), 24, "some"),  # odd lengths, several blocks of keys
        (128, 128, (4, 2), 128, "nothing"),  # grouped heads, nothing to pad
        (40, 72, (2, 1), 80, "one item wholly"),
    ],
)
def test_splash_equals_the_whole(monkeypatch, length, keys, heads, depth, masked):
    monkeypatch.setattr(splash, "block_size", functools.partial(splash.block_size, largest=256))
    q, k, v = (randn(i, 2, n, h, depth) for i, (n, h) in enumerate(zip((length, keys, keys), (*heads, heads[1]))))
    mask = None if masked == "nothing" else some_keys(2, keys, masked == "one item wholly")
    seen = None if mask is None else jnp.asarray(mask[:, 0, 0])
    ours = lambda q, k, v: splash.splash_attention(q, k, v, None, seen, interpret=True)
    whole = lambda q, k, v: door.attention(q, k, v, mask=mask, impl="xla")
    for a, b in zip(results(ours, q, k, v), results(whole, q, k, v), strict=True):
        assert relative_error(a, b) <= 1e-5


@given(st.integers(1, 40_000))
def test_block_sizes(length):
    block = splash.block_size(length)
    padded = -(-length // block) * block
    assert block % 128 == 0 and block <= 1024 and padded - length < 128 + length / 8
    assert block >= 512 or padded == block


# --------------------------------------------------------------------------------------------------------------- cuDNN


@functools.cache
def masked_and_moved():
    """The result of a mask [3, 8], that of the lengths that stand for it, and these lengths; compiled once."""
    q, k, v = randn(0, 3, 5, 2, 8), randn(1, 3, 8, 2, 8), randn(2, 3, 8, 2, 8)

    @quick
    def run(seen):
        masked = door.attention(q, k, v, mask=seen[:, None, None], impl="xla")
        queries, some = door.something_seen(q, seen)
        keys, values, lengths = door.seen_first(k, v, some)
        moved = jax.nn.dot_product_attention(queries, keys, values, key_value_seq_lengths=lengths, implementation="xla")
        return masked, moved, lengths

    return run


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=3, max_size=3))
def test_seen_keys_in_front_are_the_mask(seen):
    """With valid keys moved to the front, a length says what the mask said; also where nothing is seen."""
    masked, moved, lengths = masked_and_moved()(np.array(seen))
    assert list(lengths) == [sum(row) or 8 for row in seen]
    assert relative_error(moved, masked) <= 1e-5


def test_cudnn_is_lowered_with_lengths_and_no_mask(monkeypatch):
    """As far as a machine without a GPU goes: the program for CUDA calls cuDNN, forwards and backwards, on lengths."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(door, "mesh_platform", lambda: "cuda")  # as under the trainer's mesh
    length = 2048
    x = jax.ShapeDtypeStruct((2, length, 4, 128), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((2, 1, 1, length), jnp.bool_)
    loss = lambda q, k, v, mask: door.attention(q, k, v, mask=mask).astype(jnp.float32).sum()
    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, x, x, mask).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
    assert f"{length}x{length}" not in text
    # Without cuDNN the same door opens on XLA, and float32 does not go to cuDNN.
    assert not door._cudnn_takes(*[jax.ShapeDtypeStruct(x.shape, jnp.float32)] * 3)
    monkeypatch.undo()
    text = jax.jit(loss).trace(x, x, x, mask).lower(lowering_platforms=("cuda",)).as_text()
    assert "cudnn" not in text


# ----------------------------------------------------------------------------------------------------- masks by segment


@st.composite
def packed(draw, size: int, one_target: bool = True) -> list[tuple]:
    """`size` tokens of random samples and padding, in any order: (sample, segment, index, causal, noisy)."""
    tokens = []
    shape = st.lists(st.tuples(st.integers(1, max(1, size // 3)), st.booleans(), st.booleans()), min_size=1, max_size=4)
    for sample, segments in enumerate(draw(st.lists(shape, min_size=1, max_size=5))):
        target, index = draw(st.integers(-1, len(segments) - 1)), 0
        for number, (count, causal, noisy) in enumerate(segments):
            noisy = number == target if one_target else noisy
            for _ in range(count):
                tokens.append((3 * sample, number, index, causal and not (noisy and one_target), noisy))
                index += 1
    tokens = tokens[: size - draw(st.integers(0, size // 4))]
    tokens += [(-1, draw(st.integers(0, 3)), 0, draw(st.booleans()), draw(st.booleans()))] * (size - len(tokens))
    order = range(size) if draw(st.booleans()) else np.random.default_rng(draw(st.integers(0, 99))).permutation(size)
    return [tokens[i] for i in order]


def segments_of(*rows: list[tuple]) -> Segments:
    sample, number, index, causal, noisy = np.moveaxis(np.array(rows, np.int32), 2, 0)
    return Segments(sample, number, index, np.zeros_like(index), causal.astype(bool), noisy.astype(bool))


@functools.cache
def spans_and_rule():
    @quick
    def run(queries, keys):
        mask = segment_mask(queries, keys, one_target=True)
        places = jnp.broadcast_to(mask.order[1][:, None], (*mask.span.shape, keys.sample.shape[1]))
        spans = in_span(jnp.broadcast_to(mask.span[:, :, None], places.shape), places)
        return spans, mask.dense()[:, 0], mask.span, mask.order

    return run


@settings(max_examples=200, deadline=None)
@given(packed(20), st.permutations(range(20)))
def test_spans_are_the_rule(tokens, some):
    """Also where the queries are some of the tokens (behind a cache), and see nothing."""
    keys = segments_of(tokens)
    queries = jax.tree.map(lambda x: x[:, list(some[:7])], keys)
    spans, rule, span, (order, place) = spans_and_rule()(queries, keys)
    np.testing.assert_array_equal(spans, rule)
    assert (span != BROKEN).all()
    np.testing.assert_array_equal(np.take_along_axis(order, place, axis=1)[0], np.arange(20))


@settings(max_examples=100, deadline=None)
@given(packed(20, one_target=False))
def test_what_is_not_a_span_is_known(tokens):
    keys = segments_of(tokens)
    spans, rule, span, _ = spans_and_rule()(jax.tree.map(lambda x: x[:, :7], keys), keys)
    known = np.asarray(span) != BROKEN
    np.testing.assert_array_equal(np.asarray(spans)[known], np.asarray(rule)[known])


def test_a_broken_promise_gives_nan(monkeypatch):
    monkeypatch.setattr(door, "splash_spans", functools.partial(splash.splash_spans, interpret=True))
    kept = [(0, 0, 0, True, False), (0, 1, 1, False, True), (1, 0, 0, False, True), (-1, 3, 0, True, True)]
    two_targets = [*kept[:2], (0, 2, 2, False, True), kept[3]]
    causal_target = [kept[0], (0, 1, 1, True, True), (0, 1, 2, True, True), kept[3]]
    segments = segments_of(kept, two_targets, causal_target)
    q = randn(0, 3, 4, 2, 8)
    out = door.attention(q, q, q, mask=segment_mask(segments, segments, one_target=True), impl="splash")
    assert np.isnan(out).all(axis=(2, 3)).astype(int).tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0]]
    assert np.isfinite(out[0]).all() and not out[0, 3].any()


def test_masks_that_an_implementation_does_not_take():
    q, segments = randn(0, 1, 4, 2, 8), segments_of([(0, 0, i, True, False) for i in range(4)])
    with pytest.raises(ValueError, match="one_target=True"):
        door.attention(q, q, q, mask=segment_mask(segments, segments), impl="splash")
    for mask in (None, np.ones((1, 1, 1, 4), bool), np.ones((1, 1, 4, 4), bool)):
        with pytest.raises(ValueError, match="SegmentMask"):
            door.attention(q, q, q, mask=mask, impl="blocks")
    with pytest.raises(ValueError, match="'fast'"):
        door.attention(q, q, q, impl="fast")


@functools.cache
def attended(impl: str, size: int, keys: int, one_target: bool):
    """Results and gradients, of 4 heads on 2, for segments [2, size] and all keys [2, keys]; compiled once."""
    q, k, v = randn(0, 2, size, 4, 24), randn(1, 2, keys, 2, 24), randn(2, 2, keys, 2, 24)

    @quick
    def run(queries, others):
        mask = segment_mask(queries, join(others, queries), one_target=one_target)
        out, back = jax.vjp(lambda q, k, v: door.attention(q, k, v, mask=mask, impl=impl), q, k, v)
        return out, *back(randn(9, *q.shape))

    return run


def compare(impl: str, rows: list[list[tuple]], size: int, one_target: bool) -> None:
    every = segments_of(*rows)
    others, queries = jax.tree.map(lambda x: x[:, :-size], every), jax.tree.map(lambda x: x[:, -size:], every)
    ours, whole = (attended(x, size, len(rows[0]), one_target)(queries, others) for x in (impl, "xla"))
    for a, b in zip(ours, whole, strict=True):
        assert np.isfinite(a).all() and np.abs(a - b).max() <= 1e-5 * max(1.0, np.abs(b).max())
    blind = ~np.asarray(segment_mask(queries, every).dense()).any(axis=(1, 3))
    assert not np.asarray(ours[0])[blind].any() and not np.asarray(ours[1])[blind].any()


@pytest.fixture(scope="module")
def small_blocks():
    """Sizes at which a few hundred tokens are several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "_BLOCK", (32, 16))
        patch.setattr(splash, "block_size", functools.partial(splash.block_size, largest=256))
        patch.setattr(door, "splash_spans", functools.partial(splash.splash_spans, interpret=True))
        yield


@settings(max_examples=40, deadline=None)
@given(st.lists(packed(60, one_target=False), min_size=2, max_size=2))
def test_blocks_under_segments_equal_the_whole(small_blocks, rows):
    compare("blocks", rows, 44, one_target=False)


@settings(max_examples=8, deadline=None)
@given(st.lists(packed(330), min_size=2, max_size=2))
def test_splash_under_segments_equals_the_whole(small_blocks, rows):
    compare("splash", rows, 300, one_target=True)


@settings(max_examples=4, deadline=None)
@given(st.lists(packed(310), min_size=2, max_size=2))
def test_splash_with_two_gradient_kernels(small_blocks, rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splash, "_MOST_FUSED_SPANS", 1)
        compare("splash", rows, 290, one_target=True)


def test_all_heads_or_one_at_a_time(small_blocks, monkeypatch):
    monkeypatch.setattr(blockwise, "_CPU_BLOCK", (24, 24))
    segments = segments_of([(i // 20, i % 20 // 7, i % 20, i % 20 < 7, False) for i in range(50)])
    q, k, v = randn(0, 1, 50, 4, 8), randn(1, 1, 50, 2, 8), randn(2, 1, 50, 2, 8)
    run = lambda one: results(
        lambda q, k, v: blockwise.blockwise_attention(q, k, v, segments, segments, one_head_at_a_time=one), q, k, v
    )
    for a, b in zip(run(True), run(False), strict=True):
        assert relative_error(a, b) <= 1e-6


@settings(max_examples=200, deadline=None)
@given(packed(24, one_target=False), packed(18, one_target=False))
def test_no_block_is_skipped_that_is_seen(queries, keys):
    queries, keys = segments_of(queries), segments_of(keys)
    with jax.disable_jit():
        seen = np.asarray(segment_mask(queries, keys).dense())[0, 0].reshape(4, 6, 3, 6).any(axis=(1, 3))
        cut = lambda x: jax.tree.map(lambda x: x.reshape(-1, 6), x)
        visited = np.asarray(blockwise.visible_blocks(cut(queries), cut(keys)))
    assert (visited | ~seen).all()


def test_packed_blocks_are_skipped():
    """Four samples of four blocks each, one after the other, of a causal text and an image: 4 x (1 + 2 + 3 + 4)."""
    segments = segments_of([(i // 32, i % 32 // 8, i % 32, i % 32 < 16, False) for i in range(128)])
    blocks = jax.tree.map(lambda x: x.reshape(16, 8), segments)
    assert int(blockwise.visible_blocks(blocks, blocks).sum()) == 40


@pytest.mark.parametrize(
    "platform, length, expected",
    [
        ("cpu", 2048, ()),
        ("tpu", 2048, ("tpu_custom_call",)),
        ("cuda", 2048, ("__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward")),
        ("cuda", 20480, ()),  # the bias would be too large
    ],
)
def test_what_a_platform_gets(monkeypatch, platform, length, expected):
    """As far as this machine goes: the program for each platform, forwards and backwards, and that it has no scores."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(door, "mesh_platform", lambda: platform)
    # `small_blocks` may still be in force.
    monkeypatch.setattr(door, "splash_spans", splash.splash_spans)
    shape = lambda heads: jax.ShapeDtypeStruct((1, length, heads, 128), jnp.bfloat16)
    kinds = (jnp.int32,) * 4 + (jnp.bool_,) * 2
    segments = Segments(*(jax.ShapeDtypeStruct((1, length), kind) for kind in kinds))

    def loss(q, k, v, segments):
        mask = segment_mask(segments, segments, one_target=True)
        return door.attention(q, k, v, mask=mask).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(shape(14), shape(2), shape(2), segments)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert all(name in text for name in expected)
    large = any(f"{length}x{length}x{kind}" in text for kind in ("f32", "bf16"))
    assert large == any("cudnn" in name for name in expected)  # the bias


# ------------------------------------------------------------------------------------------------ eight virtual devices


def eight_devices() -> None:
    """Runs in a process of its own: prints how far the kernels on meshes are from all scores on one device."""
    from flax import linen as nn

    from refine_jax import parallel

    door.splash_attention = functools.partial(splash.splash_attention, interpret=True)
    door.splash_spans = functools.partial(splash.splash_spans, interpret=True)
    blockwise._BLOCK = (32, 16)
    cut = lambda x: (x[:, :24], x[:, 24:])
    q, k, v = randn(0, 4, 88, 4, 16), randn(1, 4, 88, 2, 16), randn(2, 4, 88, 2, 16)
    weights = randn(9, *q.shape)
    row = lambda i: [(t // (30 + i), t % (30 + i) // 9, t, t % 7 < 3, t % (30 + i) // 9 == 2) for t in range(80)]
    rows = [[(a, b, c, d and not e, e) for a, b, c, d, e in row(i)] + [(-1, 0, 0, False, False)] * 8 for i in range(4)]
    by_key, by_segment = jnp.asarray(some_keys(4, 88, one_item_wholly=True)), segments_of(*rows)

    def loss(q, k, v, impl, kind):
        mask = by_key if kind == "key" else segment_mask(by_segment, by_segment, one_target=True)
        out = jnp.concatenate(door.attention(cut(q), cut(k), cut(v), mask=mask, impl=impl), axis=1)
        return (out * weights).sum(), out

    step = lambda **how: quick(jax.value_and_grad(functools.partial(loss, **how), (0, 1, 2), has_aux=True))
    expected = {kind: step(impl="xla", kind=kind)(q, k, v) for kind in ("key", "segment")}
    found = {}
    for name, axes in {
        "all": dict(fsdp=2, tensor=2, context=2),
        "slices": dict(slice=2, data=2, context=2),
        "undivided": dict(fsdp=1, tensor=8),  # two key heads: whole on every device
    }.items():
        mesh = parallel.make_mesh(axes)
        with jax.set_mesh(mesh), nn.logical_axis_rules(parallel.make_rules()):
            arrays = parallel.shard_batch((q, k, v), mesh)
            for impl, kind in (("splash", "key"), ("splash", "segment"), ("blocks", "segment")):
                lowered = step(impl=impl, kind=kind).lower(*arrays)
                result = lowered.compile()(*arrays)
                error = lambda a, b: float(relative_error(a, b))
                errors = jax.tree.leaves(jax.tree.map(error, jax.device_get(result), expected[kind]))
                found[f"{name} {impl} {kind}"] = max(errors), lowered.as_text().count("all_gather")
    print(json.dumps(found))


def test_kernels_on_a_mesh_equal_one_device():
    here = Path(__file__).parent
    environment = os.environ | {
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{here}{os.pathsep}{here.parent}",
    }
    command = [sys.executable, "-c", "import test_attention; test_attention.eight_devices()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 9 and all(error <= 1e-4 for error, _ in found.values()), found
    assert all((count == 0) if name.startswith("undivided") else (count >= 4) for name, (_, count) in found.items()), (
        found
    )
