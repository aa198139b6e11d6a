"""Attention by blocks, as it runs on a CPU over long sequences, against all scores at once."""

import functools

import jax
import numpy as np
import pytest
from reference_utils import randn, relative_error

from refine_jax.models import attention as door


@pytest.mark.parametrize("length, keys, masked", [(40, 40, "nothing"), (16, 21, "some"), (33, 7, "one item wholly")])
def test_blocks_equal_the_whole(monkeypatch, length, keys, masked):
    monkeypatch.setattr(door, "_MANY_SCORES", 1)
    monkeypatch.setattr(door, "_BLOCK", 16)
    q, k, v = randn(0, 2, length, 3, 8), randn(1, 2, keys, 3, 8), randn(2, 2, keys, 3, 8)
    mask = None
    if masked != "nothing":
        mask = np.random.default_rng(3).random((2, 1, 1, keys)) < 0.6
        mask[..., 0] = True
        if masked == "one item wholly":
            mask[1] = False
    quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    program = quick(lambda q, k, v: door.attention(q, k, v, mask=mask))
    if jax.default_backend() == "cpu":
        assert "while" in program.lower(q, k, v).as_text()
    expected = door._whole_attention(q, k, v, mask)
    assert relative_error(program(q, k, v), expected) <= 1e-6
    # The softmax's gradient too.
    loss = lambda f: quick(jax.grad(lambda q, k, v: (f(q, k, v) ** 2).sum(), (0, 1, 2)))(q, k, v)
    ours, theirs = (
        loss(lambda q, k, v: door.attention(q, k, v, mask=mask)),
        loss(lambda q, k, v: door._whole_attention(q, k, v, mask)),
    )
    for a, b in zip(ours, theirs):
        assert relative_error(a, b) <= 1e-5


def test_other_masks_and_grouped_heads_go_whole(monkeypatch):
    monkeypatch.setattr(door, "_MANY_SCORES", 1)
    monkeypatch.setattr(door, "_blocked_attention", None)
    q, k, v = randn(0, 2, 9, 4, 8), randn(1, 2, 9, 2, 8), randn(2, 2, 9, 2, 8)
    causal = np.tril(np.ones((9, 9), bool))[None, None]
    assert door.attention(q, k, v).shape == q.shape
    assert door.attention(q, q, q, mask=causal).shape == q.shape
