"""What the backbone is shown: views of a picture against Pillow, and where the condition images' tokens stand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from refine_jax import conditioning, flow
from refine_jax.models.mmdit import image_positions, text_start


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_pixels_survive_the_way_to_the_vae_and_back():
    pixels = np.arange(256, dtype=np.uint8)
    signed = conditioning.to_signed(pixels)
    assert signed.dtype == jnp.float32 and float(signed.min()) == -1.0 and float(signed.max()) == 1.0
    np.testing.assert_array_equal(conditioning.to_pixels(signed), pixels)
    np.testing.assert_array_equal(conditioning.to_pixels(jnp.array([-7.0, 7.0])), [0, 255])


@pytest.mark.parametrize("box", [None, (5, 3, 41, 31)])
def test_a_view_is_pillows(box):
    """Lanczos of the cropped picture, then bicubic, each rounded to 8 bits: equal to Pillow but for ±1 in 255."""
    pixels = noise(0, 40, 56, 3)
    view = conditioning.view(pixels, None if box is None else jnp.array(box), ((24, 32), (28, 28)))
    image = Image.fromarray(pixels) if box is None else Image.fromarray(pixels).crop(box)
    image = image.resize((32, 24), Image.Resampling.LANCZOS).resize((28, 28), Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(view) - np.asarray(image, np.float32))
    assert view.shape == (28, 28, 3) and view.dtype == jnp.float32
    assert (np.asarray(view) == np.round(view)).all() and difference.max() <= 1 and difference.mean() < 0.02


def test_a_second_size_that_is_the_first_changes_nothing():
    pixels = noise(1, 30, 30, 3)
    once = conditioning.view(pixels, None, ((16, 16),))
    np.testing.assert_array_equal(conditioning.view(pixels, None, ((16, 16), (16, 16))), once)


GRIDS = [(4, 6), (6, 4), (4, 4)]  # in tokens


def latents(seed: int, batch: int = 2) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((batch, 2 * h, 2 * w, 3), dtype=np.float32) for h, w in GRIDS]


def test_all_images_present_is_the_reference_layout():
    target = (8, 12)
    images = latents(2)
    tokens = conditioning.image_tokens((2, *target, 3), images, [None, np.array([True, True]), None])
    expected = image_positions([(4, 6), *GRIDS])
    for row in range(2):
        np.testing.assert_array_equal(tokens.positions[row], expected)
    assert tokens.mask.all() and tokens.mask.shape == tokens.positions.shape[:2]
    np.testing.assert_array_equal(tokens.text_start, [text_start([(4, 6), *GRIDS])] * 2)
    np.testing.assert_array_equal(tokens.tokens, np.concatenate([flow.pack_latents(x) for x in images], 1))
    positions = conditioning.text_positions(tokens.text_start, 5)
    np.testing.assert_array_equal(positions, [np.arange(5) + 3] * 2)


def test_an_absent_image_leaves_no_trace():
    """Masked out, its slot changes neither the others' frames nor where the text starts, row by row."""
    target = (4, 4)
    big = [(2, 2), (10, 2), (2, 4)]
    images = [np.ones((2, 2 * h, 2 * w, 3), np.float32) for h, w in big]
    made = jax.jit(
        lambda here: conditioning.image_tokens((2, *target, 3), [jnp.asarray(x) for x in images], [None, here, None])
    )(jnp.array([True, False]))
    hole = slice(4 + 4, 4 + 4 + 20)
    np.testing.assert_array_equal(made.positions[0], image_positions([(2, 2), *big]))
    kept = np.asarray(made.mask[1])
    assert not kept[hole].any() and kept.sum() == len(kept) - 20 and made.mask[0].all()
    np.testing.assert_array_equal(made.positions[1][kept], image_positions([(2, 2), big[0], big[2]]))
    np.testing.assert_array_equal(made.text_start, [text_start([(2, 2), *big]), text_start([(2, 2), big[0], big[2]])])


def test_no_image_at_all():
    """Only the target stands in the image stream; the text starts where the target's half-side ends."""
    tokens = conditioning.image_tokens((2, 8, 12, 3), [], [])
    assert tokens.tokens.shape == (2, 0, 12) and tokens.mask.shape == (2, 24) and tokens.mask.all()
    np.testing.assert_array_equal(tokens.positions, [image_positions([(4, 6)])] * 2)
    np.testing.assert_array_equal(tokens.text_start, [text_start([(4, 6)])] * 2)
