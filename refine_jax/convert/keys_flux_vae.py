"""Key table of the FLUX autoencoder: Black Forest Labs' `AutoEncoder` (`ae.safetensors`) -> `flux_vae.FluxVAE`.

diffusers' `AutoencoderKL` holds the same tensors under other names, which this table does not know.
"""

from refine_jax.convert.mapping import Rule, Table

_SIDE = "{side:encoder|decoder}"


def _conv(key: str, path: str, transform: str = "conv2d") -> list[Rule]:
    return [Rule(f"{key}.weight", f"{path}/kernel", transform), Rule(f"{key}.bias", f"{path}/bias")]


def _norm(key: str, path: str) -> list[Rule]:
    return [Rule(f"{key}.weight", f"{path}/scale"), Rule(f"{key}.bias", f"{path}/bias")]


def _res_block(key: str, path: str) -> list[Rule]:
    return [
        *_norm(f"{key}.norm{{n:1|2}}", f"{path}/norm{{n}}"),
        *_conv(f"{key}.{{conv:conv1|conv2|nin_shortcut}}", f"{path}/{{conv}}"),
    ]


FLUX_VAE_TABLE: Table = [
    *_conv(f"{_SIDE}.{{end:conv_in|conv_out}}", "{side}/{end}"),
    *_norm(f"{_SIDE}.norm_out", "{side}/norm_out"),
    *_res_block(f"{_SIDE}.mid.block_{{j}}", "{side}/mid_block_{j}"),
    *_norm(f"{_SIDE}.mid.attn_1.norm", "{side}/mid_attn_1/norm"),
    *_conv(f"{_SIDE}.mid.attn_1.{{dense:q|k|v|proj_out}}", "{side}/mid_attn_1/{dense}", "linear_from_conv1x1"),
    *_res_block("encoder.down.{i}.block.{j}", "encoder/down_{i}_block_{j}"),
    *_conv("encoder.down.{i}.downsample.conv", "encoder/down_{i}_downsample"),
    *_res_block("decoder.up.{i}.block.{j}", "decoder/up_{i}_block_{j}"),
    *_conv("decoder.up.{i}.upsample.conv", "decoder/up_{i}_upsample"),
]
