"""The shipped configurations' shared pieces: the training recipes of RefineAnything (arXiv 2604.06870) on
Qwen-Image-Edit, and of RvR (arXiv 2604.25636) on BAGEL.

A file of configs/ is one call, with what differs and a docstring that is the experiment's record.
"""

import ml_collections

from refine_jax import configuration

# (height, width) of the focus crop: about 1024² pixels, sides multiples of 64 so that latent tokens are even in number.
BUCKETS = ((1024, 1024), (896, 1152), (1152, 896), (832, 1216), (1216, 832), (768, 1344), (1344, 768))
# A program is compiled for every pair of a crop's bucket and a reference's.
REFERENCE_BUCKETS = ((1024, 1024), (832, 1216), (1216, 832))
# Tokens of the chat template with three pictures of 384² pixels, and room for the instruction; 64 are dropped.
TEXT_LENGTH = 1088
CHECKPOINTS = {
    "qwen-image-edit-2509": "Qwen/Qwen-Image-Edit-2509",
    "qwen-image-edit-2511": "Qwen/Qwen-Image-Edit-2511",
}
# Queries, keys, values and output of the image stream: to_q, to_k, to_v, to_out.0 of the reference.
LORA_TARGETS = "blocks/attn/(to_q|to_k|to_v|to_out)"


def adamw(**changes: object) -> dict[str, object]:
    """A `config.optimizer`: constant AdamW without warm-up, clipped at a norm of 1."""
    common = dict(warmup=0, decay=0.0, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01, clip=1.0, accumulate=1)
    return dict(name="adamw", **{**common, **changes})


def muon(**changes: object) -> dict[str, object]:
    """A `config.optimizer` of the models that are trained from scratch on a CPU.

    Muon for what mixes features token by token; a modulation acts on one vector a sample and is left to AdamW.
    """
    common = dict(learning_rate=4e-3, adam_scale=0.4, decay=0.35, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.01)
    rules = dict(clip=1.0, muon_steps=4, muon_exclude="mod|norm_out|time|embed")
    return dict(name="muon", **{**common, **rules, **changes})


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
    config.data = dict(
        source="cache",
        path="caches",
        buckets=BUCKETS,
        reference_buckets=REFERENCE_BUCKETS,
        text_length=TEXT_LENGTH,
        workers=4,
    )
    config.optimizer = adamw(learning_rate=2e-4)
    config.mesh = mesh
    config.rules = {}
    return _changed(config, changes)


def _changed(config: ml_collections.ConfigDict, changes: dict[str, object]) -> ml_collections.ConfigDict:
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(config.get(name), ml_collections.ConfigDict):
            config[name].update(value)
        else:
            with config.ignore_type():
                config[name] = value
    return config


# How often a sample of a task is drawn in RvR's training, and (height, width) of what is painted there: sides from 512
# to 1024, a picture goes to the nearest.
RVR_MIX = dict(rvr=2.0, understanding=1.0, text_to_image=1.0)
RVR_BUCKETS = (
    (1024, 1024), (768, 1024), (1024, 768), (576, 1024), (1024, 576), (512, 1024), (1024, 512),
    (768, 768), (512, 512), (512, 704), (704, 512),
)  # fmt: skip


def bagel_rvr(topology: str, mesh: dict[str, int], **changes: object) -> ml_collections.ConfigDict:
    """RvR's released recipe on BAGEL-7B-MoT: all weights but the VAE's, rows of 40 000 tokens, MSE + 0.25 CE.

    topology, mesh, changes: as for `edit_lora`. A row is a rank's packed sequence of the released script, and
    `batch_size` their number. `config.lora` trains an adapter instead.
    """
    config = ml_collections.ConfigDict()
    config.objective = "bagel"
    config.variant = "bagel-7b-mot"
    config.topology = topology
    config.seed = 0
    config.steps = 10_000
    config.batch_size = 64
    config.log_every = 10
    config.save_every = 500
    config.keep = 3
    config.ema_decay = 0.9999
    config.ema_ramp = False
    config.init_from = "ByteDance-Seed/BAGEL-7B-MoT"
    config.weights = ""
    config.conditioning = ""
    config.vae_sides = (1024, 512)
    config.vit_sides = (980, 378)
    config.dtype = "bfloat16"
    config.remat = "attention"
    config.lora = None
    config.mse_weight = 1.0
    config.ce_weight = 0.25
    config.sigma = dict(distribution="logit_normal", shift=4.0)
    # As the released data lie in one folder: paths in the tables start from it.
    source = dict(root="data", max_corrupt=0.01)
    config.data = dict(
        sources=dict(
            rvr=dict(format="parquet", task="rvr", path="data/rvr/data", weight=RVR_MIX["rvr"], **source),
            understanding=dict(
                format="jsonl",
                task="understanding",
                path="data/vlm/llava_ov_si.jsonl",
                weight=RVR_MIX["understanding"],
                root="data/vlm/images",
                max_corrupt=0.01,
            ),
            text_to_image=dict(
                format="parquet",
                task="text_to_image",
                path="data/blip3o60k/data",
                weight=RVR_MIX["text_to_image"],
                **source,
            ),
        ),
        buckets=RVR_BUCKETS,
        tokens=40_960,
        text_length=4096,
        answer_length=1024,
        text_dropout=0.1,
        max_corrupt=0.01,
        workers=8,
    )
    config.optimizer = adamw(learning_rate=1e-4, warmup=2500, b2=0.95, eps=1e-15, weight_decay=0.0)
    config.mesh = mesh
    config.rules = {}
    return _changed(config, changes)


def tiny_vae(**changes: object) -> ml_collections.ConfigDict:
    """A VAE of Qwen-Image's architecture for a tiny model: ÷4, 16 latent channels. changes: as for `edit_lora`."""
    config = ml_collections.ConfigDict()
    config.objective = "vae"
    config.seed = 0
    config.steps = 1000
    config.batch_size = 8
    config.log_every = 20
    config.save_every = 100
    config.keep = 2
    config.ema_decay = 0.998
    config.vae = dict(
        base_dim=16,
        z_dim=16,
        dim_mult=(1, 2, 4),
        num_res_blocks=1,
        temperal_downsample=(False, True),
        latents_mean=(0.0,) * 16,
        latents_std=(1.0,) * 16,
    )
    config.edge = 0.1
    config.kl = 4e-3
    config.statistics_batches = 40
    config.data = dict(source="synth", size=64, workers=1)
    config.optimizer = muon(
        learning_rate=3e-3,
        adam_scale=1.0,
        warmup=50,
        decay=0.3,
        weight_decay=0.0,
        muon_steps=5,
        muon_exclude="^$",
    )
    config.mesh = dict(data=-1)
    config.rules = {}
    return _changed(config, changes)


def small_world(**changes: object) -> ml_collections.ConfigDict:
    """RvR on a tiny MMDiT in the small world (`data.world`): text to image, from scratch but for its VAE.

    A VAE of configs/tiny_world_vae.py, an encoder that looks at 100 patches of a picture, a tokenizer that knows the
    world's words, and an MMDiT of 5 blocks of 128 features. changes: as for `edit_lora`.
    """
    config = ml_collections.ConfigDict()
    config.objective = "refine"
    config.seed = 0
    config.steps = 6000
    config.batch_size = 64
    config.log_every = 20
    config.save_every = 250
    config.keep = 2
    config.ema_decay = 0.999
    config.init_from = ""
    config.vae_from = "runs/tiny_world_vae/model"
    config.tokenizer = dict(merges=512)
    config.lora = None
    config.train_encoder = True
    config.aligned_heads = (0, 0)  # two of four heads start with the neighbours
    config.alignment = dict(block=2, weight=0.2)  # which shape, which letter is where
    config.dtype = "float32"
    config.instruction_dropout = 0.1

    config.model = dict(
        mmdit=dict(
            patch_size=1,  # of 8 x 8 pixels: larger ones take several times the steps
            in_channels=16,
            out_channels=16,
            num_layers=5,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=128,
            axes_dims_rope=(4, 14, 14),
            zero_cond_t=False,
            scan=False,  # a fifth faster on a CPU; the exported model is scanned
        ),
        vl=dict(
            vision=dict(
                depth=3,
                hidden_size=96,
                intermediate_size=192,
                num_heads=3,
                out_hidden_size=128,
                window_size=112,
                fullatt_block_indexes=(0, 1, 2),
            ),
            text=dict(
                vocab_size=776,
                hidden_size=128,
                intermediate_size=384,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                rope_theta=10000.0,
                mrope_section=(4, 6, 6),
            ),
            image_token_id=774,
        ),
        scheduler=dict(
            use_dynamic_shifting=True,
            base_shift=1.0986122886681098,  # σ shifted by 3
            max_shift=1.0986122886681098,
            max_image_seq_len=8192,
        ),
        prompt=dict(
            template="<|im_start|>{}<|im_end|>",
            picture="<|vision_start|><|image_pad|><|vision_end|>",
            drop_tokens=1,
            max_tokens=1024,
        ),
        conditioning="rvr",
        vae_area=64 * 64,
        condition_area=112 * 112,
        steps=20,
        true_cfg_scale=3.0,
        negative_prompt=" ",
    )
    config.sigma = dict(distribution="uniform", shift=3.0)
    config.data = dict(
        source="world",
        buckets=((64, 64),),
        weights=(1.0,),
        text_to_image=1.0,
        text_length=26,
        workers=1,
    )
    config.optimizer = muon(warmup=100)
    config.optimizer.muon_exclude += "|alignment"
    config.mesh = dict(data=-1)
    config.rules = {}
    return _changed(config, changes)


# Keys of `configuration.OPTIONAL` that say nothing to an objective.
_FLOW = ("aligned_heads", "alignment", "condition_area", "prompt", "scan", "vae_area")
_PAIRS = ("margin_jitter", "pairs", "path", "reference_buckets", "reference_dropout", "reference_share")
_UNREAD = {"bagel": {*_FLOW, *(f"data.{name}" for name in (*_PAIRS, "text_to_image", "weights"))}}
_UNREAD["vae"] = _UNREAD["bagel"] | {
    *("conditioning", "lora", "lora.init_from", "model", "quantize", "remat", "data.max_corrupt", "data.validation")
}


def keys(objective: str) -> set[str]:
    """What a training of `objective` may say, keys of `data` and `optimizer` as "data.path"; empty for one unknown."""
    kinds = dict(refine=(edit_lora("", "", {}), small_world()), bagel=(bagel_rvr("", {}),), vae=(tiny_vae(),))
    if objective not in kinds:
        return set()
    optional = {name for name in configuration.OPTIONAL if name not in _UNREAD.get(objective, ())}
    return {name for config in kinds[objective] for name in named(config)} | optional


def named(config: ml_collections.ConfigDict) -> list[str]:
    """The keys of a configuration as `keys` gives them."""
    groups = [name for name in ("data", "optimizer") if name in config]
    return [*config, *(f"{group}.{name}" for group in groups for name in config[group])]


# Weights lie on all chips of a slice, also on those that share a sample: no chip keeps what another has.
SPREAD = dict(embed=("fsdp", "context"), lora_embed=("fsdp", "context"), lora_rank=("fsdp", "context"))
# Where an adapter's gradients are large: the rank over `fsdp` alone, for they are scattered over one mesh axis only.
SCATTERED = dict(lora_embed=None, lora_rank="fsdp")
# For full fine-tuning: weights, moments and gradients lie on all chips although the batch is split over two mesh axes,
# rows over `fsdp`, columns over `data`. On a torus of three axes the compiler has no reduce-scatter over all of them.
WHOLE = dict(heads="data", mlp="data", time="data")


def batch(**changes: object) -> ml_collections.ConfigDict:
    """What decides the results of `refine-jax batch`, and how they are computed.

    model, regenerator: of refine requests, and of regenerate and generate requests; lora: adapters of each, files or
    (file, weight), applied live or merged. scheduler, dtype, vae_area, condition_area: as `Refiner.load` takes them; ""
    and 0: the model's own. batch_size: rows of every compiled program. aspects: of focus crops (`refine.ASPECTS`; none:
    the released geometry). side_step: of the sides of regenerated pictures (`Regenerator.load`; 0: the model's own).
    mesh: axes of one copy of the model, over as few processes as hold it; copies share the work. changes: other values
    of top-level keys; dicts are merged.
    """
    config = ml_collections.ConfigDict()
    config.model = "tiny"
    config.regenerator = "tiny"
    config.lora = dict(model=(), regenerator=())
    config.merge_lora = False
    config.scheduler = ""
    config.dtype = ""
    config.quantize = ""
    config.vae_area = 0
    config.condition_area = 0
    config.batch_size = 4
    config.aspects = tuple(2 ** (k / 2) for k in range(-6, 7))
    config.side_step = 0
    config.mesh = dict()
    config.rules = dict()
    return _changed(config, changes)


def edit_batch(topology: str, mesh: dict[str, int], **changes: object) -> ml_collections.ConfigDict:
    """`batch` of Qwen-Image-Edit-2511 with RefineAnything's adapter and the Lightning adapter of 8 steps, merged.

    topology: the TPU that `tools/aot.py` compiles for; mesh, changes: as for `batch`.
    """
    adapters = ("adapters/refineanything.safetensors", "adapters/Qwen-Image-Edit-2511-Lightning-8steps.safetensors")
    config = batch(
        model=CHECKPOINTS["qwen-image-edit-2511"],
        lora=dict(model=adapters),
        merge_lora=True,
        dtype="bfloat16",
        mesh=mesh,
        variant="qwen-image-edit-2511",
        topology=topology,
    )
    return _changed(config, changes)
