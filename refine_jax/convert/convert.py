"""`refine-jax convert`: a folder of PyTorch files -> a model folder with an orbax checkpoint, streaming.

Tensors are read once, in the order of the files, hashed, transformed and written into parts of about a GiB. A part that
is finished stays finished, so a killed conversion goes on where it stopped; everything lies in `DST.partial` until the
last step renames it.
"""

import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from refine_jax import checkpoint
from refine_jax.bagel import BagelModel
from refine_jax.convert import bagel_folder, diffusers_folder, lora, reader
from refine_jax.convert.folders import open_folder
from refine_jax.convert.mapping import Transform
from refine_jax.convert.source import Folder, Leaf
from refine_jax.convert.writer import Part, Writer, chunk_shape, sync
from refine_jax.errors import RefineError
from refine_jax.model import ModelConfig

_PART = 1 << 30  # bytes of tensors in one part
_SLAB = 128 << 20  # bytes of a tensor in memory at once, where its transform allows
_LAYOUT = 1  # raised when parts are cut or named differently
_PLAN = "conversion.json"


@dataclass(frozen=True)
class _Piece:
    """Some rows of a tensor and where they go; path None: read for the hash alone."""

    tensor: reader.Tensor
    first: int
    last: int | None
    path: str | None = None
    index: int | None = None
    how: Transform | None = None

    @property
    def nbytes(self) -> int:
        if self.last is None:
            return self.tensor.nbytes
        return self.tensor.nbytes // self.tensor.shape[0] * (self.last - self.first)


def convert(
    source: str | os.PathLike, target: str | os.PathLike, *, weights: str | None = None, progress: bool = False
) -> Path:
    """Convert a diffusers pipeline folder, or a BAGEL or RvR folder, to a model folder; returns it.

    weights: which of a BAGEL folder (`bagel_folder.read_bagel`). Weights keep their dtype. An interrupted conversion of
    the same files to the same target continues. The manifest records the SHA-256 of every file of weights. Raises
    `RefineError` for a folder that does not fit, a target that exists, too little space.
    """
    source, target = Path(source), Path(target)
    exists = RefineError(f"{target}: exists; give another folder, or remove it first")
    if target.exists():
        raise exists
    if (source / checkpoint.MANIFEST).is_file():
        raise RefineError(f"{source}: is a model folder of refine_jax already; load it as it is")
    folder = open_folder(source, weights)
    leaves, tokenizer = folder.leaves, folder.tokenizer_files()
    aside = target.with_name(target.name + ".partial")
    try:
        aside.mkdir(parents=True, exist_ok=True)
        with open(aside / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RefineError(f"{aside}: another conversion writes there; wait for it or stop it") from None
            if target.exists():  # another conversion has just finished
                shutil.rmtree(aside)
                raise exists
            _convert(folder, leaves, tokenizer, aside, progress)
            sync(aside)
            os.replace(aside, target)
        sync(target.parent, deep=False)
        for name in (_PLAN, "lock"):
            (target / name).unlink()
    except OSError as error:
        raise RefineError(
            f"{aside}: cannot be written ({error.strerror or error}); what is finished stays, repeat the command to "
            "go on"
        ) from None
    return target


def _convert(
    folder: Folder, leaves: dict[str, dict[str, Leaf]], tokenizer: dict[str, bytes], aside: Path, progress: bool
) -> None:
    (aside / checkpoint.MANIFEST).unlink(missing_ok=True)  # first: nothing is loadable until the end
    plan = {"layout": _LAYOUT, "part": _PART, "slab": _SLAB, **folder.fingerprint()}
    if _read_plan(aside) != plan:
        for path in aside.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        checkpoint.write_text(aside / _PLAN, json.dumps(plan, indent=1) + "\n")
    parts = {network: _parts(folder.networks[network].tensors, leaves[network]) for network in leaves}
    writers = {}
    for network, found in leaves.items():
        abstract = {path: leaf.abstract for path, leaf in found.items()}
        stacked = frozenset(path for path, leaf in found.items() if leaf.stacked)
        writers[network] = Writer(aside.absolute() / checkpoint.ORBAX / network, abstract, stacked)
    undone = [p for n in parts for k, part in enumerate(parts[n]) if not writers[n].is_done(k) for p in part]
    wanted = sum(piece.nbytes for piece in undone if piece.path is not None)
    free = shutil.disk_usage(aside).free
    if free < wanted * 1.02:
        raise RefineError(f"{aside}: {wanted / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; make room")

    total = sum(piece.nbytes for n in parts for part in parts[n] for piece in part)
    hashes: dict[str, str] = {}
    largest = max((piece.nbytes for n in parts for part in parts[n] for piece in part), default=0)
    buffers = [np.empty(largest, np.uint8) for _ in range(3)]
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=not progress) as bar,
        ThreadPoolExecutor(1) as pool,
    ):
        for network, found in parts.items():
            writer = writers[network]
            with closing(writer):
                with closing(_Hasher(hashes, folder.folder)) as hasher:
                    stream = _read([piece for part in found for piece in part], hasher, pool, buffers)
                    for number, part in enumerate(found):
                        pieces = itertools.islice(stream, len(part))
                        if writer.is_done(number):
                            for piece, _ in pieces:
                                bar.update(piece.nbytes)
                            continue
                        with writer.part(number) as out:
                            for piece, values in pieces:
                                if piece.path is not None:
                                    _put(out, piece, values, leaves[network][piece.path])
                                bar.update(piece.nbytes)
                    next(stream, None)  # its last word: everything is hashed
                writer.finish(len(found))

    shutil.rmtree(aside / "tokenizer", ignore_errors=True)
    (aside / "tokenizer").mkdir()
    for name, data in tokenizer.items():
        (aside / "tokenizer" / name).write_bytes(data)
    for path in folder.tokenizer_sources():
        hashes[path.relative_to(folder.folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    source = {"pipeline": folder.kind, "name": folder.folder.absolute().name, **folder.notes(), "sha256": hashes}
    checkpoint.write_manifest(aside, {**folder.model().to_manifest(), "source": source})


def _put(out: Part, piece: _Piece, values: np.ndarray, leaf: Leaf) -> None:
    """Transform the rows of a piece and hand them to the part that is being written."""
    made = piece.how.forward(values)
    origin = [0] * made.ndim
    if piece.last is not None:
        origin[piece.how.axis] = piece.first
    out.put(leaf.path, (*origin,) if piece.index is None else (piece.index, *origin), made)


def _parts(tensors: dict[str, reader.Tensor], leaves: dict[str, Leaf]) -> list[list[_Piece]]:
    """A network's pieces in the order of its files, cut into parts."""
    goes = {tensor.name: (leaf, index, how) for leaf in leaves.values() for index, tensor, how in leaf.pieces}
    parts: list[list[_Piece]] = [[]]
    size = 0
    for tensor in tensors.values():
        leaf, index, how = goes.get(tensor.name, (None, None, None))
        if leaf is None:  # for the hash alone, so its shape, which nobody checked, does not matter
            tensor = dataclasses.replace(tensor, dtype=np.dtype(np.uint8), shape=(tensor.nbytes,))
        for first, last in _slabs(tensor, leaf, how):
            piece = _Piece(tensor, first, last, leaf.path if leaf else None, index, how)
            if size + piece.nbytes > _PART and parts[-1]:
                parts.append([])
                size = 0
            parts[-1].append(piece)
            size += piece.nbytes
    return parts


def _slabs(tensor: reader.Tensor, leaf: Leaf | None, how: Transform | None) -> Iterator[tuple[int, int | None]]:
    """Runs of rows of a large tensor; the whole tensor is (0, None)."""
    if tensor.nbytes <= _SLAB or (how is not None and how.axis is None):
        yield 0, None
        return
    rows, step = tensor.shape[0], 1
    if leaf is not None:  # whole chunks: two parts must not share one
        step = chunk_shape(leaf.abstract.shape, tensor.dtype.itemsize, leaf.stacked)[how.axis + leaf.stacked]
    step *= max(1, _SLAB // (step * tensor.nbytes // rows))
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


class _Hasher:
    """SHA-256 of whole files whose tensors come in order; a thread of its own."""

    def __init__(self, hashes: dict[str, str], folder: Path):
        self._hashes, self._folder = hashes, folder
        self._file: Path | None = None
        self._digest: Any = None
        self._thread = ThreadPoolExecutor(1)

    def submit(self, tensor: reader.Tensor, data: np.ndarray) -> Any:
        """Hash `data` in its turn; a future that is done when `data` may change."""
        return self._thread.submit(self._update, tensor, data)

    def _update(self, tensor: reader.Tensor, data: np.ndarray) -> None:
        if tensor.file != self._file:
            self._finish()
            self._file, self._digest = tensor.file, hashlib.sha256()
            header = reader.Tensor("the header", tensor.file, np.dtype(np.uint8), (tensor.offset,), 0)
            self._digest.update(header.read())  # all before the first tensor
        self._digest.update(data.reshape(-1).view(np.uint8))

    def _finish(self) -> None:
        if self._file is not None:
            self._hashes[self._file.relative_to(self._folder).as_posix()] = self._digest.hexdigest()
        self._file = None

    def close(self) -> None:
        """After the last tensor."""
        self._thread.shutdown()
        self._finish()


def _read(
    pieces: list[_Piece], hasher: _Hasher, pool: ThreadPoolExecutor, buffers: list[np.ndarray]
) -> Iterator[tuple[_Piece, np.ndarray]]:
    """Each piece with its rows, while the next ones are read and this one is hashed.

    The rows lie in one of the buffers and hold until the next piece is asked for.
    """
    reading: list[Any] = []
    hashing: list[Any] = []

    def load(k: int) -> np.ndarray:
        if k >= len(buffers):
            hashing[k - len(buffers)].result()
        piece = pieces[k]
        return piece.tensor.read(piece.first, piece.last, buffers[k % len(buffers)], once=True)

    for k, piece in enumerate(pieces):
        # The piece before this one is written, so its buffer is free.
        while len(reading) < min(k + len(buffers), len(pieces)):
            reading.append(pool.submit(load, len(reading)))
        values = reading[k].result()
        hashing.append(hasher.submit(piece.tensor, values))
        yield piece, values
    for future in hashing:
        future.result()


def _read_plan(aside: Path) -> Any:
    try:
        return json.loads((aside / _PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# ------------------------------------------------------------------------------------------------------------- inspect


def convert_lora(
    source: str | os.PathLike,
    target: str | os.PathLike,
    dialect: str = "peft",
    model: ModelConfig | BagelModel | None = None,
) -> Path:
    """Rewrite LoRA weights, in any dialect that `lora.read_adapter` knows, as "peft" or "comfyui".

    model: what they adapt (default: the published Qwen-Image-Edit). Raises `RefineError` for what does not fit it, and
    for a target that exists.
    """
    target = Path(target)
    if target.exists():
        raise RefineError(f"{target}: exists; give another name, or remove it first")
    adapter = lora.read_adapter(Path(source), (model or ModelConfig()).abstract())
    ours = {name: value for name, value in adapter.metadata.items() if name.startswith("refine_jax")}
    if steps := lora.lightning_steps(adapter, Path(source).name):
        ours[lora.STEPS] = str(steps)
    lora.write_adapter(target, adapter.trees, dialect, metadata=ours)
    return target


def is_lora(source: str | os.PathLike) -> bool:
    """Whether a path is a file of weights, or a folder of nothing but such files: LoRA weights, not a pipeline."""
    source = Path(source)
    if bagel_folder.locate(source) or (source / checkpoint.MANIFEST).is_file():
        return False
    return source.is_file() or (
        bool(list(source.glob("*.safetensors"))) and not (source / diffusers_folder.MODEL_INDEX).exists()
    )


def inspect(
    source: str | os.PathLike, weights: str | None = None, model: ModelConfig | BagelModel | None = None
) -> str:
    """What a folder or a file holds, as text: nothing is written.

    Headers are read and, of tensors, BAGEL's position tables, which must be those that we compute. source: a pipeline
    folder, a BAGEL or RvR folder, a model folder of refine_jax, or a file (folder) of LoRA weights for `model`, by
    default the published Qwen-Image-Edit.
    """
    source = Path(source)
    lines = [f"{source}"]
    if is_lora(source):
        adapter = lora.read_adapter(source, (model or ModelConfig()).abstract())
        lines.append(f"  LoRA weights, named as {' and '.join(adapter.dialects)} does")
        for name, ranks in adapter.ranks.items():
            lines.append(f"  {name}: rank {', '.join(map(str, sorted(set(ranks))))} in {len(ranks)} blocks")
        return "\n".join(lines)
    if (source / checkpoint.MANIFEST).is_file():
        manifest = checkpoint.read_manifest(source)
        kind = "orbax" if (source / checkpoint.ORBAX).is_dir() else "safetensors"
        lines.append(f"  a model folder of refine_jax, weights as {kind}")
        for name, digest in manifest.get("source", {}).get("sha256", {}).items():
            lines.append(f"  made from {name} sha256 {digest}")
        return "\n".join(lines)
    folder = open_folder(source, weights)
    model = folder.model()
    lines.append(f"  {folder.kind}")
    for network, held in folder.networks.items():
        tensors = held.tensors.values()
        count = sum(int(np.prod(t.shape, dtype=np.int64)) for t in tensors)
        kinds = ", ".join(sorted({t.dtype.name for t in tensors}))
        size = sum(t.nbytes for t in tensors)
        files = len({t.file for t in tensors})
        lines.append(
            f"  {held.name} -> {network}: {len(tensors)} tensors in {files} files, {count / 1e6:,.1f} M parameters, "
            f"{size / 1e9:.2f} GB, {kinds}"
        )
    lines += [f"  {line}" for line in folder.describe(model)]
    leaves = folder.leaves  # the accounting
    lines.append(f"  every tensor has its place: {sum(map(len, leaves.values()))} leaves")
    return "\n".join(lines)
