"""RvR's released recipe on BAGEL-7B-MoT, all weights, on four machines of eight H100s.

    refine-jax train --config configs/bagel_rvr_32xh100.py --workdir runs/rvr --config.init_from=BAGEL-7B-MoT

A row of 40 000 tokens a GPU, 1.3 M tokens a step; the data lie under data/ as released (docs/regenerate.md). Attention
of such rows is blocks of plain JAX; cuDNN takes rows of up to 16 384 tokens (`--config.data.tokens=16384`). Not
compiled ahead: there is no compiler for a GPU without one.
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    return recipes.bagel_rvr("", dict(fsdp=32), batch_size=32)
