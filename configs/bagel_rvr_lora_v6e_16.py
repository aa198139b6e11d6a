"""RvR on BAGEL-7B-MoT by a LoRA of rank 64 on both experts, on a v6e-16 slice (4 x 4 chips).

    refine-jax train --config configs/bagel_rvr_lora_v6e_16.py --workdir runs/rvr_lora --config.init_from=BAGEL-7B-MoT

The released recipe but for what is trained: queries, keys, values, output and the feed-forward layers of every decoder
layer, without understanding data: answers are the base model's without the adapter. The file works with
`Regenerator.load(…, lora=…)`. By the compiler: 15.4 of 32 GiB a chip (48 %), weights, moments and gradients are
split, MFU 62 % at most.
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    config = recipes.bagel_rvr(
        "v6e:4x4",
        dict(fsdp=8, context=2),
        batch_size=8,
        remat="full",
        rules=recipes.SPREAD | recipes.SCATTERED,
        ema_decay=0.0,
        lora=dict(rank=64, alpha=64.0, targets="decoder/layers/(und|gen)/(mlp/)?(q|k|v|o|gate|up|down)_proj"),
    )
    config.data.sources.understanding.weight = 0.0
    return config
