"""Datasets of refinement pairs on the disk: ArrayRecord shards, their schema, and a strict reader (`writer` writes).

A dataset is a folder:

    dataset.json                   format, version, recipe, digest; of every shard its file, records, bytes and sha256
    index.npy                      [N, 9] int32, one row a record, in the order of the shards (`COLUMNS`)
    shards/00000-of-00008.array_record

A record is a msgpack map (version 1):

    version      1
    target       bytes   the picture as it should be: PNG, JPEG or WebP, 8-bit RGB or grey, sRGB, upright
    image        bytes   the damaged picture, of the same size; or, with `image_box`, a part of it
    image_box    4 ints  (x1, y1, x2, y2): outside it the image is the target, `image` holds what is inside; nil where
                         `image` is the whole picture
    reference    bytes   another picture of what is to be restored, of any size; nil where there is none
    mask         bytes   PNG, bilevel: the region to refine inside `box`; outside it nothing is marked
    box          4 ints  (x1, y1, x2, y2), the tight box of the region in pixels of the image, half-open
    instruction  str     such as "Refine the text 'OPEN'"
    kind         str     a label of the user's own ("text", "logo"), or ""
    source       str     where the pair comes from
    licence      str     under what terms

Pictures keep the bytes of the files they came from wherever those are plain, so nothing is lost to encoding twice. An
image that equals its target in all but a part (to the bit: a lossless file) is stored as that part: half the bytes,
half the time of decoding, the same pixels. The index says all that decides static shapes, so an epoch is planned
without decoding a picture. `dataset.json` is written last: a folder without it is unfinished and is never read.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image
from tqdm import tqdm

from refine_jax.data.workers import spread
from refine_jax.errors import RefineError

VERSION = 1
FORMAT = "refine_jax records"
MANIFEST = "dataset.json"
INDEX = "index.npy"
COLUMNS = ("width", "height", "x1", "y1", "x2", "y2", "reference_width", "reference_height", "instruction_bytes")
PLAIN = ("PNG", "JPEG", "WEBP")  # formats of stored pictures

BUILDING = "building.json"  # the recipe of an unfinished dataset, in place of `MANIFEST`
SHARDS = "shards"
_OPEN_SHARDS = 128  # files that one process keeps open


class CorruptRecord(RefineError):
    """A record that cannot be used; the message names its shard and position and says why."""


# ------------------------------------------------------------------------------------------------------------- records


@dataclasses.dataclass(frozen=True)
class Record:
    """One pair, encoded, as the module's docstring lists it; size and reference_size are (width, height)."""

    image: bytes
    target: bytes
    mask: bytes
    box: tuple[int, int, int, int]
    instruction: str
    size: tuple[int, int]
    image_box: tuple[int, int, int, int] | None = None
    reference: bytes | None = None
    reference_size: tuple[int, int] = (0, 0)
    kind: str = ""
    source: str = ""
    licence: str = ""

    @property
    def image_size(self) -> tuple[int, int]:
        """(width, height) of the picture in `image`."""
        x1, y1, x2, y2 = self.image_box or (0, 0, *self.size)
        return x2 - x1, y2 - y1

    def whole_image(self) -> Image.Image:
        """The damaged picture, decoded. Raises `RefineError` where it cannot be."""
        part = open_picture(self.image, self.image_size, "image")
        if self.image_box is None:
            return part
        whole = open_picture(self.target, self.size, "target")
        if part.mode != whole.mode:
            part, whole = part.convert("RGB"), whole.convert("RGB")
        whole.paste(part, self.image_box[:2])
        return whole

    def row(self) -> tuple[int, ...]:
        """The record's row of the index (`COLUMNS`)."""
        return (*self.size, *self.box, *self.reference_size, len(self.instruction.encode()))


_STORED = ("image", "image_box", "target", "reference", "mask", "box", "instruction", "kind", "source", "licence")
_KINDS = {
    "image": bytes,
    "image_box": (list, type(None)),
    "target": bytes,
    "reference": (bytes, type(None)),
    "mask": bytes,
    "box": list,
}


def encode(record: Record) -> bytes:
    """The msgpack map of a record."""
    return msgpack.packb({"version": VERSION, **{name: getattr(record, name) for name in _STORED}})


def decode(data: bytes, row: np.ndarray) -> Record:
    """The record that `encode` packed; `row [9]` is its line of the index. Raises `RefineError` where they disagree."""
    try:
        fields = msgpack.unpackb(data)
        if fields.pop("version") != VERSION:
            raise ValueError("of another version")
        if set(fields) != set(_STORED):
            raise ValueError(f"has the fields {sorted(map(str, fields))}")
        for name, value in fields.items():
            if not isinstance(value, _KINDS.get(name, str)):
                raise ValueError(f"{name} is a {type(value).__name__}")
    except Exception as error:  # msgpack raises nearly anything for foreign bytes
        raise RefineError(f"not a record of version {VERSION} ({' '.join(str(error).split())})") from None
    values = row.tolist()
    part = fields["image_box"] and tuple(fields["image_box"])
    fields |= {"box": tuple(fields["box"]), "image_box": part}
    record = Record(**fields, size=tuple(values[:2]), reference_size=tuple(values[6:8]))
    if part is not None and not _inside(part, record.size):
        raise RefineError(f"image_box {part}: not inside the picture of {record.size[0]}x{record.size[1]}")
    if record.row() != tuple(values) or (record.reference is None) != (values[6] == 0):
        raise RefineError(f"does not agree with the index, which says {dict(zip(COLUMNS, values))}")
    return record


def _inside(box: Sequence[Any], size: tuple[int, int]) -> bool:
    if len(box) != 4 or any(type(v) is not int for v in box):
        return False
    return 0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1]


def open_picture(data: bytes, size: tuple[int, int], name: str) -> Image.Image:
    """A stored picture, decoded: mode "RGB", "L" or "1". Raises `RefineError` for damage or another `size`."""
    try:
        image = Image.open(io.BytesIO(data), formats=PLAIN)
        if image.size == tuple(size):
            image.load()
            return image
    except Exception as error:  # decoders of damaged files raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RefineError(f"{name}: cannot be decoded ({reason})") from None
    raise RefineError(f"{name}: {image.width}x{image.height} pixels, the index says {size[0]}x{size[1]}")


# -------------------------------------------------------------------------------------------------------------- reading


class Shards:
    """A folder of shards with an index, open for random access by several threads; picklable, each process opens what
    it reads.

    Opening checks that all is there and whole, as far as names, sizes, counts and the index's checksum tell. Raises
    `RefineError`, naming the file and the remedy.
    """

    format: str
    version: int
    columns: tuple[str, ...]

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, self.format, self.version)
        self._readers: OrderedDict[int, ArrayRecordReader] = OrderedDict()
        self._lock = threading.Lock()
        shards = self.manifest["shards"]
        self.files = [self.folder / SHARDS / shard["file"] for shard in shards]
        self._ends = np.cumsum([shard["records"] for shard in shards])
        for path, shard in zip(self.files, shards):
            _check_size(path, shard["bytes"])
            found = _count(path)
            if found != shard["records"]:
                raise RefineError(f"{path}: {found} records, {MANIFEST} says {shard['records']}; copy the shard again")
        self.index = self._load_index()

    def _load_index(self) -> np.ndarray:
        path, stored = self.folder / INDEX, self.manifest["index"]
        _check_size(path, stored["bytes"])
        if sha256_of(path) != stored["sha256"]:
            raise RefineError(f"{path}: its checksum is not the one in {MANIFEST}; copy it again")
        index = np.load(path, mmap_mode="r")
        if index.shape != (self.manifest["records"], len(self.columns)) or index.dtype != np.int32:
            raise RefineError(f"{path}: {index.dtype} of shape {index.shape}; build the dataset again")
        return index

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": OrderedDict(), "_lock": None, "index": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self.index = np.load(self.folder / INDEX, mmap_mode="r")  # checked where the dataset was opened

    def __len__(self) -> int:
        return self.manifest["records"]

    @property
    def digest(self) -> str:
        """sha256 over the shards' checksums: equal for datasets of equal content."""
        return self.manifest["digest"]

    def place(self, number: int) -> tuple[Path, int]:
        """(shard, position in it) of a record."""
        shard = int(np.searchsorted(self._ends, number, "right"))
        return self.files[shard], number - int(self._ends[shard - 1] if shard else 0)

    def read(self, number: int) -> bytes:
        """The stored bytes of a record. Raises what the library raises where they are damaged."""
        shard = int(np.searchsorted(self._ends, number, "right"))
        return self._reader(shard).read([self.place(number)[1]])[0]

    def corrupt(self, number: int, error: Exception) -> CorruptRecord:
        """The error of a record that cannot be used for the reason that `error` gives."""
        path, position = self.place(number)
        return CorruptRecord(f"{path}: record {position}: {' '.join(str(error).split())[:300]}")

    def _reader(self, shard: int) -> ArrayRecordReader:
        with self._lock:
            reader = self._readers.pop(shard, None) or _open_shard(self.files[shard])
            self._readers[shard] = reader
            if len(self._readers) > _OPEN_SHARDS:
                self._readers.popitem(last=False)  # closed when no thread reads it any more
        return reader


class Dataset(Shards):
    """A dataset of pairs. `verify` reads every byte of it."""

    format, version, columns = FORMAT, VERSION, COLUMNS

    def __getitem__(self, number: int) -> Record:
        """Raises `CorruptRecord` where the stored bytes are damaged or do not agree with the index."""
        try:
            return decode(self.read(number), self.index[number])
        except (RefineError, RuntimeError, IndexError, ValueError) as error:
            raise self.corrupt(number, error) from None


def _open_shard(path: Path) -> ArrayRecordReader:
    # Random access: no reading ahead, no threads.
    options = "readahead_buffer_size:0,max_parallelism:0"
    return ArrayRecordReader(str(path), options, file_reader_buffer_size=32768)


def _count(path: Path) -> int:
    """The records of a shard, from its footer."""
    try:
        reader = _open_shard(path)
        if reader.ok():
            count = reader.num_records()
            reader.close()
            return count
        reader.read([0])  # says what is wrong
        reason = "no records"
    except (RuntimeError, IndexError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
    raise RefineError(f"{path}: cannot be read ({reason}); copy the shard again, or build the dataset again")


def _check_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise RefineError(
            f"{path}: missing ({error.strerror}); copy it again, or build the dataset again in an empty folder"
        ) from None
    if found != size:
        raise RefineError(
            f"{path}: {found} bytes, {MANIFEST} says {size}; copy it again, or build the dataset again in an empty "
            "folder"
        )


def sha256_of(path: Path) -> str:
    """The checksum of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path, format: str = FORMAT, version: int = VERSION) -> dict[str, Any]:
    """`dataset.json`, checked. Raises `RefineError` where it is missing, damaged or of another version."""
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / BUILDING).is_file():
            raise RefineError(f"{folder}: an unfinished dataset; run the command that builds it again, it continues")
        raise RefineError(f"{folder}: no {MANIFEST} there; give a folder that `refine-jax data` wrote")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != format or manifest["version"] != version:
            found = f"format {manifest['format']!r} version {manifest['version']!r}"
            raise RefineError(f"{path}: {found}, {format!r} {version} is wanted; give another folder or build it again")
        counts = [shard["records"] for shard in manifest["shards"]]
        named = [Path(shard["file"]).name == shard["file"] for shard in manifest["shards"]]
        if sum(counts) != manifest["records"] or min(counts, default=0) < 1 or not all(named):
            raise ValueError(f"{manifest['records']} records in shards of {counts[:20]}")
        if not isinstance(manifest["index"]["sha256"], str) or not isinstance(manifest["digest"], str):
            raise ValueError("checksums are missing")
    except RefineError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise RefineError(f"{path}: damaged ({reason}); copy it again, or build the dataset again") from None
    return manifest


def verify(
    dataset: Dataset, workers: int = 0, progress: bool = False
) -> tuple[list[str], Counter[str], Counter[str], Counter[str]]:
    """Decode every picture of every record and compare every checksum.

    Returns (problems, one line each; how many records have each kind, each source, each licence).
    """
    numbers = [range(int(end - s["records"]), int(end)) for end, s in zip(dataset._ends, dataset.manifest["shards"])]
    found: list[str] = []
    kinds, sources, licences = Counter(), Counter(), Counter()
    with tqdm(total=len(dataset), unit="record", desc="checking", disable=not progress) as bar:
        for part, result in zip(numbers, spread(functools.partial(_verify_shard, dataset), numbers, workers)):
            found += result[0]
            for total, counted in zip((kinds, sources, licences), result[1:]):
                total.update(counted)
            bar.update(len(part))
    return found, kinds, sources, licences


def _verify_shard(dataset: Dataset, numbers: range) -> tuple[list[str], Counter[str], Counter[str], Counter[str]]:
    path, _ = dataset.place(numbers[0])
    shard = dataset.manifest["shards"][dataset.files.index(path)]
    problems = [] if sha256_of(path) == shard["sha256"] else [f"{path}: its checksum is not the one in {MANIFEST}"]
    kinds, sources, licences = Counter(), Counter(), Counter()
    for number in numbers:
        try:
            record = dataset[number]
            kinds[record.kind] += 1
            sources[record.source] += 1
            licences[record.licence] += 1
            record.whole_image()
            open_picture(record.target, record.size, "target")
            if record.reference is not None:
                open_picture(record.reference, record.reference_size, "reference")
            x1, y1, x2, y2 = record.box
            mask = open_picture(record.mask, (x2 - x1, y2 - y1), "mask").convert("L")
            if mask.getbbox() != (0, 0, x2 - x1, y2 - y1):
                raise RefineError("mask: does not fill its box")
            if not _inside(record.box, record.size):
                raise RefineError(f"box {record.box}: not inside the picture")
        except CorruptRecord as error:
            problems.append(str(error))
        except RefineError as error:
            problems.append(str(dataset.corrupt(number, error)))
    return problems, kinds, sources, licences
