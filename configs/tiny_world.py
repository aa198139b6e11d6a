"""The `tiny-rvr` model, first stage: text to image in the small world, small enough for two CPU cores.

    refine-jax train --config configs/tiny_world.py --workdir runs/tiny_world

Takes the VAE of configs/tiny_world_vae.py; configs/tiny_world_see.py goes on from its result.
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    return recipes.small_world()
