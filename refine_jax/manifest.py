"""The manifest of `refine-jax batch`: JSON lines, one request a line.

A manifest comes from outside and may hold anything. A line that is no request becomes a `Refused` with its reason,
never an exception, and the others go on; memory grows with the number of lines, never with their length. No jax and no
model are imported: what only a model can tell (tokens of a prompt, the sizes that it paints) is found later.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import stat
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refine_jax import images, limits
from refine_jax.errors import RefineError

MAX_REQUESTS = 5_000_000  # of a manifest: 20 bytes of memory each, 60 while it is indexed
MAX_LINE = 2**20  # bytes
MAX_PROMPT = 20_000  # characters; what a model reads of them is less
MAX_REGIONS = 256
MAX_PATH = 4096  # characters
MAX_FILE = 2**30  # bytes; some readers of pictures load a file whole to see its header

TASKS = ("refine", "regenerate", "generate")


@dataclasses.dataclass(frozen=True)
class Request:
    """One line that can be asked of a model, as far as this can be said without one.

    index: position among the lines that are not blank, from 0; line: from 1; id: names the result. arguments: keyword
    arguments of `Refiner.refine`, `Regenerator.regenerate` or `.generate`, by the task; only what was given; files as
    resolved `Path`, a box and a size as tuples; of `regions`, mask_or_box, prompt and maybe reference are lists, one
    entry a region. digest: SHA-256 (hex) of the task, the arguments with paths as in the manifest, and the size and
    mtime_ns of every file: equal as long as the result is, whatever the line's id, key order and white space.
    """

    index: int
    line: int
    id: str
    task: str
    arguments: dict[str, Any]
    digest: str


@dataclasses.dataclass(frozen=True)
class Refused:
    """One line that is no request. id: None where it cannot be read, is unusable or belongs to an earlier line; reason:
    one line that names line, field, value and remedy."""

    index: int
    line: int
    id: str | None
    reason: str


@dataclasses.dataclass(frozen=True)
class _File:
    """A file that a line names: where, how it is written there, and what it is on disk."""

    field: str
    written: str
    path: Path
    size: int
    mtime_ns: int


# -------------------------------------------------------------------------------------------------------- one JSON line

_BOM = b"\xef\xbb\xbf"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        again = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise RefineError(f"field {_shown(again)}: given twice in one object; keep one")
    return found


def _integer(text: str) -> int | float:
    """No field takes so many digits, and turning them into an int takes quadratic time."""
    return int(text) if len(text) <= 40 else float(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer)


def _decode(content: bytes) -> dict[str, Any]:
    """The object of a line, fields of null left out. Raises `RefineError` for everything else."""
    if len(content) > MAX_LINE:
        raise RefineError(f"longer than {MAX_LINE:,} bytes; give fewer regions a line or shorter prompts")
    try:
        text = content.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        raise RefineError(f"byte {error.start + 1} is not UTF-8; save the manifest as UTF-8") from None
    try:
        value = _DECODER.decode(text)
    except RefineError:
        raise
    except RecursionError:
        raise RefineError("nested too deeply; a request is an object of texts, numbers and lists of them") from None
    except ValueError as error:
        what, where = getattr(error, "msg", str(error)), getattr(error, "colno", 1)
        raise RefineError(f"no JSON ({what}, character {where}); give one JSON object a line") from None
    if not isinstance(value, dict):
        raise RefineError(f"holds {_shown(value)}; give one JSON object a line")
    return _given(value)


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _shown(value: Any) -> str:
    """A value for a message: short, on one line, printable, whatever it is."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else f"{value[:60]!r}…"
    if isinstance(value, dict):
        return f"an object of {len(value)} fields"
    if isinstance(value, list):
        plain = len(value) <= 8 and not any(isinstance(item, (str, list, dict)) for item in value)
        return f"[{', '.join(map(_shown, value))}]" if plain else f"a list of {len(value)}"
    return json.dumps(value)


# ------------------------------------------------------------------------------------------------------------ one field

_Check = Callable[[str, Any], Any]


def _whole(bounds: tuple[int, int]) -> _Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not bounds[0] <= value <= bounds[1]:
            raise RefineError(f"{name} {_shown(value)}: give a whole number from {bounds[0]} to {bounds[1]}")
        return value

    return check


def _number(bounds: tuple[float, float]) -> _Check:
    def check(name: str, value: Any) -> float:
        try:
            return limits.number(name, value, bounds)
        except RefineError:  # its message shows the value whole
            raise RefineError(f"{name} {_shown(value)}: give {limits.span(bounds)}") from None

    return check


def _choice(*options: Any) -> _Check:
    def check(name: str, value: Any) -> Any:
        # Not `in`: of numbers 1 is True, and of lists nothing is known.
        for option in options:
            if type(value) is type(option) and value == option:
                return value
        raise RefineError(f"{name} {_shown(value)}: give {' or '.join(json.dumps(option) for option in options)}")

    return check


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RefineError(f"{name} {_shown(value)}: give a text")
    if len(value) > MAX_PROMPT:
        raise RefineError(f"{name} {_shown(value)}: {len(value):,} characters; give at most {MAX_PROMPT:,}")
    if "\0" in value:
        raise RefineError(f"{name} {_shown(value)}: holds a NUL character; leave it out")
    return _paired(name, value)


def _paired(name: str, value: str) -> str:
    if _SURROGATE.search(value):
        raise RefineError(f"{name} {_shown(value)}: holds half of a surrogate pair; write the whole character")
    return value


def _box(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) != 4 or any(type(side) is not int for side in value):
        raise RefineError(f"{name} {_shown(value)}: give four whole numbers [x1, y1, x2, y2]")
    x1, y1, x2, y2 = value
    if not (0 <= x1 < x2 and 0 <= y1 < y2 and max(value) <= images.MAX_SIDE):
        raise RefineError(
            f"{name} {_shown(value)}: is empty or outside every picture; give 0 <= x1 < x2 and 0 <= y1 < y2 "
            f"of at most {images.MAX_SIDE}"
        )
    return x1, y1, x2, y2


def _size(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or any(type(side) is not int for side in value):
        raise RefineError(f"{name} {_shown(value)}: give two whole numbers [width, height]")
    width, height = value
    if not (min(value) >= 1 and max(value) <= images.MAX_SIDE and width * height <= images.MAX_PIXELS):
        raise RefineError(
            f"{name} {_shown(value)}: give sides from 1 to {images.MAX_SIDE}, {images.MAX_PIXELS:,} pixels in all"
        )
    return width, height


def _interval(name: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise RefineError(f"{name} {_shown(value)}: give two times [lo, hi] within 0 and 1")
    low, high = (_number(limits.TIME)(f"{name}[{k}]", time) for k, time in enumerate(value))
    return limits.interval(name, low, high)


_CHECKS: dict[str, _Check] = {
    "prompt": _text,
    "seed": _whole(limits.SEED),
    "steps": _whole(limits.STEPS),
    "box": _box,
    "negative_prompt": _text,
    "true_cfg_scale": _number(limits.SCALE),
    "margin": _number(limits.MARGIN),
    "focus": _choice(True, False),
    "feather": _choice(*limits.FEATHERS),
    "rounds": _whole(limits.ROUNDS),
    "text_cfg": _number(limits.TEXT_CFG),
    "image_cfg": _number(limits.IMAGE_CFG),
    "renorm": _choice(*limits.RENORMS),
    "renorm_min": _number(limits.RENORM_MIN),
    "interval": _interval,
    "shift": _number(limits.SHIFT),
    "size": _size,
}
_FILES = ("image", "mask", "reference")
_AREAS = ("mask", "box", "regions")
_COMMON = ("prompt", "seed", "steps")
_GUIDED = ("text_cfg", "renorm", "renorm_min", "interval", "shift")
_REFINE = ("negative_prompt", "true_cfg_scale", "margin", "focus", "feather")
_REGION = ("mask", "box", "prompt", "reference")
_FIELDS: dict[str, tuple[str, ...]] = {
    "refine": (*_COMMON, "image", *_AREAS, "reference", *_REFINE),
    "regenerate": (*_COMMON, "image", "rounds", "image_cfg", *_GUIDED),
    "generate": (*_COMMON, "size", *_GUIDED),
}

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# Names of devices on Windows, also before a suffix: nobody could copy the results there.
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def _id(fields: Mapping[str, Any], line: int) -> str:
    """The id that a line asks for. Raises `RefineError` where no file can be called so."""
    value = fields.get("id", str(line))
    if not isinstance(value, str):
        raise RefineError(f"id {_shown(value)}: give a text in quotes")
    if not _ID.fullmatch(value):
        raise RefineError(f"id {_shown(value)}: give 1 to 128 of A-Z a-z 0-9 . _ - that begin with a letter or a digit")
    if _RESERVED.fullmatch(value):
        raise RefineError(f"id {_shown(value)}: names a device on Windows; give another")
    return value


# -------------------------------------------------------------------------------------------------------- the manifest


class Manifest:
    """An index of a manifest: where its lines are, and which repeat an id; not the lines.

    `read` may be called from several threads. The file is kept open, so that another one renamed over it does no harm;
    one that is written to in place is noticed at the lines that changed.
    """

    def __init__(self, path: str | os.PathLike, root: str | os.PathLike | None = None):
        """Reads the file once, from end to end. root: a folder whose files may be named, besides the manifest's own
        (default: none).

        Raises `RefineError` for a file that cannot be read or is no regular one (a pipe cannot be read twice), one that
        holds no request or more than `MAX_REQUESTS`, and for a root that is no folder.
        """
        self.path = Path(path)
        self._name = f"manifest {os.fspath(path)!r}"
        if root is not None and not os.path.isdir(root):
            raise RefineError(f"root {os.fspath(root)!r}: no such folder; check the path")
        try:
            folders = [os.path.dirname(os.path.abspath(path)), *([] if root is None else [root])]
            self._folders = [os.path.realpath(folder) for folder in folders]
            status = os.stat(path)
            if stat.S_ISDIR(status.st_mode):
                raise RefineError(f"{self._name}: is a folder; give a file of JSON lines")
            if not stat.S_ISREG(status.st_mode):
                raise RefineError(f"{self._name}: a pipe or device cannot be read twice; save it as a file")
            self._file = open(path, "rb")
            try:
                self._index()
            except BaseException:
                self._file.close()
                raise
        except RefineError:
            raise
        except FileNotFoundError:
            raise RefineError(f"{self._name}: no such file; check the path") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RefineError(f"{self._name}: cannot be read ({reason}); check it") from None

    def _index(self) -> None:
        """Fill `_offsets`, `_lines`, `_sums` (by request), `_again` and `_first` (by repeated id), `digest`."""
        file, whole = self._file, hashlib.sha256()
        self._offsets, self._lines, self._sums, claims = array("Q"), array("Q"), array("I"), array("Q")
        offset = line = 0
        while part := file.readline(MAX_LINE + 1):
            line += 1
            if line == 1 and part[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise RefineError(f"{self._name}: is UTF-16; save it as UTF-8")
            content = part.removesuffix(b"\n")
            if content.removeprefix(_BOM).strip(b" \t\r"):
                if len(self._offsets) == MAX_REQUESTS:
                    raise RefineError(f"{self._name}: more than {MAX_REQUESTS:,} requests; split it")
                self._offsets.append(offset)
                self._lines.append(line)
                self._sums.append(zlib.crc32(content))
                try:
                    claim = _id(_decode(content), line).lower()
                except RefineError:
                    claim = f"\0{line}"  # nobody's
                claims.append(int.from_bytes(hashlib.blake2b(claim.encode(), digest_size=8).digest()))
            while part:
                offset += len(part)
                whole.update(part)
                part = b"" if part.endswith(b"\n") else file.readline(MAX_LINE)
        if not self._offsets:
            raise RefineError(f"{self._name}: holds no request; give one JSON object a line")
        self._end = offset
        self.digest = whole.hexdigest()
        self._again, self._first = _repeated(np.frombuffer(claims, np.uint64))

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self) -> Iterator[Request | Refused]:
        return map(self.read, range(len(self)))

    def __enter__(self) -> "Manifest":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def read(self, index: int) -> Request | Refused:
        """The request `index`, or why it is none. Files are looked up, not opened.

        Raises `IndexError` for an index out of range, `RefineError` where the manifest itself changed or is gone.
        """
        return self._read(index)[0]

    def line(self, index: int) -> int:
        """The number of the line of request `index`, from 1."""
        return self._lines[index]

    def head(self, index: int) -> tuple[str, str | None]:
        """What request `index` is called, "line 7" where it has no id, and its task, None where that cannot be told.

        No file is looked up, so the request may be refused all the same. Raises as `read`.
        """
        content, name = self._content(index), f"line {self._lines[index]}"
        try:
            fields = _decode(content)
            name = self._own_id(index, fields)
            return name, _task(fields)
        except RefineError:
            return name, None

    def _read(self, index: int) -> tuple[Request | Refused, list[_File]]:
        """`read`, and the files that the request names, each once."""
        content = self._content(index)
        index, id, files = int(index), None, {}
        line = self._lines[index]
        try:
            fields = _decode(content)
            id = self._own_id(index, fields)
            task, arguments = self._request(fields, files)
        except RefineError as error:
            return Refused(index, line, id, f"line {line}: {error}"), []
        return Request(index, line, id, task, _opened(arguments), _digest(task, arguments)), list(files.values())

    def _own_id(self, index: int, fields: Mapping[str, Any]) -> str:
        """The id of a line. Raises `RefineError` for one that cannot be used, or that an earlier line has."""
        wanted = _id(fields, self._lines[index])
        if (first := self._earlier(index)) is not None:
            which = "" if "id" in fields else ", the number of the line"
            raise RefineError(
                f"id {wanted!r}{which}: line {first} has it already (upper and lower case are the same); give another"
            )
        return wanted

    def _content(self, index: int) -> bytes:
        """The bytes of a line, of one that is too long a few more than allowed."""
        if not 0 <= index < len(self):
            raise IndexError(f"request {index} of {len(self)}")
        start = self._offsets[index]
        following = self._offsets[index + 1] if index + 1 < len(self) else self._end
        stop, parts = min(following, start + MAX_LINE + 1), []
        try:
            while start < stop and (part := os.pread(self._file.fileno(), stop - start, start)):
                parts.append(part)
                start += len(part)
        except OSError as error:
            raise RefineError(f"{self._name}: cannot be read any more ({error.strerror}); check its disk") from None
        content = b"".join(parts).partition(b"\n")[0]
        if zlib.crc32(content) != self._sums[index]:
            raise RefineError(f"{self._name}: line {self._lines[index]} changed since the start; start again")
        return content

    def _earlier(self, index: int) -> int | None:
        """The line that has the id of request `index` already."""
        place = int(np.searchsorted(self._again, index))
        if place == len(self._again) or self._again[place] != index:
            return None
        return self._lines[int(self._first[place])]

    # --------------------------------------------------------------------------------------------- fields of a request

    def _request(self, fields: Mapping[str, Any], files: dict[str, _File]) -> tuple[str, dict[str, Any]]:
        """Task and arguments of a line, a `_File` for each path; fills `files`. Raises `RefineError`."""
        task = _task(fields)
        for name in fields:
            if name in ("id", "task", *_FIELDS[task]):
                continue
            which = f"is no field of {task!r}" if any(name in known for known in _FIELDS.values()) else "unknown"
            raise RefineError(
                f"field {_shown(name)}: {which}; leave it out, or give one of id, task, {', '.join(_FIELDS[task])}"
            )
        if "image" in _FIELDS[task] and "image" not in fields:
            raise RefineError(f"image: missing; {task!r} takes a picture")
        if task == "refine":
            _exactly_one([name for name in _AREAS if name in fields], _AREAS)
        values = {
            name: self._value(name, name, value, files)
            for name, value in fields.items()
            if name not in ("id", "task", "regions")
        }
        regions = self._regions(fields["regions"], files) if "regions" in fields else [values]
        prompts = [region.get("prompt", values.get("prompt")) for region in regions]
        for number, prompt in enumerate(prompts):
            if prompt is None:
                where = f"regions[{number}].prompt" if "regions" in fields else "prompt"
                raise RefineError(f"{where}: missing; say what the result is to show")
        if task != "refine":
            return task, values
        arguments = {name: value for name, value in values.items() if name not in _AREAS}
        masks = [region.get("mask", region.get("box")) for region in regions]
        if "regions" not in fields:
            return task, {**arguments, "mask_or_box": masks[0]}
        references = [region.get("reference", values.get("reference")) for region in regions]
        if any(references):
            arguments["reference"] = references
        return task, {**arguments, "mask_or_box": masks, "prompt": prompts}

    def _regions(self, value: Any, files: dict[str, _File]) -> list[dict[str, Any]]:
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_REGIONS:
            raise RefineError(f"regions {_shown(value)}: give a list of 1 to {MAX_REGIONS} objects")
        regions = []
        for number, region in enumerate(value):
            where = f"regions[{number}]"
            if not isinstance(region, dict):
                raise RefineError(f"{where} {_shown(region)}: give an object with a mask or a box")
            region = _given(region)
            for name in region:
                if name not in _REGION:
                    raise RefineError(
                        f"field {_shown(name)} of {where}: unknown; leave it out, or give one of {', '.join(_REGION)}"
                    )
            _exactly_one([name for name in ("mask", "box") if name in region], ("mask", "box"), f"{where}: ")
            regions.append({k: self._value(k, f"{where}.{k}", v, files) for k, v in region.items()})
        return regions

    def _value(self, name: str, where: str, value: Any, files: dict[str, _File]) -> Any:
        if name not in _FILES:
            return _CHECKS[name](where, value)
        # Many regions may name one file, and what is said of it must be one thing.
        if isinstance(value, str) and value in files:
            return files[value]
        return files.setdefault(value, self._lookup(where, value))

    def _lookup(self, name: str, value: Any) -> _File:
        """The file at a path of the manifest. Raises `RefineError` unless it is a regular one in an allowed folder."""
        label = f"{name} {_shown(value)}"
        if not isinstance(value, str) or not value:
            raise RefineError(f"{label}: give the path of a picture file")
        if len(value) > MAX_PATH:
            raise RefineError(f"{label}: a path of {len(value):,} characters; give at most {MAX_PATH:,}")
        if _CONTROL.search(value):
            raise RefineError(f"{label}: holds a control character; rename the file")
        _paired(name, value)
        try:
            # Where it leads to comes first: nothing is told of files outside, not even whether they are there.
            path = os.path.realpath(os.path.join(self._folders[0], value))
            if not any(os.path.commonpath([path, folder]) == folder for folder in self._folders):
                raise RefineError(
                    f"{label}: leads outside the manifest's folder; move the file, or allow its folder with --root"
                )
            status = os.lstat(path)
        except RefineError:
            raise
        except (FileNotFoundError, NotADirectoryError):
            raise RefineError(f"{label}: no such file; paths start from the manifest's folder") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise RefineError(f"{label}: cannot be looked up ({reason}); check the path") from None
        if stat.S_ISDIR(status.st_mode):
            raise RefineError(f"{label}: is a folder; give a picture file")
        if not stat.S_ISREG(status.st_mode):
            raise RefineError(f"{label}: is no regular file; give a picture file")
        if status.st_size == 0:
            raise RefineError(f"{label}: is empty; export the picture again")
        if status.st_size > MAX_FILE:
            raise RefineError(f"{label}: {status.st_size:,} bytes; give a picture file of at most {MAX_FILE:,}")
        return _File(name, value, Path(path), status.st_size, status.st_mtime_ns)


def _task(fields: Mapping[str, Any]) -> str:
    """The task of a line. Raises `RefineError` for an unknown one."""
    areas = any(name in fields for name in _AREAS)
    inferred = "refine" if areas else "regenerate" if "image" in fields else "generate"
    return _choice(*TASKS)("task", fields.get("task", inferred))


def _exactly_one(found: list[str], names: tuple[str, ...], where: str = "") -> None:
    if len(found) != 1:
        given = " and ".join(found) or "none"
        raise RefineError(f"{where}{given} given; give exactly one of {', '.join(names)}")


def _repeated(claims: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of values `[N]` those seen before: their positions `[M]`, ascending, and the first positions `[M]` of each."""
    order = np.argsort(claims, kind="stable")
    fresh = np.ones(len(claims), bool)
    ordered = claims[order]
    np.not_equal(ordered[1:], ordered[:-1], out=fresh[1:])
    places = np.flatnonzero(~fresh)
    starts = np.flatnonzero(fresh)
    first = order[starts[np.searchsorted(starts, places) - 1]]
    again = order[places]
    by_position = np.argsort(again)
    return again[by_position], first[by_position]


def _opened(value: Any) -> Any:
    """Arguments with the path of each `_File`."""
    if isinstance(value, dict):
        return {name: _opened(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_opened(item) for item in value]
    return value.path if isinstance(value, _File) else value


def _digest(task: str, arguments: Mapping[str, Any]) -> str:
    known = lambda file: {"path": file.written, "size": file.size, "mtime_ns": file.mtime_ns}
    text = json.dumps([task, arguments], sort_keys=True, separators=(",", ":"), allow_nan=False, default=known)
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------- checking


def check(manifest: Manifest) -> Iterator[Refused]:
    """Every line that would be refused, in order, one reason each: what `Manifest.read` refuses, and pictures whose
    header is none, or too large, and boxes that leave theirs. No pixel is decoded.

    Raises `RefineError` where the manifest itself changed or is gone.
    """
    header = functools.lru_cache(maxsize=4096)(_header)  # lines share references
    for index in range(len(manifest)):
        found, files = manifest._read(index)
        if isinstance(found, Refused):
            yield found
            continue
        try:
            sizes = {}
            for file in files:
                size = header(file.path, file.size, file.mtime_ns)
                if isinstance(size, str):
                    raise RefineError(f"{file.field} {_shown(file.written)}: {size}")
                sizes[file.path] = size
            if found.task == "refine":
                areas = found.arguments["mask_or_box"]
                inside = sizes[found.arguments["image"]]
                for number, area in enumerate(areas if isinstance(areas, list) else [areas]):
                    if isinstance(area, Path):
                        where = f"regions[{number}].mask" if isinstance(areas, list) else "mask"
                        images.check_mask_size(sizes[area], inside, where)
                    if isinstance(area, tuple) and (area[2] > inside[0] or area[3] > inside[1]):
                        where = f"regions[{number}].box" if isinstance(areas, list) else "box"
                        raise RefineError(
                            f"{where} {_shown(list(area))}: outside the picture of {inside[0]}x{inside[1]}; "
                            f"clip it to [0, 0, {inside[0]}, {inside[1]}]"
                        )
        except RefineError as error:
            yield Refused(found.index, found.line, found.id, f"line {found.line}: {error}")


def _header(path: Path, size: int, mtime_ns: int) -> tuple[int, int] | str:
    """(width, height) of a picture, or what is wrong with it."""
    try:
        return images.picture_size(path)
    except RefineError as error:
        return str(error).removeprefix(f"image {os.fspath(path)!r}: ")


def region_count(request: Request) -> int:
    """How many pictures the model paints in one go for this request: the regions to refine; 1 of the other tasks."""
    areas = request.arguments.get("mask_or_box")
    return len(areas) if isinstance(areas, list) else 1
