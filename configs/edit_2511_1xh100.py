r"""The paper's LoRA on Qwen-Image-Edit-2511 (what the released adapter is for), on 1 x H100-80GB.

    refine-jax data cache --config configs/edit_2511_1xh100.py --output caches \
        --config.data.source=records --config.data.path=pairs
    refine-jax train --config configs/edit_2511_1xh100.py --workdir runs/edit_2511 \
        --config.data.path=caches/DIGITS

Batch 8 as 8 parts of one sample. By arithmetic, not measured: 38 GiB of frozen weights in bfloat16, 5.6 GiB of adapter,
moments and gradients in float32, 6 GiB of blocks' inputs, about 3 GiB of one block's activations. On a GPU of 48 GB add
`--config.quantize=int8`: 19 GiB of frozen weights.
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    config = recipes.edit_lora("qwen-image-edit-2511", "", dict(fsdp=1), remat="full")
    config.optimizer.accumulate = 8
    return config
