"""A checked mapping between a reference's flat state dict and our parameter trees. numpy only.

A table is a list of `Rule`s. A rule's `key` and `path` are templates: literal text with holes. ``{i}`` is an integer,
``{part:to_q|to_k}`` is whatever the regular expression after the colon matches. Every hole of `key` must reappear in
`path` or be the rule's `stack`, so that each rule can be read in both directions::

    Rule("transformer_blocks.{i}.attn.to_q.weight", "blocks/attn/to_q/kernel", "transpose", stack="i")
    Rule("norm_{n}.weight", "norm_{n}/scale")
    Rule("time_conv.{rest:.*}", unused="a still image has one frame")

Nothing is skipped silently: `to_tree` raises one `RefineError` that lists every unknown key, key matched by two rules,
leaf set twice, missing leaf and wrong shape.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from flax import traverse_util

from refine_jax.errors import RefineError, listed

_HOLE = re.compile(r"\{(\w+)(?::([^{}]*))?\}")


@dataclass(frozen=True)
class Transform:
    """How one reference tensor becomes one leaf (`forward`) and back (`inverse`; None where nothing can be restored).

    `inverse` is a right inverse: `forward(inverse(leaf)) == leaf`. Where the reference holds numbers that we drop (the
    earlier frames of a causal kernel) it writes zeros. axis: the leaf's axis along which the reference's axis 0 runs,
    where any run of rows may be transformed alone.
    """

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray] | None
    axis: int | None = None


def _last_frame(frames: int) -> Transform:
    def forward(w: np.ndarray) -> np.ndarray:
        if w.ndim != 5 or w.shape[2] != frames:
            raise ValueError(f"expected [out, in, {frames}, kh, kw]")
        return np.transpose(w[:, :, -1], (2, 3, 1, 0))

    def inverse(kernel: np.ndarray) -> np.ndarray:
        still = np.transpose(kernel, (3, 2, 0, 1))[:, :, None]
        if frames == 1:
            return still
        past = np.zeros((*still.shape[:2], frames - 1, *still.shape[3:]), still.dtype)
        return np.concatenate([past, still], axis=2)

    return Transform(f"conv_last_frame({frames})", forward, inverse)


def conv_last_frame(frames: int = 3) -> Transform:
    """Causal 3-D kernel [out, in, frames, kh, kw] -> 2-D kernel [kh, kw, in, out]: its last temporal slice."""
    return _last_frame(frames)


def linear_from_conv3d(channels: int, frames: int, height: int, width: int) -> Transform:
    """Patch convolution [out, channels, frames, height, width] -> dense kernel [channels·frames·height·width, out]."""
    shape = (channels, frames, height, width)

    def forward(w: np.ndarray) -> np.ndarray:
        if w.shape[1:] != shape:
            raise ValueError(f"expected [out, {', '.join(map(str, shape))}]")
        return w.reshape(w.shape[0], -1).T

    return Transform("linear_from_conv3d", forward, lambda kernel: kernel.T.reshape(kernel.shape[1], *shape))


def drop_trailing_ones(count: int) -> Transform:
    """[features, 1, …, 1] (`count` ones) -> [features]."""

    def forward(w: np.ndarray) -> np.ndarray:
        if w.ndim != count + 1 or w.shape[1:] != (1,) * count:
            raise ValueError(f"expected [features{', 1' * count}]")
        return w.reshape(w.shape[0])

    return Transform(f"drop_trailing_ones({count})", forward, lambda leaf: leaf.reshape(leaf.shape[0], *(1,) * count))


def _transposed(axes: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    def apply(w: np.ndarray) -> np.ndarray:
        if w.ndim != len(axes):
            raise ValueError(f"expected {len(axes)} dimensions")
        return np.transpose(w, axes)

    return apply


TRANSFORMS: dict[str, Transform] = {
    "copy": Transform("copy", lambda w: w, lambda leaf: leaf, axis=0),
    # torch Linear [out, in] -> Dense kernel [in, out]
    "transpose": Transform("transpose", _transposed((1, 0)), _transposed((1, 0)), axis=1),
    # torch Conv2d [out, in, kh, kw] -> [kh, kw, in, out]
    "conv2d": Transform("conv2d", _transposed((2, 3, 1, 0)), _transposed((3, 2, 0, 1))),
    # torch Conv2d 1x1 [out, in, 1, 1] -> Dense kernel [in, out]
    "linear_from_conv1x1": Transform(
        "linear_from_conv1x1", lambda w: w.reshape(w.shape[0], w.shape[1]).T, lambda k: k.T[:, :, None, None]
    ),
    "conv_last_frame": conv_last_frame(3),
    "conv_only_frame": conv_last_frame(1),
}


@dataclass(frozen=True)
class Rule:
    """One line of a table; the module docstring says how templates read.

    key: template over the reference's key. path: template of the leaf's path, "/"-joined. transform: a name in
    `TRANSFORMS` or a `Transform`. stack: the hole of `key` that counts along the leaf's axis 0 (scanned blocks).
    unused: why reference keys that match are left out (then `path` is not given).
    """

    key: str
    path: str | None = None
    transform: str | Transform = "copy"
    stack: str | None = None
    unused: str | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.unused is None):
            raise ValueError(f"rule {self.key!r}: give either a path or unused=reason")
        if isinstance(self.transform, str) and self.transform not in TRANSFORMS:
            raise ValueError(f"rule {self.key!r}: no transform {self.transform!r}; known: {', '.join(TRANSFORMS)}")
        holes = {name for name, _ in _HOLE.findall(self.key)}
        if self.stack is not None and self.stack not in holes:
            raise ValueError(f"rule {self.key!r}: no hole {self.stack!r} to stack")
        if self.path is not None and {name for name, _ in _HOLE.findall(self.path)} != holes - {self.stack}:
            raise ValueError(f"rule {self.key!r}: every hole but the stack must appear in {self.path!r}, and no other")

    @cached_property
    def holes(self) -> dict[str, str]:
        """Hole name -> the regular expression it matches."""
        return {name: pattern or r"\d+" for name, pattern in _HOLE.findall(self.key)}

    @cached_property
    def key_pattern(self) -> re.Pattern[str]:
        return _compile(self.key, self.holes)

    @cached_property
    def path_pattern(self) -> re.Pattern[str]:
        return _compile(self.path or "", self.holes)

    @property
    def how(self) -> Transform:
        return TRANSFORMS[self.transform] if isinstance(self.transform, str) else self.transform


Table = Sequence[Rule]


def _compile(template: str, holes: Mapping[str, str]) -> re.Pattern[str]:
    pattern, end, seen = "", 0, set()
    for hole in _HOLE.finditer(template):
        name = hole[1]
        # A hole that appears twice must match the same text.
        pattern += re.escape(template[end : hole.start()])
        pattern += f"(?P={name})" if name in seen else f"(?P<{name}>{holes[name]})"
        seen.add(name)
        end = hole.end()
    return re.compile(pattern + re.escape(template[end:]))


def _fill(template: str, values: Mapping[str, Any]) -> str:
    return _HOLE.sub(lambda hole: str(values[hole[1]]), template)


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


def _standin(shape: Iterable[int]) -> np.ndarray:
    """An array of this shape that takes no memory: transforms can be run on it to learn shapes."""
    return np.broadcast_to(np.zeros((), np.float32), tuple(shape))


def _raise(problems: Mapping[str, Iterable[str]], what: str) -> None:
    parts = [f"{kind}: {listed(items)}" for kind, items in problems.items() if items]
    if parts:
        raise RefineError(f"{what} does not fit the network ({'; '.join(parts)})")


def _shape_text(shape: Iterable[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def assign(
    shapes: Mapping[str, tuple[int, ...]], table: Table, abstract_tree: Mapping[str, Any], what: str = "state dict"
) -> dict[str, list[tuple[int | None, str, Transform]]]:
    """The accounting: reference key -> shape becomes leaf path -> [(stack index, reference key, transform)].

    Raises RefineError that lists every offender where tensors and leaves do not cover each other exactly.
    """
    leaves = _flatten(abstract_tree)
    problems: dict[str, list[str]] = {
        name: []
        for name in ("unknown keys", "keys matched by two rules", "leaves set twice", "missing leaves", "wrong shapes")
    }
    sources: dict[tuple[str, int | None], str] = {}
    plan: dict[str, list[tuple[int | None, str, Transform]]] = {path: [] for path in leaves}
    for key, shape in shapes.items():
        matches = [(rule, found) for rule in table if (found := rule.key_pattern.fullmatch(key))]
        if len(matches) > 1:
            problems["keys matched by two rules"].append(key)
            continue
        if not matches:
            problems["unknown keys"].append(key)
            continue
        rule, found = matches[0]
        if rule.unused is not None:
            continue
        path = _fill(rule.path, found.groupdict())
        index = None if rule.stack is None else int(found[rule.stack])
        depth = None if rule.stack is None or path not in leaves else leaves[path].shape[0]
        if path not in leaves or (depth is not None and index >= depth):
            problems["unknown keys"].append(key)
            continue
        if (path, index) in sources:
            problems["leaves set twice"].append(f"{path} from {sources[path, index]} and {key}")
            continue
        sources[path, index] = key
        plan[path].append((index, key, rule.how))
        wanted = tuple(leaves[path].shape if index is None else leaves[path].shape[1:])
        try:
            got = rule.how.forward(_standin(shape)).shape
            if got != wanted:
                problems["wrong shapes"].append(
                    f"{key} {_shape_text(shape)} gives {_shape_text(got)}, {path} takes {_shape_text(wanted)}"
                )
        except ValueError as error:
            problems["wrong shapes"].append(f"{key} {_shape_text(shape)}: {error}")
    for path, pieces in plan.items():
        if not pieces:
            problems["missing leaves"].append(path)
        elif pieces[0][0] is not None:
            absent = set(range(leaves[path].shape[0])) - {index for index, _, _ in pieces}
            problems["missing leaves"].extend(f"{path}[{index}]" for index in absent)
    _raise(problems, what)
    return plan


def to_tree(
    tensors: Mapping[str, np.ndarray],
    table: Table,
    abstract_tree: Mapping[str, Any],
    *,
    place: Callable[[str, np.ndarray], Any] | None = None,
    what: str = "state dict",
) -> dict[str, Any]:
    """Reference tensors -> a parameter tree with the shapes and dtypes of `abstract_tree` (unboxed).

    tensors: looked up twice a key (shapes first, then values), so a memory-mapped reader is never wholly in memory.
    place(path, leaf): called on each finished numpy leaf; what it returns is stored (for example a device array).
    Raises RefineError that lists every offender; `what` names the source in it.
    """
    leaves = _flatten(abstract_tree)
    plan = assign({key: tuple(tensors[key].shape) for key in tensors}, table, abstract_tree, what)
    tree: dict[str, Any] = {}
    for path, pieces in plan.items():
        leaf = np.empty(leaves[path].shape, leaves[path].dtype)
        for index, key, transform in pieces:
            leaf[... if index is None else index] = transform.forward(np.asarray(tensors[key]))
        tree[path] = leaf if place is None else place(path, leaf)
    return traverse_util.unflatten_dict(tree, sep="/")


def to_reference(tree: Mapping[str, Any], table: Table) -> dict[str, np.ndarray]:
    """The inverse of `to_tree`: a parameter tree -> reference tensors, without the keys that rules call unused.

    Raises RefineError for leaves that no rule, or more than one, produces.
    """
    return {
        key: value for path, leaf in _flatten(tree).items() for key, value in _restore(path, np.asarray(leaf), table)
    }


def reference_shapes(table: Table, abstract_tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the reference's tensors that `abstract_tree` stands for, at no cost in memory."""
    return {
        key: value.shape
        for path, leaf in _flatten(abstract_tree).items()
        for key, value in _restore(path, _standin(leaf.shape), table)
    }


def places(table: Table, abstract_tree: Mapping[str, Any]) -> dict[str, tuple[str, int | None, Transform]]:
    """Where each of the reference's tensors is held: its key -> (leaf's path, index on the leaf's axis 0, transform).

    The inverse of the accounting (`assign`), for what writes tensors one at a time.
    """
    return {
        key: (path, index, how)
        for path, leaf in _flatten(abstract_tree).items()
        for key, index, how in _keys(path, leaf.shape, table)
    }


def _restore(path: str, leaf: np.ndarray, table: Table) -> list[tuple[str, np.ndarray]]:
    return [
        (key, how.inverse(leaf if index is None else leaf[index])) for key, index, how in _keys(path, leaf.shape, table)
    ]


def _keys(path: str, shape: Sequence[int], table: Table) -> list[tuple[str, int | None, Transform]]:
    matches = [
        (rule, found) for rule in table if rule.path is not None and (found := rule.path_pattern.fullmatch(path))
    ]
    if len(matches) != 1:
        raise RefineError(f"parameter {path}: {len(matches)} rules of the table give it, 1 expected")
    rule, found = matches[0]
    if rule.how.inverse is None:
        raise RefineError(f"parameter {path}: transform {rule.how.name} has no inverse")
    values = found.groupdict()
    if rule.stack is None:
        return [(_fill(rule.key, values), None, rule.how)]
    return [(_fill(rule.key, {**values, rule.stack: index}), index, rule.how) for index in range(shape[0])]
