"""What 8 bits cost: pictures of the bundled model, and outputs of random networks, against float32's.

    python tools/quantize_error.py --count 48          # docs/speed.md

The first part refines held-out scenes (the extra `eval`) with "tiny" in float32 and with its matrices in int8, from the
same noise, and compares both with the clean scenes and with each other inside the masks. The second runs an MMDiT and a
Qwen2.5-VL of medium width, whose weights are drawn from a normal or a heavy-tailed distribution, in float32, in
bfloat16, and on int8 weights with either: root mean square of the difference from float32, of float32's.
"""

import argparse
import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from refine_jax import Refiner, loading
from refine_jax.evaluate import heldout, metrics
from refine_jax.model import ModelConfig
from refine_jax.models import quantize
from refine_jax.models.mmdit import MMDiT, MMDiTConfig, image_positions
from refine_jax.models.qwen_vae import VAEConfig
from refine_jax.models.qwen_vl import QwenVL, QwenVLConfig, TextConfig, VisionConfig, image_index, mrope_positions

WEIGHTS = ("normal", "student-t, 4 degrees")


def pictures(count: int, batch: int) -> dict[str, Any]:
    """The bundled model on `count` held-out scenes, with and without their references."""
    samples, _ = heldout.load_samples(count, progress=True)
    refiners = {"float32": Refiner.load("tiny"), "int8": Refiner.load("tiny", quantize="int8")}
    found: dict[str, Any] = {"scenes": count}
    for name, reference in (("with reference", True), ("without", False)):
        made = {
            kind: heldout.refine_samples(refiner, samples, reference=reference, batch=batch)
            for kind, refiner in refiners.items()
        }
        mse = {
            kind: [metrics.region_mse(p, s.target, s.mask) for p, s in zip(made[kind], samples)] for kind in refiners
        }
        copied = [metrics.region_mse(s.image, s.target, s.mask) for s in samples]
        inside = [np.abs(a.astype(int) - b)[s.mask > 0] for a, b, s in zip(made["float32"], made["int8"], samples)]
        off = np.array(mse["int8"]) - np.array(mse["float32"])
        found[name] = {
            "mse of the input": float(np.mean(copied)),
            "mse of float32": float(np.mean(mse["float32"])),
            "mse of int8": float(np.mean(mse["int8"])),
            "mse, int8 less float32: mean, standard error": [float(off.mean()), float(off.std(ddof=1) / count**0.5)],
            "values of 255 off: mean": float(np.mean(np.concatenate(inside))),
            "values of 255 off: 99 %": float(np.percentile(np.concatenate(inside), 99)),
            "values of 255 off: most": int(max(part.max() for part in inside)),
        }
    return found


def draw(abstract: Any, kind: str, seed: int = 0) -> dict[str, Any]:
    """Weights of order 1 / sqrt(fan in), scales around 1, biases around 0."""
    rng = np.random.default_rng(seed)
    heavy = lambda shape: (rng.standard_t(4, shape) / np.sqrt(2)).astype(np.float32)
    flat = {}
    for path, leaf in traverse_util.flatten_dict(abstract, sep="/").items():
        x = rng.standard_normal(leaf.shape, np.float32) if kind == WEIGHTS[0] else heavy(leaf.shape)
        name = path.rpartition("/")[2]
        flat[path] = 1 + 0.1 * x if name == "scale" else 0.1 * x if name == "bias" else x * leaf.shape[-2] ** -0.5
        if "_mod/" in path:  # gates and scales of a trained network are small
            flat[path] *= 0.3
    return traverse_util.unflatten_dict(flat, sep="/")


def networks() -> dict[str, Any]:
    """Relative errors of random networks of medium width."""
    vision = VisionConfig(depth=4, hidden_size=512, intermediate_size=1368, num_heads=8, out_hidden_size=1024)
    vision = dataclasses.replace(vision, fullatt_block_indexes=(3,))
    text = TextConfig(1024, 1024, 5632, 8, 8, 2)
    model = ModelConfig(
        mmdit=MMDiTConfig(num_layers=8, num_attention_heads=8, joint_attention_dim=1024, zero_cond_t=True),
        vl=QwenVLConfig(vision, text, image_token_id=1023),
        vae=VAEConfig(),
    )
    rng = np.random.default_rng(1)
    grid, tokens = (16, 16), 64
    positions = image_positions([(16, 16), (16, 16)])[None]
    image, words = rng.standard_normal((1, 512, 64), np.float32), rng.standard_normal((1, 40, 1024), np.float32)
    where = np.arange(8, 48)[None].astype(np.int32)
    ids = np.concatenate([np.arange(10, 20), np.full(tokens, 1023), np.arange(20, 40)]).astype(np.int32)
    patches = rng.standard_normal((1, 256, vision.patch_dim), np.float32)
    prompt = (ids[None], np.ones((1, len(ids)), bool), mrope_positions(ids, [grid], 1023)[None])
    index = image_index(ids, [grid], 1023)[None]
    sigma = jnp.full(1, 0.6)

    def run(model: ModelConfig, name: str, params: Any) -> np.ndarray:
        if name == "mmdit":
            network, inputs = MMDiT(model.mmdit), (image, words, sigma, positions, where)
            call = lambda p, *x: network.apply({"params": p}, *x, target_length=256)
        else:
            network, inputs = QwenVL(model.vl), (*prompt, [patches], index)
            call = lambda p, *x: network.apply({"params": p}, *x, grids=[grid])
        return np.asarray(jax.jit(call)(params, *inputs), np.float64)

    def kinds(dtype: str) -> ModelConfig:
        parts = {name: dataclasses.replace(getattr(model, name), dtype=dtype) for name in ("mmdit", "vl")}
        return dataclasses.replace(model, **parts)

    found: dict[str, Any] = {}
    for weights in WEIGHTS:
        for name in ("mmdit", "vl"):
            full = draw(model.abstract((name,))[name], weights)
            small, flat = (
                loading.quantized(model, "int8").abstract((name,))[name],
                traverse_util.flatten_dict(full, sep="/"),
            )
            moved = []
            for path, scale in quantize.quantized_paths(traverse_util.flatten_dict(small, sep="/")).items():
                kernel = flat[path]
                flat[path], flat[scale] = quantize.quantize(kernel)
                difference = quantize.dequantize(flat[path], flat[scale]) - kernel
                moved.append(np.mean(difference**2) / np.mean(kernel**2))
            eight, exact = traverse_util.unflatten_dict(flat, sep="/"), run(model, name, full)
            runs = {
                "bfloat16": (kinds("bfloat16"), full),
                "int8, float32": (loading.quantized(model, "int8"), eight),
                "int8, bfloat16": (loading.quantized(kinds("bfloat16"), "int8"), eight),
            }
            errors = {kind: run(config, name, params) - exact for kind, (config, params) in runs.items()}
            relative = {kind: float(np.sqrt(np.mean(e**2) / np.mean(exact**2))) for kind, e in errors.items()}
            found[f"{name}, {weights}"] = {"weights": float(np.sqrt(np.mean(moved))), **relative}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=48, help="held-out scenes; 0: random networks alone")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    found = {"networks": networks()}
    if args.count:
        found["tiny"] = pictures(args.count, args.batch)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
