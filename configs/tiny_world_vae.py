"""The VAE of `tiny-rvr`: Qwen-Image's architecture, ÷8, 16 latent channels, on pictures of the small world.

    refine-jax train --config configs/tiny_world_vae.py --workdir runs/tiny_world_vae

configs/tiny_world.py takes it.
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    config = ml_collections.ConfigDict()
    config.objective = "vae"
    config.seed = 0
    config.steps = 900
    config.batch_size = 16
    config.log_every = 20
    config.save_every = 100
    config.keep = 2
    config.ema_decay = 0.998

    config.vae = dict(
        base_dim=16,
        z_dim=16,
        dim_mult=(1, 2, 4, 4),
        num_res_blocks=1,
        temperal_downsample=(False, True, True),
        latents_mean=(0.0,) * 16,
        latents_std=(1.0,) * 16,
    )
    config.edge = 0.1
    config.kl = 2e-3
    config.statistics_batches = 40

    config.data = dict(source="world", size=64, workers=1)
    config.optimizer = recipes.muon(
        learning_rate=3e-3, adam_scale=1.0, warmup=50, weight_decay=0.0, muon_steps=5, muon_exclude="^$"
    )
    config.mesh = dict(data=-1)
    config.rules = {}
    return config
