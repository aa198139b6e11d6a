"""What an objective starts from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax.linen import meta

from refine_jax import alignment, objectives
from refine_jax.data import synth
from refine_jax.errors import RefineError
from refine_jax.models.layers import apply_rotary, rotary_angles
from refine_jax.models.mmdit import MMDiT, MMDiTConfig, image_positions
from refine_jax.objectives import aligned_heads

CONFIG = dict(num_layers=1, attention_head_dim=64, num_attention_heads=3, joint_attention_dim=8, scan=False)
GRID = (4, 12)


def _boxed(config: MMDiTConfig):
    n = GRID[0] * GRID[1]
    positions = jnp.zeros((1, n, 3), jnp.int32)
    text = jnp.zeros((1, 2, 8))
    inputs = (jnp.zeros((1, n, 64)), text, jnp.ones(1), positions, positions[:, :2, 0])
    return MMDiT(config).init(jax.random.key(0), *inputs, target_length=n)["params"]


def test_aligned_heads_look_at_the_same_place_of_their_frame():
    config = MMDiTConfig(axes_dims_rope=(8, 28, 28), **CONFIG)
    before = _boxed(config)
    block = meta.unbox(aligned_heads(before, config, (1, 2)))["blocks_0"]["attn"]
    n = GRID[0] * GRID[1]
    x = np.random.default_rng(0).standard_normal((3 * n, config.width)).astype(np.float32)
    cos, sin = rotary_angles(jnp.asarray(image_positions([GRID] * 3)), config.axes_dims_rope)

    def heads(kind: str) -> jax.Array:
        y = (x @ block[f"to_{kind}"]["kernel"] + block[f"to_{kind}"]["bias"]).reshape(1, 3 * n, 3, 64)
        y = y / jnp.sqrt(jnp.mean(y**2, -1, keepdims=True) + 1e-6) * block[f"norm_{kind}"]["scale"]
        return apply_rotary(y, cos, sin, interleaved=True)

    scores = jnp.einsum("bthd,bshd->hts", heads("q"), heads("k")) / 8.0
    weights = np.asarray(jax.nn.softmax(scores, axis=-1))[:, :n]
    for head, frame in enumerate((1, 2)):
        np.testing.assert_array_equal(weights[head].argmax(-1), np.arange(n) + frame * n)
        assert np.median(weights[head].max(-1)) > 0.5
    untouched = meta.unbox(before)["blocks_0"]["attn"]["to_q"]["kernel"][:, 128:]
    np.testing.assert_array_equal(block["to_q"]["kernel"][:, 128:], untouched)
    assert not np.any(weights[2].argmax(-1) == np.arange(n) + n) or np.median(weights[2].max(-1)) < 0.5


def test_aligned_heads_refuse_what_they_cannot_align():
    small = MMDiTConfig(axes_dims_rope=(60, 2, 2), **CONFIG)
    with pytest.raises(RefineError, match="axes_dims_rope"):
        aligned_heads({}, small, (1,))
    config = MMDiTConfig(axes_dims_rope=(8, 28, 28), **{**CONFIG, "scan": True})
    with pytest.raises(RefineError, match="scan"):
        aligned_heads({}, config, (1,))
    with pytest.raises(RefineError, match="aligned_heads"):
        aligned_heads({}, MMDiTConfig(axes_dims_rope=(8, 28, 28), **CONFIG), (1, 2, 3, 4))


def test_words_in_photographs_can_be_told_letter_by_letter():
    """`config.alignment` of synthetic pairs: labels come with the batches, and each token is read by its own cells."""
    config = toy.refine_config("")
    config.alignment = dict(block=1, weight=0.5)
    config.data.update(dict(buckets=((32, 96),), reference_share=0.0))
    objective = objectives.make(config, toy.model_config(scan=False))
    batch_shape = objective.batch_shapes()[0]
    assert batch_shape["labels"].shape == (2, 8, 24, synth.LABELS)
    new = objective.init(jax.random.key(0))[alignment.NAME]

    side = 32 // 4  # a token's side is that of two cells or of one
    cells = toy.model_config().vae.spatial_ratio * toy.model_config().mmdit.patch_size // 4
    rows, columns = side // cells, 24 // cells
    assert new["kernel"].shape == (toy.model_config().mmdit.width, cells**2 * synth.LABELS)
    labels = np.zeros((1, 8, 24, synth.LABELS), np.uint8)
    kinds = np.random.default_rng(0).integers(0, synth.LABELS, (8, 24))
    np.put_along_axis(labels[0], kinds[..., None], 255, -1)
    # Features that name their token: a layer that knows the map by heart makes no error, one of another map does.
    features = np.eye(rows * columns, dtype=np.float32)[None]
    normed = features - features.mean(-1, keepdims=True)
    normed /= np.sqrt(np.square(normed).mean(-1, keepdims=True) + 1e-6)
    wanted = labels.reshape(rows, cells, columns, cells, -1).swapaxes(1, 2).reshape(rows * columns, -1) / 255.0
    bias = 100.0 * wanted.mean(0)
    head = {"kernel": np.linalg.pinv(normed[0]) @ (100.0 * wanted - bias), "bias": bias}
    error = lambda which: alignment.label_error(features, head, which, rows)
    assert error(labels) < 0.05 < 10 < error(labels[:, :, ::-1])
