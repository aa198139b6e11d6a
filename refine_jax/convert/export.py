"""Model folders of ours for other programs: BAGEL and RvR as their authors release them, the MMDiT as diffusers does.

Tensors go one by one from the store to the files, in the order and with the header of the safetensors library: what
`convert` read and nobody changed comes back byte for byte.
"""

import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from flax import traverse_util
from tqdm import tqdm

from refine_jax import checkpoint, prompts
from refine_jax.bagel import BagelModel, Marks
from refine_jax.convert import keys_bagel, reader
from refine_jax.convert.bagel_folder import LLM, MODEL, VAE, VIT, WEIGHTS
from refine_jax.convert.keys_flux_vae import FLUX_VAE_TABLE
from refine_jax.convert.keys_mmdit import TABLE as MMDIT_TABLE
from refine_jax.convert.mapping import Transform, places
from refine_jax.convert.writer import copy_into, sync, wait
from refine_jax.errors import RefineError, listed
from refine_jax.limits import DTYPES
from refine_jax.model import ModelConfig
from refine_jax.models.mmdit import MMDiTConfig

_SLAB = 128 << 20  # bytes of a tensor in memory at once, where its transform allows
_SHARD = 10 * 10**9  # diffusers' own
_AHEAD = 2  # slabs that are read before they are written
# The library writes tensors by dtype, in this order, and then by name.
_ORDER = ("F64", "F32", "BF16", "F16")
_NAMES = {str(dtype): name for name, dtype in reader.DTYPES.items()}


class _Stored(NamedTuple):
    """A leaf on the disk. read: of some region of it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[slice | int, ...]], np.ndarray]


class _Entry(NamedTuple):
    """A tensor to write. rows: makes its rows first … last; whole: it can only be made at once."""

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Callable[[int, int], np.ndarray]
    whole: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def export_bagel(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    weights: str | None = None,
    dtype: str | None = None,
    progress: bool = False,
) -> Path:
    """Write a model folder of a BAGEL or RvR model in the released layout; returns the new folder.

    source: a folder that `convert` or the trainer wrote. weights: "ema", "rvr" or another name of the file of weights
    (default: the one that it was converted from, else rvr). dtype: of the weights ("float32", "bfloat16"; default: as
    they are); position tables are written as they were stored, or like the embeddings. What the sampler's settings say
    has no place in that layout. Raises `RefineError` for another model, a target that exists, a store that does not fit
    its manifest.
    """
    source, target, manifest = _begin(source, target)
    if "bagel" not in manifest:
        raise RefineError(f"{source}: is no BAGEL or RvR model; only those have the released layout of BAGEL")
    model = BagelModel.from_manifest(manifest)
    Marks.of(prompts.load_tokenizer(source / "tokenizer", placeholder=False))
    known = manifest.get("source")
    known = known if isinstance(known, dict) else {}
    name = (weights or str(known.get("weights", WEIGHTS[0]))).removesuffix(".safetensors")
    if not name.isidentifier() or f"{name}.safetensors" == VAE:
        raise RefineError(f"weights {name!r}: give a plain name for the file of weights, such as ema or rvr")

    abstract = model.abstract()
    stored = {network: _store(source, network, abstract[network]) for network in abstract}
    entries = {
        network: _entries(places(table, abstract[network]), stored[network], dtype)
        for network, table in (("bagel", keys_bagel.TABLE), ("vae", FLUX_VAE_TABLE))
    }
    kinds = known.get("position_tables")
    kinds = kinds if isinstance(kinds, dict) else {}
    for key, table in keys_bagel.position_tables(model.bagel).items():
        kind = kinds.get(key) if kinds.get(key) in _NAMES else dtype or stored["bagel"]["embed_tokens"].dtype
        entries["bagel"][key] = _table(table.astype(jnp.dtype(kind)))
    files = {f"{name}.safetensors": entries["bagel"], VAE: entries["vae"]}
    copies = [path for path in sorted((source / "tokenizer").iterdir()) if path.is_file()]
    return _write_folder(target, files, configs(model), copies, progress)


def export_diffusers(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    dtype: str | None = None,
    progress: bool = False,
    shard: int = _SHARD,
) -> Path:
    """Write the MMDiT of a model folder as diffusers' `QwenImageTransformer2DModel.save_pretrained` does; returns the
    new folder, which that class's `from_pretrained` loads, and which may stand for a pipeline's `transformer/`.

    source: a folder that `convert` or the trainer wrote; its VAE and encoder are those of the pipeline that it came
    from, and are not written: a model whose encoder was trained too needs this library. dtype: of the weights
    ("float32", "bfloat16"; default: as they are). shard: most bytes of a file of several tensors. Raises `RefineError`
    as `export_bagel` does.
    """
    source, target, manifest = _begin(source, target)
    if "mmdit" not in manifest:
        raise RefineError(f"{source}: holds no MMDiT; a BAGEL or RvR model is written with --dialect bagel")
    model = ModelConfig.from_manifest(manifest)
    abstract = model.abstract(("mmdit",))["mmdit"]
    entries = _entries(places(MMDIT_TABLE, abstract), _store(source, "mmdit", abstract), dtype)
    shards: list[dict[str, _Entry]] = [{}]
    for key, entry in entries.items():
        if shards[-1] and sum(held.nbytes for held in shards[-1].values()) + entry.nbytes > shard:
            shards.append({})
        shards[-1][key] = entry
    name = "diffusion_pytorch_model"
    names = [f"{name}-{k:05d}-of-{len(shards):05d}.safetensors" for k in range(1, len(shards) + 1)]
    texts = {"config.json": transformer_config(model.mmdit)}
    if len(shards) == 1:
        names = [f"{name}.safetensors"]
    else:
        total = sum(entry.nbytes for entry in entries.values())
        where = {key: file for file, held in zip(names, shards) for key in held}
        texts[f"{name}.safetensors.index.json"] = {"metadata": {"total_size": total}, "weight_map": where}
    return _write_folder(target, dict(zip(names, shards)), texts, (), progress, {"format": "pt"})


def transformer_config(mmdit: MMDiTConfig) -> dict[str, Any]:
    """`config.json` of diffusers' transformer; `MMDiTConfig.from_dict` makes the same architecture of it."""
    names = ("patch_size", "in_channels", "out_channels", "num_layers", "attention_head_dim", "num_attention_heads")
    config: dict[str, Any] = {"_class_name": "QwenImageTransformer2DModel"}
    config |= {name: getattr(mmdit, name) for name in (*names, "joint_attention_dim")}
    config |= {"axes_dims_rope": list(mmdit.axes_dims_rope), "guidance_embeds": False}
    # Versions of diffusers from before Edit-2511 do not know the field.
    return config | ({"zero_cond_t": True} if mmdit.zero_cond_t else {})


def _begin(source: str | os.PathLike, target: str | os.PathLike) -> tuple[Path, Path, dict[str, Any]]:
    """Both as paths, and the manifest of `source`. Raises `RefineError` for a target that exists."""
    if Path(target).exists():
        raise RefineError(f"{target}: exists; give another folder, or remove it first")
    return Path(source), Path(target), checkpoint.read_manifest(source)


def configs(model: BagelModel) -> dict[str, dict[str, Any]]:
    """The JSON files of the layout, by name; `bagel_folder.read_bagel` makes the same architecture of them."""
    bagel, vit, vae = model.bagel, model.bagel.vit, model.vae
    return {
        LLM: {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "layer_module": "Qwen2MoTDecoderLayer",
            "hidden_act": "silu",
            "hidden_size": bagel.hidden_size,
            "intermediate_size": bagel.intermediate_size,
            "num_hidden_layers": bagel.num_hidden_layers,
            "num_attention_heads": bagel.num_attention_heads,
            "num_key_value_heads": bagel.num_key_value_heads,
            "vocab_size": bagel.vocab_size,
            "rope_theta": bagel.rope_theta,
            "rms_norm_eps": bagel.rms_norm_eps,
            "qk_norm": True,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
        },
        VIT: {
            "model_type": "siglip_vision_model",
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": vit.hidden_size,
            "intermediate_size": vit.intermediate_size,
            "num_hidden_layers": vit.num_layers + 1,  # the authors' loader leaves the last one out
            "num_attention_heads": vit.num_heads,
            "num_channels": vit.num_channels,
            "patch_size": vit.patch_size,
            "image_size": vit.image_size,
            "layer_norm_eps": vit.layer_norm_eps,
        },
        MODEL: {
            "model_type": "bagel",
            "visual_gen": True,
            "visual_und": True,
            "latent_patch_size": bagel.latent_patch_size,
            "max_latent_size": bagel.max_latent_size,
            "vit_max_num_patch_per_side": bagel.vit_max_num_patch_per_side,
            "connector_act": "gelu_pytorch_tanh",
            "interpolate_pos": False,
            "vae_config": {
                "ch": vae.ch,
                "ch_mult": list(vae.ch_mult),
                "num_res_blocks": vae.num_res_blocks,
                "z_channels": vae.z_channels,
                "in_channels": vae.in_channels,
                "out_ch": vae.in_channels,
                "downsample": vae.downsample,
                "scale_factor": vae.scale_factor,
                "shift_factor": vae.shift_factor,
                "num_groups": vae.num_groups,
            },
        },
    }


# ------------------------------------------------------------------------------------------------------------- reading


def _store(folder: Path, network: str, abstract: Mapping[str, Any]) -> dict[str, _Stored]:
    """Path -> leaf of a network of a model folder. Raises `RefineError` where the store does not fit."""
    wanted = traverse_util.flatten_dict(dict(abstract), sep="/")
    where = folder / checkpoint.ORBAX / network
    if where.parent.is_dir():
        base = {"driver": "file", "path": f"{where.absolute()}/"}  # no URL: it would not take every character
        found = {path: _array(base, path, folder) for path in wanted}
    else:
        where = folder / checkpoint.WEIGHTS
        tensors = reader.read_header(where)[0]
        prefix = f"{network}/"
        found = {name.removeprefix(prefix): _tensor(t) for name, t in tensors.items() if name.startswith(prefix)}
    problems = [f"missing {path}" for path in wanted.keys() - found.keys()]
    problems += [f"unexpected {path}" for path in found.keys() - wanted.keys()]
    problems += [
        f"{path} is {stored.dtype} {list(stored.shape)}, {list(wanted[path].shape)} expected"
        for path, stored in found.items()
        if path in wanted and (stored.shape != wanted[path].shape or _NAMES.get(str(stored.dtype)) not in _ORDER)
    ]
    if problems:
        raise RefineError(f"{where}: does not fit its manifest: {listed(problems)}")
    return found


def _array(base: dict[str, str], path: str, folder: Path) -> _Stored:
    """A zarr array of an orbax checkpoint."""
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": base, "path": path.replace("/", ".") + "/"},
        "fill_missing_data_reads": False,  # an absent chunk is an error, not zeros
    }

    def checked(future: Any) -> Any:
        try:
            return wait(future)
        except OSError as error:
            reason = str(error)[:200]
            raise RefineError(f"{folder}: {path} cannot be read ({reason}); copy or convert the model again") from None

    array = checked(ts.open(spec, open=True, read=True))
    return _Stored(tuple(array.shape), array.dtype.numpy_dtype, lambda region: checked(array[region].read()))


def _tensor(tensor: reader.Tensor) -> _Stored:
    def read(region: tuple[slice | int, ...]) -> np.ndarray:
        if region and isinstance(region[0], int):
            return tensor.read(region[0], region[0] + 1)[0][region[1:]]
        return tensor.read()[region]

    return _Stored(tensor.shape, tensor.dtype, read)


def _entries(
    held: Mapping[str, tuple[str, int | None, Transform]], stored: Mapping[str, _Stored], dtype: str | None
) -> dict[str, _Entry]:
    """The reference's tensors, each from its leaf, as `dtype` (None: its own)."""
    if dtype not in (None, *DTYPES):
        raise RefineError(f"dtype {dtype!r}: give {' or '.join(map(repr, DTYPES))}")
    found = {}
    for key, (path, index, how) in held.items():
        leaf = stored[path]
        inner = leaf.shape if index is None else leaf.shape[1:]
        shape = how.inverse(np.broadcast_to(np.zeros((), np.int8), inner)).shape
        kind = np.dtype(dtype) if dtype else leaf.dtype
        found[key] = _Entry(shape, kind, _rows(leaf, index, how), how.axis is None or not shape)
    return found


def _rows(leaf: _Stored, index: int | None, how: Transform) -> Callable[[int, int], np.ndarray]:
    """Makes rows of a tensor from its leaf."""
    stack = () if index is None else (index,)

    def make(first: int, last: int) -> np.ndarray:
        region = () if how.axis is None else (*(slice(None),) * how.axis, slice(first, last))
        return how.inverse(leaf.read((*stack, *region) or (...,)))

    return make


def _table(table: np.ndarray) -> _Entry:
    return _Entry(table.shape, table.dtype, lambda first, last: table[first:last], False)


# ------------------------------------------------------------------------------------------------------------- writing


def _write_folder(
    target: Path,
    files: Mapping[str, Mapping[str, _Entry]],
    texts: Mapping[str, Mapping[str, Any]],
    copies: Iterable[Path],
    progress: bool,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write safetensors files, JSON files and copies aside, then rename the folder."""
    aside = target.with_name(target.name + ".partial")
    total = sum(entry.nbytes for held in files.values() for entry in held.values())
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        free = shutil.disk_usage(aside).free
        if free < total * 1.02:
            raise RefineError(f"{aside}: {total / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; make room")
        for path in copies:
            shutil.copyfile(path, aside / path.name)
        for file, config in texts.items():
            (aside / file).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        with tqdm(total=total, unit="B", unit_scale=True, desc="exporting", disable=not progress) as bar:
            for file, held in files.items():
                _write(aside / file, held, bar, metadata)
        sync(aside)
        os.replace(aside, target)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise RefineError(
            f"{aside}: cannot be written ({error.strerror or error}); make room, or give another"
        ) from None
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return target


def _write(path: Path, entries: Mapping[str, _Entry], bar: tqdm, metadata: Mapping[str, str] | None) -> None:
    """A safetensors file, tensor by tensor."""
    kind = lambda key: _NAMES[str(entries[key].dtype)]
    keys = sorted(entries, key=lambda key: (_ORDER.index(kind(key)), key))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for key in keys:
        entry = entries[key]
        offsets = [offset, offset + entry.nbytes]
        header[key] = {"dtype": kind(key), "shape": list(entry.shape), "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file, ThreadPoolExecutor(_AHEAD) as pool:
        file.write(len(text).to_bytes(8, "little") + text)
        reading: deque[Any] = deque()
        jobs = ((entries[key], *span) for key in keys for span in _spans(entries[key]))
        for entry, first, last in jobs:
            reading.append(pool.submit(_made, entry, first, last))
            if len(reading) > _AHEAD:
                _put(file, reading.popleft().result(), bar)
        while reading:
            _put(file, reading.popleft().result(), bar)


def _spans(entry: _Entry) -> Iterator[tuple[int, int]]:
    rows = entry.shape[0] if entry.shape else 1
    step = rows if entry.whole else max(1, _SLAB * rows // max(1, entry.nbytes))
    for first in range(0, rows, max(1, step)):
        yield first, min(rows, first + step)


def _made(entry: _Entry, first: int, last: int) -> np.ndarray:
    rows = entry.rows(first, last)
    out = np.empty(rows.shape, entry.dtype)
    copy_into(out, rows.astype(entry.dtype, copy=False))
    return out


def _put(file: Any, rows: np.ndarray, bar: tqdm) -> None:
    file.write(rows.reshape(-1).view(np.uint8))
    bar.update(rows.nbytes)
