"""Reference keys of Qwen2.5-VL <-> the tree of `refine_jax.models.qwen_vl.QwenVL`.

Two layouts are in circulation: transformers >= 4.52 holds ``model.visual.*`` and ``model.language_model.*`` in memory,
while published files (and what `save_pretrained` writes from it) say ``visual.*`` and ``model.*``.
"""

from collections.abc import Iterable

from refine_jax.convert.mapping import Rule, Table, linear_from_conv3d
from refine_jax.models.qwen_vl_config import QwenVLConfig

# layout -> (prefix of the vision tower, prefix of the language model)
LAYOUTS = {"nested": ("model.visual", "model.language_model"), "flat": ("visual", "model")}


def layout_of(keys: Iterable[str]) -> str:
    """Which of `LAYOUTS` a state dict's keys follow."""
    return "nested" if any(key.startswith("model.language_model.") for key in keys) else "flat"


def vl_table(config: QwenVLConfig, layout: str = "nested") -> Table:
    """The table between `Qwen2_5_VLForConditionalGeneration` in a layout (see `layout_of`) and our parameters."""
    cfg = config.vision
    vision, text = LAYOUTS[layout]
    conv = linear_from_conv3d(cfg.in_channels, cfg.temporal_patch_size, cfg.patch_size, cfg.patch_size)
    block, layer = vision + ".blocks.{i}.", text + ".layers.{i}."
    ours_block, ours_layer = "visual/blocks/", "language_model/layers/"
    attention, mlp = "{proj:qkv|proj}", "{proj:gate_proj|up_proj|down_proj}"
    return [
        Rule(vision + ".patch_embed.proj.weight", "visual/patch_embed/kernel", conv),
        Rule(block + "norm{n:1|2}.weight", ours_block + "norm{n}/scale", stack="i"),
        Rule(f"{block}attn.{attention}.weight", ours_block + "attn/{proj}/kernel", "transpose", stack="i"),
        Rule(f"{block}attn.{attention}.bias", ours_block + "attn/{proj}/bias", stack="i"),
        Rule(f"{block}mlp.{mlp}.weight", ours_block + "mlp/{proj}/kernel", "transpose", stack="i"),
        Rule(f"{block}mlp.{mlp}.bias", ours_block + "mlp/{proj}/bias", stack="i"),
        Rule(vision + ".merger.ln_q.weight", "visual/merger/ln_q/scale"),
        Rule(vision + ".merger.mlp.0.weight", "visual/merger/fc1/kernel", "transpose"),
        Rule(vision + ".merger.mlp.0.bias", "visual/merger/fc1/bias"),
        Rule(vision + ".merger.mlp.2.weight", "visual/merger/fc2/kernel", "transpose"),
        Rule(vision + ".merger.mlp.2.bias", "visual/merger/fc2/bias"),
        Rule(text + ".embed_tokens.weight", "language_model/embed_tokens"),
        Rule(layer + "{n:input|post_attention}_layernorm.weight", ours_layer + "{n}_layernorm/scale", stack="i"),
        Rule(layer + "self_attn.{p:q|k|v|o}_proj.weight", ours_layer + "self_attn/{p}_proj/kernel", "transpose", "i"),
        Rule(layer + "self_attn.{p:q|k|v}_proj.bias", ours_layer + "self_attn/{p}_proj/bias", stack="i"),
        Rule(f"{layer}mlp.{mlp}.weight", ours_layer + "mlp/{proj}/kernel", "transpose", stack="i"),
        Rule(text + ".norm.weight", "language_model/norm/scale"),
        Rule("lm_head.weight", unused="conditioning reads the last hidden state; no token is ever predicted"),
    ]
