"""The trainer: one state, one jitted step, one loop, for every objective.

An objective (`refine_jax.objectives`) says what is trained: its initial variables, its loss, its batches and how its
result is written as a model folder. `train` below does the rest and reads from top to bottom.
"""

import ast
import importlib.util
import json
import math
import re
import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import linen as nn
from flax.linen import meta
from tqdm import tqdm

from refine_jax import checkpoint, objectives, parallel
from refine_jax.errors import RefineError


@flax.struct.dataclass
class TrainState:
    """What a step reads and writes: `step` int32 [], trained variables, optimizer state, their moving average."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any


def load_config(path: str | Path, overrides: dict[str, str] | None = None) -> ml_collections.ConfigDict:
    """The configuration that `get_config()` of a Python file returns, with `overrides` ("a.b": "value") applied.

    Raises `RefineError` naming the file for a missing file, an unknown key or a value of another type.
    """
    path = Path(path)
    if not path.is_file():
        raise RefineError(f"--config {str(path)!r}: no such file; the shipped ones are in configs/")
    spec = importlib.util.spec_from_file_location("refine_jax_config", path)
    if spec is None or spec.loader is None:
        raise RefineError(f"--config {str(path)!r}: not a Python file; the shipped ones are in configs/")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a configuration is the user's code
        raise RefineError(f"--config {str(path)!r}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not hasattr(module, "get_config"):
        raise RefineError(f"--config {str(path)!r}: defines no get_config(); see the shipped ones in configs/")
    config = module.get_config()
    for name, text in (overrides or {}).items():
        _override(config, name, text, path.name)
    for name in ("steps", "batch_size", "log_every", "save_every", "keep"):
        if config[name] < 1:
            raise RefineError(f"--config.{name}={config[name]}: give a whole number of at least 1")
    config.lock()
    return config


def _override(config: ml_collections.ConfigDict, name: str, text: str, file: str) -> None:
    """Set the key `name` ("a.b.c") to what `text` says: a JSON or Python value of the old value's type."""
    *above, last = name.split(".")
    group = config
    try:
        for part in above:
            group = group[part]
        # Mesh axes and sharding rules have defaults that a file need not repeat.
        old = group.get(last) if above in (["mesh"], ["rules"]) else group[last]
    except (KeyError, AttributeError, TypeError):
        raise RefineError(f"--config.{name}: {file} has no such key") from None
    value = text
    if not isinstance(old, str):
        for read in (json.loads, ast.literal_eval):
            try:
                value = read(text)
                break
            except (ValueError, SyntaxError, RecursionError):
                pass
    value = _tuples(value)
    kind = type(old).__name__
    if isinstance(old, ml_collections.ConfigDict):
        fits, kind = isinstance(value, dict), "dict"
    elif isinstance(old, (tuple, list)):
        fits = isinstance(value, (tuple, list))
    elif isinstance(old, float):
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        value = float(value) if fits else value
    else:
        fits = old is None or type(value) is type(old)
    if not fits:
        raise RefineError(f"--config.{name}={text}: a {kind} is wanted, this is a {type(value).__name__}")
    with config.unlocked():
        group[last] = ml_collections.ConfigDict(value) if isinstance(value, dict) else value


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def make_schedule(config: ml_collections.ConfigDict, steps: int, scale: float = 1.0) -> optax.Schedule:
    """Linear warm-up to `scale·config.learning_rate`, constant, then linear decay to 0 over the last `config.decay`."""
    peak = scale * config.learning_rate
    decay = int(config.decay * steps)
    warmup = min(int(config.warmup), max(1, steps - decay))
    parts = [optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak)]
    bounds = [warmup]
    if decay:
        parts.append(optax.linear_schedule(peak, 0.0, decay))
        bounds.append(steps - decay)
    return optax.join_schedules(parts, bounds)


def make_optimizer(config: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then AdamW, or Muon for the matrices and AdamW for the rest."""
    schedule = make_schedule(config, steps)
    adam = dict(b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay)
    if config.name == "adamw":
        update = optax.adamw(schedule, **adam)
    elif config.name == "muon":

        def matrices(params):
            # A dense kernel is a matrix, a scanned one ([layers, in, out]) a stack of them, a convolution's
            # ([rows, columns, in, out]) maps a whole patch.
            def dims(path, leaf):
                name = jax.tree_util.keystr(path)
                if "kernel" not in name or re.search(config.muon_exclude, name) or leaf.ndim not in (2, 3, 4):
                    return None
                return optax.contrib.MuonDimensionNumbers((0, 1, 2) if leaf.ndim == 4 else leaf.ndim - 2, leaf.ndim - 1)

            return jax.tree_util.tree_map_with_path(dims, params)

        update = optax.contrib.muon(
            schedule,
            adam_learning_rate=make_schedule(config, steps, config.adam_scale),
            ns_steps=config.muon_steps,
            preconditioning="aol",
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,
        )
    else:
        raise RefineError(f"optimizer.name {config.name!r}: choose 'adamw' or 'muon'")
    return optax.chain(optax.clip_by_global_norm(config.clip), update)


def train(config: ml_collections.ConfigDict, workdir: str | Path, progress: bool = True) -> Path:
    """Run or continue `config` in `workdir`; returns the model folder that was written at the end.

    Continues from the newest checkpoint under `workdir/checkpoints`. Writes `config.json`, one line of scalars to
    `metrics.jsonl` every `config.log_every` steps, checkpoints every `config.save_every` steps, and the model folder
    `workdir/model`. Raises `RefineError` for a bad configuration and `FloatingPointError` for a loss that is not
    finite (the last good checkpoint stays).
    """
    # ------------------------------------------------------------------ where
    workdir = Path(workdir)
    mesh = parallel.make_mesh(dict(config.mesh))
    rules = parallel.make_rules(config.rules)
    if config.batch_size % (mesh.shape["data"] * mesh.shape["fsdp"]):
        raise RefineError(f"batch_size {config.batch_size}: the mesh {dict(mesh.shape)} does not divide it")

    # ------------------------------------------------------------------ what
    objective = objectives.make(config)
    optimizer = make_optimizer(config.optimizer, config.steps)
    batches = objective.batches()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(workdir / "config.json", config.to_json_best_effort(indent=1) + "\n")
    except OSError as error:
        raise RefineError(
            f"--workdir {str(workdir)!r}: cannot be written ({error.strerror}); give another folder"
        ) from None

    # ------------------------------------------------------------------ state, declared before it is made
    def init(key: jax.Array) -> TrainState:
        params = meta.unbox(objective.init(key))
        ema = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)

    key = jax.random.key(config.seed)
    placed = parallel.param_shardings(jax.eval_shape(objective.init, key), mesh, rules)
    shapes = jax.eval_shape(init, key)
    whole = parallel.replicated(mesh)
    shardings = TrainState(
        step=whole,
        params=placed,
        opt_state=parallel.shardings_like(shapes.opt_state, shapes.params, placed, whole),
        ema=placed,
    )
    frozen = jax.device_put(objective.frozen, whole)

    # ------------------------------------------------------------------ the step
    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, whole))
    def step_fn(state: TrainState, frozen: Any, batch: dict, key: jax.Array) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(key, state.step)
        (loss, parts), grads = jax.value_and_grad(objective.loss, has_aux=True)(state.params, frozen, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # A young average would remember the initial values for too long.
        decay = jnp.minimum(config.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), state.ema, params)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **parts}
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    norm = jax.jit(optax.tree.norm)

    with ExitStack() as stack:
        # -------------------------------------------------------------- restore: the run's own checkpoint, or scratch
        stack.enter_context(closing(batches))
        mngr = stack.enter_context(closing(checkpoint.manager(workdir, config.keep, config.save_every)))
        abstract = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, shardings)
        restored = checkpoint.restore_state(mngr, abstract)
        stack.enter_context(jax.set_mesh(mesh))
        elapsed = 0.0
        if restored is None:
            state = jax.jit(init, out_shardings=shardings)(key)
        else:
            state, position = restored
            batches.set_state(position["iterator"])
            elapsed = position["elapsed"]
        first = int(state.step)

        # -------------------------------------------------------------- the loop
        stack.enter_context(nn.logical_axis_rules(rules))
        count = sum(math.prod(p.shape) for p in jax.tree.leaves(shapes.params))
        bar = tqdm(total=config.steps, initial=first, unit="step", disable=not progress, desc=f"{count / 1e6:.2f}M")
        stack.enter_context(bar)
        history = workdir / "metrics.jsonl"
        checkpoint.write_text(history, "".join(line + "\n" for line in _lines(history, first)))
        scalars = stack.enter_context(open(history, "a", encoding="utf-8"))
        started, waited, recent = time.perf_counter(), 0.0, []

        def fail(step: int, what: str, value: float) -> None:
            kept = mngr.latest_step()
            remedy = f"the checkpoint of step {kept} is kept" if kept else "no checkpoint was kept"
            raise FloatingPointError(f"{what} is {value} at step {step}; {remedy}; lower the learning rate")

        def log(step: int) -> None:
            nonlocal recent, waited
            values = jax.device_get(recent)
            means = {k: float(np.mean([v[k] for v in values if k in v])) for k in values[-1]}
            if not math.isfinite(means["loss"]):
                fail(step, "loss", means["loss"])
            means |= {"step": step, "seconds": elapsed + time.perf_counter() - started, "data_wait": waited}
            scalars.write(json.dumps({k: round(v, 6) if math.isfinite(v) else None for k, v in means.items()}) + "\n")
            scalars.flush()
            bar.set_postfix({k: f"{v:.4g}" for k, v in means.items() if k in ("loss", "grad_norm")}, refresh=False)
            recent, waited = [], 0.0

        for step in range(first, config.steps):
            asked = time.perf_counter()
            batch = parallel.shard_batch(next(batches), mesh)
            waited += time.perf_counter() - asked
            state, metrics = step_fn(state, frozen, batch, key)
            recent.append(metrics)
            bar.update()
            done = step + 1
            save = done % config.save_every == 0 or done == config.steps
            if save or done % config.log_every == 0:
                log(done)
            if save:
                # A state that is not finite is never saved: neither what the loss saw, nor what the step made of it.
                size = float(norm(state.params))
                if not math.isfinite(size):
                    fail(done, "the parameters' norm", size)
                position = {"iterator": batches.get_state(), "elapsed": elapsed + time.perf_counter() - started}
                checkpoint.save_state(mngr, done, state, position, force=True)

    # ------------------------------------------------------------------ the result
    objective.export(jax.device_get(state.ema), objective.frozen, workdir / "model")
    return workdir / "model"


def _lines(history: Path, last: int) -> list[str]:
    """The lines of scalars up to step `last`: what a killed run did after its last checkpoint is done again."""
    lines = []
    for line in history.read_text(encoding="utf-8").splitlines() if last and history.is_file() else []:
        try:
            if json.loads(line)["step"] <= last:
                lines.append(line)
        except (ValueError, KeyError, TypeError):  # cut off when the run was killed
            continue
    return lines
