"""The boundary-weighted loss on `tiny`: with against without, the same budget, seed and data.

    python tools/ablate_boundary.py --workdir runs/boundary --steps 250

Trains the bundled model on, once an α of --alphas (0: the plain flow loss), otherwise alike: configs/tiny.py with a
smaller learning rate that decays to 0. Then refines held-out scenes and prints, for the model as bundled and each α,
with 95 % intervals (paired: the ratio to α = 0): the seam error, |∇(result) − ∇(target)| over the pixels where the
paste-back is neither 0 nor 1 (`metrics.seam_error`), and the squared error inside the region. A killed run continues.
"""

import argparse
import importlib.util
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from refine_jax import focus
from refine_jax.data import synth
from refine_jax.evaluate.metrics import bootstrap, region_mse, seam_error
from refine_jax.refine import Refiner
from refine_jax.train import train

ROOT = Path(__file__).resolve().parent.parent
SEED = 31_000  # of scenes that neither the training nor the held-out list has
SIZES = ((32, 96), (32, 128), (64, 64), (64, 96))


def train_arm(workdir: Path, alpha: float, steps: int, learning_rate: float) -> Path:
    """The folder of the model that `steps` further steps with this α give."""
    spec = importlib.util.spec_from_file_location("tiny", ROOT / "configs" / "tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.model, config.vae_from, config.init_from, config.aligned_heads = None, "", "tiny", None
    config.steps, config.boundary.alpha = steps, alpha
    config.optimizer.learning_rate, config.optimizer.warmup, config.optimizer.decay = learning_rate, 20, 1.0
    return train(config, workdir, progress=True)


def judge(model: str | Path, scenes: list[dict]) -> dict[str, np.ndarray]:
    """Seam and region error of every scene, as pasted with the paper's feathering; one sampler step."""
    refiner = Refiner.load(str(model))
    found: dict[str, list] = {"seam": [], "region": []}
    for first in tqdm(range(0, len(scenes), 60), desc=str(model)):
        part = scenes[first : first + 60]
        requests = [
            dict(
                image=s["image"],
                mask_or_box=s["mask"],
                prompt=s["instruction"],
                reference=s["reference"] if s["has_reference"] else None,
                focus=False,
                feather="paper",
            )
            for s in part
        ]
        for scene, picture in zip(part, refiner.refine_batch(requests)):
            weight = np.asarray(focus.feather(scene["mask"], None, "paper"))
            found["seam"].append(seam_error(np.asarray(picture), scene["target"], weight))
            found["region"].append(region_mse(np.asarray(picture), scene["target"], scene["mask"]))
    return {name: np.array(values) for name, values in found.items()}


def paired(values: np.ndarray, base: np.ndarray) -> tuple[tuple, tuple]:
    """(mean, ratio to `base`) with intervals, over the scenes that have a value: a mask may leave no band."""
    there = np.isfinite(values) & np.isfinite(base)
    return bootstrap(values[there]), bootstrap(values[there], base[there])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.0, 9.0])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--scenes", type=int, default=240)
    args = parser.parse_args()
    folders = {"as bundled": "tiny"}
    for alpha in args.alphas:
        folders[f"alpha {alpha:g}"] = train_arm(
            args.workdir / f"alpha_{alpha:g}", alpha, args.steps, args.learning_rate
        )
    scenes = [synth.sample(SEED, k, SIZES[k % len(SIZES)], "eval") for k in range(args.scenes)]
    errors = {name: judge(folder, scenes) for name, folder in folders.items()}
    base = errors[f"alpha {args.alphas[0]:g}"]
    table = {}
    for name, found in errors.items():
        for kind, values in found.items():
            mean, ratio = paired(values, base[kind])
            table[f"{name} {kind}"] = {"mean": mean, "ratio": ratio}
            print(
                f"{name:>12} {kind:>6}: {mean[0]:8.3f} ({mean[1]:.3f} to {mean[2]:.3f}), ratio "
                f"{ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f})"
            )
    (args.workdir / "table.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
