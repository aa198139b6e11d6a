"""The shipped configurations' shared pieces: RefineAnything's training recipe (arXiv 2604.06870) on Qwen-Image-Edit.

A file of configs/ is one call, with what differs and a docstring that is the experiment's record.
"""

import ml_collections

# (height, width) of the focus crop: about 1024² pixels, sides multiples of 64 so that latent tokens are even in number.
BUCKETS = ((1024, 1024), (896, 1152), (1152, 896), (832, 1216), (1216, 832), (768, 1344), (1344, 768))
# Tokens of the chat template with three pictures of 384² pixels, and room for the instruction; 64 are dropped.
TEXT_LENGTH = 1088
CHECKPOINTS = {
    "qwen-image-edit-2509": "Qwen/Qwen-Image-Edit-2509",
    "qwen-image-edit-2511": "Qwen/Qwen-Image-Edit-2511",
}
# Queries, keys, values and output of the image stream: to_q, to_k, to_v, to_out.0 of the reference.
LORA_TARGETS = "blocks/attn/(to_q|to_k|to_v|to_out)"


def edit_lora(variant: str, topology: str, mesh: dict[str, int], **changes: object) -> ml_collections.ConfigDict:
    """The paper's LoRA: rank and alpha 256, AdamW 2e-4, constant, bfloat16, batch 8, 20 000 steps, α = 9 on the band.

    variant: "qwen-image-edit-2509" | "qwen-image-edit-2511". topology: the TPU that `tools/aot.py` compiles for, ""
    for GPUs. changes: other values of top-level keys; dicts are merged.
    """
    config = ml_collections.ConfigDict()
    config.objective = "refine"
    config.variant = variant
    config.topology = topology
    config.seed = 0
    config.steps = 20_000
    config.batch_size = 8
    config.log_every = 20
    config.save_every = 500
    config.keep = 3
    config.ema_decay = 0.0  # the paper exports the weights themselves
    config.init_from = CHECKPOINTS.get(variant, "")
    config.train_encoder = False
    config.instruction_dropout = 0.0
    config.dtype = "bfloat16"
    config.remat = "attention"
    config.lora = dict(rank=256, alpha=256.0, targets=LORA_TARGETS)
    config.sigma = dict(distribution="uniform", shift=1.0)
    config.boundary = dict(r_out=16, r_in=16, alpha=9.0)
    # Latents and conditioning tokens made once: the encoder (8 B parameters) and the VAE need no memory, no time and no
    # mesh axis here.
    config.data = dict(source="cache", path="caches", buckets=BUCKETS, text_length=TEXT_LENGTH, workers=4)
    config.optimizer = dict(
        name="adamw",
        learning_rate=2e-4,
        warmup=0,
        decay=0.0,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.01,
        clip=1.0,
        accumulate=1,
    )
    config.mesh = mesh
    config.rules = {}
    for name, value in changes.items():
        if isinstance(value, dict) and name in config:
            config[name].update(value)
        else:
            with config.ignore_type():
                config[name] = value
    return config


# Weights lie on all chips of a slice, also on those that share a sample: no chip keeps what another has.
SPREAD = dict(embed=("fsdp", "context"), lora_rank=("fsdp", "context"))
# For full fine-tuning: weights, moments and gradients lie on all chips although the batch is split over two mesh axes,
# rows over `fsdp`, columns over `data`. On a torus of three axes the compiler has no reduce-scatter over all of them.
WHOLE = dict(heads="data", mlp="data", time="data")
