"""Reading folders of safetensors one tensor at a time, with bounds on everything that a file claims.

The library's own reader maps whole files; here a tensor is read from its place in the file, so that the memory in use
is that of the tensors at hand, and so that files can be hashed in the order in which they are read.
"""

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refine_jax.errors import RefineError, listed

_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_MAX_JSON = 16_000_000
_STEP = 16 << 20  # bytes read at once

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: its data are `nbytes` bytes at `offset`, C order, little-endian."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(
        self, first: int = 0, last: int | None = None, buffer: np.ndarray | None = None, once: bool = False
    ) -> np.ndarray:
        """Rows `first` to `last` of axis 0 (default: all), of the stored dtype, in `buffer` [bytes] uint8 or fresh.

        once: nobody will read them again soon, so they need not stay in the system's cache of files.
        """
        shape = self.shape
        skipped = 0
        if shape:
            last = shape[0] if last is None else last
            row = math.prod(shape[1:]) * self.dtype.itemsize
            shape, skipped = (last - first, *shape[1:]), first * row
        size = math.prod(shape) * self.dtype.itemsize
        data = np.empty(size, np.uint8) if buffer is None else buffer[:size]
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.offset + skipped)
                view, done = memoryview(data), 0
                advise = getattr(os, "posix_fadvise", None) if once else None
                while done < len(data):
                    count = file.readinto(view[done : done + _STEP])
                    if not count:
                        raise RefineError(f"{self.file}: ended inside {self.name}; copy or download the file again")
                    if advise:  # pages that come free at once are the ones that the next bytes are read into
                        advise(file.fileno(), self.offset + skipped + done, count, os.POSIX_FADV_DONTNEED)
                    done += count
        except OSError as error:
            raise RefineError(f"{self.file}: cannot be read ({error.strerror}); copy or download it again") from None
        return data.view(self.dtype).reshape(shape)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose keys are all different."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:200]!r} stands there twice")
        found[name] = value
    return found


def read_json(path: Path) -> Any:
    """A JSON file of bounded size without NaN, infinities and repeated keys. Raises `RefineError` naming the file."""

    def no_constant(text: str) -> Any:
        raise ValueError(f"{text} is no number that a configuration may hold")

    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is no file")
        with open(path, "rb") as file:
            text = file.read(_MAX_JSON + 1)
        if len(text) > _MAX_JSON:
            raise ValueError("it is larger than any such file")
        return json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=no_constant)
    except FileNotFoundError:
        raise RefineError(f"{path}: no such file; copy or download the folder again") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RefineError(f"{path}: cannot be read as JSON ({reason}); copy or download the file again") from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise RefineError(f"{path}: holds a {type(value).__name__}, not an object; copy or download the file again")
    return value


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors in the order of their data, metadata) of a safetensors file.

    Raises `RefineError` for a file that is cut off, a header of absurd length, an unknown dtype, or data ranges that
    overlap, leave holes or do not fit the shapes.
    """

    def bad(reason: str) -> RefineError:
        return RefineError(f"{path}: not a sound safetensors file ({reason}); copy or download it again")

    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise bad("it is no file")
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise bad(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise RefineError(f"{path}: no such file; copy or download the folder again") from None
    except OSError as error:
        raise RefineError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, RefineError):
            raise
        raise bad(f"its header is not JSON: {str(error)[:100]}") from None
    if not isinstance(header, dict):
        raise bad("its header is no object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise bad("its metadata is no object")
    found = []
    for name, entry in header.items():
        try:
            dtype, shape, (start, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            kind = entry.get("dtype") if isinstance(entry, dict) else None
            raise bad(f"tensor {name!r} has dtype {kind!r} or an incomplete entry") from None
        numbers = (*shape, start, end)
        if any(not isinstance(n, int) or isinstance(n, bool) or not 0 <= n < 2**53 for n in numbers):
            raise bad(f"tensor {name!r} has shape {list(shape)[:8]} at {start}…{end}")
        if end - start != math.prod(shape) * dtype.itemsize:
            raise bad(f"tensor {name!r}: {list(shape)} {entry['dtype']} does not take {end - start} bytes")
        found.append((start, end, Tensor(name, path, dtype, shape, 8 + length + start)))
    position = 0
    found.sort(key=lambda item: item[:2])
    for start, end, tensor in found:
        if start != position:
            raise bad(f"tensor {tensor.name!r} begins at {start}, {position} expected")
        position = end
    if position != size - 8 - length:
        raise bad(f"{position} bytes of tensors, {size - 8 - length} in the file")
    return {tensor.name: tensor for _, _, tensor in found}, {str(k): str(v) for k, v in metadata.items()}


def read_folder(folder: Path, stem: str) -> dict[str, Tensor]:
    """Every tensor of a network: `stem`.safetensors, or the shards of `stem`.safetensors.index.json.

    In the order of files and of the data in them. Raises `RefineError` for an index that names files outside the
    folder, a missing shard, and tensors that index and shards do not agree on.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        single = folder / f"{stem}.safetensors"
        if single.is_file():
            return read_header(single)[0]
        others = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        remedy = "copy or download the folder again"
        if any(name.startswith(stem + ".") and name.count(".") > 1 and ".safetensors" in name for name in others):
            remedy = "save or download the pipeline without a variant"
        elif any(name.endswith(".bin") for name in others):
            remedy = "save the pipeline with safe_serialization=True"
        raise RefineError(f"{folder}: holds neither {single.name} nor {index.name}; {remedy}")
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise RefineError(f"{index}: no weight_map of tensors to files; copy or download the file again")
    files = sorted(set(weight_map.values()))
    outside = [f for f in files if not f or f != os.path.basename(f) or f in (".", "..") or "\\" in f or "\0" in f]
    if outside:
        raise RefineError(f"{index}: names files outside its folder ({listed(map(repr, outside))}); do not trust it")
    missing = [f for f in files if not (folder / f).is_file()]
    if missing:
        raise RefineError(f"{folder}: {listed(missing)} missing; copy or download the folder again")
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    for file in files:
        for name, tensor in read_header(folder / file)[0].items():
            if name in tensors:
                problems.append(f"{name} is in {tensors[name].file.name} and in {file}")
            elif weight_map.get(name) != file:
                problems.append(f"{name} is in {file}, the index says {weight_map.get(name, 'nothing')}")
            tensors.setdefault(name, tensor)
    problems += [f"{name} is not in {file}" for name, file in weight_map.items() if name not in tensors]
    if problems:
        raise RefineError(f"{index}: does not fit its shards: {listed(problems)}; copy or download the folder again")
    return tensors
