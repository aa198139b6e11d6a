"""Mesh and sharding rules: one table maps the logical axes that parameters declare to mesh axes."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from refine_jax.errors import RefineError
from refine_jax.models.layers import fit_spec

# The slowest first: `slice` spans the network between TPU slices (or any islands of devices), the others one slice.
MESH_AXES = ("slice", "data", "fsdp", "tensor", "context")
BATCH_AXES = ("slice", "data", "fsdp")

# Logical axis -> mesh axis, for every name that the networks use (`models.layers`); None is replicated.
DEFAULT_RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    # parameters
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("time", "tensor"),  # modulations: a third of the MMDiT's parameters
    ("layers", None),
    ("norm", None),
    ("in_channels", None),
    ("out_channels", None),
    ("conv_in", None),
    ("conv_out", None),
    ("lora_embed", "fsdp"),  # an adapter's side that is `embed` of its kernel
    ("lora_rank", "fsdp"),  # where the other side of the matrix is not split so already
    # activations
    ("batch", BATCH_AXES),
    ("length", "context"),
    ("text_length", "context"),
    ("rows", ("context", "tensor")),  # of an image in the VAE, whose weights are whole on every chip
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_mlp", "tensor"),
    ("time_rows", None),
    ("act_time", None),
)

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]


def make_rules(overrides: Mapping[str, str | Sequence[str] | None] | None = None) -> Rules:
    """`DEFAULT_RULES` with the mesh axes of some logical axes replaced. Raises `RefineError` for an unknown name."""
    rules = dict(DEFAULT_RULES)
    for name, axes in (overrides or {}).items():
        axes = tuple(axes) if isinstance(axes, (list, tuple)) else axes
        group = axes if isinstance(axes, tuple) else (axes,)
        if name not in rules:
            raise RefineError(f"rules: unknown logical axis {name!r}; choose one of {', '.join(rules)}")
        if any(axis is not None and axis not in MESH_AXES for axis in group):
            raise RefineError(f"rules.{name}: {axes!r} is no mesh axis; the axes are {', '.join(MESH_AXES)}")
        rules[name] = axes
    return tuple(rules.items())


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """An Auto mesh over `devices` (default: all) with axes `slice, data, fsdp, tensor, context`.

    `axes` gives the size of each axis; one of them may be -1 (what is left). Where the devices are of several slices,
    `slice` goes over them. Raises `RefineError` when the product is not the number of devices, or when `slice` is not
    the number of TPU slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    unknown = set(axes) - set(MESH_AXES)
    if unknown:
        raise RefineError(f"mesh: unknown axes {sorted(unknown)}; the axes are {', '.join(MESH_AXES)}")
    sizes = [axes.get(name, 1) for name in MESH_AXES]
    if any(not isinstance(s, int) or isinstance(s, bool) or (s < 1 and s != -1) for s in sizes):
        raise RefineError(f"mesh: axes {dict(axes)}; give whole numbers of at least 1, or -1 for what is left")
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) > 1 or len(devices) % known:
        raise RefineError(f"mesh: axes {dict(axes)} do not divide {len(devices)} devices; at most one axis may be -1")
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    if int(np.prod(sizes)) != len(devices):
        raise RefineError(f"mesh: axes {dict(axes)} need {int(np.prod(sizes))} devices, there are {len(devices)}")
    kinds = (AxisType.Auto,) * len(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform == "tpu" and sizes[0] != slices:
        raise RefineError(f"mesh.slice {sizes[0]}: the devices are {slices} slice(s); give slice={slices}")
    # Splitting a physical axis is allowed: 8 x 2 on a torus of 4 x 4.
    if 1 < slices == sizes[0]:
        inner, outer = (1, *sizes[1:]), (sizes[0], *[1] * (len(sizes) - 1))
        placed = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    else:
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=kinds)


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """What the compiler is told for programs on a mesh, None where nothing.

    On TPUs: no ring of small products in place of "gather the weights, then multiply". Such loops add up in memory (3
    times the traffic of an MLP's products here), and there are dozens of them to compile. Where weights are split over
    `fsdp` and groups of it (`data`), gradients are laid out such that a sum of which each device keeps a part is a
    reduce-scatter; by default that takes an all-reduce, twice the bytes.
    """
    if mesh.devices.flat[0].platform != "tpu":
        return None
    options = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
    if mesh.shape["data"] > 1 and mesh.shape["fsdp"] > 1:
        options |= {
            "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": "1",
            "xla_tpu_assign_all_reduce_scatter_layout": "true",
            "xla_tpu_use_minor_sharding_for_major_trivial_input": "true",
        }
    return options


class Program:
    """`jax.jit` of a function, compiled with the `compiler_options` of the mesh in force (`jax.set_mesh`).

    Called, traced and lowered like what `jax.jit` gives. Without a mesh, on one whose compiler is told nothing, and
    inside another program, it is one plain jitted function.
    """

    def __init__(self, function: Callable[..., Any], static_argnames: Sequence[str] = ()):
        functools.update_wrapper(self, function)

        @functools.cache
        def jitted(options: tuple[tuple[str, str], ...]) -> Any:
            return jax.jit(function, static_argnames=static_argnames, compiler_options=dict(options) or None)

        self._jitted = jitted

    def _here(self) -> Any:
        try:
            mesh = jax.sharding.get_mesh()
        except ValueError:  # inside another program: its options hold
            return self._jitted(())
        options = None if mesh.empty else compiler_options(mesh)
        return self._jitted(tuple(sorted((options or {}).items())))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._here()(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """`jax.jit`'s."""
        return self._here().trace(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """`jax.jit`'s."""
        return self._here().lower(*args, **kwargs)


def program(*static_argnames: str) -> Callable[[Callable[..., Any]], Program]:
    """Makes a `Program` of the function below it: `@program("model")`."""
    return lambda function: Program(function, static_argnames)


def param_shardings(abstract: Any, mesh: Mesh | None, rules: Rules = DEFAULT_RULES) -> Any:
    """Shardings of a boxed (logically annotated) abstract tree; the result has the unboxed tree's structure.

    Without a mesh everything goes to this process's first device.
    A dimension that its mesh axis does not divide is replicated, so that one table serves every model size.
    """
    shapes = nn.meta.unbox(abstract)
    if mesh is None:
        return jax.tree.map(lambda leaf: SingleDeviceSharding(jax.local_devices()[0]), shapes)
    specs = nn.get_partition_spec(abstract)

    def place(spec, leaf):
        axes = nn.logical_to_mesh_axes(tuple(spec), rules) if spec is not None else ()
        return NamedSharding(mesh, PartitionSpec(*fit_spec(axes, leaf.shape, mesh.shape)))

    return jax.tree.map(place, specs, shapes, is_leaf=lambda s: isinstance(s, PartitionSpec) or s is None)


def shardings_like(tree: Any, params: Any, shardings: Any, otherwise: NamedSharding) -> Any:
    """Shardings of an optimizer state: a leaf that stands for a parameter (its path ends in the parameter's, its shape
    is the same) goes where the parameter goes, any other leaf (counters, masked entries) to `otherwise`."""
    placed = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True)
    known = {path: (leaf.shape, sharding) for (path, leaf), sharding in placed}
    depths = sorted({len(path) for path in known}, reverse=True)

    def place(path, leaf):
        for depth in depths:
            shape, sharding = known.get(path[-depth:], (None, None)) if len(path) >= depth else (None, None)
            if shape == leaf.shape:
                return sharding
        return otherwise

    return jax.tree_util.tree_map_with_path(place, tree)


def placed(abstract: Any, shardings: Any) -> Any:
    """`jax.ShapeDtypeStruct`s with their shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )


def fetch(x: Any) -> np.ndarray:
    """An array as numpy, wherever its parts are; every process calls it, and every process gets it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def check_same(what: str, found: str) -> None:
    """Raises `RefineError` where another process found other samples, as `found` spells them; all call it."""
    if jax.process_count() == 1:
        return
    own = np.frombuffer(hashlib.sha256(found.encode()).digest(), np.uint8)
    other = np.flatnonzero((multihost_utils.process_allgather(own) != own).any(axis=1))
    if len(other):
        raise RefineError(
            f"{what}: process {other[0]} found other samples than process {jax.process_index()}; give all hosts the "
            "same files, all of them readable"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that keeps a whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def put(tree: Any, shardings: Any) -> Any:
    """Host arrays, alike on every process, on the devices; shardings: a tree like theirs, or one for all.

    `jax.device_put` to devices of several processes gathers every array from every process, to compare them.
    """
    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def one(x: Any, sharding: Sharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree, shardings)


def place(tree: Any, mesh: Mesh | None) -> Any:
    """Host arrays on the devices: a whole copy on each of a mesh, or on the first device."""
    return put(tree, SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else replicated(mesh))


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts a mesh divides a batch."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises `RefineError` for a global batch that does not fall into equal parts on the devices."""
    ways = batch_ways(mesh)
    if accumulate < 1:
        raise RefineError(f"optimizer.accumulate {accumulate}: give a whole number of at least 1")
    if batch_size % (ways * accumulate):
        parts = f" in {accumulate} parts (optimizer.accumulate)" if accumulate > 1 else ""
        raise RefineError(
            f"batch_size {batch_size}: the mesh {dict(mesh.shape)} does not divide it{parts}; give a multiple of"
            f" {ways * accumulate}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose leading axis is the global batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def process_rows(batch_size: int, mesh: Mesh, process: int | None = None) -> np.ndarray:
    """Rows of a global batch that the devices of a process hold (default: of this one), ascending.

    Processes whose devices share samples, along `tensor` or `context`, hold the same rows.
    """
    process = jax.process_index() if process is None else process
    ways = batch_ways(mesh)
    owners = np.array([device.process_index for device in mesh.devices.flat]).reshape(ways, -1)
    held = np.flatnonzero((owners == process).any(axis=1))  # parts of the batch, in the order of BATCH_AXES
    each = batch_size // ways
    return (held[:, None] * each + np.arange(each)).reshape(-1)


def own_rows(batch_size: int, axes: Mapping[str, int]) -> Sequence[int]:
    """`process_rows` on the mesh of these axes; of a process that is alone all, whatever the mesh."""
    if jax.process_count() == 1:
        return range(batch_size)
    mesh = make_mesh(axes)
    check_batch(batch_size, mesh)
    return process_rows(batch_size, mesh)


def shard_batch(batch: Any, mesh: Mesh, batch_size: int | None = None) -> Any:
    """A process's `process_rows` of a batch, as numpy -> global arrays sharded by their leading axis.

    batch_size: of the global batch; a process that is alone may leave it out.
    """
    sharding = batch_sharding(mesh)
    rows = None if batch_size is None else process_rows(batch_size, mesh)

    def place(x: Any) -> jax.Array:
        size = len(x) if batch_size is None else batch_size

        def part(index: tuple[slice, ...]) -> Any:
            first, last, _ = index[0].indices(size)
            return x[first:last] if rows is None else x[np.searchsorted(rows, first) : np.searchsorted(rows, last)]

        return jax.make_array_from_callback((size, *x.shape[1:]), sharding, part)

    return jax.tree.map(place, batch)
