"""RvR's released recipe on BAGEL-7B-MoT, all weights, on a v5p-64 slice (32 chips, 4 x 4 x 2).

    refine-jax train --config configs/bagel_rvr_v5p_64.py --workdir runs/rvr --config.init_from=BAGEL-7B-MoT

A row of 40 000 tokens a chip, 1.3 M tokens a step; the data lie under data/ as released (docs/regenerate.md).
By the compiler: 54.4 of 95 GiB a chip (57 %), all that is trained is split, and gradients are scattered; a step takes
6.4 s or more, MFU 74 % at most (docs/pods.md).
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    return recipes.bagel_rvr("v5p:4x4x2", dict(data=4, fsdp=8), batch_size=32, rules=recipes.WHOLE)
