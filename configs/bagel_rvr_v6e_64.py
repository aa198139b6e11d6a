"""RvR's released recipe on BAGEL-7B-MoT, all weights, on a v6e-64 slice (8 x 8 chips).

    refine-jax train --config configs/bagel_rvr_v6e_64.py --workdir runs/rvr --config.init_from=BAGEL-7B-MoT

A row of 40 000 tokens on two chips, 1.3 M tokens a step; the data lie under data/ as released (docs/regenerate.md).
By the compiler: 21.9 of 32 GiB a chip (68 %), all that is trained is split, and gradients are scattered; a step takes
1.73 s or more, MFU 68 % at most (docs/pods.md).
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    return recipes.bagel_rvr(
        "v6e:8x8",
        dict(data=8, fsdp=4, context=2),
        batch_size=32,
        remat="full",
        rules=recipes.WHOLE | recipes.SPREAD,
    )
