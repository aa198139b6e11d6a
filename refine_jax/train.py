"""The trainer: one state, one jitted step, one loop, for every objective.

An objective (`refine_jax.objectives`) says what is trained: its initial variables, its loss, its batches and how its
result is written as a model folder. `train` below does the rest and reads from top to bottom.
"""

import importlib.util
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
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
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise RefineError(f"--config {str(path)!r}: defines no get_config()")
    config = module.get_config()
    for name, text in (overrides or {}).items():
        try:
            config[name]
        except (KeyError, AttributeError, TypeError):
            raise RefineError(f"--config.{name}: {path.name} has no such key") from None
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        try:
            with config.unlocked():
                config.update_from_flattened_dict({name: value})
        except (TypeError, ValueError) as error:
            raise RefineError(f"--config.{name}={text}: {error}") from None
    config.lock()
    return config


def make_schedule(config: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up to `config.learning_rate`, constant, then linear decay to zero over the last `config.decay`."""
    decay = int(config.decay * steps)
    warmup = min(int(config.warmup), max(1, steps - decay))
    parts = [optax.linear_schedule(0.0, config.learning_rate, warmup), optax.constant_schedule(config.learning_rate)]
    bounds = [warmup]
    if decay:
        parts.append(optax.linear_schedule(config.learning_rate, 0.0, decay))
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
                if "kernel" not in jax.tree_util.keystr(path) or leaf.ndim not in (2, 3, 4):
                    return None
                return optax.contrib.MuonDimensionNumbers((0, 1, 2) if leaf.ndim == 4 else leaf.ndim - 2, leaf.ndim - 1)

            return jax.tree_util.tree_map_with_path(dims, params)

        update = optax.contrib.muon(
            schedule,
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
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(workdir / "config.json", config.to_json_best_effort(indent=1) + "\n")
    mesh = parallel.make_mesh(dict(config.mesh))
    if config.batch_size % (mesh.shape["data"] * mesh.shape["fsdp"]):
        raise RefineError(f"batch_size {config.batch_size}: the mesh {dict(mesh.shape)} does not divide it")

    # ------------------------------------------------------------------ what
    objective = objectives.make(config)
    optimizer = make_optimizer(config.optimizer, config.steps)
    batches = objective.batches()

    # ------------------------------------------------------------------ state, declared before it is made
    def init(key: jax.Array) -> TrainState:
        params = meta.unbox(objective.init(key))
        ema = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)

    key = jax.random.key(config.seed)
    rules = tuple((name, axes) for name, axes in config.rules.items()) if config.rules else parallel.DEFAULT_RULES
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
        metrics = {"loss": loss, "grad_norm": optax.global_norm(grads), **parts}
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    # ------------------------------------------------------------------ restore: the run's own checkpoint, or scratch
    mngr = checkpoint.manager(workdir, config.keep, config.save_every)
    abstract = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, shardings)
    restored = checkpoint.restore_state(mngr, abstract)
    elapsed = 0.0
    if restored is None:
        with jax.set_mesh(mesh):
            state = jax.jit(init, out_shardings=shardings)(key)
    else:
        state, position = restored
        batches.set_state(position["iterator"])
        elapsed = position["elapsed"]
    first = int(state.step)

    # ------------------------------------------------------------------ the loop
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(shapes.params))
    bar = tqdm(total=config.steps, initial=first, unit="step", disable=not progress, desc=f"{count / 1e6:.2f}M")
    history = workdir / "metrics.jsonl"
    # What a killed run did after its last checkpoint is done again.
    kept = [line for line in history.read_text().splitlines() if json.loads(line)["step"] <= first] if first else []
    checkpoint.write_text(history, "".join(line + "\n" for line in kept))
    scalars = open(history, "a", encoding="utf-8")
    started, waited, recent = time.perf_counter(), 0.0, []

    def log(step: int) -> None:
        nonlocal recent, waited
        values = jax.device_get(recent)
        means = {k: float(np.mean([v[k] for v in values if k in v])) for k in values[-1]}
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(f"loss is {means['loss']} at step {step}; the last checkpoint in {workdir} is good")
        means |= {"step": step, "seconds": elapsed + time.perf_counter() - started, "data_wait": waited}
        scalars.write(json.dumps({k: round(v, 6) for k, v in means.items()}) + "\n")
        scalars.flush()
        bar.set_postfix({k: f"{v:.4g}" for k, v in means.items() if k in ("loss", "grad_norm")}, refresh=False)
        recent, waited = [], 0.0

    with jax.set_mesh(mesh):
        for step in range(first, config.steps):
            asked = time.perf_counter()
            batch = parallel.shard_batch(next(batches), mesh)
            waited += time.perf_counter() - asked
            state, metrics = step_fn(state, frozen, batch, key)
            recent.append(metrics)
            bar.update()
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                log(done)
            if done % config.save_every == 0 or done == config.steps:
                if recent:
                    log(done)  # a state whose loss is not finite is never saved
                position = {"iterator": batches.get_state(), "elapsed": elapsed + time.perf_counter() - started}
                checkpoint.save_state(mngr, done, state, position, force=True)
    bar.close()
    scalars.close()
    mngr.wait_until_finished()
    mngr.close()

    # ------------------------------------------------------------------ the result
    objective.export(jax.device_get(state.ema), objective.frozen, workdir / "model")
    return workdir / "model"

