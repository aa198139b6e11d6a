"""Key table of BAGEL-7B-MoT and RvR-7B-MoT (`ema.safetensors`, `rvr.safetensors`) -> `models.bagel.Bagel`."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from refine_jax.convert.keys_siglip import siglip_table
from refine_jax.convert.mapping import Rule, Table
from refine_jax.errors import RefineError
from refine_jax.models.bagel import BagelConfig, sincos_axis

# The released files are bfloat16, half of whose last place is this at 1.
_TABLE_TOLERANCE = 2.0**-8

_MODEL = "language_model.model."
_LAYER = _MODEL + "layers.{i}."


def _linear(key: str, path: str, stack: str | None = None) -> list[Rule]:
    return [
        Rule(f"{key}.weight", f"{path}/kernel", "transpose", stack=stack),
        Rule(f"{key}.bias", f"{path}/bias", stack=stack),
    ]


def _stream(suffix: str, name: str) -> list[Rule]:
    """One set of a layer's weights: those without a suffix read, those with `_moe_gen` paint."""
    ours = f"decoder/layers/{name}/"
    return [
        *_linear(f"{_LAYER}self_attn.{{p:q|k|v}}_proj{suffix}", ours + "{p}_proj", "i"),
        Rule(f"{_LAYER}self_attn.o_proj{suffix}.weight", ours + "o_proj/kernel", "transpose", "i"),
        Rule(f"{_LAYER}self_attn.{{p:q|k}}_norm{suffix}.weight", ours + "{p}_norm/scale", stack="i"),
        Rule(f"{_LAYER}{{n:input|post_attention}}_layernorm{suffix}.weight", ours + "{n}_layernorm/scale", stack="i"),
        Rule(f"{_LAYER}mlp{suffix}.{{p:gate|up|down}}_proj.weight", ours + "mlp/{p}_proj/kernel", "transpose", "i"),
    ]


TABLE: Table = [
    Rule(_MODEL + "embed_tokens.weight", "embed_tokens"),
    *_stream("", "und"),
    *_stream("_moe_gen", "gen"),
    Rule(_MODEL + "norm.weight", "decoder/norm/scale"),
    Rule(_MODEL + "norm_moe_gen.weight", "decoder/norm_gen/scale"),
    Rule("language_model.lm_head.weight", "lm_head/kernel", "transpose"),
    *_linear("time_embedder.mlp.0", "time_embedder/fc1"),
    *_linear("time_embedder.mlp.2", "time_embedder/fc2"),
    *_linear("{way:vae2llm|llm2vae}", "{way}"),
    *_linear("connector.{p:fc1|fc2}", "connector/{p}"),
    *siglip_table("vit_model.vision_model.", "vit_model/"),
    Rule("{grid:latent|vit}_pos_embed.pos_embed", unused="a constant, computed; see check_position_tables"),
]


SIDES = {"latent_pos_embed.pos_embed": "max_latent_size", "vit_pos_embed.pos_embed": "vit_max_num_patch_per_side"}


def grid_sides(shapes: Mapping[str, Sequence[int]], what: str = "state dict") -> dict[str, int]:
    """What a file's position tables say of `BagelConfig.max_latent_size` and `vit_max_num_patch_per_side`.

    shapes: key -> shape. The authors' programs set both by hand and never read `config.json`, so the file decides; a
    field is absent where its table is. Raises RefineError for a table that is of no square grid.
    """
    sides = {}
    for key, name in SIDES.items():
        if key not in shapes:
            continue
        shape = tuple(shapes[key])
        side = math.isqrt(shape[0]) if len(shape) == 2 else 0
        if side < 1 or side**2 != shape[0]:
            has = f"has {shape[0]} rows" if len(shape) == 2 else f"has shape {list(shape)}"
            raise RefineError(f"{what}: {key} {has}, which is no square grid; use a released file")
        sides[name] = side
    return sides


def position_tables(config: BagelConfig) -> dict[str, np.ndarray]:
    """The frozen sine-cosine tables that a released file holds beside the parameters, by their keys.

    [side², hidden] float32 each. `mapping.to_reference` does not produce them: they are in no tree. A file that the
    authors' programs are to load needs them.
    """
    return {key: _grid(getattr(config, name), config.hidden_size) for key, name in SIDES.items()}


def _grid(side: int, features: int) -> np.ndarray:
    axis = sincos_axis(side, features // 2)
    shape = (side, side, features // 2)
    of_column, of_row = np.broadcast_to(axis, shape), np.broadcast_to(axis[:, None], shape)
    return np.concatenate([of_column, of_row], axis=-1).reshape(side**2, features)


def check_position_tables(tensors: Mapping[str, np.ndarray], config: BagelConfig, what: str = "state dict") -> None:
    """Raises RefineError unless the file's position tables are the ones that we compute, to bfloat16's precision.

    A file without them is accepted, as the authors' training accepts it.
    """
    for key, name in SIDES.items():
        if key not in tensors:
            continue
        side, given = getattr(config, name), tensors[key]
        if tuple(given.shape) != (side**2, config.hidden_size):  # before anything of that size is made
            raise RefineError(
                f"{what}: {key} has shape {list(given.shape)}, {name} {side} gives {[side**2, config.hidden_size]};"
                f" correct {name} (see grid_sides)"
            )
        given, table = np.asarray(given), _grid(side, config.hidden_size)
        error = float(np.abs(given.astype(np.float32) - table).max())
        if not error <= _TABLE_TOLERANCE:
            raise RefineError(
                f"{what}: {key} is off the sine-cosine table by {error:.3g}; it is not computed from positions as"
                " BAGEL's is, use a released file"
            )
