"""The boundary band against Pillow's filters, and the weighted objective against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from refine_jax import flow, losses
from refine_jax.errors import RefineError

few = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
band_of = jax.jit(losses.boundary_band, static_argnames=("r_out", "r_in"))
loss_of = jax.jit(losses.boundary_weighted_loss)


def blobs(seed, size=(64, 96)):
    rng = np.random.default_rng(seed)
    mask = np.zeros(size, np.uint8)
    for _ in range(rng.integers(1, 4)):
        y, x = rng.integers(0, size[0]), rng.integers(0, size[1])
        mask[y : y + rng.integers(1, 50), x : x + rng.integers(1, 50)] = rng.integers(1, 256)
    return mask


@pytest.mark.parametrize("r_out, r_in", [(16, 16), (5, 2), (0, 3)])
@few
@given(seed=seeds)
def test_band_is_dilation_minus_erosion(r_out, r_in, seed):
    mask = blobs(seed)
    image = Image.fromarray((mask > 0).astype(np.uint8) * 255)
    grown = np.asarray(image.filter(ImageFilter.MaxFilter(2 * r_out + 1)), np.float32)
    shrunk = np.asarray(image.filter(ImageFilter.MinFilter(2 * r_in + 1)), np.float32)
    band = band_of(mask, r_out, r_in)
    assert band.dtype == jnp.float32
    np.testing.assert_array_equal(band, (grown - shrunk) / 255)


def test_band_of_nothing_and_of_everything_is_empty():
    for fill in (0, 1):
        assert not np.any(band_of(np.full((2, 40, 40), fill, np.uint8)))


def test_band_in_a_canvas_is_the_band_of_the_crop():
    mask = blobs(3)
    canvas = np.ones((80, 128), np.uint8)
    canvas[:64, :96] = mask
    got = np.asarray(band_of(canvas, 4, 4, np.array([0, 0, 96, 64], np.int32)))
    np.testing.assert_array_equal(got[:64, :96], band_of(mask, 4, 4))
    assert not np.any(got[64:]) and not np.any(got[:, 96:])


def test_latent_grid_methods():
    x = np.random.default_rng(0).random((2, 16, 24)).astype(np.float32)
    cells = x.reshape(2, 2, 8, 3, 8)
    np.testing.assert_allclose(losses.to_latent_grid(x, (2, 3)), cells.mean((2, 4)), rtol=1e-6)
    np.testing.assert_array_equal(losses.to_latent_grid(x, (2, 3), "max"), cells.max((2, 4)))
    import torch

    want = torch.nn.functional.interpolate(torch.from_numpy(x)[None], size=(2, 3), mode="nearest-exact")[0]
    np.testing.assert_array_equal(losses.to_latent_grid(x, (2, 3), "nearest"), want.numpy())
    np.testing.assert_array_equal(losses.to_latent_grid(x, (16, 24)), x)
    with pytest.raises(RefineError, match="16x24"):
        losses.to_latent_grid(x, (5, 3))
    with pytest.raises(RefineError, match="cubic"):
        losses.to_latent_grid(x, (2, 3), "cubic")


def sample(seed, b=3, h=4, w=6, c=5):
    rng = np.random.default_rng(seed)
    pred, target = rng.normal(size=(2, b, h, w, c)).astype(np.float32)
    band, region = rng.random((2, b, h, w)).astype(np.float32)
    return pred, target, band, region


@few
@given(seed=seeds, alpha=st.floats(0, 20))
def test_loss_equals_a_loop_and_packing_does_not_matter(seed, alpha):
    pred, target, band, region = sample(seed)
    total = 0.0
    for b, y, x in np.ndindex(band.shape):
        total += np.sum((pred[b, y, x].astype(np.float64) - target[b, y, x]) ** 2) * (1 + alpha * band[b, y, x])
    loss, parts = loss_of(pred, target, band, region, alpha=alpha)
    np.testing.assert_allclose(loss, total / band.size, rtol=1e-5)
    base = ((pred - target) ** 2).sum(-1)
    for name, weight in {"base": 1 + 0 * band, "band": band, "inside": region, "outside": 1 - region}.items():
        np.testing.assert_allclose(parts[name], (base * weight).sum() / weight.sum(), rtol=1e-5)
    packed_loss, packed_parts = loss_of(flow.pack_latents(pred), flow.pack_latents(target), band, region, alpha=alpha)
    np.testing.assert_allclose(packed_loss, loss, rtol=1e-5)
    for name, part in parts.items():
        np.testing.assert_allclose(packed_parts[name], part, rtol=1e-5)


def test_one_wrong_latent_pixel_is_weighted_by_its_own_place_in_the_band():
    """The weight follows the latent pixel through the packing, for every position."""
    target = np.zeros((1, 4, 6, 3), np.float32)
    band = np.random.default_rng(0).random((1, 4, 6)).astype(np.float32)

    def one(y, x):
        pred = target.at[0, y, x, 1].set(2.0)
        return losses.boundary_weighted_loss(flow.pack_latents(pred), flow.pack_latents(target), band)[0]

    target = jnp.asarray(target)
    y, x = np.mgrid[:4, :6]
    got = jax.vmap(one)(y.ravel(), x.ravel())
    np.testing.assert_allclose(got, (4 * losses.boundary_weight(band) / 24).ravel(), rtol=1e-6)


def test_weights_of_samples_and_empty_parts():
    pred, target, band, region = sample(0)
    keep = np.array([1, 0, 1], np.float32)
    pred[1] = 1e6
    loss, parts = loss_of(pred, target, band, region, sample_weight=keep)
    want, want_parts = loss_of(pred[::2], target[::2], band[::2], region[::2])
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for name in parts:
        np.testing.assert_allclose(parts[name], want_parts[name], rtol=1e-5)
    loss, parts = loss_of(pred, target, 0 * band, 0 * region)
    assert parts["band"] == 0 and parts["inside"] == 0 and np.isclose(loss, parts["base"])
    none, parts = loss_of(pred, target, band, region, sample_weight=0 * keep)
    assert none == 0 and all(v == 0 for v in parts.values())


def test_a_band_that_is_not_on_the_latent_grid_is_refused():
    pred, target, band, _ = sample(0)
    with pytest.raises(RefineError, match="band"):
        losses.boundary_weighted_loss(pred, target, band[:, :2])
    with pytest.raises(RefineError, match="band"):
        losses.boundary_weighted_loss(flow.pack_latents(pred), flow.pack_latents(target), band[:, :2])


def test_gradient_flows_only_through_the_prediction():
    pred, target, band, region = sample(1)
    grad = jax.grad(lambda p: losses.boundary_weighted_loss(p, target, band, region)[0])(pred)
    want = 2 * (pred - target) * (1 + 9 * band)[..., None] / band.size
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([jnp.uint8, jnp.float32]))
def test_label_loss_is_least_where_the_shares_are_told(seed, dtype):
    """Its least value is the shares' entropy; cells of nothing but background weigh a tenth; scale does not matter."""
    rng = np.random.default_rng(seed)
    shares = rng.multinomial(255, rng.dirichlet(np.ones(4), (2, 6))).astype(np.float64)
    shares[0, 0] = (255, 0, 0, 0)
    part = shares / 255
    logs = np.log(np.maximum(part, 1e-30))
    entropy, weight = -(part * logs).sum(-1), 1.1 - part[..., 0]
    least = losses.label_loss(jnp.asarray(logs, jnp.float32), jnp.asarray(shares, dtype))
    np.testing.assert_allclose(least, (entropy * weight).sum() / weight.sum(), rtol=1e-4)
    other = losses.label_loss(jnp.asarray(logs + rng.normal(size=logs.shape), jnp.float32), jnp.asarray(shares, dtype))
    assert other > least
    flat = losses.label_loss(jnp.zeros((1, 2, 4)), jnp.asarray([[[0, 0, 0, 0], [0, 1, 0, 0]]], dtype))
    np.testing.assert_allclose(flat, np.log(4) * 1.1 / 2.2, rtol=1e-5)
