"""Batch inference of Qwen-Image-Edit-2511, 8 steps a picture, on a v5p-8 slice (2 x 2 chips, 8 cores).

    refine-jax batch --config configs/batch_2511_v5p_8.py --manifest requests.jsonl --output-dir results

A picture a chip; weights are split over all of them and gathered block by block.
By the compiler: 16.8 of 95 GiB a chip, a batch takes 7.97 s or more, 0.5 pictures a second (docs/pods.md).
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    return recipes.edit_batch("v5p:2x2x1", dict(fsdp=4), batch_size=4)
