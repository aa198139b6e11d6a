"""The whole path from pixels to pixels against diffusers' pipeline (rung 3), and what must not change a result."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from reference_pipeline import parts_of, released_refine, tiny_pipeline

from refine_jax import focus
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


# Compiling is most of the time here, and the arithmetic is the same at any level.
quick = jax.jit(
    program.refine_program.__wrapped__,
    static_argnames=("model", "spec"),
    compiler_options={"xla_backend_optimization_level": 0},
)


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """What the program was given and returned, call by call."""
    seen = []

    def record(variables, lora, inputs, **static):
        seen.append((inputs, static, quick(variables, lora, inputs, **static)))
        return seen[-1][-1]

    monkeypatch.setattr(program, "refine_program", record)
    return seen


def noise_for(refiner: Refiner, size: tuple[int, int], seed: int) -> np.ndarray:
    shape = (*refiner.model.latent_size(size), refiner.model.vae.z_dim)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# ------------------------------------------------------------------------------------------------------- rung 3: parity

SHORT, LONG = "Refine the text 'OPEN'", "Refine the text 'OPEN': " + 12 * "white letters, "
SQUARE = dict(image=scene(1, 150, 130), mask_or_box=scribble(2, 150, 130, (60, 50, 90, 78)), prompt=SHORT)
SQUARE_WITH_REFERENCE = dict(
    image=scene(5, 300, 280),
    mask_or_box=scribble(6, 300, 280, (100, 90, 170, 168)),
    prompt=LONG,
    reference=scene(7, 70, 60),
)

# request, (true CFG, negative prompt), zero_cond_t, focus, size (h, w) at which it is made
CASES = {
    "square": (SQUARE, (1.0, None), True, True, (64, 64)),
    "square, reference, long prompt": (SQUARE_WITH_REFERENCE, (1.0, None), True, True, (64, 64)),
    "wide, portrait reference, guided": (
        dict(
            image=scene(8, 240, 110),
            mask_or_box=scribble(9, 240, 110, (80, 40, 170, 60)),
            prompt="Refine the LOGO.",
            reference=scene(10, 50, 110),
        ),
        (4.0, "blurred"),
        True,
        True,
        (32, 96),
    ),
    "wide, whole picture": (
        dict(image=scene(11, 170, 64), mask_or_box=scribble(12, 170, 64, (100, 20, 140, 50)), prompt="é 中文"),
        (1.0, None),
        False,
        False,
        (32, 96),
    ),
    "tall, guided": (
        dict(image=scene(13, 90, 200), mask_or_box=scribble(14, 90, 200, (35, 60, 60, 130)), prompt=SHORT),
        (3.0, " "),
        False,
        True,
        (96, 32),
    ),
    "tall, whole picture, reference, guided": (
        dict(
            image=scene(15, 60, 130),
            mask_or_box=scribble(16, 60, 130, (10, 30, 40, 60)),
            prompt=SHORT,
            reference=scene(17, 96, 96),
        ),
        (2.5, " "),
        False,
        False,
        (96, 32),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_pipeline(folder, name):
    request, (scale, negative), zero_cond_t, focus, size = CASES[name]
    pipe, refiner = made(folder, zero_cond_t)
    noise = noise_for(refiner, size, 4)
    settings = dict(steps=2, true_cfg_scale=scale, negative_prompt=negative, noise=noise, focus=focus)
    picture, mask, reference = request["image"], request["mask_or_box"], request.get("reference")
    theirs = released_refine(
        pipe,
        Image.fromarray(picture),
        Image.fromarray(mask),
        request["prompt"],
        None if reference is None else Image.fromarray(reference),
        vae_area=VAE_AREA,
        condition_area=CONDITION_AREA,
        **settings,
    )
    ours = refiner.refine(**request, **settings)
    ours, theirs = np.asarray(ours, int), np.asarray(theirs, int)
    made_of = theirs[mask > 0]
    assert (made_of != picture[mask > 0]).mean() > 0.9 and made_of.std() > 20, "something was made"
    assert np.abs(ours - theirs).max() <= 1


# ---------------------------------------------------------------------------------------- what must not change a result


def worst(a, b) -> int:
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def test_neighbours_padding_and_canvas_change_nothing(refiner, calls):
    """Alone, and in a batch of larger pictures, longer prompts, references, several regions and empty rows."""
    noises = [noise_for(refiner, (64, 64), seed) for seed in (4, 40, 41)]
    second = scribble(3, 150, 130, (70, 60, 100, 88))
    alone = [
        dict(SQUARE, noise=noises[0]),
        dict(SQUARE, mask_or_box=second, prompt="the second", noise=noises[1]),
        dict(SQUARE_WITH_REFERENCE, noise=noises[2]),
    ]
    two = dict(
        SQUARE,
        mask_or_box=[SQUARE["mask_or_box"], second],
        prompt=[SHORT, "the second"],
        noise=noises[:2],
    )
    common = dict(steps=2, true_cfg_scale=1.0)
    results = [refiner.refine(**request, **common) for request in alone]
    single = [out for _, _, out in calls]
    together = refiner.refine_batch([{**two, **common}, {**alone[2], **common}])

    inputs, static, out = calls[3]
    assert inputs["mask"].shape[0] == 4 and not inputs["mask"][3].any(), "one row is padding"
    assert inputs["mask"].shape[1:] != calls[0][0]["mask"].shape[1:], "the canvas is another one"
    assert inputs["prompt"]["ids"].shape[1] > calls[0][0]["prompt"]["ids"].shape[1], "and the text bucket"
    assert inputs["has_reference"].tolist()[:3] == [False, False, True] and calls[0][1]["spec"].reference is None
    for row in range(3):
        np.testing.assert_array_equal(inputs["noise"][row], noises[row])
        ours, theirs = np.asarray(out.latents[row]), np.asarray(single[row].latents[0])
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)
        assert worst(out.crops[row], single[row].crops[0]) <= 1
    assert worst(together[1], results[2]) <= 1

    # Overlapping regions: each is made from the picture as given; the second is pasted over the first.
    expected = SQUARE["image"]
    for k, request in enumerate(alone[:2]):
        box = refiner._focus(request["mask_or_box"], (150, 130), refiner.model.margin)
        expected = np.asarray(focus.paste_back(expected, single[k].crops[0], box, request["mask_or_box"]))
    assert worst(together[0], expected) <= 1
    assert worst(together[0], results[0]) > 20 and worst(together[0], results[1]) > 20


def test_seeds_and_noise(refiner, calls):
    common = dict(SQUARE, steps=2, true_cfg_scale=1.0)
    first, again, other = (refiner.refine(**common, seed=seed) for seed in (7, 7, 8))
    assert worst(first, again) == 0
    assert worst(first, other) > 20
    drawn = np.asarray(calls[0][0]["noise"])[0]
    assert drawn.shape == (*refiner.model.latent_size((64, 64)), 4) and abs(drawn.std() - 1) < 0.1
    assert worst(first, refiner.refine(**common, seed=99, noise=drawn)) == 0
    # Guidance at 1 is off, so a negative prompt has no say.
    assert worst(first, refiner.refine(**common, seed=7, negative_prompt="anything")) == 0
    # Regions of one call have noise of their own.
    keys = [np.asarray(refiner._noise((64, 64), 7, order, None)) for order in (0, 1)]
    np.testing.assert_array_equal(keys[0], drawn)
    assert abs(np.corrcoef(keys[0].ravel(), keys[1].ravel())[0, 1]) < 0.1


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32 - 1), marked=st.sampled_from([0.001, 0.02, 0.5, 1.0]), data=st.data())
def test_background_keeps_its_bits(refiner, calls, seed, marked, data):
    """Through the whole program: any picture, mask and crop in one canvas."""
    if not calls:
        refiner.refine(**SQUARE, steps=2, true_cfg_scale=1.0)
    inputs, static, _ = calls[0]
    side = inputs["mask"].shape[-1]
    (x1, x2), (y1, y2) = (
        sorted(data.draw(st.lists(st.integers(0, side), min_size=2, max_size=2, unique=True))) for _ in "xy"
    )
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (side, side, 3), np.uint8)
    mask = np.where(rng.random((side, side)) < marked, rng.integers(1, 256, (side, side)), 0).astype(np.uint8)
    given_ = {**inputs, "pictures": picture[None], "mask": mask[None], "box": np.int32([[x1, y1, x2, y2]])}
    out = np.asarray(quick(refiner.variables, refiner.lora, given_, **static).pictures[0])
    soft = Image.fromarray(mask[y1:y2, x1:x2]).filter(ImageFilter.MaxFilter(7)).filter(ImageFilter.GaussianBlur(5))
    alpha = np.zeros((side, side), np.uint8)
    alpha[y1:y2, x1:x2] = np.asarray(soft)
    np.testing.assert_array_equal(out[alpha == 0], picture[alpha == 0])


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(steps=0), "steps"),
        (dict(steps=2.5), "steps"),
        (dict(steps=1001), "steps"),
        (dict(true_cfg_scale=float("nan")), "true_cfg_scale"),
        (dict(true_cfg_scale=-1.0), "true_cfg_scale"),
        (dict(true_cfg_scale="4"), "true_cfg_scale"),
        (dict(seed=1.5), "seed"),
        (dict(seed=2**63), "seed"),
        (dict(margin=-1), "margin"),
        (dict(feather="soft"), "feather"),
        (dict(noise=np.zeros((4, 4, 4), np.float32)), "noise of shape"),
        (dict(noise="noise"), "noise"),
        (dict(prompt=["a", "b"]), "prompt: 2 given for 1"),
        (dict(prompt=3), "prompt"),
        (dict(prompt="x" * 2000), "too long"),
        (dict(prompt="<|image_pad|>"), "reserved"),
        (dict(reference=7), "reference"),
        (dict(mask_or_box=[]), "mask_or_box"),
        (dict(mask_or_box=np.zeros((130, 150), np.uint8)), "empty"),
        (dict(mask_or_box=(100, 100, 151, 120)), "outside"),
        (dict(mask_or_box=(10, 10, 10, 20)), "empty"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(refiner, calls, change, says):
    with pytest.raises(RefineError) as error:
        refiner.refine_batch([SQUARE, {**SQUARE, **change}])
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not calls
