"""Put a trained tiny model into the package, with what it came from.

    python tools/package_tiny.py --vae runs/tiny_vae --flow runs/tiny

Writes the model folder (weights as float16), and beside it the two resolved configurations, the scalars of both runs
and their loss curves. The held-out table is written by `refine-jax evaluate`.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

from PIL import Image, ImageDraw

from refine_jax import checkpoint
from refine_jax.images import save_picture
from refine_jax.model import ModelConfig

CURVES = {"vae": ("loss", "mse"), "flow": ("loss", "inside", "outside")}
COLOURS = ("#1f4e9c", "#c4402a", "#2c8a4b")


def read_scalars(workdir: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def draw_panel(name: str, rows: list[dict], size: tuple[int, int] = (480, 300)) -> Image.Image:
    """A run's losses over its steps, the vertical axis logarithmic."""
    panel = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(panel)
    left, right, top, bottom = 52, size[0] - 12, 28, size[1] - 28
    values = [row[key] for row in rows for key in CURVES[name]]
    low, high = math.log10(min(values)), math.log10(max(values))

    def place(step: int, value: float) -> tuple[float, float]:
        along, up = step / rows[-1]["step"], (math.log10(value) - low) / (high - low)
        return left + (right - left) * along, bottom - (bottom - top) * up

    draw.rectangle((left, top, right, bottom), outline="#999999")
    for tick in (min(values), 10 ** ((low + high) / 2), max(values)):
        draw.text((left - 48, place(0, tick)[1] - 6), f"{tick:.3g}", fill="black")
    draw.text((right - 60, bottom + 8), f"{rows[-1]['step']} steps", fill="black")
    for k, key in enumerate(CURVES[name]):
        draw.line([place(row["step"], row[key]) for row in rows], fill=COLOURS[k], width=2)
        draw.text((left + 6 + 90 * k, 8), f"{name}: {key}", fill=COLOURS[k])
    return panel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="work folder of configs/tiny_vae.py")
    parser.add_argument("--flow", type=Path, required=True, help="work folder of configs/tiny.py")
    parser.add_argument("--output", type=Path, default=Path("refine_jax/assets/tiny"))
    args = parser.parse_args()
    trained = args.flow / "model"
    manifest = checkpoint.read_manifest(trained)
    model = ModelConfig.from_manifest(manifest)
    weights = checkpoint.load_weights(trained, model.abstract())
    about = "trained by refine_jax: configs/tiny_vae.py, then configs/tiny.py; see training/ and ATTRIBUTION.md"
    checkpoint.save_model(args.output, {**model.to_manifest(), "about": about}, weights, dtype="float16")
    shutil.copytree(trained / "tokenizer", args.output / "tokenizer", dirs_exist_ok=True)
    (args.output / "training").mkdir(exist_ok=True)
    runs = {"vae": read_scalars(args.vae), "flow": read_scalars(args.flow)}
    for name, folder in (("vae", args.vae), ("flow", args.flow)):
        config = (folder / "config.json").read_text()
        checkpoint.write_text(args.output / "training" / f"{name}_config.json", config)
        lines = "".join(json.dumps(row) + "\n" for row in runs[name])
        checkpoint.write_text(args.output / "training" / f"{name}_metrics.jsonl", lines)
    for name, rows in runs.items():
        save_picture(draw_panel(name, rows), args.output / "training" / f"{name}_loss.png")
    size = (args.output / checkpoint.WEIGHTS).stat().st_size
    print(f"wrote {args.output} ({size / 1e6:.1f} MB of weights)")


if __name__ == "__main__":
    main()
