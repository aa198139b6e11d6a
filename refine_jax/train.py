"""The trainer: one state, one jitted step, one loop, for every objective.

An objective (`refine_jax.objectives`) says what is trained: its initial variables, its loss, its batches and how its
result is written. `make_program` builds the step, `train` runs it; both read from top to bottom.
"""

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import linen as nn
from flax.linen import meta
from tqdm import tqdm

from refine_jax import checkpoint, configuration, memory, objectives, parallel, settings
from refine_jax.errors import Preempted, RefineError
from refine_jax.watch import Watch


@flax.struct.dataclass
class TrainState:
    """What a step reads and writes: `step` int32 [], the run's random key (its data, uint32), trained variables,
    optimizer state, their moving average (empty where `ema_decay` is 0)."""

    step: jax.Array
    key: jax.Array
    params: Any
    opt_state: Any
    ema: Any


def load_config(path: str | Path, overrides: dict[str, str] | None = None) -> ml_collections.ConfigDict:
    """`configuration.load`, of a training. Raises `RefineError` as it does, and as `settings.check`."""
    config = configuration.load(path, overrides)
    if "objective" not in config:
        raise RefineError(f"{path}: names no objective, so it is not of a training")
    settings.check(path, config)
    return config


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
        exclude = config.get("muon_exclude", "^$")

        def matrices(params):
            # A dense kernel is a matrix, a scanned one ([layers, in, out]) a stack of them, a convolution's
            # ([rows, columns, in, out]) maps a whole patch.
            def dims(path, leaf):
                name = jax.tree_util.keystr(path)
                if "kernel" not in name or re.search(exclude, name) or leaf.ndim not in (2, 3, 4):
                    return None
                return optax.contrib.MuonDimensionNumbers((0, 1, 2) if leaf.ndim == 4 else leaf.ndim - 2, leaf.ndim - 1)

            return jax.tree_util.tree_map_with_path(dims, params)

        update = optax.contrib.muon(
            schedule,
            adam_learning_rate=make_schedule(config, steps, config.get("adam_scale", 1.0)),
            ns_steps=config.get("muon_steps", 5),
            eps=config.eps,
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


# ------------------------------------------------------------------------------------------------------- the program


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled side of a run: what the loop calls, and what `tools/aot.py` compiles without a device.

    begin(params, key) -> state; step(state, frozen, batch) -> (state, scalars); measure(params, frozen, batch, draw) ->
    the scalars of the loss, with the noise of the number `draw`. rate(step) -> the learning rate of the update that
    makes it. state, frozen: `jax.ShapeDtypeStruct`s with their shardings. tensors: the names behind the scalar "bad",
    the index of the first tensor of a step that is not finite (-1: none).
    """

    mesh: jax.sharding.Mesh
    rules: parallel.Rules
    init: Callable[[jax.Array], Any]
    begin: Callable[[Any, jax.Array], TrainState]
    step: Callable[[TrainState, Any, Any], tuple[TrainState, dict]]
    measure: Callable[[Any, Any, Any, Any], dict]
    rate: Callable[[int], float]
    state: TrainState
    frozen: Any
    tensors: list[str]

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """The mesh and the sharding rules in force, for tracing and for running."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(self.rules):
            yield


def make_program(
    config: ml_collections.ConfigDict, objective: objectives.Objective, mesh: jax.sharding.Mesh
) -> Program:
    """The step of `config` on `mesh`. Raises `RefineError` for a batch that the mesh does not divide."""
    rules = parallel.make_rules(config.rules)
    accumulate = config.optimizer.get("accumulate", 1)
    parallel.check_batch(config.batch_size, mesh, accumulate)
    optimizer = make_optimizer(config.optimizer, config.steps)
    average, ramp = config.ema_decay > 0, config.get("ema_ramp", True)

    def begin(params: Any, key: jax.Array) -> TrainState:
        ema = jax.tree.map(jnp.copy, params) if average else {}
        return TrainState(jnp.zeros((), jnp.int32), jax.random.key_data(key), params, optimizer.init(params), ema)

    # ------------------------------------------------------------------ shapes and shardings, declared before any array
    key = jax.eval_shape(lambda: jax.random.key(0))
    boxed = jax.eval_shape(objective.init, key)
    params = meta.unbox(boxed)
    placed, whole = parallel.param_shardings(boxed, mesh, rules), parallel.replicated(mesh)
    shapes = jax.eval_shape(begin, params, key)
    shardings = TrainState(
        step=whole,
        key=whole,
        params=placed,
        opt_state=parallel.shardings_like(shapes.opt_state, params, placed, whole),
        ema=placed if average else {},
    )
    frozen = parallel.placed(meta.unbox(objective.frozen), parallel.param_shardings(objective.frozen, mesh, rules))
    tensors: list[str] = []

    # ------------------------------------------------------------------ the step
    def parts_of(batch: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        # Row i goes to part i mod `accumulate`: every device keeps its rows.
        batch = objective.share(batch, accumulate)
        split = lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0)
        return jax.tree.map(split, batch), jax.random.split(key, accumulate)

    def gradients(params: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[tuple[jax.Array, dict], Any]:
        gradient = jax.value_and_grad(objective.loss, has_aux=True)
        if accumulate == 1:
            return gradient(params, frozen, batch, key)
        parts = parts_of(batch, key)
        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, frozen, *first))

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, frozen, *part)), None

        total, _ = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda x: x / accumulate, total)

    options = parallel.compiler_options(mesh)

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, whole), compiler_options=options)
    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        (loss, parts), grads = gradients(state.params, frozen, batch, key)
        grads = jax.lax.with_sharding_constraint(grads, placed)  # left free they may come out whole on every device
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # A young average would remember random values for too long.
        decay = jnp.minimum(config.ema_decay, (1.0 + state.step) / (10.0 + state.step)) if ramp else config.ema_decay
        ema = jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), state.ema, params) if average else {}
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
        scalars = {"loss": loss, **norms, **parts}
        checked = {"batch": batch, "gradient": grads, "updated": params, "scalar": scalars}
        tensors[:], bad = _first_bad(checked)
        return TrainState(state.step + 1, state.key, params, opt_state, ema), {**scalars, "bad": bad}

    @partial(jax.jit, out_shardings=whole, compiler_options=options)
    def measure(params: Any, frozen: Any, batch: Any, draw: jax.Array) -> dict:
        def scalars(part: tuple[Any, jax.Array]) -> dict:
            loss, found = objective.loss(params, frozen, *part)
            return {"loss": loss, **found}

        found = jax.lax.map(scalars, parts_of(batch, jax.random.fold_in(jax.random.key(config.seed), draw)))
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), found)

    return Program(
        mesh=mesh,
        rules=rules,
        init=jax.jit(lambda key: meta.unbox(objective.init(key)), out_shardings=placed),
        begin=jax.jit(begin, donate_argnums=0, out_shardings=shardings),
        step=step,
        measure=measure,
        rate=lambda step: float(make_schedule(config.optimizer, config.steps)(step - 1)),
        state=parallel.placed(shapes, shardings),
        frozen=frozen,
        tensors=tensors,
    )


def _first_bad(groups: dict[str, Any]) -> tuple[list[str], jax.Array]:
    """(names of the floating tensors, index of the first that is not finite or -1)."""
    named = [
        ("/".join((group, jax.tree_util.keystr(path, simple=True, separator="/"))), leaf)
        for group, tree in groups.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    bad = jnp.stack([~jnp.all(jnp.isfinite(leaf)) for _, leaf in named])
    return [name for name, _ in named], jnp.where(jnp.any(bad), jnp.argmax(bad), -1).astype(jnp.int32)


# ---------------------------------------------------------------------------------------------------------- the loop


def train(config: ml_collections.ConfigDict, workdir: str | Path, progress: bool = True) -> Path:
    """Run or continue `config` in `workdir`; returns the folder of what was trained, `workdir/model`.

    Continues from the newest checkpoint under `workdir/checkpoints`, on whatever mesh and number of hosts. Writes
    `config.json`, scalars (`watch.Watch`) every `config.log_every` steps, checkpoints every `config.save_every` steps,
    and the result. Raises `RefineError` for a bad configuration, `FloatingPointError` for a tensor that is not finite
    (named; the last good checkpoint stays), and `Preempted` after SIGTERM, when the present step has been saved.
    """
    # ------------------------------------------------------------------ what, where, how
    workdir = Path(workdir)
    mesh = parallel.make_mesh(dict(config.mesh))
    parallel.check_batch(config.batch_size, mesh, config.optimizer.get("accumulate", 1))
    objective = objectives.make(config)
    program = make_program(config, objective, mesh)
    memory.check(
        (program.state, program.frozen),
        "config: weights, optimizer state and averages",
        "give a mesh of more devices, config.lora, ema_decay 0 or dtype bfloat16",
    )
    checkpoint.claim(workdir)

    with checkpoint.room(workdir), contextlib.ExitStack() as stack:
        batches = stack.enter_context(closing(objective.batches()))
        mngr = checkpoint.manager(workdir, config.keep, config.save_every, config.get("keep_every", 0))
        mngr = stack.enter_context(closing(mngr))
        preemption = stack.enter_context(checkpoint.Preemption())

        # -------------------------------------------------------------- the state: this run's, a model's, or scratch
        key, elapsed = jax.random.key(config.seed), 0.0
        restored = checkpoint.restore_state(mngr, program.state)
        if restored is not None:
            state, position = restored
            batches.set_state(position["iterator"])
            elapsed = position["elapsed"]
            for line in checkpoint.changes(position, _said(config)):
                tqdm.write(line, file=sys.stderr)
        else:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state.params)
            state = program.begin(objective.initial(shardings) if objective.initial else program.init(key), key)
        checkpoint.write_config(workdir, config)
        first = int(state.step)
        preemption.go_on_from(first)
        frozen = objective.load(jax.tree.map(lambda leaf: leaf.sharding, program.frozen))

        # -------------------------------------------------------------- the loop
        stack.enter_context(program.context())
        watch = Watch(workdir, config, program, objective, batches, first, elapsed, progress)
        stack.enter_context(closing(watch))

        def save(step: int) -> None:
            position = {"iterator": batches.get_state(), "elapsed": watch.elapsed(), **_said(config)}
            checkpoint.save_state(mngr, step, state, position, force=True)

        watch.validate(first, state.ema or state.params, frozen)
        for done in range(first + 1, config.steps + 1):
            with watch.waiting():
                batch = parallel.shard_batch(next(batches), mesh, config.batch_size)
            state, metrics = program.step(state, frozen, batch)
            watch.step(done, batch, metrics)
            stop = preemption.reached(done)
            due = stop or done == config.steps or done % config.save_every == 0
            if due or done % config.log_every == 0:
                try:
                    watch.log(done)  # raises where a tensor is not finite: such a state is never saved
                except FloatingPointError as error:
                    kept = mngr.latest_step()
                    remedy = f"the checkpoint of step {kept} is kept" if kept else "no checkpoint was kept"
                    raise FloatingPointError(f"{error}; {remedy}; lower the learning rate") from None
            if due:
                save(done)
            if due and objective.adapts:
                if done < config.steps:
                    objective.export(state.ema or state.params, frozen, workdir / "adapters" / f"{done:08d}")
                checkpoint.keep_folders(workdir / "adapters", {done, *mngr.all_steps()})
            if stop:
                checkpoint.finish(mngr)
                raise Preempted(f"saved at step {done} of {config.steps}")
            watch.validate(done, state.ema or state.params, frozen)
            watch.pictures(done, state.ema or state.params, frozen)
        checkpoint.finish(mngr)

    # ------------------------------------------------------------------ the result
    with checkpoint.room(workdir):
        objective.export(state.ema or state.params, frozen, workdir / "model")
    return workdir / "model"


def _said(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What decides the order of samples besides the position; the mesh; and under "settings" the rest."""
    kept = ("seed", "batch_size", "data", "mesh")
    every = json.loads(config.to_json_best_effort())
    found = {name: every.pop(name) for name in kept if name in every}
    found["settings"] = every
    if found.get("data", {}).get("source") == "cache":  # it has its own
        found["data"].pop("reference_buckets", None)
    return found
