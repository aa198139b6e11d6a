"""Refined pictures of a user's own pairs against their targets: what a training has gained on data it never saw.

    refine-jax data export held_out --output held
    refine-jax batch --manifest held/requests.jsonl --output-dir base  --model MODEL
    refine-jax batch --manifest held/requests.jsonl --output-dir tuned --model MODEL --lora F
    refine-jax evaluate --set pairs --data held --results base --results tuned --output scores

Needs no model: `batch` makes the pictures, on any hardware, and goes on where it was killed.
"""

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from refine_jax import checkpoint, focus, images, limits
from refine_jax.data import build, export
from refine_jax.errors import RefineError
from refine_jax.evaluate import metrics, report

COPY = "copy-input"
_SHOWN = 24
_ROOM = 256


@dataclasses.dataclass(frozen=True)
class Pair:
    """One pair, decoded: image and target `[H, W, 3] uint8`, mask `[H, W] uint8`, reference `[h, w, 3] uint8` or None.

    name: of its result; crop: its focus crop (x1, y1, x2, y2).
    """

    name: str
    image: np.ndarray
    target: np.ndarray
    mask: np.ndarray
    reference: np.ndarray | None
    crop: tuple[int, int, int, int]

    @classmethod
    def read(cls, name: str, entry: build.Entry) -> "Pair":
        image, target = images.read_picture(entry.image), images.read_picture(entry.target, "target")
        if image.size != target.size:
            raise RefineError(f"{entry.target}: {target.size[0]}x{target.size[1]} pixels; the image has another size")
        [mask] = images.region_masks(entry.mask, image.size)
        crop = focus.focus_box(focus.mask_box(mask)[0], *image.size)
        shown = entry.reference and images.read_picture(entry.reference, "reference").on_white().rgb
        return cls(name, image.rgb, target.rgb, mask, shown, tuple(crop.tolist()))

    def score(self, picture: np.ndarray, alpha: np.ndarray) -> dict[str, float]:
        """The measures of `picture [H, W, 3] uint8`; alpha `[H, W]`: the paste-back's weight."""
        return {
            "mse": metrics.region_mse(picture, self.target, self.mask),
            "ssim": metrics.region_ssim(picture, self.target, self.mask),
            "seam": metrics.seam_error(picture, self.target, alpha),
            "background": metrics.background_error(picture, self.image, alpha),
        }


def main(
    data: str | os.PathLike,
    results: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    feather: str = "released",
    progress: bool = True,
) -> Path:
    """Score `results`, output folders of `refine-jax batch`, and write the scores into `output`, which is returned.

    data: a folder of `refine-jax data export`. Writes metrics.json (means with 95 % intervals; ratios to copy-input
    and to the first result, paired), samples.json, table.md, contact_sheet.png. Pairs count that every folder has a
    result of; how many were left out is said. feather: of the paste-back; says where the background begins. Raises
    `RefineError` for folders that hold none of the pairs, and for pictures of another size.
    """
    names = _names(results)
    entries = {Path(entry.image).stem: entry for entry in _entries(Path(data))}
    found = {name: _finished(Path(folder)) for name, folder in zip(names, results)}
    for name, folder in zip(names, results):
        if not set(found[name]) & set(entries):
            raise RefineError(f"--results {str(folder)!r}: has no result of {str(data)!r}; run its {export.REQUESTS}")
    chosen = [name for name in entries if all(name in files for files in found.values())]
    if not chosen:
        raise RefineError("--results: no pair has a result in all of these folders; finish the runs, or give one less")
    output = report.folder(output)
    shown = {chosen[k] for k in report.spread(len(chosen), _SHOWN)}
    methods = (COPY, *names)
    scores: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    sheet: list[tuple[Pair, dict[str, np.ndarray]]] = []
    weight = jax.jit(focus.feather, static_argnames="style")
    for name in tqdm(chosen, unit="pair", desc="scoring", disable=not progress):
        pair = Pair.read(name, entries[name])
        height, width = pair.mask.shape
        # Room beside the picture, which the weight does not see: few sizes, so few programs.
        roomy = np.pad(pair.mask, ((0, -height % _ROOM), (0, -width % _ROOM)))
        alpha = np.asarray(weight(roomy, np.array([0, 0, width, height], np.int32), style=feather))[:height, :width]
        pictures = {COPY: pair.image}
        for method, files in found.items():
            picture = images.read_picture(files[name], "result").rgb
            if picture.shape != pair.image.shape:
                raise RefineError(
                    f"{files[name]}: {picture.shape[1]}x{picture.shape[0]} pixels, its pair has {width}x{height};"
                    " give results of these pairs"
                )
            pictures[method] = picture
        for method, picture in pictures.items():
            scores[method].append(pair.score(picture, alpha))
        if name in shown:
            sheet.append((pair, pictures))
    kinds = [entries[name].kind for name in chosen]
    missing = {method: sum(name not in files for name in entries) for method, files in found.items()}
    summary = {
        "about": {
            "data": str(data),
            "results": dict(zip(names, map(str, results))),
            "pairs": len(chosen),
            "without_result": missing,
            "feather": feather,
            "versions": report.versions(),
        },
        "methods": {method: summarise(scores, kinds, method, names) for method in methods},
    }
    rows = [
        {"name": name, "kind": kind} | {method: report.rounded(scores[method][k]) for method in methods}
        for k, (name, kind) in enumerate(zip(chosen, kinds))
    ]
    checkpoint.write_text(output / "samples.json", "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    checkpoint.write_text(output / "metrics.json", json.dumps(summary, indent=1) + "\n")
    checkpoint.write_text(output / "table.md", table(summary))
    report.save(_contact_sheet(sheet, entries, methods), output / "contact_sheet.png")
    return output


def summarise(
    scores: Mapping[str, Sequence[Mapping[str, float]]], kinds: Sequence[str], method: str, results: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """{group: {measure: [estimate, low, high], count: int}} of a method, for all pairs and for each kind of several.

    mse_ratio: mean error divided by copy-input's; of the results after the first, mse_first and seam_first: by its.
    """
    groups = {"all": list(range(len(kinds)))}
    if len(set(kinds)) > 1:
        for kind in sorted(set(kinds)):
            groups[f"kind {kind!r}"] = [k for k, other in enumerate(kinds) if other == kind]
    summary = {}
    for group, rows in groups.items():
        # No seam where a mask covers the whole picture.
        usable = lambda name, rows=rows: [k for k in rows if not math.isnan(scores[method][k][name])]
        column = lambda name, of=method, usable=usable: [scores[of][k][name] for k in usable(name)]
        values: dict[str, Any] = {"count": len(rows)}
        values |= {name: metrics.bootstrap(column(name)) for name in ("mse", "ssim", "seam")}
        values["mse_ratio"] = metrics.bootstrap(column("mse"), column("mse", COPY))
        if method in results[1:]:
            values["mse_first"] = metrics.bootstrap(column("mse"), column("mse", results[0]))
            values["seam_first"] = metrics.bootstrap(column("seam"), column("seam", results[0]))
        values["background"] = int(sum(column("background")))
        summary[group] = values
    return summary


_NOTES = """*region MSE*: mean squared difference from the target inside the mask, 0…255 squared; *÷ copy-input*,
*÷ first*: the paired ratio of the mean errors. *SSIM*: σ = 1.5, averaged inside the mask. *seam*: mean difference of
the gradients from the target's where the paste-back fades. *background*: pixels that differ from the input where its
weight is 0, all pairs together. In parentheses: 95 % bootstrap intervals over the pairs.
"""


def table(summary: Mapping[str, Any]) -> str:
    """The summary (metrics.json) as Markdown."""
    about, methods = summary["about"], summary["methods"]
    lines = ["# Scores on pairs", "", f"{about['pairs']} pairs of {about['data']}."]
    left = [f"{name} {count}" for name, count in about["without_result"].items() if count]
    if left:
        lines += ["", f"Pairs without a result, which no row counts: {', '.join(left)}."]
    for group, values in methods[COPY].items():
        title = "All pairs" if group == "all" else group
        lines += ["", f"## {title} ({values['count']})", "", *report.rows(methods, group)]
    return "\n".join([*lines, "", _NOTES])


def _contact_sheet(
    sheet: Sequence[tuple[Pair, Mapping[str, np.ndarray]]], entries: Mapping[str, build.Entry], methods: Sequence[str]
) -> Image.Image:
    samples = [
        report.Row(entries[pair.name].instruction, entries[pair.name].kind, pair.name, pair.crop, pair.reference)
        for pair, _ in sheet
    ]
    columns = {"input" if m == COPY else m: [pictures[m] for _, pictures in sheet] for m in methods}
    return report.contact_sheet(samples, {**columns, "target": [pair.target for pair, _ in sheet]})


def _names(results: Sequence[str | os.PathLike]) -> list[str]:
    """What the results are called: the folder's name, the whole path where two have the same."""
    if not results:
        raise RefineError("--results: give the output folder of refine-jax batch; repeatable")
    whole = [Path(folder).resolve() for folder in results]
    if len(set(whole)) < len(whole):
        raise RefineError(f"--results {', '.join(map(str, results))}: one folder is there twice")
    short = [folder.name for folder in whole]
    free = not {*short} & {COPY, "input", "target", "reference", "name", "kind"}
    return short if free and len(set(short)) == len(short) else [str(folder) for folder in whole]


def _entries(folder: Path) -> Sequence[build.Entry]:
    path = folder / export.PAIRS
    if not path.is_file():
        raise RefineError(f"--data {str(folder)!r}: no {export.PAIRS} there; write it with refine-jax data export")
    return build.read_source(path)


def _finished(folder: Path) -> dict[str, Path]:
    """The results that are there, by id."""
    if not (folder / "results").is_dir():
        raise RefineError(f"--results {str(folder)!r}: no results there; give the --output-dir of refine-jax batch")
    return {path.stem: path for path in sorted((folder / "results").glob("*.png"))}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this evaluation besides those of `heldout`; `run` takes what they parse to."""
    own = parser.add_argument_group("--set pairs")
    own.add_argument("--data", metavar="DIR", help="pairs, written by refine-jax data export")
    own.add_argument(
        "--results", metavar="DIR", action="append", default=[], help="output of refine-jax batch on them; repeatable"
    )
    own.add_argument(
        "--feather", choices=limits.FEATHERS, default="released", help="of the requests (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    """Do what the options ask."""
    if not args.data:
        raise RefineError("--data: missing; give a folder of refine-jax data export")
    output = "scores" if args.output is None else args.output
    folder = main(args.data, args.results, output, feather=args.feather, progress=not args.quiet)
    print((folder / "table.md").read_text(encoding="utf-8"))
    print(f"wrote {folder}")
