"""`refine-jax data export`: pairs as files, with the requests that `refine-jax batch` refines them by.

refine-jax data export mine --output held
refine-jax batch --manifest held/requests.jsonl --output-dir refined
refine-jax evaluate --set pairs --data held --results refined
"""

import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from refine_jax import checkpoint
from refine_jax.data import build, records
from refine_jax.errors import RefineError

PAIRS, REQUESTS = "pairs.jsonl", "requests.jsonl"

_SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}


def open_pairs(source: str | os.PathLike) -> tuple[int, Callable[[int], records.Record]]:
    """How many records a dataset, or what `data import` takes (a JSONL file, a folder), has, and what reads one."""
    source = Path(source)
    if (source / records.MANIFEST).is_file():
        dataset = records.Dataset(source)
        return len(dataset), dataset.__getitem__
    entries = build.read_source(source)
    return len(entries), lambda number: entries[number].record()


def export(
    source: str | os.PathLike, output: str | os.PathLike, count: int | None = None, *, progress: bool = False
) -> int:
    """Write the records of `source` (as `open_pairs` takes it) into the folder `output`; returns how many.

    image/, target/, mask/ and reference/ get the pictures, named by the record's number; `pairs.jsonl` says what
    belongs together, as `data import` reads it, and `requests.jsonl` asks `refine-jax batch` for each. The latter are
    written last: a killed call starts again. count: as many, evenly over the source. Raises `RefineError` for a bad
    source, record or count, and where `output` holds other pairs.
    """
    total, read = open_pairs(source)
    count = total if count is None else count
    if not 1 <= count <= total:
        raise RefineError(f"count {count}: give 1 to {total}, the number of records")
    output = Path(output)
    pairs: list[dict[str, Any]] = []
    requests: list[dict[str, Any]] = []
    digits = max(6, len(str(total)))
    numbers = np.linspace(0, total - 1, count).round().astype(int).tolist()
    try:
        if output.exists() and any(output.iterdir()) and not _ours(output):
            raise RefineError(f"--output {str(output)!r}: holds an export, or other files; give a new folder")
        for number in tqdm(numbers, unit="record", desc="export", disable=not progress):
            name, record = f"{number:0{digits}d}", read(number)
            files = _write_pictures(record, output, name)
            texts = {key: getattr(record, key) for key in ("kind", "source", "licence") if getattr(record, key)}
            pairs.append({**files, "instruction": record.instruction, **texts})
            asked = {key: path for key, path in files.items() if key != "target"}
            requests.append({"id": name, **asked, "prompt": record.instruction})
        for name, lines in ((REQUESTS, requests), (PAIRS, pairs)):
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            checkpoint.write_text(output / name, text)
    except OSError as error:
        raise RefineError(f"--output {str(output)!r}: cannot be written ({error.strerror})") from None
    return count


def _ours(folder: Path) -> bool:
    """Whether all that is in the folder is of a killed export."""
    unfinished = {"image", "target", "mask", "reference", REQUESTS, f"{REQUESTS}.partial", f"{PAIRS}.partial"}
    return {path.name for path in folder.iterdir()} <= unfinished


def _write_pictures(record: records.Record, output: Path, name: str) -> Mapping[str, str]:
    """Write a record's pictures; field -> path in `output`."""
    x1, y1, x2, y2 = record.box
    mask = Image.new("1", record.size)
    mask.paste(records.open_picture(record.mask, (x2 - x1, y2 - y1), "mask"), (x1, y1))
    pictures: dict[str, Image.Image | bytes] = {
        "image": record.image if record.image_box is None else record.whole_image(),
        "target": record.target,
        "mask": mask,
    }
    if record.reference is not None:
        pictures["reference"] = record.reference
    files = {}
    for field, picture in pictures.items():
        if isinstance(picture, Image.Image):
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            data, suffix = buffer.getvalue(), ".png"
        else:
            with Image.open(io.BytesIO(picture)) as opened:
                data, suffix = picture, _SUFFIXES[opened.format]
        path = output / field / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.partial")
        aside.write_bytes(data)
        os.replace(aside, path)
        files[field] = f"{field}/{path.name}"
    return files
