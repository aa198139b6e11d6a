"""The key-mapping engine: both directions, and one error that names every offender."""

import jax
import ml_dtypes
import numpy as np
import pytest

from refine_jax.convert.mapping import (
    Rule,
    assign,
    conv_last_frame,
    drop_trailing_ones,
    linear_from_conv3d,
    reference_shapes,
    to_reference,
    to_tree,
)
from refine_jax.errors import RefineError

TABLE = [
    Rule("blocks.{i}.{part:to_q|to_k}.weight", "blocks/{part}/kernel", "transpose", stack="i"),
    Rule("blocks.{i}.{part:to_q|to_k}.bias", "blocks/{part}/bias", stack="i"),
    Rule("down.{n}.conv.weight", "down_{n}/conv/kernel", "conv2d"),
    Rule("causal.weight", "causal/kernel", conv_last_frame(3)),
    Rule("norm.gamma", "norm/scale", drop_trailing_ones(3)),
    Rule("patch.weight", "patch/kernel", linear_from_conv3d(3, 2, 4, 4)),
    Rule("shortcut.weight", "shortcut/kernel", "linear_from_conv1x1"),
    Rule("time_conv.{rest:.*}", unused="a still image has one frame"),
]


def leaf(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


ABSTRACT = {
    "blocks": {part: {"kernel": leaf(3, 4, 6), "bias": leaf(3, 6)} for part in ("to_q", "to_k")},
    "down_0": {"conv": {"kernel": leaf(3, 3, 5, 7)}},
    "down_1": {"conv": {"kernel": leaf(3, 3, 7, 8)}},
    "causal": {"kernel": leaf(3, 3, 2, 5)},
    "norm": {"scale": leaf(9)},
    "patch": {"kernel": leaf(96, 11)},
    "shortcut": {"kernel": leaf(4, 5)},
}


def random_state(seed=0):
    rng = np.random.default_rng(seed)
    shapes = reference_shapes(TABLE, ABSTRACT)
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def test_reference_names_and_shapes():
    shapes = reference_shapes(TABLE, ABSTRACT)
    assert shapes["blocks.2.to_k.weight"] == (6, 4) and shapes["blocks.0.to_q.bias"] == (6,)
    assert shapes["down.1.conv.weight"] == (8, 7, 3, 3) and shapes["causal.weight"] == (5, 2, 3, 3, 3)
    assert shapes["norm.gamma"] == (9, 1, 1, 1) and shapes["patch.weight"] == (11, 3, 2, 4, 4)
    assert shapes["shortcut.weight"] == (5, 4, 1, 1) and len(shapes) == 3 * 4 + 6
    assign({**shapes, "time_conv.bias": (3,)}, TABLE, ABSTRACT)


def test_values_land_where_they_belong():
    state = random_state()
    tree = to_tree(state, TABLE, ABSTRACT)
    np.testing.assert_array_equal(tree["blocks"]["to_k"]["kernel"][1], state["blocks.1.to_k.weight"].T)
    np.testing.assert_array_equal(tree["causal"]["kernel"][0, 2, 1], state["causal.weight"][:, 1, -1, 0, 2])
    patch = np.random.default_rng(1).standard_normal((3, 2, 4, 4)).astype(np.float32)
    expected = np.einsum("ochwx,chwx->o", state["patch.weight"], patch)
    np.testing.assert_allclose(patch.reshape(-1) @ tree["patch"]["kernel"], expected, rtol=1e-4, atol=1e-5)


def test_round_trip_is_the_identity():
    state = random_state()
    state["causal.weight"][:, :, :2] = 0  # the frames that a still image never sees come back as zeros
    back = to_reference(to_tree(state, TABLE, ABSTRACT), TABLE)
    assert back.keys() == state.keys()
    for key in state:
        np.testing.assert_array_equal(back[key], state[key], err_msg=key)
    tree = to_tree(back, TABLE, ABSTRACT)
    jax.tree.map(np.testing.assert_array_equal, to_tree(to_reference(tree, TABLE), TABLE, ABSTRACT), tree)


def test_dtype_and_placement_follow_the_tree():
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, ml_dtypes.bfloat16), ABSTRACT)
    seen = []
    tree = to_tree(random_state(), TABLE, abstract, place=lambda path, x: seen.append(path) or x.dtype)
    assert set(jax.tree.leaves(tree)) == {np.dtype(ml_dtypes.bfloat16)}
    assert "blocks/to_q/kernel" in seen and len(seen) == len(set(seen)) == len(jax.tree.leaves(ABSTRACT))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.update({"a.weight": np.ones(1), "b.weight": np.ones(1)}), ["unknown keys: a.weight, b.weight"]),
        (lambda s: s.update({"blocks.3.to_q.bias": np.ones(6)}), ["unknown keys: blocks.3.to_q.bias"]),
        (
            lambda s: [s.pop(key) for key in ("norm.gamma", "blocks.1.to_q.weight", "causal.weight")],
            ["missing leaves: blocks/to_q/kernel[1], causal/kernel, norm/scale"],
        ),
        (
            lambda s: s.update({"down.0.conv.weight": np.ones((7, 5, 3)), "blocks.0.to_k.weight": np.ones((4, 6))}),
            [
                "blocks.0.to_k.weight [4, 6] gives [6, 4], blocks/to_k/kernel takes [4, 6]",
                "down.0.conv.weight [7, 5, 3]: expected 4 dimensions",
            ],
        ),
        (lambda s: s.update({"causal.weight": np.ones((5, 2, 1, 3, 3))}), ["causal.weight [5, 2, 1, 3, 3]: expected"]),
    ],
)
def test_one_error_lists_every_offender(change, words):
    state = random_state()
    change(state)
    with pytest.raises(RefineError) as caught:
        to_tree(state, TABLE, ABSTRACT, what="model.safetensors")
    assert all(word in str(caught.value) for word in ["model.safetensors", *words]), str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_kind_of_offender_in_one_message():
    state = random_state()
    state["zzz"] = np.ones(1)
    state["norm.gamma"] = np.ones(9, np.float32)
    del state["patch.weight"]
    with pytest.raises(RefineError) as caught:
        to_tree(state, TABLE, ABSTRACT)
    assert all(word in str(caught.value) for word in ("unknown keys: zzz", "norm.gamma [9]", "patch/kernel"))


def test_twice_set_and_twice_matched():
    twice = [*TABLE, Rule("alias.gamma", "norm/scale", drop_trailing_ones(3))]
    state = random_state()
    with pytest.raises(RefineError, match="leaves set twice: norm/scale from norm.gamma and alias.gamma"):
        to_tree({**state, "alias.gamma": state["norm.gamma"]}, twice, ABSTRACT)
    with pytest.raises(RefineError, match="parameter norm/scale: 2 rules"):
        to_reference(to_tree(state, twice, ABSTRACT), twice)
    both = [*TABLE, Rule("norm.{rest:.*}", unused="a second rule over the same key")]
    with pytest.raises(RefineError, match="keys matched by two rules: norm.gamma"):
        to_tree(state, both, ABSTRACT)
    with pytest.raises(RefineError, match="parameter extra/bias: 0 rules"):
        to_reference({"extra": {"bias": np.ones(2)}}, TABLE)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(key="a.{i}.b", path="a/b"),
        dict(key="a.{i}.b", path="a/b", stack="j"),
        dict(key="a", path="a/{i}"),
        dict(key="a"),
        dict(key="a", path="a", unused="both"),
        dict(key="a", path="a", transform="turn"),
    ],
)
def test_rules_that_cannot_be_read_both_ways_are_refused(arguments):
    with pytest.raises(ValueError, match="rule 'a"):
        Rule(**arguments)
