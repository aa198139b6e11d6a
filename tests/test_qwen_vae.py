"""The Qwen-Image VAE against diffusers' `AutoencoderKLQwenImage` on random weights (one frame of video there)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import toy
from diffusers.models.autoencoders import autoencoder_kl_qwenimage as reference
from flax.linen import meta
from reference_utils import QUICK, difference, largest_error, meta_shapes, numpy_state, randn, randomise, relative_error

from refine_jax.convert import mapping
from refine_jax.convert.keys_vae import VAE_TABLE
from refine_jax.errors import RefineError
from refine_jax.model import decode_latents, encode_images
from refine_jax.models import qwen_vae
from refine_jax.models.qwen_vae import QwenVAE, Tiling, VAEConfig, denormalize, normalize, tiled_decode, tiled_encode

SMALL = dict(
    base_dim=16,
    z_dim=4,
    dim_mult=[1, 2, 4],
    num_res_blocks=1,
    temperal_downsample=[False, True],
    latents_mean=[0.1, -0.2, 0.3, 0.4],
    latents_std=[1.5, 0.5, 2.0, 3.0],
)
TINY = SMALL | dict(base_dim=8, dim_mult=[1, 2], temperal_downsample=[True])
BLOCK = VAEConfig.from_dict(SMALL)


def to_video(x: np.ndarray) -> torch.Tensor:
    """[B, H, W, C] -> [B, C, 1, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))[:, :, None]


def to_image(x: torch.Tensor) -> np.ndarray:
    """[B, C, 1, H, W] -> [B, H, W, C]."""
    return np.moveaxis(x.detach().numpy()[:, :, 0], 1, -1)


def abstract(module, x):
    return meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x))["params"]


def pair(config: dict, seed: int):
    """(reference model, our network, our variables) with the same random weights."""
    ref = randomise(reference.AutoencoderKLQwenImage(**config), seed)
    vae = QwenVAE(VAEConfig.from_dict(dict(ref.config)))
    shapes = abstract(vae, jnp.zeros((1, 8, 8, 3)))
    return ref, vae, {"params": mapping.to_tree(numpy_state(ref), VAE_TABLE, shapes)}


def jit(f, **options):
    """jax.jit that compiles in half the time: these programs run once."""
    return jax.jit(f, compiler_options=QUICK, **options)


def jitted(vae: QwenVAE):
    encode = jit(lambda variables, x: vae.apply(variables, x, method="encode"))
    decode = jit(lambda variables, z, clip: vae.apply(variables, z, clip, method="decode"), static_argnums=2)
    return encode, decode


@pytest.fixture(scope="module")
def small():
    ref, vae, variables = pair(SMALL, 0)
    return ref, vae, variables, *jitted(vae)


@pytest.fixture(scope="module")
def tiny():
    return pair(TINY, 3)


# --- rung 1: submodules -------------------------------------------------------------------------------------------

UP, DOWN = "decoder.up_blocks.0.upsamplers.0", "encoder.down_blocks.1"
RES = "encoder.down_blocks.0"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "make, ours, key, path",
    [
        (lambda: reference.QwenImageResidualBlock(16, 32), qwen_vae.ResBlock(32, BLOCK), RES, "encoder/down_blocks_0"),
        (lambda: reference.QwenImageResidualBlock(16, 16), qwen_vae.ResBlock(16, BLOCK), RES, "encoder/down_blocks_0"),
        (lambda: reference.QwenImageAttentionBlock(16), qwen_vae.AttentionBlock(BLOCK), RES, "encoder/down_blocks_0"),
        (
            lambda: reference.QwenImageMidBlock(16),
            qwen_vae.MidBlock(16, BLOCK),
            "decoder.mid_block",
            "decoder/mid_block",
        ),
        (
            lambda: reference.QwenImageRMS_norm(16, images=False),
            qwen_vae.ChannelNorm(BLOCK),
            "decoder.norm_out",
            "decoder/norm_out",
        ),
        *[
            (
                lambda mode=mode: reference.QwenImageResample(16, mode),
                qwen_vae.Conv(16, BLOCK, stride=2, padding=((0, 1), (0, 1))),
                DOWN,
                "encoder/down_blocks_1",
            )
            for mode in ("downsample2d", "downsample3d")
        ],
        *[
            (
                lambda mode=mode: reference.QwenImageResample(16, mode),
                qwen_vae.Conv(8, BLOCK, upsample=True),
                UP,
                "decoder/up_blocks_0_upsample",
            )
            for mode in ("upsample2d", "upsample3d")
        ],
    ],
    ids=["res-widen", "res", "attention", "mid", "norm", "down2d", "down3d", "up2d", "up3d"],
)
def test_submodules_equal_the_reference(make, ours, key, path, seed):
    ref = randomise(make(), seed)
    x = 2.0 * randn(seed + 10, 2, 6, 10, 16)
    tree = abstract(ours, x)
    for part in reversed(path.split("/")):
        tree = {part: tree}
    state = {f"{key}.{name}": value for name, value in numpy_state(ref).items()}
    params = mapping.to_tree(state, VAE_TABLE, tree)
    for part in path.split("/"):
        params = params[part]
    with torch.no_grad():
        expected = to_image(ref(to_video(x)))
    assert difference(ours.apply({"params": params}, x), expected) <= 1e-5


# --- rung 2: the whole network ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed, height, width", [(0, 32, 48), (1, 40, 16), (2, 32, 48)])
def test_moments_and_decoded_image_equal_the_reference(small, seed, height, width):
    ref, vae, variables, encode, decode = small
    if seed:
        ref, _, variables = pair(SMALL, seed)
    x = np.random.default_rng(seed).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    z = 2.0 * randn(seed, 2, height // 4, width // 4, 4)
    with torch.no_grad():
        moments = to_image(ref.encode(to_video(x)).latent_dist.parameters)
        clipped = to_image(ref.decode(to_video(z)).sample)
        image = to_image(ref.decoder(ref.post_quant_conv(to_video(z))))
    mean, logvar = encode(variables, x)
    assert mean.shape == logvar.shape == (2, height // 4, width // 4, 4) and mean.dtype == jnp.float32
    assert difference(jnp.concatenate([mean, logvar], -1), moments) <= 1e-4
    assert difference(decode(variables, z, False), image) <= 1e-4
    assert np.abs(image).max() > 1  # so that clipping is seen
    assert difference(decode(variables, z, True), clipped) <= 1e-4


def test_attention_in_the_encoder_equals_the_reference():
    # The reference's own `encode` cannot run this case (its attention takes no frame cache): go by its parts.
    ref, vae, variables = pair(TINY | dict(attn_scales=[1.0, 0.5]), 5)
    x = randn(5, 1, 8, 12, 3)
    with torch.no_grad():
        moments = to_image(ref.quant_conv(ref.encoder(to_video(x))))
    assert difference(jnp.concatenate(jitted(vae)[0](variables, x), -1), moments) <= 1e-4


def test_published_depth_equals_the_reference():
    config = dict(base_dim=8, z_dim=16)
    ref, vae, variables = pair(config, 6)
    encode, decode = jitted(vae)
    x = np.random.default_rng(6).uniform(-1, 1, (1, 16, 24, 3)).astype(np.float32)
    with torch.no_grad():
        moments = to_image(ref.encode(to_video(x)).latent_dist.parameters)
        image = to_image(ref.decode(to_video(moments[..., :16])).sample)
    mean, logvar = encode(variables, x)
    assert difference(jnp.concatenate([mean, logvar], -1), moments) <= 1e-4
    assert difference(decode(variables, mean, True), image) <= 1e-4


def test_normalisation_is_the_pipelines():
    z = randn(0, 2, 3, 5, 4)
    mean, std = np.float32(SMALL["latents_mean"]), np.float32(SMALL["latents_std"])
    assert largest_error(normalize(jnp.asarray(z), BLOCK), (z - mean) / std) <= 1e-6
    assert largest_error(denormalize(normalize(jnp.asarray(z), BLOCK), BLOCK), z) <= 1e-6


def test_bfloat16_stays_near_float32(small):
    _, vae, variables, encode, decode = small
    half = QwenVAE(VAEConfig.from_dict(SMALL, dtype="bfloat16"))
    half_encode, half_decode = jitted(half)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32)
    z = 2.0 * randn(0, 2, 8, 12, 4)
    exact, rounded = (jnp.concatenate(f(variables, x), -1) for f in (encode, half_encode))
    assert rounded.dtype == jnp.float32
    assert 0 < relative_error(rounded, exact) <= 2e-2
    assert 0 < relative_error(half_decode(variables, z, False), decode(variables, z, False)) <= 2e-2


# --- tiling -------------------------------------------------------------------------------------------------------

TILINGS = [
    (Tiling(32, 32, 24, 24), 56, 66),  # the last row and the last column are cut
    (Tiling(24, 32, 16, 24), 16, 50),  # lower than a tile; a last column of one latent pixel
    (Tiling(16, 16, 16, 16), 32, 20),  # no overlap
    (Tiling(32, 32, 24, 24), 32, 28),  # fits in one tile: goes whole
]


@pytest.mark.parametrize("tiling, height, width", TILINGS)
def test_tiled_equals_the_references_tiled(tiny, tiling, height, width):
    ref, vae, variables = tiny
    ref.enable_tiling(tiling.height, tiling.width, tiling.stride_height, tiling.stride_width)
    whole = height <= tiling.height and width <= tiling.width
    x = np.random.default_rng(1).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    z = 2.0 * randn(1, 2, height // 2, width // 2, 4)
    with torch.no_grad():
        moments = to_image(ref.encode(to_video(x)).latent_dist.parameters)
        image = to_image(ref.decode(to_video(z)).sample)
    ref.use_tiling = False
    mean, logvar = jit(lambda v, x: tiled_encode(vae, v, x, tiling))(variables, x)
    assert difference(jnp.concatenate([mean, logvar], -1), moments) <= 1e-4
    # The reference clips whole images only.
    assert difference(jit(lambda v, z: tiled_decode(vae, v, z, tiling, clip=whole))(variables, z), image) <= 1e-4


class Position(torch.nn.Module):
    """Stands for the decoder: doubles the sides and adds what depends on the place within the tile and on its size."""

    def forward(self, x, **cache):
        x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
        rows, columns = (torch.arange(float(side)) for side in x.shape[-2:])
        return x + 0.1 * rows[:, None] - 0.2 * columns + 0.01 * x.shape[-1]


@pytest.mark.parametrize("seed", range(6))
def test_blending_equals_the_references_at_any_overlap(tiny, seed):
    rng = np.random.default_rng(seed)
    tile = rng.integers(2, 9, 2)
    # Strides below half a tile too: there a pixel is blended more than once.
    stride = rng.integers(1, tile + 1)
    height, width = rng.integers(1, 20, 2)
    z = randn(seed, 1, height, width, 4)
    ref = tiny[0]
    kept, ref.decoder, ref.post_quant_conv = (ref.decoder, ref.post_quant_conv), Position(), torch.nn.Identity()
    try:
        ref.enable_tiling(*(2 * int(n) for n in (*tile, *stride)))
        expected = to_image(ref.tiled_decode(to_video(z)).sample)
    finally:
        ref.decoder, ref.post_quant_conv = kept
        ref.use_tiling = False

    def run(x):
        x = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
        rows, columns = (jnp.arange(side, dtype=jnp.float32) for side in x.shape[1:3])
        return x + (0.1 * rows[:, None] - 0.2 * columns + 0.01 * x.shape[2])[..., None]

    source = [(int(t), int(s)) for t, s in zip(tile, stride)]
    target = [(2 * t, 2 * s) for t, s in source]
    assert relative_error(jit(lambda z: qwen_vae._tiled(run, z, source, target))(z), expected) <= 1e-6


def test_the_number_of_traced_networks_does_not_grow_with_the_image(tiny):
    _, vae, variables = tiny

    def networks(height: int, width: int) -> int:
        z = jax.ShapeDtypeStruct((1, height, width, 4), jnp.float32)
        text = str(jax.make_jaxpr(lambda v, z: tiled_decode(vae, v, z, Tiling(32, 32, 24, 24)))(variables, z))
        return text.count("conv_general_dilated")

    assert networks(12 * 5 + 4, 12 * 5 + 4) == networks(12 * 40 + 4, 12 * 40 + 4)


# --- accounting, size, errors -------------------------------------------------------------------------------------


def test_published_size_has_exactly_the_references_parameters():
    with torch.device("meta"):
        ref = reference.AutoencoderKLQwenImage()
    shapes = meta_shapes(ref)
    config = VAEConfig.from_dict(dict(ref.config))
    assert config == VAEConfig() and config.spatial_ratio == ref.spatial_compression_ratio == 8
    tree = abstract(QwenVAE(config), jnp.zeros((1, 8, 8, 3)))
    mapping.assign(shapes, VAE_TABLE, tree)
    used = {key: shape for key, shape in shapes.items() if ".time_conv." not in key}
    assert mapping.reference_shapes(VAE_TABLE, tree) == used
    assert len(shapes) - len(used) == 8  # two temporal down- and two upsamplers, weight and bias
    past = sum(int(np.prod(shape)) * 2 // 3 for shape in used.values() if len(shape) == 5 and shape[2] == 3)
    ours = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
    assert ours + past == sum(int(np.prod(shape)) for shape in used.values())
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 126_892_531


def test_back_to_the_reference_keeps_every_number_that_acts(small):
    ref, _, variables, *_ = small
    state, back = numpy_state(ref), mapping.to_reference(variables["params"], VAE_TABLE)
    for key, value in back.items():
        frames = value.shape[2] if value.ndim == 5 else 1
        assert value.shape == state[key].shape
        if frames == 3:
            assert not value[:, :, :2].any()
            np.testing.assert_array_equal(value[:, :, 2], state[key][:, :, 2])
        else:
            np.testing.assert_array_equal(value, state[key])


def test_every_parameter_names_its_axes():
    boxed = jax.eval_shape(QwenVAE(BLOCK).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    boxes = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata))
    for box in boxes:
        assert len(box.names) == box.value.ndim
        assert box.names[-1] in ("conv_out", "norm") and (box.value.ndim == 1 or box.names[-2] == "conv_in")


def test_gradients_are_finite_and_reach_every_parameter(tiny):
    _, vae, variables = tiny

    def loss(v, x):
        mean, logvar = vae.apply(v, x, method="encode")
        image = vae.apply(v, mean, clip=False, method="decode")
        return jnp.mean(jnp.square(image - 0.5)) + jnp.mean(jnp.square(logvar))

    gradient = jit(jax.grad(loss))
    silent = jax.tree.map(jnp.zeros_like, variables)  # every activation is zero: the norms' hard case
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(silent, jnp.zeros((1, 8, 8, 3)))))
    for leaf in jax.tree.leaves(gradient(variables, randn(0, 1, 8, 8, 3))):
        assert np.isfinite(leaf).all() and np.any(leaf)


def test_attention_in_chunks_is_attention(monkeypatch):
    q, k, v = (jnp.asarray(randn(seed, 2, 48, 1, 16)) for seed in range(3))
    whole = qwen_vae._chunked_attention(q, k, v)
    monkeypatch.setattr(qwen_vae, "_MAX_SCORES", 2 * 48 * 5)
    assert "scan" in str(jax.make_jaxpr(qwen_vae._chunked_attention)(q, k, v))
    assert relative_error(qwen_vae._chunked_attention(q, k, v), whole) <= 1e-6


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: QwenVAE(BLOCK).apply({}, jnp.zeros((1, 30, 32, 3)), method="encode"), "30x32.*multiples of 4"),
        (lambda: QwenVAE(BLOCK).apply({}, jnp.zeros((1, 32, 32, 4)), method="encode"), "width, 3"),
        (lambda: QwenVAE(BLOCK).apply({}, jnp.zeros((1, 8, 8, 3)), method="decode"), "width, 4"),
        (lambda: tiled_encode(QwenVAE(BLOCK), {}, jnp.zeros((1, 64, 30, 3))), "64x30"),
        (lambda: tiled_decode(QwenVAE(BLOCK), {}, jnp.zeros((1, 8, 8, 4)), Tiling(30, 32, 24, 24)), "multiples of 4"),
        (lambda: tiled_decode(QwenVAE(BLOCK), {}, jnp.zeros((1, 8, 8, 4)), Tiling(32, 32, 36, 24)), "stride 36"),
        (lambda: VAEConfig.from_dict({"_class_name": "X", "latent_channels": 4}), "latent_channels"),
        (lambda: VAEConfig(latents_mean=(0.0,)), "latents_mean has 1"),
        (lambda: VAEConfig(dim_mult=(1, 2, 4)), "temperal_downsample has 3"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(RefineError, match=message):
        call()


def test_a_picture_has_the_same_bits_wherever_it_stands_in_a_batch():
    """Of channels and sizes for which a CPU's convolution rounds the last pixels of a batch in its own way."""
    vae = dataclasses.replace(toy.model_config().vae, base_dim=16, dim_mult=(1, 1), temperal_downsample=(False,))
    model = dataclasses.replace(toy.model_config(), vae=vae)
    weights = {"vae": QwenVAE(vae).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]}
    weights = meta.unbox(weights)
    picture = np.random.default_rng(0).uniform(0, 255, (1, 64, 64, 3)).astype(np.float32)

    @jax.jit
    def there_and_back(weights, pictures):
        [latents] = encode_images(model, weights, [pictures])
        return latents, decode_latents(model, weights, latents)

    for found in there_and_back(weights, np.repeat(picture, 8, axis=0)):
        np.testing.assert_array_equal(found, np.repeat(found[:1], 8, axis=0))
