"""Rectified flow in the base model's convention: x_σ = (1 - σ)·z0 + σ·ε, velocity v = ε - z0, σ from 1 (noise) to 0.

(The RefineAnything paper writes the mirror image, z_t with t = 1 - σ and velocity z0 - z1: the same objective.)
Schedules are host-side NumPy, a function of static numbers; everything else is a jittable function of arrays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax.errors import RefineError
from refine_jax.limits import RENORMS

Array = jax.Array | np.ndarray

# ------------------------------------------------------------------------------------------------------------ schedule


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """The fields of diffusers' `FlowMatchEulerDiscreteScheduler` that the Euler sampler uses, with its defaults."""

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float | None = None
    time_shift_type: Literal["exponential", "linear"] = "exponential"

    def __post_init__(self):
        if self.time_shift_type not in ("exponential", "linear"):
            raise RefineError(f"scheduler time_shift_type is {self.time_shift_type!r}: give 'exponential' or 'linear'")
        if self.use_dynamic_shifting and self.base_image_seq_len == self.max_image_seq_len:
            raise RefineError("scheduler base_image_seq_len equals max_image_seq_len: the dynamic shift has no slope")
        if self.shift_terminal is not None and not 0 <= self.shift_terminal < 1:
            raise RefineError(f"scheduler shift_terminal is {self.shift_terminal}: give null or a number in [0, 1)")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> SchedulerConfig:
        """From the json of a checkpoint's `scheduler/scheduler_config.json`.

        Raises RefineError for another scheduler class, an unknown field, or an unsupported feature that is switched on.
        """
        kind = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
        if kind != "FlowMatchEulerDiscreteScheduler":
            raise RefineError(f"scheduler _class_name is {kind!r}: only FlowMatchEulerDiscreteScheduler is supported")
        off = {
            "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling"
        }  # fmt: skip
        known = {field.name for field in dataclasses.fields(cls)}
        values = {}
        for key, value in config.items():
            if key.startswith("_"):
                continue
            if key in off:
                if value:
                    raise RefineError(f"scheduler {key} is {value}: not supported, set it to false")
            elif key not in known:
                raise RefineError(f"scheduler has an unknown field {key!r}: remove it")
            elif value is not None:
                values[key] = value
        return cls(**values)


# The released RefineAnything sampler: constant μ = log 3 (σ' = 3σ / (1 + 2σ)), no terminal shift. And the base model's.
SCHEDULERS: dict[str, SchedulerConfig] = {
    "refineanything": SchedulerConfig(
        use_dynamic_shifting=True, base_shift=math.log(3), max_shift=math.log(3), max_image_seq_len=8192
    ),
    "qwen-image": SchedulerConfig(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    ),
}


def sigmas(num_steps: int) -> np.ndarray:
    """`[num_steps] float64`: linspace(1, 1/N, N), before any shift."""
    if num_steps < 1:
        raise RefineError(f"steps is {num_steps}: give 1 or more")
    return np.linspace(1.0, 1.0 / num_steps, num_steps)


def dynamic_mu(config: SchedulerConfig, image_tokens: int) -> float:
    """μ, linear in the number of target tokens: base_shift at base_image_seq_len, max_shift at max_image_seq_len."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + slope * (image_tokens - config.base_image_seq_len)


def shift_sigma(sigma, factor):
    """s·σ / (1 + (s - 1)·σ): 0 and 1 stay, s > 1 moves the rest towards the noise. NumPy or JAX arrays."""
    return factor * sigma / (1.0 + (factor - 1.0) * sigma)


def time_shift(sigma, mu: float, kind: Literal["exponential", "linear"] = "exponential"):
    """The resolution-dependent shift e^μ / (e^μ + 1/σ - 1) ("linear": μ in place of e^μ), also defined at σ = 0."""
    return shift_sigma(sigma, math.exp(mu) if kind == "exponential" else mu)


def stretch_to_terminal(sigma, terminal: float):
    """Scales 1 - σ so that the last σ of `[N]` becomes `terminal`."""
    rest = 1.0 - sigma
    return 1.0 - rest * ((1.0 - terminal) / rest[-1])


def schedule(config: SchedulerConfig, num_steps: int, image_tokens: int) -> np.ndarray:
    """The σ of every step and the final 0: `[num_steps + 1] float32`, decreasing.

    Equal to `FlowMatchEulerDiscreteScheduler.set_timesteps(sigmas=linspace(1, 1/N, N), mu=μ)` as
    `QwenImageEditPlusPipeline` calls it; `image_tokens` counts the packed tokens of the target alone. With one step the
    only σ is 1 and the terminal stretch, undefined there, is left out.
    """
    sigma = sigmas(num_steps)
    if config.use_dynamic_shifting:
        sigma = time_shift(sigma, dynamic_mu(config, image_tokens), config.time_shift_type)
    else:
        sigma = shift_sigma(sigma, config.shift)
    if config.shift_terminal and num_steps > 1:
        sigma = stretch_to_terminal(sigma, config.shift_terminal)
    return np.append(sigma, 0.0).astype(np.float32)


# ------------------------------------------------------------------------------------------------- noising and stepping


def _per_item(value: Array | float, like: Array) -> jax.Array:
    """A scalar or `[B]`, as float32 that broadcasts against `[B, ...]`."""
    value = jnp.asarray(value, jnp.float32)
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim)) if value.ndim else value


def noise_latents(latents: Array, noise: Array, sigma: Array | float) -> jax.Array:
    """x_σ = (1 - σ)·z0 + σ·ε. `latents`, `noise [B, ...]`, `sigma` scalar or `[B]` -> `[B, ...]` in latents' dtype."""
    s = _per_item(sigma, latents)
    return ((1.0 - s) * latents.astype(jnp.float32) + s * noise.astype(jnp.float32)).astype(latents.dtype)


def velocity_target(latents: Array, noise: Array) -> jax.Array:
    """dx_σ/dσ = ε - z0."""
    return noise - latents


def euler_step(latents: Array, velocity: Array, sigma: Array | float, sigma_next: Array | float) -> jax.Array:
    """x + (σ' - σ)·v, in float32. `latents`, `velocity [B, ...]`, sigmas scalar or `[B]` -> latents' dtype."""
    step = _per_item(sigma_next, latents) - _per_item(sigma, latents)
    return (latents.astype(jnp.float32) + step * velocity.astype(jnp.float32)).astype(latents.dtype)


def true_cfg(positive: Array, negative: Array, scale: Array | float) -> jax.Array:
    """Classifier-free guidance, rescaled per token to the norm of the conditional velocity.

    comb = neg + s·(pos - neg); comb·‖pos‖/‖comb‖ with norms over the last axis. `[B, N, C]`, `scale` scalar or `[B]` ->
    positive's dtype, computed in float32. A token whose comb is 0 stays 0.
    """
    pos, neg = positive.astype(jnp.float32), negative.astype(jnp.float32)
    combined = neg + _per_item(scale, pos) * (pos - neg)
    norm = lambda v: jnp.sqrt(jnp.sum(v * v, axis=-1, keepdims=True))
    length = norm(combined)
    ratio = norm(pos) / jnp.where(length == 0.0, 1.0, length)
    return (combined * ratio).astype(positive.dtype)


def dual_cfg(
    velocity: Array,
    text_dropped: Array | None,
    image_dropped: Array | None,
    text_scale: Array | float,
    image_scale: Array | float,
    renorm: str = "text_channel",
    renorm_min: float = 0.0,
) -> jax.Array:
    """RvR's guidance by two contexts, one without the prompt and one without the image: `[B, N, C]`, in float32.

    v_text = u_t + s_t·(v - u_t), then u_i + s_i·(v_text - u_i), brought back to the length of v by a factor in
    [renorm_min, 1]: "text_channel" scales v_text token by token, before the image's guidance; "channel" the result
    token by token; "global" the result as a whole, an item of the batch at a time. A context that is None is left out;
    scales: scalar or `[B]`. As `Bagel._forward_flow`; there, "global" is defined for one item alone.
    """
    if renorm not in RENORMS:
        raise RefineError(f"renorm {renorm!r}: give one of {', '.join(RENORMS)}")
    v = velocity.astype(jnp.float32)
    if text_dropped is None:  # as the reference: the image alone does not guide
        return v
    axes = (-2, -1) if renorm == "global" else (-1,)
    norm = lambda x: jnp.sqrt(jnp.sum(x * x, axis=axes, keepdims=True))
    shorten = lambda x: x * jnp.clip(norm(v) / (norm(x) + 1e-8), renorm_min, 1.0)
    blend = lambda base, x, scale: base + _per_item(scale, v) * (x - base)
    guided = blend(text_dropped.astype(jnp.float32), v, text_scale)
    if renorm == "text_channel":
        guided = shorten(guided)
    if image_dropped is not None:
        guided = blend(image_dropped.astype(jnp.float32), guided, image_scale)
    return guided if renorm == "text_channel" else shorten(guided)


# ------------------------------------------------------------------------------------------------------- latent tokens


def pack_latents(latents: Array, patch: int = 2) -> jax.Array:
    """`[B, h, w, C]` -> tokens `[B, (h/p)·(w/p), C·p²]`, features in the order (channel, row, column).

    The order of `QwenImagePipeline._pack_latents` (which takes NCHW).
    """
    b, h, w, c = latents.shape
    if h % patch or w % patch:
        raise RefineError(f"latent size {h}x{w} is not a multiple of the patch size {patch}")
    x = latents.reshape(b, h // patch, patch, w // patch, patch, c)
    return jnp.transpose(x, (0, 1, 3, 5, 2, 4)).reshape(b, (h // patch) * (w // patch), c * patch * patch)


def unpack_latents(tokens: Array, grid: tuple[int, int], patch: int = 2) -> jax.Array:
    """The inverse of `pack_latents`. `grid` = latent (h, w) in latent pixels -> `[B, h, w, C]`."""
    b, n, features = tokens.shape
    rows, columns = grid[0] // patch, grid[1] // patch
    if n != rows * columns or grid[0] % patch or grid[1] % patch or features % patch**2:
        raise RefineError(
            f"tokens {tokens.shape} do not fill a latent grid {grid[0]}x{grid[1]} with patch size {patch}"
        )
    x = tokens.reshape(b, rows, columns, features // patch**2, patch, patch)
    return jnp.transpose(x, (0, 1, 4, 2, 5, 3)).reshape(b, *grid, features // patch**2)


# ------------------------------------------------------------------------------------------------------- training sigma


def sample_sigma(
    key: jax.Array,
    shape: tuple[int, ...],
    distribution: Literal["uniform", "logit_normal"] = "uniform",
    *,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
) -> jax.Array:
    """Training σ in (0, 1): `shape float32`.

    "uniform", or "logit_normal" with σ = sigmoid(mean + std·n); then `shift_sigma` by `shift` (1 leaves it alone).
    """
    if distribution == "uniform":
        sigma = jax.random.uniform(key, shape, jnp.float32)
    elif distribution == "logit_normal":
        sigma = jax.nn.sigmoid(mean + std * jax.random.normal(key, shape, jnp.float32))
    else:
        raise RefineError(f"sigma distribution is {distribution!r}: give 'uniform' or 'logit_normal'")
    return shift_sigma(sigma, shift)
