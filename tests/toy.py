"""Configurations and models of the shipped shape, small enough to compile and run in seconds."""

import importlib.util
from pathlib import Path

import jax
import ml_collections
import numpy as np

from refine_jax import checkpoint
from refine_jax.model import ModelConfig

CONFIGS = Path(__file__).parent.parent / "configs"

VAE = dict(base_dim=4, z_dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, temperal_downsample=(False, True))
MMDIT = dict(
    in_channels=16,
    out_channels=4,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=16,
    axes_dims_rope=(4, 2, 2),
)
VISION = dict(
    depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16, fullatt_block_indexes=(0,)
)
TEXT = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    mrope_section=(2, 1, 1),
)


def shipped(name: str) -> ml_collections.ConfigDict:
    """The configuration of `configs/<name>.py`."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def _common(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    config.steps, config.batch_size, config.log_every, config.save_every = 4, 2, 1, 2
    config.data.workers = 0
    config.optimizer.update(name="adamw", warmup=1)
    return config


def vae_config() -> ml_collections.ConfigDict:
    """configs/tiny_vae.py with toy widths: 4 steps of 2 patches, a checkpoint every 2."""
    config = _common(shipped("tiny_vae"))
    config.vae.update(VAE, latents_mean=(0.1, -0.1, 0.2, 0.0), latents_std=(0.9, 1.1, 1.2, 1.0))
    config.data.size, config.statistics_batches = 16, 2
    return config


def refine_config(vae_from: Path | str) -> ml_collections.ConfigDict:
    """configs/tiny.py with toy widths and one bucket: 4 steps of 2 pairs, a checkpoint every 2."""
    config = _common(shipped("tiny"))
    config.vae_from = str(vae_from)
    config.model.mmdit.update(MMDIT)
    config.model.vl.vision.update(VISION)
    config.model.vl.text.update(TEXT)
    config.aligned_heads = ()
    config.data.buckets, config.data.weights, config.data.text_length = ((32, 96),), (1.0,), 96
    return config


def model_config(scan: bool = True) -> ModelConfig:
    """The toy model of `refine_config`."""
    config = refine_config("")
    manifest = config.model.to_dict() | {"vae": vae_config().vae.to_dict()}
    manifest["mmdit"]["scan"] = scan
    manifest |= dict(vae_area=32 * 32, condition_area=56 * 56, steps=2)
    return ModelConfig.from_manifest(manifest)


def random_variables(model: ModelConfig, seed: int = 0) -> dict:
    """Parameters that are nowhere 0 or 1: kernels of order 1 / sqrt(fan in), scales around 1, biases around 0."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        x = rng.standard_normal(leaf.shape, dtype=np.float32)
        if path[-1].key == "scale":
            return 1.0 + 0.2 * x
        if path[-1].key == "bias":
            return 0.1 * x
        return x / np.sqrt(np.prod(leaf.shape[:-1] if path[0].key == "vae" else leaf.shape[-2:-1]))

    return jax.tree_util.tree_map_with_path(draw, model.abstract())


def write_model(folder: Path, seed: int = 0) -> ModelConfig:
    """A model folder with random weights."""
    model = model_config()
    model.byte_tokenizer(folder / "tokenizer")
    checkpoint.save_model(folder, model.to_manifest(), random_variables(model, seed))
    return model
