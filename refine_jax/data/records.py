"""Datasets of refinement pairs on the disk: ArrayRecord shards, a strict reader, a writer that survives being killed.

A dataset is a folder:

    dataset.json                   format, version, recipe, digest; of every shard its file, records, bytes and sha256
    index.npy                      [N, 9] int32, one row a record, in the order of the shards (`COLUMNS`)
    shards/00000-of-00008.array_record

A record is a msgpack map (version 1):

    version      1
    image        bytes   the damaged picture: PNG, JPEG or WebP, 8-bit RGB or grey, sRGB, upright
    target       bytes   the same picture as it should be, of the same size
    reference    bytes   another picture of what is to be restored, of any size; nil where there is none
    mask         bytes   PNG, bilevel: the region to refine inside `box`; outside it nothing is marked
    box          4 ints  (x1, y1, x2, y2), the tight box of the region in pixels of the image, half-open
    instruction  str     such as "Refine the text 'OPEN'"
    kind         str     a label of the user's own ("text", "logo"), or ""
    source       str     where the pair comes from
    licence      str     under what terms

Pictures keep the bytes of the files they came from wherever those are plain, so nothing is lost to encoding twice. The
index says all that decides static shapes, so an epoch is planned without decoding a picture. `dataset.json` is written
last: a folder without it is unfinished and is never read.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import json
import multiprocessing
import os
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image
from tqdm import tqdm

from refine_jax import focus, images
from refine_jax.errors import RefineError, listed

VERSION = 1
FORMAT = "refine_jax records"
MANIFEST = "dataset.json"
INDEX = "index.npy"
COLUMNS = ("width", "height", "x1", "y1", "x2", "y2", "reference_width", "reference_height", "instruction_bytes")
PLAIN = ("PNG", "JPEG", "WEBP")  # formats of stored pictures

_BUILDING = "building.json"  # the recipe of an unfinished dataset
_SHARDS = "shards"
_OPEN_SHARDS = 128  # files that one process keeps open
_PER_SHARD = 1024


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
    reference: bytes | None = None
    reference_size: tuple[int, int] = (0, 0)
    kind: str = ""
    source: str = ""
    licence: str = ""

    def row(self) -> tuple[int, ...]:
        """The record's row of the index (`COLUMNS`)."""
        return (*self.size, *self.box, *self.reference_size, len(self.instruction.encode()))


_STORED = ("image", "target", "reference", "mask", "box", "instruction", "kind", "source", "licence")
_KINDS = {"image": bytes, "target": bytes, "mask": bytes, "reference": (bytes, type(None)), "box": list}


def make_record(
    image: images.ImageLike,
    target: images.ImageLike,
    mask: Any,
    instruction: str,
    reference: images.ImageLike | None = None,
    *,
    kind: str = "",
    source: str = "",
    licence: str = "",
) -> Record:
    """A record of pictures (paths, PIL images or uint8 arrays); `mask` may be a box (x1, y1, x2, y2) too.

    Whatever `refine` would see is what is stored: a plain file (PNG, JPEG, WebP; RGB or grey; nothing to turn, convert
    or drop) as its own bytes, everything else as PNG after the same conversion. Raises `RefineError` for a picture
    that cannot be read, two sizes, an empty mask, a box outside the picture, an empty instruction.
    """
    if not instruction.strip():
        raise RefineError("instruction: is empty; say what is to be refined")
    encoded, size = _plain(image, "image")
    wanted, target_size = _plain(target, "target")
    if size != target_size:
        raise RefineError(
            f"target: {target_size[0]}x{target_size[1]} pixels, the image has {size[0]}x{size[1]}; give equal sizes"
        )
    [region] = images.region_masks(mask, size)
    box = tuple(focus.mask_box(region)[0].tolist())
    x1, y1, x2, y2 = box
    marked = _png(Image.fromarray(region[y1:y2, x1:x2] > 0))
    shown, shown_size = _plain(reference, "reference") if reference is not None else (None, (0, 0))
    return Record(encoded, wanted, marked, box, instruction, size, shown, shown_size, kind, source, licence)


def _plain(source: images.ImageLike, name: str) -> tuple[bytes, tuple[int, int]]:
    """(bytes that decode to what `images.read_picture` makes of `source`, (width, height))."""
    picture = images.read_picture(source, name)
    if isinstance(source, (str, os.PathLike)):
        try:
            data = Path(source).read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                plain = image.format in PLAIN and image.mode in ("RGB", "L") and not image.has_transparency_data
                plain = plain and image.size == picture.size and getattr(image, "n_frames", 1) == 1
                if plain:
                    # A profile, a rotation: whatever it is, it may stay where it changes no pixel.
                    doubtful = "icc_profile" in image.info or image.getexif().get(0x0112, 1) != 1
                    if not doubtful or np.array_equal(np.asarray(image.convert("RGB")), picture.rgb):
                        return data, picture.size
        except Exception:  # read_picture could read it in spite of damaged metadata: stored anew
            pass
    return _png(Image.fromarray(picture.rgb[..., 0] if picture.grey else picture.rgb)), picture.size


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


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
    record = Record(
        **{**fields, "box": tuple(fields["box"])}, size=tuple(values[:2]), reference_size=tuple(values[6:8])
    )
    if record.row() != tuple(values) or (record.reference is None) != (values[6] == 0):
        raise RefineError(f"does not agree with the index, which says {dict(zip(COLUMNS, values))}")
    return record


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


class Dataset:
    """A finished dataset, open for random access; picklable, each process opens the shards that it reads.

    Opening checks that all is there and whole, as far as names, sizes, counts and the index's checksum tell; `verify`
    reads every byte. Raises `RefineError`, naming the file and the remedy.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self._readers: OrderedDict[int, ArrayRecordReader] = OrderedDict()
        shards = self.manifest["shards"]
        self.files = [self.folder / _SHARDS / shard["file"] for shard in shards]
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
        if _sha256(path) != stored["sha256"]:
            raise RefineError(f"{path}: its checksum is not the one in {MANIFEST}; copy it again")
        index = np.load(path, mmap_mode="r")
        if index.shape != (self.manifest["records"], len(COLUMNS)) or index.dtype != np.int32:
            raise RefineError(f"{path}: {index.dtype} of shape {index.shape}; build the dataset again")
        return index

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": OrderedDict(), "index": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
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

    def __getitem__(self, number: int) -> Record:
        """Raises `CorruptRecord` where the stored bytes are damaged or do not agree with the index."""
        shard = int(np.searchsorted(self._ends, number, "right"))
        path, position = self.place(number)
        try:
            return decode(self._reader(shard).read([position])[0], self.index[number])
        except (RefineError, RuntimeError, IndexError, ValueError) as error:
            raise self.corrupt(number, error) from None

    def corrupt(self, number: int, error: Exception) -> CorruptRecord:
        """The error of a record that cannot be used for the reason that `error` gives."""
        path, position = self.place(number)
        return CorruptRecord(f"{path}: record {position}: {' '.join(str(error).split())[:300]}")

    def _reader(self, shard: int) -> ArrayRecordReader:
        reader = self._readers.pop(shard, None) or _open_shard(self.files[shard])
        self._readers[shard] = reader
        if len(self._readers) > _OPEN_SHARDS:
            self._readers.popitem(last=False)[1].close()
        return reader


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


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / _BUILDING).is_file():
            raise RefineError(f"{folder}: an unfinished dataset; run the command that builds it again, it continues")
        raise RefineError(f"{folder}: no {MANIFEST} there; give a folder that `refine-jax data` wrote")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            found = f"format {manifest['format']!r} version {manifest['version']!r}"
            raise RefineError(f"{path}: {found}, this version reads {FORMAT!r} {VERSION}; build the dataset again")
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
        for part, result in zip(numbers, _map(functools.partial(_verify_shard, dataset), numbers, workers)):
            found += result[0]
            for total, counted in zip((kinds, sources, licences), result[1:]):
                total.update(counted)
            bar.update(len(part))
    return found, kinds, sources, licences


def _verify_shard(dataset: Dataset, numbers: range) -> tuple[list[str], Counter[str], Counter[str], Counter[str]]:
    path, _ = dataset.place(numbers[0])
    shard = dataset.manifest["shards"][dataset.files.index(path)]
    problems = [] if _sha256(path) == shard["sha256"] else [f"{path}: its checksum is not the one in {MANIFEST}"]
    kinds, sources, licences = Counter(), Counter(), Counter()
    for number in numbers:
        try:
            record = dataset[number]
            kinds[record.kind] += 1
            sources[record.source] += 1
            licences[record.licence] += 1
            for name, size in (("image", record.size), ("target", record.size), ("reference", record.reference_size)):
                if getattr(record, name) is not None:
                    open_picture(getattr(record, name), size, name)
            x1, y1, x2, y2 = record.box
            mask = open_picture(record.mask, (x2 - x1, y2 - y1), "mask").convert("L")
            if mask.getbbox() != (0, 0, x2 - x1, y2 - y1):
                raise RefineError("mask: does not fill its box")
            if not (0 <= x1 < x2 <= record.size[0] and 0 <= y1 < y2 <= record.size[1]):
                raise RefineError(f"box {record.box}: outside the picture")
        except CorruptRecord as error:
            problems.append(str(error))
        except RefineError as error:
            problems.append(str(dataset.corrupt(number, error)))
    return problems, kinds, sources, licences


_work: Callable  # what a worker process does


def _employ(function: Callable) -> None:
    global _work
    _work = function


def _do(item: Any) -> Any:
    return _work(item)


def _map(function: Callable, items: Sequence, workers: int) -> Iterator:
    """`function` of every item, in order; on `workers` processes, 0: on this one."""
    if not workers:
        yield from map(function, items)
        return
    # Not forked: a process with threads (JAX, grain) cannot be copied safely.
    context = multiprocessing.get_context("spawn")
    # The function goes to each process once: it may hold the list of a million files.
    start = dict(mp_context=context, initializer=_employ, initargs=(function,))
    with concurrent.futures.ProcessPoolExecutor(max(1, min(workers, len(items))), **start) as pool:
        futures = [pool.submit(_do, item) for item in items]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


# -------------------------------------------------------------------------------------------------------------- writing


def write_dataset(
    folder: str | os.PathLike,
    make: Callable[[int], Record],
    count: int,
    recipe: Mapping[str, Any],
    *,
    shards: int | None = None,
    workers: int = 0,
    progress: bool = False,
) -> Dataset:
    """Write the records make(0) … make(count - 1) as a dataset; continue where a killed call of the same recipe ended.

    Args:
      make: a pure function of the number, picklable where there are workers; it raises `RefineError` for a record that
        cannot be made.
      recipe: JSON values that decide the records; kept in `dataset.json`. A folder with another recipe is refused; a
        finished one with this recipe is opened as it is.
      shards: how many files (default: one for every 1024 records).
      workers: processes, each making whole shards; 0 makes them in this one.

    A shard is written aside and renamed, so a finished one is whole; an unfinished one is made again. The bytes depend
    on the recipe and on `shards` alone. Where records cannot be made, all that was written is removed and one
    `RefineError` lists every reason.
    """
    folder = Path(folder)
    if count < 1:
        raise RefineError(f"count {count}: give at least 1 record")
    shards = -(-count // _PER_SHARD) if shards is None else shards
    if not 1 <= shards <= count:
        raise RefineError(f"shards {shards}: give 1 to {count}, the number of records")
    plan = {"format": FORMAT, "version": VERSION, "recipe": dict(recipe), "records": count, "shards": shards}
    plan = json.loads(json.dumps(plan))
    try:
        if (folder / MANIFEST).is_file():
            done = _read_manifest(folder)
            if {**plan, "shards": done["shards"]} != {name: done[name] for name in plan} or len(
                done["shards"]
            ) != shards:
                raise RefineError(f"--output {str(folder)!r}: holds another dataset; give another folder")
            _tidy(folder)
            return Dataset(folder)
        _begin(folder, plan)
        bounds = [(count * k // shards, count * (k + 1) // shards) for k in range(shards)]
        names = [f"{k:05d}-of-{shards:05d}.array_record" for k in range(shards)]
        states = {name: _finished(folder / _SHARDS / name) for name in names}
        missing = [(folder / _SHARDS / name, *part) for name, part in zip(names, bounds) if states[name] is None]
        problems: list[str] = []
        with tqdm(total=count, unit="record", disable=not progress, desc="writing") as bar:
            bar.update(sum(s["records"] for s in states.values() if s))
            tick = None if workers else bar.update
            for (path, first, last), made in zip(
                missing, _map(functools.partial(_write_shard, make, tick=tick), missing, workers)
            ):
                states[path.name] = made
                problems += made.get("problems", [])
                bar.update(last - first if workers else 0)
        if problems:
            _discard(folder)
            raise RefineError(f"{len(problems)} of {count} records cannot be made: {listed(problems)}")
        return _finish(folder, plan, names, states)
    except OSError as error:
        raise RefineError(
            f"--output {str(folder)!r}: cannot be written ({error.strerror or error}); mend that and run it again, it "
            "continues"
        ) from None


def _begin(folder: Path, plan: Mapping[str, Any]) -> None:
    building = folder / _BUILDING
    if building.is_file():
        try:
            known = json.loads(building.read_text(encoding="utf-8"))
        except ValueError:
            known = None
        if known != plan:
            raise RefineError(
                f"--output {str(folder)!r}: holds an unfinished dataset of another recipe; delete it or give another "
                "folder"
            )
    elif folder.is_dir() and any(path.name != _BUILDING + ".partial" for path in folder.iterdir()):
        raise RefineError(f"--output {str(folder)!r}: is not empty; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not building.is_file():
        _write_aside(building, json.dumps(plan, indent=1).encode())
    (folder / _SHARDS).mkdir(exist_ok=True)


def _write_aside(path: Path, data: bytes) -> None:
    aside = path.with_name(path.name + ".partial")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _note(path: Path) -> Path:
    """The file beside a shard that says that it is finished, and what is in it."""
    return path.with_suffix(".json")


def _finished(path: Path) -> dict[str, Any] | None:
    """What is known of a shard, None where it is to be made."""
    try:
        state = json.loads(_note(path).read_text(encoding="utf-8"))
        return state if path.stat().st_size == state["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_shard(
    make: Callable[[int], Record], item: tuple[Path, int, int], tick: Callable[[], Any] | None = None
) -> dict[str, Any]:
    """Make the records of one shard: {file, records, bytes, sha256, index}, or {problems} where some cannot be made."""
    path, first, last = item
    aside = path.with_name(path.name + ".partial")
    aside.unlink(missing_ok=True)
    rows, problems = [], []
    try:
        # One record a chunk, as random access wants it; pictures are compressed already.
        writer = ArrayRecordWriter(str(aside), "group_size:1,uncompressed")
        for number in range(first, last):
            try:
                record = make(number)
                rows.append(record.row())
                writer.write(encode(record))
            except RefineError as error:
                problems.append(str(error))
            if tick:
                tick()
        writer.close()
    except RuntimeError as error:  # how the library reports a full or read-only disk
        raise OSError(None, " ".join(str(error).split())[:300]) from None
    if problems:
        return {"problems": problems}
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
        size, digest = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
    state = {"file": path.name, "records": last - first, "bytes": size, "sha256": digest, "index": rows}
    os.replace(aside, path)
    _write_aside(_note(path), json.dumps(state).encode())
    return state


def _finish(folder: Path, plan: Mapping[str, Any], names: list[str], states: Mapping[str, dict]) -> Dataset:
    index = np.array([row for name in names for row in states[name]["index"]], np.int32)
    buffer = io.BytesIO()
    np.save(buffer, index)
    _write_aside(folder / INDEX, buffer.getvalue())
    shards = [{key: states[name][key] for key in ("file", "records", "bytes", "sha256")} for name in names]
    content = json.dumps([VERSION, [[shard["sha256"], shard["records"]] for shard in shards]])
    manifest = {
        **plan,
        "shards": shards,
        "index": {"file": INDEX, "bytes": buffer.tell(), "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()},
        "digest": hashlib.sha256(content.encode()).hexdigest(),
    }
    _write_aside(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    _tidy(folder)
    return Dataset(folder)


def _tidy(folder: Path) -> None:
    """Remove what only the building needed."""
    for path in (folder / _SHARDS).glob("*.json"):
        path.unlink()
    for path in [*folder.glob("*.partial"), *(folder / _SHARDS).glob("*.partial"), folder / _BUILDING]:
        path.unlink(missing_ok=True)


def _discard(folder: Path) -> None:
    """Remove an unfinished dataset; the folder itself stays where something else is in it."""
    shutil.rmtree(folder / _SHARDS, ignore_errors=True)
    (folder / _BUILDING).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
