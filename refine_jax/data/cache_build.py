"""`refine-jax data cache`: encode a dataset once with the frozen networks (`data.cache` says what is kept)."""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import msgpack
import numpy as np
from flax import linen as nn

from refine_jax import loading, objectives, parallel, prompts
from refine_jax.data import loader, writer
from refine_jax.data.cache import Cache, fingerprint, load_encoders, made_with
from refine_jax.data.plan import Plan
from refine_jax.data.prompted import Cut
from refine_jax.data.records import Dataset
from refine_jax.errors import RefineError
from refine_jax.model import ModelConfig

_ENTRIES = 128  # cached records a shard: some megabytes each


def build(
    config: ml_collections.ConfigDict, output: str | os.PathLike, batch: int = 8, progress: bool = False
) -> Cache:
    """Encode the dataset of `config.data` with the frozen networks of `config` into a folder under `output`.

    Runs in one process on its devices, over which weights and batches of `batch` records are sharded; continues after a
    kill with the first unfinished shard. Raises `RefineError` for a configuration that trains what would be cached or
    draws crops at random, for damaged records (what is finished stays), and as `writer.write_shards` does.
    """
    data = config.data
    if config.objective != "refine" or not config.init_from or config.get("train_encoder"):
        raise RefineError("data cache: needs a configuration that starts from a model and keeps its encoder frozen")
    if data.source != "records":
        raise RefineError(f"data cache: data.source is {data.source!r}; give 'records' and data.path, a dataset")
    if data.get("margin_jitter"):
        raise RefineError(f"data.margin_jitter {data.margin_jitter}: a cache holds one crop a record; set it to 0")
    if data.get("reference_dropout"):
        raise RefineError(f"data.reference_dropout {data.reference_dropout}: a cache keeps all references; set it to 0")
    if jax.process_count() > 1:
        raise RefineError("data cache: runs in one process; start it on one host")
    devices = jax.local_devices()
    if batch < 1 or batch % len(devices):
        raise RefineError(f"--batch {batch}: give a multiple of the {len(devices)} devices")
    model = objectives.make(config).model
    if model.conditioning != "refine":
        raise RefineError(f"data cache: is for masked pairs; conditioning {model.conditioning!r} trains from records")
    dataset = Dataset(data.path)
    buckets = [tuple(bucket) for bucket in data.buckets]
    references = [tuple(bucket) for bucket in data.get("reference_buckets") or buckets]
    plan = Plan(dataset.index, 0, config.batch_size, buckets, references, model.margin)

    mesh = parallel.make_mesh({"fsdp": len(devices)}, devices)
    variables = load_encoders(config, model, mesh, progress)
    recipe = {
        "model": made_with(config, model, fingerprint(variables)),
        "data": {
            "digest": dataset.digest,
            "buckets": buckets,
            "reference_buckets": references,
            "batch_size": config.batch_size,
        },
    }
    name = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    tokenizer = loading.open_model(config.init_from).tokenizer()
    encoder = _Encoder(config, model, dataset, plan, variables, tokenizer, mesh, batch)
    shards = -(-len(dataset) // _ENTRIES)
    how = dict(shards=shards, progress=progress, discard=False)
    with contextlib.closing(encoder):
        return writer.write_shards(Cache, Path(output) / name, encoder, len(dataset), recipe, **how)


class Band(NamedTuple):
    """The radii of the boundary band, in pixels."""

    r_out: int
    r_in: int


@functools.partial(jax.jit, static_argnames=("model", "band"))
def encode(
    variables: Mapping[str, Any], inputs: Mapping[str, Any], *, model: ModelConfig, band: Band
) -> dict[str, jax.Array]:
    """`objectives.encode` of inputs["pairs"] with inputs["prompt"]; with "silent", another prompt about the same
    pictures, its conditioning too, as silent, silent_mask: the pictures are encoded once."""
    pairs = inputs["pairs"]
    made = objectives.encode(model, variables, {**pairs, "prompt": inputs["prompt"]}, band)
    if "silent" in inputs:
        other = objectives.encode(model, variables, {**pairs, "prompt": inputs["silent"]}, band)
        made |= {"silent": other["text"], "silent_mask": other["text_mask"]}
    return made


class _Encoder:
    """Entries in the order of the groups; a batch of them is encoded when its first is asked for."""

    def __init__(self, config, model, dataset, plan, variables, tokenizer, mesh, batch):
        self._config, self._model, self._dataset, self._variables = config, model, dataset, variables
        self._tokenizer, self._mesh, self._batch = tokenizer, mesh, batch
        self._rules = parallel.make_rules(config.rules)
        members = [np.sort(numbers) for numbers in plan.members(0)]
        self._numbers, self._groups = np.concatenate(members), plan.groups
        self._starts = np.concatenate([[0], np.cumsum([len(numbers) for numbers in members])])
        self._band = Band(config.boundary.r_out, config.boundary.r_in)
        self._done: dict[int, tuple] = {}
        self._cut = Cut(config.data.text_length)

    def close(self) -> None:
        self._cut.close()

    def __call__(self, entry: int) -> tuple[list[int], bytes]:
        if entry not in self._done:
            group = int(np.searchsorted(self._starts, entry, "right")) - 1
            first = int(self._starts[group])
            first += (entry - first) // self._batch * self._batch
            self._done = self._encoded(range(first, min(first + self._batch, int(self._starts[group + 1]))), group)
        return self._done[entry]

    def _encoded(self, entries: range, group: int) -> dict[int, tuple]:
        size, reference_size = self._groups[group]
        config, model = self._config, self._model
        width = int(self._dataset.index[:, 8].max())
        chosen = [self._dataset[int(self._numbers[entry])] for entry in entries]
        rows = [loader.pair(record, size, reference_size, model.margin, width) for record in chosen]
        rows += [rows[-1]] * (self._batch - len(rows))
        pairs = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        texts = [loader.decode_instruction(row) for row in pairs.pop("instruction")]
        length, present = config.data.text_length, pairs["has_reference"].tolist()
        grids = [model.vl_grid(shape[1] / shape[0]) for shape in (size, reference_size, size)]
        read = lambda texts: vars(
            prompts.pad_prompts(
                [
                    model.fit_prompt(self._tokenizer, t, grids, [True, here, True], length, self._cut)
                    for t, here in zip(texts, present)
                ],
                length,
            )
        )
        inputs = {"pairs": pairs, "prompt": read(texts)}
        if config.get("instruction_dropout"):
            inputs["silent"] = read([model.negative_prompt] * len(rows))
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(self._rules):
            inputs = parallel.shard_batch(inputs, self._mesh)
            made = jax.device_get(encode(self._variables, inputs, model=model, band=self._band))
        done = {}
        for k, entry in enumerate(entries):
            arrays = {name: made[name][k] for name in ("target", "image", "mask", "band", "region")}
            arrays["text"] = made["text"][k][: int(made["text_mask"][k].sum())]
            if config.get("instruction_dropout"):
                arrays["negative"] = made["silent"][k][: int(made["silent_mask"][k].sum())]
            if present[k]:
                arrays["reference"] = made["reference"][k]
            for name, array in arrays.items():
                if not np.isfinite(array.astype(np.float32)).all():
                    raise RefineError(f"record {self._numbers[entry]}: {name} is not finite; compute in float32")
            packed = {name: (str(a.dtype), a.shape, np.ascontiguousarray(a).tobytes()) for name, a in arrays.items()}
            shown = reference_size if present[k] else (0, 0)
            done[entry] = ([int(self._numbers[entry]), *size, *shown], msgpack.packb(packed))
        return done
