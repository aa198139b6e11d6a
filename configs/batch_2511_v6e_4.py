"""Batch inference of Qwen-Image-Edit-2511, 8 steps a picture, on a v6e-4 slice (2 x 2 chips).

    refine-jax batch --config configs/batch_2511_v6e_4.py --manifest requests.jsonl --output-dir results

A picture a chip; weights are split over all of them and gathered block by block.
By the compiler: 16.6 of 32 GiB a chip, a batch takes 3.99 s or more, 1.0 picture a second (docs/pods.md).
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    return recipes.edit_batch("v6e:2x2", dict(fsdp=4), batch_size=4)
