"""RvR on BAGEL-7B-MoT by a LoRA of rank 64 on both experts, on 1 x H100-80GB.

    refine-jax train --config configs/bagel_rvr_lora_1xh100.py --workdir runs/rvr_lora --config.init_from=BAGEL-7B-MoT

As bagel_rvr_lora_v6e_16.py, in rows of 16 384 tokens, a pair at 1024 x 1024 or more smaller ones: cuDNN takes the masks
of such rows. Batch 8 as 8 parts of one row. By arithmetic, not measured: 27 GiB of frozen weights in bfloat16, 5 GiB of
adapter, moments and gradients in float32, 3 GiB of layers' inputs, about 5 GiB of one layer's activations. On a
GPU of 48 GB add `--config.quantize=int8`: some 15 GiB of frozen weights.
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    config = recipes.bagel_rvr(
        "",
        dict(fsdp=1),
        batch_size=8,
        remat="full",
        ema_decay=0.0,
        lora=dict(rank=64, alpha=64.0, targets="decoder/layers/(und|gen)/(mlp/)?(q|k|v|o|gate|up|down)_proj"),
        data=dict(tokens=16_384, text_length=2048),
    )
    config.data.sources.understanding.weight = 0.0
    config.optimizer.accumulate = 8
    return config
