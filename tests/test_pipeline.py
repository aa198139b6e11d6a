"""The whole path from pixels to pixels against diffusers' pipeline (rung 3), and what must not change a result."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from reference_pipeline import MATRIX, Case, Pair, picture, scribble

from refine_jax import executables, focus
from refine_jax import refine_programs as program
from refine_jax.convert import lora
from refine_jax.errors import RefineError
from refine_jax.models.mmdit import MMDiT
from refine_jax.refine import Refiner


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """zero_cond_t -> diffusers' pipeline and ours on the same folders."""
    return functools.cache(lambda zero_cond_t: Pair(tmp_path_factory.mktemp("pair"), zero_cond_t))


@pytest.fixture(scope="module")
def refiner(pairs):
    return pairs(True).refiner(0)


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

    def record(store, called, *args, **static):
        if called is not program.refine_program:
            return called(*args, **static)
        seen.append((args[-1], static, quick(*args, **static)))
        return seen[-1][-1]

    monkeypatch.setattr(executables.Store, "call", record)
    return seen


def noise_for(refiner: Refiner, size: tuple[int, int], seed: int) -> np.ndarray:
    shape = (*refiner.model.latent_size(size), refiner.model.vae.z_dim)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# ------------------------------------------------------------------------------------------------------- rung 3: parity

SHORT, LONG = "Refine the text 'OPEN'", "Refine the text 'OPEN': " + 12 * "white letters, "
SQUARE = dict(image=picture(1, 150, 130), mask_or_box=scribble(2, 150, 130, (60, 50, 90, 78)), prompt=SHORT)
SQUARE_WITH_REFERENCE = dict(
    image=picture(5, 300, 280),
    mask_or_box=scribble(6, 300, 280, (100, 90, 170, 168)),
    prompt=LONG,
    reference=picture(7, 70, 60),
)


def pairwise(cases) -> list[Case]:
    """Few cells of the matrix in which any two settings meet (`tools/parity.py` runs all of them)."""
    settings_of = lambda case: [(f.name, getattr(case, f.name)) for f in dataclasses.fields(case)]
    meetings = lambda case: set(itertools.combinations(settings_of(case), 2))
    missing, chosen = set().union(*map(meetings, cases)), []
    while missing:
        chosen.append(max(cases, key=lambda case: len(meetings(case) & missing)))
        missing -= meetings(chosen[-1])
    return chosen


@pytest.mark.parametrize("case", sorted(pairwise(MATRIX), key=lambda c: (c.zero_cond_t, c.loras)), ids=str)
def test_equals_the_reference_pipeline(pairs, case):
    ours, theirs, request = pairs(case.zero_cond_t).compare(case)
    made_of = theirs[request["mask_or_box"] > 0]
    assert (made_of != request["image"][request["mask_or_box"] > 0]).mean() > 0.9 and made_of.std() > 20
    assert np.abs(ours - theirs).max() <= 1


def test_merged_adapters_give_the_live_ones_picture(pairs):
    case = Case("square", False, None, True, True, 2)
    live, _, _ = pairs(True).compare(case)
    merged, _, _ = pairs(True).compare(case, merge=True)
    plain, _, _ = pairs(True).compare(dataclasses.replace(case, loras=0))
    assert np.abs(live - merged).max() <= 1 < 10 < np.abs(live - plain).max()


@pytest.mark.parametrize("dialect", ["peft", "comfyui"])
def test_an_adapter_trained_here_goes_to_diffusers_and_back(pairs, tmp_path, dialect):
    """Trained by gradient descent on the velocity, exported, loaded by diffusers' own loader."""
    pair = pairs(True)
    base = pair.refiner(0)
    adapter = trained_adapter(base, seed=3)
    lora.write_adapter(tmp_path / "trained.safetensors", {"mmdit": adapter}, dialect)
    again = lora.read_adapter(tmp_path / "trained.safetensors", base.model.abstract()).trees["mmdit"]
    assert jax.tree.structure(again) == jax.tree.structure(adapter)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)
    pair.pipe.load_lora_weights(tmp_path, weight_name="trained.safetensors", adapter_name=f"trained_{dialect}")
    case = Case("square", True, None, True, True, 1)
    ours = Refiner(base.model, base.variables, base.tokenizer, {"mmdit": adapter})
    ours, theirs, _ = pair.compare(case, adapters=[f"trained_{dialect}"], refiner=ours)
    plain, _, _ = pair.compare(dataclasses.replace(case, loras=0))
    assert np.abs(ours - theirs).max() <= 1 < 10 < np.abs(ours - plain).max()


def trained_adapter(refiner: Refiner, seed: int):
    """A few steps of Adam on a LoRA of the attention projections; the base stays as it is."""
    model, rng = refiner.model.mmdit, np.random.default_rng(seed)
    shapes = {
        name: refiner.variables["mmdit"]["blocks"]["attn"][name]["kernel"].shape
        for name in ("to_q", "to_k", "to_v", "to_out")
    }
    draw = lambda *shape: rng.normal(0, 0.3, shape).astype(np.float32)
    tree = {name: {"a": draw(n, i, 4), "b": np.zeros((n, 4, o), np.float32)} for name, (n, i, o) in shapes.items()}
    latents, text = draw(2, 8, model.in_channels), draw(2, 3, model.joint_attention_dim)
    wanted = draw(2, 4, model.in_channels) * 5
    positions = np.zeros((2, 8, 3), np.int32)

    @jax.jit
    @jax.grad
    def gradient(tree):
        collections = {"params": refiner.variables["mmdit"], "lora": {"blocks": {"attn": tree}}}
        made = MMDiT(model).apply(
            collections, latents, text, np.full(2, 0.5), positions, np.zeros((2, 3), np.int32), target_length=4
        )
        return jnp.mean(jnp.square(made - wanted))

    optimizer = optax.adam(0.1)
    state = optimizer.init(tree)
    for _ in range(5):
        updates, state = optimizer.update(gradient(tree), state)
        tree = optax.apply_updates(tree, updates)
    return {"blocks": {"attn": jax.tree.map(np.asarray, tree)}}


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
    assert inputs["has_reference"].tolist()[:3] == [False, False, True] and "reference" not in calls[0][0]
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
    refiner.refine(**{**common, "mask_or_box": [SQUARE["mask_or_box"]] * 2}, seed=7)
    noises = np.asarray(calls[-1][0]["noise"])
    np.testing.assert_array_equal(noises[0], drawn)
    assert abs(np.corrcoef(noises[0].ravel(), noises[1].ravel())[0, 1]) < 0.1


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


def test_a_transparent_reference_is_seen_on_white(refiner):
    """A black logo on nothing, as logos come."""
    logo = np.zeros((60, 70, 4), np.uint8)
    logo[10:50, 15:55, 3] = 255
    logo[20:30, 15:55, 3] = 100
    white = np.repeat(255 - logo[..., 3:], 3, axis=-1)
    settings = dict(SQUARE, steps=1, true_cfg_scale=1.0)
    by_alpha, flat = refiner.refine_batch(
        [dict(settings, reference=Image.fromarray(logo)), dict(settings, reference=white)]
    )
    assert by_alpha.tobytes() == flat.tobytes()
    assert flat.tobytes() != refiner.refine(**settings, reference=logo[..., :3]).tobytes()


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(steps=0), "steps"),
        (dict(steps=2.5), "steps"),
        (dict(steps=1001), "steps"),
        (dict(true_cfg_scale=float("nan")), "true_cfg_scale"),
        (dict(true_cfg_scale=-1.0), "true_cfg_scale"),
        (dict(true_cfg_scale=1e30), "true_cfg_scale"),
        (dict(image=np.zeros((8, 1600, 3), np.uint8), mask_or_box=(0, 0, 9, 8), focus=False), "cut the picture up"),
        (dict(image=np.zeros((90, 1600, 3), np.uint8), mask_or_box=(0, 9, 1600, 11), margin=1), "give a larger margin"),
        (dict(reference=np.zeros((4, 80, 3), np.uint8)), "reference: is 20 times as wide as high"),
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
