r"""Full fine-tuning of Qwen-Image-Edit-2511's transformer (20.4 B parameters), on a v5p-128 slice (4 x 4 x 4 chips).

    refine-jax data cache --config configs/edit_2511_full_v5p_128.py --output caches \
        --config.data.source=records --config.data.path=pairs
    refine-jax train --config configs/edit_2511_full_v5p_128.py --workdir runs/edit_2511_full \
        --config.data.path=caches/DIGITS

A sample a chip, batch 64. Parameters and moments are float32 and lie split over all chips, rows over 16 and columns
over 4 of them; gradients are scattered the same way. The paper trains no whole transformer: 1e-5 after 500 steps of
warm-up is the usual start for one of this size, not a result of ours.
By the compiler: 27.9 of 95 GiB a chip (29 %), a step takes 3.77 s or more, MFU 80 % at most (docs/pods.md).
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    config = recipes.edit_lora(
        "qwen-image-edit-2511",
        "v5p:4x4x4",
        dict(data=4, fsdp=16),
        rules=recipes.WHOLE,
        batch_size=64,
        lora=None,
        save_every=250,
    )
    config.optimizer.update(learning_rate=1e-5, warmup=500)
    return config
