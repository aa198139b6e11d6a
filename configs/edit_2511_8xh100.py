r"""The paper's LoRA on Qwen-Image-Edit-2511 (what the released adapter is for), on 8 x H100-80GB, NVLink.

    refine-jax data cache --config configs/edit_2511_8xh100.py --output caches \
        --config.data.source=records --config.data.path=pairs
    refine-jax train --config configs/edit_2511_8xh100.py --workdir runs/edit_2511 \
        --config.data.path=caches/DIGITS

A sample a GPU. By arithmetic, not measured: 4.8 GiB of frozen weights a GPU, 0.7 GiB of adapter and moments, 6 GiB of
blocks' inputs, about 3 GiB of one block's activations and its gathered weights. cuDNN's backward pass runs its forward
pass again, so nothing of attention is kept (remat "full").
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    return recipes.edit_lora("qwen-image-edit-2511", "", dict(fsdp=8), remat="full")
