"""`refine-jax data`: datasets (`records`) of procedural pairs or of a user's own pictures, checks, and caches."""

import argparse
import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refine_jax import focus
from refine_jax.data import assets, records, synth, writer
from refine_jax.data.plan import Plan, enlarge
from refine_jax.errors import RefineError, listed

# ----------------------------------------------------------------------------------------------------- procedural pairs

_REFERENCE_SHARE = 2 / 3  # as in the paper's Refine-30K
_LICENCES = {
    "train": "CC-BY-4.0 (photographs: refine_jax/assets/photos/ATTRIBUTION.md)",
    "eval": "CC-BY-2.0 (photographs of scikit-image and scikit-learn); for evaluation",
}


def synth_record(seed: int, split: str, size: tuple[int, int], index: int) -> records.Record:
    """The record number `index`: a whole photograph (`synth.scene`) of which one word or logo is damaged.

    A whole picture and not a ready-made crop (`synth.sample`): the loader finds the crop as `refine` does, with any
    margin, and the other words and logos of the scene stay intact. One record a scene, so that no two share a
    photograph's window, and a record depends on its number alone, whatever shards and workers there are.
    """
    scene = synth.scene(seed, index, split, size)
    region = index % len(scene["masks"])
    mask = scene["masks"][region]
    draw = np.random.PCG64(np.random.SeedSequence((seed, index, 3))).random_raw() / 2**64
    return writer.make_record(
        np.where(mask[..., None] > 0, scene["image"], scene["target"]),
        scene["target"],
        mask,
        scene["instructions"][region],
        scene["references"][region] if draw < _REFERENCE_SHARE else None,
        kind=scene["kinds"][region],
        source=f"refine_jax synth {split} seed {seed} scene {index}",
        licence=_LICENCES[split],
    )


def write_synth(
    output: str | Path,
    count: int,
    seed: int = 0,
    split: str = "train",
    size: tuple[int, int] = (256, 512),
    *,
    shards: int | None = None,
    workers: int = 0,
    progress: bool = False,
) -> records.Dataset:
    """Write `count` procedural pairs; `size` bounds the pictures' sides (multiples of 16). Resumes after a kill.

    Raises `RefineError` for sizes out of range, when asset packages are missing, and as `writer.write_dataset` does.
    """
    if not 256 <= size[0] <= size[1] <= 4096 or any(side % 16 for side in size):
        raise RefineError(f"size {size[0]},{size[1]}: give two multiples of 16 from 256 to 4096, the smaller one first")
    if seed < 0:
        raise RefineError(f"seed {seed}: give 0 or more")
    assets.faces(split), assets.logos(split), assets.photo_files(split)
    recipe = {"kind": "synth", "seed": seed, "split": split, "size": list(size)}
    make = functools.partial(synth_record, seed, split, tuple(size))
    return writer.write_dataset(output, make, count, recipe, shards=shards, workers=workers, progress=progress)


# --------------------------------------------------------------------------------------------------- a user's own files

_PATHS = ("image", "target", "mask", "reference")
_TEXTS = ("instruction", "kind", "source", "licence")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".avif", ".gif")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of an import: where it stands, what it says; a mask is a path or a box (x1, y1, x2, y2)."""

    where: str
    image: str
    target: str
    mask: str | tuple[int, ...]
    instruction: str
    reference: str | None = None
    kind: str = ""
    source: str = ""
    licence: str = ""

    def files(self) -> list[str]:
        return [v for v in (self.image, self.target, self.mask, self.reference) if isinstance(v, str)]

    def record(self) -> records.Record:
        try:
            values = dataclasses.asdict(self)
            del values["where"]
            return writer.make_record(**values)
        except RefineError as error:
            raise RefineError(f"{self.where}: {error}") from None


@dataclasses.dataclass(frozen=True)
class _Import:
    entries: tuple[Entry, ...]

    def __call__(self, index: int) -> records.Record:
        return self.entries[index].record()


def read_source(source: str | Path, defaults: Mapping[str, str] | None = None) -> tuple[Entry, ...]:
    """What is to be imported, from a JSONL file or a folder; no picture is opened yet.

    A JSONL file has one object a line: image, target, instruction, and mask or box ([x1, y1, x2, y2]); perhaps
    reference, kind, source, licence. Paths are relative to the file. A folder has image/, target/, mask/ and prompt/
    (NAME.txt), perhaps reference/: what shares a name belongs together. defaults: source and licence of entries that
    name none. Raises one `RefineError` that lists every bad line.
    """
    source = Path(source)
    if source.is_dir():
        entries, problems = _read_folder(source)
    elif source.is_file():
        entries, problems = _read_lines(source)
    else:
        raise RefineError(f"{source}: no such file or folder; give a JSONL file or a folder of pictures")
    for entry in entries:
        problems += [f"{entry.where}: {path[:200]}: no such file" for path in entry.files() if not _is_file(path)]
        if not entry.instruction.strip():
            problems.append(f"{entry.where}: instruction is empty")
    if problems:
        raise RefineError(f"{source}: {len(problems)} problems, nothing is written: {listed(problems)}")
    if not entries:
        raise RefineError(f"{source}: nothing to import; see `refine-jax data import --help`")
    missing = {name: text for name, text in (defaults or {}).items() if text}
    fill = lambda entry: {name: text for name, text in missing.items() if not getattr(entry, name)}
    return tuple(dataclasses.replace(entry, **fill(entry)) for entry in entries)


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name that is too long, a NUL
        return False


def _read_lines(path: Path) -> tuple[list[Entry], list[str]]:
    entries, problems = [], []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RefineError(f"{path}: cannot be read ({error}); give JSON lines in UTF-8") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                entries.append(_parse(line, f"{path.name}:{number}", path.parent))
            except RefineError as error:
                problems.append(str(error))
    return entries, problems


def _parse(line: str, where: str, folder: Path) -> Entry:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RefineError(f"{where}: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise RefineError(f"{where}: a {type(fields).__name__}, an object is wanted")
    known = (*_PATHS, *_TEXTS, "box")
    unknown = [repr(name) for name in fields if name not in known]
    if unknown:
        raise RefineError(f"{where}: unknown field {', '.join(unknown)}; known are {', '.join(known)}")
    fields = {name: value for name, value in fields.items() if value is not None}
    missing = [name for name in ("image", "target", "instruction") if name not in fields]
    if missing:
        raise RefineError(f"{where}: {', '.join(missing)} missing")
    if ("mask" in fields) == ("box" in fields):
        raise RefineError(f"{where}: give either mask or box")
    for name in (*_PATHS, *_TEXTS):
        if not isinstance(fields.get(name, ""), str):
            raise RefineError(f"{where}: {name} is a {type(fields[name]).__name__}, a string is wanted")
        try:
            fields.get(name, "").encode()
        except UnicodeEncodeError:
            raise RefineError(f"{where}: {name} holds half a surrogate pair; write the whole character") from None
    if "box" in fields:
        box = fields.pop("box")
        if not isinstance(box, list) or len(box) != 4 or any(type(v) is not int for v in box):
            raise RefineError(f"{where}: box {box!r}: give four whole numbers x1, y1, x2, y2")
        fields["mask"] = tuple(box)
    return Entry(where, **{n: str(folder / v) if n in _PATHS and isinstance(v, str) else v for n, v in fields.items()})


def _read_folder(folder: Path) -> tuple[list[Entry], list[str]]:
    problems = []
    found: dict[str, dict[str, Path]] = {}
    for part in ("image", "target", "mask", "prompt", "reference"):
        if not (folder / part).is_dir():
            if part != "reference":
                raise RefineError(f"{folder / part}: missing; a folder to import has image/, target/, mask/, prompt/")
            continue
        suffixes = (".txt",) if part == "prompt" else _PICTURES
        for path in sorted((folder / part).iterdir()):
            if path.suffix.lower() in suffixes:
                if part in found.setdefault(path.stem, {}):
                    problems.append(f"{part}/{path.name}: the name {path.stem} is there twice")
                found[path.stem][part] = path
            elif not path.name.startswith("."):
                problems.append(f"{part}/{path.name}: give {', '.join(suffixes)}")
    entries = []
    for stem, parts in sorted(found.items()):
        missing = [part for part in ("image", "target", "mask", "prompt") if part not in parts]
        if missing:
            problems.append(f"{stem}: no {', '.join(f'{part}/{stem}' for part in missing)}")
            continue
        try:
            text = parts.pop("prompt").read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"prompt/{stem}.txt: cannot be read ({error})")
            continue
        entries.append(Entry(stem, instruction=text, **{part: str(path) for part, path in parts.items()}))
    return entries, problems


def write_import(
    source: str | Path,
    output: str | Path,
    defaults: Mapping[str, str] | None = None,
    *,
    shards: int | None = None,
    workers: int = 0,
    progress: bool = False,
) -> records.Dataset:
    """Write what `read_source` reads. Resumes after a kill while the source stays the same.

    Raises one `RefineError` that lists every line whose pictures cannot be used; then nothing is left of the output.
    """
    entries = read_source(source, defaults)
    digest = hashlib.sha256()
    for entry in entries:
        stats = [Path(path).stat() for path in entry.files()]
        digest.update(repr((entry, [(stat.st_size, stat.st_mtime_ns) for stat in stats])).encode())
    recipe = {"kind": "import", "source": Path(source).name, "fingerprint": digest.hexdigest()}
    make = _Import(entries)
    return writer.write_dataset(output, make, len(entries), recipe, shards=shards, workers=workers, progress=progress)


# ---------------------------------------------------------------------------------------------------------------- check


def describe(dataset: records.Dataset, area: int, margin: float, batch_size: int) -> str:
    """What the index tells: sizes, regions, and the buckets that `loader.record_batches` would make, as text."""
    index = np.asarray(dataset.index, np.int64)
    width, height = index[:, 0], index[:, 1]
    total = sum(shard["bytes"] for shard in dataset.manifest["shards"])
    has = index[:, 6] > 0
    region = (index[:, 4] - index[:, 2]) * (index[:, 5] - index[:, 3]) / (width * height)
    lines = [
        f"{len(index)} records in {len(dataset.files)} shards, {total / 1e6:.1f} MB, digest {dataset.digest[:16]}",
        f"with a reference: {int(has.sum())}; longest instruction: {int(index[:, 8].max())} bytes",
        f"region, share of the picture: median {np.median(region):.1%}, {region.min():.1%} to {region.max():.1%}",
        "picture area, megapixels:",
    ]
    edges = np.array([0, 0.25, 0.5, 1, 2, 4, 8, 16, np.inf]) * 1e6
    for low, high, count in zip(edges, edges[1:], np.histogram(width * height, edges)[0]):
        if count:
            lines.append(f"  {low / 1e6:g} to {high / 1e6:g}: {count}")
    buckets = focus.aspect_buckets(area)
    plan = Plan(dataset.index, 0, batch_size, buckets, buckets, margin)
    crops = focus.focus_box(index[:, 2:6], width, height, margin)
    stretch: dict[Any, list[float]] = {}
    counts: Counter = Counter()
    members = plan.members(0)
    for (bucket, _), numbers in zip(plan.groups, members):
        counts[bucket] += len(numbers)
        for number in numbers[:200]:
            x1, y1, x2, y2 = enlarge(crops[number], width[number], height[number], bucket[1] / bucket[0])
            off = (x2 - x1) / (y2 - y1) / (bucket[1] / bucket[0])
            stretch.setdefault(bucket, []).append(max(off, 1 / off))
    lines.append(f"buckets of {area} pixels, batches of {batch_size}: {plan.steps} steps an epoch")
    for bucket, count in sorted(counts.items(), key=lambda item: item[0][1] / item[0][0]):
        lines.append(f"  {bucket[0]}x{bucket[1]} (height x width): {count}, stretched {np.mean(stretch[bucket]):.3f}")
    return "\n".join(lines)


def check(args: argparse.Namespace) -> None:
    """Print what is in a dataset; raise one `RefineError` that lists every record that cannot be used."""
    dataset = records.Dataset(args.folder)
    print(describe(dataset, args.area, args.margin, args.batch))
    problems, *counted = records.verify(dataset, args.workers, not args.quiet)
    for name, counter in zip(("kinds", "licences"), (counted[0], counted[2])):
        print(f"{name}: " + ", ".join(f"{text or 'none given'} {count}" for text, count in counter.most_common(20)))
    if problems:
        raise RefineError(f"{len(problems)} problems: {listed(problems)}")
    print("every picture can be decoded, every checksum fits")


# ------------------------------------------------------------------------------------------------------------- the door


def _sides(text: str) -> tuple[int, int]:
    try:
        low, high = (int(v) for v in text.split(","))
        return low, high
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give two whole numbers LOW,HIGH") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The commands of `refine-jax data`; `run` takes what they parse to."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")

    def command(name: str, text: str, writes: bool = True, shards: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(name, allow_abbrev=False, help=text, description=text)
        if writes:
            made.add_argument("--output", required=True, metavar="DIR", help="folder to write; a killed run continues")
        if writes and shards:
            made.add_argument("--shards", type=int, metavar="N", help="files (default: one for every 1024 records)")
        if shards:
            made.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: this one)")
        made.add_argument("--quiet", action="store_true", help="no progress bar")
        return made

    made = command("synth", "write procedural pairs: photographs of which one word or logo is damaged")
    made.add_argument("--count", type=int, required=True, metavar="N", help="records")
    made.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    made.add_argument("--split", choices=assets.SPLITS, default="train", help="of fonts, words and photographs")
    made.add_argument(
        "--size", type=_sides, default=(256, 512), metavar="LOW,HIGH", help="sides of the pictures (default: 256,512)"
    )

    made = command("import", "write pairs from a JSONL file or from a folder (image, target, mask, prompt, reference)")
    made.add_argument("source", metavar="SRC", help="JSONL file or folder")
    made.add_argument("--source", dest="origin", metavar="T", help="source of records that name none")
    made.add_argument("--licence", metavar="T", help="licence of records that name none")

    made = command("cache", "encode a dataset once, for training without the VAE and the encoder", shards=False)
    made.add_argument(
        "--config", required=True, metavar="F", help="the training's configuration; data.source='records'"
    )
    made.add_argument(
        "--batch", type=int, default=8, metavar="N", help="records encoded at once (default: %(default)s)"
    )

    made = command("export", "write pairs as files, and the requests that refine-jax batch takes", shards=False)
    made.add_argument("source", metavar="SRC", help="dataset, or what import takes")
    made.add_argument("--count", type=int, metavar="N", help="as many, evenly over the source (default: all)")

    made = command("check", "decode every record; print counts, sizes and buckets", writes=False)
    made.add_argument("folder", metavar="DIR", help="dataset")
    made.add_argument("--area", type=int, default=1024 * 1024, metavar="PX", help="of the buckets (default: 1024²)")
    made.add_argument(
        "--margin", type=float, default=focus.FOCUS_MARGIN, metavar="PX", help="of the crops (default: %(default)s)"
    )
    made.add_argument("--batch", type=int, default=8, metavar="N", help="global batch (default: %(default)s)")


def run(args: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    """Do what the options of `add_arguments` ask; overrides: of the configuration's keys (cache)."""
    if args.data_command == "cache":
        from refine_jax.data.cache_build import build
        from refine_jax.train import load_config

        made = build(load_config(args.config, dict(overrides)), args.output, args.batch, not args.quiet)
        print(f"wrote {made.folder} ({len(made)} records)")
        return
    if overrides:
        raise RefineError(f"--config.{next(iter(overrides))}: only for refine-jax train and refine-jax data cache")
    if args.data_command == "export":
        from refine_jax.data.export import export

        made = export(args.source, args.output, args.count, progress=not args.quiet)
        print(f"wrote {args.output} ({made} pairs)")
        return
    if args.workers < 0:
        raise RefineError(f"--workers {args.workers}: give 0 or more")
    if args.data_command == "check":
        return check(args)
    how = dict(shards=args.shards, workers=args.workers, progress=not args.quiet)
    if args.data_command == "synth":
        dataset = write_synth(args.output, args.count, args.seed, args.split, args.size, **how)
    else:
        defaults = {"source": args.origin, "licence": args.licence}
        dataset = write_import(args.source, args.output, defaults, **how)
    print(f"wrote {args.output} ({len(dataset)} records, digest {dataset.digest[:16]})")
