"""What the settings of a training may be: ranges of numbers, keys of groups; checked before anything is loaded."""

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from refine_jax import limits, recipes
from refine_jax.errors import RefineError

_TINY, _BELOW_ONE = 1e-12, 1.0 - 1e-9
_WHOLE: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("steps", "batch_size", "log_every", "save_every", "keep"), (1, 2**31)),
    "keep_every": (0, 2**31),
    "alignment.block": (0, 1000),
    "boundary.r_in": (0, 4096),
    "boundary.r_out": (0, 4096),
    "data.answer_length": (0, 2**20),
    "data.text_length": (1, 2**20),
    "data.workers": (0, 1024),
    "lora.rank": (1, 2**16),
    "optimizer.accumulate": (1, 2**16),
    "optimizer.muon_steps": (1, 100),
    "optimizer.warmup": (0, 2**31),
    "pictures.count": (1, 1024),
    "pictures.every": (0, 2**31),
    "seed": (0, 2**31 - 1),
    "validation.batches": (1, 2**20),
    "validation.every": (0, 2**31),
}
_NUMBERS: dict[str, tuple[float, float]] = {
    "alignment.weight": (0.0, math.inf),
    "boundary.alpha": (0.0, math.inf),
    "ce_weight": (0.0, math.inf),
    "data.margin_jitter": (0.0, _BELOW_ONE),
    "data.max_corrupt": (0.0, math.inf),
    "data.reference_dropout": (0.0, 1.0),
    "data.reference_share": (0.0, 1.0),
    "data.text_dropout": (0.0, 1.0),
    "data.text_to_image": (0.0, 1.0),
    "ema_decay": (0.0, _BELOW_ONE),
    "instruction_dropout": (0.0, 1.0),
    "lora.alpha": (_TINY, math.inf),
    "mse_weight": (0.0, math.inf),
    "optimizer.adam_scale": (0.0, 1e3),
    "optimizer.b1": (0.0, _BELOW_ONE),
    "optimizer.b2": (0.0, _BELOW_ONE),
    "optimizer.clip": (_TINY, math.inf),
    "optimizer.decay": (0.0, 1.0),
    "optimizer.eps": (0.0, 1.0),
    "optimizer.learning_rate": (0.0, math.inf),
    "optimizer.weight_decay": (0.0, 1e3),
    "sigma.mean": (-100.0, 100.0),
    "sigma.shift": (0.01, 1e3),
    "sigma.std": (0.0, 100.0),
}
# Keys of groups that are the same for every objective; all of a group are needed unless they are in `_SPARE`.
_GROUPS: dict[str, tuple[str, ...]] = {
    "alignment": ("block", "weight"),
    "boundary": ("r_out", "r_in", "alpha"),
    "lora": ("rank", "alpha", "targets", "init_from"),
    "pictures": ("every", "count"),
    "sigma": ("distribution", "shift", "mean", "std"),
    "validation": ("every", "batches"),
}
_SPARE = ("sigma.distribution", "sigma.shift", "sigma.mean", "sigma.std", "lora.init_from")
_SIGMA = ("uniform", "logit_normal")
# What the trainer reads of every configuration.
_NEEDED = (
    *("seed", "steps", "batch_size", "log_every", "save_every", "keep", "ema_decay", "optimizer", "mesh", "rules"),
    *(f"optimizer.{name}" for name in ("name", "learning_rate", "warmup", "decay", "b1", "b2", "eps", "weight_decay")),
    "optimizer.clip",
)


def check(path: Any, config: ml_collections.ConfigDict) -> None:
    """Raises `RefineError`, which names the file and the key, for a key that the objective does not know or that is
    missing from a group, and for a value out of range."""
    known = recipes.keys(config.objective)
    for name in recipes.named(config):
        if known and name not in known:
            raise RefineError(
                f"{path}: the objective {config.objective!r} has no key {name!r}; {_nearest(name, known)}"
            )
    if known and (missing := [name for name in _NEEDED if name not in recipes.named(config)]):
        raise RefineError(f"{path}: {', '.join(missing)}: missing; see the shipped ones in configs/")
    for group, keys in _GROUPS.items():
        found = config.get(group)
        if found is None:
            continue
        if not isinstance(found, Mapping | ml_collections.ConfigDict):
            raise RefineError(f"{path}: {group} {found!r}: give {', '.join(keys)}, as {group}=dict({keys[0]}=…)")
        for name in found:
            if name not in keys:
                raise RefineError(f"{path}: {group} has no key {name!r}; {_nearest(name, keys)}")
        for name in keys:
            if name not in found and f"{group}.{name}" not in _SPARE:
                raise RefineError(f"{path}: {group}.{name} is missing; give {', '.join(keys)}")
    for name, value in _leaves(config):
        if name in _WHOLE:
            limits.whole(f"{path}: {name}", value, _WHOLE[name])
        elif name in _NUMBERS:
            limits.number(f"{path}: {name}", value, _NUMBERS[name])
    distribution = (config.get("sigma") or {}).get("distribution", _SIGMA[0])
    if distribution not in _SIGMA:
        raise RefineError(f"{path}: sigma.distribution {distribution!r}: give {' or '.join(map(repr, _SIGMA))}")
    if distribution == "uniform" and {"mean", "std"} & set(config.get("sigma") or {}):
        raise RefineError(f"{path}: sigma.mean, sigma.std: are of distribution 'logit_normal'; take them out")
    traced = tuple(config.get("profile") or ())
    if traced:
        whole = all(isinstance(step, int) for step in traced)
        if len(traced) != 2 or not whole or not 2 <= traced[0] <= traced[1]:
            raise RefineError(f"{path}: profile {traced}: give (first, last) step, from the second on")


def check_batch(path: Any, config: ml_collections.ConfigDict) -> None:
    """Raises `RefineError` for a key that a configuration of `refine-jax batch` does not have, or one that is missing.

    variant, topology: of `tools/aot.py`.
    """
    known = set(recipes.batch())
    for name in config:
        if name not in known | {"variant", "topology"}:
            raise RefineError(f"{path}: a batch has no key {name!r}; {_nearest(name, known)}")
    if missing := sorted(known - set(config)):
        raise RefineError(f"{path}: {', '.join(missing)}: missing; start from refine_jax.recipes.batch()")


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]}?" if near else "take it out"


def _leaves(config: ml_collections.ConfigDict) -> Iterator[tuple[str, Any]]:
    """The settings of the top level and of groups, as "group.name"."""
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from ((f"{name}.{key}", part) for key, part in value.items())
        else:
            yield name, value
