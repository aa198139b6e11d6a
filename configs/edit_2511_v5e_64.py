r"""The paper's LoRA on Qwen-Image-Edit-2511 (what the released adapter is for), on a v5e-64 slice (8 x 8 chips).

    refine-jax data cache --config configs/edit_2511_v5e_64.py --output caches \
        --config.data.source=records --config.data.path=pairs
    refine-jax train --config configs/edit_2511_v5e_64.py --workdir runs/edit_2511 \
        --config.data.path=caches/DIGITS

Eight chips share a sample: its tokens are split four ways, heads and MLP two ways.
By the compiler: 12.8 of 16 GiB a chip, a step takes 0.86 s or more (links; 0.83 s of arithmetic), MFU 88 % at most
(docs/pods.md).
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    mesh = dict(fsdp=8, context=4, tensor=2)
    return recipes.edit_lora("qwen-image-edit-2511", "v5e:8x8", mesh, rules=recipes.SPREAD, remat="dots")
