"""Batch inference of Qwen-Image-Edit-2511, 8 steps a picture, on a v6e-8 slice (2 x 4 chips).

    refine-jax batch --config configs/batch_2511_v6e_8.py --manifest requests.jsonl --output-dir results

A picture a chip; weights are split over all of them and gathered block by block.
By the compiler: 10.1 of 32 GiB a chip, a batch takes 3.99 s or more, 2.0 pictures a second (docs/pods.md).
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    return recipes.edit_batch("v6e:2x4", dict(fsdp=8), batch_size=8)
