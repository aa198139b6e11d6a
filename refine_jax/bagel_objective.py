"""Training BAGEL: packed sequences, the velocity of what is painted and the words of what is said.

The released recipe of RvR (arXiv 2604.25636): rectified flow on the pictures to be painted and cross entropy on the
answers of understanding data, in rows packed to a budget of tokens. The arithmetic of a row is that of
`train/pretrain_unified_navit.py` and `Bagel.forward` in the authors' code.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.linen import meta
from PIL import Image
from tqdm import tqdm

from refine_jax import bagel, checkpoint, executables, flow, loading, parallel
from refine_jax.bagel import BagelModel
from refine_jax.convert import lora as lora_files
from refine_jax.data import packing, sequences
from refine_jax.errors import RefineError
from refine_jax.model import PUBLISHED, ModelConfig
from refine_jax.models import siglip
from refine_jax.models.bagel import Bagel, BagelConfig, Segments, latent_position_ids
from refine_jax.models.layers import constrain, init_lora, scale_lora
from refine_jax.objective import LORA_FILE, Objective
from refine_jax.regenerate import Regenerator

# Tokens of the smallest block of an attention kernel.
_BLOCK = 128


def bagel_objective(config: ml_collections.ConfigDict, model: BagelModel | None = None) -> Objective:
    """L = mse_weight·MSE + ce_weight·CE on packed sequences (`data.packing`, `data.sequences`).

    MSE: of the velocity, a mean over features and over the tokens of all pictures to be painted in the global batch;
    t is drawn once a picture (`config.sigma`). CE: a mean over the tokens of all answers. The VAE is frozen; trained
    are all weights of the decoder and the tower, or a LoRA where `config.lora` gives rank, alpha, targets (an
    expression for the paths of dense layers), fresh or from the file `config.lora.init_from`. Trained weights are
    float32, the rest and the computation `config.dtype`, the decoder's frozen matrices in 8 bits with
    `config.quantize`. `config.pictures` shows pairs of the dataset
    `config.data.validation`, regenerated, or of the first source that regenerates, or else of the first that paints.

    Starts from a model folder or a BAGEL or RvR folder (`config.init_from`, `config.weights`), or at random with the
    architecture `config.model`. `config.conditioning`, `vae_sides`, `vit_sides` replace the model's where they are set.
    """
    adapter, data = config.get("lora"), config.data
    trained = () if adapter else ("bagel",)
    frozen = tuple(name for name in bagel.NETWORKS if name not in trained)
    source, model = _start(config, trained, model)
    boxed = model.boxed(frozen)
    buckets = [_bucket(model, tuple(size), data) for size in data.buckets]

    def init(key: jax.Array) -> Any:
        if adapter:
            base = model.boxed(("bagel",))["bagel"]
            return {"lora": {"bagel": init_lora(key, base, adapter.targets, adapter.rank)}}
        return model.init(key, trained)

    def load(shardings: Any) -> Any:
        return source.parameters(model.abstract(frozen), shardings, config.dtype, progress=bool(config.init_from))

    def initial(shardings: Any) -> Any:
        if adapter:
            return parallel.put(loading.adapter_to_train(adapter, model, init), shardings)
        return source.parameters(model.abstract(trained), shardings, "float32", progress=True)

    def adapters(params: Any) -> Any:
        return scale_lora(params["lora"], adapter.alpha / adapter.rank) if adapter else {}

    wording = sequences.Wording(bagel.SYSTEM_TRAINING, model.prompt, model.conditioning == "rvr_vae")
    programs = executables.Store()  # of all pictures that a run shows

    @functools.cache
    def sources() -> dict[str, sequences.Source]:
        return _sources(data, wording)

    def batches() -> Iterator:
        if (config.get("pictures") or {}).get("every"):
            shown()  # what is wrong is said before the first step
        return _batches(config, model, buckets, source.tokenizer(), sources())

    def held_out() -> Iterator:
        if not data.get("validation"):
            raise RefineError(
                "validation.every: the loss is measured on pairs that are not trained on; set data.validation to a "
                "dataset of such"
            )
        still = ml_collections.ConfigDict(config.to_dict())
        still.data.update(text_dropout=0.0, workers=0)
        still.data.sources = dict(validation=dict(weight=1.0))
        return _batches(still, model, buckets, source.tokenizer(), {"validation": shown()[1]})

    def batch_shapes() -> list[dict[str, Any]]:
        return [
            {
                name: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype)
                for name, (shape, dtype) in packing.shapes(bucket).items()
            }
            for bucket in buckets
        ]

    def loss(params: Any, fixed: Any, batch: dict, key: jax.Array) -> tuple[jax.Array, dict]:
        parts = packed_losses(model, {**fixed, **params}, adapters(params), batch, key, config.sigma)
        return config.mse_weight * parts["mse"] + config.ce_weight * parts["ce"], parts

    def export(params: Any, fixed: Any, folder: Path) -> None:
        if adapter:
            trees = jax.tree.map(parallel.fetch, adapters(params))
            if jax.process_index() == 0:
                lora_files.write_adapter(folder / LORA_FILE, trees, metadata={"base_model": str(config.init_from)})
            return
        if jax.process_index() == 0:
            source.write_tokenizer(folder / "tokenizer")
        plain = dataclasses.replace(model.bagel, remat=None, vit=dataclasses.replace(model.bagel.vit, remat=None))
        manifest = dataclasses.replace(model, bagel=plain).to_manifest()
        checkpoint.save_model(folder, manifest, {**fixed, **params})

    @functools.cache
    def shown() -> tuple[str, sequences.Source]:
        """(task, source) of what a run shows."""
        if data.get("validation"):
            return "rvr", sequences.Records(Path(data.validation), "rvr", wording)
        tasks = [(task, name) for task in ("rvr", "text_to_image") for name in sources()]
        for task, name in tasks:
            if data.sources[name].task == task:
                return task, sources()[name]
        raise RefineError("pictures: no source of data.sources is of the task rvr or text_to_image; leave pictures out")

    def sampler(params: Any, fixed: Any, mesh: jax.sharding.Mesh, rules: Any) -> Callable:
        trees = {**fixed, **{name: params[name] for name in trained}}
        settings = dict(mesh=mesh, rules=rules, store=programs)
        door = Regenerator(model, trees, source.tokenizer(), adapters(params), **settings)
        return door.regenerate_batch if shown()[0] == "rvr" else door.generate_batch

    def samples(count: int) -> list[dict[str, Any]]:
        task, pairs = shown()
        tokenizer, found, numbers = source.tokenizer(), [], []
        for number in range(len(pairs)):
            if len(found) == count:
                break
            try:
                items, pictures = pairs.sample(number)
                for item in items:
                    if isinstance(item, sequences.Text):
                        bagel.text_ids(tokenizer, item.text)
            except RefineError:  # of what cannot be used the batches tell
                continue
            numbers.append(number)
            *image, target = map(Image.fromarray, pictures)
            [*_, text] = [item.text for item in items if isinstance(item, sequences.Text)]
            if task == "rvr":
                found.append(dict(image=image[0], prompt=wording.said(text), target=target))
            else:
                height, width = model.painted_size((target.height, target.width))
                found.append(dict(prompt=text, size=(width, height), target=target))
        parallel.check_same("pictures", str(numbers))
        return found

    return Objective(
        init=init,
        loss=loss,
        batches=batches,
        export=export,
        frozen=boxed,
        load=load,
        adapts=bool(adapter),
        initial=initial if (adapter.get("init_from") if adapter else config.init_from) else None,
        held_out=held_out,
        share=functools.partial(shared_counts, model),
        batch_shapes=batch_shapes,
        sampler=sampler,
        samples=samples,
        model=model,
    )


# ------------------------------------------------------------------------------------------------------------- the loss


def packed_losses(
    model: BagelModel,
    variables: Mapping[str, Any],
    lora: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    sigma: Mapping[str, Any],
) -> dict[str, jax.Array]:
    """{"mse", "ce"} of a batch of packed rows (`packing.Rows`), scalars float32; 0 where nothing is scored.

    sigma: the distribution of t, as `flow.sample_sigma` takes it.
    """
    k_vae, k_time, k_noise = jax.random.split(key, 3)
    rows, pictures = batch["painted_pixels"].shape[:2]
    # One picture of each row at a time: activations of the VAE's first layers are large.
    encode = lambda part: bagel.encode_images(model, variables, part[0].astype(jnp.float32), part[1])
    latents = jax.lax.map(encode, (batch["painted_pixels"].swapaxes(0, 1), jax.random.split(k_vae, pictures)))
    clean = latents.swapaxes(0, 1).reshape(rows, -1, model.bagel.latent_dim)
    t = flow.sample_sigma(k_time, (rows, pictures), **sigma)
    return row_losses(model, variables, lora, batch, clean, jax.random.normal(k_noise, clean.shape, jnp.float32), t)


def row_losses(
    model: BagelModel,
    variables: Mapping[str, Any],
    lora: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    clean: jax.Array,
    noise: jax.Array,
    t: jax.Array,
) -> dict[str, jax.Array]:
    """`packed_losses` behind its draws: clean latent tokens of M pictures a row and their noise `[B, M·N, p·p·C]`, t
    `[B, M]`, which counts for pictures that are to be painted."""
    cfg = model.bagel
    rows, pictures, height, width, _ = batch["painted_pixels"].shape
    grid = model.grid((height, width))
    tokens = grid[0] * grid[1]
    noisy = batch["painted_noisy"] & (batch["painted_sample"] >= 0)
    t = jnp.where(noisy, t, 0.0)
    mixed = jnp.repeat(t, tokens, axis=1)[..., None]
    scored = jnp.repeat(noisy, tokens, axis=1)

    seen = batch["seen_pixels"]
    patches = siglip.pixels_to_patches(seen.reshape(-1, *seen.shape[2:]), cfg.vit)
    patches = patches.reshape(rows, seen.shape[1], *patches.shape[1:])
    view = tuple(side // cfg.vit.patch_size for side in seen.shape[2:4])
    cells = np.broadcast_to(siglip.position_ids(*view, cfg.vit), patches.shape[:3])
    places = np.tile(latent_position_ids(grid, cfg), pictures)

    network = Bagel(cfg)
    weights = {"params": variables["bagel"], "lora": lora.get("bagel", {})}
    text, viewed, painted = row_segments(model, batch)
    hidden, velocity = network.apply(
        weights,
        batch["text_ids"],
        text,
        patches,
        jnp.asarray(cells),
        viewed,
        (1 - mixed) * clean + mixed * noise,
        t,
        jnp.broadcast_to(places, scored.shape),
        painted,
        one_target=True,
    )
    error = jnp.mean(jnp.square(velocity - (noise - clean)), axis=-1)
    lost = {"mse": jnp.where(scored, error, 0.0), "ce": _cross_entropy(network, weights, hidden, batch)}
    told = {name: batch[f"{name}_count"][0] for name in lost if f"{name}_count" in batch}
    counts = told or _counts(model, batch)
    return {name: jnp.sum(value) / counts[name] for name, value in lost.items()}


def _counts(model: BagelModel, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Over how many tokens, at least 1, each loss of a batch of packed rows is a mean."""
    pictures = batch["painted_noisy"] & (batch["painted_sample"] >= 0)
    tokens = math.prod(model.grid(batch["painted_pixels"].shape[2:4]))
    found = {"mse": tokens * jnp.sum(pictures), "ce": jnp.sum(batch["text_scored"] >= 0)}
    return {name: jnp.maximum(count, 1).astype(jnp.float32) for name, count in found.items()}


def shared_counts(model: BagelModel, batch: Mapping[str, jax.Array], parts: int) -> dict[str, jax.Array]:
    """The batch with entries "mse_count" and "ce_count" [B] that make `row_losses` of its parts have, as their mean,
    that of the whole, whatever each part holds."""
    rows = len(batch["text_scored"])
    shares = {f"{name}_count": jnp.full(rows, count / parts) for name, count in _counts(model, batch).items()}
    return {**batch, **shares}


def row_segments(model: BagelModel, batch: Mapping[str, jax.Array]) -> tuple[Segments, Segments, Segments]:
    """What the tokens of packed rows are: of the text, of the pictures that the tower sees, of those in latents."""
    text = Segments(**{name: batch[f"text_{name}"] for name in (*packing.PLACES, "causal", "noisy")})
    view, size = batch["seen_pixels"].shape[2:4], batch["painted_pixels"].shape[2:4]
    patches, latents = math.prod(view) // model.bagel.vit.patch_size**2, math.prod(model.grid(size))
    return text, picture_segments(batch, "seen", patches), picture_segments(batch, "painted", latents)


def even_row(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """One row of a batch of these shapes, full: samples as `apart` has them, a prompt, a view, a prompt, a target."""
    [text], [pictures, *seen], [_, *painted] = (
        batch[name].shape[1 : 1 + rank] for name, rank in (("text_ids", 1), ("seen_pixels", 3), ("painted_pixels", 3))
    )
    row = packing.Row(packing.Bucket(tuple(painted), tuple(seen), pictures, text, batch["text_scored"].shape[1]))
    share = text // pictures - 4  # without the marks of two pictures
    halves = sequences.Text("x" * (share // 2)), sequences.Text("x" * (share - share // 2))
    items = (halves[0], sequences.Seen(0), halves[1], sequences.Painted(1))
    views = [np.zeros((*size, 3), np.uint8) for size in (seen, painted)]
    for sample in range(pictures):
        row.add(sample, items, views, lambda text: np.zeros(len(text), np.int32), (0, 0))
    return {name: value[None] for name, value in row.arrays().items()}


def apart(batch: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch with every pair of its pictures in a row of its own, and its share of the text.

    What a packed row needs: no sample sees another, whatever a kernel computes of that.
    """
    pictures = batch["painted_pixels"].shape[1]

    def shape(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
        rows, count, *rest = leaf.shape
        each = count // pictures if name.startswith("text") else 1
        return jax.ShapeDtypeStruct((rows * pictures, each, *rest), leaf.dtype)

    return {name: shape(name, leaf) for name, leaf in batch.items()}


def picture_segments(batch: Mapping[str, jax.Array], name: str, tokens: int) -> Segments:
    """The segments of the tokens of a row's pictures, `tokens` each."""
    spread = {key: jnp.repeat(batch[f"{name}_{key}"], tokens, axis=1) for key in packing.PLACES}
    absent = jnp.zeros(spread["sample"].shape, bool)
    noisy = jnp.repeat(batch[f"{name}_noisy"], tokens, axis=1) if name == "painted" else absent
    return Segments(**spread, causal=absent, noisy=noisy)


def _cross_entropy(
    network: Bagel, weights: Mapping[str, Any], hidden: jax.Array, batch: Mapping[str, jax.Array]
) -> jax.Array:
    """-log p of the tokens that follow those of `text_scored`, 0 elsewhere; only for them are logits made."""
    at = jnp.maximum(batch["text_scored"], 0)
    # Logits of a part of the tokens on each of the chips that share a row.
    taken = constrain(jnp.take_along_axis(hidden, at[..., None], axis=1), "batch", "text_length", "act_embed")
    labels = jnp.take_along_axis(jnp.roll(batch["text_ids"], -1, axis=1), at, axis=1)
    logits = network.apply(weights, taken, method=Bagel.logits)
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    scored = batch["text_scored"] >= 0
    return jnp.where(scored, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0)


# ------------------------------------------------------------------------------------------------------------- the data


def _bucket(model: BagelModel, size: tuple[int, int], data: Any) -> packing.Bucket:
    """As many pictures of both kinds as `data.tokens` hold beside `data.text_length` tokens of text.

    Of these it takes up to `_BLOCK` - 1 less, so that the stream of text and seen pictures is a whole number of a
    kernel's blocks and divides evenly over a mesh.
    """
    if any(side % model.stride or side < model.stride for side in size):
        raise RefineError(f"data.buckets: {size}: give sides that are multiples of {model.stride}")
    latent_position_ids(model.grid(size), model.bagel)  # refuses what is too large
    seen = model.seen_size(size)
    patches = math.prod(seen) // model.bagel.vit.patch_size**2
    pair = math.prod(model.grid(size)) + patches
    if data.tokens - data.text_length < pair:
        raise RefineError(
            f"data.tokens {data.tokens}: a pair of pictures of {size} takes {pair} tokens, and text {data.text_length} "
            "(data.text_length); give more, or smaller buckets"
        )
    pictures = (data.tokens - data.text_length) // pair
    text = data.text_length - (data.text_length + pictures * patches) % _BLOCK
    if text < 1:
        raise RefineError(f"data.text_length {data.text_length}: give at least {_BLOCK}")
    return packing.Bucket(size, seen, pictures, text, data.answer_length)


def _sources(data: Any, wording: sequences.Wording) -> dict[str, sequences.Source]:
    """Those of `config.data.sources` that have a weight, opened, by their names."""
    named = {name: settings.to_dict() for name, settings in data.sources.items()}
    for name, settings in named.items():
        weight = settings["weight"] = float(settings.get("weight", 1.0))
        if not 0 <= weight < math.inf:
            raise RefineError(f"data.sources.{name}.weight {weight}: give a number of at least 0; 0 leaves it out")
    used = {name: settings for name, settings in named.items() if settings["weight"]}
    if not used:
        raise RefineError("data.sources: none with a weight above 0; give one")
    speaks = jax.process_index() == 0
    return {name: sequences.open_source(name, settings, wording, speaks) for name, settings in used.items()}


def _batches(
    config: ml_collections.ConfigDict,
    model: BagelModel,
    buckets: list[packing.Bucket],
    tokenizer: Any,
    opened: Mapping[str, sequences.Source],
) -> Iterator:
    data, names, sources = config.data, list(opened), tuple(opened.values())
    encode = functools.partial(bagel.text_ids, tokenizer)
    marks = bagel.Marks.of(tokenizer)
    weights = [float(data.sources[name].get("weight", 1.0)) for name in names]
    speaks = jax.process_index() == 0
    # The texts around the prompts come again and again.
    tokens = functools.lru_cache(maxsize=64)(lambda text: len(encode(text)))
    indices = [source.index(tokens) for source in sources]
    digest = packing.digest(indices)
    parallel.check_same(f"data.sources ({', '.join(names)})", digest)  # others would come to another plan
    plan = packing.Packing(
        indices,
        weights,
        config.batch_size,
        buckets,
        config.seed,
        model.painted_size,
        names,
    )
    for name, source, left in zip(names, sources, plan.left_out):
        if speaks and (unusable := getattr(source, "corrupt", [])):
            tqdm.write(f"data.sources.{name}: {len(unusable)} samples left out, {unusable[0]}", file=sys.stderr)
        if speaks and left:
            room = (
                f"{buckets[0].pictures} pictures, {data.text_length} tokens of text or {data.answer_length} of answers"
            )
            tqdm.write(f"data.sources.{name}: {left} samples left out, longer than {room}", file=sys.stderr)
    make = packing.Rows(
        plan,
        sources,
        encode,
        (marks.image_start, marks.image_end),
        data.get("text_dropout", 0.0),
        config.seed,
    )
    hosts = dict(rows=parallel.own_rows(config.batch_size, dict(config.mesh)), workers=data.workers)
    return packing.PackedBatches(make, config.batch_size, data.get("max_corrupt", 0.01), digest, **hosts)


# ------------------------------------------------------------------------------------------------------------ the start


def _start(
    config: ml_collections.ConfigDict, trained: tuple[str, ...], model: BagelModel | None
) -> tuple[Any, BagelModel]:
    """Where the weights come from, and the architecture as it is to be trained."""
    if config.init_from:
        if config.get("model"):
            raise RefineError("init_from and model are both set; leave one empty")
        source = None if model else loading.open_model(config.init_from, weights=config.get("weights") or None)
        found = model or source.config
        if not isinstance(found, BagelModel):
            raise RefineError(
                f"init_from {config.init_from!r}: is no BAGEL or RvR model; train it with objective 'refine'"
            )
        expected = config.get("variant")
        if expected and _plain(found.bagel) != _plain(PUBLISHED[expected].bagel):
            raise RefineError(f"init_from {config.init_from!r}: its network is not that of {expected} (variant)")
    else:
        if config.get("lora"):
            raise RefineError("lora: nothing to adapt; set init_from")
        source = None
        found = model or BagelModel.from_manifest(config.model.to_dict())
    kinds = dict(dtype=config.dtype, param_dtype="float32" if "bagel" in trained else config.dtype)
    remat = dict(remat=config.remat) if config.get("remat") else {}
    tower = dataclasses.replace(found.bagel.vit, **kinds, **remat)
    settings = {name: config[name] for name in ("vae_sides", "vit_sides", "conditioning") if config.get(name)}
    made = dataclasses.replace(
        found,
        bagel=dataclasses.replace(found.bagel, vit=tower, **kinds, **remat),
        vae=dataclasses.replace(found.vae, dtype=config.dtype, param_dtype=config.dtype),
        **settings,
    )
    if config.get("quantize"):
        made = dataclasses.replace(made, bagel=loading.quantized_part(made.bagel, config.quantize))
    return source if config.init_from else _Scratch(made, config.seed), made


def _plain(config: BagelConfig) -> BagelConfig:
    """The architecture alone."""
    same = dict(dtype="float32", param_dtype="float32", remat=None, scan=True, attention_impl="auto")
    return dataclasses.replace(config, vit=dataclasses.replace(config.vit, **same), **same)


@dataclasses.dataclass(frozen=True)
class _Scratch:
    """As `loading.Source`, where nothing is given: to try the machinery; a random VAE is of no use."""

    model: BagelModel
    seed: int

    def parameters(self, abstract: Any, shardings: Any, dtype: str, progress: bool = False) -> Any:
        make = lambda key: meta.unbox(self.model.init(key, tuple(abstract)))
        return jax.jit(make, out_shardings={name: shardings[name] for name in abstract})(jax.random.key(self.seed))

    def tokenizer(self) -> Any:
        return ModelConfig.byte_tokenizer()

    def write_tokenizer(self, folder: Path) -> None:
        ModelConfig.byte_tokenizer(folder)
