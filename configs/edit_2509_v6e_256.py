r"""The paper's LoRA on Qwen-Image-Edit-2509 (the paper's base model), on a v6e-256 slice (16 x 16 chips).

    refine-jax data cache --config configs/edit_2509_v6e_256.py --output caches \
        --config.data.source=records --config.data.path=pairs
    refine-jax train --config configs/edit_2509_v6e_256.py --workdir runs/edit_2509 \
        --config.data.path=caches/DIGITS

Batch 128, not the paper's 8: eight samples cannot feed 256 chips. 1250 steps show as many samples as the paper's
20 000; the learning rate grows with the square root of the batch, 2e-4 to 8e-4, after 50 steps of warm-up. That rule is
AdamW's usual one and has not been tried here: to repeat the paper's own run take edit_2509_v6e_16.
By the compiler: 10.7 of 32 GiB a chip (33 %), a step takes 0.80 s or more, MFU 81 % at most (docs/pods.md).
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    config = recipes.edit_lora(
        "qwen-image-edit-2509",
        "v6e:16x16",
        dict(fsdp=128, context=2),
        rules=recipes.SPREAD,
        batch_size=128,
        steps=1250,
        save_every=50,
    )
    config.optimizer.update(learning_rate=8e-4, warmup=50)
    return config
