"""Batch inference on the bundled model: its bits, its speed, its warm start, and what SIGKILL does to it.

    python tools/benchmark_batch.py bits       # results against single calls
    python tools/benchmark_batch.py speed      # against a loop of single calls that is already compiled
    python tools/benchmark_batch.py start      # from process start to the first result: cold, cached, executables
    python tools/benchmark_batch.py kills      # 20 SIGKILLs at random moments, then finished

Requests are of mixed sizes, aspects, regions (boxes, masks, several in a picture) and references; with --regenerator
FOLDER every fifth is a picture to regenerate or to paint.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from refine_jax import batch, checkpoint, examples, executables, images, loading, recipes
from refine_jax.manifest import Manifest
from refine_jax.model import ModelConfig
from refine_jax.refine import Refiner
from refine_jax.regenerate import Regenerator


def write_requests(folder: Path, count: int, regenerate: bool, seed: int = 0) -> Path:
    """A manifest of `count` requests and its pictures, made of the bundled photograph."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    photograph = Image.open(examples.sign().image).convert("RGB")
    pictures, references = [], []
    for k in range(24):
        size = tuple(int(side) for side in rng.integers(120, 640, 2))
        name = f"p{k}.{'jpg' if k % 3 else 'png'}"
        photograph.resize(size).save(folder / name)
        pictures.append((name, *size))
    for k in range(5):
        width, height = (int(side) for side in rng.integers(60, 200, 2))
        photograph.crop((0, 0, width, height)).save(folder / f"r{k}.png")
        references.append(f"r{k}.png")

    def box(width: int, height: int) -> list[int]:
        sides = int(rng.integers(30, width // 2)), int(rng.integers(20, height // 3))
        x, y = (int(rng.integers(0, whole - side)) for whole, side in zip((width, height), sides))
        return [x, y, x + sides[0], y + sides[1]]

    lines = []
    for k in range(count):
        name, width, height = pictures[k % len(pictures)]
        word = "".join(rng.choice(list("ABCDEFGHIJ"), int(rng.integers(1, 9))))
        line = dict(id=f"q{k}", seed=k)
        if regenerate and k % 5 == 4:
            line["prompt"] = f"{word.lower()} red circles"
            if k % 10 == 4:
                line["image"] = name
        else:
            line |= dict(image=name, prompt=f"Refine the text '{word}'")
            if k % 7 == 3:
                line["regions"] = [{"box": box(width, height)}, {"box": box(width, height)}]
            elif k % 7 == 5:
                x1, y1, x2, y2 = box(width, height)
                mask = np.zeros((height, width), np.uint8)
                mask[y1:y2, x1:x2] = 255
                Image.fromarray(mask).save(folder / f"m{k}.png")
                line["mask"] = f"m{k}.png"
            else:
                line["box"] = box(width, height)
            if k % 3 == 0:
                line["reference"] = references[k % len(references)]
        lines.append(line)
    path = folder / "requests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Alone:
    """Requests one at a time, through the doors that a user calls."""

    def __init__(self, args: argparse.Namespace, **settings: object):
        self._refiner = Refiner.load("tiny", aspects=settings.pop("aspects", None), **settings)
        self._regenerator = Regenerator.load(args.regenerator, **settings) if args.regenerator else None

    def __call__(self, request) -> Image.Image:
        if request.task == "refine":
            return self._refiner.refine(**request.arguments)
        return getattr(self._regenerator, request.task)(**request.arguments)


def config_of(args: argparse.Namespace):
    return recipes.batch(batch_size=args.batch_size, regenerator=args.regenerator or "tiny")


def digests(output: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("results/*")}


def bits(args: argparse.Namespace, manifest: Path, root: Path) -> None:
    """Every result equals that of a call alone, with the same batch size."""
    summary = batch.run(config_of(args), manifest, root / "out")
    print(summary.text())
    alone = Alone(args, batch_size=args.batch_size, aspects=config_of(args).aspects)
    other = 0
    for request in Manifest(manifest):
        with Image.open(root / "out" / "results" / f"{request.id}.png") as result:
            other += int((np.asarray(alone(request)) != np.asarray(result)).any())
    print(f"bits: {other} of {summary.done} results differ from those of single calls")


def speed(args: argparse.Namespace, manifest: Path, root: Path) -> None:
    """Results a second, both compiled: the loop reads, refines and writes one picture after the other."""
    alone = Alone(args, aspects=config_of(args).aspects)  # the same shapes: otherwise the loop compiles many more
    requests = list(Manifest(manifest))
    started = time.perf_counter()
    for request in requests:
        alone(request)
    print(f"loop: compiled and run once in {time.perf_counter() - started:.1f} s")
    store = executables.Store()
    first = batch.run(config_of(args), manifest, root / "first", store=store)
    print(first.text())
    (root / "loop").mkdir()
    times: dict[str, list[float]] = {"loop": [], "batch": []}
    for attempt in range(args.repeat):
        started = time.perf_counter()
        for request in requests:
            images.save_picture(alone(request), root / "loop" / f"{request.id}.png")
        times["loop"].append(time.perf_counter() - started)
        started = time.perf_counter()
        summary = batch.run(config_of(args), manifest, root / f"again{attempt}", store=store)
        times["batch"].append(time.perf_counter() - started)
        print(summary.text())
    loop, batched = (min(times[name]) for name in ("loop", "batch"))
    print(
        f"speed: loop {len(requests) / loop:.1f}, batch {len(requests) / batched:.1f} results/s: {loop / batched:.2f}x"
    )
    print(f"speed with compilation: batch {len(requests) / first.total_seconds:.2f} results/s")


def write_medium(folder: Path, side: int, steps: int) -> Path:
    """A model folder of the bundled model's kind, medium wide, with random weights; `steps` steps, crops of `side`²."""
    manifest = checkpoint.read_manifest(loading.resolve("tiny"))
    wide = dict(num_layers=8, num_attention_heads=8, attention_head_dim=96, joint_attention_dim=768)
    manifest["mmdit"] |= wide | dict(axes_dims_rope=[16, 40, 40])
    manifest["vae"] |= dict(base_dim=48)
    manifest["vl"]["text"] |= dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=6)
    manifest["vl"]["text"]["mrope_section"] = [16, 24, 24]
    manifest["vl"]["vision"] |= dict(depth=4, hidden_size=384, intermediate_size=1024, num_heads=6, out_hidden_size=768)
    manifest |= dict(vae_area=side**2, condition_area=(side * 7 // 6) ** 2, steps=steps)
    model = ModelConfig.from_manifest(manifest)
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        scale = 0.02 if path[-1].key != "scale" else 1.0
        return rng.standard_normal(leaf.shape, np.float32) * scale

    weights = jax.tree_util.tree_map_with_path(draw, model.abstract())
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(weights)) / 1e9:.2f} billion random weights")
    model.byte_tokenizer(folder / "tokenizer")
    checkpoint.save_model(folder, model.to_manifest(), weights)
    return folder


def start(args: argparse.Namespace, manifest: Path, root: Path) -> None:
    """Seconds from the start of a process to its first result."""
    made, cache = root / "executables", root / "cache"
    command = [sys.executable, "-m", "refine_jax"]
    settings = ["--manifest", str(manifest), "--batch-size", str(args.batch_size), "--quiet"]
    if args.model:
        medium = args.model == "medium"
        settings += ["--model", str(write_medium(root / "medium", args.side, args.steps) if medium else args.model)]

    def first_result(name: str, folder: Path | None, *more: str, whole: bool = False) -> float:
        output, kept = root / name, ["--cache", str(folder or "none")]
        started = time.perf_counter()
        process = subprocess.Popen([*command, "batch", *settings, *kept, "--output-dir", str(output), *more])
        while process.poll() is None and not any(output.glob("results/*.png")):
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        if not whole:
            process.kill()
        process.wait()
        return seconds

    cold = min(first_result(f"cold{k}", None) for k in range(args.repeat))
    first_result("fill", cache, whole=True)
    cached = min(first_result(f"cached{k}", cache) for k in range(args.repeat))
    subprocess.run([*command, "compile", *settings, "--executables", str(made)], check=True)
    warm = min(first_result(f"warm{k}", cache, "--executables", str(made)) for k in range(args.repeat))
    print(
        f"first result: cold {cold:.1f} s, with the compilation cache {cached:.1f} s ({cached / cold:.0%}), with it and"
        f" executables {warm:.1f} s ({warm / cold:.0%})"
    )


def kills(args: argparse.Namespace, manifest: Path, root: Path) -> None:
    """SIGKILL at random moments; then nothing is lost, doubled or half written."""
    rng, output = random.Random(args.seed), root / "out"
    command = [sys.executable, "-m", "refine_jax", "batch", "--manifest", str(manifest), "--output-dir", str(output)]
    command += ["--batch-size", str(args.batch_size), "--quiet"]
    command += ["--regenerator", args.regenerator] if args.regenerator else []
    undisturbed = batch.run(config_of(args), manifest, root / "undisturbed")
    killed = 0
    while killed < args.kills:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        count = lambda: len(list(output.glob("results/*.png")))
        wanted, deadline = count() + rng.randint(0, 12), time.monotonic() + rng.uniform(2, 60)
        while process.poll() is None and count() < wanted and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        killed += 1
        print(f"kill {killed}: {count()} results", flush=True)
    subprocess.run(command, check=True)
    journals = [line for path in output.glob("journal/*") for line in path.read_text().splitlines(True)]
    lines = [json.loads(line) for line in journals if line.endswith("\n")]  # the last one of a journal may be cut off
    done = [line["id"] for line in lines if line["status"] == "done"]
    partial = [path for path in output.rglob("*") if "partial" in path.name]
    made = digests(output)
    wrong = [name for name, digest in digests(root / "undisturbed").items() if made.get(name) != digest]
    twice = len(done) - len(set(done))
    print(
        f"kills: {killed}; {undisturbed.done} requests, {len(set(done))} done, {twice} recorded twice, {len(wrong)}"
        f" results unlike an undisturbed run's, {len(partial)} half-written files"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("bits", "speed", "start", "kills"))
    parser.add_argument("--count", type=int, default=300, help="requests")
    parser.add_argument("--batch-size", type=int, default=recipes.batch().batch_size)
    parser.add_argument("--regenerator", help="folder of a model that regenerates: adds requests for it")
    parser.add_argument("--model", help="start: a folder, or `medium`: random weights, 0.2 billion")
    parser.add_argument("--side", type=int, default=96, help="start: of a crop of the medium model, in pixels")
    parser.add_argument("--steps", type=int, default=1, help="start: of the medium model")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        manifest = write_requests(root / "in", args.count, bool(args.regenerator))
        globals()[args.what](args, manifest, root)


if __name__ == "__main__":
    main()
