"""Batch inference of Qwen-Image-Edit-2511, 8 steps a picture, on a v5e-4 slice (2 x 2 chips).

    refine-jax batch --config configs/batch_2511_v5e_4.py --manifest requests.jsonl --output-dir results

A picture a chip; weights are split over all of them and gathered block by block. Chips of 16
GiB hold them in 8 bits.
By the compiler: 10.7 of 16 GiB a chip, a batch takes 18.6 s or more, 4.6 s a picture (docs/pods.md).
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    return recipes.edit_batch("v5e:2x2", dict(fsdp=4), batch_size=4, quantize="int8")
