"""Mesh and sharding rules: on one device what they say, on eight virtual ones what they do."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import linen as nn
from jax.sharding import AbstractMesh, PartitionSpec

from refine_jax import checkpoint, configuration, parallel
from refine_jax.errors import RefineError
from refine_jax.model import ModelConfig
from refine_jax.models.layers import fit_spec
from refine_jax.models.qwen_vae import QwenVAE


def test_a_mesh_of_one_device():
    mesh = parallel.make_mesh({"data": -1}, jax.devices()[:1])
    assert dict(mesh.shape) == dict(slice=1, data=1, fsdp=1, tensor=1, context=1)
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    "axes,words",
    [
        ({"model": 2}, ("model", "slice, data, fsdp, tensor, context")),
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


def test_slices_are_the_outer_axis():
    class Device:
        platform, device_kind, process_index = "tpu", "TPU v6 lite", 0

        def __init__(self, index: int):
            self.id, self.slice_index, self.core_on_chip = index, index // 4, 0
            self.coords = (index % 2, index % 4 // 2, 0)

    devices = [Device(index) for index in (5, 4, 1, 0, 2, 3, 7, 6)]
    mesh = parallel.make_mesh(dict(slice=2, fsdp=2, context=2), devices)
    assert dict(mesh.shape) == dict(slice=2, data=1, fsdp=2, tensor=1, context=2)
    assert [[d.slice_index for d in part.flat] for part in mesh.devices] == [[0] * 4, [1] * 4]
    with pytest.raises(RefineError, match="mesh.slice 1: the devices are 2 slice"):
        parallel.make_mesh(dict(fsdp=-1), devices)


class Chip:
    """A TPU's chip as far as meshes look at it; four of a plane belong to one host."""

    platform, slice_index, core_on_chip = "tpu", 0, 0

    def __init__(self, kind: str, index: int, coords: tuple[int, int, int], sides: tuple[int, int, int]):
        self.device_kind, self.id, self.coords = kind, index, coords
        x, y, z = coords
        self.process_index = x // 2 + (sides[0] // 2) * (y // 2 + (sides[1] // 2) * z)


KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}


def pod(topology: str) -> list[Chip]:
    name, _, text = topology.partition(":")
    sides = tuple(map(int, text.split("x")))
    sides += (1,) * (3 - len(sides))
    places = list(itertools.product(*map(range, sides[::-1])))
    return [Chip(KINDS[name], index, place[::-1], sides) for index, place in enumerate(places)]


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in toy.CONFIGS.glob("*_v*_*.py") if "batch" not in path.stem)
)
def test_hosts_of_a_pod_hold_all_rows_of_a_batch(name):
    """Of every configuration for TPUs: hosts that share samples read the same rows, and all rows are read."""
    config = configuration.load(toy.CONFIGS / f"{name}.py")
    mesh = parallel.make_mesh(dict(config.mesh), pod(config.topology))
    parallel.check_batch(config.batch_size, mesh)
    hosts = sorted({chip.process_index for chip in mesh.devices.flat})
    assert len(hosts) == mesh.size // 4 and hosts[-1] == len(hosts) - 1
    held = [tuple(parallel.process_rows(config.batch_size, mesh, host).tolist()) for host in hosts]
    assert sorted(set(sum(held, ()))) == list(range(config.batch_size))
    ways = math.prod(mesh.shape[axis] for axis in parallel.BATCH_AXES)
    for host, rows in enumerate(held):
        assert rows == tuple(sorted(rows)) and len(rows) % (config.batch_size // ways) == 0
        each = config.batch_size // ways
        for index, chip in np.ndenumerate(mesh.devices):
            if chip.process_index == host:
                first = each * int(np.ravel_multi_index(index[:3], mesh.devices.shape[:3]))
                assert set(range(first, first + each)) <= set(rows)


def test_rules_can_be_overridden():
    assert parallel.make_rules() == parallel.DEFAULT_RULES and parallel.make_rules({}) == parallel.DEFAULT_RULES
    assert dict(parallel.make_rules({"embed": ["fsdp", "tensor"], "mlp": None}))["embed"] == ("fsdp", "tensor")
    with pytest.raises(RefineError, match="unknown logical axis 'embedding'"):
        parallel.make_rules({"embedding": "fsdp"})
    with pytest.raises(RefineError, match="'model' is no mesh axis"):
        parallel.make_rules({"embed": "model"})


def test_a_program_is_compiled_with_the_options_of_its_mesh(monkeypatch):
    """An option that does not exist is refused by the compiler; it gets there under a mesh only, on every way in."""
    traces = []

    @parallel.program("times")
    def scaled(x, *, times):
        """A docstring."""
        traces.append(times)
        return x * times

    mesh = parallel.make_mesh({}, jax.devices()[:1])
    assert (scaled.__name__, scaled.__doc__) == ("scaled", "A docstring.") and scaled(2.0, times=3) == 6
    with jax.set_mesh(mesh):
        assert scaled(2.0, times=3) == 6  # the CPU's compiler is told nothing
    asked = []
    told = {"no_such_option": "1"}
    monkeypatch.setattr(parallel, "compiler_options", lambda mesh: asked.append(mesh) or told)
    assert scaled(2.0, times=3) == 6 and not asked
    for way in (
        lambda: scaled(2.0, times=3),
        lambda: scaled.lower(2.0, times=3).compile(),
        lambda: scaled.trace(2.0, times=3).lower().compile(),
    ):
        with jax.set_mesh(mesh), pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
            way()
    assert asked == [mesh] * 3
    with jax.set_mesh(mesh):
        assert jax.jit(lambda x: scaled(x, times=4))(2.0) == 8  # inside another program, whose options hold
    before = len(traces)
    assert scaled(3.0, times=3) == 9 and len(traces) == before  # compiled once


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
    mesh = AbstractMesh((1, 1, 16, 4, 1), parallel.MESH_AXES)
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


# Eight devices, and little time spent on optimising what runs once.
FLAGS = (
    " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true"
)
AXES = ("slice", "data", "fsdp", "tensor", "context")
ALONE = [{axis: 8} for axis in AXES]
PAIRS = [{a: 2, b: 4} for a, b in itertools.combinations(AXES, 2)]
# All pairs take minutes: `python tests/test_parallel.py FOLDER`, with the flags below.
SOME_PAIRS = [dict(data=2, fsdp=4), dict(fsdp=2, tensor=4), dict(tensor=2, context=4)]


def split_vae() -> dict:
    """How the VAE's compiled programs divide two images over eight chips, and how far their results are off."""
    import numpy as np

    config = toy.model_config().vae
    vae, variables = QwenVAE(config), toy.random_variables(toy.model_config(), 3)["vae"]
    rng = np.random.default_rng(0)
    inputs = {"encode": rng.uniform(-1, 1, (2, 32, 24, 3)), "decode": rng.standard_normal((2, 8, 6, config.z_dim))}
    mesh = parallel.make_mesh(dict(fsdp=2, tensor=2, context=2))
    found = {}
    for method, x in inputs.items():
        x = x.astype(np.float32)
        run = lambda v, x: jax.tree.map(jnp.asarray, vae.apply({"params": v}, x, method=method))  # noqa: B023
        one = jax.jit(run)(variables, x)
        with jax.set_mesh(mesh), nn.logical_axis_rules(parallel.DEFAULT_RULES):
            # Whole on every chip, as the sampler's pictures are.
            given = jax.device_put((variables, x), parallel.replicated(mesh))
            compiled = jax.jit(run).lower(*given).compile()
            eight = compiled(*given)
        shapes = re.findall(r"= f32\[([\d,]+)\]\S* convolution\(.*(?:encoder|decoder)/", compiled.as_text())
        apart = jax.tree.map(
            lambda a, b: float(np.abs(a - b).max() / np.abs(a).max()), *map(jax.device_get, (one, eight))
        )
        rows = sorted({tuple(map(int, shape.split(",")[:2])) for shape in shapes})
        found[method] = dict(rows=rows, convolutions=len(shapes), apart=max(jax.tree.leaves(apart)))
    return found


def packed_rows() -> dict:
    """BAGEL's loss of packed rows and its gradients on one device and on eight, split as for whole training."""
    import numpy as np
    import test_packing as packed

    from refine_jax import bagel_objective, recipes

    jax.config.update("jax_disable_most_optimizations", True)
    batch = {name: np.stack([value] * 4) for name, value in packed.packed_row().items()}
    rng = np.random.default_rng(0)
    pictures, tokens = batch["painted_pixels"].shape[1], packed.GRID[0] * packed.GRID[1]
    shape = (4, pictures * tokens, packed.MODEL.bagel.latent_dim)
    clean, noise = rng.standard_normal((2, *shape), np.float32)
    t = rng.uniform(size=(4, pictures)).astype(np.float32)
    params = packed.reference.variables()["params"]

    def loss(params, batch, clean, noise, t):
        parts = bagel_objective.row_losses(packed.MODEL, {"bagel": params}, {}, batch, clean, noise, t)
        return parts["mse"] + 0.25 * parts["ce"]

    def run(axes, changed):
        mesh = parallel.make_mesh(axes, jax.devices()[: 8 if axes else 1])
        rules = parallel.make_rules(changed)
        declared = parallel.param_shardings(packed.MODEL.boxed(("bagel",))["bagel"], mesh, rules)
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, declared))
        with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
            inputs = parallel.shard_batch((batch, clean, noise, t), mesh)
            lowered = step.lower(jax.device_put(params, declared), *inputs)
            value, grads = lowered.compile()(jax.device_put(params, declared), *inputs)
        split = sum(not s.is_fully_replicated for s in jax.tree.leaves(declared))
        return float(value), jax.device_get(grads), split, lowered.as_text().count("sharding_constraint")

    axes, rules = dict(data=2, fsdp=2, context=2), recipes.WHOLE | recipes.SPREAD
    one, expected, _, _ = run({}, None)
    value, grads, split, constraints = run(axes, rules)
    apart = lambda a, b: float(np.abs(a - b).max() / np.abs(a).max()) if np.abs(a).max() > 1e-6 else 0.0
    return dict(
        loss=value,
        one=one,
        gradients=max(jax.tree.leaves(jax.tree.map(apart, expected, grads))),
        as_declared=True,
        split=split,
        constraints=constraints,
        name="packed",
        axes=axes,
        rules=[],
    )


def moved(objective, values: dict, workdir: Path) -> dict:
    """A state of parameters and two moments saved from one mesh, restored on others: arrays that differ, and whether
    each lies as the new mesh's rules say."""
    import optax

    boxes = jax.eval_shape(objective.init, jax.random.key(0))
    draw = np.random.default_rng(0)
    like = lambda leaf: draw.standard_normal(leaf.shape, np.float32)
    state = {"params": {"mmdit": values}}
    moments = optax.adam(1e-3).init(state["params"])[0]
    state |= {"mu": jax.tree.map(like, moments.mu), "nu": jax.tree.map(like, moments.nu)}

    def placed(axes):
        declared = parallel.param_shardings(boxes, parallel.make_mesh(axes, jax.devices()[: math.prod(axes.values())]))
        return dict.fromkeys(state, declared)

    mngr = checkpoint.manager(workdir)
    checkpoint.save_state(mngr, 1, jax.device_put(state, placed(dict(fsdp=8))), {}, force=True)
    checkpoint.finish(mngr)
    found = {}
    for axes in (dict(data=2, fsdp=2, tensor=2), dict(tensor=4), dict(data=1)):
        shapes = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, placed(axes)
        )
        restored, _ = checkpoint.restore_state(mngr, shapes)
        same = jax.tree.map(lambda a, b: np.array_equal(jax.device_get(a), b), restored, state)
        lies = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b, a.ndim), restored, placed(axes))
        found[str(axes)] = [len(jax.tree.leaves(same)), all(jax.tree.leaves(same)), all(jax.tree.leaves(lies))]
    mngr.close()
    return found


def eight_devices(pairs: list[dict]) -> None:
    """Runs in a process of its own: prints what the trainer's losses and gradients are on one device and on eight.

    Whole training of the MMDiT on encoded batches under every axis alone and in pairs; a LoRA, and an objective that
    encodes its batches and trains the encoder too, under three axes at once.
    """
    import numpy as np

    from refine_jax import objectives, recipes

    variables = toy.random_variables(toy.model_config(), 3)
    folder = sys.argv[1]

    def make(**changes):
        config = toy.refine_config("")
        for name, value in (dict(init_from=folder, model={}, batch_size=8, train_encoder=False) | changes).items():
            config[name] = value
        return objectives.make(config), config

    objective, config = make()
    batches = objective.batches()
    pixels = next(batches)
    batches.close()
    encoded = jax.jit(lambda v, b: objectives.encode(objective.model, v, b, config.boundary))(variables, pixels)
    encoded = jax.device_get(encoded)
    whole, several = make(train_encoder=True)[0], dict(data=2, fsdp=2, tensor=2)
    adapter = make(lora=dict(rank=4, alpha=8.0, targets="blocks/attn/to_(q|k|v|out)"))[0]
    key = jax.random.key(1)

    def run(objective, batch, axes, changed=None):
        mesh = parallel.make_mesh(axes, jax.devices()[: 8 if axes else 1])
        rules = parallel.make_rules(changed)
        boxes = jax.eval_shape(objective.init, jax.random.key(0))
        declared = parallel.param_shardings(boxes, mesh, rules)
        draw = iter(jax.random.split(jax.random.key(5), 100))
        given = lambda name: (
            variables[name]
            if name in variables
            else jax.tree.map(lambda leaf: 0.2 * jax.random.normal(next(draw), leaf.shape), nn.meta.unbox(boxes[name]))
        )
        params = jax.device_put({name: given(name) for name in boxes}, declared)
        frozen = {name: variables[name] for name in objective.frozen}
        frozen = jax.device_put(frozen, parallel.param_shardings(objective.frozen, mesh, rules))
        step = jax.jit(
            lambda p, f, b: jax.value_and_grad(objective.loss, has_aux=True)(p, f, b, key),
            out_shardings=(None, declared),
        )
        with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
            arguments = params, frozen, parallel.shard_batch(batch, mesh)
            lowered = step.lower(*arguments)
            (loss, _), grads = lowered.compile()(*arguments)
        alike = jax.tree.map(lambda g, s: g.sharding.is_equivalent_to(s, g.ndim), grads, declared)
        return dict(
            loss=float(loss),
            grads=jax.device_get(grads),
            split=sum(not s.is_fully_replicated for s in jax.tree.leaves(declared)),
            as_declared=all(jax.tree.leaves(alike)),
            constraints=lowered.as_text().count("sharding_constraint"),
        )

    plain = [(axes, None) for axes in [*ALONE, *pairs]]
    # As in full fine-tuning: weights over both axes of the batch, gathered in turn.
    plans = {"mmdit": (objective, encoded, [*plain, (dict(data=2, fsdp=4), recipes.WHOLE)])}
    adapters = [(several, None), (dict(fsdp=2, context=4), recipes.SPREAD | recipes.SCATTERED)]
    plans |= {"whole": (whole, pixels, [(several, None)]), "lora": (adapter, encoded, adapters)}
    for name, (trained, batch, meshes) in plans.items():
        one = run(trained, batch, {})
        for axes, changed in meshes:
            eight = run(trained, batch, axes, changed)
            apart = jax.tree.map(
                lambda a, b: float(np.abs(a - b).max() / np.abs(a).max()) if np.abs(a).max() > 1e-6 else 0.0,
                one["grads"],
                eight.pop("grads"),
            )
            eight |= dict(one=one["loss"], gradients=max(jax.tree.leaves(apart)), name=name, axes=axes)
            eight |= dict(rules=list(changed or ()))
            print(json.dumps(eight), flush=True)
    print(json.dumps(moved(objective, variables["mmdit"], Path(folder).parent / "moved")), flush=True)
    print(json.dumps(split_vae()), flush=True)
    print(json.dumps(packed_rows()), flush=True)


def test_eight_devices_compute_what_one_does(tmp_path):
    toy.write_model(tmp_path / "model", seed=3)
    flags = os.environ.get("XLA_FLAGS", "") + FLAGS
    here = Path(__file__).parent
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{here}{os.pathsep}{here.parent}",
    }
    command = [
        sys.executable,
        "-c",
        "import test_parallel as t; t.eight_devices(t.SOME_PAIRS)",
        str(tmp_path / "model"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    *found, elsewhere, vae, packed = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(elsewhere) == 3 and all(count > 100 and same and lies for count, same, lies in elsewhere.values())
    # Of two images of 32 x 24 pixels, of 8 x 6 latents, a chip computes a quarter of the rows of one.
    assert vae["encode"]["rows"] == [[1, 2], [1, 4], [1, 8]] == vae["decode"]["rows"], vae
    for part in vae.values():
        assert part["convolutions"] >= 10 and part["apart"] <= 1e-5, vae
    assert len(found) == len(ALONE) + len(SOME_PAIRS) + 4
    [spread] = [line for line in found if line["rules"] and line["name"] == "mmdit"]
    [usual] = [line for line in found if line["axes"] == spread["axes"] and not line["rules"]]
    assert spread["split"] > usual["split"] and spread["constraints"] > usual["constraints"]
    for line in [*found, packed]:
        assert abs(line["loss"] - line["one"]) <= 1e-5 * abs(line["one"]), line
        assert line["gradients"] <= 1e-5 and line["as_declared"], line
        if {"fsdp", "tensor"} & line["axes"].keys():
            assert line["split"] >= 8 and line["constraints"] >= 5, line


if __name__ == "__main__":
    eight_devices(PAIRS)
