"""Refinement via Regeneration on the MMDiT at tiny sizes, on up to four devices.

    refine-jax train --config configs/rvr_debug.py --workdir runs/rvr_debug

A LoRA of rank 4 on the bundled tiny model, which was made to refine: it now reads the picture and the prompt and is
shown no latents of the picture. Pairs of the small world, drawn on the fly, 20 steps: about a minute on two CPU cores,
most of it compiling; nothing is to be learned from it. Through --config.data.source=records it takes a dataset's pairs.
More devices need a larger batch (--config.batch_size=8).
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    config = recipes.edit_lora(
        "",
        "",
        dict(fsdp=-1),
        init_from="tiny",
        conditioning="rvr",
        prompt="rvr-training",
        steps=20,
        batch_size=4,
        log_every=5,
        save_every=10,
        instruction_dropout=0.1,
        lora=dict(rank=4, alpha=4.0, targets=recipes.LORA_TARGETS),
        sigma=dict(distribution="logit_normal", shift=4.0),
        data=dict(
            source="world", buckets=((64, 64),), reference_buckets=None, weights=(1.0,), text_length=384, workers=0
        ),
    )
    del config.boundary  # there is no mask
    return config
