"""Key table of diffusers' `QwenImageTransformer2DModel` -> `MMDiT` (scanned blocks)."""

from refine_jax.convert.mapping import Rule, Table


def _linear(key: str, path: str, stack: str | None = None) -> list[Rule]:
    return [
        Rule(f"{key}.weight", f"{path}/kernel", "transpose", stack=stack),
        Rule(f"{key}.bias", f"{path}/bias", stack=stack),
    ]


_BLOCK = "transformer_blocks.{i}"

TABLE: Table = [
    *_linear("img_in", "img_in"),
    *_linear("txt_in", "txt_in"),
    Rule("txt_norm.weight", "txt_norm/scale"),
    *_linear("time_text_embed.timestep_embedder.{layer:linear_1|linear_2}", "time_text_embed/{layer}"),
    *_linear(f"{_BLOCK}.{{stream:img|txt}}_mod.1", "blocks/{stream}_mod", stack="i"),
    *_linear(f"{_BLOCK}.{{stream:img|txt}}_mlp.net.0.proj", "blocks/{stream}_mlp/up", stack="i"),
    *_linear(f"{_BLOCK}.{{stream:img|txt}}_mlp.net.2", "blocks/{stream}_mlp/down", stack="i"),
    *_linear(
        f"{_BLOCK}.attn.{{layer:to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj|to_add_out}}",
        "blocks/attn/{layer}",
        stack="i",
    ),
    *_linear(f"{_BLOCK}.attn.to_out.0", "blocks/attn/to_out", stack="i"),
    Rule(
        f"{_BLOCK}.attn.{{norm:norm_q|norm_k|norm_added_q|norm_added_k}}.weight",
        "blocks/attn/{norm}/scale",
        stack="i",
    ),
    *_linear("norm_out.linear", "norm_out"),
    *_linear("proj_out", "proj_out"),
]
