"""Key table of the Qwen-Image VAE: diffusers `AutoencoderKLQwenImage` -> `models.qwen_vae.QwenVAE`.

Causal 3-D kernels keep their last temporal slice, the only one that meets a still image.
"""

from refine_jax.convert.mapping import Rule, drop_trailing_ones

_SIDE = "{side:encoder|decoder}"


def _conv(key: str, path: str, transform: str = "conv_last_frame") -> list[Rule]:
    return [Rule(f"{key}.weight", f"{path}/kernel", transform), Rule(f"{key}.bias", f"{path}/bias")]


def _res_block(key: str, path: str) -> list[Rule]:
    return [
        Rule(f"{key}.norm{{n:1|2}}.gamma", f"{path}/norm{{n}}/gamma", drop_trailing_ones(3)),
        *_conv(f"{key}.conv{{n:1|2}}", f"{path}/conv{{n}}"),
        *_conv(f"{key}.conv_shortcut", f"{path}/conv_shortcut", "conv_only_frame"),
    ]


def _attention(key: str, path: str) -> list[Rule]:
    return [
        Rule(f"{key}.norm.gamma", f"{path}/norm/gamma", drop_trailing_ones(2)),
        *_conv(f"{key}.{{dense:to_qkv|proj}}", f"{path}/{{dense}}", "linear_from_conv1x1"),
    ]


VAE_TABLE: list[Rule] = [
    *_conv("{name:quant_conv|post_quant_conv}", "{name}", "conv_only_frame"),
    *_conv(f"{_SIDE}.{{end:conv_in|conv_out}}", "{side}/{end}"),
    Rule(f"{_SIDE}.norm_out.gamma", "{side}/norm_out/gamma", drop_trailing_ones(3)),
    *_res_block(f"{_SIDE}.mid_block.resnets.{{j}}", "{side}/mid_block/resnets_{j}"),
    *_attention(f"{_SIDE}.mid_block.attentions.{{j}}", "{side}/mid_block/attentions_{j}"),
    *_res_block("encoder.down_blocks.{i}", "encoder/down_blocks_{i}"),
    *_attention("encoder.down_blocks.{i}", "encoder/down_blocks_{i}"),
    *_conv("encoder.down_blocks.{i}.resample.1", "encoder/down_blocks_{i}", "conv2d"),
    *_res_block("decoder.up_blocks.{i}.resnets.{j}", "decoder/up_blocks_{i}_resnets_{j}"),
    *_conv("decoder.up_blocks.{i}.upsamplers.0.resample.1", "decoder/up_blocks_{i}_upsample", "conv2d"),
    Rule(
        "{place:encoder.down_blocks|decoder.up_blocks}.{where:.*}time_conv.{part:weight|bias}",
        unused="temporal resampling starts at the second frame",
    ),
]
