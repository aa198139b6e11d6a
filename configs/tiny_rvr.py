"""The `tiny-rvr` model, third stage: refinement via regeneration in the small world.

    refine-jax train --config configs/tiny_rvr.py --workdir runs/tiny_rvr

Goes on from the result of configs/tiny_world_see.py with pairs of a misaligned and an aligned picture; a third of the
rows stay text to image. The paper's ablations, from the same start and with the same budget: the picture's latents too
(--config.conditioning=rvr_vae), and editing (that, and --config.data.pairs=edit).
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    config = recipes.small_world(
        steps=900,
        init_from="runs/tiny_world_see/model",
        vae_from="",
        conditioning="rvr",
        prompt="",
        data=dict(text_to_image=1 / 3, text_length=54, pairs="regenerate"),
        optimizer=dict(learning_rate=2e-3, decay=0.5),
    )
    del config.model, config.tokenizer, config.aligned_heads
    config.scan = False  # a fifth faster on a CPU
    return config
