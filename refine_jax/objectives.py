"""What can be trained: the VAE, the flow that refines or regenerates, and BAGEL (`bagel_objective`), whole or as LoRA.

An objective is a value that the trainer (`refine_jax.train`) drives; `make` builds the one that a configuration names.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from refine_jax import (
    alignment,
    cached_pictures,
    checkpoint,
    conditioning,
    executables,
    flow,
    loading,
    losses,
    parallel,
    prompts,
)
from refine_jax.bagel import BagelModel
from refine_jax.bagel_objective import bagel_objective
from refine_jax.convert import lora as lora_files
from refine_jax.data import cache, loader, synth, world
from refine_jax.data.prompted import Prompted
from refine_jax.data.records import Dataset, Record, open_picture
from refine_jax.errors import RefineError
from refine_jax.model import PUBLISHED, ModelConfig, encode_images, encode_prompts, encoded_context, velocity
from refine_jax.models.layers import init_lora, rotary_frequencies, scale_lora
from refine_jax.models.mmdit import MMDiTConfig, stack_blocks, unstack_blocks
from refine_jax.models.qwen_vae import QwenVAE, VAEConfig
from refine_jax.objective import LORA_FILE, Objective
from refine_jax.refine import Refiner
from refine_jax.regenerate import MMDiTRegenerator

# Of what has no mask.
_NO_BOUNDARY = ml_collections.FrozenConfigDict(dict(r_out=0, r_in=0, alpha=0.0))
# Seed of the pictures that a run shows; the held-out list has others.
_SAMPLES = 20_000
# Prompts of the small world that a tokenizer made for it has read.
_WORDINGS = 4000


def make(config: ml_collections.ConfigDict, model: ModelConfig | BagelModel | None = None) -> Objective:
    """The objective that `config.objective` names. Raises `RefineError` for an unknown one.

    model: the architecture, in place of the one that the model to start from has: then no file of weights is opened,
    and the objective serves to trace and to compile, not to run.
    """
    known = {
        "vae": vae_objective,
        "refine": functools.partial(refine_objective, model=model),
        "bagel": functools.partial(bagel_objective, model=model),
    }
    if config.objective not in known:
        raise RefineError(f"objective {config.objective!r}: choose one of {', '.join(known)}")
    if config.get("quantize") and not config.get("lora"):
        raise RefineError(f"quantize {config.quantize!r}: is of what a LoRA leaves frozen; set lora, or take it out")
    try:
        return known[config.objective](config)
    except (TypeError, AttributeError, KeyError) as error:  # a field too many or too few
        raise RefineError(
            f"configuration of the objective {config.objective!r}: {' '.join(str(error).split())}"
        ) from error


# ------------------------------------------------------------------------------------------------------------- VAE


def vae_objective(config: ml_collections.ConfigDict) -> Objective:
    """Reconstruction (squared and edge error) with a small KL term.

    loss = mse + edge·|∇x − ∇x̂| + kl·KL(q(z|x) ‖ N(0, 1)), means over elements, x in −1…1, ∇ forward differences. The
    export measures the latents' mean and standard deviation, a channel each, over `config.statistics_batches` batches.
    """
    vae_config = VAEConfig(**config.vae.to_dict())
    vae = QwenVAE(vae_config)
    data = config.data

    def batches(seed: int, rows: Sequence[int], split: str = "train", workers: int = data.workers) -> Iterator:
        source = data.get("source", "synth")
        return loader.vae_batches(seed, config.batch_size, data.size, split, source=source, workers=workers, rows=rows)

    def init(key: jax.Array) -> Any:
        return vae.init(key, jnp.zeros((1, data.size, data.size, 3), jnp.float32))["params"]

    def loss(params: Any, frozen: Any, batch: dict, key: jax.Array) -> tuple[jax.Array, dict]:
        x = conditioning.to_signed(batch["image"])
        mean, log_variance = vae.apply({"params": params}, x, method="encode")
        z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape, mean.dtype)
        y = vae.apply({"params": params}, z, clip=False, method="decode")
        error = x - y
        mse = jnp.mean(jnp.square(error))
        edge = jnp.mean(jnp.abs(jnp.diff(error, axis=1))) + jnp.mean(jnp.abs(jnp.diff(error, axis=2)))
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
        return mse + config.edge * edge + config.kl * kl, {"mse": mse, "edge": edge, "kl": kl}

    def export(params: Any, frozen: Any, folder: Path) -> None:
        @jax.jit
        def sample(x: jax.Array, key: jax.Array) -> jax.Array:
            mean, log_variance = vae.apply({"params": params}, x, method="encode")
            return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape, mean.dtype)

        # Of samples, not of means: a channel that carries nothing keeps its small mean, instead of being blown up to
        # the scale of the others.
        # The first process measures and writes; the others have given it their parts.
        params = jax.tree.map(parallel.fetch, params)
        if jax.process_index():
            return
        with contextlib.closing(batches(config.seed + 1, range(config.batch_size))) as iterator:
            keys = jax.random.split(jax.random.key(config.seed + 1), config.statistics_batches)
            z = [sample(conditioning.to_signed(next(iterator)["image"]), key) for key in keys]
        z = np.concatenate([np.asarray(v, np.float64).reshape(-1, vae_config.z_dim) for v in z])
        measured = dataclasses.replace(
            vae_config,
            latents_mean=tuple(round(float(v), 5) for v in z.mean(0)),
            latents_std=tuple(round(float(v), 5) for v in z.std(0)),
        )
        checkpoint.save_model(folder, {"vae": dataclasses.asdict(measured)}, {"vae": params})

    own = lambda: parallel.own_rows(config.batch_size, dict(config.mesh))
    return Objective(
        init=init,
        loss=loss,
        batches=lambda: batches(config.seed, own()),
        export=export,
        held_out=lambda: batches(config.seed, own(), "eval", workers=0),
    )


# ----------------------------------------------------------------------------------------------- boundary-weighted flow


def refine_objective(config: ml_collections.ConfigDict, model: ModelConfig | None = None) -> Objective:
    """Both papers' objective: rectified flow; for RefineAnything its error is weighted up at the mask's border.

    x_σ = (1−σ)·z0 + σ·ε, v = ε − z0, L = mean over locations of ‖v̂ − v‖²·(1 + α·B_c) / channels (`losses`).

    What the backbone is shown is `config.conditioning`, with `config.prompt`, a name of `prompts.TEMPLATES` (default:
    both the model's own): "refine", or "rvr", where pairs are (misaligned picture, aligned picture, prompt), whole, and
    a mask and `config.boundary` have no part. A share `config.data.text_to_image` of such pairs loses its misaligned
    picture: what remains is text to image.

    Starts from a model (`config.init_from`, whatever `Refiner.load` takes), or from scratch: then `config.model` is the
    architecture, and what is frozen comes from the model `config.vae_from`. Trained are a LoRA of the MMDiT where
    `config.lora` gives rank, alpha, targets (an expression for the paths of its dense layers), a fresh one or that of
    the file `config.lora.init_from`; otherwise the MMDiT, and the vision-language encoder too where
    `config.train_encoder` is set. Frozen weights and computation are `config.dtype`, trained ones float32; beside a
    LoRA the MMDiT's matrices may be in 8 bits, `config.quantize`.
    `config.alignment` (block, weight): see `alignment`. `config.remat`, `config.scan`: of the MMDiT's blocks, by
    default as the model has them.
    """
    adapter, data = config.get("lora"), config.data
    kinds = ("synth", "records", "cache", "world")
    if data.source not in kinds:
        raise RefineError(f"data.source {data.source!r}: choose one of {', '.join(kinds)}")
    cached = data.source == "cache"
    if cached and (config.train_encoder or not config.init_from):
        raise RefineError("data.source 'cache': the encoder must stay as it is; set init_from, and train_encoder=False")
    if adapter and config.train_encoder:
        raise RefineError("train_encoder: a LoRA leaves the encoder as it is; set it to False")
    trained = () if adapter else ("mmdit", "vl") if config.train_encoder else ("mmdit",)
    needed = ("mmdit",) if cached else ("mmdit", "vae", "vl")
    frozen = tuple(name for name in needed if name not in trained)
    source, model = _start(config, trained, model)
    masked = "mask" in model.pictures.read
    if data.get("reference_dropout") and (cached or not masked):
        reason = "a cache's tokens were made with the references" if cached else "pairs without a mask have none"
        raise RefineError(f"data.reference_dropout: {reason}; set it to 0")
    alone = not masked and data.get("text_to_image") == 1  # text to image and nothing else
    if data.source not in (("synth", "records", "cache") if masked else ("world", "records")):
        raise RefineError(f"data.source {data.source!r}: has no pairs for conditioning {model.conditioning!r}")
    boundary = config.boundary if masked else _NO_BOUNDARY
    aligned = config.alignment.to_dict() if config.get("alignment") else None
    if aligned:
        alignment.check(aligned, data.source, model, bool(adapter))
    boxed = model.boxed(frozen)

    def load(shardings: Any) -> Any:
        if cached and pictured:
            vae()  # read now, while no mesh is in force
        return read(frozen, shardings, config.dtype)

    def initial(shardings: Any) -> Any:
        if adapter:
            return parallel.put(loading.adapter_to_train(adapter, model, init), shardings)
        trees = read(trained, {name: shardings[name] for name in trained}, "float32")
        if aligned:
            head = alignment.read_head(source.folder, model, data.source)
            trees[alignment.NAME] = parallel.put(head, shardings[alignment.NAME])
        return trees

    def read(names: tuple[str, ...], shardings: Any, dtype: str) -> Any:
        progress = bool(config.init_from)
        if "mmdit" not in names or model.mmdit.scan:
            return source.parameters(model.abstract(names), shardings, dtype, progress=progress)
        stored = scanned(model)  # as every model folder is
        placed = shardings | {"mmdit": spread(stored.boxed(("mmdit",)))["mmdit"]}
        trees = source.parameters(stored.abstract(names), placed, dtype, progress=progress)
        return trees | {"mmdit": jax.jit(unstack_blocks, out_shardings=shardings["mmdit"])(trees["mmdit"])}

    def spread(boxed: Any) -> Any:
        return parallel.param_shardings(
            boxed, parallel.make_mesh(dict(config.mesh)), parallel.make_rules(dict(config.rules))
        )

    def init(key: jax.Array) -> Any:
        if adapter:
            base = model.boxed(("mmdit",))["mmdit"]
            return {"lora": {"mmdit": init_lora(key, base, adapter.targets, adapter.rank)}}
        params = model.init(key, trained)
        if config.get("aligned_heads") and not config.init_from:
            params["mmdit"] = aligned_heads(params["mmdit"], model.mmdit, config.aligned_heads)
        return params | ({alignment.NAME: alignment.new_head(model, data.source)} if aligned else {})

    def adapters(params: Any) -> Any:
        return scale_lora(params["lora"], adapter.alpha / adapter.rank) if adapter else {}

    buckets = [tuple(bucket) for bucket in data.buckets]
    pictured = (config.get("pictures") or {}).get("every")
    validated = (config.get("validation") or {}).get("every")
    viewed = data.get("validation") or data.get("path", "")  # what its pictures are of
    programs = executables.Store()

    @functools.cache
    def opened() -> dict[str, cache.Cache]:
        mesh = parallel.make_mesh(dict(config.mesh))
        wanted = cache.made_with(config, model, "")
        del wanted["weights"]
        keys = {data.path: "data.path"}
        if (pictured or validated) and viewed != data.path:
            keys[viewed] = "data.validation"
        for path, key in keys.items():
            cache.fitting_caches(path, wanted, key)  # what is wrong is said before the encoder is read
        wanted["weights"] = cache.fingerprint(cache.load_encoders(config, model, mesh, progress=True))
        return {path: cache.open_cache(path, wanted, key) for path, key in keys.items()}

    @functools.cache
    def vae() -> Any:
        return source.parameters(model.abstract(("vae",)), spread(model.boxed(("vae",))), config.dtype)["vae"]

    def batches() -> Iterator:
        if pictured and data.source == "records":
            Dataset(viewed)  # what is wrong is said before the first step
        return pairs_of(config, "train")

    def held_out() -> Iterator:
        if data.source in ("records", "cache") and os.path.realpath(viewed) == os.path.realpath(data.path):
            raise RefineError(
                f"validation.every {validated}: the loss is measured on pairs that are not trained on; set "
                f"data.validation to a {'cache' if cached else 'dataset'} of such"
            )
        still = ml_collections.ConfigDict(config.to_dict())
        still.instruction_dropout = 0.0
        still.data.update(path=viewed, workers=0, margin_jitter=0.0, reference_dropout=0.0)
        still.data.text_to_image = float(data.get("text_to_image", 0.0) == 1)  # all of it is no chance
        return pairs_of(still, "eval")

    def pairs_of(config: ml_collections.ConfigDict, split: str) -> Iterator:
        data, rows = config.data, parallel.own_rows(config.batch_size, dict(config.mesh))
        hosts = dict(rows=rows, workers=data.workers)
        if cached:
            found = opened()[data.path]
            dropout, limit = config.instruction_dropout, data.get("max_corrupt", 0.01)
            return cache.batches(found, config.seed, config.batch_size, dropout=dropout, max_corrupt=limit, **hosts)
        common = dict(seed=config.seed, batch_size=config.batch_size, buckets=buckets, **hosts)
        if data.source == "synth":
            pairs = loader.refine_batches(
                split=split,
                weights=data.get("weights") or None,
                reference_share=data.get("reference_share"),
                labels=bool(aligned),
                **common,
            )
        elif data.source == "world":
            kind = data.get("pairs", loader.WORLD_PAIRS[0])
            pairs = loader.world_batches(
                split=split, weights=data.get("weights") or None, pairs=kind, labels=bool(aligned), **common
            )
        elif not masked:
            pairs = loader.whole_batches(Dataset(data.path), max_corrupt=data.get("max_corrupt", 0.01), **common)
        else:
            pairs = loader.record_batches(
                Dataset(data.path),
                margin=model.margin,
                margin_jitter=data.get("margin_jitter", 0.0),
                reference_buckets=data.get("reference_buckets"),
                max_corrupt=data.get("max_corrupt", 0.01),
                **common,
            )
        return Prompted(pairs, model, source.tokenizer(), config, rows)

    def batch_shapes() -> list[dict[str, Any]]:
        rows, length, dtype = config.batch_size, data.text_length, jnp.dtype(config.dtype)
        shape = lambda dtype, *sides: jax.ShapeDtypeStruct((rows, *sides), dtype)
        prompt = dict(
            ids=shape(jnp.int32, length),
            mask=shape(jnp.bool_, length),
            positions=shape(jnp.int32, length, 3),
            image_index=shape(jnp.int32, length),
        )
        if cached:
            text = length - model.prompt.drop_tokens
            latents = ("target", "image", "reference", "mask")
            grids = [model.latent_size(bucket) for bucket in buckets]
            return [
                {name: shape(jnp.float32, *grid, model.vae.z_dim) for name in latents}
                | {name: shape(jnp.float32, *grid) for name in ("band", "region")}
                | dict(
                    has_reference=shape(jnp.bool_),
                    text=shape(dtype, text, model.mmdit.joint_attention_dim),
                    text_mask=shape(jnp.bool_, text),
                )
                for grid in grids
            ]
        shown = ("target",) if alone and not model.pictures.seen else ("image", "target")
        pictures = lambda bucket: {name: shape(jnp.uint8, *bucket, 3) for name in shown}
        around = lambda bucket: dict(
            reference=shape(jnp.uint8, *bucket, 3), mask=shape(jnp.uint8, *bucket), has_reference=shape(jnp.bool_)
        )
        there = dict(has_image=shape(jnp.bool_))
        grid = lambda bucket: [side // loader.LABEL_CELL for side in bucket]
        told = lambda bucket: (
            dict(labels=shape(jnp.uint8, *grid(bucket), loader.LABELS[data.source])) if aligned else {}
        )
        more = lambda bucket: (around(bucket) if masked else there) | told(bucket)
        return [pictures(bucket) | more(bucket) | dict(prompt=prompt) for bucket in buckets]

    def loss(params: Any, frozen: Any, batch: dict, key: jax.Array) -> tuple[jax.Array, dict]:
        variables = {**frozen, **params}
        encoded = batch if "text" in batch else encode(model, variables, batch, boundary)
        return flow_loss(model, variables, adapters(params), encoded, key, config.sigma, boundary.alpha, aligned)

    def export(params: Any, frozen: Any, folder: Path) -> None:
        if adapter:
            trees = jax.tree.map(parallel.fetch, adapters(params))
            if jax.process_index() == 0:
                said = {"base_model": str(config.init_from), **loading.adapter_metadata(model)}
                lora_files.write_adapter(folder / LORA_FILE, trees, metadata=said)
            return
        trees = {**frozen, **{name: params[name] for name in trained}}
        if cached:  # what was not needed is a part of the result all the same
            rest = ("vae", "vl")
            trees |= source.parameters(model.abstract(rest), spread(model.boxed(rest)), config.dtype)
        if not model.mmdit.scan:
            trees["mmdit"] = stack_blocks(trees["mmdit"])
        if jax.process_index() == 0:
            source.write_tokenizer(folder / "tokenizer")
        if aligned:
            head = jax.tree.map(parallel.fetch, params[alignment.NAME])
            if jax.process_index() == 0:
                alignment.write_head(folder, head)
        checkpoint.save_model(folder, scanned(model).to_manifest(), trees)

    def sampler(params: Any, frozen: Any, mesh: jax.sharding.Mesh, rules: Any) -> Callable:
        trees = {**frozen, **{name: params[name] for name in trained}}
        if cached:
            trees["vae"] = vae()
            return lambda found: cached_pictures.painted(model, trees, adapters(params), found, mesh, _SAMPLES)
        kind = Refiner if masked else MMDiTRegenerator
        door = kind(model, trees, source.tokenizer(), adapters(params), mesh=mesh, rules=rules, store=programs)
        return door.refine_batch if masked else door.generate_batch if alone else door.regenerate_batch

    def samples(count: int) -> list[dict[str, Any]]:
        if cached:
            rows = cache.rows(opened()[viewed], count)
            return cached_pictures.decoded(model, vae(), rows, parallel.make_mesh(dict(config.mesh)))
        if data.source == "records":
            found = _record_samples(Dataset(viewed), count)
            parallel.check_same("pictures", repr([sample["prompt"] for sample in found]))
            if masked:
                return found
            return [{name: sample[name] for name in ("image", "prompt", "target")} for sample in found]
        if data.source == "world":
            found = [world.sample(_SAMPLES, k, "eval", buckets[k % len(buckets)][0]) for k in range(count)]
            shown = lambda pair: {} if alone else {"image": pair["misaligned_image"]}
            return [dict(prompt=pair["prompt"], target=pair["image"], **shown(pair)) for pair in found]
        found = [synth.sample(_SAMPLES, k, buckets[k % len(buckets)], "eval") for k in range(count)]
        return [
            dict(
                image=pair["image"],
                mask_or_box=pair["mask"],
                prompt=pair["instruction"],
                reference=pair["reference"] if pair["has_reference"] else None,
                focus=False,
                target=pair["target"],
            )
            for pair in found
        ]

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
        batch_shapes=batch_shapes,
        sampler=sampler,
        samples=samples,
        model=model,
    )


def _record_samples(dataset: Dataset, count: int) -> list[dict[str, Any]]:
    """The first records of a dataset that can be used, as requests."""
    samples: list[dict[str, Any]] = []
    for number in range(len(dataset)):
        if len(samples) == count:
            break
        with contextlib.suppress(RefineError):
            samples.append(_record_sample(dataset[number]))
    if not samples:
        raise RefineError(f"{dataset.folder}: no record of it can be used; see refine-jax data check")
    return samples


def _record_sample(record: Record) -> dict[str, Any]:
    picture = lambda data, size, name: open_picture(data, size, name).convert("RGB")
    (width, height), (x1, y1, x2, y2) = record.size, record.box
    mask = np.zeros((height, width), np.uint8)
    mask[y1:y2, x1:x2] = np.asarray(open_picture(record.mask, (x2 - x1, y2 - y1), "mask")) > 0
    return dict(
        image=np.asarray(record.whole_image().convert("RGB")),
        mask_or_box=mask,
        prompt=record.instruction,
        reference=record.reference and picture(record.reference, record.reference_size, "reference"),
        target=np.asarray(picture(record.target, record.size, "target")),
    )


def _start(
    config: ml_collections.ConfigDict, trained: Sequence[str], model: ModelConfig | None
) -> tuple[Any, ModelConfig]:
    """Where the weights come from, and the architecture and conditioning as they are to be trained."""
    if config.init_from:
        if config.get("model"):
            raise RefineError("init_from and model are both set; leave one empty")
        source = None if model else loading.open_model(config.init_from)
        found = model or source.to_train()
        if not isinstance(found, ModelConfig):
            raise RefineError(
                f"init_from {config.init_from!r}: is a BAGEL or RvR model; train it with objective 'bagel'"
            )
        expected = config.get("variant")
        if expected and found.mmdit != PUBLISHED[expected].mmdit:
            raise RefineError(f"init_from {config.init_from!r}: its transformer is not that of {expected} (variant)")
    else:
        if config.get("lora"):
            raise RefineError("lora: nothing to adapt; set init_from")
        source = _Scratch(config.vae_from, **config.get("tokenizer", {}))
        found = model or source.architecture(config.model.to_dict())
    parts = {}
    for name in ("mmdit", "vae", "vl"):
        kind = "float32" if name in trained else config.dtype
        parts[name] = dataclasses.replace(getattr(found, name), dtype=config.dtype, param_dtype=kind)
    if config.get("quantize"):
        parts["mmdit"] = loading.quantized_part(parts["mmdit"], config.quantize)
    if config.get("remat"):
        parts["mmdit"] = dataclasses.replace(parts["mmdit"], remat=config.remat)
    if config.get("scan") is not None:
        parts["mmdit"] = dataclasses.replace(parts["mmdit"], scan=config.scan)
    settings = {name: config[name] for name in ("vae_area", "condition_area", "conditioning") if config.get(name)}
    if config.get("prompt"):
        if config.prompt not in prompts.TEMPLATES:
            raise RefineError(f"prompt {config.prompt!r}: choose one of {', '.join(prompts.TEMPLATES)}")
        template = prompts.TEMPLATES[config.prompt]
        # Without a source nothing is tokenised, and a published model's tokenizer is the one counted with.
        settings["prompt"] = prompts.for_tokenizer(template, source.tokenizer()) if source else template
    elif (settings.get("conditioning", found.conditioning) == "refine") != (found.conditioning == "refine"):
        raise RefineError(
            f"conditioning {config.conditioning!r}: the prompt of {config.init_from!r} is that of "
            f"{found.conditioning!r}; set prompt, one of {', '.join(prompts.TEMPLATES)}"
        )
    return source, dataclasses.replace(found, **parts, **settings)


@dataclasses.dataclass(frozen=True)
class _Scratch:
    """As `loading.Source`: what is frozen while the rest starts at random."""

    folder: str
    merges: int = 0

    def architecture(self, wanted: Mapping[str, Any]) -> ModelConfig:
        manifest = checkpoint.read_manifest(loading.resolve(self.folder))
        if "vae" not in manifest:
            raise RefineError(f"vae_from {self.folder!r}: holds no VAE; train one with configs/tiny_vae.py")
        return ModelConfig.from_manifest({**wanted, "vae": manifest["vae"]})

    def parameters(self, abstract: Any, shardings: Any, dtype: str, progress: bool = False) -> Any:
        return checkpoint.load_weights(loading.resolve(self.folder), abstract, dtype, shardings, progress)

    def tokenizer(self) -> Any:
        return ModelConfig.byte_tokenizer(None, *self._learned())

    def write_tokenizer(self, folder: Path) -> None:
        ModelConfig.byte_tokenizer(folder, *self._learned())

    def _learned(self) -> tuple[list[str], int]:
        return (world.wordings(_WORDINGS), self.merges) if self.merges else ([], 0)


def encode(
    model: ModelConfig, variables: Mapping[str, Any], batch: Mapping[str, Any], boundary: Any
) -> dict[str, jax.Array]:
    """All that the loss needs of a batch and that does not depend on the MMDiT: what `refine-jax data cache` keeps.

    Normalised latents `[B, h, w, C]` of `target` and of the condition images (`ModelConfig.pictures.seen`);
    conditioning tokens `text [B, T, D]`, `text_mask [B, T]`. Where there is a mask, `band`, `region [B, h, w]` in 0…1
    (`losses.to_latent_grid`); `has_reference`, `has_image [B]` as the batch has them.
    """
    pictures = dict(batch)
    if "mask" in batch:
        pictures["mask"] = jnp.repeat(batch["mask"][..., None], 3, axis=-1)
    names = ("target", *model.pictures.seen)
    encoded = dict(zip(names, encode_images(model, variables, [pictures[name] for name in names])))
    look = jax.vmap(lambda image: conditioning.view(image, None, model.vl_sizes(image.shape[1] / image.shape[0])))
    read = [look(pictures[name]) for name in model.pictures.read if name in pictures]
    [(encoded["text"], encoded["text_mask"])] = encode_prompts(model, variables, {}, [batch["prompt"]], read)
    if "mask" in batch:
        grid = encoded["target"].shape[1:3]
        band = losses.boundary_band(batch["mask"], boundary.r_out, boundary.r_in)
        encoded["band"] = losses.to_latent_grid(band, grid)
        encoded["region"] = losses.to_latent_grid(batch["mask"] > 0, grid)
    return encoded | {name: batch[name] for name in ("has_reference", "has_image", "labels") if name in batch}


def flow_loss(
    model: ModelConfig,
    variables: Mapping[str, Any],
    lora: Mapping[str, Any],
    encoded: Mapping[str, jax.Array],
    key: jax.Array,
    sigma: Any,
    alpha: float,
    aligned: Mapping[str, Any] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The boundary-weighted velocity error of what `encode` returned, at a random σ and noise: scalar, and its parts.

    sigma: distribution and shift of σ (`flow.sample_sigma`). Without a band every location weighs 1. aligned: block
    and weight of the label map's cross entropy (`alignment`): of `encoded["labels"]`, by `variables["alignment"]`.
    """
    z0 = encoded["target"].astype(jnp.float32)
    k_sigma, k_noise = jax.random.split(key)
    patch = model.mmdit.patch_size
    context = encoded_context(model, encoded, z0.shape)
    levels = flow.sample_sigma(k_sigma, (z0.shape[0],), **sigma)
    noise = jax.random.normal(k_noise, z0.shape, jnp.float32)
    x = flow.pack_latents(flow.noise_latents(z0, noise, levels), patch)
    inputs = (model, variables, lora, x, levels, context, encoded["text"], encoded["text_mask"])
    if aligned:
        prediction, features = velocity(*inputs, block=aligned["block"])
    else:
        prediction = velocity(*inputs)
    target = flow.pack_latents(flow.velocity_target(z0, noise), patch)
    band = encoded["band"] if "band" in encoded else jnp.zeros(z0.shape[:3])
    total, parts = losses.boundary_weighted_loss(
        prediction, target, band, encoded.get("region"), alpha=alpha, patch=patch
    )
    if "band" not in encoded:
        del parts["band"]
    channels = z0.shape[-1]
    total, parts = total / channels, {name: part / channels for name, part in parts.items()}
    if aligned:
        head, rows = variables[alignment.NAME], z0.shape[1] // patch
        parts["alignment"] = alignment.label_error(features, head, encoded["labels"], rows)
        total = total + aligned["weight"] * parts["alignment"]
    return total, parts


def scanned(model: ModelConfig) -> ModelConfig:
    """The same model with its MMDiT's blocks in one scan, nothing recomputed: what model folders hold."""
    return dataclasses.replace(model, mmdit=dataclasses.replace(model.mmdit, scan=True, remat=None))


def aligned_heads(params: Any, config: MMDiTConfig, frames: Sequence[int]) -> Any:
    """An initialisation for training from scratch: head k of every block looks at the same place `frames[k]` frames on.

    The biases of queries and keys outweigh their content, so that after the norm and the rotary embedding a score falls
    with the distance alone: where to copy from need not be found. Values only: the architecture is untouched. `params`:
    the MMDiT's, in their logical boxes, blocks not scanned.
    """
    if config.scan:
        raise RefineError("aligned_heads: needs model.mmdit.scan=False")
    if min(config.axes_dims_rope[1:]) < 6:
        raise RefineError(f"aligned_heads: axes_dims_rope {config.axes_dims_rope} has too few pairs; give 6 or more")
    if len(frames) > config.num_attention_heads:
        raise RefineError(f"aligned_heads: {len(frames)} frames for {config.num_attention_heads} heads")
    depth = config.attention_head_dim
    weight, angle, first = np.zeros(depth // 2), np.zeros(depth // 2), 0
    for axis, (dim, pairs) in enumerate(zip(config.axes_dims_rope, (1, 3, 3))):
        weight[first : first + pairs] = (0.25, 0.375, 0.375)[axis] / pairs  # the fastest turning pairs of the axis
        angle[first : first + dim // 2] = rotary_frequencies(dim) if axis == 0 else 0.0
        first += dim // 2
    size = 3.0 * np.sqrt(weight * depth)
    sharp = np.where(np.repeat(weight, 2) > 0, 2.0, 1.0).astype(np.float32)
    pattern = lambda turn: np.stack([size * np.cos(turn), size * np.sin(turn)], axis=-1).reshape(-1)
    heads = len(frames) * depth
    query = np.concatenate([pattern(frame * angle) for frame in frames]).astype(np.float32)
    key = np.tile(pattern(0.0 * angle), len(frames)).astype(np.float32)
    params = jax.tree.map(lambda x: x, params)
    for name in [name for name in params if name.startswith("blocks_")]:
        attention = params[name]["attn"]
        for kind, bias in (("q", query), ("k", key)):
            dense, norm = attention[f"to_{kind}"], attention[f"norm_{kind}"]
            dense["bias"] = dense["bias"].replace_boxed(dense["bias"].unbox().at[:heads].set(bias))
            dense["kernel"] = dense["kernel"].replace_boxed(dense["kernel"].unbox().at[:, :heads].multiply(0.3))
            norm["scale"] = norm["scale"].replace_boxed(norm["scale"].unbox() * sharp)
    return params
