"""Writing datasets (`records`): records of pictures, and shards of records that survive a killed writer."""

import dataclasses
import functools
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tqdm import tqdm

from refine_jax import focus, images
from refine_jax.data.records import (
    BUILDING,
    INDEX,
    MANIFEST,
    PLAIN,
    SHARDS,
    Dataset,
    Record,
    Shards,
    encode,
    read_manifest,
)
from refine_jax.data.workers import spread
from refine_jax.errors import RefineError, listed

_PER_SHARD = 1024

S = TypeVar("S", bound=Shards)

# ------------------------------------------------------------------------------------------------------------- records


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
    damaged, wanted = images.read_picture(image, "image"), images.read_picture(target, "target")
    size = damaged.size
    if size != wanted.size:
        raise RefineError(
            f"target: {wanted.size[0]}x{wanted.size[1]} pixels, the image has {size[0]}x{size[1]}; give equal sizes"
        )
    [region] = images.region_masks(mask, size)
    box = tuple(focus.mask_box(region)[0].tolist())
    differs, found = focus.mask_box((damaged.rgb != wanted.rgb).any(axis=-1))
    part = tuple(differs.tolist()) if found else box
    x1, y1, x2, y2 = part
    if 2 * (x2 - x1) * (y2 - y1) <= size[0] * size[1]:
        cut = dataclasses.replace(damaged, rgb=damaged.rgb[y1:y2, x1:x2])
        encoded = _png(cut)
    else:
        part, encoded = None, _plain(image, damaged)
    x1, y1, x2, y2 = box
    shown = None if reference is None else images.read_picture(reference, "reference").on_white()
    return Record(
        image=encoded,
        image_box=part,
        target=_plain(target, wanted),
        mask=_saved(Image.fromarray(region[y1:y2, x1:x2] > 0)),
        box=box,
        instruction=instruction,
        size=size,
        reference=None if shown is None else _plain(reference, shown),
        reference_size=(0, 0) if shown is None else shown.size,
        kind=kind,
        source=source,
        licence=licence,
    )


def _plain(source: images.ImageLike, picture: images.Picture) -> bytes:
    """Bytes that decode to `picture`, which `images.read_picture` made of `source`: those of the file if they do."""
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
                        return data
        except Exception:  # read_picture could read it in spite of damaged metadata: stored anew
            pass
    return _png(picture)


def _png(picture: images.Picture) -> bytes:
    return _saved(Image.fromarray(np.ascontiguousarray(picture.rgb[..., 0] if picture.grey else picture.rgb)))


def _saved(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------- datasets


def write_dataset(
    folder: str | os.PathLike, make: Callable[[int], Record], count: int, recipe: Mapping[str, Any], **how: Any
) -> Dataset:
    """Write the records make(0) … make(count - 1) as a dataset. Arguments, kills, errors: as `write_shards`.

    Where records cannot be made, nothing is left of the dataset.
    """
    return write_shards(Dataset, folder, _Packed(make), count, recipe, **how)


@dataclasses.dataclass(frozen=True)
class _Packed:
    make: Callable[[int], Record]

    def __call__(self, number: int) -> tuple[tuple[int, ...], bytes]:
        record = self.make(number)
        return record.row(), encode(record)


def write_shards(
    kind: type[S],
    folder: str | os.PathLike,
    make: Callable[[int], tuple[Sequence[int], bytes]],
    count: int,
    recipe: Mapping[str, Any],
    *,
    shards: int | None = None,
    workers: int = 0,
    progress: bool = False,
    discard: bool = True,
) -> S:
    """Write make(0) … make(count - 1), each (row of the index, bytes); continue where a killed call ended.

    Args:
      make: a pure function of the number, picklable where there are workers; it raises `RefineError` for a record that
        cannot be made.
      recipe: JSON values that decide the records; kept in `dataset.json`. A folder with another recipe is refused; a
        finished one with this recipe is opened as it is.
      shards: how many files (default: one for every 1024 records).
      workers: processes, each making whole shards; 0 makes them in this one.
      discard: where records cannot be made, remove all that was written.

    A shard is written aside and renamed, so a finished one is whole; an unfinished one is made again. The bytes depend
    on the recipe and on `shards` alone. One `RefineError` lists every record that cannot be made, and why.
    """
    folder = Path(folder)
    if count < 1:
        raise RefineError(f"count {count}: give at least 1 record")
    shards = -(-count // _PER_SHARD) if shards is None else shards
    if not 1 <= shards <= count:
        raise RefineError(f"shards {shards}: give 1 to {count}, the number of records")
    plan = {"format": kind.format, "version": kind.version, "recipe": dict(recipe), "records": count, "shards": shards}
    plan = json.loads(json.dumps(plan))
    try:
        if (folder / MANIFEST).is_file():
            done = read_manifest(folder, kind.format, kind.version)
            if {**plan, "shards": done["shards"]} != {name: done[name] for name in plan} or len(
                done["shards"]
            ) != shards:
                raise RefineError(f"--output {str(folder)!r}: holds another dataset; give another folder")
            _tidy(folder)
            return kind(folder)
        _begin(folder, plan)
        bounds = [(count * k // shards, count * (k + 1) // shards) for k in range(shards)]
        names = [f"{k:05d}-of-{shards:05d}.array_record" for k in range(shards)]
        states = {name: _finished(folder / SHARDS / name) for name in names}
        missing = [(folder / SHARDS / name, *part) for name, part in zip(names, bounds) if states[name] is None]
        problems: list[str] = []
        with tqdm(total=count, unit="record", disable=not progress, desc="writing") as bar:
            bar.update(sum(s["records"] for s in states.values() if s))
            tick = None if workers else bar.update
            for (path, first, last), made in zip(
                missing, spread(functools.partial(_write_shard, make, tick=tick), missing, workers)
            ):
                states[path.name] = made
                problems += made.get("problems", [])
                bar.update(last - first if workers else 0)
        if problems:
            if discard:
                _discard(folder)
            raise RefineError(f"{len(problems)} of {count} records cannot be made: {listed(problems)}")
        _finish(folder, plan, names, states)
        return kind(folder)
    except OSError as error:
        raise RefineError(
            f"--output {str(folder)!r}: cannot be written ({error.strerror or error}); mend that and run it again, it "
            "continues"
        ) from None


def _begin(folder: Path, plan: Mapping[str, Any]) -> None:
    building = folder / BUILDING
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
    elif folder.is_dir() and any(path.name != BUILDING + ".partial" for path in folder.iterdir()):
        raise RefineError(f"--output {str(folder)!r}: is not empty; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not building.is_file():
        _write_aside(building, json.dumps(plan, indent=1).encode())
    (folder / SHARDS).mkdir(exist_ok=True)


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
    make: Callable[[int], tuple], item: tuple[Path, int, int], tick: Callable[[], Any] | None = None
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
                row, data = make(number)
                rows.append([int(value) for value in row])
                writer.write(data)
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


def _finish(folder: Path, plan: Mapping[str, Any], names: list[str], states: Mapping[str, dict]) -> None:
    index = np.array([row for name in names for row in states[name]["index"]], np.int32)
    buffer = io.BytesIO()
    np.save(buffer, index)
    _write_aside(folder / INDEX, buffer.getvalue())
    shards = [{key: states[name][key] for key in ("file", "records", "bytes", "sha256")} for name in names]
    content = json.dumps([plan["version"], [[shard["sha256"], shard["records"]] for shard in shards]])
    manifest = {
        **plan,
        "shards": shards,
        "index": {"file": INDEX, "bytes": buffer.tell(), "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()},
        "digest": hashlib.sha256(content.encode()).hexdigest(),
    }
    _write_aside(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    _tidy(folder)


def _tidy(folder: Path) -> None:
    """Remove what only the building needed."""
    for path in (folder / SHARDS).glob("*.json"):
        path.unlink()
    for path in [*folder.glob("*.partial"), *(folder / SHARDS).glob("*.partial"), folder / BUILDING]:
        path.unlink(missing_ok=True)


def _discard(folder: Path) -> None:
    """Remove an unfinished dataset; the folder itself stays where something else is in it."""
    shutil.rmtree(folder / SHARDS, ignore_errors=True)
    (folder / BUILDING).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
