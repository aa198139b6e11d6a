"""Put a trained tiny model into the package, with what it came from.

    python tools/package_tiny.py tiny vae=runs/tiny_vae flow=runs/tiny letters=runs/tiny_letters
    python tools/package_tiny.py tiny_rvr vae=runs/tiny_world_vae world=runs/tiny_world rvr=runs/tiny_rvr

Takes the model of the last run. Writes its folder (weights as float16), and beside it the resolved configurations, the
scalars and the loss curves of all runs. The table of scores is written by `refine-jax evaluate`.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

from PIL import Image, ImageDraw

from refine_jax import alignment, checkpoint, loading
from refine_jax.images import save_picture
from refine_jax.model import ModelConfig

CURVES = ("loss", "mse", "inside", "outside", "alignment")
COLOURS = ("#1f4e9c", "#c4402a", "#2c8a4b", "#8a5a2c")


def read_scalars(workdir: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def draw_panel(name: str, rows: list[dict], size: tuple[int, int] = (480, 300)) -> Image.Image:
    """A run's losses over its steps, the vertical axis logarithmic."""
    panel = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(panel)
    left, right, top, bottom = 52, size[0] - 12, 28, size[1] - 28
    curves = [key for key in CURVES if key in rows[0]]
    values = [row[key] for row in rows for key in curves]
    low, high = math.log10(min(values)), math.log10(max(values))

    def place(step: int, value: float) -> tuple[float, float]:
        along, up = step / rows[-1]["step"], (math.log10(value) - low) / (high - low)
        return left + (right - left) * along, bottom - (bottom - top) * up

    draw.rectangle((left, top, right, bottom), outline="#999999")
    for tick in (min(values), 10 ** ((low + high) / 2), max(values)):
        draw.text((left - 48, place(0, tick)[1] - 6), f"{tick:.3g}", fill="black")
    draw.text((right - 60, bottom + 8), f"{rows[-1]['step']} steps", fill="black")
    for k, key in enumerate(curves):
        draw.line([place(row["step"], row[key]) for row in rows], fill=COLOURS[k], width=2)
        draw.text((left + 6 + 90 * k, 8), f"{name}: {key}", fill=COLOURS[k])
    return panel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [folder for folder, _ in loading.BUNDLED.values()]
    parser.add_argument("name", choices=names, help="folder of refine_jax/assets to write")
    parser.add_argument("runs", metavar="STAGE=WORKDIR", nargs="+", help="a stage of the training, in order")
    args = parser.parse_args()
    output = Path("refine_jax/assets") / args.name
    runs = {stage: Path(workdir) for stage, _, workdir in (text.partition("=") for text in args.runs)}
    trained = list(runs.values())[-1] / "model"
    model = ModelConfig.from_manifest(checkpoint.read_manifest(trained))
    weights = checkpoint.load_weights(trained, model.abstract())
    made_by = dict(loading.BUNDLED.values())[args.name]
    about = f"trained by refine_jax: {made_by}; see training/ and ATTRIBUTION.md"
    checkpoint.save_model(output, {**model.to_manifest(), "about": about}, weights, dtype="float16")
    shutil.copytree(trained / "tokenizer", output / "tokenizer", dirs_exist_ok=True)
    if (trained / alignment.HEAD).is_file():  # a training that goes on from the package takes it up
        shutil.copy(trained / alignment.HEAD, output / alignment.HEAD)
    training = output / "training"
    training.mkdir(exist_ok=True)
    for stage, workdir in runs.items():
        rows = read_scalars(workdir)
        checkpoint.write_text(training / f"{stage}_config.json", (workdir / "config.json").read_text())
        checkpoint.write_text(training / f"{stage}_metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        save_picture(draw_panel(stage, rows), training / f"{stage}_loss.png")
    size = (output / checkpoint.WEIGHTS).stat().st_size
    print(f"wrote {output} ({size / 1e6:.1f} MB of weights)")


if __name__ == "__main__":
    main()
