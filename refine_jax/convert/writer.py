"""Writing an orbax checkpoint piece by piece: no leaf is ever whole in memory, and what is finished stays finished.

The layout is orbax's own (OCDBT, one zarr array a leaf): the parts of a checkpoint that several processes write, merged
at the end. Here the parts are written one after another; a part takes its final name when all of it is on the disk.
"""

import contextlib
import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from refine_jax.errors import RefineError

_PENDING = 384 << 20  # bytes that may wait for the disk
_CHUNK = 1 << 20  # bytes; a chunk is the least that a host reads
_SPLITS = 16  # chunks along one axis
_CUTTERS = 8  # threads that cut and transpose
_RUN = 8  # chunks that one of them takes at a time


def chunk_shape(shape: tuple[int, ...], itemsize: int, stacked: bool) -> tuple[int, ...]:
    """How a leaf is cut: one block of a stack, and each axis into at most 16, as long as a chunk exceeds a MiB.

    A host of a sharded mesh reads the chunks that its shards touch, so both axes are cut.
    """
    chunk, splits = list(shape), [1] * len(shape)
    if stacked:
        chunk[0], splits[0] = 1, _SPLITS
    while math.prod(chunk) * itemsize > _CHUNK:
        free = [k for k in range(len(chunk)) if chunk[k] % 2 == 0 and splits[k] < _SPLITS]
        if not free:
            break
        k = min(free, key=lambda k: (splits[k], -chunk[k]))
        chunk[k] //= 2
        splits[k] *= 2
    return tuple(chunk)


def copy_into(out: np.ndarray, source: np.ndarray) -> None:
    """`out[...] = source`, fast where `source` is a transposed matrix, which numpy copies one number at a time."""
    if source.ndim != 2 or source.flags.c_contiguous or not out.flags.c_contiguous or source.nbytes < 1 << 16:
        out[...] = source
        return
    rows = source.T
    if source.itemsize != 2 or rows.strides[1] != 2 or rows.shape[0] % 4:
        for i in range(0, source.shape[0], 64):
            for j in range(0, source.shape[1], 64):
                out[i : i + 64, j : j + 64] = source[i : i + 64, j : j + 64]
        return
    # Four rows at a time as one row of 64-bit numbers: a quarter of the numbers to scatter.
    bits, wide = rows.view(np.uint16), out.view(np.uint16).view(np.uint64)
    for i in range(0, bits.shape[0], 512):
        for j in range(0, bits.shape[1], 128):
            tile = bits[i : i + 512, j : j + 128]
            four = np.empty((tile.shape[0] // 4, tile.shape[1], 4), np.uint16)
            for k in range(4):
                four[:, :, k] = tile[k::4]
            wide[j : j + 128, i // 4 : i // 4 + four.shape[0]] = four.view(np.uint64)[:, :, 0].T


class Writer:
    """One orbax checkpoint under `folder`, in numbered parts that may be written in several sittings."""

    def __init__(self, folder: Path, leaves: Mapping[str, Any], stacked: frozenset[str]):
        """leaves: path -> `jax.ShapeDtypeStruct`; stacked: the paths whose axis 0 counts blocks."""
        self._folder, self._leaves = folder, leaves
        self._chunks = {
            path: chunk_shape(leaf.shape, leaf.dtype.itemsize, path in stacked) for path, leaf in leaves.items()
        }
        self._context = ts.Context({"file_io_sync": False})
        self._disk = ThreadPoolExecutor(1)  # waits for the disk while the next part is made
        self._cutters = ThreadPoolExecutor(min(_CUTTERS, os.cpu_count() or 1))
        self._syncing: Future | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def is_done(self, part: int) -> bool:
        """Whether a part is on the disk, whole."""
        return self._part(part).is_dir()

    @contextlib.contextmanager
    def part(self, part: int) -> Iterator["Part"]:
        """Write a part: from scratch, under another name until everything in it is on the disk."""
        final = self._part(part)
        aside = final.with_name(final.name + ".partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        writing = Part(self, aside)
        yield writing
        self._settle()

        def settle() -> None:
            writing.wait()
            sync(aside)
            os.replace(aside, final)

        self._syncing = self._disk.submit(settle)

    def _settle(self) -> None:
        syncing, self._syncing = self._syncing, None
        if syncing is not None:
            syncing.result()

    def close(self) -> None:
        """End the threads; what they were given is done."""
        self._cutters.shutdown()
        self._disk.shutdown()

    def finish(self, parts: int) -> None:
        """Join the parts into one checkpoint, which the caller syncs. Raises `RefineError` if a chunk is missing."""
        self._settle()
        # What a join that was killed left. The parts stay.
        for name in ("_METADATA", "_CHECKPOINT_METADATA", "array_metadatas", "manifest.ocdbt", "d"):
            path = self._folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        store = self._open(self._folder)
        for part in range(parts):
            if not (self._part(part) / "manifest.ocdbt").exists():
                continue  # nothing but tensors that the network does not use
            transaction = ts.Transaction()
            wait(self._open(self._part(part)).experimental_copy_range_to(store.with_transaction(transaction)))
            wait(transaction.commit_async())
        self._check(store)
        entries, stored = {}, []
        for path, leaf in self._leaves.items():
            keys = path.split("/")
            shape = list(leaf.shape)
            entries[str(tuple(keys))] = {
                "key_metadata": [{"key": key, "key_type": 2} for key in keys],
                "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": shape},
            }
            name = ".".join(keys)
            stored.append(
                {
                    "array_metadata": {
                        "param_name": name,
                        "write_shape": shape,
                        "chunk_shape": list(self._chunks[path]),
                        "ext_metadata": None,
                    }
                }
            )
        handler = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
        now = time.time_ns()
        # No file of shardings: orbax alone would ask for the devices that it names.
        files = {
            "_METADATA": {
                "tree_metadata": entries,
                "use_ocdbt": True,
                "use_zarr3": False,
                "store_array_data_equal_to_fill_value": True,
                "custom_metadata": None,
            },
            "array_metadatas/process_0": {"array_metadatas": stored},
            "_CHECKPOINT_METADATA": {
                "item_handlers": handler,
                "metrics": {},
                "performance_metrics": {},
                "init_timestamp_nsecs": now,
                "commit_timestamp_nsecs": now,
                "custom_metadata": {},
            },
        }
        for name, value in files.items():
            path = self._folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(value), encoding="utf-8")

    # -------------------------------------------------------------------------------------------------------- details

    def _part(self, part: int) -> Path:
        return self._folder / f"ocdbt.process_{part}"

    def _open(self, folder: Path) -> ts.KvStore:
        # No URL: of a path it would not take every character.
        base = {"driver": "file", "path": f"{folder}/"}
        spec = {"driver": "ocdbt", "base": base, "config": {"compression": {"id": "zstd"}}}
        return wait(ts.KvStore.open(spec, context=self._context))

    def _check(self, store: ts.KvStore) -> None:
        """Every chunk must be there: zarr's own readers take an absent one for zeros."""
        count: dict[str, int] = {}
        for key in wait(store.list()):
            name = key.decode().rpartition("/")[0]
            count[name] = count.get(name, 0) + 1
        for path, leaf in self._leaves.items():
            chunks = math.prod(-(-n // c) for n, c in zip(leaf.shape, self._chunks[path]))
            found = count.get(path.replace("/", "."), 0) - 1  # and the array's own description
            if found != chunks:
                raise RefineError(f"{self._folder}: {path} has {found} of {chunks} chunks; delete it and convert again")


class Part:
    """What `Writer.part` gives: takes the pieces of leaves.

    Chunks are stored as they are, so they are cut out here and go to the key-value store directly: the array driver
    would copy each of them twice more.
    """

    def __init__(self, writer: Writer, folder: Path):
        self._writer, self._folder = writer, folder
        self._store = writer._open(folder)
        self._described: set[str] = set()
        self._pending: deque[tuple[ts.Future, int]] = deque()

    def put(self, path: str, origin: tuple[int, ...], values: np.ndarray) -> None:
        """`leaf[origin:origin + shape] = values`; both ends at borders of chunks. `values` is copied."""
        chunk = self._writer._chunks[path]
        values = values.reshape((1,) * (len(chunk) - values.ndim) + values.shape)
        name = path.replace("/", ".")
        transaction = ts.Transaction()
        store = self._store.with_transaction(transaction)
        if path not in self._described:
            self._described.add(path)
            store.write(f"{name}/.zarray".encode(), self._describe(path))
        first = [o // c for o, c in zip(origin, chunk)]
        places = list(np.ndindex(*[-(-n // c) for n, c in zip(values.shape, chunk)]))

        def cut(places: list[tuple[int, ...]]) -> None:
            block = np.empty(0, values.dtype)
            for place in places:
                piece = values[tuple(slice(k * c, (k + 1) * c) for k, c in zip(place, chunk))]
                flat = piece.ndim > 1 and math.prod(piece.shape[:-2]) == 1
                matrix = piece.reshape(piece.shape[-2:]) if flat else piece
                if block.shape != matrix.shape:
                    block = np.empty(matrix.shape, matrix.dtype)
                copy_into(block, matrix)
                key = ".".join(str(f + k) for f, k in zip(first, place))
                store.write(f"{name}/{key}".encode(), block.tobytes())

        for _ in self._writer._cutters.map(cut, [places[k : k + _RUN] for k in range(0, len(places), _RUN)]):
            pass  # raises what a thread raised
        self._pending.append((transaction.commit_async(), values.nbytes))
        while sum(size for _, size in self._pending) > _PENDING:
            wait(self._pending.popleft()[0])

    def wait(self) -> None:
        """Until everything is written."""
        while self._pending:
            wait(self._pending.popleft()[0])

    def _describe(self, path: str) -> bytes:
        """The array's metadata, zarr version 2."""
        leaf = self._writer._leaves[path]
        metadata = {
            "zarr_format": 2,
            "shape": list(leaf.shape),
            "chunks": list(self._writer._chunks[path]),
            "dtype": "bfloat16" if leaf.dtype.name == "bfloat16" else leaf.dtype.newbyteorder("<").str,
            "compressor": None,
            "fill_value": None,
            "order": "C",
            "filters": None,
            "dimension_separator": ".",
        }
        return json.dumps(metadata, sort_keys=True).encode()


def wait(future: ts.Future) -> Any:
    """The result; what TensorStore says of the disk as an `OSError`."""
    try:
        return future.result()
    except (ValueError, RuntimeError) as error:
        raise OSError(" ".join(str(error).split())[:300]) from None


def sync(folder: Path, deep: bool = True) -> None:
    """Every file under `folder`, and the folders, to the disk; or the folder's own list of names."""
    for base, _, names in os.walk(folder) if deep else [(folder, [], [])]:
        for name in (*names, "."):
            handle = os.open(os.path.join(base, name), os.O_RDONLY)
            try:
                os.fsync(handle)
                if name != "." and hasattr(os, "posix_fadvise"):  # what is on the disk need not fill the memory too
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)
