"""The attention kernels against all scores at once: the CPU's blocks, splash (interpreted), cuDNN's order of keys."""

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


@pytest.mark.parametrize("length, keys, masked", [(40, 40, "nothing"), (16, 21, "some"), (33, 7, "one item wholly")])
def test_blocks_equal_the_whole(monkeypatch, length, keys, masked):
    monkeypatch.setattr(door, "_MANY_SCORES", 1)
    monkeypatch.setattr(door, "_BLOCK", 16)
    q, k, v = randn(0, 2, length, 3, 8), randn(1, 2, keys, 3, 8), randn(2, 2, keys, 3, 8)
    mask = None if masked == "nothing" else some_keys(2, keys, masked == "one item wholly")
    blocks = lambda q, k, v: door.attention(q, k, v, mask=mask)
    whole = lambda q, k, v: door.attention(q, k, v, mask=mask, impl="xla")
    assert "while" in quick(blocks).trace(q, k, v).lower(lowering_platforms=("cpu",)).as_text()
    for a, b, bound in zip(results(blocks, q, k, v), results(whole, q, k, v), (1e-6, 1e-5, 1e-5, 1e-5), strict=True):
        assert relative_error(a, b) <= bound


def test_other_masks_and_grouped_heads_go_whole(monkeypatch):
    monkeypatch.setattr(door, "_MANY_SCORES", 1)
    monkeypatch.setattr(door, "_blocked_attention", None)
    q, k, v = randn(0, 2, 9, 4, 8), randn(1, 2, 9, 2, 8), randn(2, 2, 9, 2, 8)
    causal = np.tril(np.ones((9, 9), bool))[None, None]
    assert door.attention(q, k, v).shape == q.shape
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
    monkeypatch.setattr(door, "block_size", functools.partial(door.block_size, largest=256))
    q, k, v = (randn(i, 2, n, h, depth) for i, (n, h) in enumerate(zip((length, keys, keys), (*heads, heads[1]))))
    mask = None if masked == "nothing" else some_keys(2, keys, masked == "one item wholly")
    seen = None if mask is None else jnp.asarray(mask[:, 0, 0])
    ours = lambda q, k, v: door._splash_attention(q, k, v, seen, interpret=True)
    whole = lambda q, k, v: door.attention(q, k, v, mask=mask, impl="xla")
    for a, b in zip(results(ours, q, k, v), results(whole, q, k, v), strict=True):
        assert relative_error(a, b) <= 1e-5


@given(st.integers(1, 40_000))
def test_block_sizes(length):
    block = door.block_size(length)
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
        queries, some = door._something_seen(q, seen)
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
    monkeypatch.setattr(door, "_mesh_platform", lambda: "cuda")  # as under the trainer's mesh
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


# ------------------------------------------------------------------------------------------------ eight virtual devices


def eight_devices() -> None:
    """Runs in a process of its own: prints how far splash on meshes is from all scores on one device."""
    from flax import linen as nn

    from refine_jax import parallel

    door._splash_attention = functools.partial(door._splash_attention, interpret=True)
    cut = lambda x: (x[:, :24], x[:, 24:])
    q, k, v = randn(0, 4, 88, 4, 16), randn(1, 4, 88, 2, 16), randn(2, 4, 88, 2, 16)
    mask = jnp.asarray(some_keys(4, 88, one_item_wholly=True))
    weights = randn(9, *q.shape)

    def loss(q, k, v, impl):
        out = jnp.concatenate(door.attention(cut(q), cut(k), cut(v), mask=mask, impl=impl), axis=1)
        return (out * weights).sum(), out

    expected = quick(jax.value_and_grad(functools.partial(loss, impl="xla"), (0, 1, 2), has_aux=True))(q, k, v)
    found = {}
    for name, axes in {
        "all": dict(fsdp=2, tensor=2, context=2),
        "slices": dict(slice=2, data=2, context=2),
        "undivided": dict(fsdp=1, tensor=8),  # two key heads: whole on every device
    }.items():
        mesh = parallel.make_mesh(axes)
        with jax.set_mesh(mesh), nn.logical_axis_rules(parallel.make_rules()):
            arrays = parallel.shard_batch((q, k, v), mesh)
            step = quick(jax.value_and_grad(functools.partial(loss, impl="splash"), (0, 1, 2), has_aux=True))
            lowered = step.lower(*arrays)
            result = lowered.compile()(*arrays)
        errors = jax.tree.map(lambda a, b: float(relative_error(a, b)), jax.device_get(result), expected)
        found[name] = max(jax.tree.leaves(errors)), lowered.as_text().count("all_gather")
    print(json.dumps(found))


def test_splash_on_a_mesh_equals_one_device():
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
    assert all(error <= 1e-4 for error, _ in found.values()), found
    assert found["all"][1] >= 4 and found["slices"][1] >= 4 and found["undivided"][1] == 0, found
