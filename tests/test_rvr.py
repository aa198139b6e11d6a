"""RvR conditioning on the MMDiT: tokens and no latents, in the one sampler, the one objective and the one trainer."""

import contextlib
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import records_toy
import toy
from PIL import Image
from safetensors.numpy import load_file, save_file

from refine_jax import alignment, checkpoint, conditioning, flow, loading, objectives, parallel, prompts, regenerate
from refine_jax.cli import main
from refine_jax.data import loader, world
from refine_jax.errors import RefineError
from refine_jax.evaluate import small_world
from refine_jax.model import ModelConfig, decode_latents, encode_images, encode_prompts, velocity
from refine_jax.models.mmdit import image_positions, text_start
from refine_jax.models.qwen_vl_config import merged_tokens
from refine_jax.refine import Refiner
from refine_jax.refine_programs import generate
from refine_jax.regenerate import MMDiTRegenerator, MMDiTSpec, mmdit_program
from refine_jax.train import train

SIZE = (64, 64)
PROMPTS = ("a red star", "心形")
# Few tokens besides the picture's, so that it matters to a model of random weights.
SHORT = prompts.PromptTemplate("<|im_start|>{}:{}<|im_end|>", "<|image_pad|>", 1)
LENGTH = 24

# Compiling is most of the time here, and the arithmetic is the same at any level.
quick = jax.jit(
    mmdit_program.__wrapped__,
    static_argnames=("model", "spec"),
    compiler_options={"xla_backend_optimization_level": 0},
)


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def tokenizer():
    return ModelConfig.byte_tokenizer()


def made(kind: str, tokenizer, prompt: str = "rvr-training") -> ModelConfig:
    template = prompts.for_tokenizer(prompts.TEMPLATES[prompt], tokenizer)
    areas = dict(vae_area=SIZE[0] * SIZE[1], condition_area=32 * 32)
    return dataclasses.replace(toy.model_config(), conditioning=kind, prompt=template, **areas)


def short(kind: str) -> ModelConfig:
    return dataclasses.replace(made(kind, ModelConfig.byte_tokenizer()), prompt=SHORT)


@pytest.fixture(scope="module")
def variables():
    return toy.random_variables(toy.model_config(), 3)


def spec_of(model: ModelConfig) -> MMDiTSpec:
    return MMDiTSpec(SIZE, model.vl_sizes(1.0))


def inputs_of(model: ModelConfig, tokenizer, pictures: list[np.ndarray], rounds: int, seed: int = 0) -> dict:
    """Pictures in a canvas with room to spare, guided, three steps."""
    rng, grid = np.random.default_rng(seed), model.vl_grid(1.0)
    encode = lambda text: prompts.encode_prompt(
        tokenizer, model.prompt, text, [grid], model.vl.vision.spatial_merge_size
    )
    batch = lambda texts: vars(prompts.pad_prompts([encode(text) for text in texts], LENGTH))
    canvas = np.full((len(pictures), 80, 72, 3), 77, np.uint8)
    for row, picture in zip(canvas, pictures):
        row[: picture.shape[0], : picture.shape[1]] = picture
    return dict(
        pictures=canvas,
        box=np.array([(0, 0, p.shape[1], p.shape[0]) for p in pictures], np.int32),
        has_image=np.ones(len(pictures), bool),
        prompt=batch(PROMPTS[: len(pictures)]),
        negative=batch([model.negative_prompt] * len(pictures)),
        sigmas=flow.schedule(model.scheduler, 3, 64),
        true_cfg_scale=np.array([4.0, 2.5], np.float32)[: len(pictures)],
        noise=rng.standard_normal((rounds, len(pictures), *model.latent_size(SIZE), model.vae.z_dim), np.float32),
    )


def pictures(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*side, 3), np.uint8) for side in ((64, 64), (80, 72))]


# ---------------------------------------------------------------------------------------------------------- the sampler


@pytest.mark.parametrize("kind", ["rvr", "rvr_vae"])
def test_the_sampler_is_a_loop_of_velocities(kind, tokenizer, variables):
    """Two rounds of the program against plain Python: contexts written out, both halves of the guidance by themselves,
    the picture of a round read again by the next. "rvr_vae", the paper's ablation, has the picture's latents too."""
    model = short(kind)
    inputs = inputs_of(model, tokenizer, pictures(), 2)
    found = quick(variables, {}, inputs, model=model, spec=spec_of(model))

    height, width = model.latent_size(SIZE)
    grids = [(height // 2, width // 2)] * (2 if kind == "rvr_vae" else 1)
    count = height * width // 4 * len(grids)
    shown = [
        np.asarray(conditioning.view(picture, box, (SIZE,)))
        for picture, box in zip(inputs["pictures"], inputs["box"], strict=True)
    ]
    # The picture that is as large as what is made is read as it is.
    np.testing.assert_array_equal(shown[0], pictures()[0])
    evaluate = jax.jit(lambda *arguments: velocity(model, variables, {}, *arguments))
    encode = jax.jit(lambda *arguments: encode_prompts(model, variables, {}, *arguments))
    to_latents = jax.jit(lambda picture: encode_images(model, variables, [picture]))
    to_picture = jax.jit(lambda latents: decode_latents(model, variables, latents))
    picture = jnp.asarray(np.stack(shown))
    for number in range(2):
        read = jnp.stack([conditioning.view(row, None, model.vl_sizes(1.0)) for row in picture])
        latents = to_latents(picture) if kind == "rvr_vae" else []
        packed = [flow.pack_latents(z) for z in latents]
        context = conditioning.ImageTokens(
            packed[0] if packed else jnp.zeros((2, 0, model.mmdit.in_channels)),
            jnp.asarray([image_positions(grids)] * 2),
            jnp.ones((2, count), bool),
            jnp.asarray([text_start(grids)] * 2),
        )
        texts = encode([inputs["prompt"], inputs["negative"]], [read])
        assert texts[0][0].shape[1] == LENGTH - 1
        x, sigmas = flow.pack_latents(inputs["noise"][number]), inputs["sigmas"]
        for now, following in zip(sigmas[:-1], sigmas[1:]):
            positive, negative = (evaluate(x, jnp.full(2, now), context, *text) for text in texts)
            guided = np.asarray(negative + inputs["true_cfg_scale"][:, None, None] * (positive - negative))
            length = lambda v: np.linalg.norm(v, axis=-1, keepdims=True)
            x = x + (following - now) * guided * length(positive) / length(guided)
        picture = to_picture(flow.unpack_latents(x, (height, width)))
        difference = np.abs(np.asarray(found.rounds[number], int) - np.asarray(picture, int))
        # A value between two whole numbers may fall to either side.
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01
        assert np.std(np.asarray(picture)) > 20
        picture = found.rounds[number].astype(jnp.float32)
    np.testing.assert_array_equal(found.pictures, found.rounds[1])
    assert (np.asarray(found.rounds[0]) != np.asarray(found.rounds[1])).mean() > 0.3


def test_latents_do_not_depend_on_neighbours_and_padding(tokenizer, variables):
    """Two requests at once, and each alone with prompts padded to twice the length."""
    model = short("rvr")

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def latents(inputs: dict) -> jax.Array:
        views = jax.vmap(lambda picture, box: conditioning.view(picture, box, model.vl_sizes(1.0)))
        read = [views(inputs["pictures"], inputs["box"])]
        return generate(model, variables, {}, {**inputs, "noise": inputs["noise"][0]}, [], [], read)[0]

    inputs = inputs_of(model, tokenizer, pictures(), 1)
    together = latents(inputs)
    for k in range(2):
        alone = {
            name: value if name == "sigmas" else value[:, k : k + 1] if name == "noise" else value[k : k + 1]
            for name, value in inputs.items()
            if name not in ("prompt", "negative")
        }
        for name in ("prompt", "negative"):
            padded = lambda x: np.pad(x[k : k + 1], [(0, 0), (0, LENGTH), *[(0, 0)] * (x.ndim - 2)])  # noqa: B023
            alone[name] = {part: padded(np.asarray(x)) for part, x in inputs[name].items()}
        difference = np.asarray(latents(alone)[0] - together[k])
        assert np.linalg.norm(difference) <= 1e-5 * np.linalg.norm(together[k])


def test_no_rounds_give_the_picture_back(tokenizer, variables):
    model = short("rvr")
    one = np.array([[[9, 200, 31]]], np.uint8)
    inputs = inputs_of(model, tokenizer, [pictures()[0], one], 0)
    found = quick(variables, {}, inputs, model=model, spec=spec_of(model))
    np.testing.assert_array_equal(found.pictures[0], pictures()[0])
    np.testing.assert_array_equal(found.pictures[1], np.broadcast_to(one, (*SIZE, 3)))
    assert found.rounds.shape == (0, 2, *SIZE, 3)


def test_a_result_that_is_not_made_of_numbers_is_said(tokenizer, variables):
    """In 8 bits it would be black; of regions too."""
    broken = {**variables, "mmdit": jax.tree.map(lambda leaf: leaf * np.nan, variables["mmdit"])}
    for door, call in (
        (MMDiTRegenerator(short("rvr"), broken, tokenizer), lambda door: door.regenerate(pictures()[0], "x", rounds=2)),
        (Refiner(toy.model_config(), broken, tokenizer), lambda door: door.refine(pictures()[0], (9, 9, 40, 40), "x")),
    ):
        with pytest.raises(RefineError, match="result: holds values that are not finite"):
            call(door)


def test_the_picture_is_known_by_its_tokens_alone(tokenizer, variables):
    """Pixels that the encoder does not see are not seen, and the VAE's encoder is no part of the program; with the
    picture's latents in the stream both are otherwise, and what the encoder sees matters in either."""
    flat = np.full((*SIZE, 3), 128, np.uint8)
    checks = flat + (np.indices(SIZE).sum(0) % 2).astype(np.uint8)[..., None] * 2 - 1
    other = np.where(np.arange(64)[:, None, None] < 32, np.uint8(20), np.uint8(230)) + np.zeros_like(flat)
    model = short("rvr")
    views = [conditioning.view(x, None, (SIZE, *model.vl_sizes(1.0))) for x in (flat, checks, other)]
    np.testing.assert_array_equal(views[0], views[1])
    assert (checks != flat).all() and (views[0] != views[2]).all()

    broken = jax.tree_util.tree_map_with_path(
        lambda path, x: x * np.nan if path[0].key == "vae" and path[1].key in ("encoder", "quant_conv") else x,
        variables,
    )
    counts = [sum(np.isnan(x).any() for x in jax.tree.leaves(broken[name])) for name in ("mmdit", "vl", "vae")]
    assert counts[:2] == [0, 0] and 5 < counts[2] < len(jax.tree.leaves(broken["vae"]))

    def run(kind: str, weights, picture: np.ndarray) -> np.ndarray:
        model = short(kind)
        inputs = inputs_of(model, tokenizer, [picture, picture], 2)
        return np.asarray(quick(weights, {}, inputs, model=model, spec=spec_of(model)).pictures[0], int)

    base = run("rvr", variables, flat)
    np.testing.assert_array_equal(run("rvr", variables, checks), base)
    np.testing.assert_array_equal(run("rvr", broken, flat), base)
    assert (run("rvr", variables, other) != base).mean() > 0.05
    shown = run("rvr_vae", variables, flat)
    assert (run("rvr_vae", variables, checks) != shown).any()
    assert (run("rvr_vae", broken, flat) != shown).mean() > 0.5


def test_without_a_picture_none_is_seen(tokenizer, variables):
    """Text to image: what stands in the canvas does not matter, neither to the encoder nor as latents; only the row
    without a picture is painted from text alone."""
    model = short("rvr_vae")
    merge, grid = model.vl.vision.spatial_merge_size, model.vl_grid(1.0)
    inputs = inputs_of(model, tokenizer, pictures(), 1)
    alone = prompts.encode_prompt(tokenizer, model.prompt, PROMPTS[0], [grid], merge, [False])
    assert len(alone) < inputs["prompt"]["mask"][0].sum() and (alone.image_index < 0).all()
    run = lambda changes: np.asarray(
        quick(variables, {}, {**inputs, **changes}, model=model, spec=spec_of(model)).pictures, int
    )
    one = vars(prompts.pad_prompts([alone], LENGTH))
    prompt = {name: np.concatenate([one[name], value[1:]]) for name, value in inputs["prompt"].items()}
    negative = {name: np.concatenate([one[name], value[1:]]) for name, value in inputs["negative"].items()}
    first = dict(prompt=prompt, negative=negative, has_image=np.array([False, True]))
    found = run(first)
    other = inputs["pictures"].copy()
    other[0] = 255 - other[0]
    np.testing.assert_array_equal(run({**first, "pictures": other}), found)
    shown = run({})
    assert np.abs(found[1] - shown[1]).max() <= 1 < np.abs(found[0] - shown[0]).max()


# ------------------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("prompt", ["rvr-training", "rvr-inference"])
def test_the_manifest_says_it(tokenizer, prompt):
    model = made("rvr", tokenizer, prompt)
    again = ModelConfig.from_manifest(json.loads(json.dumps(model.to_manifest())))
    assert again == model and again.conditioning == "rvr" and again.pictures.seen == ()
    older = {k: v for k, v in toy.model_config().to_manifest().items() if k != "conditioning"}
    assert ModelConfig.from_manifest(json.loads(json.dumps(older))) == toy.model_config()
    with pytest.raises(RefineError, match="conditioning 'rrv': choose one of refine, rvr"):
        ModelConfig.from_manifest({**model.to_manifest(), "conditioning": "rrv"})


def test_a_model_is_used_for_what_it_was_made(tokenizer, variables):
    model = short("rvr")
    with pytest.raises(RefineError, match="refining: this model has conditioning 'rvr'"):
        Refiner(model, variables, tokenizer)
    inputs = inputs_of(model, tokenizer, pictures(), 1)
    with pytest.raises(RefineError, match="regenerating: this model has conditioning 'refine'"):
        regenerate.mmdit_program(
            variables, {}, inputs, model=dataclasses.replace(model, conditioning="refine"), spec=spec_of(model)
        )


@pytest.mark.parametrize("text", ["", "画一只猫", "一" * 10_000, "a cat " * 2000])
def test_prompts_of_any_length(tokenizer, text):
    """To be sampled, a prompt that is too long is an error; in training it loses its end."""
    model = made("rvr", tokenizer)
    grid = model.vl_grid(1.0)
    encode = lambda: prompts.encode_prompt(tokenizer, model.prompt, text, [grid], model.vl.vision.spatial_merge_size)
    fitted = model.fit_prompt(tokenizer, text, [grid], [True], 320)
    assert len(fitted) <= 320 and fitted.image_index.max() == merged_tokens(grid, 2) - 1
    told = []
    model.fit_prompt(tokenizer, text, [grid], [True], 320, lambda *cut: told.append(cut))
    most = model.prompt.drop_tokens + model.prompt.max_tokens
    assert [most] == [of for tokens, of in told if tokens > 320] if len(text) > 100 else not told
    with pytest.raises(RefineError, match="data.text_length 4: template and pictures alone take"):
        model.fit_prompt(tokenizer, text, [grid], [True], 4)
    if len(text) > 100:
        with pytest.raises(RefineError, match="prompt too long"):
            encode()
    else:
        np.testing.assert_array_equal(encode().ids, fitted.ids)
        assert text in tokenizer.decode(fitted.ids.tolist())


# ------------------------------------------------------------------------------------------------------------- the data


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_pairs_of_the_small_world():
    buckets = ((64, 64), (32, 32))
    batches = lambda **changes: loader.world_batches(5, 4, buckets, **changes)
    whole = [next(found) for found in [batches()] for _ in range(3)]
    for step, batch in enumerate(whole):
        side = buckets[step % 2][0]
        assert batch["image"].shape == batch["target"].shape == (4, side, side, 3)
        for row in range(4):
            pair = world.sample(5, 4 * step + row, "train", side)
            np.testing.assert_array_equal(batch["image"][row], pair["misaligned_image"])
            np.testing.assert_array_equal(batch["target"][row], pair["image"])
            assert loader.decode_instruction(batch["instruction"][row]) == pair["prompt"]
            assert world.check(batch["target"][row], pair["spec"]).correct or side < 64
    # Two hosts have its halves; a resumed run goes on.
    for host in range(2):
        part = batches(rows=(2 * host, 2 * host + 1))
        for batch in whole:
            same(next(part), {name: x[2 * host : 2 * host + 2] for name, x in batch.items()})
    resumed = batches()
    resumed.set_state({"step": 2})
    same(next(resumed), whole[2])
    with pytest.raises(RefineError, match="square"):
        loader.world_batches(0, 1, ((32, 64),))


def test_whole_records(tmp_path, monkeypatch):
    """Pictures of a dataset whole; masks and references are not opened."""
    dataset = records_toy.write(tmp_path / "data", 8, 1)
    monkeypatch.setattr(loader, "open_picture", None)
    monkeypatch.setattr(loader.pixels, "region", None)
    batches = loader.whole_batches(dataset, 0, 2, [(32, 32), (32, 64)], max_corrupt=0)
    seen = {}
    for _ in range(2 * batches.plan.steps):
        batch = next(batches)
        for k, row in enumerate(batch["instruction"]):
            number = int(loader.decode_instruction(row).split()[3])
            seen[number] = [batch[name][k] for name in ("image", "target")]
        assert set(batch) == {"image", "target", "instruction", "skipped"} and not batch["skipped"].any()
    assert set(seen) == set(range(8))
    for number, pair in seen.items():
        for array, source in zip(pair, records_toy.pair(number)):
            height, width = array.shape[:2]
            across = Image.fromarray(source).resize((width, len(source)), Image.Resampling.LANCZOS)
            np.testing.assert_array_equal(array, across.resize((width, height), Image.Resampling.LANCZOS))
    with pytest.raises(RefineError, match="max_corrupt"):
        loader.whole_batches(dataset, 0, 2, [(32, 32)], max_corrupt=-1)


# -------------------------------------------------------------------------------------------------------- the objective


def configuration(base, **changes):
    """The toy configuration that refines, switched."""
    config = toy.refine_config("")
    config.steps, config.save_every = 2, 2
    config.init_from, config.model, config.train_encoder = str(base), {}, False
    del config.boundary
    config.data = dict(source="world", buckets=((32, 32),), weights=(1.0,), text_length=320, workers=0)
    config.conditioning, config.prompt = "rvr", "rvr-training"
    config.instruction_dropout = 0.5
    for name, value in changes.items():
        with config.ignore_type():
            config[name] = value
    return config


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    toy.write_model(folder)
    return folder


LORA = dict(rank=2, alpha=6.0, targets=r"blocks/attn/to_(q|out)")


def test_the_loss_sees_tokens_alone(base):
    """The encoded batch holds the target and the tokens; the loss is the plain mean squared velocity error, and its
    gradient reaches the tokens."""
    objective = objectives.make(configuration(base))
    model, batches = objective.model, objective.batches()
    assert model.conditioning == "rvr"
    batch = next(batches)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    assert shapes == objective.batch_shapes()[0] and set(batch) == {"image", "target", "prompt", "has_image"}
    assert batch["has_image"].all()
    mixed = configuration(base)
    mixed.data.text_to_image = 0.5
    pairs = objectives.make(mixed).batches()
    shown = []
    for _ in range(8):
        row = next(pairs)
        read = (row["prompt"]["image_index"] >= 0).any(axis=1)
        np.testing.assert_array_equal(read, row["has_image"])
        shown += read.tolist()
    pairs.close()
    assert 2 < sum(shown) < 14
    mixed.data.text_to_image = 1.5
    with pytest.raises(RefineError, match="data.text_to_image 1.5"):
        objectives.make(mixed).batches()
    texts = objective.batches()
    variables = toy.random_variables(model, 1)
    encode = jax.jit(lambda batch: objectives.encode(model, variables, batch, None))
    encoded = encode(batch)
    assert set(encoded) == {"target", "text", "text_mask", "has_image"}
    other = encode({**batch, "image": 255 - batch["image"]})
    assert jnp.abs(other["text"] - encoded["text"]).max() > 1e-3
    np.testing.assert_array_equal(other["target"], encoded["target"])
    texts.close()
    batches.close()

    key = jax.random.key(2)

    @jax.jit
    def measured(text):
        return objectives.flow_loss(model, variables, {}, {**encoded, "text": text}, key, SIGMA, 9.0)

    (loss, parts), gradient = jax.value_and_grad(measured, has_aux=True)(encoded["text"])
    assert set(parts) == {"base"}
    k_sigma, k_noise = jax.random.split(key)
    z0 = encoded["target"]
    noise, level = jax.random.normal(k_noise, z0.shape), flow.sample_sigma(k_sigma, (len(z0),), **SIGMA)
    grid = (z0.shape[1] // 2, z0.shape[2] // 2)
    count = grid[0] * grid[1]
    context = conditioning.ImageTokens(
        jnp.zeros((2, 0, model.mmdit.in_channels)),
        jnp.asarray([image_positions([grid])] * 2),
        jnp.ones((2, count), bool),
        jnp.asarray([text_start([grid])] * 2),
    )
    x = flow.pack_latents((1 - level[:, None, None, None]) * z0 + level[:, None, None, None] * noise)
    evaluate = jax.jit(lambda *arguments: velocity(model, variables, {}, *arguments))
    predicted = evaluate(x, level, context, encoded["text"], encoded["text_mask"])
    wanted = jnp.mean((flow.unpack_latents(predicted, z0.shape[1:3]) - (noise - z0)) ** 2)
    np.testing.assert_allclose([loss, parts["base"]], [wanted] * 2, rtol=1e-5)
    real = np.asarray(encoded["text_mask"])
    assert (np.abs(gradient).max(-1)[real] > 0).all() and not np.asarray(gradient)[~real].any()


SIGMA = dict(distribution="logit_normal", shift=4.0)


def test_a_token_of_one_latent():
    """What a model of `patch_size` 1 is trained to predict, location by location."""
    model = short("rvr")
    channels = model.vae.z_dim
    model = dataclasses.replace(model, mmdit=dataclasses.replace(model.mmdit, patch_size=1, in_channels=channels))
    variables = toy.random_variables(model, 4)
    z0 = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 6, channels)), jnp.float32)
    text = jax.random.normal(jax.random.key(1), (2, 5, model.mmdit.joint_attention_dim))
    encoded = dict(target=z0, text=text, text_mask=jnp.ones((2, 5), bool))
    key = jax.random.key(2)
    loss, _ = jax.jit(lambda: objectives.flow_loss(model, variables, {}, encoded, key, SIGMA, 0.0))()
    k_sigma, k_noise = jax.random.split(key)
    noise, level = jax.random.normal(k_noise, z0.shape), flow.sample_sigma(k_sigma, (2,), **SIGMA)
    x = (1 - level[:, None, None, None]) * z0 + level[:, None, None, None] * noise
    context = conditioning.image_tokens(z0.shape, [], [], 1)
    predicted = velocity(
        model, variables, {}, x.reshape(2, 24, channels), level, context, text, encoded["text_mask"]
    ).reshape(z0.shape)
    np.testing.assert_allclose(loss, jnp.mean((predicted - (noise - z0)) ** 2), rtol=1e-5)


def test_a_lora_is_trained_and_carries_its_conditioning(base, tmp_path):
    """On a model that was made to refine: the file says what it is for. Fixed samples are painted on the way."""
    config = configuration(base, lora=LORA, ema_decay=0.0, pictures=dict(every=2, count=2))
    folder = train(config, tmp_path / "run", progress=False)
    with Image.open(tmp_path / "run" / "pictures" / "00000002.png") as grid:
        assert grid.size == (3 * (128 + 4), 2 * (128 + 4))  # misaligned, result, target
    file = folder / objectives.LORA_FILE
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["grad_norm"] > 0 for line in lines)
    assert {"loss", "base"} <= lines[0].keys() and not {"band", "inside"} & lines[0].keys()
    loaded = loading.load(base, adapters=file)
    assert loaded.config.conditioning == "rvr" and "Analyze the potential" in loaded.config.prompt.template
    assert loading.load(base).config.conditioning == "refine"
    with pytest.raises(RefineError, match="refining: this model has conditioning 'rvr'"):
        Refiner.load(base, lora=file)


def test_a_whole_model_is_trained_from_scratch_and_loads_back(base, tmp_path):
    """The switch in a configuration that has the encoder trained too; text to image alone, no picture is read."""
    scratch = toy.refine_config("").model.to_dict()
    changes = dict(init_from="", vae_from=str(base), model=scratch, train_encoder=True, prompt="rvr-inference")
    config = configuration(base, pictures=dict(every=2, count=1), **changes)
    config.data.text_to_image = 1.0
    shapes = objectives.make(config).batch_shapes()[0]
    assert set(shapes) == {"target", "prompt", "has_image"}
    folder = train(config, tmp_path / "run", progress=False)
    with Image.open(tmp_path / "run" / "pictures" / "00000002.png") as grid:
        assert grid.size == (2 * (128 + 4), 128 + 4)  # result, target
    loaded = loading.load(folder)
    expected = prompts.for_tokenizer(prompts.TEMPLATES["rvr-inference"], loaded.tokenizer)
    assert loaded.config.conditioning == "rvr" and loaded.config.prompt == expected
    with pytest.raises(RefineError, match="refining: this model has conditioning 'rvr'"):
        Refiner.load(folder)
    # Training it further needs no switch: the model says it.
    again = configuration(folder, conditioning="", prompt="")
    assert objectives.make(again).model.pictures == conditioning.CONDITIONINGS["rvr"]


def test_blocks_of_a_model_gone_on_from_need_not_be_scanned(base, tmp_path):
    """One block after another starts from the same numbers, whatever a start from scratch would set, and is written
    as it was read."""
    objective = objectives.make(configuration(base, scan=False, aligned_heads=(0, 0)))
    boxed = {"params": jax.eval_shape(objective.init, jax.random.key(0)), "frozen": objective.frozen}
    placed = {name: parallel.param_shardings(tree, None) for name, tree in boxed.items()}
    params = objective.initial(placed["params"])
    assert "blocks_0" in params["mmdit"] and "blocks" not in params["mmdit"]
    objective.export(params, objective.load(placed["frozen"]), tmp_path / "same")
    before, after = (load_file(folder / checkpoint.WEIGHTS) for folder in (base, tmp_path / "same"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


def test_features_learn_which_shape_is_where(base, tmp_path):
    """Representation alignment: what a block makes of the noisy picture is told the label map. What reads the labels is
    trained with the rest, kept over a resume, no part of the result, and taken up by a training that goes on."""
    config = configuration(base, scan=False, alignment=dict(block=1, weight=0.5), steps=4)
    config.data.text_to_image = 1.0
    assert objectives.make(config).batch_shapes()[0]["labels"].shape == (2, 8, 8, world.LABELS)
    halfway = ml_collections.ConfigDict(config.to_dict() | dict(steps=2))
    train(halfway, tmp_path / "run", progress=False)
    folder = train(config, tmp_path / "run", progress=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        np.testing.assert_allclose(row["loss"], row["base"] + 0.5 * row["alignment"], rtol=1e-5)
    np.testing.assert_allclose(rows[0]["alignment"], np.log(world.LABELS), rtol=1e-5)  # knows nothing yet
    assert rows[-1]["alignment"] < rows[0]["alignment"]
    before, after = (load_file(path / checkpoint.WEIGHTS) for path in (base, folder))
    assert before.keys() == after.keys()

    further = ml_collections.ConfigDict(config.to_dict() | dict(init_from=str(folder)))
    shardings = parallel.param_shardings(objectives.make(further).init(jax.random.key(0)), None)
    taken = objectives.make(further).initial(shardings)["alignment"]
    stored = load_file(folder / alignment.HEAD)
    assert np.abs(stored["kernel"]).max() > 0
    for name, value in stored.items():
        np.testing.assert_array_equal(taken[name], value)
    save_file({"kernel": stored["kernel"]}, folder / alignment.HEAD)
    with pytest.raises(RefineError, match="alignment.safetensors: has .* expected .*bias.*; remove it"):
        objectives.make(further).initial(shardings)
    (folder / alignment.HEAD).write_bytes(b"torn")
    with pytest.raises(RefineError, match="alignment.safetensors: cannot be read .*; remove it"):
        objectives.make(further).initial(shardings)

    plain = objectives.make(configuration(base, scan=False))
    with contextlib.closing(objectives.make(config).batches()) as batches:
        batch = jax.tree.map(jnp.asarray, next(batches))
    variables = toy.random_variables(plain.model)
    head = {"kernel": jax.random.normal(jax.random.key(1), (16, 4 * world.LABELS)), "bias": jnp.zeros(4 * world.LABELS)}
    error = lambda weight, where: objectives.flow_loss(
        plain.model,
        variables | {"alignment": head},
        {},
        objectives.encode(plain.model, variables, batch, None),
        jax.random.key(0),
        SIGMA,
        0.0,
        dict(block=where, weight=weight),
    )
    told = jax.jit(error, static_argnums=1)
    (total, parts), (_, others) = told(2.0, 0), told(2.0, 1)
    np.testing.assert_allclose(total, parts["base"] + 2.0 * parts["alignment"], rtol=1e-5)
    assert abs(parts["alignment"] - others["alignment"]) > 1e-3


@pytest.mark.parametrize(
    "changes,words",
    [
        (dict(alignment=dict(block=1, weight=0.5)), ("alignment.block 1", "scan=False")),
        (dict(alignment=dict(block=9, weight=0.5), scan=False), ("alignment.block 9", "0 to 1")),
        (dict(alignment=dict(block=1, weight=0.5), lora=LORA), ("alignment", "LoRA")),
        (dict(alignment=dict(weight=0.5), scan=False), ("block",)),
        (dict(prompt=""), ("conditioning 'rvr'", "set prompt", "rvr-training")),
        (dict(prompt="rvr"), ("prompt 'rvr'", "rvr-inference")),
        (dict(conditioning="both"), ("conditioning 'both'", "choose one of refine, rvr")),
        (dict(conditioning="refine"), ("data.source 'world'", "no pairs", "'refine'")),
        (dict(data=dict(source="synth")), ("data.source 'synth'", "no pairs", "'rvr'")),
        (dict(data=dict(source="cache")), ("data.source 'cache'", "no pairs", "'rvr'")),
        (dict(data=dict(source="web")), ("data.source 'web'", "world")),
    ],
)
def test_bad_settings(base, changes, words):
    with pytest.raises(RefineError) as error:
        objectives.make(configuration(base, **changes))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


def test_adapters_of_two_kinds_do_not_mix(base, tmp_path):
    config = loading.read_config(base)
    rng = np.random.default_rng(0)
    tree = {
        name: {"a": rng.standard_normal((2, 16, 2), np.float32), "b": np.ones((2, 2, 16), np.float32)}
        for name in ("to_q",)
    }
    files = {}
    for kind in ("refine", "rvr", "mute", "broken"):
        files[kind] = tmp_path / f"{kind}.safetensors"
        said = {} if kind == "mute" else {"refine_jax_conditioning": "{"}
        if kind in conditioning.CONDITIONINGS:
            said = loading.adapter_metadata(dataclasses.replace(config, conditioning=kind))
        loading.lora.write_adapter(files[kind], {"mmdit": {"blocks": {"attn": tree}}}, metadata=said)
    assert loading.load(base, adapters=[files["rvr"], files["mute"]]).config.conditioning == "rvr"
    assert loading.load(base, adapters=[files["refine"], files["mute"]]).config.conditioning == "refine"
    with pytest.raises(RefineError, match="'refine', adapters were trained refine.safetensors with 'refine', rvr"):
        loading.load(base, adapters=[files["refine"], files["rvr"]])
    with pytest.raises(RefineError, match="broken.safetensors.*damaged"):
        loading.load(base, adapters=files["broken"])


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_the_small_world_is_scored(variables, tmp_path, capsys):
    """Initial pictures and rounds, the same again from them, and as editing, where what is right is not touched."""
    template = prompts.PromptTemplate("<|im_start|>{}<|im_end|>", "<|image_pad|>", 1)
    model = dataclasses.replace(made("rvr", ModelConfig.byte_tokenizer()), prompt=template, steps=1, true_cfg_scale=1.0)
    folder = tmp_path / "model"
    checkpoint.save_model(folder, model.to_manifest(), variables)
    model.byte_tokenizer(folder / "tokenizer")
    command = ["evaluate", "--set", "world", "--model", str(folder), "--count", "3", "--batch", "2", "--quiet"]
    assert main([*command, "--rounds", "1", "--output", str(tmp_path / "a")]) == 0
    assert "| all | 3 |" in capsys.readouterr().out
    with np.load(tmp_path / "a" / "pictures.npz") as file:
        first, second = file["arr_0"], file["arr_1"]
    assert first.shape == second.shape == (3, *SIZE, 3) and (first != second).any()
    scored = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert set(scored["scores"]) == {"initial", "round 1"} and np.shape(scored["correct"]) == (2, 3)
    samples = [world.sample(small_world.WORLD_SEED, k, "eval") for k in range(3)]
    judged = [world.check(picture, sample["spec"]).correct for picture, sample in zip(second, samples)]
    assert judged == scored["correct"][1]
    with Image.open(tmp_path / "a" / "contact_sheet.png") as sheet:
        assert sheet.width > 64
    wide = dataclasses.replace(model, vae_area=4 * model.vae_area)
    checkpoint.save_model(tmp_path / "wide", wide.to_manifest(), variables)
    model.byte_tokenizer(tmp_path / "wide" / "tokenizer")
    with pytest.raises(RefineError, match="wide.*: paints a picture of 64x64 at 128x128; this set"):
        small_world.main(tmp_path / "wide", tmp_path / "b", count=3)
    # Pictures that are right stay as they are when they are edited.
    right = np.stack([sample["image"] for sample in samples[:2]] + [first[2]])
    (tmp_path / "given").mkdir()
    np.savez(tmp_path / "given" / "pictures.npz", right)
    again = ["--rounds", "1", "--initial", str(tmp_path / "given"), "--editing", "--output", str(tmp_path / "b")]
    assert main([*command, *again]) == 0
    with np.load(tmp_path / "b" / "pictures.npz") as file:
        np.testing.assert_array_equal(file["arr_1"][:2], right[:2])
        assert (file["arr_1"][2] != right[2]).any()
    capsys.readouterr()
    assert main([*command, "--initial", str(tmp_path), "--output", str(tmp_path / "c")]) == 2
    assert "no pictures.npz" in capsys.readouterr().err
    assert main([*command[:-4], "4", "--initial", str(tmp_path / "given"), "--output", str(tmp_path / "c")]) == 2
    assert "holds 3 pictures, 4 are wanted" in capsys.readouterr().err


def test_what_is_shown_to_teach_an_encoder_to_see():
    batch, aligned = (next(loader.world_batches(5, 4, pairs=pairs)) for pairs in ("reconstruct", "regenerate"))
    np.testing.assert_array_equal(batch["image"], batch["target"])
    np.testing.assert_array_equal(batch["target"], aligned["target"])
    assert not np.array_equal(aligned["image"], aligned["target"])
    np.testing.assert_array_equal(batch["instruction"], aligned["instruction"])
    with pytest.raises(RefineError, match="data.pairs 'repair': choose one of regenerate, edit, reconstruct"):
        loader.world_batches(5, 4, pairs="repair")


def test_an_editor_is_told_what_is_wrong():
    pair = world.sample(5, 3, "train", 64, 1.0)
    batch = next(loader.world_batches(5, 4, pairs="edit"))
    text = loader.decode_instruction(batch["instruction"][3])
    assert text == world.edit_instruction(pair["prompt"], pair["language"], pair["wrong"]) != pair["prompt"]
    assert text.endswith(pair["prompt"])
    np.testing.assert_array_equal(batch["image"][3], pair["misaligned_image"])
    assert world.edit_instruction("x", "en", ("colour", "count")) == "Correct the colour and number: x"
    assert (
        world.edit_instruction("x", "zh", ("text",)) == "修改文字：x" and world.edit_instruction("x", "en", ()) == "x"
    )
