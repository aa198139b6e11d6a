"""The held-out evaluation: words and logos in scenes whose fonts, logos, words and photographs were never trained on.

    python -m refine_jax.evaluate.heldout --model runs/tiny/model --output runs/tiny/heldout

Every sample is a whole scene with one damaged region (`data.synth.scene`), refined by `Refiner.refine_batch` as the
picture of a user would be and compared with the clean scene inside the mask, at the scene's own resolution. Which
scenes is fixed by a recipe, `assets/heldout.json`. Needs the extra `eval`. Writes metrics.json, samples.json, table.md
and contact_sheet.png.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from refine_jax import checkpoint, conditioning, focus
from refine_jax.data import synth
from refine_jax.errors import RefineError
from refine_jax.evaluate import baselines, judges, metrics, report
from refine_jax.evaluate.ceiling import vae_ceiling
from refine_jax.limits import DTYPES
from refine_jax.loading import weighted_file
from refine_jax.model import ModelConfig, decode_latents, encode_images
from refine_jax.refine import Refiner

RECIPE = Path(__file__).parent.parent / "assets" / "heldout.json"
JUDGES = ("vgg", "ocr", "ocr2")

# -------------------------------------------------------------------------------------------------------------- samples


@dataclasses.dataclass(frozen=True)
class Sample:
    """One scene with one damaged region.

    image, target `[H, W, 3] uint8`; mask `[H, W] uint8`; box of the mask and crop in which the region was composed
    (x1, y1, x2, y2), half-open; reference `[h, w, 3] uint8`; kind "text" or "logo".
    """

    index: int
    kind: str
    word: str
    degradation: str
    instruction: str
    image: np.ndarray
    target: np.ndarray
    mask: np.ndarray
    box: tuple[int, int, int, int]
    crop: tuple[int, int, int, int]
    reference: np.ndarray

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits of all pixels."""
        arrays = (self.image, self.target, self.mask, self.reference)
        return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()[:8]


def make_sample(seed: int, index: int, side: int) -> Sample:
    """The sample `index`: a scene of `side` by `side` pixels."""
    scene = synth.scene(seed, index, "eval", (side, side), (1, 1))
    return Sample(
        index=index,
        kind=scene["kinds"][0],
        word=scene["words"][0],
        degradation=scene["degradations"][0],
        instruction=scene["instructions"][0],
        image=scene["image"],
        target=scene["target"],
        mask=scene["masks"][0],
        box=tuple(scene["boxes"][0].tolist()),
        crop=tuple(scene["crops"][0].tolist()),
        reference=scene["references"][0],
    )


def write_recipe(
    path: str | os.PathLike = RECIPE, count: int = 240, logos: int = 60, seed: int = 20_260, side: int = 384
) -> None:
    """Fix a new list: the first scenes of `seed` that make `count` samples with `logos` logos evenly among them."""
    wanted = ["logo" if (k + 1) * logos // count > k * logos // count else "text" for k in range(count)]
    found: dict[str, list[Sample]] = {"text": [], "logo": []}
    index = 0
    while any(len(found[kind]) < wanted.count(kind) for kind in found):
        sample = make_sample(seed, index, side)
        found[sample.kind].append(sample)
        index += 1
    queues = {kind: iter(items) for kind, items in found.items()}
    chosen = [next(queues[kind]) for kind in wanted]
    recipe = {
        "about": "The held-out scenes: refine_jax.data.synth.scene(seed, index, 'eval', (side, side), (1, 1))",
        "seed": seed,
        "side": side,
        "indices": [s.index for s in chosen],
        "kinds": "".join(s.kind[0] for s in chosen),
        "digests": [s.digest for s in chosen],
    }
    rows = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in recipe.items()]
    checkpoint.write_text(Path(path), "{\n" + ",\n".join(rows) + "\n}\n")


def load_samples(
    count: int | None = None, recipe: str | os.PathLike = RECIPE, progress: bool = False
) -> tuple[list[Sample], int]:
    """The first `count` samples of a recipe (default: all), and how many differ from what the recipe recorded.

    They differ where Pillow or an asset package has another version. Raises `RefineError` for a bad recipe or count.
    """
    try:
        plan = json.loads(Path(recipe).read_text(encoding="utf-8"))
        seed, side, indices, digests = (plan[name] for name in ("seed", "side", "indices", "digests"))
    except (OSError, ValueError, KeyError) as error:
        raise RefineError(
            f"recipe {os.fspath(recipe)!r}: cannot be read ({error}); write it with --write-recipe"
        ) from None
    count = len(indices) if count is None else count
    if not 1 <= count <= len(indices):
        raise RefineError(f"count {count}: the recipe holds {len(indices)} samples")
    bar = tqdm(indices[:count], desc="samples", unit="scene", disable=not progress, leave=False)
    samples = [make_sample(seed, index, side) for index in bar]
    return samples, sum(s.digest != d for s, d in zip(samples, digests))


# -------------------------------------------------------------------------------------------------------------- methods


def refine_samples(
    refiner: Refiner,
    samples: Sequence[Sample],
    *,
    reference: bool = True,
    seed: int = 0,
    batch: int = 32,
    advance: Callable[[int], Any] = lambda count: None,
    **settings: Any,
) -> list[np.ndarray]:
    """Every sample refined, `[H, W, 3] uint8` each. settings: of `Refiner.refine` (steps, focus, margin).

    Samples whose crop and reference have the same sizes run together, so that few programs are compiled; every sample
    has its own noise, from `seed` and its index.
    """
    model = refiner.model
    sizes = lambda ratio: (model.vae_size(ratio), model.vl_sizes(ratio))
    groups: dict[Any, list[int]] = {}
    for k, sample in enumerate(samples):
        x1, y1, x2, y2 = focus_crop(model, sample, settings.get("focus", True), settings.get("margin")).tolist()
        height, width = sample.reference.shape[:2]
        key = sizes((x2 - x1) / (y2 - y1)), reference and sizes(width / height)
        groups.setdefault(key, []).append(k)
    results: list[np.ndarray | None] = [None] * len(samples)
    for members in groups.values():
        for start in range(0, len(members), batch):
            part = members[start : start + batch]
            requests = [
                dict(
                    image=samples[k].image,
                    mask_or_box=samples[k].mask,
                    prompt=samples[k].instruction,
                    reference=samples[k].reference if reference else None,
                    seed=1_000_003 * seed + samples[k].index,
                    **settings,
                )
                for k in part
            ]
            for k, result in zip(part, refiner.refine_batch(requests)):
                results[k] = np.asarray(result)
            advance(len(part))
    return results


def focus_crop(model: ModelConfig, sample: Sample, focused: bool = True, margin: float | None = None) -> np.ndarray:
    """The focus crop `[4] int32` of a sample; the whole scene without focus."""
    height, width = sample.mask.shape
    if not focused:
        return np.array([0, 0, width, height], np.int32)
    return focus.focus_box(np.array(sample.box), width, height, model.margin if margin is None else margin)


@functools.partial(jax.jit, static_argnames=("model", "size", "through_vae"))
def _paste_target(
    model: ModelConfig, variables: Any, arrays: tuple, size: tuple[int, int], through_vae: bool
) -> jax.Array:
    """The source's crop at the model's size, through its VAE or not, resized back and pasted into the picture."""
    image, source, mask, box = arrays
    crop = jax.vmap(lambda s, b: conditioning.view(s, b, (size,)))(source, box)
    if through_vae:
        crop = decode_latents(model, variables, encode_images(model, variables, [crop])[0])
    return jax.vmap(focus.paste_back)(image, crop, box, mask)


def paste_targets(
    refiner: Refiner, samples: Sequence[Sample], through_vae: bool, margin: float | None = None, batch: int = 16
) -> list[np.ndarray]:
    """What the program would return if the network were perfect: with the VAE the ceiling of the model, without it the
    ceiling of its resolution."""
    groups: dict[Any, list[int]] = {}
    boxes = [focus_crop(refiner.model, sample, margin=margin) for sample in samples]
    for k, box in enumerate(boxes):
        groups.setdefault(refiner.model.vae_size((box[2] - box[0]) / (box[3] - box[1])), []).append(k)
    results: list[np.ndarray | None] = [None] * len(samples)
    for size, members in groups.items():
        for start in range(0, len(members), batch):
            part = members[start : start + batch]
            filled = part + part[:1] * (batch - len(part))
            rows = [(samples[k].image, samples[k].target, samples[k].mask, boxes[k]) for k in filled]
            arrays = tuple(np.stack(column) for column in zip(*rows))
            pictures = np.asarray(_paste_target(refiner.model, refiner.variables, arrays, size, through_vae))
            for k, picture in zip(part, pictures):
                results[k] = picture
    return results


# -------------------------------------------------------------------------------------------------------------- scoring


class Scorer:
    """Scores a method's pictures of all samples.

    names: judges, among `JUDGES`. Raises `RefineError` when one is unknown or not installed.
    """

    def __init__(self, samples: Sequence[Sample], names: Sequence[str] = ("vgg", "ocr")):
        unknown = sorted(set(names) - set(JUDGES))
        if unknown:
            raise RefineError(f"judges {', '.join(unknown)}: choose among {', '.join(JUDGES)}")
        self._samples = samples
        packages = {"ocr": "rapidocr", "ocr2": "rapidocr-onnxruntime"}
        self._readers = {name: judges.load_reader(packages[name]) for name in names if name in packages}
        self._vgg = judges.VGGHED(self._crops([s.target for s in samples])) if "vgg" in names else None
        self._alpha = jax.jit(focus.feather)

    def _crops(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        cut = lambda picture, c: np.ascontiguousarray(picture[c[1] : c[3], c[0] : c[2]])
        return [cut(picture, sample.crop) for picture, sample in zip(pictures, self._samples)]

    def __call__(
        self, pictures: Sequence[np.ndarray], boxes: Sequence[np.ndarray] | None = None
    ) -> list[dict[str, Any]]:
        """A dict of scores for each sample. pictures: `[H, W, 3]` uint8, or float where it is a mean of several.

        mse, ssim: inside the mask. vgg: of the crop in which the region was composed. For text, a judge "ocr" adds
        ocr_read, ocr_edits, ocr_exact. boxes: of the focus crops; adds background, the number of pixels that changed
        where the paste-back's weight is 0.
        """
        samples = self._samples
        scores: list[dict[str, Any]] = [
            {"mse": metrics.region_mse(p, s.target, s.mask), "ssim": metrics.region_ssim(p, s.target, s.mask)}
            for p, s in zip(pictures, samples)
        ]
        whole = [p if p.dtype == np.uint8 else np.clip(np.rint(p), 0, 255).astype(np.uint8) for p in pictures]
        if self._vgg:
            for score, distance in zip(scores, self._vgg(self._crops(whole))):
                score["vgg"] = float(distance)
        words = [k for k, s in enumerate(samples) if s.kind == "text"]
        for name, reader in self._readers.items():
            lines = [samples[k].word.count(" ") + 1 for k in words]
            read = judges.read_words(reader, [whole[k] for k in words], [samples[k].box for k in words], lines)
            for k, text in zip(words, read):
                wrong = metrics.edits(metrics.plain(text), metrics.plain(samples[k].word))
                scores[k] |= {f"{name}_read": text, f"{name}_edits": wrong, f"{name}_exact": float(wrong == 0)}
        if boxes is not None:
            for score, picture, sample, box in zip(scores, whole, samples, boxes):
                score["background"] = metrics.background_error(picture, sample.image, self._alpha(sample.mask, box))
        return scores


def summarise(
    samples: Sequence[Sample], scores: Sequence[Mapping[str, Any]], copy: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Means and 95 % intervals for "all", "text" and "logo": {group: {metric: [estimate, low, high], count: int}}.

    mse_ratio: mean error divided by copy-input's (`copy`); cer: edits by characters, all words together.
    """
    result = {}
    for group in ("all", "text", "logo"):
        rows = [k for k, s in enumerate(samples) if group in ("all", s.kind)]
        values = {"count": len(rows)}
        column = lambda name, rows=rows: [scores[k][name] for k in rows]
        for name in ("mse", "ssim", "vgg"):
            if rows and name in scores[rows[0]]:
                values[name] = metrics.bootstrap(column(name))
        if rows:
            values["mse_ratio"] = metrics.bootstrap(column("mse"), [copy[k]["mse"] for k in rows])
        words = [k for k in rows if samples[k].kind == "text"]
        for judge in ("ocr", "ocr2"):
            if words and f"{judge}_exact" in scores[words[0]]:
                lengths = [len(metrics.plain(samples[k].word)) for k in words]
                values[f"{judge}_exact"] = metrics.bootstrap([scores[k][f"{judge}_exact"] for k in words])
                values[f"{judge}_cer"] = metrics.bootstrap([scores[k][f"{judge}_edits"] for k in words], lengths)
        if rows and "background" in scores[rows[0]]:
            values["background"] = int(sum(column("background")))
        result[group] = values
    return result


# ------------------------------------------------------------------------------------------------------- the evaluation

WITH, WITHOUT = "ours, with reference", "ours, without reference"
NO_FOCUS = f"{WITHOUT}, no focus"
COPY, VAE_TARGET = "copy-input", "target through the VAE"


def _runs(steps: int, seeds: int, quick: bool) -> dict[str, list[dict[str, Any]]]:
    """Name of a method -> settings of `refine_samples`, several where the mean of their pictures is scored."""
    runs = {WITH: [dict(reference=True)], WITHOUT: [dict(reference=False)]}
    if quick:
        return runs
    # Without a reference: fewer shapes, so fewer programs to compile.
    runs[NO_FOCUS] = [dict(reference=False, focus=False)]
    for other in (4, 8, 16):
        if other != steps:
            runs[f"{WITHOUT}, {other} steps"] = [dict(reference=False, steps=other)]
    if seeds > 1:
        for name, reference in ((WITH, True), (WITHOUT, False)):
            runs[f"{name}, mean of {seeds} seeds"] = [dict(reference=reference, seed=k) for k in range(seeds)]
    return runs


def evaluate(
    refiner: Refiner,
    samples: Sequence[Sample],
    *,
    judge_names: Sequence[str] = ("vgg", "ocr"),
    seeds: int = 4,
    batch: int = 32,
    margin: float | None = None,
    quick: bool = False,
    progress: bool = True,
) -> Iterator[tuple[str, list[np.ndarray], list[dict[str, Any]], float]]:
    """Yields (method, pictures, scores, seconds of making the pictures): baselines, ceilings, variants of ours."""
    model = refiner.model
    scorer = Scorer(samples, judge_names)
    runs = _runs(model.steps, seeds, quick)
    kept: dict[str, list[np.ndarray]] = {}  # of seed 0, which the means use again
    crops = [focus_crop(model, s, margin=margin) for s in samples]
    rows = min(16, batch, refiner.most_rows)
    quiet: dict[str, Callable[[], list[np.ndarray]]] = {
        COPY: lambda: [s.image for s in samples],
        "bicubic ÷4": lambda: [baselines.bicubic(s.image, s.mask, box) for s, box in zip(samples, crops)],
        "OpenCV inpainting": lambda: [baselines.inpaint(s.image, s.mask) for s in samples],
        "target": lambda: [s.target for s in samples],
        "target at the model's resolution": lambda: paste_targets(refiner, samples, False, margin, rows),
        VAE_TARGET: lambda: paste_targets(refiner, samples, True, margin, rows),
    }
    total = len(samples) * (len(quiet) + sum(len(settings) for settings in runs.values()))
    with tqdm(total=total, unit="picture", disable=not progress, desc="held-out") as bar:
        for name, make in quiet.items():
            bar.set_description(name)
            started = time.perf_counter()
            pictures = make()
            bar.update(len(samples))
            seconds = time.perf_counter() - started
            yield name, pictures, scorer(pictures), seconds
        for name, settings in runs.items():
            bar.set_description(name)
            started, made = time.perf_counter(), []
            for one in settings:
                again = kept.get(name.split(", mean")[0]) if one.get("seed") == 0 else None
                if again:
                    bar.update(len(samples))
                extra = {"margin": margin} if margin is not None else {}
                made.append(again or refine_samples(refiner, samples, batch=batch, advance=bar.update, **one, **extra))
            seconds = time.perf_counter() - started
            pictures = made[0] if len(made) == 1 else [np.mean(several, axis=0) for several in zip(*made)]
            if len(made) == 1:
                kept[name] = pictures
            boxes = crops if settings[0].get("focus", True) else [focus_crop(model, s, False) for s in samples]
            yield name, pictures, scorer(pictures, boxes), seconds


def _comparisons(scores: Mapping[str, Sequence[Mapping[str, Any]]], samples: Sequence[Sample]) -> dict[str, Any]:
    """What the reference and what focus add: paired ratios of mean errors, [estimate, low, high]; below 1 they help."""
    pairs = {"reference: with / without": (WITH, WITHOUT), "focus: with / without": (WITHOUT, NO_FOCUS)}
    result = {}
    for name, (a, b) in pairs.items():
        if a in scores and b in scores:
            for group in ("all", "text", "logo"):
                rows = [k for k, s in enumerate(samples) if group in ("all", s.kind)]
                errors = ([scores[m][k]["mse"] for k in rows] for m in (a, b))
                if rows:
                    result.setdefault(name, {})[group] = metrics.bootstrap(*errors)
    return result


def main(
    model: str | os.PathLike = "tiny",
    output: str | os.PathLike = "heldout",
    count: int | None = None,
    *,
    judge_names: Sequence[str] = ("vgg", "ocr"),
    seeds: int = 4,
    batch: int = 32,
    margin: float | None = None,
    quick: bool = False,
    recipe: str | os.PathLike = RECIPE,
    progress: bool = True,
    **loading: Any,
) -> Path:
    """Evaluate a model and write the results into the folder `output`, which is returned; files grow as methods finish.

    count: samples (default: all of the recipe); seeds: whose pictures' mean is scored too; margin: in place of the
    model's; quick: ours with and without reference only; loading: further arguments of `Refiner.load`. Raises
    `RefineError` for a bad model, count or judge.
    """
    if seeds < 1 or batch < 1:
        raise RefineError(f"seeds {seeds}, batch {batch}: give whole numbers of at least 1")
    refiner = Refiner.load(model, **loading)
    output = report.folder(output)
    samples, differing = load_samples(count, recipe, progress)
    if differing:
        print(
            f"{differing} samples differ from the recipe: Pillow or an asset package has another version",
            file=sys.stderr,
        )
    about = {
        "samples": {kind: sum(s.kind == kind for s in samples) for kind in ("text", "logo")},
        "samples_unlike_recipe": differing,
        "side": int(samples[0].mask.shape[0]),
        "steps": refiner.model.steps,
        "true_cfg_scale": refiner.model.true_cfg_scale,
        "margin": refiner.model.margin if margin is None else margin,
        "seeds": seeds,
        "loading": {name: str(value) for name, value in loading.items() if value},
        "versions": report.versions(),
    }
    scores: dict[str, list[dict[str, Any]]] = {}
    shown: dict[str, list[np.ndarray]] = {}
    results: dict[str, Any] = {"about": about, "seconds": {}, "methods": {}}
    columns = {
        COPY: "input",
        "OpenCV inpainting": "inpainting",
        WITHOUT: "ours, no reference",
        WITH: "ours, reference",
        VAE_TARGET: "VAE",
        "target": "target",
    }
    chosen = report.spread(len(samples), 24)
    options = dict(judge_names=judge_names, seeds=seeds, batch=batch, margin=margin, quick=quick, progress=progress)
    with contextlib.closing(evaluate(refiner, samples, **options)) as running:
        for name, pictures, scored, seconds in running:
            scores[name] = scored
            results["methods"][name] = summarise(samples, scored, scores[COPY])
            results["seconds"][name] = round(seconds, 1)
            results["comparisons"] = _comparisons(scores, samples)
            checkpoint.write_text(output / "metrics.json", json.dumps(results, indent=1) + "\n")
            checkpoint.write_text(output / "table.md", report.table(results))
            rows = [
                {"index": s.index, "kind": s.kind, "word": s.word, "degradation": s.degradation}
                | {"scores": {method: report.rounded(values[k]) for method, values in scores.items()}}
                for k, s in enumerate(samples)
            ]
            text = "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"
            checkpoint.write_text(output / "samples.json", text)
            if name in columns:
                shown[columns[name]] = [pictures[k] for k in chosen]
                order = [column for column in columns.values() if column in shown]
                sheet = report.contact_sheet([samples[k] for k in chosen], {column: shown[column] for column in order})
                report.save(sheet, output / "contact_sheet.png")
    return output


# ---------------------------------------------------------------------------------------------------------- the command


def command(argv: Sequence[str] | None = None) -> int:
    """The command line of this module; returns the exit code."""
    parser = argparse.ArgumentParser(prog="refine_jax.evaluate.heldout", description="Held-out evaluation of a model.")
    add_arguments(parser)
    try:
        run(parser.parse_args(argv))
    except RefineError as error:
        print(f"refine-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("refine-jax: interrupted", file=sys.stderr)
        return 130
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the evaluation; `run` takes what they parse to."""
    parser.add_argument("--model", metavar="tiny|FOLDER", default="tiny", help="model (default: %(default)s)")
    parser.add_argument(
        "--lora", metavar="F[:WEIGHT]", action="append", default=[], help="LoRA weights, any dialect; repeatable"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 for weights stored so, else float32")
    parser.add_argument("--quantize", choices=("int8",), help="keep large matrices in 8 bits")
    parser.add_argument("--output", metavar="DIR", help="folder of the results (default: the set's name)")
    parser.add_argument("--count", metavar="N", type=int, help="samples (default: all of the recipe)")
    parser.add_argument(
        "--judges", metavar="NAMES", default="vgg,ocr", help=f"among {','.join(JUDGES)}, or none (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", metavar="N", type=int, default=4, help="seeds of the mean picture (default: %(default)s)"
    )
    parser.add_argument("--batch", metavar="N", type=int, default=32, help="scenes a batch (default: %(default)s)")
    parser.add_argument("--margin", metavar="PX", type=float, help="margin in place of the model's")
    parser.add_argument("--quick", action="store_true", help="ours with and without reference only")
    parser.add_argument("--vae-only", action="store_true", help="only how well the VAE returns clean crops")
    parser.add_argument("--write-recipe", metavar="F", help="fix a new list of samples in the file F and stop")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the options say of how a model is loaded."""
    return dict(lora=[weighted_file(text) for text in args.lora], dtype=args.dtype, quantize=args.quantize)


def run(args: argparse.Namespace) -> None:
    """Do what the options of `add_arguments` ask."""
    if args.write_recipe:
        write_recipe(args.write_recipe)
        print(f"wrote {args.write_recipe}")
    elif args.vae_only:
        if args.lora or args.quantize or args.dtype:
            raise RefineError("--vae-only: takes no --lora, --quantize, --dtype; leave them out")
        for kind, row in vae_ceiling(args.model, args.count or 240).items():
            shown = "ratio {:.3f} ({:.3f}–{:.3f})".format(*row["ratio"])
            print(f"{kind}: {row['count']} crops, VAE {row['vae']:.1f}, copy-input {row['copy_input']:.1f}, {shown}")
    else:
        names = tuple(name for name in args.judges.split(",") if name and name != "none")
        options = dict(
            seeds=args.seeds,
            batch=args.batch,
            margin=args.margin,
            quick=args.quick,
            progress=not args.quiet,
            **loading_options(args),
        )
        output = "heldout" if args.output is None else args.output
        folder = main(args.model, output, args.count, judge_names=names, **options)
        print((folder / "table.md").read_text(encoding="utf-8"))
        print(f"wrote {folder}")


if __name__ == "__main__":
    sys.exit(command())
