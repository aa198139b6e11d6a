"""Images a second a core: this package's loader against a PyTorch DataLoader that does the same work, in the same run.

    python tools/benchmark_loader.py [--workers 1] [--rounds 3] [--output figures.json]

Makes pictures of 1024 to 1600 pixels a side with a region, a mask and (two of three) a reference. Three kinds of pair:

    jpeg-png   a photograph as JPEG, and as PNG what an editor made of it inside the region
    png-png    both lossless
    jpeg-jpeg  both compressed, so that they differ everywhere

and reads them as `loader.record_batches` does (ArrayRecord shards written by `writer`, grain's worker processes) and as
a PyTorch Dataset of files does (Pillow, NumPy, the default collation), with the same number of workers, the same
batches in the same order and the same tokeniser. Each pipeline runs in a process of its own, in turns. A figure is the
median of the rounds: images divided by the processor seconds of the main process and all workers (so that other
programs on the machine do not count), and by the seconds on the clock. Start-up does not count. The first batches of
both are compared.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from refine_jax import focus, prompts
from refine_jax.data import assets, loader, records, writer
from refine_jax.data.plan import Plan, enlarge

KINDS = ("jpeg-png", "png-png", "jpeg-jpeg")
BATCH = 8
GRIDS = [(16, 16)] * 3  # patches of the three pictures that a prompt speaks of
LENGTH = 320
AREAS = {
    "1024²": focus.aspect_buckets(1024 * 1024, 32, 2.0),
    "64²": [(32, 96), (32, 128), (64, 64), (64, 96)],
}


# ------------------------------------------------------------------------------------------------------------ material


def make_material(folder: Path, kind: str, count: int) -> None:
    """Write files and a list of them, and the same as a dataset."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        width, height = (int(v) for v in rng.integers(1024, 1601, 2))
        source = assets.photo(assets.photo_files("train")[number % 10])
        smooth = np.asarray(source.resize((width, height), Image.Resampling.LANCZOS), np.float32)
        target = np.clip(smooth + rng.normal(0, 3, smooth.shape), 0, 255).astype(np.uint8)  # a sensor's noise
        wide, high = (int(side * rng.uniform(0.1, 0.4)) for side in (width, height))
        x, y = int(rng.integers(width - wide)), int(rng.integers(height - high))
        before, after = kind.split("-")
        line = {name: str(folder / f"{number}_{name}") for name in ("image", "target", "mask")}
        line["target"] += f".{before}"
        line["image"] += f".{after}"
        Image.fromarray(target).save(line["target"], quality=92)
        damaged = np.array(Image.open(line["target"]))
        part = Image.fromarray(damaged[y : y + high, x : x + wide])
        blurred = part.resize((wide // 6, high // 6)).resize(part.size, Image.Resampling.BICUBIC)
        damaged[y : y + high, x : x + wide] = blurred
        Image.fromarray(damaged).save(line["image"], quality=92)
        mask = np.zeros((height, width), np.uint8)
        mask[y : y + high, x : x + wide] = 255
        line["mask"] += ".png"
        Image.fromarray(mask).save(line["mask"])
        line["reference"] = None
        if number % 3:
            line["reference"] = str(folder / f"{number}_reference.jpeg")
            shown = source.resize(tuple(int(v) for v in rng.integers(512, 1025, 2)), Image.Resampling.LANCZOS)
            shown.save(line["reference"], quality=92)
        line["instruction"] = f"Refine the sign number {number} in the masked region, keep its letters"
        lines.append(line)
    (folder / "list.json").write_text(json.dumps(lines))
    make = lambda number: writer.make_record(**lines[number])
    writer.write_dataset(folder / "set", make, count, {"kind": kind}, shards=4)


def tokenise(tokenizer, texts: list[str], present: list[bool]) -> dict[str, np.ndarray]:
    """What both pipelines do with their instructions."""
    rows = [
        prompts.encode_prompt(tokenizer, prompts.EDIT_PLUS, text, GRIDS, present=[True, here, True])
        for text, here in zip(texts, present)
    ]
    return vars(prompts.pad_prompts(rows, 1024))


# ----------------------------------------------------------------------------------------------------------- pipelines


def ours(folder: Path, area: str, workers: int):
    """Batches of the loader, with tokenised instructions."""
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = prompts.byte_tokenizer(temporary)
    dataset = records.Dataset(folder / "set")
    batches = loader.record_batches(dataset, 0, BATCH, AREAS[area], workers=workers)
    with contextlib.closing(batches):
        for batch in batches:
            texts = [loader.decode_instruction(row) for row in batch.pop("instruction")]
            yield {**batch, **tokenise(tokenizer, texts, batch["has_reference"].tolist())}


def pytorch(folder: Path, area: str, workers: int):
    """The same batches from a PyTorch DataLoader over the files."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = prompts.byte_tokenizer(temporary)
    lines = json.loads((folder / "list.json").read_text())
    index = records.Dataset(folder / "set").index
    plan = Plan(index, 0, BATCH, AREAS[area], AREAS[area], focus.FOCUS_MARGIN)

    class Pairs(Dataset):
        def __getitem__(self, item):
            number, size, reference_size = item
            line = lines[number]
            image = Image.open(line["image"]).convert("RGB")
            target = Image.open(line["target"]).convert("RGB")
            mask = Image.open(line["mask"]).convert("L")
            box = focus.focus_box(np.array(mask.getbbox()), *mask.size)
            crop = enlarge(box, *mask.size, size[1] / size[0])
            look = lambda picture: np.asarray(picture.crop(crop).resize(size[::-1], Image.Resampling.LANCZOS))
            has_reference = line["reference"] is not None
            if has_reference:
                shown = Image.open(line["reference"]).convert("RGB")
                reference = np.asarray(shown.resize(reference_size[::-1], Image.Resampling.LANCZOS))
            else:
                reference = np.zeros((*reference_size, 3), np.uint8)
            row = {
                "image": look(image),
                "target": look(target),
                "mask": np.asarray(mask.crop(crop).resize(size[::-1], Image.Resampling.NEAREST)),
                "reference": reference,
                "has_reference": has_reference,
            }
            row |= {k: v[0] for k, v in tokenise(tokenizer, [line["instruction"]], [has_reference]).items()}
            return {k: torch.from_numpy(np.array(v)) if isinstance(v, np.ndarray) else v for k, v in row.items()}

    class Order:
        def __iter__(self):
            step = 0
            while True:
                sizes = plan.group(step)
                yield [(plan.record(step, row), *sizes) for row in range(BATCH)]
                step += 1

    how = dict(prefetch_factor=2) if workers else {}
    for batch in DataLoader(Pairs(), batch_sampler=Order(), num_workers=workers, **how):
        yield {name: value.numpy() for name, value in batch.items()}


PIPELINES = {"ours": ours, "pytorch": pytorch}


# --------------------------------------------------------------------------------------------------------- measurement


def processor_seconds() -> float:
    """Of this process and its living descendants."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def measure(pipeline: str, folder: Path, area: str, workers: int, steps: int) -> dict:
    """Images a second, by the processor's seconds and by the clock; the first two batches for comparison."""
    run = PIPELINES[pipeline](folder, area, workers)
    first = [next(run) for _ in range(2 * max(1, workers) + 1)][:2]
    started, busy = time.perf_counter(), processor_seconds()
    for _ in range(steps):
        next(run)
    seconds, busy = time.perf_counter() - started, processor_seconds() - busy
    run.close()
    np.savez(folder / f"{pipeline}_{area}.npz", **{f"{k}_{n}": v for k, b in enumerate(first) for n, v in b.items()})
    return {"a core": steps * BATCH / busy, "a second": steps * BATCH / seconds}


def difference(folder: Path, area: str) -> str:
    """How far the first batches of both pipelines are apart."""
    a, b = (np.load(folder / f"{pipeline}_{area}.npz") for pipeline in PIPELINES)
    names = [name for name in b.files if name in a.files]
    off = [np.abs(a[name].astype(np.int64) - b[name].astype(np.int64)) for name in names]
    share = sum((d > 1).sum() for d in off) / sum(d.size for d in off)
    return f"{len(names)} arrays, {share:.4%} of the values differ by more than 1, at most {max(d.max() for d in off)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=48, help="pairs of each kind")
    parser.add_argument("--steps", type=int, help="batches a round (default: 8 of area 1024², 24 of 64²)")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--areas", default=",".join(AREAS))
    parser.add_argument("--output", help="write the figures as JSON")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        pipeline, folder, area = args.child
        print(json.dumps(measure(pipeline, Path(folder), area, args.workers, args.steps)), flush=True)
        return
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        for kind in args.kinds.split(","):
            folder = Path(temporary) / kind
            make_material(folder, kind, args.count)
            for area in args.areas.split(","):
                rounds: dict[str, list] = {name: [] for name in PIPELINES}
                steps = args.steps or (8 if area == "1024²" else 24)
                for _ in range(args.rounds):
                    for name in PIPELINES:
                        command = [sys.executable, __file__, "--workers", str(args.workers), "--steps", str(steps)]
                        done = subprocess.run([*command, "--child", name, folder, area], capture_output=True, text=True)
                        line = next((line for line in done.stdout.splitlines() if line.startswith("{")), None)
                        if line is None:
                            raise SystemExit(done.stderr)
                        rounds[name].append(json.loads(line))
                row = {
                    name: {unit: statistics.median(r[unit] for r in runs) for unit in runs[0]}
                    for name, runs in rounds.items()
                }
                ratio = {unit: row["ours"][unit] / row["pytorch"][unit] for unit in row["ours"]}
                figures[f"{kind} {area}"] = {**row, "ratio": ratio}
                shown = ", ".join(
                    f"{unit}: {row['ours'][unit]:.1f} against {row['pytorch'][unit]:.1f} ({ratio[unit]:.2f}x)"
                    for unit in ratio
                )
                print(f"{kind} {area}: images {shown}; {difference(folder, area)}", flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
