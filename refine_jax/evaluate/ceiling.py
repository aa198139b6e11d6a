"""The ceiling of a latent model: how well its VAE alone returns the clean target, at the resolution of crops."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta

from refine_jax import checkpoint, conditioning, loading
from refine_jax.data import synth
from refine_jax.errors import RefineError
from refine_jax.evaluate.metrics import bootstrap, region_mse
from refine_jax.models.qwen_vae import QwenVAE, VAEConfig


def vae_ceiling(
    folder: str | os.PathLike, count: int = 240, seed: int = 20_000, batch: int = 16
) -> dict[str, dict[str, Any]]:
    """Region MSE of the VAE's reconstruction of held-out targets, beside copy-input's.

    folder: "tiny", or a model folder that holds a VAE, alone or in a whole model; count: pairs of
    `synth.sample(seed, …, "eval")`, as many from each bucket. Returns for "text", "logo" and "all" {count, vae,
    copy_input: mean error inside the mask (0…255 squared), ratio: vae / copy_input as (estimate, low, high)}. Raises
    `RefineError` for a damaged folder.
    """
    folder = loading.resolve(folder)
    manifest = checkpoint.read_manifest(folder)
    if "vae" not in manifest:
        raise RefineError(f"model {os.fspath(folder)!r}: holds no VAE")
    vae = QwenVAE(VAEConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in manifest["vae"].items()}))
    blank = jnp.zeros((1, 64, 64, 3), jnp.float32)
    shapes = meta.unbox(jax.eval_shape(lambda: vae.init(jax.random.key(0), blank)["params"]))
    params = {"params": checkpoint.load_weights(folder, {"vae": shapes})["vae"]}

    @jax.jit
    def reconstruct(pixels: jax.Array) -> jax.Array:
        mean, _ = vae.apply(params, conditioning.to_signed(pixels), method="encode")
        return conditioning.to_pixels(vae.apply(params, mean, method="decode"))

    errors: dict[str, list[tuple[float, float]]] = {"text": [], "logo": []}
    each = -(-count // len(synth.WEIGHTS))
    for bucket in synth.WEIGHTS:
        for start in range(0, each, batch):
            pairs = [synth.sample(seed, index, bucket, "eval") for index in range(start, start + batch)]
            results = np.asarray(reconstruct(np.stack([pair["target"] for pair in pairs])))
            for pair, result in list(zip(pairs, results))[: each - start]:
                error = lambda picture, pair=pair: region_mse(picture, pair["target"], pair["mask"])
                errors[pair["kind"]].append((error(result), error(pair["image"])))
    report = {}
    for kind, rows in (*errors.items(), ("all", errors["text"] + errors["logo"])):
        if rows:
            ours, copy = zip(*rows)
            means = {"vae": float(np.mean(ours)), "copy_input": float(np.mean(copy))}
            report[kind] = {"count": len(rows), **means, "ratio": bootstrap(ours, copy)}
    return report
