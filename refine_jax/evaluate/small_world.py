"""How often a model paints what its prompt says, in the small world: from text alone, and after rounds of regeneration.

    refine-jax evaluate --set world --model tiny --rounds 3 --output world

Prompts are those of the split that no training states; the checker of `data.world` reads each picture and says which
parts of its prompt hold. Every picture depends on the model, its prompt's number and the seed alone.
"""

import argparse
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from refine_jax import checkpoint
from refine_jax.data import world
from refine_jax.errors import RefineError
from refine_jax.evaluate import report
from refine_jax.evaluate.heldout import loading_options
from refine_jax.regenerate import Regenerator

# Another seed than any training's.
WORLD_SEED = 7_000
_SHOWN = 24


def main(
    model: str | os.PathLike,
    output: str | os.PathLike,
    count: int = 500,
    rounds: int = 3,
    *,
    initial: str | os.PathLike | None = None,
    editing: bool = False,
    seed: int = 0,
    batch: int = 64,
    progress: bool = True,
    loading: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Evaluate and write `metrics.json`, `table.md`, `contact_sheet.png`, and `pictures.npz` into `output`, returned.

    initial: the folder of an earlier evaluation, whose initial pictures are taken, so that models are compared on the
    same ones; by default the model paints them. editing: the prompt says which of its parts are wrong
    (`world.edit_instruction`), and a picture that is right is not touched. loading: further arguments of
    `Regenerator.load`; settings: of `Regenerator.regenerate`. Raises `RefineError` for a bad model, count or folder.
    """
    if count < 1 or rounds < 0 or batch < 1:
        raise RefineError(f"count {count}, rounds {rounds}, batch {batch}: give whole numbers of at least 1 (rounds 0)")
    regenerator = Regenerator.load(model, **(loading or {}))
    output = report.folder(output)
    samples = [world.sample(WORLD_SEED, number, "eval") for number in range(count)]

    size = samples[0]["image"].shape[:2]
    painted = regenerator.read(samples[0]["image"], "x").rows[0].bucket.base[0].size
    if tuple(painted) != size:
        raise RefineError(
            f"model {str(model)!r}: paints a picture of {size[1]}x{size[0]} at {painted[1]}x{painted[0]}; this set is "
            "of models of the small world, which keep its size"
        )

    def many(what: str, run: Any, requests: list[dict[str, Any]]) -> np.ndarray:
        made = []
        for start in tqdm(range(0, len(requests), batch), desc=what, disable=not progress):
            made += [np.asarray(picture) for picture in run(requests[start : start + batch])]
        return np.stack(made)

    if initial is None:
        requests = [
            dict(prompt=sample["prompt"], size=size[::-1], seed=_seed(seed, number, 0), **settings)
            for number, sample in enumerate(samples)
        ]
        pictures = many("initial", regenerator.generate_batch, requests)
    else:
        pictures = _initial(Path(initial), count)
    found, columns, reports = [pictures], {}, []
    for number in range(rounds + 1):
        if number:
            pictures = found[-1].copy()
            rows = [k for k in range(count) if not (editing and reports[-1][k].correct)]
            requests = [
                dict(
                    image=pictures[k],
                    prompt=world.edit_instruction(samples[k]["prompt"], samples[k]["language"], reports[-1][k].wrong)
                    if editing
                    else samples[k]["prompt"],
                    seed=_seed(seed, k, number),
                    **settings,
                )
                for k in rows
            ]
            if rows:
                pictures[rows] = many(f"round {number}", regenerator.regenerate_batch, requests)
            found.append(pictures)
        reports.append([world.check(p, s["spec"]) for p, s in zip(found[-1], samples)])
        columns[f"round {number}" if number else "initial"] = world.scores(
            reports[-1], [s["language"] for s in samples]
        )
        results = {
            "about": {
                "model": str(model),
                "initial": None if initial is None else str(initial),
                "prompts": count,
                "world_seed": WORLD_SEED,
                "seed": seed,
                "editing": editing,
                "settings": settings,
                "loading": {name: str(value) for name, value in (loading or {}).items() if value},
                "versions": report.versions(),
            },
            "scores": columns,
            "correct": [[bool(r.correct) for r in one] for one in reports],
        }
        checkpoint.write_text(output / "metrics.json", json.dumps(results, indent=1) + "\n")
        checkpoint.write_text(output / "table.md", world.table(columns) + "\n")
    with (output / "pictures.npz.part").open("wb") as file:
        np.savez_compressed(file, *found)
    os.replace(output / "pictures.npz.part", output / "pictures.npz")
    report.save(_sheet(found, reports), output / "contact_sheet.png")
    return output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this evaluation besides those of `heldout`; `run` takes what they parse to."""
    world_only = parser.add_argument_group("--set world")
    world_only.add_argument("--rounds", metavar="N", type=int, default=3, help="of regeneration (default: %(default)s)")
    world_only.add_argument("--initial", metavar="DIR", help="take the initial pictures of that evaluation")
    world_only.add_argument("--editing", action="store_true", help="the prompt names what is wrong")
    world_only.add_argument("--seed", metavar="N", type=int, default=0, help="of the noise (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Do what the options ask."""
    folder = main(
        args.model,
        "world" if args.output is None else args.output,
        500 if args.count is None else args.count,
        args.rounds,
        initial=args.initial,
        editing=args.editing,
        seed=args.seed,
        batch=args.batch,
        progress=not args.quiet,
        loading=loading_options(args),
    )
    print((folder / "table.md").read_text(encoding="utf-8"))
    print(f"wrote {folder}")


def _seed(seed: int, number: int, turn: int) -> int:
    return (seed * 1_000_003 + number) * 101 + turn


def _initial(folder: Path, count: int) -> np.ndarray:
    try:
        with np.load(folder / "pictures.npz") as file:
            pictures = file["arr_0"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise RefineError(f"initial {str(folder)!r}: no pictures.npz of an evaluation there ({error})") from None
    if len(pictures) < count:
        raise RefineError(f"initial {str(folder)!r}: holds {len(pictures)} pictures, {count} are wanted")
    return pictures[:count]


def _sheet(found: Sequence[np.ndarray], reports: Sequence[Sequence[world.Report]], scale: int = 2) -> Image.Image:
    """Rounds below one another, prompts side by side; a bar below each picture is green where all of it holds."""
    chosen = report.spread(len(found[0]), _SHOWN)
    rows = []
    for pictures, judged in zip(found, reports):
        cells = []
        for k in chosen:
            cell = pictures[k].repeat(scale, axis=0).repeat(scale, axis=1)
            cell[-4:] = (40, 170, 80) if judged[k].correct else (210, 50, 40)
            cells.append(np.pad(cell, ((2, 2), (2, 2), (0, 0)), constant_values=255))
        rows.append(np.concatenate(cells, axis=1))
    half = len(rows[0][0]) // 2
    return Image.fromarray(np.concatenate([row[:, part] for part in (slice(half), slice(half, None)) for row in rows]))
