"""Key table of BAGEL's SigLIP tower -> `models.siglip.Siglip` (scanned blocks)."""

import numpy as np

from refine_jax.convert.mapping import Rule, Table, Transform


def linear_from_conv2d(channels: int, size: int) -> Transform:
    """Patch convolution [out, channels, size, size] -> dense kernel [size·size·channels, out], channels last."""
    shape = (channels, size, size)

    def forward(w: np.ndarray) -> np.ndarray:
        if w.shape[1:] != shape:
            raise ValueError(f"expected [out, {', '.join(map(str, shape))}]")
        return w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0])

    def inverse(kernel: np.ndarray) -> np.ndarray:
        return kernel.reshape(size, size, channels, -1).transpose(3, 2, 0, 1)

    return Transform("linear_from_conv2d", forward, inverse)


def siglip_table(
    prefix: str = "vit_model.vision_model.", path: str = "", patch: str | Transform = "transpose"
) -> Table:
    """The table between a SigLIP vision model's state dict and our parameters.

    prefix: what stands before its keys; the default is that of BAGEL's and RvR's released files. path: what stands
    before the leaves' paths ("vit/"). patch: how the patch embedding is stored: "transpose" where it is a linear layer,
    as in those files, `linear_from_conv2d` where it is the convolution of a published SigLIP.
    """
    layer, block = prefix + "encoder.layers.{i}.", path + "blocks/"
    attention, mlp = "self_attn.{p:q_proj|k_proj|v_proj|out_proj}", "mlp.{p:fc1|fc2}"
    return [
        Rule(prefix + "embeddings.patch_embedding.weight", path + "patch_embedding/kernel", patch),
        Rule(prefix + "embeddings.patch_embedding.bias", path + "patch_embedding/bias"),
        Rule(prefix + "embeddings.position_embedding.weight", path + "position_embedding"),
        Rule(layer + "layer_norm{n:1|2}.weight", block + "layer_norm{n}/scale", stack="i"),
        Rule(layer + "layer_norm{n:1|2}.bias", block + "layer_norm{n}/bias", stack="i"),
        Rule(f"{layer}{attention}.weight", block + "self_attn/{p}/kernel", "transpose", stack="i"),
        Rule(f"{layer}{attention}.bias", block + "self_attn/{p}/bias", stack="i"),
        Rule(f"{layer}{mlp}.weight", block + "mlp/{p}/kernel", "transpose", stack="i"),
        Rule(f"{layer}{mlp}.bias", block + "mlp/{p}/bias", stack="i"),
        Rule(prefix + "post_layernorm.weight", path + "post_layernorm/scale"),
        Rule(prefix + "post_layernorm.bias", path + "post_layernorm/bias"),
        Rule(prefix + "head.{rest:.*}", unused="the tower ends at its features; nothing is pooled"),
    ]


SIGLIP_TABLE: Table = siglip_table()
