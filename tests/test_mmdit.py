"""The MMDiT against diffusers' `QwenImageTransformer2DModel`, and its own invariances."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.normalization import RMSNorm as ReferenceRMSNorm
from diffusers.models.transformers.transformer_qwenimage import (
    QwenEmbedRope,
    QwenImageTransformer2DModel,
    QwenImageTransformerBlock,
    QwenTimestepProjEmbeddings,
    apply_rotary_emb_qwen,
)
from flax import linen as nn
from reference_utils import QUICK, difference, meta_shapes, numpy_state, randn, randomise, relative_error

from refine_jax.convert import keys_mmdit
from refine_jax.convert.lora import merge
from refine_jax.convert.mapping import assign, reference_shapes, to_reference, to_tree
from refine_jax.errors import RefineError
from refine_jax.models import layers
from refine_jax.models.attention import attention
from refine_jax.models.mmdit import (
    VARIANTS,
    Block,
    MMDiT,
    MMDiTConfig,
    TimeEmbedding,
    image_positions,
    stack_blocks,
    text_start,
    unstack_blocks,
)

SIZES = dict(
    patch_size=2,
    in_channels=16,
    out_channels=4,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=3,
    joint_attention_dim=20,
    axes_dims_rope=(4, 6, 6),
)


def abstract_params(config: MMDiTConfig):
    shapes = dict(
        latents=(1, 4, config.in_channels),
        text=(1, 3, config.joint_attention_dim),
        sigma=(1,),
        image_positions=(1, 4, 3),
        text_positions=(1, 3),
    )
    arguments = [jax.ShapeDtypeStruct(shape, jnp.int32 if "pos" in k else jnp.float32) for k, shape in shapes.items()]
    init = partial(MMDiT(config).init, target_length=4)
    return jax.eval_shape(init, jax.random.key(0), *arguments)["params"]


def pair(seed: int, **changes):
    """A random reference and our (config, params) with its numbers."""
    sizes = {**SIZES, **changes}
    reference = randomise(QwenImageTransformer2DModel(**sizes), seed)
    config = MMDiTConfig.from_dict(dict(reference.config))
    return reference, config, to_tree(numpy_state(reference), keys_mmdit.TABLE, nn.meta.unbox(abstract_params(config)))


def inputs(config: MMDiTConfig, grids, *, batch=2, text_length=7, seed=0):
    n = sum(h * w for h, w in grids)
    positions = np.broadcast_to(image_positions(grids), (batch, n, 3))
    text_positions = np.broadcast_to(text_start(grids) + np.arange(text_length, dtype=np.int32), (batch, text_length))
    sigma = np.random.default_rng(seed).uniform(0.02, 1, batch).astype(np.float32)
    latents = randn(seed + 1, batch, n, config.in_channels)
    text = 3 * randn(seed + 2, batch, text_length, config.joint_attention_dim)
    return [latents, text, sigma, positions, text_positions]


def _velocity(config, target_length, variables, args, masks):
    return MMDiT(config).apply(variables, *args, target_length=target_length, **masks)


# Comparisons with the reference are compiled as conftest.py says; comparisons with ourselves faster.
_optimised = jax.jit(_velocity, static_argnums=(0, 1))
_quick = jax.jit(_velocity, static_argnums=(0, 1), compiler_options=QUICK)


def velocity(config, params, args, target_length, *, lora=None, optimised=False, **masks):
    variables = {"params": params} | ({} if lora is None else {"lora": lora})
    return (_optimised if optimised else _quick)(config, target_length, variables, args, masks)


def reference_velocity(reference, args, grids, text_mask=None):
    latents, text, sigma = (torch.from_numpy(np.array(x)) for x in args[:3])
    with torch.no_grad():
        return reference(
            hidden_states=latents,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=None if text_mask is None else torch.from_numpy(text_mask),
            timestep=sigma,
            img_shapes=[[(1, h, w) for h, w in grids]] * len(latents),
            return_dict=False,
        )[0][:, : grids[0][0] * grids[0][1]]


# ---------------------------------------------------------------- rung 1: submodules


@pytest.mark.parametrize("sigma", [[0.0, 1.0], [0.037, 0.9981], [0.5, 1e-4]])
def test_timestep_embedding(sigma):
    sigma = np.array(sigma, np.float32)
    ours = jax.jit(partial(layers.timestep_embedding, dim=256, scale=1000.0))(sigma)
    ref = get_timestep_embedding(torch.from_numpy(sigma), 256, True, 0, scale=1000)
    # One unit in the last place of a frequency turns an angle of 1000 by 6e-5.
    assert relative_error(ours, ref) <= 1e-5 and difference(ours, ref) <= 1e-4
    embedder = randomise(QwenTimestepProjEmbeddings(48), 3)
    assert isinstance(embedder.timestep_embedder, TimestepEmbedding)
    state = numpy_state(embedder.timestep_embedder)
    params = {
        name: {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]} for name in ("linear_1", "linear_2")
    }
    ours = TimeEmbedding(MMDiTConfig(**SIZES)).apply({"params": params}, sigma)
    assert difference(ours, embedder(torch.from_numpy(sigma), torch.zeros(1))) <= 1e-5


@pytest.mark.parametrize("axes", [(4, 6, 6), (16, 56, 56)])
@pytest.mark.parametrize("grids", [[(5, 5)], [(4, 7), (6, 3)], [(1, 9), (8, 2), (3, 5), (64, 48)]])
def test_rotary(axes, grids):
    rope = QwenEmbedRope(10000, list(axes), scale_rope=True)
    image, text = rope([[(1, h, w) for h, w in grids]], device=torch.device("cpu"), max_txt_seq_len=11)
    positions = np.concatenate([np.repeat(text_start(grids) + np.arange(11)[:, None], 3, 1), image_positions(grids)])
    cos, sin = jax.jit(partial(layers.rotary_angles, axes_dims=axes))(positions)
    table = torch.cat([text, image])
    assert difference(cos, table.real) <= 1e-5 and difference(sin, table.imag) <= 1e-5
    x = randn(0, 2, len(positions), 3, sum(axes))
    ours = layers.apply_rotary(jnp.asarray(x), cos[None], sin[None], interleaved=True)
    assert difference(ours, apply_rotary_emb_qwen(torch.from_numpy(x), table, use_real=False)) <= 1e-5


def test_norms():
    x = 5 * randn(0, 2, 3, 48) + 1
    norm = randomise(ReferenceRMSNorm(48, 1e-6), 1)
    ours = layers.RMSNorm(eps=1e-6).apply({"params": {"scale": numpy_state(norm)["weight"]}}, x)
    assert difference(ours, norm(torch.from_numpy(x))) <= 1e-5
    assert difference(layers.layer_norm(x, 1e-6), torch.nn.functional.layer_norm(torch.from_numpy(x), (48,))) <= 1e-5
    affine = randomise(torch.nn.LayerNorm(48, 1e-6), 2)
    params = {"scale": affine.weight.detach().numpy(), "bias": affine.bias.detach().numpy()}
    assert difference(layers.LayerNorm(eps=1e-6).apply({"params": params}, x), affine(torch.from_numpy(x))) <= 1e-5


def test_attention_with_grouped_heads_and_masks():
    q, k, v = randn(0, 2, 5, 6, 8), randn(1, 2, 9, 3, 8), randn(2, 2, 9, 3, 8)
    mask = np.random.default_rng(3).random((2, 1, 5, 9)) < 0.6
    mask[..., 0] = True
    ours = attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), mask=jnp.asarray(mask))
    q, k, v = (torch.from_numpy(x).transpose(1, 2) for x in (q, k, v))
    ref = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=torch.from_numpy(mask), enable_gqa=True)
    assert difference(ours, ref.transpose(1, 2)) <= 1e-5
    with pytest.raises(ValueError, match="'flash'"):
        attention(ours, ours, ours, impl="flash")


@pytest.mark.parametrize("seed, zero_cond_t, masked", [(0, False, False), (1, True, True), (2, True, False)])
def test_block(seed, zero_cond_t, masked):
    config = MMDiTConfig(**SIZES, zero_cond_t=zero_cond_t)
    width, n_text, n_target, n = config.width, 5, 6, 14
    block = randomise(QwenImageTransformerBlock(width, 3, 16, zero_cond_t=zero_cond_t), seed)
    text, image, time = randn(1, 2, n_text, width), randn(2, 2, n, width), randn(3, 3, width)
    angles = randn(4, n_text + n, 8)
    table = torch.polar(torch.ones(n_text + n, 8), torch.from_numpy(angles))
    mask = np.array([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]], bool)
    # The reference repeats the t = 0 row for each item.
    rows = np.concatenate([time[:2], time[2:], time[2:]]) if zero_cond_t else time[:2]
    index = torch.tensor([[0] * n_target + [1] * (n - n_target)] * 2) if zero_cond_t else None
    with torch.no_grad():
        ref_text, ref_image = block(
            torch.from_numpy(image),
            torch.from_numpy(text),
            torch.from_numpy(mask) if masked else None,
            torch.from_numpy(rows),
            (table[n_text:], table[:n_text]),
            modulate_index=index,
        )
    state = {f"transformer_blocks.0.{key}": value for key, value in numpy_state(block).items()}
    abstract = nn.meta.unbox(abstract_params(dataclasses.replace(config, num_layers=1)))["blocks"]
    params = unstack_blocks(to_tree(state, keys_mmdit.TABLE, {"blocks": abstract}))["blocks_0"]
    joint_mask = np.concatenate([mask, np.ones((2, n), bool)], 1)[:, None, None] if masked else None
    (ours_text, ours_image), _ = jax.jit(lambda p, *a: Block(config).apply({"params": p}, *a))(
        params,
        (text, image),
        nn.silu(time if zero_cond_t else time[:2]),
        (np.cos(angles)[None], np.sin(angles)[None]),
        joint_mask,
        np.arange(n) < n_target if zero_cond_t else None,
    )
    assert difference(ours_text, ref_text) <= 1e-5 and difference(ours_image, ref_image) <= 1e-5


def test_norm_out():
    """The last adaptive norm and projection alone: a network of no blocks is them over the embedding."""
    reference, config, params = pair(5)
    x, time = randn(0, 2, 6, config.width), randn(1, 2, config.width)
    norm = randomise(AdaLayerNormContinuous(config.width, config.width, elementwise_affine=False, eps=1e-6), 7)
    state = numpy_state(norm)
    modulation = layers.Dense(2 * config.width, ("embed", "time")).apply(
        {"params": {"kernel": state["linear.weight"].T, "bias": state["linear.bias"]}}, nn.silu(time)
    )
    scale, shift = np.split(np.asarray(modulation), 2, axis=-1)
    ours = layers.layer_norm(x, 1e-6) * (1 + scale[:, None]) + shift[:, None]
    assert difference(ours, norm(torch.from_numpy(x), torch.from_numpy(time))) <= 1e-5
    empty, empty_config = QwenImageTransformer2DModel(**{**SIZES, "num_layers": 0}), MMDiTConfig(**SIZES, scan=False)
    empty.load_state_dict(reference.state_dict(), strict=False)
    args = inputs(config, [(3, 2), (2, 2)])
    ours = velocity(dataclasses.replace(empty_config, num_layers=0), params, args, 6)
    assert difference(ours, reference_velocity(empty, args, [(3, 2), (2, 2)])) <= 1e-5


# ---------------------------------------------------------------- rung 2: the network

CASES = [
    # seed, zero_cond_t, grids (target first), text mask
    (0, False, [(4, 4)], None),
    (1, False, [(3, 5), (4, 4)], [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]]),
    (2, True, [(5, 2), (2, 3), (3, 3)], [[1, 0, 1, 1, 0, 0, 1], [0, 1, 1, 1, 1, 0, 0]]),
    (3, True, [(2, 6), (6, 1), (3, 4), (4, 3)], None),
    (4, False, [(4, 3), (3, 5), (2, 2), (1, 3)], [[1, 1, 1, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0, 0]]),
    (5, True, [(4, 4), (4, 4)], [[1] * 7] * 2),
]


@pytest.mark.parametrize("seed, zero_cond_t, grids, text_mask", CASES)
def test_network(seed, zero_cond_t, grids, text_mask):
    reference, config, params = pair(seed, zero_cond_t=zero_cond_t)
    assert config.zero_cond_t == zero_cond_t
    args = inputs(config, grids, seed=seed)
    mask = None if text_mask is None else np.array(text_mask, bool)
    ref = reference_velocity(reference, args, grids, mask)
    target = grids[0][0] * grids[0][1]
    ours = velocity(config, params, args, target, text_mask=mask, optimised=True)
    assert ours.dtype == jnp.float32
    assert difference(ours, ref) <= 1e-4
    if mask is not None and mask.all():
        assert relative_error(velocity(config, params, args, target), ours) <= 1e-6
    if seed in (2, 4):
        unscanned = dataclasses.replace(config, scan=False)
        twin = velocity(unscanned, unstack_blocks(params), args, target, text_mask=mask)
        assert relative_error(twin, ours) <= 1e-6


def test_wider_network():
    """Other ratios of heads, channels and depth, the published rotary split."""
    sizes = dict(attention_head_dim=128, num_attention_heads=2, axes_dims_rope=(16, 56, 56), num_layers=2)
    reference, config, params = pair(
        11, **sizes, joint_attention_dim=64, in_channels=32, out_channels=8, zero_cond_t=True
    )
    grids = [(6, 8), (8, 6)]
    args = inputs(config, grids, batch=1, text_length=12)
    ref = reference_velocity(reference, args, grids)
    assert difference(velocity(config, params, args, 48), ref) <= 1e-4


@pytest.mark.parametrize("seed, zero_cond_t", [(0, False), (1, True)])
def test_bfloat16_stays_close(seed, zero_cond_t):
    _, config, params = pair(seed, zero_cond_t=zero_cond_t)
    args = inputs(config, [(4, 5), (3, 3)], seed=seed)
    full = velocity(config, params, args, 20)
    half = velocity(dataclasses.replace(config, dtype="bfloat16"), params, args, 20)
    assert 1e-5 < relative_error(half, full) <= 2e-2


# ---------------------------------------------------------------- invariances


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("pattern", ["end", "scattered"])
def test_padding_never_changes_a_result(zero_cond_t, pattern):
    _, config, params = pair(6, zero_cond_t=zero_cond_t)
    grids, n_target = [(3, 4), (2, 3)], 12
    args = inputs(config, grids, batch=1, text_length=5, seed=6)
    plain = velocity(config, params, args, n_target)
    # Where each real token goes in the padded sequences; the target's padding stays within the target.
    text_at, image_at, target = {
        "end": (np.arange(5), np.r_[np.arange(12), 16 + np.arange(6)], 16),
        "scattered": (
            np.array([1, 2, 4, 7, 8]),
            np.r_[np.delete(np.arange(16), [0, 3, 7, 8]), 17, 18, 20, 21, 24, 25],
            16,
        ),
    }[pattern]
    lengths = (len(text_at) + 4, 26)
    padded, masks = [], []
    for x, at, length in zip(args, (image_at, text_at, None, image_at, text_at), (26, 9, None, 26, 9)):
        if at is None:
            padded.append(x)
            continue
        noise = 50 * randn(len(padded), 1, length, *x.shape[2:])
        big = noise.astype(x.dtype)
        big[:, at] = x
        padded.append(big)
    for at, length in ((text_at, lengths[0]), (image_at, lengths[1])):
        mask = np.zeros((1, length), bool)
        mask[:, at] = True
        masks.append(mask)
    out = velocity(config, params, padded, target, text_mask=masks[0], image_mask=masks[1])
    assert relative_error(np.asarray(out)[:, image_at[:12]], plain) <= 1e-5


def test_batch_neighbours_do_not_matter():
    _, config, params = pair(7, zero_cond_t=True)
    args = inputs(config, [(3, 3), (2, 2)], batch=3, seed=7)
    mask = np.random.default_rng(0).random((3, 7)) < 0.7
    together = velocity(config, params, args, 9, text_mask=mask)
    for item in range(3):
        alone = velocity(config, params, [x[item : item + 1] for x in args], 9, text_mask=mask[item : item + 1])
        assert relative_error(together[item : item + 1], alone) <= 1e-5


def test_lora_is_an_addition_to_the_base():
    _, config, params = pair(8)
    args = inputs(config, [(3, 3), (2, 2)], seed=8)
    base = velocity(config, params, args, 9)
    fresh = layers.init_lora(jax.random.key(0), params, r"blocks/(attn/(to_q|to_out)|txt_mlp/up)|img_in", 2)
    assert relative_error(velocity(config, params, args, 9, lora={}), base) == 0
    assert relative_error(velocity(config, params, args, 9, lora=fresh), base) == 0
    assert jax.tree.map(np.shape, fresh)["blocks"]["attn"]["to_q"] == {"a": (3, 48, 2), "b": (3, 2, 48)}
    # A trained adapter: b away from zero.
    lora = jax.tree.map(lambda x: np.asarray(x) if x.any() else 0.3 * randn(x.size, *x.shape), fresh)
    adapted = velocity(config, params, args, 9, lora=lora)
    assert relative_error(adapted, base) > 1e-2
    assert (
        relative_error(adapted, velocity(config, merge({"mmdit": params}, {"mmdit": lora})["mmdit"], args, 9)) <= 1e-5
    )
    twin = velocity(dataclasses.replace(config, scan=False), unstack_blocks(params), args, 9, lora=unstack_blocks(lora))
    assert relative_error(twin, adapted) <= 1e-6
    with pytest.raises(RefineError, match="to_x"):
        layers.init_lora(jax.random.key(0), params, "blocks/attn/to_x", 2)
    with pytest.raises(RefineError, match="blocks/attn/to_x"):
        merge({"mmdit": params}, {"mmdit": {"blocks": {"attn": {"to_x": lora["blocks"]["attn"]["to_q"]}}}})


def test_adapters_stack_along_the_rank():
    dense = layers.Dense(5, ("embed", "mlp"))
    x, parts = randn(0, 4, 6), [(randn(i, 6, 2), randn(i + 5, 2, 5)) for i in range(2)]
    params = {"kernel": randn(9, 6, 5), "bias": randn(10, 5)}
    both = {"a": np.concatenate([a for a, _ in parts], axis=1), "b": np.concatenate([b for _, b in parts], axis=0)}
    expected = x @ (params["kernel"] + sum(a @ b for a, b in parts)) + params["bias"]
    assert relative_error(dense.apply({"params": params, "lora": both}, x), expected) <= 1e-5


@pytest.mark.parametrize("remat, scan", [("full", True), ("dots_with_no_batch_dims_saveable", False)])
def test_gradients_do_not_depend_on_remat_or_scan(remat, scan):
    _, config, params = pair(9, num_layers=2)
    args = inputs(config, [(2, 3), (2, 2)], batch=1, seed=9)

    def gradient(config, params):
        loss = lambda p: jnp.sum(jnp.square(MMDiT(config).apply({"params": p}, *args, target_length=6)))
        return jax.jit(jax.grad(loss), compiler_options=QUICK)(params)

    expected = gradient(config, params)
    other = dataclasses.replace(config, remat=remat, scan=scan)
    got = gradient(other, params) if scan else stack_blocks(gradient(other, unstack_blocks(params)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4 * np.abs(b).max()), got, expected)
    jax.tree.map(np.testing.assert_array_equal, stack_blocks(unstack_blocks(params)), params)


# ---------------------------------------------------------------- names, shapes, configuration


@pytest.mark.parametrize("name", VARIANTS)
def test_full_size_names_shapes_and_count(name):
    config = VARIANTS[name]
    with torch.device("meta"):
        reference = QwenImageTransformer2DModel(zero_cond_t=config.zero_cond_t)
    assert MMDiTConfig.from_dict(dict(reference.config)) == config
    expected = meta_shapes(reference)
    abstract = nn.meta.unbox(abstract_params(config))
    assert reference_shapes(keys_mmdit.TABLE, abstract) == expected
    assign(expected, keys_mmdit.TABLE, abstract)
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract))
    assert count == sum(int(np.prod(shape)) for shape in expected.values()) == 20_430_401_088


def test_state_dict_round_trip():
    reference, config, params = pair(10)
    state = numpy_state(reference)
    back = to_reference(params, keys_mmdit.TABLE)
    assert back.keys() == state.keys()
    for key in state:
        np.testing.assert_array_equal(back[key], state[key], err_msg=key)
    broken = {key: value for key, value in state.items() if key != "transformer_blocks.1.attn.norm_k.weight"}
    with pytest.raises(RefineError, match=r"missing leaves: blocks/attn/norm_k/scale\[1\]"):
        to_tree(broken, keys_mmdit.TABLE, nn.meta.unbox(abstract_params(config)))


def test_every_parameter_names_its_axes():
    boxed = abstract_params(MMDiTConfig(**SIZES))
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    ):
        assert isinstance(leaf, nn.LogicallyPartitioned), path
        assert len(leaf.names) == leaf.value.ndim and all(leaf.names), (path, leaf.names)
        assert len(set(leaf.names)) == len(leaf.names), (path, leaf.names)
        assert (leaf.names[0] == "layers") == (path[0].key == "blocks")


def test_constraints_shard_under_rules_and_keep_the_numbers():
    _, config, params = pair(12)
    args = inputs(config, [(2, 4), (2, 2)], seed=12)
    expected = velocity(config, params, args, 8)
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = (("batch", "data"), ("act_heads", "model"), ("act_mlp", "model"))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        lowered = jax.jit(lambda p, a: MMDiT(config).apply({"params": p}, *a, target_length=8)).lower(params, args)
        assert "sharding_constraint" in lowered.as_text()
        assert relative_error(lowered.compile()(params, args), expected) <= 1e-6


def test_configuration_is_checked():
    published = dict(vars(VARIANTS["qwen-image"]), _class_name="QwenImageTransformer2DModel", pooled_projection_dim=768)
    published = {k: v for k, v in published.items() if k not in ("dtype", "param_dtype", "remat", "scan")}
    config = MMDiTConfig.from_dict({**published, "guidance_embeds": False}, dtype="bfloat16", remat="full")
    assert config == dataclasses.replace(VARIANTS["qwen-image"], dtype="bfloat16", remat="full")
    with pytest.raises(RefineError, match="use_layer3d_rope"):
        MMDiTConfig.from_dict({**published, "use_layer3d_rope": True})
    with pytest.raises(RefineError, match="axes_dims_rope"):
        MMDiTConfig(axes_dims_rope=(16, 56, 40))
    with pytest.raises(RefineError, match="remat 'most'"):
        MMDiTConfig(remat="most")
