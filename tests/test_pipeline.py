"""The whole path from pixels to pixels against diffusers' pipeline (rung 3), and what must not change a result."""

import dataclasses
import functools

import numpy as np
import pytest
from PIL import Image
from reference_pipeline import parts_of, released_refine, tiny_pipeline

from refine_jax import refine as program
from refine_jax.convert.diffusers_folder import from_tensors, model_config
from refine_jax.errors import RefineError
from refine_jax.prompts import load_tokenizer
from refine_jax.refine import Refiner

VAE_AREA, CONDITION_AREA = 64 * 64, 96 * 96


def scene(seed: int, width: int, height: int) -> np.ndarray:
    """A picture with smooth parts, edges and a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / rng.uniform(3, 20) + k) * np.cos(y / rng.uniform(3, 20)) for k in range(3)]
    picture = 128 + 90 * np.stack(waves, -1) + rng.normal(0, 8, (height, width, 3))
    picture[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return np.clip(picture, 0, 255).astype(np.uint8)


def scribble(seed: int, width: int, height: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """A ragged mask that touches all sides of `box`."""
    rng = np.random.default_rng(seed)
    x1, y1, x2, y2 = box
    mask = np.zeros((height, width), np.uint8)
    mask[y1:y2, x1:x2] = np.where(rng.random((y2 - y1, x2 - x1)) < 0.6, 255, 0)
    mask[y1, x1] = mask[y2 - 1, x2 - 1] = 255
    return mask


@functools.cache
def made(folder, zero_cond_t: bool):
    """(diffusers' pipeline, our Refiner) on the same random weights."""
    pipe = tiny_pipeline(folder, 20, zero_cond_t=zero_cond_t)
    configs, tensors = parts_of(pipe)
    model = model_config(configs, vae_area=VAE_AREA, condition_area=CONDITION_AREA)
    assert model.mmdit.zero_cond_t == zero_cond_t
    return pipe, Refiner(model, from_tensors(model, tensors), load_tokenizer(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def refiner(folder):
    return made(folder, True)[1]


def noise_for(refiner: Refiner, size: tuple[int, int], seed: int) -> np.ndarray:
    shape = (*refiner.model.latent_size(size), refiner.model.vae.z_dim)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# ------------------------------------------------------------------------------------------------------- rung 3: parity

# (picture w, h), box of the mask, reference (w, h), guidance, zero_cond_t, focus, size (h, w) at which it is made
CASES = {
    "square": ((150, 130), (60, 50, 90, 78), None, 1.0, True, True, (64, 64)),
    "square, reference": ((90, 120), (30, 50, 54, 75), (70, 60), 1.0, True, True, (64, 64)),
    "wide, portrait reference, guided": ((240, 110), (80, 40, 170, 60), (50, 110), 4.0, True, True, (32, 96)),
    "wide, whole picture": ((170, 64), (100, 20, 140, 50), None, 1.0, False, False, (32, 96)),
    "tall, guided": ((90, 200), (35, 60, 60, 130), None, 3.0, False, True, (96, 32)),
    "tall whole picture, reference, guided": ((60, 130), (10, 30, 40, 60), (96, 96), 2.5, False, False, (96, 32)),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_pipeline(folder, name):
    (width, height), box, other, scale, zero_cond_t, focus, size = CASES[name]
    pipe, refiner = made(folder, zero_cond_t)
    picture, mask = scene(1, width, height), scribble(2, width, height, box)
    reference = None if other is None else scene(3, *other)
    noise = noise_for(refiner, size, 4)
    negative = "blurred" if scale > 1 else None
    settings = dict(steps=2, true_cfg_scale=scale, negative_prompt=negative, noise=noise, focus=focus)
    theirs = released_refine(
        pipe,
        Image.fromarray(picture),
        Image.fromarray(mask),
        "Refine the text 'OPEN'",
        None if reference is None else Image.fromarray(reference),
        vae_area=VAE_AREA,
        condition_area=CONDITION_AREA,
        **settings,
    )
    ours = refiner.refine(picture, mask, "Refine the text 'OPEN'", reference, **settings)
    ours, theirs = np.asarray(ours, int), np.asarray(theirs, int)
    print("XX", name, np.abs(ours - theirs).max(), (ours != theirs).mean(), (theirs != picture).mean(), theirs[mask > 0].std(0))
    assert (theirs[mask > 0] != picture[mask > 0]).mean() > 0.9 and theirs[mask > 0].std() > 20, "something was made"
    assert np.abs(ours - theirs).max() <= 1
