"""Regeneration with BAGEL: the whole sampler against the authors' numbers, and what it promises of itself."""

import dataclasses
import functools
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_bagel as reference
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from refine_jax import bagel, bagel_objective, checkpoint, flow, loading, prompts, regenerate
from refine_jax.bagel import BagelModel, Guidance, LatentImage, Marks, Prompt
from refine_jax.cli import main
from refine_jax.convert import keys_flux_vae
from refine_jax.convert.mapping import reference_shapes, to_tree
from refine_jax.data import packing
from refine_jax.data.sequences import Seen, Text
from refine_jax.errors import RefineError
from refine_jax.model import ModelConfig
from refine_jax.models.bagel import Bagel, BagelConfig, Segments, patchify
from refine_jax.models.flux_vae import FluxVAEConfig
from refine_jax.models.siglip import pixels_to_patches, position_ids
from refine_jax.regenerate import Regenerator

# tests/data/rvr_sampler.npz holds what inferencer.py and modeling/ of github.com/LeapLabTHU/RvR painted on a CPU
# (changed as test_bagel.py says, with Pillow in place of torchvision's resize) with the decoder of test_bagel.py, the
# autoencoder VAE below and `weight` as its weights: packed latents "x NAME" and pictures "picture NAME" of CASES.
VAE = FluxVAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=4)
MODEL = BagelModel(bagel=reference.CONFIG, vae=VAE, vae_sides=(80, 32), vit_sides=(24, 8))
MARKS = Marks(reference.BOS, reference.EOS, reference.START, reference.END)
CASES = {
    # the released settings
    "rvr": dict(image=(60, 90), steps=50, image_cfg=2.0, renorm="text_channel", interval=(0.0, 1.0)),
    # the ablation: the image's latents too
    "rvr_vae": dict(image=(70, 40), steps=8, image_cfg=2.0, renorm="channel", interval=(0.0, 1.0), vae=True),
    "global": dict(image=(64, 64), steps=8, image_cfg=1.5, renorm="global", interval=(0.0, 1.0)),
    # text to image, as released
    "generate": dict(image=None, size=(48, 64), steps=50, image_cfg=1.0, renorm="global", interval=(0.4, 1.0)),
}
TEXT = "Here is the user's prompt: two red cups. "


def vae_weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """A value for a tensor of the reference's autoencoder; activations stay of order one."""
    value = reference.noise("vae " + key, *shape)
    if key.endswith("bias"):
        return 0.2 * value
    return 1 + 0.3 * value if len(shape) == 1 else value / np.float32(np.sqrt(np.prod(shape[1:])))


def photo(name: str, size: tuple[int, int]) -> np.ndarray:
    """A picture of (height, width) with something of every scale in it."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    coarse = rng.integers(0, 256, (size[0] // 8 + 1, size[1] // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)
    return np.clip(coarse[: size[0], : size[1]] + rng.integers(-40, 40, (*size, 3)), 0, 255).astype(np.uint8)


@functools.cache
def weights() -> dict:
    vae = MODEL.abstract(("vae",))["vae"]
    table = keys_flux_vae.FLUX_VAE_TABLE
    tensors = {key: vae_weight(key, shape) for key, shape in reference_shapes(table, vae).items()}
    return {"bagel": reference.variables()["params"], "vae": to_tree(tensors, table, vae)}


def words(*texts: str) -> Prompt:
    rows = [[reference.BOS, *reference.encode(text), reference.EOS] for text in texts]
    longest = max(map(len, rows))
    ids = np.array([row + [0] * (longest - len(row)) for row in rows], np.int32)
    return Prompt(ids, np.array(list(map(len, rows)), np.int32))


def sample(name: str, case: dict, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(packed latents, pictures) of one case through the public parts."""
    size = case.get("size") or MODEL.painted_size(case["image"])
    grid = MODEL.grid(size)
    guided = case["image_cfg"] > 1 and case["image"] is not None

    @jax.jit
    def run(variables: dict, picture: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        system = pixels = latents = None
        if case["image"] is not None:
            system = words(MODEL.system)
            shown = bagel.painted(picture, None, size)
            pixels = bagel.painted(shown, None, MODEL.seen_size(size))[None]
        if case.get("vae"):
            clean = jnp.asarray(reference.latent("sampler " + name, *grid)).transpose(1, 2, 0)[None]
            latents = LatentImage(patchify(clean, MODEL.bagel), grid)
        context = bagel.read_prefix(
            MODEL,
            variables,
            {},
            MARKS,
            system,
            pixels,
            words(TEXT),
            drop_text=True,
            drop_image=guided,
            latents=latents,
        )
        guidance = Guidance(
            bagel.time_grid(case["steps"], 3.0),
            4.0,
            case["image_cfg"] if guided else None,
            case["renorm"],
            0.0,
            case["interval"],
        )
        x = bagel.paint(MODEL, variables, {}, MARKS, context, noise, grid, guidance)
        return x, bagel.decode_latents(MODEL, variables, x, size).astype(jnp.uint8)

    picture = photo(name, case["image"]) if case["image"] else np.zeros((1, 1, 3), np.uint8)
    x, pictures = run(weights(), picture, noise[None])
    return np.asarray(x[0]), np.asarray(pictures[0])


@pytest.mark.parametrize("name", CASES)
def test_the_sampler_paints_what_the_authors_paint(name):
    case = CASES[name]
    with np.load(reference.DATA / "rvr_sampler.npz") as stored:
        latents, picture = stored[f"x {name}"], stored[f"picture {name}"]
    noise = reference.noise("sampler " + name, *latents.shape)
    x, ours = sample(name, case, noise)
    assert np.linalg.norm(x - latents) <= 1e-4 * np.linalg.norm(latents)
    assert ours.shape == picture.shape
    assert np.abs(ours.astype(int) - picture).max() <= 1


class Letters:
    """A tokenizer of the words that the authors' numbers were made with."""

    def token_to_id(self, mark: str) -> int | None:
        return dict(zip(bagel.MARKS, MARKS)).get(mark)

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": reference.encode(text)}


def test_the_door_paints_what_the_authors_paint():
    regenerator = Regenerator(MODEL, weights(), Letters())
    with np.load(reference.DATA / "rvr_sampler.npz") as stored:
        noise = {name: reference.noise("sampler " + name, *stored[f"x {name}"].shape) for name in CASES}
        regenerated, generated = stored["picture rvr"], stored["picture generate"]
    common = dict(steps=50, text_cfg=4.0, shift=3.0, renorm_min=0.0)
    released = dict(image_cfg=2.0, renorm="text_channel", interval=(0.0, 1.0))
    picture = photo("rvr", CASES["rvr"]["image"])
    ours = regenerator.regenerate(picture, "two red cups", noise=noise["rvr"], **common, **released)
    assert ours.size == regenerated.shape[1::-1]
    assert np.abs(np.asarray(ours, int) - regenerated).max() <= 1
    # The authors' number is of guidance by the prompt alone; their program adds to it.
    plain = Regenerator(dataclasses.replace(MODEL, generate_image_cfg=1.0), weights(), Letters())
    ours = plain.generate(TEXT, (64, 48), noise=noise["generate"], **common)
    assert np.abs(np.asarray(ours, int) - generated).max() <= 1
    common["text_cfg"] = 5.5
    once, both = (np.asarray(door.generate(TEXT, (64, 48), noise=noise["generate"], **common | change), int)
                  for door, change in ((plain, {}), (regenerator, dict(text_cfg=4.0))))  # fmt: skip
    assert np.abs(once - both).max() <= 1 and np.abs(once - generated).max() > 3


def test_guided_sampling_from_the_cache_equals_recomputing_the_whole_sequence():
    """Three updates led by both contexts, against sequences that are read anew at every update."""
    (_, system), (_, (name, *size)), (_, prompt) = reference.CONTEXTS["full"]
    times = bagel.time_grid(4, 3.0)
    noise = reference.noise("x", 12, 16)

    @jax.jit
    def cached(variables: dict) -> jax.Array:
        pixels = reference.picture(name, *size)[None].astype(np.float32)
        texts = words(system), pixels, words(prompt)
        context = bagel.read_prefix(MODEL, variables, {}, MARKS, *texts, drop_text=True, drop_image=True)
        guidance = Guidance(times, 4.0, 2.0, "text_channel", 0.0, (0.0, 1.0))
        return bagel.paint(MODEL, variables, {}, MARKS, context, noise[None], reference.TARGET, guidance)

    x, contexts = noise, [reference.CONTEXTS[kind] for kind in ("full", "text-dropped", "image-dropped")]
    for t, following in zip(times, times[1:]):
        parts = np.split(reference.recomputed(contexts, x, t), 3)
        x = x + (following - t) * np.asarray(flow.dual_cfg(*parts, 4.0, 2.0, "text_channel"))[0]
    assert reference.relative(cached(weights())[0], x) <= 1e-5
    assert reference.relative(x, noise) > 0.1


@given(
    size=st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
    sides=st.sampled_from([((1024, 512), 16), ((980, 224), 14), ((80, 32), 16)]),
)
@settings(deadline=None, max_examples=200)
def test_sizes_are_within_the_sides(size, sides):
    (longest, shortest), stride = sides
    fitted = bagel.fitted_size(size, (longest, shortest), stride)
    assert all(side % stride == 0 and side >= stride for side in fitted)
    assert max(fitted) <= longest
    if max(size) * shortest <= longest * min(size):  # both can be had
        assert min(fitted) >= shortest - stride
    assert (size[0] >= size[1]) == (fitted[0] >= fitted[1]) or abs(fitted[0] - fitted[1]) <= stride


def test_a_time_grid_and_its_guided_spans():
    times = bagel.time_grid(50, 3.0)
    assert times[0] == 1 and times[-1] == 0 and (np.diff(times) < 0).all()
    spans = bagel.guided_spans(times, (0.4, 1.0))
    assert [s[0] for s in spans] == [True, False]
    assert spans[0][1] == 0 and spans[0][2] == spans[1][1] and spans[1][2] == 49
    assert times[spans[0][2] - 1] > 0.4 >= times[spans[0][2]]
    assert bagel.guided_spans(times, (0.0, 1.0)) == [(True, 0, 49)]
    assert [s[0] for s in bagel.guided_spans(times, (0.3, 0.6))] == [False, True, False]
    with pytest.raises(RefineError, match="steps 1"):
        bagel.time_grid(1, 3.0)


@pytest.mark.parametrize("renorm", flow.RENORMS)
def test_guidance_depends_on_its_own_row_alone(renorm):
    v, t, i = (jnp.asarray(reference.noise(k, 3, 5, 4)) for k in "vti")
    scale = jnp.array([4.0, 1.5, 6.0])
    whole = flow.dual_cfg(v, t, i, scale, 2.0, renorm)
    for k in range(3):
        alone = flow.dual_cfg(v[k : k + 1], t[k : k + 1], i[k : k + 1], scale[k], 2.0, renorm)
        np.testing.assert_allclose(whole[k], alone[0], rtol=1e-5, atol=1e-6)
    if renorm != "text_channel":  # never longer than the unguided velocity
        axes = (1, 2) if renorm == "global" else 2
        norm = lambda x: np.linalg.norm(np.asarray(x), axis=axes)
        assert (norm(whole) <= norm(v) * (1 + 1e-5)).all()
    with pytest.raises(RefineError, match="renorm 'local'"):
        flow.dual_cfg(v, t, i, 4.0, 2.0, "local")


def test_the_manifest_goes_both_ways():
    assert BagelModel.from_manifest(MODEL.to_manifest()) == MODEL
    with pytest.raises(RefineError, match="holds no vae"):
        BagelModel.from_manifest({k: v for k, v in MODEL.to_manifest().items() if k != "vae"})
    with pytest.raises(RefineError, match="unknown field 'colour'"):
        BagelModel.from_manifest({**MODEL.to_manifest(), "colour": 1})


# ------------------------------------------------------------------------------------------------------------- the door


@functools.cache
def door(**settings) -> Regenerator:
    """The model of the authors' numbers with more words: the byte tokenizer has 264."""
    network = BagelConfig(**{**dataclasses.asdict(MODEL.bagel), "vocab_size": 264, "vit": MODEL.bagel.vit})
    model = dataclasses.replace(MODEL, bagel=network, steps=4)
    variables = weights()
    extra = jnp.asarray(reference.noise("more words", 264, 24))
    head = {"kernel": jnp.asarray(reference.noise("head", 24, 264))}
    variables = {**variables, "bagel": {**variables["bagel"], "embed_tokens": extra, "lm_head": head}}
    return Regenerator(model, variables, ModelConfig.byte_tokenizer(), **settings)


@settings(deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300))
def test_few_programs_for_pictures_of_all_sizes(height, width):
    regenerator = door(side_step=32)
    (row,) = regenerator.read(np.zeros((height, width, 3), np.uint8), "x").rows
    size = row.bucket.base[0].size
    assert set(size) <= {32, 64} and MODEL.vae_sides == (80, 32)
    assert size[0] >= size[1] if height >= width else size[0] <= size[1]


def test_a_step_of_sides_is_a_multiple_of_the_models_own():
    for step in (24, 0, "32"):
        with pytest.raises(RefineError, match=f"side_step.*{step}"):
            door(side_step=step)


def test_a_request_depends_on_itself_alone():
    requests = [
        dict(image=photo("a", (60, 90)), prompt="two red cups", seed=1),
        dict(image=photo("b", (61, 92)), prompt="一只黑色的猫和三个苹果", seed=2),
        dict(image=photo("c", (90, 60)), prompt="", seed=3),
        dict(image=photo("d", (60, 90)), prompt="a much longer prompt " * 12, seed=1, text_cfg=1.0),
    ]
    together = door().regenerate_batch(requests)
    again = door().regenerate_batch(requests[::-1])[::-1]
    assert [picture.size for picture in together] == [(80, 48), (80, 48), (48, 80), (80, 48)]
    for request, one, other in zip(requests, together, again):
        assert one.tobytes() == other.tobytes()
        alone = np.asarray(door().regenerate(**request)).astype(int)
        assert np.abs(alone - np.asarray(one)).max() <= 1
    assert together[0].tobytes() != together[1].tobytes()


def test_latents_do_not_depend_on_neighbours_and_padding():
    """Alone, and beside a longer prompt with other guidance, in a longer bucket."""
    requests = [
        dict(image=photo("a", (60, 90)), prompt="two red cups", seed=1),
        dict(image=photo("b", (60, 90)), prompt="a much longer prompt " * 3, seed=2, text_cfg=2.0, image_cfg=1.2),
    ]
    regenerator = door()
    rows = [regenerator.read(**request).rows[0] for request in requests]
    spec, system = rows[0].bucket.base[0], bagel.text_ids(regenerator.tokenizer, regenerator.model.system)

    def latents(rows: list, length: int) -> np.ndarray:
        inputs = dict(
            prompt=regenerate._padded([row.ids for row in rows], length),
            system=regenerate._padded([system] * len(rows), len(system)),
            text_cfg=np.array([row.text_cfg for row in rows], np.float32),
            image_cfg=np.array([row.image_cfg for row in rows], np.float32),
            pictures=np.stack([np.asarray(bagel.painted(row.picture.rgb, None, spec.size)) for row in rows]),
            noise=np.stack([reference.noise(f"row {row.seed}", 15, 16) for row in rows]),
        )
        static = dict(model=regenerator.model, marks=Marks.of(regenerator.tokenizer), spec=spec)
        return np.asarray(regenerate.bagel_program(regenerator.variables, {}, inputs, **static).latents)

    together = latents(rows, 256)
    for number, row in enumerate(rows):
        assert reference.relative(latents([row], 128)[0], together[number]) <= 1e-5


def test_rounds_feed_the_result_back():
    picture = photo("a", (60, 90))
    noise = reference.noise("given", 15, 16)
    assert door().regenerate(picture, "x", rounds=0).tobytes() == picture.tobytes()
    once = door().regenerate(picture, "x", noise=noise)
    twice = door().regenerate(picture, "x", rounds=2, noise=noise)
    key = regenerate._key(0, 1, 0)
    by_hand = door().regenerate(once, "x", noise=jax.random.normal(key, (15, 16)))
    assert twice.tobytes() == by_hand.tobytes() != once.tobytes()


def test_what_a_request_of_text_alone_may_say():
    with pytest.raises(RefineError, match="unknown field 'image_cfg'"):
        door().generate_batch([dict(prompt="x", image_cfg=3.0)])
    with pytest.raises(RefineError, match="renorm ''"):
        door().generate("x", renorm="")
    bucket = lambda **settings: door().read_generation("x", **settings).rows[0].bucket
    assert bucket(interval=np.array([0.4, 1.0])) == bucket()


def test_sides_that_cannot_be():
    for sides in (64, (32, 64), (64.0, 32.0)):
        with pytest.raises(RefineError, match="vae_sides .*: give longest and shortest side, at least 16"):
            dataclasses.replace(MODEL, vae_sides=sides)
    of = lambda **sides: Regenerator(
        dataclasses.replace(door().model, **sides), door().variables, ModelConfig.byte_tokenizer()
    )
    with pytest.raises(RefineError, match="vit_sides .* the tower sees sides of up to"):
        of(vit_sides=(700, 600)).read(photo("a", (60, 90)), "x")
    assert of(vae_sides=(72, 32)).read_generation("x").rows[0].bucket.base[0].size == (64, 64)


@pytest.mark.parametrize("network", ["bagel", "vae"])
def test_a_result_that_is_not_made_of_numbers_is_said(network):
    """In 8 bits it would be black."""
    broken = lambda path, leaf: leaf * jnp.nan if path[-1].key == "bias" and leaf.ndim == 1 else leaf
    variables = dict(door().variables)
    variables[network] = jax.tree_util.tree_map_with_path(broken, variables[network])
    regenerator = Regenerator(door().model, variables, door().tokenizer)
    with pytest.raises(RefineError, match="result: holds values that are not finite; look for such in the files"):
        regenerator.regenerate(photo("a", (60, 90)), "x", rounds=2)
    assert regenerator.regenerate(photo("a", (60, 90)), "x", rounds=0).getextrema() != ((0, 0),) * 3


def test_generating_from_text():
    one, other = door().generate_batch([dict(prompt="a cat", size=(64, 48)), dict(prompt="a dog", size=(64, 48))])
    assert one.size == (64, 48) and one.tobytes() != other.tobytes()
    assert one.tobytes() == door().generate_batch([dict(prompt="a cat", size=(64, 48))] * 2)[1].tobytes()
    assert door().generate("a cat").size == (80, 80)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(rounds=-1), "rounds -1"),
        (dict(rounds=1.5), "rounds 1.5"),
        (dict(steps=1), "steps 1"),
        (dict(text_cfg=float("nan")), "text_cfg nan"),
        (dict(renorm="local"), "renorm 'local'"),
        (dict(interval=(0.5, 2.0)), "interval"),
        (dict(interval=0.5), "interval 0.5"),
        (dict(seed=2**70), "seed"),
        (dict(noise=np.zeros((3, 3), np.float32)), r"noise of shape \(3, 3\)"),
        (dict(noise=[[1.0]]), r"noise of shape \(1, 1\)"),
        (dict(noise="loud"), "noise: cannot use a str"),
        (dict(noise=np.full((15, 16), np.nan)), "noise: holds values that are not finite"),
        (dict(prompt="caf\udce9"), "prompt: holds bytes that are not UTF-8"),
        (dict(prompt="say <|im_end|>"), "reserved"),
        (dict(prompt=3), "cannot use a int"),
        (dict(image="nowhere.png"), "nowhere.png"),
    ],
)
def test_bad_requests_are_refused(settings, message):
    with pytest.raises(RefineError, match=message):
        door().regenerate(**{"image": photo("a", (60, 90)), "prompt": "x", **settings})
    with pytest.raises(RefineError, match="multiples of 16"):
        door().generate("x", (50, 64))
    with pytest.raises(RefineError, match="size .*inf"):
        door().generate("x", (float("inf"), 64))
    for request, word in ((dict(prompt="x"), "'image'"), (["x"], "mapping"), (dict(image=1, text="x"), "'prompt'")):
        with pytest.raises(RefineError, match=f"request 0: .*{word}"):
            door().regenerate_batch([request])
    with pytest.raises(RefineError, match="request 1: .*'prompt'"):
        door().generate_batch([dict(prompt="x"), dict(size=(64, 64))])


@pytest.mark.parametrize("shown", [True, False])
def test_an_answer_is_what_training_would_predict(shown):
    """Token by token the likeliest one behind [picture][question][answer so far], in a row as it is packed to train."""
    regenerator, image = door(), photo("a", (60, 90))
    model = regenerator.model.bagel
    said = regenerator.answer(image if shown else None, "what is it?", max_tokens=5)
    seen = regenerator.model.seen_size(regenerator.model.painted_size((60, 90)))
    encode = lambda text: bagel.text_ids(regenerator.tokenizer, text)
    marks = Marks.of(regenerator.tokenizer)
    question = encode("what is it?")
    inputs = dict(prompt=Prompt(question[None], np.array([len(question)], np.int32)), key=jax.random.key(0))
    if shown:
        inputs["pictures"] = np.asarray(bagel.painted(image, None, regenerator.model.painted_size((60, 90))))[None]
    program = functools.partial(regenerate.answer_program, model=regenerator.model, marks=marks, temperature=0.0)
    found = program(regenerator.variables, {}, inputs, seen=seen if shown else None, length=8)
    ids = np.asarray(found)[0, :5].tolist()
    assert regenerator.tokenizer.decode(ids) == said and marks.text_end not in ids
    row = packing.Row(packing.Bucket((16, 16), seen, 1, 40, 6))
    answer = np.array([marks.text_start, *ids, marks.text_end], np.int32)
    items = [Seen(0)] * shown + [Text("what is it?"), Text("x", scored=True)]
    larger = bagel.painted(image, None, regenerator.model.painted_size((60, 90)))
    picture = np.asarray(bagel.painted(larger, None, seen)).astype(np.uint8)
    row.add(0, items, [picture], lambda t: answer if t == "x" else encode(t), (marks.image_start, marks.image_end))
    batch = {name: jnp.asarray(value)[None] for name, value in row.arrays().items()}
    segments = Segments(**{name: batch[f"text_{name}"] for name in (*packing.PLACES, "causal", "noisy")})
    patches = pixels_to_patches(batch["seen_pixels"][:, 0], model.vit)[:, None]
    grid = tuple(side // model.vit.patch_size for side in seen)
    cells = jnp.asarray(position_ids(*grid, model.vit))[None, None]
    where = bagel_objective.picture_segments(batch, "seen", grid[0] * grid[1])
    weights = {"params": regenerator.variables["bagel"]}
    hidden, _ = Bagel(model).apply(weights, batch["text_ids"], segments, patches, cells, where)
    logits = Bagel(model).apply(weights, hidden, method=Bagel.logits)[0]
    at = row.arrays()["text_scored"][:5]
    assert np.argmax(logits[at], axis=-1).tolist() == ids
    with pytest.raises(RefineError, match="max_tokens 0"):
        regenerator.answer(None, "x", max_tokens=0)


# ------------------------------------------------------------------------------------ both carriers, from a folder


def saved(folder, model, variables):
    checkpoint.save_model(folder, model.to_manifest(), variables)
    ModelConfig.byte_tokenizer(folder / "tokenizer")
    return folder


def test_the_command_paints_what_the_door_does(tmp_path, capsys):
    folder = saved(tmp_path / "model", door().model, door().variables)
    Image.fromarray(photo("a", (60, 90))).save(tmp_path / "a.png")
    common = ["--prompt", "two cups", "--model", str(folder), "--quiet", "--seed", "5"]
    output = str(tmp_path / "out.png")
    assert main(["regenerate", "--image", str(tmp_path / "a.png"), "--rounds", "2", *common, "--output", output]) == 0
    expected = door().regenerate(photo("a", (60, 90)), "two cups", rounds=2, seed=5)
    assert Image.open(output).tobytes() == expected.tobytes()
    # Another process, the same seed, the same bits.
    words = ["regenerate", "--image", tmp_path / "a.png", "--rounds", "2", *common, "--output", tmp_path / "again.png"]
    subprocess.run([sys.executable, "-m", "refine_jax", *words], check=True, timeout=300)
    assert Image.open(tmp_path / "again.png").tobytes() == expected.tobytes()
    assert main(["generate", "--size", "64x48", *common, "--output", output]) == 0
    assert Image.open(output).tobytes() == door().generate("two cups", (64, 48), seed=5).tobytes()
    capsys.readouterr()
    assert main(["refine", "--image", output, "--box", "0,0,9,9", "--prompt", "x", "--model", str(folder)]) == 2
    assert "regenerates whole pictures" in capsys.readouterr().err


def mmdit() -> tuple[ModelConfig, dict]:
    """A small MMDiT that regenerates, and weights for it."""
    template = prompts.for_tokenizer(prompts.TEMPLATES["rvr-inference"], ModelConfig.byte_tokenizer())
    areas = dict(vae_area=32 * 32, condition_area=32 * 32)
    model = dataclasses.replace(toy.model_config(), conditioning="rvr", prompt=template, steps=2, **areas)
    return model, toy.random_variables(model, 3)


def test_the_mmdit_behind_the_same_door(tmp_path):
    regenerator = Regenerator.load(saved(tmp_path / "model", *mmdit()))
    requests = [
        dict(image=photo("a", (40, 40)), prompt="two red cups", seed=1, rounds=2),
        dict(image=photo("b", (41, 41)), prompt="一只猫", seed=2, rounds=2),
    ]
    together = regenerator.regenerate_batch(requests)
    for request, one in zip(requests, together):
        alone = np.asarray(regenerator.regenerate(**request)).astype(int)
        assert np.abs(alone - np.asarray(one)).max() <= 1
    first = regenerator.regenerate(**{**requests[0], "rounds": 1})
    assert first.tobytes() != together[0].tobytes()
    with pytest.raises(RefineError, match="image_cfg: this model"):
        regenerator.regenerate(**requests[0], image_cfg=2.0)
    made = regenerator.generate("a cat", seed=1)
    assert made.size == (32, 32) and made.tobytes() == regenerator.generate("a cat", (32, 32), seed=1).tobytes()
    assert made.tobytes() != regenerator.regenerate(photo("a", (40, 40)), "a cat", seed=1).tobytes()
    with pytest.raises(RefineError, match="paints 32x32"):
        regenerator.generate("a cat", (64, 64))
    with pytest.raises(RefineError, match="multiples of"):
        regenerator.generate("a cat", (33, 33))
    with pytest.raises(RefineError, match="regenerating: this model has conditioning 'refine'"):
        Regenerator.load(loading.resolve("tiny"))


@pytest.fixture(scope="module")
def carriers(tmp_path_factory):
    """A folder and a door of each: BAGEL, and the MMDiT."""
    found = {}
    for name, model in (("bagel", (door().model, door().variables)), ("mmdit", mmdit())):
        folder = saved(tmp_path_factory.mktemp("carriers") / name, *model)
        found[name] = folder, Regenerator.load(folder)
    return found


TRANSPARENT = np.concatenate([photo("a", (60, 90)), np.full((60, 90, 1), 40, np.uint8)], axis=-1)
UNUSUAL = {
    "Chinese": dict(prompt="一只黑色的猫和三个苹果"),
    "empty": dict(prompt=""),
    "one pixel": dict(image=np.full((1, 1, 3), 90, np.uint8)),
    "no rounds": dict(rounds=0),
    "transparent": dict(image=Image.fromarray(TRANSPARENT, "RGBA")),
}


@pytest.mark.parametrize("case", UNUSUAL)
@pytest.mark.parametrize("carrier", ["bagel", "mmdit"])
def test_unusual_requests(carriers, carrier, case, tmp_path):
    """By the door and by the command, to the bit; what is transparent is seen on white."""
    folder, regenerator = carriers[carrier]
    request = {"image": photo("a", (60, 90)), "prompt": "two red cups", "seed": 3, **UNUSUAL[case]}
    result = regenerator.regenerate(**request)
    before = request["image"] if isinstance(request["image"], Image.Image) else Image.fromarray(request["image"])
    before.save(tmp_path / "in.png")
    words = ["--rounds", str(request.get("rounds", 1)), "--seed", "3", "--prompt", request["prompt"]]
    paths = ["--image", str(tmp_path / "in.png"), "--output", str(tmp_path / "out.png"), "--model", str(folder)]
    assert main(["regenerate", *paths, *words, "--quiet"]) == 0
    found = Image.open(tmp_path / "out.png")
    assert found.mode == result.mode == "RGB" and found.tobytes() == result.tobytes()
    if case == "no rounds":
        assert result.tobytes() == before.tobytes()
    elif case == "transparent":
        white = Image.alpha_composite(Image.new("RGBA", before.size, "white"), before).convert("RGB")
        close = np.abs(np.asarray(white, int) - np.asarray(regenerator.regenerate(before, "x", rounds=0))).max()
        assert close <= 1  # Pillow rounds its own way
        hidden = before.copy()
        hidden.putalpha(255)
        assert result.tobytes() != regenerator.regenerate(**{**request, "image": hidden}).tobytes()
    else:
        assert result.tobytes() != regenerator.regenerate(photo("b", (60, 90)), "a dog", seed=3).tobytes()
        assert np.asarray(result).std() > 5
    if case in ("Chinese", "empty"):
        generated = regenerator.generate(request["prompt"], (32, 32), seed=3)
        assert main(["generate", "--size", "32x32", *paths[2:], *words[2:], "--quiet"]) == 0
        assert Image.open(tmp_path / "out.png").tobytes() == generated.tobytes()


def test_a_prompt_of_ten_thousand_characters(carriers, tmp_path, monkeypatch, capsys):
    """Painted where the model has room for it, and otherwise refused in one line that says what to do."""
    Image.fromarray(photo("a", (60, 90))).save(tmp_path / "in.png")
    monkeypatch.chdir(tmp_path)
    text = "one cup   " * 1000
    # As with a real tokenizer, a word is a token.
    tokenizer = prompts.byte_tokenizer(tmp_path / "tokenizer", [text[:50]], merges=8)
    size = len(tokenizer.get_vocab())
    model = dataclasses.replace(door().model, bagel=dataclasses.replace(door().model.bagel, vocab_size=size))
    table = jnp.asarray(reference.noise("words", size, 24))
    weights = {**door().variables, "bagel": {**door().variables["bagel"], "embed_tokens": table}}
    painted = Regenerator(model, weights, tokenizer).regenerate("in.png", text, steps=2)
    assert painted.size == (80, 48) and np.asarray(painted).std() > 5
    for name, text in (("bagel", "two cups " * 2000), ("mmdit", "one cup   " * 1000)):
        words = ["--image", "in.png", "--prompt", text, "--model", str(carriers[name][0]), "--quiet"]
        assert main(["regenerate", *words]) == 2
        said = capsys.readouterr().err
        assert "prompt too long" in said and said.count("\n") == 1 and not (tmp_path / "regenerated.png").exists()


def test_where_compiling_takes_minutes_progress_takes_no_program_of_its_own(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        shown = Regenerator(door().model, door().variables, door().tokenizer)
    request = dict(image=photo("a", (60, 90)), prompt="two red cups", seed=1)
    once, compiled = shown.regenerate(**request), shown.programs.counts.compiled
    assert once.tobytes() == shown.regenerate(**request, progress=True).tobytes()
    assert shown.programs.counts.compiled == compiled > 0
    assert f"denoising, {door().model.steps - 1} steps" in capsys.readouterr().err


def test_a_model_that_is_shown_latents_too():
    model = dataclasses.replace(door().model, conditioning="rvr_vae")
    shown = Regenerator(model, door().variables, door().tokenizer)
    request = dict(image=photo("a", (60, 90)), prompt="two red cups", seed=1)
    noise = reference.noise("given", 15, 16)
    once = shown.regenerate(**request, noise=noise, progress=True)
    assert once.tobytes() == shown.regenerate(**request, noise=noise).tobytes()
    assert once.tobytes() != door().regenerate(**request, noise=noise).tobytes()
    # The latents are a sample, and it is the seed's.
    assert once.tobytes() != shown.regenerate(**{**request, "seed": 2}, noise=noise).tobytes()
