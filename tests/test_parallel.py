"""Mesh and sharding rules: on one device what they say, on eight virtual ones what they do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import toy
from flax import linen as nn
from jax.sharding import AbstractMesh, PartitionSpec

from refine_jax import parallel
from refine_jax.errors import RefineError
from refine_jax.model import ModelConfig
from refine_jax.models.layers import fit_spec


def test_a_mesh_of_one_device():
    mesh = parallel.make_mesh({"data": -1}, jax.devices()[:1])
    assert dict(mesh.shape) == dict(data=1, fsdp=1, tensor=1, context=1)
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    "axes,words",
    [
        ({"model": 2}, ("model", "data, fsdp, tensor, context")),
        ({"data": 2}, ("do not divide", "1 devices")),
        ({"data": -1, "fsdp": -1}, ("at most one",)),
        ({"data": 0}, ("at least 1",)),
        ({"data": -2, "fsdp": -2}, ("at least 1",)),
        ({"data": "all"}, ("whole numbers",)),
        ({"data": 1.5}, ("whole numbers",)),
    ],
)
def test_bad_meshes(axes, words):
    with pytest.raises(RefineError) as error:
        parallel.make_mesh(axes, jax.devices()[:1])
    assert all(word in str(error.value) for word in words), error.value


def test_rules_can_be_overridden():
    assert parallel.make_rules() == parallel.DEFAULT_RULES and parallel.make_rules({}) == parallel.DEFAULT_RULES
    assert dict(parallel.make_rules({"embed": ["fsdp", "tensor"], "mlp": None}))["embed"] == ("fsdp", "tensor")
    with pytest.raises(RefineError, match="unknown logical axis 'embedding'"):
        parallel.make_rules({"embedding": "fsdp"})
    with pytest.raises(RefineError, match="'model' is no mesh axis"):
        parallel.make_rules({"embed": "model"})


def boxed(model: ModelConfig):
    return jax.eval_shape(lambda: model.init(jax.random.key(0)))


def test_every_logical_axis_of_the_networks_has_a_rule():
    names = {
        name
        for spec in jax.tree.leaves(nn.get_partition_spec(boxed(toy.model_config())), is_leaf=_is_spec)
        for name in spec or ()
    }
    assert {"layers", "embed", "heads", "mlp", "vocab", "norm", "time", "conv_in", "conv_out"} <= names
    assert names - {None} <= dict(parallel.DEFAULT_RULES).keys()
    axes = {axis for _, axes in parallel.DEFAULT_RULES for axis in ([axes] if isinstance(axes, str) else axes or ())}
    assert axes <= set(parallel.MESH_AXES)


def _is_spec(x) -> bool:
    return isinstance(x, PartitionSpec)


def test_a_dimension_that_is_not_divided_is_left_whole():
    mesh = dict(data=2, fsdp=2, tensor=3, context=1)
    assert fit_spec((("data", "fsdp"), "tensor", "context"), (8, 9, 5, 7), mesh) == [
        ("data", "fsdp"),
        "tensor",
        None,
        None,
    ]
    assert fit_spec((("data", "fsdp"), "tensor"), (6, 8), mesh) == [None, None]
    assert fit_spec((("data", "fsdp"), "tensor"), (6, 8), mesh, otherwise="free") == ["free", "free"]
    assert fit_spec((), (6, 8), mesh) == [None, None]


def test_the_full_size_models_parameters_spread_over_a_pod():
    """Of the published MMDiT no device of a 16 x 4 mesh holds more than 1/60 of the parameters, and few stay whole."""
    model = ModelConfig()
    abstract = boxed(model)["mmdit"]
    mesh = AbstractMesh((1, 16, 4, 1), parallel.MESH_AXES)
    shardings = parallel.param_shardings(abstract, mesh)
    total = local = 0
    for leaf, sharding in zip(jax.tree.leaves(nn.meta.unbox(abstract)), jax.tree.leaves(shardings), strict=True):
        total += leaf.size
        local += _size(sharding.shard_shape(leaf.shape))
    assert total > 20e9 and local < total / 60
    block = shardings["blocks"]
    assert block["attn"]["to_q"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert block["img_mlp"]["down"]["kernel"].spec == PartitionSpec(None, "tensor", "fsdp")
    assert block["img_mod"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")


def _size(shape) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


# ------------------------------------------------------------------------------------------------ eight virtual devices


def eight_devices() -> None:
    """Runs in a process of its own: prints what the trainer's loss and gradients are on one device and on 2 x 2 x 2."""
    import numpy as np

    from refine_jax import objectives

    config = toy.refine_config(sys.argv[1])
    config.batch_size = 4
    objective = objectives.make(config)
    batches = objective.batches()
    batch = next(batches)
    batches.close()
    boxes = jax.eval_shape(objective.init, jax.random.key(0))
    variables = toy.random_variables(toy.model_config(scan=False), 3)
    params = {name: variables[name] for name in boxes}
    key = jax.random.key(1)
    found = {}
    for name, axes in {"one": {}, "eight": dict(data=2, fsdp=2, tensor=2)}.items():
        mesh = parallel.make_mesh(axes, jax.devices()[: 8 if axes else 1])
        rules = parallel.make_rules()
        declared = parallel.param_shardings(boxes, mesh, rules)
        step = jax.jit(
            lambda p, frozen, b: jax.value_and_grad(objective.loss, has_aux=True)(p, frozen, b, key),
            out_shardings=(None, declared),
        )
        with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
            placed = jax.device_put(params, declared)
            arguments = (
                placed,
                jax.device_put(objective.frozen, parallel.replicated(mesh)),
                parallel.shard_batch(batch, mesh),
            )
            lowered = step.lower(*arguments)
            (loss, _), grads = lowered.compile()(*arguments)
        text = lowered.as_text()
        found[name] = float(loss), jax.device_get(grads), text.count("sharding_constraint")
        if axes:
            like = jax.tree.map(lambda g, s: bool(g.sharding.is_equivalent_to(s, g.ndim)), grads, declared)
            split = sum(not s.is_fully_replicated for s in jax.tree.leaves(declared))
    (one, grads, _), (eight, other, constraints) = found["one"], found["eight"]
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / (np.abs(a).max() + 1e-6)), grads, other)
    print(
        json.dumps(
            dict(
                one=one,
                eight=eight,
                gradients=max(jax.tree.leaves(apart)),
                as_declared=all(jax.tree.leaves(like)),
                split=split,
                constraints=constraints,
            )
        )
    )


def test_eight_devices_compute_what_one_does(tmp_path):
    toy.write_model(tmp_path / "model")
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    here = Path(__file__).parent
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{here}{os.pathsep}{here.parent}",
    }
    command = [sys.executable, "-c", "import test_parallel; test_parallel.eight_devices()", str(tmp_path / "model")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert abs(found["eight"] - found["one"]) <= 1e-5 * abs(found["one"]), found
    assert found["gradients"] <= 1e-3 and found["as_declared"] and found["split"] >= 20, found
    assert found["constraints"] >= 10, found
