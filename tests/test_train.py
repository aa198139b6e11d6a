"""The trainer: configurations, overrides, interruption and resumption, divergence, and both objectives end to end."""

import contextlib
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
import pytest
import records_toy
import toy
from flax import linen as nn
from flax.linen import meta
from PIL import Image
from safetensors.numpy import load_file

from refine_jax import checkpoint, cli, configuration, flops, objectives, parallel, settings
from refine_jax.data import records
from refine_jax.errors import RefineError
from refine_jax.refine import Refiner
from refine_jax.train import load_config, make_optimizer, make_program, make_schedule, train

GOLDEN = Path(__file__).parent / "golden"


# ------------------------------------------------------------------------------------------------------- configurations


def flat(config: ml_collections.ConfigDict) -> str:
    """One line `key = value` for each leaf, sorted; an empty dict is a leaf."""

    def leaves(node, prefix):
        for name, value in node.items():
            if isinstance(value, ml_collections.ConfigDict) and len(value):
                yield from leaves(value, f"{prefix}{name}.")
            else:
                shown = value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value
                yield f"{prefix}{name} = {shown!r}"

    return "\n".join(sorted(leaves(config, ""))) + "\n"


@pytest.mark.parametrize("path", sorted(toy.CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_resolved_configurations_are_golden(path):
    golden = GOLDEN / f"{path.stem}.txt"
    found = golden.read_text(encoding="utf-8") if golden.is_file() else ""
    assert flat(configuration.load(path)) == found, "a change that is meant: python tests/test_train.py"


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "some.py"
    path.write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    c = ml_collections.ConfigDict(dict(steps=3, batch_size=2, log_every=1, save_every=2, keep=1))\n"
        "    c.update(dict(name='x', rate=0.5, flag=False, none=None, sizes=((1, 2), (3, 4))))\n"
        "    c.objective, c.seed = 'fake', 0\n"
        "    c.ema_decay = 0.9\n"
        "    c.optimizer = dict(name='adamw', learning_rate=0.1, warmup=1, decay=0.0, b1=0.9, b2=0.99, eps=1e-8,\n"
        "                       weight_decay=0.0, clip=1.0)\n"
        "    c.mesh, c.rules = dict(data=-1), {}\n"
        "    return c\n"
    )
    return path


@pytest.mark.parametrize(
    "name,text,value",
    [
        ("steps", "7", 7),
        ("rate", "3e-4", 3e-4),
        ("rate", "2", 2.0),
        ("name", "yes", "yes"),
        ("name", "12", "12"),
        ("flag", "true", True),
        ("flag", "True", True),
        ("none", "5", 5),
        ("sizes", "[[5, 6]]", ((5, 6),)),
        ("sizes", "((5, 6), (7, 8))", ((5, 6), (7, 8))),
        ("optimizer.learning_rate", "0.25", 0.25),
        ("optimizer.name", "muon", "muon"),
        ("mesh.fsdp", "2", 2),
        ("rules.embed", "null", None),
        # keys that this file does not have and another one may
        ("keep_every", "50", 50),
        ("optimizer.accumulate", "2", 2),
        ("lora", "null", None),
        ("profile", "[3, 5]", (3, 5)),
    ],
)
def test_overrides(config_file, name, text, value):
    config = load_config(config_file, {name: text})
    for part in name.split("."):
        config = config[part]
    assert config == value and type(config) is type(value)


def test_a_group_is_overridden_as_a_whole(config_file):
    assert load_config(config_file, {"mesh": '{"data": 1, "fsdp": 1}'}).mesh.to_dict() == {"data": 1, "fsdp": 1}


@pytest.mark.parametrize(
    "name,text,words",
    [
        ("stepz", "3", ("stepz", "some.py", "no such key")),
        ("optimizer.rate", "3", ("optimizer.rate", "no such key")),
        ("steps.x", "3", ("steps.x", "no such key")),
        ("steps", "many", ("steps=many", "int", "str")),
        ("steps", "1.5", ("int", "float")),
        ("steps", "true", ("int", "bool")),
        ("rate", "fast", ("float", "str")),
        ("flag", "1", ("bool", "int")),
        ("sizes", "3", ("tuple", "int")),
        ("optimizer", "adamw", ("dict", "str")),
        ("optimizer", "null", ("dict", "NoneType")),
        ("keep_every", "often", ("int", "str")),
        ("steps", "0", ("some.py: steps 0", "whole number from 1")),
        ("save_every", "-1", ("save_every -1", "whole number from 1")),
        ("profile", "[1, 3]", ("profile (1, 3)", "from the second on")),
        ("profile", "[5, 3]", ("profile (5, 3)", "from the second on")),
        ("lora", '{"rank": 4}', ("lora.alpha is missing", "rank, alpha, targets")),
        ("lora", '{"rank": 0, "alpha": 1.0, "targets": "x"}', ("lora.rank 0", "from 1")),
        ("lora", '{"rank": 4, "alpha": 1.0, "target": "x"}', ("lora has no key 'target'", "did you mean targets?")),
        ("pictures", '{"every": 5, "count": 0}', ("pictures.count 0", "from 1")),
    ],
)
def test_bad_overrides(config_file, name, text, words):
    with pytest.raises(RefineError) as error:
        load_config(config_file, {name: text})
    for word in words:
        assert word in str(error.value), error.value


def test_where_the_logit_normal_lies_may_be_said(tmp_path):
    given = dict(distribution="logit_normal", mean=0.5, std=1.5, shift=2.0)
    path = tmp_path / "some.py"
    path.write_text((toy.CONFIGS / "edit_debug.py").read_text().replace("boundary=", f"sigma={given}, boundary="))
    assert load_config(path).sigma.to_dict() == given


@pytest.mark.parametrize(
    "line,words",
    [
        ("c.pictuers = dict(every=5, count=2)", ("pictuers", "did you mean pictures?")),
        ("c.data.margin_jiter = 0.1", ("'data.margin_jiter'", "did you mean data.margin_jitter?")),
        ("c.qqq = 1", ("'qqq'", "take it out")),
        ("c.sigma.shfit = 2.0", ("sigma has no key 'shfit'", "did you mean shift?")),
        ("c.sigma.std = -1.0", ("sigma.std -1.0", "from 0 to 100")),
        ("c.sigma.distribution = 'normal'", ("sigma.distribution 'normal'", "'logit_normal'")),
        ("c.optimizer.learning_rate = float('nan')", ("optimizer.learning_rate nan", "at least 0")),
        ("c.optimizer.learning_rate = -1e-3", ("optimizer.learning_rate -0.001", "at least 0")),
        ("c.optimizer.clip = 0.0", ("optimizer.clip 0", "at least 1e-12")),
        ("c.optimizer.decay = 2.0", ("optimizer.decay 2.0", "from 0 to 1")),
        ("c.optimizer.warmup = -5", ("optimizer.warmup -5", "from 0")),
        ("c.ema_decay = 1.5", ("ema_decay 1.5", "from 0 to 1")),
        ("c.instruction_dropout = 2.0", ("instruction_dropout 2.0", "from 0 to 1")),
        ("c.boundary = dict(r_in=1, r_out=1, alpha=-1.0)", ("boundary.alpha -1", "at least 0")),
        ("c.boundary = dict(r_in=1, r_out=1, alpha=1.0, r=2)", ("boundary has no key 'r'",)),
        ("c.alignment = dict(block=1)", ("alignment.weight is missing",)),
        ("c.data.workers = -1", ("data.workers -1", "from 0")),
        ("c.seed = -1", ("seed -1", "from 0")),
        ("del c.objective", ("not of a training",)),
        ("del c.keep; del c.optimizer.decay", ("keep, optimizer.decay: missing",)),
        ("c.sigma.mean = 1.0", ("sigma.mean", "logit_normal")),
        ("c.objective = 'vae'; c.lora = dict(rank=1, alpha=1.0, targets='')", ("'vae' has no key",)),
    ],
)
def test_bad_settings_in_a_file(tmp_path, line, words):
    path = tmp_path / "some.py"
    text = "from refine_jax import recipes\ndef get_config():\n    c = recipes.small_world()\n    {}\n    return c\n"
    path.write_text(text.format(line))
    with pytest.raises(RefineError) as error:
        load_config(path)
    for word in ("some.py", *words):
        assert word in str(error.value), error.value


@pytest.mark.parametrize("path", sorted(toy.CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_shipped_configurations_say_what_is_read(path):
    if path.stem.startswith("batch"):
        return settings.check_batch(path, configuration.load(path))
    config = load_config(path)
    if config.objective != "vae":  # Muon needs nothing that AdamW does not
        config = load_config(path, {"optimizer.name": "muon"})
    make_optimizer(config.optimizer, config.steps)
    unread = {"vae": {"lora": "{'rank': 1}", "prompt": "x"}, "bagel": {"scan": "True", "data.pairs": "x"}}
    for name, value in unread.get(config.objective, {}).items():
        with pytest.raises(RefineError, match=f"the objective '{config.objective}' has no key '{name}'"):
            load_config(path, {name: value})


def test_a_batch_that_does_not_divide_is_said_before_a_model_is_looked_for(tmp_path):
    config = load_config(toy.CONFIGS / "edit_2511_1xh100.py", {"batch_size": "3", "init_from": "no/such"})
    with pytest.raises(RefineError, match="batch_size 3"):
        train(config, tmp_path, progress=False)


def test_bad_config_files(tmp_path):
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    (tmp_path / "none.py").write_text("x = 1\n")
    (tmp_path / "text.txt").write_text("x = 1\n")
    for name in ("missing.py", "broken.py", "none.py", "text.txt", "."):
        with pytest.raises(RefineError) as error:
            load_config(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_schedule():
    config = ml_collections.ConfigDict(dict(learning_rate=1.0, warmup=4, decay=0.5))
    rates = [float(make_schedule(config, 20)(k)) for k in range(21)]
    np.testing.assert_allclose(rates[:5], [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(rates[4:11], 1)
    np.testing.assert_allclose(rates[10:], np.linspace(1, 0, 11), atol=1e-6)


def test_unknown_optimizer_and_objective(tmp_path):
    config = toy.vae_config()
    with pytest.raises(RefineError, match="'sgd'.*'adamw' or 'muon'"):
        make_optimizer(ml_collections.ConfigDict({**config.optimizer.to_dict(), "name": "sgd"}), 10)
    config.objective = "other"
    with pytest.raises(RefineError, match="'other'.*vae, refine"):
        objectives.make(config)
    config = toy.vae_config()
    config.vae.depth = 3
    with pytest.raises(RefineError, match="depth"):
        objectives.make(config)
    with pytest.raises(RefineError, match="no refine_jax.json"):
        objectives.make(toy.refine_config(tmp_path))


# ---------------------------------------------------------------------- the loop, on an objective that compiles at once


class Numbers:
    """Batches of numbers that depend on the position alone; `fail_at` raises KeyboardInterrupt there."""

    def __init__(self, fail_at=None, scale_at=None):
        self.step, self.fail_at, self.scale_at, self.closed = 0, fail_at, scale_at, False

    def __next__(self):
        if self.step == self.fail_at:
            raise KeyboardInterrupt
        x = np.random.default_rng(self.step).standard_normal((2, 3)).astype(np.float32)
        self.step += 1
        return {"x": x * np.float32(np.nan) if self.step == self.scale_at else x}

    def get_state(self):
        return {"step": self.step}

    def set_state(self, state):
        self.step = state["step"]

    def close(self):
        self.closed = True


def linear(monkeypatch, numbers: Numbers) -> Numbers:
    """Makes `objectives.make` give a linear regression on `numbers`."""

    def init(key):
        make = nn.with_logical_partitioning(lambda k: jax.random.normal(k, (3, 2)), ("embed", "mlp"))
        return {"net": {"kernel": make(key)}}

    def loss(params, frozen, batch, key):
        y = batch["x"] @ params["net"]["kernel"] + 0.01 * jax.random.normal(key, (2, 2))
        return jnp.mean(jnp.square(y - 1.0)), {"size": jnp.mean(jnp.abs(y))}

    def export(params, frozen, folder):
        checkpoint.save_model(folder, {}, params)

    parts = dict(init=init, loss=loss, batches=lambda: numbers, export=export, held_out=Numbers)
    monkeypatch.setattr(objectives, "make", lambda config: objectives.Objective(**parts))
    monkeypatch.setattr("refine_jax.train.make_program", make_program)  # no other objective's (`cache`)
    return numbers


def final(workdir: Path) -> tuple[int, dict, list[dict]]:
    """(newest step, its state as numpy, the metrics without timings)."""
    with ocp.CheckpointManager(workdir.absolute() / "checkpoints") as manager:
        step = manager.latest_step()
        restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timings = ("seconds", "data_wait", "images_per_second")
    return step, restored["state"], [{k: v for k, v in line.items() if k not in timings} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    """Step, params, optimizer state, average and metrics are bit-identical."""
    (step, state, metrics), (other_step, other_state, other_metrics) = final(a), final(b)
    assert step == other_step and metrics == other_metrics
    assert jax.tree.structure(state) == jax.tree.structure(other_state)
    assert len(jax.tree.leaves(state)) > 4
    jax.tree.map(np.testing.assert_array_equal, state, other_state)


def toy_loop(steps: int = 4, **changes) -> ml_collections.ConfigDict:
    config = toy.vae_config()
    config.steps = steps
    config.update(changes)
    return config


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_and_resumed_equals_straight(tmp_path, monkeypatch, optimizer):
    config = toy_loop(5)
    config.optimizer.name = optimizer
    numbers = linear(monkeypatch, Numbers())
    train(config, tmp_path / "straight", progress=False)
    assert numbers.closed
    linear(monkeypatch, Numbers(fail_at=3))  # after the checkpoint of step 2
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "killed", progress=False)
    assert not (tmp_path / "killed" / "model").exists()
    # What a kill -9 may leave: a checkpoint half written, a line of metrics cut off.
    half = tmp_path / "killed" / "checkpoints" / "4.orbax-checkpoint-tmp-17"
    half.mkdir()
    (half / "state").mkdir()
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as metrics:
        metrics.write('{"loss": 0.1, "st')
    linear(monkeypatch, Numbers())
    assert train(config, tmp_path / "killed", progress=False) == tmp_path / "killed" / "model"
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    # A finished run does nothing but write its model again.
    train(config, tmp_path / "killed", progress=False)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_divergence_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, config_file, capsys):
    linear(monkeypatch, Numbers(scale_at=3))
    command = ["train", "--quiet", "--config", str(config_file), "--workdir", str(tmp_path / "run")]
    assert cli.main([*command, "--config.steps=6"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "batch/x is not finite at step 3" in error and "step 2" in error, error
    step, state, metrics = final(tmp_path / "run")
    assert step == 2 and all(np.isfinite(x).all() for x in jax.tree.leaves(state)) and len(metrics) == 2
    assert not (tmp_path / "run" / "model").exists()


def test_a_step_that_throws_the_parameters_away_is_not_saved(tmp_path, monkeypatch, config_file, capsys):
    linear(monkeypatch, Numbers())
    command = ["train", "--quiet", "--config", str(config_file), "--workdir", str(tmp_path / "run")]
    changes = ["--config.optimizer.learning_rate=1e30", "--config.log_every=50", "--config.optimizer.warmup=0"]
    assert cli.main([*command, *changes, "--config.save_every=1"]) == 1
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and "scalar/param_norm is not finite at step 1" in error
        and "no checkpoint was kept" in error
    ), error
    assert final_steps(tmp_path / "run") == []


def final_steps(workdir: Path) -> list[int]:
    with ocp.CheckpointManager(workdir.absolute() / "checkpoints") as manager:
        return list(manager.all_steps())


def test_a_checkpoint_of_another_shape_is_refused(tmp_path, monkeypatch):
    linear(monkeypatch, Numbers())
    train(toy_loop(2), tmp_path / "run", progress=False)
    kept = (tmp_path / "run" / "config.json").read_text()
    other = toy_loop(4)
    other.optimizer.name = "muon"
    with pytest.raises(RefineError) as error:
        train(other, tmp_path / "run", progress=False)
    assert "does not fit this configuration" in str(error.value) and "\n" not in str(error.value)
    assert final(tmp_path / "run")[0] == 2 and (tmp_path / "run" / "config.json").read_text() == kept


def test_sigterm_saves_the_present_step(tmp_path, monkeypatch, config_file, capsys):
    class Terminated(Numbers):
        def __next__(self):
            if self.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    command = ["train", "--quiet", "--config", str(config_file), "--config.steps=5", "--config.save_every=4"]
    linear(monkeypatch, Numbers())
    assert cli.main([*command, "--workdir", str(tmp_path / "straight")]) == 0
    numbers = linear(monkeypatch, Terminated())
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main([*command, "--workdir", str(tmp_path / "run")]) == 75
    assert signal.getsignal(signal.SIGTERM) is before and numbers.closed and numbers.step == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "saved at step 3 of 5" in error
    assert final_steps(tmp_path / "run") == [3] and not (tmp_path / "run" / "model").exists()
    numbers = linear(monkeypatch, Numbers())
    assert cli.main([*command, "--workdir", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, monkeypatch):
    def quiet(objective):
        loss = lambda params, frozen, batch, key: (jnp.mean(jnp.square(batch["x"] @ params["net"]["kernel"] - 1.0)), {})
        return dataclasses.replace(objective, loss=loss)

    linear(monkeypatch, Numbers())
    objective = quiet(objectives.make(None))
    batch = {"x": np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)}
    found = {}
    for parts in (1, 3):
        config = toy_loop(batch_size=6)
        config.optimizer.accumulate = parts
        program = make_program(config, objective, parallel.make_mesh({}, jax.devices()[:1]))
        with program.context():
            state = program.begin(program.init(jax.random.key(0)), jax.random.key(1))
            found[parts] = program.step(state, {}, batch)[1]
    for name in ("loss", "grad_norm", "param_norm"):
        np.testing.assert_allclose(found[1][name], found[3][name], rtol=1e-6)
    with pytest.raises(RefineError, match="batch_size 6: .*in 4 parts.*multiple of 4"):
        config.optimizer.accumulate = 4
        make_program(config, objective, parallel.make_mesh({}, jax.devices()[:1]))


def test_what_a_resumption_changes_is_said(tmp_path, monkeypatch, capsys):
    linear(monkeypatch, Numbers())
    train(toy_loop(2), tmp_path / "run", progress=False)
    assert capsys.readouterr().err == ""
    linear(monkeypatch, Numbers())
    train(toy_loop(3, seed=5, keep_every=2), tmp_path / "run", progress=False)
    said = capsys.readouterr().err
    assert "another seed: the order of samples changes" in said and "another steps: 3, saved with 2" in said
    assert "keep_every" not in said
    config = toy_loop(4, seed=5)
    config.optimizer.learning_rate, config.prompt = 0.25, "other"
    linear(monkeypatch, Numbers())
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(RefineError, match="another prompt: 'other', saved with None"):
        train(config, tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "config.json").read_text() == before
    config.prompt = ""
    linear(monkeypatch, Numbers())
    train(config, tmp_path / "run", progress=False)
    assert "another optimizer.learning_rate: 0.25, saved with" in capsys.readouterr().err
    # The noise is the run's: its key was saved.
    assert final(tmp_path / "run")[1]["key"].tolist() == jax.random.key_data(jax.random.key(0)).tolist()


def test_scalars_step_times_and_a_profile(tmp_path, monkeypatch, capsys):
    linear(monkeypatch, Numbers())
    train(toy_loop(5, log_every=2, profile=(2, 3)), tmp_path / "run", progress=False)
    assert "steps 2 to 3 profiled" in capsys.readouterr().err
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5] and all(line["images_per_second"] > 0 for line in lines)
    rate = make_schedule(toy_loop(5).optimizer, 5)
    assert [line["learning_rate"] for line in lines] == pytest.approx([float(rate(k)) for k in (1, 3, 4)], rel=1e-6)
    (events,) = (tmp_path / "run" / "tensorboard").glob("events*")
    written = events.read_bytes()
    assert all(name in written for name in (b"loss", b"grad_norm", b"size", b"data_wait", b"step_seconds"))
    linear(monkeypatch, Numbers())
    train(toy_loop(3, log_every=1), tmp_path / "often", progress=False)
    (events,) = (tmp_path / "often" / "tensorboard").glob("events*")
    assert events.read_bytes().count(b"step_seconds") == 2  # all but the first, which compiles


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_on_held_out_batches(tmp_path, monkeypatch, capsys, accumulate):
    """Before the first step and then every so many, with the same draws; a resumed run tells the same."""
    lines = lambda run: [json.loads(line) for line in (tmp_path / run / "validation.jsonl").read_text().splitlines()]
    config = toy_loop(5, validation=dict(every=2, batches=3), ema_decay=0.0)
    config.optimizer.accumulate = accumulate
    if accumulate == 2:
        config.batch_size = 4
        monkeypatch.setattr(Numbers, "__next__", lambda self: {"x": np.ones((4, 3), np.float32)})
    linear(monkeypatch, Numbers())
    train(config, tmp_path / "straight", progress=False)
    assert [line["step"] for line in lines("straight")] == [0, 2, 4]
    assert "held out, step 4: loss " in capsys.readouterr().err
    (events,) = (tmp_path / "straight" / "tensorboard").glob("events*")
    assert b"held_out/loss" in events.read_bytes() and b"held_out/size" in events.read_bytes()
    assert len({line["loss"] for line in lines("straight")}) == 3
    if accumulate == 1:  # of the initial weights and the first three batches, but for noise of 0.01
        kernel = np.asarray(jax.random.normal(jax.random.key(config.seed), (3, 2)))
        batches = Numbers()
        expected = np.mean([np.mean((next(batches)["x"] @ kernel - 1) ** 2) for _ in range(3)])
        assert lines("straight")[0]["loss"] == pytest.approx(expected, rel=0.02)
        for at in (2, 3):  # at 2 the checkpoint of step 2 stands
            linear(monkeypatch, Numbers(fail_at=at))
            with pytest.raises(KeyboardInterrupt):
                train(config, tmp_path / "killed", progress=False)
            kept = [line for line in (tmp_path / "killed" / "validation.jsonl").open() if '"step": 2,' not in line]
            (tmp_path / "killed" / "validation.jsonl").write_text("".join(kept))  # as if it had ended before
        linear(monkeypatch, Numbers())
        train(config, tmp_path / "killed", progress=False)
        assert lines("killed") == lines("straight")
    linear(monkeypatch, Numbers())
    config.optimizer.learning_rate = 0.0
    train(config, tmp_path / "still", progress=False)
    assert len({line["loss"] for line in lines("still")}) == 1
    del config.validation
    train(toy_loop(2), tmp_path / "none", progress=False)
    assert not (tmp_path / "none" / "validation.jsonl").exists()


def test_a_profile_on_request(tmp_path, monkeypatch, capsys):
    class Asking(Numbers):
        def __next__(self):
            if self.step == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().__next__()

    linear(monkeypatch, Asking())
    before = signal.getsignal(signal.SIGUSR1)
    train(toy_loop(9, log_every=3), tmp_path / "run", progress=False)
    assert signal.getsignal(signal.SIGUSR1) is before
    assert "steps 4 to 8 profiled" in capsys.readouterr().err
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 1


def test_a_disk_without_room_is_said(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    linear(monkeypatch, Numbers())
    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(RefineError) as error:
        train(toy_loop(4), tmp_path / "run", progress=False)
    assert "step 2" in str(error.value) and "No space left" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("where", ["refine_jax.watch.Watch.log", "refine_jax.checkpoint.write_tensors"])
def test_a_disk_that_fills_up_elsewhere_is_said_too(tmp_path, monkeypatch, where):
    """While scalars, or the result, are written; the run continues when there is room."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "the file")

    linear(monkeypatch, Numbers())
    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        with pytest.raises(RefineError, match=r"the file: cannot be written \(No space left.*run the same command"):
            train(toy_loop(4), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "model" / "refine_jax.json").exists()
    train(toy_loop(4), tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "model" / "refine_jax.json").is_file()


def test_workdirs_that_cannot_be_used(tmp_path, monkeypatch, config_file, capsys):
    linear(monkeypatch, Numbers())
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/run"):
        assert cli.main(["train", "--quiet", "--config", str(config_file), "--workdir", str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(folder) in error, error


def test_a_bucket_is_no_workdir(config_file, capsys):
    assert cli.main(["train", "--config", str(config_file), "--workdir", "gs://bucket/run"]) == 2
    assert "'gs://bucket/run': is no folder; mount it" in capsys.readouterr().err


def test_a_batch_that_the_mesh_does_not_divide(tmp_path, monkeypatch):
    linear(monkeypatch, Numbers())
    config = toy_loop(batch_size=3)
    config.mesh = dict(data=1)
    shape = {axis: 2 if axis == "data" else 1 for axis in parallel.MESH_AXES}
    monkeypatch.setattr("refine_jax.parallel.make_mesh", lambda axes: type("Mesh", (), {"shape": shape}))
    with pytest.raises(RefineError, match="batch_size 3: the mesh .* does not divide it"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------ both objectives


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Each `train` builds its own step: within this module what is alike is traced and compiled once."""
    made = {}

    def once(config, objective, mesh):
        apart = ("pictures", "validation", "save_every", "log_every")  # the loop's, not the step's
        key = "".join(line for line in flat(config).splitlines() if not line.startswith(apart))
        if key not in made:
            made[key] = make_program(config, objective, mesh)
        return made[key]

    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("refine_jax.train.make_program", once)
        yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    toy.write_model(folder)
    return folder


def interrupted(monkeypatch, config, workdir: Path, at: int) -> None:
    """Train until the batch `at` is asked for."""
    make = objectives.make

    def stopping(config):
        objective = make(config)
        batches = objective.batches()

        class Stopping:
            def __next__(self):
                if batches.get_state()["step"] == at:
                    raise KeyboardInterrupt
                return next(batches)

            get_state, set_state, close = batches.get_state, batches.set_state, batches.close

        return dataclasses.replace(objective, batches=Stopping)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(objectives, "make", stopping)
        train(config, workdir, progress=False)


@pytest.fixture(scope="module")
def vae_run(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("vae")
    return train(toy.vae_config(), folder / "straight", progress=False)


def test_vae_objective(vae_run, monkeypatch):
    straight = vae_run.parent
    interrupted(monkeypatch, toy.vae_config(), straight.parent / "killed", at=2)
    train(toy.vae_config(), straight.parent / "killed", progress=False)
    assert_same_run(straight, straight.parent / "killed")
    manifest = checkpoint.read_manifest(vae_run)
    std = manifest["vae"]["latents_std"]
    assert len(std) == toy.VAE["z_dim"] and all(s > 0 for s in std)
    assert (vae_run / "weights.safetensors").read_bytes() == (
        straight.parent / "killed" / "model" / "weights.safetensors"
    ).read_bytes()


def test_refine_objective(vae_run, tmp_path, monkeypatch):
    config = toy.refine_config(vae_run)
    model = train(config, tmp_path / "straight", progress=False)
    interrupted(monkeypatch, config, tmp_path / "killed", at=2)
    train(config, tmp_path / "killed", progress=False)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    assert {"loss", "base", "band", "inside", "outside", "grad_norm", "step"} <= final(tmp_path / "killed")[2][0].keys()

    # The exported folder is a whole model: stacked blocks, the VAE as it was, a tokenizer, and it refines.
    refiner = Refiner.load(model, vae_area=32 * 32)
    assert refiner.model.mmdit.scan and refiner.model.vae.latents_std == tuple(
        checkpoint.read_manifest(vae_run)["vae"]["latents_std"]
    )
    state = final(tmp_path / "straight")[1]
    np.testing.assert_array_equal(
        refiner.variables["mmdit"]["blocks"]["attn"]["to_q"]["kernel"][1],
        state["ema"]["mmdit"]["blocks_1"]["attn"]["to_q"]["kernel"],
    )
    picture = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    result = refiner.refine(picture, (4, 4, 20, 20), "Refine the text 'A'", steps=1)
    assert result.size == (48, 40)


def lora_config(model: Path) -> ml_collections.ConfigDict:
    config = toy.refine_config("")
    config.init_from, config.model, config.train_encoder, config.ema_decay = str(model), {}, False, 0.0
    config.lora = dict(rank=2, alpha=6.0, targets=r"blocks/attn/to_(q|out)")
    return config


def test_a_lora_is_trained_killed_resumed_and_exported(base, tmp_path, monkeypatch, cache):
    config = lora_config(base)
    drawing = lora_config(base)
    # Neither changes anything of the run.
    drawing.pictures, drawing.validation = dict(every=2, count=1), dict(every=2, batches=2)
    folder = train(drawing, tmp_path / "straight", progress=False)
    interrupted(monkeypatch, config, tmp_path / "killed", at=3)
    train(config, tmp_path / "killed", progress=False)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    file = folder / objectives.LORA_FILE
    stored, other = (load_file(run / "model" / objectives.LORA_FILE) for run in (folder.parent, tmp_path / "killed"))
    assert stored.keys() == other.keys() and len(stored) == 4 * toy.model_config().mmdit.num_layers
    jax.tree.map(np.testing.assert_array_equal, stored, other)
    state = final(tmp_path / "straight")[1]
    attention = state["params"]["lora"]["mmdit"]["blocks"]["attn"]
    assert set(attention) == {"to_q", "to_out"} and state["ema"] in ({}, None)
    # One adapter lies beside every checkpoint that is kept, but for the last, whose is the result.
    halfway = tmp_path / "straight" / "adapters" / "00000002" / objectives.LORA_FILE
    assert [path.parent.name for path in halfway.parent.parent.glob("*/*")] == ["00000002"]
    early = load_file(halfway)
    assert early.keys() == stored.keys() and any((early[name] != stored[name]).any() for name in early)
    # The file holds alpha / rank = 3 in b; the base model is not in the state.
    refiner = Refiner.load(base, lora=file)
    np.testing.assert_array_equal(refiner.lora["mmdit"]["blocks"]["attn"]["to_q"]["b"], 3 * attention["to_q"]["b"])
    assert np.abs(attention["to_q"]["b"]).max() > 0
    told = [json.loads(line) for line in (tmp_path / "straight" / "validation.jsonl").open()]
    assert [line["step"] for line in told] == [0, 2, 4] and all(0 < line["loss"] < 100 for line in told)
    shown = sorted(path.name for path in (tmp_path / "straight" / "pictures").iterdir())
    assert shown == ["00000002.png", "00000004.png"]
    with Image.open(tmp_path / "straight" / "pictures" / shown[0]) as picture:
        assert picture.size[0] > 3 * 128


def test_a_lora_beside_weights_in_8_bits(base, tmp_path, cache):
    """Nearly the loss of the weights as they are; the frozen kernels are int8, and what comes out fits either."""
    plain, small = lora_config(base), lora_config(base)
    small.quantize = "int8"
    kernels = {
        leaf.dtype.name
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            meta.unbox(objectives.make(small).frozen)["mmdit"]["blocks"]
        )
        if path[-1].key == "kernel"
    }
    assert kernels == {"int8"}
    losses = {}
    for name, config in dict(plain=plain, small=small).items():
        file = train(config, tmp_path / name, progress=False) / objectives.LORA_FILE
        losses[name] = [line["loss"] for line in final(tmp_path / name)[2]]
        for quantize in (None, "int8"):
            assert Refiner.load(base, lora=file, quantize=quantize).lora
    assert losses["small"] != losses["plain"]
    np.testing.assert_allclose(losses["small"], losses["plain"], rtol=0.02)
    small.quantize = "int4"
    with pytest.raises(RefineError, match="quantize 'int4': give 'int8'"):
        objectives.make(small)
    small.quantize, small.lora = "int8", None
    with pytest.raises(RefineError, match="quantize 'int8': is of what a LoRA leaves frozen"):
        objectives.make(small)


def test_a_lora_goes_on_from_another(base, tmp_path, cache):
    """It starts as the same function; two small steps later it is near it. What does not fit is said before a step."""
    first = train(lora_config(base), tmp_path / "first", progress=False) / objectives.LORA_FILE
    config = lora_config(base)
    config.lora.update(dict(init_from=str(first), alpha=1.0))  # another scale, the same function
    shardings = parallel.param_shardings(objectives.make(config).init(jax.random.key(0)), None)
    values = objectives.make(config).initial(shardings)["lora"]["mmdit"]["blocks"]["attn"]
    loaded = Refiner.load(base, lora=first).lora["mmdit"]["blocks"]["attn"]
    assert values.keys() == loaded.keys()
    for name, layer in values.items():
        np.testing.assert_array_equal(layer["a"], loaded[name]["a"])
        np.testing.assert_allclose(layer["b"] * 0.5, loaded[name]["b"], rtol=1e-6)
    config.steps, config.save_every, config.keep = 3, 1, 1
    config.optimizer.update(dict(learning_rate=1e-4, warmup=0, decay=0.0))
    folder = train(config, tmp_path / "second", progress=False)
    assert not list((tmp_path / "second" / "adapters").iterdir())  # the one checkpoint that is kept is the result's
    before, after = load_file(first), load_file(folder / objectives.LORA_FILE)
    assert before.keys() == after.keys()
    changes = [np.abs(after[name] - before[name]).max() for name in before]
    assert 0 < max(changes) < 1e-3

    for changes, words in (
        (dict(rank=4), ("ranks other than 4", "to_q 2", "set lora.rank")),
        (dict(targets="blocks/attn/to_q"), ("not trained", "to_out", "widen lora.targets")),
        (dict(targets="blocks/attn/to_(q|k|out)"), ("lacks", "to_k", "narrow lora.targets")),
        (dict(init_from=str(tmp_path / "none.safetensors")), ("none.safetensors", "no such file")),
    ):
        other = lora_config(base)
        other.lora.update(dict(init_from=str(first)) | changes)
        with pytest.raises(RefineError) as error:
            train(other, tmp_path / "other", progress=False)
        assert all(word in str(error.value) for word in words), error.value


def test_shipped_recipes_can_be_told_what_to_go_on_from():
    config = load_config(toy.CONFIGS / "edit_debug.py", {"lora.init_from": "a.safetensors"})
    assert config.lora.to_dict() == dict(rank=4, alpha=4.0, targets=config.lora.targets, init_from="a.safetensors")
    with pytest.raises(RefineError, match="lora.init_from: tiny.py has no such key"):  # it trains the whole model
        load_config(toy.CONFIGS / "tiny.py", {"lora.init_from": "a.safetensors"})


def test_a_lora_is_trained_on_records(base, tmp_path, cache, monkeypatch):
    """On a known chip with the share of its peak that the needed operations took."""
    monkeypatch.setattr(flops, "chip", lambda device: flops.Chip("some", 1e9, 1.0, 1.0, 1.0))
    command = ["data", "synth", "--output", str(tmp_path / "data"), "--count", "6", "--size", "256,256"]
    assert cli.main(command) == 0
    config = lora_config(base)
    config.steps, config.save_every = 2, 2
    config.pictures = dict(every=2, count=2)
    config.data = dict(source="records", path=str(tmp_path / "data"), buckets=((32, 96),), text_length=112, workers=0)
    folder = train(config, tmp_path / "run", progress=False)
    assert (folder / objectives.LORA_FILE).is_file() and (tmp_path / "run" / "pictures" / "00000002.png").is_file()
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 2 and np.isfinite(line["loss"]) and "corrupt_records" not in line
    objective = objectives.make(config)
    needed = flops.of_step(config, objective.model, objective.batch_shapes()[0]).total
    np.testing.assert_allclose(line["mfu"], needed * line["images_per_second"] / config.batch_size / 1e9, rtol=1e-3)
    config.data.validation = str(tmp_path / "nothing")  # said before the first step
    with pytest.raises(RefineError, match="nothing"):
        train(config, tmp_path / "other", progress=False)
    config.pictures.every, config.validation = 0, dict(every=2, batches=1)
    with pytest.raises(RefineError, match="nothing"):
        train(config, tmp_path / "other", progress=False)
    config.data.validation = ""
    with pytest.raises(RefineError, match="validation.every 2: .*set data.validation to a dataset"):
        train(config, tmp_path / "other", progress=False)
    assert cli.main([*command[:3], str(tmp_path / "held"), "--count", "2", "--size", "256,256"]) == 0
    config.instruction_dropout, config.data.reference_dropout = 1.0, 1.0
    config.data.validation = str(tmp_path / "held")
    measured = objectives.make(config)
    with contextlib.closing(measured.held_out()) as held, contextlib.closing(measured.batches()) as own:
        kept, dropped = next(held), next(own)
    assert kept["prompt"]["ids"].tolist() != dropped["prompt"]["ids"].tolist() and not dropped["has_reference"].any()
    config.instruction_dropout, config.data.reference_dropout, config.data.validation = 0.0, 0.0, ""
    config.validation.every = 0
    dataset = records.Dataset(tmp_path / "data")
    records_toy.damage(dataset.files[0], dataset.read(0))
    shown = objectives.make(config).samples(2)
    assert [sample["prompt"] for sample in shown] == [dataset[number].instruction for number in (1, 2)]
    config.train_encoder = True
    with pytest.raises(RefineError, match="train_encoder: a LoRA leaves the encoder"):
        objectives.make(config)
    config.train_encoder = False
    config.data.path = str(tmp_path / "nothing")
    with pytest.raises(RefineError, match="nothing"):
        train(config, tmp_path / "other", progress=False)
    config.data.source = "files"
    with pytest.raises(RefineError, match="data.source 'files': choose one of synth, records"):
        train(config, tmp_path / "other", progress=False)


def test_references_are_left_out(base):
    """Neither the latents' mask nor the prompt has them, and nothing else changes; which, the position decides."""

    def rows(share: float) -> list[dict]:
        config = lora_config(base)
        config.batch_size, config.data.reference_share = 8, 1.0
        config.data.reference_dropout = share
        batches = objectives.make(config).batches()
        found = [next(batches) for _ in range(3)]
        batches.set_state({"step": 1})
        again = next(batches)
        batches.close()
        jax.tree.map(np.testing.assert_array_equal, again, found[1])
        return found

    seen = {share: np.concatenate([row["has_reference"] for row in rows(share)]) for share in (0.0, 0.5, 1.0)}
    assert seen[0.0].all() and not seen[1.0].any() and 6 < seen[0.5].sum() < 18
    for whole, half in zip(rows(0.0), rows(0.5)):
        left = ~half["has_reference"]
        for name in ("image", "target", "mask", "reference"):
            np.testing.assert_array_equal(whole[name], half[name])
        tokens = lambda batch: batch["prompt"]["mask"].sum(axis=1)
        assert (tokens(half)[left] < tokens(whole)[left]).all()
        np.testing.assert_array_equal(tokens(half)[~left], tokens(whole)[~left])
    config = lora_config(base)
    config.data.reference_dropout = 1.5
    with pytest.raises(RefineError, match="data.reference_dropout 1.5"):
        objectives.make(config).batches()
    config.data.update(source="cache", path="caches")
    with pytest.raises(RefineError, match="data.reference_dropout: a cache"):
        objectives.make(config)


@pytest.mark.parametrize(
    "changes,words",
    [
        (dict(lora=dict(rank=2, alpha=2.0, targets="nothing")), ("targets", "nothing")),
        (dict(init_from=""), ("set init_from",)),
        (dict(model=dict(steps=3)), ("init_from and model",)),
        (dict(variant="qwen-image-edit-2511"), ("qwen-image-edit-2511", "variant")),
        (dict(init_from="/nowhere"), ("/nowhere", "no such model")),
    ],
)
def test_bad_loras(base, tmp_path, changes, words):
    config = lora_config(base)
    config.update(changes)
    with pytest.raises(RefineError) as error:
        train(config, tmp_path / "run", progress=False)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_whole_model_is_trained_further(base, tmp_path, cache):
    config = lora_config(base)
    config.lora, config.steps, config.save_every = None, 1, 1
    config.optimizer.learning_rate = 0.0
    folder = train(config, tmp_path / "run", progress=False)
    before, after = (checkpoint.load_weights(f, toy.model_config().abstract()) for f in (base, folder))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_frozen_encoder_comes_from_the_vaes_folder(base):
    model = toy.model_config()
    config = toy.refine_config(base)
    config.train_encoder = False
    objective = objectives.make(config)
    assert set(objective.frozen) == {"vae", "vl"}
    assert set(jax.eval_shape(objective.init, jax.random.key(0))) == {"mmdit"}
    loaded = objective.load(parallel.param_shardings(objective.frozen, None))
    assert jax.tree.structure(loaded["vl"]) == jax.tree.structure(model.abstract(("vl",))["vl"])


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for source in sorted(toy.CONFIGS.glob("*.py")):
        (GOLDEN / f"{source.stem}.txt").write_text(flat(configuration.load(source)), encoding="utf-8")
        print(f"wrote {GOLDEN / source.stem}.txt", file=sys.stderr)
