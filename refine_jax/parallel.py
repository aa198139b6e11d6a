"""Mesh and sharding rules: one table maps the logical axes that parameters declare to mesh axes."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from refine_jax.errors import RefineError
from refine_jax.models.layers import fit_spec

MESH_AXES = ("data", "fsdp", "tensor", "context")

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
    ("lora_rank", "fsdp"),  # where the other side of the matrix is not split so already
    # activations
    ("batch", ("data", "fsdp")),
    ("length", "context"),
    ("text_length", None),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_mlp", "tensor"),
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
    """An Auto mesh over `devices` (default: all) with axes `data, fsdp, tensor, context`.

    `axes` gives the size of each axis; one of them may be -1 (what is left). Raises `RefineError` when the product
    is not the number of devices.
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
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def param_shardings(abstract: Any, mesh: Mesh | None, rules: Rules = DEFAULT_RULES) -> Any:
    """Shardings of a boxed (logically annotated) abstract tree; the result has the unboxed tree's structure.

    Without a mesh everything goes to the first device.
    A dimension that its mesh axis does not divide is replicated, so that one table serves every model size.
    """
    shapes = nn.meta.unbox(abstract)
    if mesh is None:
        return jax.tree.map(lambda leaf: SingleDeviceSharding(jax.devices()[0]), shapes)
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


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that keeps a whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def place(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays on the devices: a whole copy on each of a mesh, or on the first device."""
    return jax.device_put(tree, jax.devices()[0] if mesh is None else replicated(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose leading axis is the global batch."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """A host's numpy batch -> global arrays sharded by their leading axis."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
