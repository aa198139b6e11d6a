"""A cache of what the frozen networks make of a dataset: latents and conditioning tokens, for training without them.

`cache_build` encodes every record once (`objectives.encode`) and keeps the result as shards (`records.Shards`) in a
folder named by what it was made of: the dataset's digest, the weights of the VAE and of the encoder, the sizes, the
prompt template. `batches` yields it in the order and form that the objective takes. A cache of other weights is
refused.

A cached record is a msgpack map of arrays, each (dtype, shape, bytes): target, image, mask and, where there is one,
reference `[h, w, C]`; text `[t, D]`, without padding; negative `[t', D]`, the conditioning without an instruction
(only where the configuration drops instructions); band, region `[h, w]`.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import msgpack
import numpy as np
from flax.linen import meta

from refine_jax import loading, parallel
from refine_jax.data import loader
from refine_jax.data.plan import Plan
from refine_jax.data.records import MANIFEST, CorruptRecord, Shards
from refine_jax.errors import RefineError
from refine_jax.model import ModelConfig

_FROZEN = ("vae", "vl")


class Cache(Shards):
    """An open cache. index: [N, 5] int32, the record's number and the sizes of its buckets (0: no reference)."""

    format, version = "refine_jax cache", 1
    columns = ("record", "height", "width", "reference_height", "reference_width")

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """The arrays of an entry. Raises `CorruptRecord` where they are damaged."""
        try:
            fields = msgpack.unpackb(self.read(number)).items()
            return {name: np.frombuffer(data, jnp.dtype(kind)).reshape(shape) for name, (kind, shape, data) in fields}
        except Exception as error:  # msgpack and numpy raise nearly anything for foreign bytes
            raise self.corrupt(number, error) from None


# -------------------------------------------------------------------------------------------------------- what it is of


def fingerprint(tree: Any) -> str:
    """A checksum of arrays, wherever their parts are: the same on any mesh. Sixteen hexadecimal digits."""
    digest = hashlib.sha256()
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(tree), key=lambda item: jax.tree_util.keystr(item[0])):
        sums = np.asarray(_mixed(jnp.asarray(leaf)))
        digest.update(repr((jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), sums.tolist())).encode())
    return digest.hexdigest()[:16]


@jax.jit
def _mixed(leaf: jax.Array) -> jax.Array:
    """Two sums, modulo 2³², of the bits of every element mixed with its place. Sums of integers have no order."""
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32)
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, side in enumerate(leaf.shape):
        place = place * jnp.uint32(side) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    sums = []
    for salt in (0x9E3779B1, 0x85EBCA77):
        x = bits * jnp.uint32(salt) + place * jnp.uint32(0xC2B2AE3D)
        x = (x ^ (x >> 15)) * jnp.uint32(0x2C1B3C6D)
        x = (x ^ (x >> 12)) * jnp.uint32(0x297A2D39)
        sums.append(jnp.sum(x ^ (x >> 15), dtype=jnp.uint32))
    return jnp.stack(sums)


def made_with(config: ml_collections.ConfigDict, model: ModelConfig, weights: str) -> dict[str, Any]:
    """What decides a record's encoding besides its pictures, as JSON values; weights: `fingerprint` of VAE and encoder.

    A cache serves a configuration where these are equal.
    """
    values = dict(
        weights=weights,
        vae=dataclasses.asdict(model.vae),
        encoder=dataclasses.asdict(model.vl),
        prompt=dataclasses.asdict(model.prompt),
        condition_area=model.condition_area,
        multiple=model.multiple,
        margin=model.margin,
        text_length=config.data.text_length,
        negative=model.negative_prompt if config.get("instruction_dropout") else None,
        boundary=[config.boundary.r_out, config.boundary.r_in],
        dtype=config.dtype,
    )
    return json.loads(json.dumps(values))


def load_encoders(
    config: ml_collections.ConfigDict, model: ModelConfig, mesh: jax.sharding.Mesh | None = None, progress: bool = False
) -> dict[str, Any]:
    """The parameters of the VAE and the encoder of `config.init_from`, on the mesh."""
    shardings = parallel.param_shardings(model.boxed(_FROZEN), mesh, parallel.make_rules(config.rules))
    source = loading.open_model(config.init_from)
    return source.parameters(meta.unbox(model.boxed(_FROZEN)), shardings, config.dtype, progress)


# ------------------------------------------------------------------------------------------------------------- reading


def open_cache(folder: str | os.PathLike, wanted: Mapping[str, Any], key: str = "data.path") -> Cache:
    """The cache in `folder`, or the one below it, that was made with `wanted` (`made_with`). key: named in errors.

    Raises `RefineError` where there is none, naming how the nearest differs, or where several datasets' are.
    """
    fitting = fitting_caches(folder, wanted, key)
    if len(fitting) > 1:
        names = ", ".join(str(cache.folder) for cache in fitting)
        raise RefineError(f"{key} {str(folder)!r}: several caches fit: {names}; name one")
    return fitting[0]


def fitting_caches(folder: str | os.PathLike, wanted: Mapping[str, Any], key: str = "data.path") -> list[Cache]:
    """`open_cache`, but all that fit, of which there is one at least. `wanted` may be a part of `made_with`."""
    folder = Path(folder)
    places = [folder] if (folder / MANIFEST).is_file() else sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    if not places:
        raise RefineError(f"{key} {str(folder)!r}: no finished cache there; build one with `refine-jax data cache`")
    found = [Cache(place) for place in places]
    off = [[k for k, v in wanted.items() if c.manifest["recipe"]["model"].get(k) != v] for c in found]
    fitting = [cache for cache, names in zip(found, off) if not names]
    if not fitting:
        names = min(off, key=len)
        was = found[off.index(names)].manifest["recipe"]["model"]
        shown = "; ".join(f"{k} was {_short(was.get(k))}, is {_short(wanted[k])}" for k in names)
        raise RefineError(f"{key} {str(folder)!r}: made with another model or settings ({shown}); build it again")
    return fitting


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclasses.dataclass(frozen=True)
class _Entries:
    dataset: Cache
    plan: Plan
    length: int
    dropout: float

    def read(self, number: int) -> str:
        """As a dataset's records (`loader.RecordBatches`)."""
        return f"entry of {len(self.dataset[number])} arrays"

    def __call__(self, step: int, row: int) -> dict[str, np.ndarray]:
        found, attempt = loader.first_usable(self.plan, step, row, self.dataset.__getitem__)
        entry = {**found, "skipped": np.int32(attempt)}
        # The draw of the online loader: one a row of the global batch.
        draw = np.random.default_rng([self.plan.seed, step, 0]).random(self.plan.batch_size)[row]
        silent = entry.pop("negative", None)
        text = silent if draw < self.dropout else entry["text"]
        (across, _), reference = self.plan.group(step)
        absent = tuple(side * entry["image"].shape[0] // across for side in reference)
        return _row({**entry, "text": text}, self.length, absent)


def _row(entry: Mapping[str, np.ndarray], length: int, absent: tuple[int, int]) -> dict[str, np.ndarray]:
    """An entry as the objective takes it: text padded to `length`, and where there is no reference zeros, `absent`."""
    text, latent = entry["text"], entry["image"]
    padded = np.zeros((length, text.shape[1]), text.dtype)
    padded[: len(text)] = text
    reference = entry.get("reference", np.zeros((*absent, latent.shape[2]), latent.dtype))
    has, mask = np.bool_("reference" in entry), np.arange(length) < len(text)
    return {**entry, "reference": reference, "has_reference": has, "text": padded, "text_mask": mask}


def rows(cache: Cache, count: int) -> list[dict[str, np.ndarray]]:
    """The first entries that can be read, up to `count`, each as a row of `batches` (nothing is dropped)."""
    length, found, numbers = _length(cache), [], []
    for number in range(len(cache)):
        if len(found) == count:
            break
        try:
            entry = dict(cache[number])
        except CorruptRecord:
            continue
        entry.pop("negative", None)
        numbers.append(number)
        found.append(_row(entry, length, entry["image"].shape[:2]))
    parallel.check_same(str(cache.folder), str(numbers))
    return found


def _length(cache: Cache) -> int:
    model = cache.manifest["recipe"]["model"]
    return model["text_length"] - model["prompt"]["drop_tokens"]


def batches(
    cache: Cache,
    seed: int,
    batch_size: int,
    *,
    dropout: float = 0.0,
    max_corrupt: float = 0.01,
    rows: Sequence[int] | None = None,
    workers: int = 0,
    start: int = 0,
) -> loader.RecordBatches:
    """Endless batches of what `objectives.encode` returns, as numpy arrays with b = len(rows) rows (default: all).

    Order, hosts, workers, state and what becomes of a damaged entry (max_corrupt) are those of `loader.record_batches`;
    buckets are the cache's own. dropout: how often a row's conditioning is that of the negative prompt, by a draw that
    depends on (seed, step, row) alone.
    """
    model = cache.manifest["recipe"]["model"]
    if dropout and model["negative"] is None:
        raise RefineError(f"{cache.folder}: made without instruction_dropout; build it again with it")
    plan = Plan.fixed(np.asarray(cache.index[:, 1:]), seed, batch_size)
    loader.check_corrupt(max_corrupt)
    make = _Entries(cache, plan, _length(cache), dropout)
    return _CacheBatches(make, batch_size, max_corrupt, threads=False, start=start, rows=rows, workers=workers)


class _CacheBatches(loader.RecordBatches):
    def __next__(self) -> dict[str, np.ndarray]:
        batch = super().__next__()
        del batch["skipped"]  # no input of the objective
        return batch
