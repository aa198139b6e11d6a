"""Batch inference of Qwen-Image-Edit-2511, 8 steps a picture, on one H100 of 80 GB.

    refine-jax batch --config configs/batch_2511_1xh100.py --manifest requests.jsonl --output-dir results

A picture at a time, in bfloat16: weights take 52.6 GiB (docs/speed.md), what is left serves the activations. With
--quantize int8 they take 27 GiB. Of several GPUs it is to see one (CUDA_VISIBLE_DEVICES=0). No GPU has run it yet.
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    return recipes.edit_batch("", {}, batch_size=1)
