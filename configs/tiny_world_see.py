"""The `tiny-rvr` model, second stage: the encoder learns to see, by telling enough to paint a picture again.

    refine-jax train --config configs/tiny_world_see.py --workdir runs/tiny_world_see

Goes on from the result of configs/tiny_world.py. Half of the rows show the picture that is to be painted, the others
stay text to image. BAGEL, from which RvR starts, has learnt to see before; configs/tiny_rvr.py goes on from here.
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    config = recipes.small_world(
        steps=1000,
        init_from="runs/tiny_world/model",
        vae_from="",
        conditioning="rvr",
        prompt="",
        data=dict(text_to_image=1 / 2, text_length=54, pairs="reconstruct"),
        optimizer=dict(learning_rate=2e-3, decay=0.35),
    )
    del config.model, config.tokenizer, config.aligned_heads
    config.scan = False  # a fifth faster on a CPU
    return config
