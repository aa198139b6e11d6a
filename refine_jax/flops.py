"""Floating-point operations that a program needs, counted in its trace; the numerator of MFU.

Every matrix product and convolution of the traced program counts 2 operations a multiply-add, nothing else counts. The
trace is of the mathematics: gradients of what is trained and of nothing else, no rematerialisation, every score of an
attention once forwards and once for each of its gradients, whatever a kernel computes again.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from flax.linen import meta
from jax.extend import core
from jax.interpreters import partial_eval

from refine_jax import objectives
from refine_jax.bagel import BagelModel
from refine_jax.bagel_objective import apart
from refine_jax.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of products with weights and of convolutions, and of products between activations (attention)."""

    dense: float = 0.0
    attention: float = 0.0

    @property
    def total(self) -> float:
        return self.dense + self.attention

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.dense + other.dense, self.attention + other.attention)

    def __mul__(self, times: float) -> "Flops":
        return Flops(self.dense * times, self.attention * times)


def count(function: Callable[..., Any], *args: Any) -> Flops:
    """What `function` of `args` (arrays or `jax.ShapeDtypeStruct`s) needs; dead code does not count.

    A product with batch dimensions counts as attention. A conditional counts its cheapest branch, a loop of unknown
    length raises ValueError.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _of_jaxpr(jaxpr)


def of_step(config: ml_collections.ConfigDict, model: ModelConfig | BagelModel | None, batch: Any) -> Flops:
    """What a training step of `config` on a global `batch` (shapes suffice) needs: forward pass and gradients.

    model: `Objective.model`, None for the VAE's objective. Of packed rows attention counts within samples of a pair of
    pictures each (`bagel_objective.apart`).
    """
    plain = config.copy_and_resolve_references()
    with plain.unlocked():
        plain.remat, plain.variant = None, ""  # the latter is a check of `model`, which is about to change
    # Whatever the kernels are: two products forwards, four for the gradients.
    counted = dict(remat=None, attention_impl="xla")
    if isinstance(model, BagelModel):
        tower = dataclasses.replace(model.bagel.vit, **counted)
        model = dataclasses.replace(model, bagel=dataclasses.replace(model.bagel, vit=tower, **counted))
        batch = apart(batch)
    elif model is not None:
        model = dataclasses.replace(model, mmdit=dataclasses.replace(model.mmdit, **counted))
    objective = objectives.make(plain, model)
    key = jax.eval_shape(lambda: jax.random.key(0))
    # A box's own `unbox` would constrain what it holds where a mesh is in force; these are shapes.
    plain_tree = lambda tree: jax.tree.map(lambda x: getattr(x, "value", x), tree, is_leaf=_is_box)
    params, frozen = plain_tree(jax.eval_shape(objective.init, key)), plain_tree(objective.frozen)
    return count(jax.grad(objective.loss, has_aux=True), params, frozen, batch, key)


def _is_box(x: Any) -> bool:
    return isinstance(x, meta.AxisMetadata)


def _of_jaxpr(jaxpr: core.Jaxpr) -> Flops:
    total = Flops()
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), (batch, _) = params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            size = 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
            total += Flops(attention=size) if batch else Flops(dense=size)
        elif name == "conv_general_dilated":
            kernel, where = eqn.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
            taps = math.prod(kernel) / kernel[where[0]]
            total += Flops(dense=2.0 * math.prod(eqn.outvars[0].aval.shape) * taps)
        elif name == "cond":
            total += min((_of_jaxpr(branch.jaxpr) for branch in params["branches"]), key=lambda found: found.total)
        elif name == "while":
            inner = _of_jaxpr(params["body_jaxpr"].jaxpr)
            if inner.total:
                raise ValueError("a loop of unknown length holds matrix products; use lax.scan")
        else:
            times = params["length"] if name == "scan" else 1
            for value in params.values():
                for inner in value if isinstance(value, (tuple, list)) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if isinstance(inner, core.Jaxpr):
                        total += _of_jaxpr(inner) * times
    return total


# ---------------------------------------------------------------------------------------------------------------- chips


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of a chip: bfloat16 FLOP/s, bytes of memory, bytes/s to it, bytes/s a link sends one way.

    wraps: the side from which on an axis of its torus is closed to a ring.
    """

    name: str
    flops: float
    hbm: float
    bandwidth: float
    link: float
    wraps: int = 0


# TPUs: Google Cloud's pages "TPU v5e", "TPU v5p", "TPU v6e" (2025): peak bf16, HBM capacity and bandwidth, and the
# interconnect's bidirectional 400, 1200, 800 GB/s a chip over 4, 6, 4 links. GPUs: NVIDIA's data sheets of the SXM
# modules, dense bf16 and NVLink's total of 900 (A100: 600) GB/s. By `jax.Device.device_kind`.
CHIPS: dict[str, Chip] = {
    "TPU v5 lite": Chip("v5e", 197e12, 16 * 2**30, 819e9, 50e9, 16),
    "TPU v5p": Chip("v5p", 459e12, 95 * 2**30, 2765e9, 100e9, 4),
    "TPU v6 lite": Chip("v6e", 918e12, 32 * 2**30, 1640e9, 100e9, 16),
    "NVIDIA A100-SXM4-80GB": Chip("A100", 312e12, 80e9, 2039e9, 300e9),
    "NVIDIA H100 80GB HBM3": Chip("H100", 989e12, 80e9, 3350e9, 450e9),
    "NVIDIA H200": Chip("H200", 989e12, 141e9, 4800e9, 450e9),
}


def chip(device: jax.Device) -> Chip | None:
    """The figures of a device, None where they are not known (a CPU, say). A v5p is also called "TPU v5"."""
    kind = {"TPU v5": "TPU v5p", "TPU v5e": "TPU v5 lite", "TPU v6e": "TPU v6 lite"}.get(device.device_kind)
    return CHIPS.get(kind or device.device_kind)
