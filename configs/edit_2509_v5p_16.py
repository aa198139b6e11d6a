r"""The paper's LoRA on Qwen-Image-Edit-2509 (the paper's base model), on a v5p-16 slice (2 x 2 x 2 chips).

    refine-jax data cache --config configs/edit_2509_v5p_16.py --output caches \
        --config.data.source=records --config.data.path=pairs
    refine-jax train --config configs/edit_2509_v5p_16.py --workdir runs/edit_2509 \
        --config.data.path=caches/DIGITS

A sample a chip.
By the compiler: 24.4 of 95 GiB a chip, a step takes 3.19 s or more, MFU 81 % at most (docs/pods.md).
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    return recipes.edit_lora("qwen-image-edit-2509", "v5p:2x2x2", dict(fsdp=8))
