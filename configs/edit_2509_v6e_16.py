r"""The paper's LoRA on Qwen-Image-Edit-2509 (the paper's base model), on a v6e-16 slice (4 x 4 chips).

    refine-jax data cache --config configs/edit_2509_v6e_16.py --output caches \
        --config.data.source=records --config.data.path=pairs
    refine-jax train --config configs/edit_2509_v6e_16.py --workdir runs/edit_2509 \
        --config.data.path=caches/DIGITS

Two chips share a sample: its tokens are split, keys and values gathered.
By the compiler: 12.8 of 32 GiB a chip (40 %), a step takes 0.80 s or more, MFU 81 % at most (docs/pods.md).
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    return recipes.edit_lora("qwen-image-edit-2509", "v6e:4x4", dict(fsdp=8, context=2), rules=recipes.SPREAD)
