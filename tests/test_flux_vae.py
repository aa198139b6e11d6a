"""The FLUX autoencoder against diffusers' `AutoencoderKL` on random weights under the names of the release."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from flax.linen import meta
from reference_utils import largest_error, meta_shapes, numpy_state, randn, randomise, relative_error

from refine_jax.convert import mapping
from refine_jax.convert.keys_flux_vae import FLUX_VAE_TABLE
from refine_jax.errors import RefineError
from refine_jax.models import flux_vae
from refine_jax.models.flux_vae import (
    FLUX_TILING,
    FluxVAE,
    FluxVAEConfig,
    Tiling,
    denormalize,
    normalize,
    tiled_decode,
    tiled_encode,
)

SMALL = FluxVAEConfig(ch=8, ch_mult=(1, 2, 4), num_res_blocks=1, z_channels=4, num_groups=4)
TINY = FluxVAEConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, num_groups=4)
RELEASED_DEPTH = FluxVAEConfig(ch=32)


def reference(config: FluxVAEConfig, sample_size: int = 1024) -> AutoencoderKL:
    """diffusers' network of these sizes; FLUX's has no quantisation convolutions."""
    levels = len(config.ch_mult)
    return AutoencoderKL(
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[config.ch * mult for mult in config.ch_mult],
        layers_per_block=config.num_res_blocks,
        latent_channels=config.z_channels,
        norm_num_groups=config.num_groups,
        sample_size=sample_size,
        scaling_factor=config.scale_factor,
        shift_factor=config.shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def released_name(key: str, levels: int) -> str:
    """diffusers' name of a tensor -> its name in `ae.safetensors`."""
    side, *parts, kind = key.split(".")
    match parts:
        case ["conv_in" | "conv_out" as end]:
            parts = [end]
        case ["conv_norm_out"]:
            parts = ["norm_out"]
        case ["mid_block", "resnets", index, layer]:
            parts = ["mid", f"block_{int(index) + 1}", layer]
        case ["mid_block", "attentions", "0", *layer]:
            names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
            parts = ["mid", "attn_1", names[".".join(layer)]]
        case ["down_blocks", level, "resnets", block, layer]:
            parts = ["down", level, "block", block, layer]
        case ["down_blocks", level, "downsamplers", "0", "conv"]:
            parts = ["down", level, "downsample", "conv"]
        case ["up_blocks", level, "resnets", block, layer]:
            parts = ["up", str(levels - 1 - int(level)), "block", block, layer]
        case ["up_blocks", level, "upsamplers", "0", "conv"]:
            parts = ["up", str(levels - 1 - int(level)), "upsample", "conv"]
        case _:
            raise AssertionError(key)
    return ".".join([side, *parts, kind]).replace("conv_shortcut", "nin_shortcut")


def released_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The release's attention projections are 1x1 convolutions."""
    return (*shape, 1, 1) if ".mid.attn_1." in key and len(shape) == 2 else shape


def released_state(model: AutoencoderKL, levels: int) -> dict[str, np.ndarray]:
    state = {released_name(key, levels): value for key, value in numpy_state(model).items()}
    return {key: value.reshape(released_shape(key, value.shape)) for key, value in state.items()}


def abstract(module, x) -> dict:
    return meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x))["params"]


def pair(config: FluxVAEConfig, seed: int, sample_size: int = 1024):
    """(reference, our network, our variables) with the same random weights."""
    ref = randomise(reference(config, sample_size), seed)
    vae = FluxVAE(config)
    state = released_state(ref, len(config.ch_mult))
    return ref, vae, {"params": mapping.to_tree(state, FLUX_VAE_TABLE, abstract(vae, jnp.zeros((1, 8, 8, 3))))}


def to_torch(x) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def to_numpy(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.detach().numpy(), 1, -1)


@functools.partial(jax.jit, static_argnums=0)
def encode(vae, variables, x):
    """Mean and log-variance side by side."""
    return jnp.concatenate(vae.apply(variables, x, method="encode"), -1)


@functools.partial(jax.jit, static_argnums=(0, 3))
def decode(vae, variables, z, clip=False):
    return vae.apply(variables, z, clip=clip, method="decode")


@pytest.fixture(scope="module")
def small():
    return pair(SMALL, 0)


@pytest.fixture(scope="module")
def tiny():
    return pair(TINY, 3, sample_size=32)


# --- rung 1: submodules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "ours, key, path",
    [
        (flux_vae.ResBlock(16, SMALL), "encoder.down_blocks.1.resnets.0", "encoder/down_1_block_0"),
        (flux_vae.ResBlock(16, SMALL), "decoder.up_blocks.1.resnets.1", "decoder/up_1_block_1"),
        (flux_vae.AttentionBlock(SMALL), "encoder.mid_block.attentions.0", "encoder/mid_attn_1"),
        (flux_vae.GroupNorm(SMALL), "decoder.conv_norm_out", "decoder/norm_out"),
        (
            flux_vae.Conv(16, SMALL, stride=2, padding=((0, 1), (0, 1))),
            "encoder.down_blocks.1.downsamplers.0",
            "encoder/down_1_downsample",
        ),
        (flux_vae.Conv(16, SMALL, upsample=True), "decoder.up_blocks.1.upsamplers.0", "decoder/up_1_upsample"),
    ],
    ids=["widen", "res", "attention", "norm", "down", "up"],
)
def test_submodules_equal_the_reference(small, ours, key, path, seed):
    ref, _, variables = small
    module = ref.get_submodule(key)
    params = variables["params"]
    for part in path.split("/"):
        params = params[part]
    width = next(leaf.shape[-2] if leaf.ndim > 1 else len(leaf) for leaf in jax.tree.leaves(params)[::-1])
    if path.endswith("block_0"):
        width //= 2
    # Off-centre, so that a norm that forgets its mean is seen.
    x = 2.0 * randn(seed + 10, 2, 6, 10, width) + 3.0
    with torch.no_grad():
        args = (to_torch(x), None) if ".resnets." in key else (to_torch(x),)
        expected = to_numpy(module(*args))
    assert relative_error(ours.apply({"params": params}, x), expected) <= 1e-5


# --- rung 2: the whole network ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, seed, height, width", [(SMALL, 0, 32, 48), (SMALL, 1, 40, 16), (RELEASED_DEPTH, 2, 16, 24)]
)
def test_moments_and_decoded_image_equal_the_reference(config, seed, height, width):
    ref, vae, variables = pair(config, seed)
    ratio = config.downsample
    assert ratio == 2 ** (len(ref.config.block_out_channels) - 1)
    x = np.random.default_rng(seed).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    z = 2.0 * randn(seed, 2, height // ratio, width // ratio, config.z_channels)
    with torch.no_grad():
        moments = ref.encode(to_torch(x)).latent_dist
        mean, logvar = to_numpy(moments.mean), to_numpy(moments.logvar)
        image = to_numpy(ref.decode(to_torch(z)).sample)
    ours = encode(vae, variables, x)
    assert ours.dtype == jnp.float32
    assert relative_error(ours[..., : config.z_channels], mean) <= 1e-5
    assert relative_error(ours[..., config.z_channels :], logvar) <= 1e-5
    assert np.abs(image).max() > 1  # so that clipping would be seen
    drawn = decode(vae, variables, z)
    assert drawn.dtype == jnp.float32 and relative_error(drawn, image) <= 1e-5


def test_neighbours_in_the_batch_do_not_matter(small):
    _, vae, variables = small
    x = np.random.default_rng(0).uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32)
    z = 2.0 * randn(0, 2, 8, 12, 4)
    together = encode(vae, variables, x), decode(vae, variables, z)
    for k in range(2):
        assert relative_error(encode(vae, variables, x[k : k + 1])[0], together[0][k]) <= 1e-5
        assert relative_error(decode(vae, variables, z[k : k + 1])[0], together[1][k]) <= 1e-5


def test_bfloat16_stays_near_float32(small):
    _, vae, variables = small
    half = FluxVAE(FluxVAEConfig(**{**vars(SMALL), "dtype": "bfloat16"}))
    x = np.random.default_rng(0).uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32)
    z = 2.0 * randn(0, 2, 8, 12, 4)
    for rounded, exact in [
        (encode(half, variables, x), encode(vae, variables, x)),
        (decode(half, variables, z), decode(vae, variables, z)),
    ]:
        assert rounded.dtype == jnp.float32
        assert 0 < relative_error(rounded, exact) <= 2e-2


def test_the_norm_keeps_its_precision_on_a_large_bright_image():
    # Far from zero, where a variance taken as E[x²] - E[x]² in float32 would be off by 1e-3.
    config = FluxVAEConfig(ch=4, num_groups=2)
    x = 100.0 + randn(0, 1, 512, 512, 4)
    params = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    grouped = x.astype(np.float64).reshape(1, -1, 2, 2)
    centred = grouped - grouped.mean((1, 3), keepdims=True)
    exact = centred / np.sqrt(np.square(centred).mean((1, 3), keepdims=True) + 1e-6)
    assert relative_error(flux_vae.GroupNorm(config).apply({"params": params}, x), exact.reshape(x.shape)) <= 1e-5


def test_attention_row_by_row_is_attention(monkeypatch):
    q, k, v = (jnp.asarray(randn(seed, 2, 6, 8, 16)) for seed in range(3))
    whole = flux_vae._over_pixels(q, k, v)
    monkeypatch.setattr(flux_vae, "_MAX_SCORES", 2 * 48 * 48 - 1)
    assert "scan" in str(jax.make_jaxpr(flux_vae._over_pixels)(q, k, v))
    assert relative_error(flux_vae._over_pixels(q, k, v), whole) <= 1e-6


def test_normalisation_is_the_releases():
    z = randn(0, 2, 3, 5, 16)
    expected = 0.3611 * (z - 0.1159)
    assert largest_error(normalize(jnp.asarray(z), FluxVAEConfig()), expected) <= 1e-6
    assert largest_error(denormalize(jnp.asarray(expected), FluxVAEConfig()), z) <= 1e-6


# --- tiling -------------------------------------------------------------------------------------------------------


def test_tiled_equals_diffusers_tiled(tiny):
    ref, vae, variables = tiny
    assert FLUX_TILING == Tiling(1024, 1024, 768, 768)
    tiling = Tiling(32, 32, 24, 24)  # the reference's own proportions at its sample_size of 32
    height, width = 56, 48  # the last row and column of tiles are cut
    x = np.random.default_rng(1).uniform(-1, 1, (1, height, width, 3)).astype(np.float32)
    z = 2.0 * randn(1, 1, height // 2, width // 2, 4)
    ref.enable_tiling()
    try:
        with torch.no_grad():
            moments = to_numpy(ref.encode(to_torch(x)).latent_dist.parameters)
            image = to_numpy(ref.decode(to_torch(z)).sample)
    finally:
        ref.disable_tiling()
    mean, logvar = jax.jit(lambda v, x: tiled_encode(vae, v, x, tiling))(variables, x)
    ours = jnp.concatenate([mean, logvar], -1)
    assert relative_error(ours, moments) <= 1e-4
    assert relative_error(encode(vae, variables, x), moments) > 1e-3  # tiles do differ from the whole
    drawn = jax.jit(lambda v, z: tiled_decode(vae, v, z, tiling, clip=False))(variables, z)
    assert relative_error(drawn, image) <= 1e-4
    # What fits into one tile goes whole.
    whole = jax.jit(lambda v, z: tiled_decode(vae, v, z, Tiling(80, 80, 60, 60), clip=True))(variables, z)
    assert relative_error(whole, jnp.clip(decode(vae, variables, z), -1, 1)) <= 1e-6


# --- accounting, size, errors -------------------------------------------------------------------------------------


def test_released_size_has_exactly_the_references_parameters():
    config = FluxVAEConfig()
    with torch.device("meta"):
        ref = reference(config)
    shapes = {released_name(key, 4): shape for key, shape in meta_shapes(ref).items()}
    shapes = {key: released_shape(key, shape) for key, shape in shapes.items()}
    assert len(shapes) == len(ref.state_dict()) == 244
    assert shapes["encoder.down.0.block.0.norm1.weight"] == (128,)
    assert shapes["decoder.up.3.upsample.conv.weight"] == (512, 512, 3, 3)
    tree = abstract(FluxVAE(config), jnp.zeros((1, 8, 8, 3)))
    mapping.assign(shapes, FLUX_VAE_TABLE, tree)
    assert mapping.reference_shapes(FLUX_VAE_TABLE, tree) == shapes
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
    assert count == sum(p.numel() for p in ref.parameters()) == 83_819_683


def test_round_trip_is_bit_equal_and_strict(small):
    ref, vae, variables = small
    state, back = released_state(ref, 3), mapping.to_reference(variables["params"], FLUX_VAE_TABLE)
    assert back.keys() == state.keys()
    for key, value in back.items():
        assert value.dtype == state[key].dtype
        np.testing.assert_array_equal(value, state[key])
    del state["decoder.up.2.upsample.conv.bias"]
    state["decoder.up.0.upsample.conv.bias"] = np.zeros(8, np.float32)
    state["quant_conv.weight"] = np.zeros((8, 8, 1, 1), np.float32)
    state["encoder.mid.attn_1.q.bias"] = np.zeros(31, np.float32)
    with pytest.raises(RefineError) as caught:
        mapping.to_tree(state, FLUX_VAE_TABLE, abstract(vae, jnp.zeros((1, 8, 8, 3))))
    for offender in ("decoder/up_2_upsample/bias", "decoder.up.0.upsample", "quant_conv.weight", "attn_1.q.bias [31]"):
        assert offender in str(caught.value)


def test_every_parameter_names_its_axes():
    boxed = jax.eval_shape(FluxVAE(SMALL).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    boxes = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata))
    for box in boxes:
        assert len(box.names) == box.value.ndim
        assert box.names[-1] in ("conv_out", "norm") and (box.value.ndim == 1 or box.names[-2] == "conv_in")


def test_gradients_are_finite_and_reach_every_parameter(tiny):
    _, vae, variables = tiny

    def loss(v, x):
        mean, logvar = vae.apply(v, x, method="encode")
        image = vae.apply(v, mean, method="decode")
        return jnp.mean(jnp.square(image - 0.5)) + jnp.mean(jnp.square(logvar))

    gradient = jax.jit(jax.grad(loss))
    silent = jax.tree.map(jnp.zeros_like, variables)  # every activation is zero: the norms' hard case
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(silent, jnp.zeros((1, 8, 8, 3)))))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(variables, randn(0, 1, 8, 8, 3))):
        assert np.isfinite(leaf).all() and np.any(leaf), path


def test_configurations_of_the_release_are_read():
    assert FluxVAEConfig.from_dict({"z_channels": 16, "downsample": 8}) == FluxVAEConfig()
    params = dict(resolution=256, in_channels=3, downsample=8, ch=128, out_ch=3, ch_mult=[1, 2, 4, 4])
    params |= dict(num_res_blocks=2, z_channels=16, scale_factor=0.3611, shift_factor=0.1159)
    assert FluxVAEConfig.from_dict(params) == FluxVAEConfig()
    assert FluxVAEConfig.from_dict(params, dtype="bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: FluxVAE(SMALL).apply({}, jnp.zeros((1, 30, 32, 3)), method="encode"), "30x32.*multiples of 4"),
        (lambda: FluxVAE(SMALL).apply({}, jnp.zeros((1, 32, 32, 4)), method="encode"), "width, 3"),
        (lambda: FluxVAE(SMALL).apply({}, jnp.zeros((1, 8, 8, 3)), method="decode"), "width, 4"),
        (lambda: tiled_encode(FluxVAE(SMALL), {}, jnp.zeros((1, 64, 30, 3))), "64x30"),
        (lambda: tiled_decode(FluxVAE(SMALL), {}, jnp.zeros((1, 8, 8, 4)), Tiling(30, 32, 24, 24)), "multiples of 4"),
        (lambda: FluxVAEConfig.from_dict({"block_out_channels": [1]}), "unknown fields block_out_channels"),
        (lambda: FluxVAEConfig.from_dict({"downsample": 16}), "downsample 16; .* make it 8"),
        (lambda: FluxVAEConfig(ch=48), "ch 48; make it a multiple of num_groups 32"),
        (lambda: FluxVAEConfig(z_channels=0), "z_channels 0"),
        (lambda: FluxVAEConfig(ch_mult=()), "ch_mult"),
        (lambda: FluxVAEConfig(scale_factor=0.0), "scale_factor 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(RefineError, match=message):
        call()
