"""The debug twin of the edit_* configurations: their code path at tiny sizes, on up to four devices.

    refine-jax train --config configs/edit_debug.py --workdir runs/edit_debug

A LoRA of rank 4 on the bundled tiny model, pairs drawn on the fly, 20 steps: under a minute on two CPU cores, most of
it compiling. The loss is that of a trained model from the first step; nothing is to be learned from it. More devices
need a larger batch (--config.batch_size=8).
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    return recipes.edit_lora(
        "",
        "v5e:2x2",
        dict(fsdp=-1),
        init_from="tiny",
        steps=20,
        batch_size=4,
        log_every=5,
        save_every=10,
        lora=dict(rank=4, alpha=4.0, targets=recipes.LORA_TARGETS),
        boundary=dict(r_out=2, r_in=2, alpha=9.0),
        data=dict(
            source="synth", buckets=((64, 64),), reference_buckets=None, weights=(1.0,), text_length=128, workers=0
        ),
    )
