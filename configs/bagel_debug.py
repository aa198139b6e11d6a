"""BAGEL's training at toy sizes, on up to two devices: packed rows of all three tasks of the small world.

    refine-jax train --config configs/bagel_debug.py --workdir runs/bagel_debug

Starts at random, the VAE too: it shows that the machinery runs, and nothing is to be learned from it. 10 steps take
about a minute on two CPU cores, most of it compiling. More devices need a larger batch (--config.batch_size=8).
"""

import ml_collections

from refine_jax import recipes


def get_config() -> ml_collections.ConfigDict:
    """The resolved configuration."""
    config = recipes.bagel_rvr(
        "",
        dict(fsdp=-1),
        variant="",
        steps=10,
        batch_size=2,
        log_every=2,
        save_every=5,
        init_from="",
        dtype="float32",
        ema_decay=0.99,
        vae_sides=(64, 32),
        vit_sides=(64, 32),
    )
    config.model = dict(
        bagel=dict(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=264,
            latent_channels=4,
            max_latent_size=16,
            vit_max_num_patch_per_side=16,
            vit=dict(
                hidden_size=32,
                intermediate_size=64,
                num_layers=2,
                num_heads=2,
                patch_size=8,
                image_size=128,
            ),
        ),
        vae=dict(ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=4, num_groups=4),
    )
    config.data = dict(
        sources={
            task: dict(format="world", task=task, count=2000, seed=seed, side=64, weight=weight)
            for seed, (task, weight) in enumerate(recipes.RVR_MIX.items())
        },
        buckets=((64, 64),),
        tokens=768,
        text_length=512,
        answer_length=256,
        text_dropout=0.1,
        max_corrupt=0.01,
        workers=0,
    )
    config.optimizer.warmup = 2
    return config
