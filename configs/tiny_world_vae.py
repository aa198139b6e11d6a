"""The VAE of `tiny-rvr`: Qwen-Image's architecture, ÷8, 16 latent channels, on pictures of the small world.

    refine-jax train --config configs/tiny_world_vae.py --workdir runs/tiny_world_vae

configs/tiny_world.py takes it.
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    return recipes.tiny_vae(
        steps=900,
        batch_size=16,
        vae=dict(dim_mult=(1, 2, 4, 4), temperal_downsample=(False, True, True)),
        kl=2e-3,
        data=dict(source="world"),
        optimizer=dict(decay=0.35),
    )
