"""BAGEL: a decoder of Mixture-of-Transformers layers that reads text and images and paints (arXiv 2505.14683).

RvR (arXiv 2604.25636) trains this network. As in an MMDiT there are two streams of tokens, each with its own weights in
every layer: "und" (text, ViT features, the marks around images) and "gen" (latents of the VAE, noisy or clean); they
meet in one attention. Where a token stands in its sequence, and so what it may see, is not where it stands in an array:
`Segments` says it, and one rule (`attention_mask`) covers prompts, packed training sequences and cached prefixes.
Norms, rotary embedding, time embedding and softmax are float32 inside whatever the compute dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from refine_jax.errors import RefineError
from refine_jax.models import quantize
from refine_jax.models.attention import attention
from refine_jax.models.layers import (
    Dense,
    RMSNorm,
    apply_rotary,
    constrain,
    remat_policy,
    rotary_angles,
    timestep_embedding,
)
from refine_jax.models.qwen_vl import GatedMLP
from refine_jax.models.segments import SegmentMask, Segments, attention_mask, join, segment, segment_mask
from refine_jax.models.siglip import Siglip, SiglipConfig

Array = jax.Array

TIME_CHANNELS = 256
_TABLE_BASE = 10000.0


# -------------------------------------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class BagelConfig:
    """The decoder by the names of `llm_config.json`, then of `config.json`; defaults are BAGEL-7B-MoT's (and RvR's).

    latent_patch_size: latents a side of a token; latent_channels: of the VAE; max_latent_size and
    vit_max_num_patch_per_side: sides of the two position grids. param_dtype: "float32", "bfloat16", or "int8": the
    matrices of the layers in 8 bits (`quantize`), the rest as `dtype`. remat: what a layer keeps for its gradient
    (`layers.remat_policy`); scan: layers in one `nn.scan` over stacked parameters (`layers`), otherwise one module a
    layer (`layers_0`, …). `vit` has its own dtype, remat and scan.
    """

    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    vocab_size: int = 152064
    rope_theta: float = 1000000.0
    rms_norm_eps: float = 1e-6
    latent_patch_size: int = 2
    latent_channels: int = 16
    max_latent_size: int = 64
    vit_max_num_patch_per_side: int = 70
    vit: SiglipConfig = field(default_factory=SiglipConfig)
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str | None = None
    scan: bool = True
    attention_impl: str = "auto"

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise RefineError(
                f"llm_config: hidden_size {self.hidden_size}, num_attention_heads {self.num_attention_heads},"
                f" num_key_value_heads {self.num_key_value_heads}: each must be a multiple of the next"
            )
        if self.hidden_size % 4 or self.head_dim % 2:
            raise RefineError(
                f"llm_config.hidden_size {self.hidden_size}: give a multiple of 4 whose heads have an even size"
            )
        if self.remat is not None:
            remat_policy(self.remat)

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def floating(self) -> str:
        """The dtype of the parameters that are never quantised."""
        return quantize.floating(self.param_dtype, self.dtype)

    @property
    def latent_dim(self) -> int:
        """Features of one latent token: latent_patch_size² · latent_channels."""
        return self.latent_patch_size**2 * self.latent_channels

    @classmethod
    def from_dict(
        cls, llm: Mapping[str, Any], vit: Mapping[str, Any], model: Mapping[str, Any] | None = None, **overrides: Any
    ) -> "BagelConfig":
        """From the contents of a folder's `llm_config.json`, `vit_config.json` and, where it has one, `config.json`.

        `overrides` set what the files do not know; dtype, param_dtype, remat and scan go to the tower too. What
        `config.json` does not say is as in the authors' programs, which never read it. Raises RefineError for a field
        that is missing, or set to something that this network does not have.
        """
        model = dict(model or {})
        rope = dict(llm.get("rope_parameters") or llm.get("rope_scaling") or {})
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        layer = llm.get("layer_module", "Qwen2MoTDecoderLayer")
        for name, value, expected in (
            # The released file may still hold the language model's own layer; the authors' programs overwrite it.
            ("llm_config.layer_module", layer, ("Qwen2MoTDecoderLayer", "Qwen2DecoderLayer")),
            ("llm_config.hidden_act", llm.get("hidden_act", "silu"), ("silu",)),
            ("llm_config.rope_scaling", rope_type, ("default",)),
            ("llm_config.use_sliding_window", bool(llm.get("use_sliding_window", False)), (False,)),
            ("config.connector_act", model.get("connector_act", "gelu_pytorch_tanh"), ("gelu_pytorch_tanh",)),
            ("config.interpolate_pos", bool(model.get("interpolate_pos", False)), (False,)),
            ("config.visual_gen", bool(model.get("visual_gen", True)), (True,)),
            ("config.visual_und", bool(model.get("visual_und", True)), (True,)),
        ):
            if value not in expected:
                raise RefineError(f"{name} {value!r} is not supported; use a BAGEL-7B-MoT or RvR-7B-MoT folder")
        llm = {"rope_theta": rope["rope_theta"], **llm} if "rope_theta" in rope else llm
        names = [f.name for f in fields(cls)][:8]
        missing = [name for name in names if name not in llm]
        if missing:
            raise RefineError(f"llm_config.json lacks {', '.join(missing)}; use a BAGEL-7B-MoT or RvR-7B-MoT folder")
        sizes = {name: llm[name] for name in names}
        for name in ("latent_patch_size", "max_latent_size", "vit_max_num_patch_per_side"):
            if name in model:
                sizes[name] = model[name]
        channels = (model.get("vae_config") or {}).get("z_channels")
        if channels is not None:
            sizes["latent_channels"] = channels
        shared = {k: v for k, v in overrides.items() if k in ("dtype", "param_dtype", "remat", "scan")}
        if "vit" not in overrides:
            sizes["vit"] = SiglipConfig.from_dict(vit, **shared)
        return cls(**{**sizes, **overrides})


# ---------------------------------------------------------------------------------------------------------------- cache
@struct.dataclass
class Cache:
    """Keys (rotated) and values of tokens that were read: [layers, B, S, kv heads, head size], and what they are."""

    key: Array
    value: Array
    segments: Segments


def reserve(cache: Cache, size: int) -> Cache:
    """The cache with `size` free slots behind its tokens, which nobody sees until `decode(at=…)` writes there."""
    grow = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, size), (0, 0), (0, 0)])
    segments = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, size)]), cache.segments)
    used = cache.segments.sample.shape[1]
    segments = segments.replace(sample=segments.sample.at[:, used:].set(-1))
    return Cache(grow(cache.key), grow(cache.value), segments)


def _extend(cache: Cache | None, key: Array, value: Array, segments: Segments, at: Array | None) -> Cache:
    """The cache with these tokens behind the others, or in the slots from `at` on; noisy tokens are not to be seen."""
    new = Cache(key, value, segments.replace(sample=jnp.where(segments.noisy, -1, segments.sample)))
    if cache is None:
        return new
    write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=at) if at is not None else None

    def put(old: Array, new: Array, axis: int) -> Array:
        return jnp.concatenate([old, new], axis=axis) if write is None else write(old, new.astype(old.dtype), axis=axis)

    return Cache(
        put(cache.key, new.key, 2),
        put(cache.value, new.value, 2),
        jax.tree.map(lambda old, new: put(old, new, 1), cache.segments, new.segments),
    )


# ----------------------------------------------------------------------------------------- latents, tables of positions
def patchify(latents: Array, config: BagelConfig) -> Array:
    """Latents [B, H, W, C] -> tokens [B, h·w, p·p·C], features as (row, column, channel) of the patch."""
    batch, height, width, channels = latents.shape
    p = config.latent_patch_size
    x = latents.reshape(batch, height // p, p, width // p, p, channels).swapaxes(2, 3)
    return x.reshape(batch, (height // p) * (width // p), p * p * channels)


def unpatchify(tokens: Array, grid: tuple[int, int], config: BagelConfig) -> Array:
    """The inverse of `patchify`; grid: (h, w) in tokens."""
    p, (h, w) = config.latent_patch_size, grid
    x = tokens.reshape(tokens.shape[0], h, w, p, p, -1).swapaxes(2, 3)
    return x.reshape(tokens.shape[0], h * p, w * p, -1)


def latent_position_ids(grid: tuple[int, int], config: BagelConfig) -> np.ndarray:
    """Cells of the latent position grid of an image of (h, w) tokens: [h·w] int32, row · max_latent_size + column.

    Raises RefineError where the image exceeds the grid.
    """
    h, w = grid
    side = config.max_latent_size
    if not (0 < h <= side and 0 < w <= side):
        raise RefineError(f"latent grid {h}x{w}: the model's positions end at {side}x{side}; make the image smaller")
    return (np.arange(h, dtype=np.int32)[:, None] * side + np.arange(w, dtype=np.int32)).reshape(-1)


def sincos_axis(side: int, features: int) -> np.ndarray:
    """[sin(n·ω), cos(n·ω)] of n < side with ω_i = 10000^(-i / (features/2)): [side, features] float32."""
    half = features // 2
    angles = np.arange(side, dtype=np.float64)[:, None] * _TABLE_BASE ** (-np.arange(half, dtype=np.float64) / half)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def position_features(position_ids: Array, side: int, features: int) -> Array:
    """Sine-cosine embedding of cells of a grid: ids [...] int32 (row · side + column) -> [..., features] float32.

    The first half of the features is the column's, the second the row's. Released files hold the table of all cells;
    it is a constant, of which two axes of `side` rows say everything.
    """
    axis = jnp.asarray(sincos_axis(side, features // 2))
    row, column = position_ids // side, position_ids % side
    # Clipped, because a padded place may hold any number and jnp.take would give it NaN.
    return jnp.concatenate([jnp.take(axis, x, axis=0, mode="clip") for x in (column, row)], axis=-1)


# ---------------------------------------------------------------------------------------------------------- the decoder
class Expert(nn.Module):
    """One stream's weights in a layer: norms, projections, per-head norms of queries and keys, feed-forward."""

    config: BagelConfig
    length: str

    def setup(self):
        cfg = self.config
        kinds = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype)
        norm = dict(dtype=cfg.dtype, param_dtype=cfg.floating)
        width, kv_width = cfg.hidden_size, cfg.num_key_value_heads * cfg.head_dim
        self.input_layernorm = RMSNorm(cfg.rms_norm_eps, **norm)
        self.q_proj = Dense(width, ("embed", "heads"), **kinds)
        self.k_proj = Dense(kv_width, ("embed", "heads"), **kinds)
        self.v_proj = Dense(kv_width, ("embed", "heads"), **kinds)
        self.q_norm = RMSNorm(cfg.rms_norm_eps, **norm)
        self.k_norm = RMSNorm(cfg.rms_norm_eps, **norm)
        self.o_proj = Dense(width, ("heads", "embed"), use_bias=False, **kinds)
        self.post_attention_layernorm = RMSNorm(cfg.rms_norm_eps, **norm)
        self.mlp = GatedMLP(width, cfg.intermediate_size, False, **kinds)

    def project(self, x: Array, turns: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        """x [B, S, hidden], turns 2 x [B, S, head size / 2] -> queries, keys, values [B, S, (kv) heads, head size]."""
        x = self.input_layernorm(x)
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.config.head_dim)
        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        q, k = (apply_rotary(y, *turns, interleaved=False) for y in (self.q_norm(q), self.k_norm(k)))
        return tuple(constrain(y, "batch", self.length, "act_heads", None) for y in (q, k, v))

    def finish(self, x: Array, seen: Array) -> Array:
        """x [B, S, hidden] and what its queries brought, [B, S, heads, head size] -> [B, S, hidden]."""
        seen = constrain(seen.reshape(x.shape), "batch", self.length, "act_heads")
        x = x + self.o_proj(seen)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return constrain(x, "batch", self.length, "act_embed")


Streams = tuple[Array | None, Array | None]


class Layer(nn.Module):
    """`Qwen2MoTDecoderLayer`, shaped as the body of a scan: (streams, cached) -> (streams, kept)."""

    config: BagelConfig
    keep: bool = False

    @nn.compact
    def __call__(
        self,
        streams: Streams,
        cached: tuple[Array, Array] | None,
        turns: tuple[Any, Any],
        mask: Array | SegmentMask,
    ) -> tuple[Streams, tuple[Array, Array] | None]:
        """streams: und [B, T, hidden], gen [B, N, hidden], None where absent; cached: keys and values [B, S, kv heads,
        head size] or None; turns: cosines and sines of each stream; mask over [cached, und, gen] keys."""
        config = self.config
        # A stream that is absent costs nothing.
        experts = {
            i: Expert(config, length, name=name)
            for i, (name, length) in enumerate((("und", "text_length"), ("gen", "length")))
            if streams[i] is not None
        }
        q, k, v = zip(*(expert.project(streams[i], turns[i]) for i, expert in experts.items()))
        before = ((), ()) if cached is None else ((cached[0],), (cached[1],))
        seen = attention(q, before[0] + k, before[1] + v, mask=mask, impl=config.attention_impl)
        out = {i: expert.finish(streams[i], part) for (i, expert), part in zip(experts.items(), seen)}
        kept = (jnp.concatenate(k, axis=1), jnp.concatenate(v, axis=1)) if self.keep else None
        return (out.get(0), out.get(1)), kept


class Decoder(nn.Module):
    """The layers and the two final norms (`Qwen2Model` with `Qwen2MoTDecoderLayer`)."""

    config: BagelConfig

    @nn.compact
    def __call__(
        self,
        streams: Streams,
        cached: tuple[Array, Array] | None,
        turns: tuple[Any, Any],
        mask: Array | SegmentMask,
        keep: bool,
    ) -> tuple[Streams, tuple[Array, Array] | None]:
        """As `Layer`, with keys and values stacked over the layers on axis 0."""
        config = self.config
        layer = Layer
        if config.remat is not None:
            layer = nn.remat(Layer, policy=remat_policy(config.remat), prevent_cse=not config.scan)
        if config.scan:
            scanned = nn.scan(
                layer,
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=config.num_hidden_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            streams, kept = scanned(config, keep, name="layers")(streams, cached, turns, mask)
        else:
            each = []
            for i in range(config.num_hidden_layers):
                part = jax.tree.map(lambda x: x[i], cached)  # noqa: B023
                streams, kept = layer(config, keep, name=f"layers_{i}")(streams, part, turns, mask)
                each.append(kept)
            kept = jax.tree.map(lambda *x: jnp.stack(x), *each)
        norms = [
            None
            if x is None
            else RMSNorm(config.rms_norm_eps, dtype=config.dtype, param_dtype=config.floating, name=name)(x)
            for x, name in zip(streams, ("norm", "norm_gen"))
        ]
        return (norms[0], norms[1]), kept


# ---------------------------------------------------------------------------------------------------------- the network
class TimeEmbedding(nn.Module):
    """t [...] in [0, 1] -> [..., hidden] float32 (`TimestepEmbedder`; t itself is the angle, not 1000 t)."""

    config: BagelConfig

    @nn.compact
    def __call__(self, t: Array) -> Array:
        width, kind = self.config.hidden_size, self.config.floating
        init = nn.initializers.normal(0.02)
        x = timestep_embedding(t.reshape(-1), TIME_CHANNELS)
        x = nn.silu(Dense(width, ("in_channels", "mlp"), param_dtype=kind, kernel_init=init, name="fc1")(x))
        x = Dense(width, ("mlp", "embed"), param_dtype=kind, kernel_init=init, name="fc2")(x)
        return x.reshape(*t.shape, width)


class Connector(nn.Module):
    """ViT features -> the decoder's width: Linear, tanh-GELU, Linear (`MLPconnector`)."""

    config: BagelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg = self.config
        kinds = dict(dtype=cfg.dtype, param_dtype=cfg.floating)
        x = nn.gelu(Dense(cfg.hidden_size, ("embed", "mlp"), name="fc1", **kinds)(x), approximate=True)
        return Dense(cfg.hidden_size, ("mlp", "embed"), name="fc2", **kinds)(x)


class Bagel(nn.Module):
    """BAGEL without its VAE. A fresh initialisation predicts a velocity of exactly zero (llm2vae starts at 0)."""

    config: BagelConfig

    def setup(self):
        cfg = self.config
        kinds = dict(dtype=cfg.dtype, param_dtype=cfg.floating)
        self.embed_tokens = self.param(
            "embed_tokens",
            nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed")),
            (cfg.vocab_size, cfg.hidden_size),
            jnp.dtype(cfg.floating),
        )
        self.vit_model = Siglip(cfg.vit)
        self.connector = Connector(cfg)
        self.time_embedder = TimeEmbedding(cfg)
        self.vae2llm = Dense(cfg.hidden_size, ("in_channels", "embed"), **kinds)
        self.decoder = Decoder(cfg)
        self.llm2vae = Dense(
            cfg.latent_dim, ("embed", "out_channels"), kernel_init=nn.initializers.zeros_init(), **kinds
        )
        self.lm_head = Dense(cfg.vocab_size, ("embed", "vocab"), use_bias=False, **kinds)

    def __call__(
        self,
        ids: Array,
        text_segments: Segments,
        patches: Array | None = None,
        patch_positions: Array | None = None,
        vit_segments: Segments | None = None,
        latents: Array | None = None,
        t: Array | None = None,
        latent_positions: Array | None = None,
        gen_segments: Segments | None = None,
        one_target: bool = False,
    ) -> tuple[Array, Array | None]:
        """A whole (packed) sequence -> hidden states of the text [B, T, hidden], velocity [B, N, p·p·C] or None.

        ids [B, T] int32: texts and image marks. patches [B, K, P, patch dim], patch_positions [B, K, P] int32: K image
        slots a row; vit_segments [B, K·P], padding where there is no patch. latents [B, N, p·p·C], already noised, t as
        in `latent_tokens`, latent_positions [B, N] int32, gen_segments [B, N]. `logits` of the hidden states gives the
        text.
        one_target: as in `decode`.
        """
        und, segments = self.text_embeddings(ids), text_segments
        if patches is not None:
            mask = (vit_segments.sample >= 0).reshape(patches.shape[:-1])
            features = self.vit_tokens(patches, patch_positions, mask)
            und = jnp.concatenate([und, features.reshape(und.shape[0], -1, und.shape[2])], axis=1)
            segments = join(text_segments, vit_segments)
        gen = None if latents is None else self.latent_tokens(latents, t, latent_positions)
        und, gen, _ = self.decode(und, segments, gen, gen_segments, one_target=one_target)
        if self.is_initializing():
            self.logits(und)
        return und[:, : ids.shape[1]], None if gen is None else self.velocity(gen)

    def text_embeddings(self, ids: Array) -> Array:
        """ids [B, T] int32 -> [B, T, hidden]."""
        x = jnp.take(self.embed_tokens, ids, axis=0).astype(self.config.dtype)
        return constrain(x, "batch", "text_length", "act_embed")

    def vit_tokens(self, patches: Array, position_ids: Array, mask: Array) -> Array:
        """patches [..., P, patch dim], position_ids [..., P] int32, mask [..., P] bool -> [..., P, hidden].

        One image an item; ids are cells of a grid of `vit_max_num_patch_per_side` (`siglip.position_ids`).
        """
        cfg = self.config
        flat = lambda x, ndim: x.reshape(-1, *x.shape[x.ndim - ndim :])
        x = self.vit_model(flat(patches, 2), flat(position_ids, 1), flat(mask, 1))
        x = self.connector(x).reshape(*position_ids.shape, cfg.hidden_size)
        return x + position_features(position_ids, cfg.vit_max_num_patch_per_side, cfg.hidden_size).astype(x.dtype)

    def latent_tokens(self, x: Array, t: Array, position_ids: Array) -> Array:
        """x [B, N, p·p·C], t in [0, 1] (0 is a clean image), position_ids [B, N] -> [B, N, hidden].

        t: [B], or [B, M] of M images of N / M tokens each, M = N for a time a token.
        """
        cfg = self.config
        t = t if t.ndim == 2 else t[:, None]
        place = position_features(position_ids, cfg.max_latent_size, cfg.hidden_size)
        time = jnp.repeat(self.time_embedder(t.astype(jnp.float32)), x.shape[1] // t.shape[1], axis=1)
        y = self.vae2llm(x).astype(jnp.float32) + time + place
        return constrain(y.astype(cfg.dtype), "batch", "length", "act_embed")

    def decode(
        self,
        und: Array | None,
        und_segments: Segments | None,
        gen: Array | None = None,
        gen_segments: Segments | None = None,
        cache: Cache | None = None,
        *,
        keep: bool = False,
        at: Array | None = None,
        uniform: bool = False,
        one_target: bool = False,
    ) -> tuple[Array | None, Array | None, Cache | None]:
        """und [B, T, hidden], gen [B, N, hidden] (one may be None) -> last hidden states of both, and the cache.

        cache: tokens read before, seen by the rule of `attention_mask`. keep: the cache returned has these tokens too,
        behind the others, or, with at (scalar int32), in the slots that `reserve` left free from `at` on; noisy tokens
        are in it but never seen. Otherwise the cache is returned as it was.
        uniform: says that all the tokens of a row are of one segment that is not causal (as in denoising behind a
        cached prefix). A mask by key is then enough, and attention's kernels take it.
        one_target: says that no sample has more than one noisy segment, nor one that is causal (`segment_mask`). A
        TPU's kernel then takes the mask, and long packed rows are fast.
        """
        streams = [None if x is None or x.shape[1] == 0 else x for x in (und, gen)]
        parts = [s for x, s in zip(streams, (und_segments, gen_segments)) if x is not None]
        if not parts:
            raise ValueError("decode: no token in either stream")
        segments = join(*parts)
        cached = None if cache is None else (cache.key, cache.value)
        keys = segments if cache is None else join(cache.segments, segments)
        if uniform:
            mask = attention_mask(_first(segments), keys)
        else:
            mask = segment_mask(segments, keys, one_target=one_target)
        turns = [
            None if x is None else rotary_angles(s.position[..., None], (self.config.head_dim,), self.config.rope_theta)
            for x, s in zip(streams, (und_segments, gen_segments))
        ]
        (h_und, h_gen), kept = self.decoder(tuple(streams), cached, tuple(turns), mask, keep)
        if keep:
            cache = _extend(cache, *kept, segments, at)
        return und if h_und is None else h_und, gen if h_gen is None else h_gen, cache

    def velocity(self, hidden_gen: Array) -> Array:
        """[B, N, hidden] -> velocity (noise minus image) of every latent token, [B, N, p·p·C] float32."""
        return self.llm2vae(hidden_gen).astype(jnp.float32)

    def logits(self, hidden_und: Array) -> Array:
        """[..., hidden] -> [..., vocab] float32: of the token that follows."""
        return self.lm_head(hidden_und).astype(jnp.float32)


def _first(segments: Segments) -> Segments:
    """The first token of every row that exists: arrays [B, 1]."""
    at = jnp.argmax(segments.sample >= 0, axis=1)[:, None]
    return jax.tree.map(lambda x: jnp.take_along_axis(x, at, axis=1), segments)


def generate_text(
    model: Bagel,
    variables: Mapping[str, Any],
    cache: Cache,
    start_id: int,
    end_id: int,
    *,
    segment_index: Array,
    position: Array,
    length: int,
    sample: int = 0,
    temperature: float = 0.0,
    key: Array | None = None,
) -> Array:
    """The text that follows a cached prefix: [B, length] int32, after its `end_id` filled with `end_id`.

    start_id: the token that opens a text. segment_index, position: [B] int32, of the new text and its first token;
    sample: which of the cached samples goes on. length: at most so many tokens. temperature 0 takes the likeliest
    token, otherwise tokens are drawn with `key`. Ends when every row has ended. Jit it with model, ids, length static.
    """
    if temperature > 0 and key is None:
        raise RefineError(f"temperature {temperature}: drawing tokens needs a key; give one, or temperature 0")
    rows, used = cache.segments.sample.shape
    cache = reserve(cache, length)
    ids = jnp.full((rows, length), end_id, jnp.int32)
    first = jnp.full((rows, 1), start_id, jnp.int32)

    def going(state: tuple[Array, ...]) -> Array:
        step, _, _, ended, _ = state
        return (step < length) & ~jnp.all(ended)

    def advance(state: tuple[Array, ...]) -> tuple[Array, ...]:
        step, ids, token, ended, cache = state
        own = segment(
            1, count=1, sample=sample, segment=segment_index, position=position + step, index=step, causal=True
        )
        own = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, 1)), own)

        def read(module: Bagel) -> tuple[Array, Cache]:
            hidden, _, kept = module.decode(
                module.text_embeddings(token), own, cache=cache, keep=True, at=used + step, uniform=True
            )
            return module.logits(hidden[:, 0]), kept

        logits, cache = model.apply(variables, method=read)
        if temperature > 0:
            chosen = jax.random.categorical(jax.random.fold_in(key, step), logits / temperature, axis=-1)
        else:
            chosen = jnp.argmax(logits, axis=-1)
        chosen = jnp.where(ended, end_id, chosen.astype(jnp.int32))
        ids = jax.lax.dynamic_update_slice_in_dim(ids, chosen[:, None], step, axis=1)
        return step + 1, ids, chosen[:, None], ended | (chosen == end_id), cache

    state = (jnp.int32(0), ids, first, jnp.zeros((rows,), bool), cache)
    return jax.lax.while_loop(going, advance, state)[1]
