"""What a compiled program does, read from its text (`jax.stages.Compiled.as_text`): FLOPs, bytes, collectives.

XLA's own `cost_analysis` counts the body of a loop once; here every computation counts as often as it runs.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{[^}]*\})?")
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "while",
    "conditional",
    "call",
    "copy-done",
    "async-done",
    "async-update",
    "opt-barrier",
}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: what it makes, from what, how (`attributes`, raw)."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @functools.cached_property
    def arrays(self) -> list[tuple[str, tuple[int, ...], bool]]:
        """(dtype, shape, whether it is in the chip's HBM) of every array of the result."""
        found = []
        for match in _ARRAY.finditer(self.type):
            shape = tuple(int(side) for side in match[2].split(",") if side)
            found.append((match[1], shape, not re.search(r"S\([1-9]", match[0])))
        return found

    @property
    def bytes(self) -> float:
        return sum(_bytes(*array[:2]) for array in self.arrays)

    @property
    def hbm_bytes(self) -> float:
        return sum(_bytes(dtype, shape) for dtype, shape, in_hbm in self.arrays if in_hbm)

    def called(self, key: str) -> list[str]:
        found = re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|(%[\w.\-]+))", self.attributes)
        return re.findall(r"%([\w.\-]+)", found[1] or found[2]) if found else []


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective: bytes that come into a chip each time, how often, and which of the devices take part together.

    shapes: (dtype, shape) of what a chip gives.
    """

    kind: str
    bytes: float
    times: float
    groups: np.ndarray  # [groups, members] positions in the mesh, or [pairs, 2] of a permutation
    what: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Work:
    """What a chip does in a run. kernels: FLOPs of attention kernels by their name."""

    flops: float
    kernels: dict[str, float]
    hbm_bytes: float
    collectives: list[Collective]

    @property
    def attention_flops(self) -> float:
        return sum(self.kernels.values())


class Module:
    """The computations of an HLO module."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        inside: dict[str, Instruction] | None = None
        for line in _lines(text):
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$", line)
            if header:
                inside = self.computations[header[2]] = {}
                self.entry = header[2] if header[1] else self.entry
            elif line == "}":
                inside = None
            elif inside is not None:
                instruction = _instruction(line.strip())
                if instruction is not None:
                    inside[instruction.name] = instruction
        if not self.entry:
            raise ValueError("no ENTRY computation: this is no text of an HLO module")
        self.times: dict[str, float] = defaultdict(float)
        self._visit(self.entry, 1.0)

    def _visit(self, name: str, times: float) -> None:
        """Count how often each computation runs; those inside fusions and reductions belong to their caller."""
        self.times[name] += times
        for instruction in self.computations[name].values():
            if instruction.opcode == "while":
                [body], [condition] = instruction.called("body"), instruction.called("condition")
                self._visit(body, times * self.trips(instruction, condition))
            elif instruction.opcode == "conditional":
                branches = instruction.called("branch_computations")
                branches = branches or instruction.called("true_computation") + instruction.called("false_computation")
                for branch in branches:  # each as if taken: an upper bound
                    self._visit(branch, times)
            elif instruction.opcode in ("call", "async-start"):
                for called in instruction.called("to_apply") or instruction.called("calls"):
                    self._visit(called, times)

    def trips(self, loop: Instruction, condition: str) -> int:
        """How often a loop runs: XLA's own word, or the constant that its counter is compared with."""
        known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        bounds = [
            int(found[1])
            for instruction in self._deep(condition)
            if instruction.opcode == "constant" and (found := re.match(r"(\d+)\)", instruction.attributes))
        ]
        if len(set(bounds)) != 1:
            raise ValueError(f"loop {loop.name}: its number of steps cannot be read ({bounds})")
        return -(-bounds[0] // self._stride(loop, condition))

    def _stride(self, loop: Instruction, condition: str) -> int:
        """By how much a loop's counter grows: more than 1 where the compiler has unrolled its body."""
        inside = self.computations[condition]
        read = next((i for i in inside.values() if i.opcode == "get-tuple-element"), None)
        index = read and re.search(r"index=(\d+)", read.attributes)
        [body] = (self.computations[name] for name in loop.called("body"))
        root = next(i for i in body.values() if i.root)
        if index is None or root.opcode != "tuple":
            return 1
        grown = body[root.operands[int(index[1])]]
        if grown.opcode == "fusion":
            [body] = (self.computations[name] for name in grown.called("calls"))
            grown = next(i for i in body.values() if i.root)
        steps = [body[name] for name in grown.operands if grown.opcode == "add" and name in body]
        steps = [i for i in steps if i.opcode == "constant" and re.match(r"\d+\)", i.attributes)]
        return int(steps[0].attributes.split(")")[0]) if steps else 1

    def _deep(self, name: str) -> Iterator[Instruction]:
        for instruction in self.computations[name].values():
            yield instruction
            for called in instruction.called("calls"):
                yield from self._deep(called)

    # ---------------------------------------------------------------------------------------------------------- work

    def work(self, computed: Mapping[tuple[int, int], float] | None = None) -> Work:
        """All that happens in one run, on one chip.

        computed: (queries, keys) of an attention kernel -> the share of its blocks that are not skipped, which the
        program's input decides; of others all blocks count.
        """
        flops, hbm, kernels, collectives = 0.0, 0.0, defaultdict(float), []
        self._chains: set[str] = set()  # collectives met that go on through several fusions
        for name, times in self.times.items():
            computation = self.computations[name]
            for instruction in computation.values():
                flops += times * self._flops(computation, instruction)
                kernel = _kernel(instruction)
                if kernel:
                    kernels[kernel[0]] += times * kernel[1] * (computed or {}).get(kernel[2], 1.0)
                hbm += times * self._traffic(computation, instruction)
                collectives += self._collectives(computation, instruction, times)
        return Work(flops + sum(kernels.values()), dict(kernels), hbm, collectives)

    def buffers(self) -> set[tuple[str, tuple[int, ...]]]:
        """(dtype, shape) of all that stands in a chip's memory at some time: results outside of fusions."""
        return {array[:2] for name in self.times for i in self.computations[name].values() for array in i.arrays}

    def _flops(self, computation: dict[str, Instruction], instruction: Instruction) -> float:
        if instruction.opcode == "fusion":
            inner = [self.computations[called] for called in instruction.called("calls")]
            return sum(self._flops(c, i) for c in inner for i in c.values())
        if instruction.opcode == "dot":
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
            left = computation[instruction.operands[0]].arrays[0][1]
            depth = math.prod(left[int(axis)] for axis in axes[1].split(",") if axis)
            return 2.0 * math.prod(instruction.arrays[0][1]) * depth
        if instruction.opcode == "convolution":
            return _convolution(computation, instruction)
        return 0.0

    def _traffic(self, computation: dict[str, Instruction], instruction: Instruction) -> float:
        """Bytes between a chip and its HBM: what is read and what is written, slices where only slices are."""
        kind = instruction.opcode
        if kind in _FREE or kind.endswith("-done") or self._started(instruction) is False:
            return 0.0
        operands = [computation[name] for name in instruction.operands if name in computation]
        if kind in ("dynamic-slice", "slice", "gather"):
            return instruction.hbm_bytes + (instruction.bytes if operands and operands[0].hbm_bytes else 0.0)
        if kind == "dynamic-update-slice":
            return 2.0 * operands[1].hbm_bytes
        if kind.endswith("-start") and not kind.startswith(COLLECTIVES):
            # (copy, source, …) or ((source), slice, …): the smaller of the two moves.
            moved = min(_bytes(*array[:2]) for array in instruction.arrays[:2])
            ends = bool(operands[0].hbm_bytes) + (instruction.arrays[0 if kind == "copy-start" else 1][2])
            return moved * ends
        if kind != "fusion":
            return instruction.hbm_bytes + sum(operand.hbm_bytes for operand in operands)
        [called] = instruction.called("calls")
        inner = self.computations[called]
        total = 0.0
        # What only passes through, while a collective goes on behind the fusion's own work, is not moved.
        aliases = re.findall(r"\{(\d*)\}: \((\d+),", instruction.attributes.partition("output_to_operand_aliasing=")[2])
        through = {int(operand) for _, operand in aliases}
        kept = {int(output or 0) for output, _ in aliases}
        for value in inner.values():
            if value.opcode != "parameter":
                continue
            index = _index(value)
            if index >= len(operands) or index in through or not operands[index].hbm_bytes:
                continue
            total += self._read(inner, value.name, operands[index].hbm_bytes)
        root = next(value for value in inner.values() if value.root)
        outputs = [inner.get(name) for name in root.operands] if root.opcode == "tuple" else [root]
        for index, array in enumerate(instruction.arrays):
            output = outputs[index] if index < len(outputs) else None
            if output is not None and output.opcode == "dynamic-update-slice":
                total += inner[output.operands[1]].bytes if output.operands[1] in inner else 0.0
            elif array[2] and index not in kept:
                total += _bytes(*array[:2])
        return total

    def _started(self, instruction: Instruction) -> bool | None:
        """Of a fusion that is one end of an asynchronous collective, whether it is the start; None of any other."""
        for called in instruction.called("calls") if instruction.opcode == "fusion" else ():
            root = next(value for value in self.computations[called].values() if value.root)
            for name, starts in (("AsyncCollectiveStart", True), ("AsyncCollectiveDone", False)):
                if f'"{name}"' in root.attributes:
                    return starts
        return None

    def _read(self, inside: dict[str, Instruction], name: str, whole: float) -> float:
        """Bytes that a fusion reads of its operand `name`: slices where all that is done with it is to slice it."""
        total = 0.0
        for user in inside.values():
            if name not in user.operands:
                continue
            if user.opcode in ("dynamic-slice", "slice"):
                total += user.bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue  # changed in place
            elif user.opcode in ("bitcast", "reshape"):
                total += self._read(inside, user.name, whole)
            elif user.opcode == "fusion":
                inner = self.computations[user.called("calls")[0]]
                for value in inner.values():
                    if value.opcode == "parameter" and user.operands[_index(value)] == name:
                        total += self._read(inner, value.name, whole)
            else:
                return whole
        return min(total, whole)

    def _collectives(
        self, computation: dict[str, Instruction], instruction: Instruction, times: float, fused: bool = False
    ) -> list[Collective]:
        if instruction.opcode == "fusion" and self._started(instruction) is not False:
            inner = self.computations[instruction.called("calls")[0]]
            found = [found for value in inner.values() for found in self._collectives(inner, value, times, True)]
            own = re.search(r'op_name="([^"]*)"', instruction.attributes)
            return [dataclasses.replace(one, what=own[1]) if own else one for one in found]
        opcode = instruction.opcode.removesuffix("-start")
        if opcode not in COLLECTIVES:
            return []
        # One that goes on behind several fusions in turn stands in each of them.
        chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
        if chain and chain[1] in self._chains:
            return []
        if chain:
            self._chains.add(chain[1])
        if opcode == "all-reduce" and fused and _cut(computation, instruction.name):
            opcode = "reduce-scatter"
        given = sum(computation[name].bytes for name in instruction.operands if name in computation)
        groups = _groups(instruction.attributes)
        if opcode == "collective-permute":
            came = given
        else:
            members = groups.shape[1]
            part = (members - 1) / members
            # What comes in; of an all-reduce, as a reduce-scatter and an all-gather.
            came = {
                "all-gather": given * (members - 1),
                "reduce-scatter": given * part,
                "all-to-all": given * part,
            }.get(opcode, 2.0 * given * part)
        named = re.search(r'op_name="([^"]*)"', instruction.attributes)
        what = named[1] if named else re.sub(r"\{[^}]*\}", "", instruction.type)[:60]
        shapes = tuple(
            array[:2] for name in instruction.operands if name in computation for array in computation[name].arrays
        )
        return [Collective(opcode, came, times, groups, what, shapes)]


# -------------------------------------------------------------------------------------------------------------- reading


def _lines(text: str) -> Iterator[str]:
    """Lines, with those joined that belong to one instruction (quoted attributes may hold line breaks)."""
    held = ""
    for line in text.splitlines():
        held = f"{held} {line}" if held else line
        if held.count('"') % 2 == 0 or held.count('"') - held.count('\\"') == 0:
            yield held
            held = ""


def _cut(fused: dict[str, Instruction], name: str) -> bool:
    """Whether of a fusion's value only slices are used. A sum over chips and a slice of it in one fusion are how the
    compiler writes its reduce-scatter; where they are two kernels, whole sums do travel."""
    users = [value for value in fused.values() if name in value.operands]
    through = ("bitcast", "reshape", "get-tuple-element")  # of several sums in one
    return bool(users) and all(
        user.opcode == "dynamic-slice" or (user.opcode in through and _cut(fused, user.name)) for user in users
    )


def _index(parameter: Instruction) -> int:
    return int(parameter.attributes.split(")")[0])


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"(ROOT )?%?([\w.\-]+) = ", line)
    if not match:
        return None
    rest = line[match.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    inside = rest[: _closing("(" + rest) - 2]
    attributes = inside + ")" + rest[len(inside) + 1 :]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(match[2], type_, opcode, operands, attributes, bool(match[1]))


def _closing(text: str) -> int:
    """One past the bracket that closes the first."""
    depth = 0
    for index, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return index + 1
    raise ValueError("unbalanced brackets in the text of the module")


def _bytes(dtype: str, shape: Sequence[int]) -> float:
    if dtype in ("token", "opaque"):
        return 0.0
    digits = re.search(r"\d+", dtype)
    bits = _BITS.get(dtype) or (int(digits[0]) if digits else 8)
    return math.prod(shape) * bits / 8


def _groups(attributes: str) -> np.ndarray:
    """Which positions take part together, from any of the ways in which XLA writes it."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    if pairs:
        return np.array([[int(x) for x in pair.split(",")] for pair in re.findall(r"\{([\d,]+)", pairs[1] + "}")])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes)
    if named:
        axes = re.findall(r"'(\w+)'=(\d+)", named[1])
        sizes, names = [int(size) for _, size in axes], [name for name, _ in axes]
        ids = _iota(named[2]) if named[2] else np.arange(math.prod(sizes))
        # An axis may take part in part: 'axis':(before)size.
        wanted = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[3])
        split, taken = [], []
        for name, size in zip(names, sizes):
            part = next((w for w in wanted if w[0] == name), None)
            if part is None:
                split.append(size)
            elif part[1]:
                before, own = int(part[1]), int(part[2])
                taken.append(len(split) + 1)
                split += [before, own, size // before // own]
            else:
                taken.append(len(split))
                split.append(size)
        grid = np.moveaxis(ids.reshape(split), taken, range(-len(taken), 0))
        return grid.reshape(-1, math.prod(split[axis] for axis in taken))
    iota = re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        return _iota(iota[1])
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", attributes)
    if listed:
        return np.array([[int(x) for x in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    raise ValueError(f"replica groups cannot be read: {attributes[:200]}")


def _iota(text: str) -> np.ndarray:
    """`[2,8]<=[8,2]T(1,0)`: the numbers from 0, in the shape on the right, transposed, in the shape on the left."""
    found = re.match(r"\(?\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", text)
    numbers = lambda group: [int(x) for x in group.split(",")]
    shape = numbers(found[1])
    ids = np.arange(math.prod(shape)).reshape(numbers(found[2]) if found[2] else shape)
    if found[3]:
        ids = ids.transpose(numbers(found[3]))
    return ids.reshape(shape) if found[2] else ids


def _convolution(computation: dict[str, Instruction], instruction: Instruction) -> float:
    """2 x outputs x kernel positions that meet data x input features. On a TPU every matrix product is one of these."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    kernel = computation[instruction.operands[1]].arrays[0][1]
    outputs = instruction.arrays[0][1]
    size = 2.0 * kernel[labels[2].index("i")]
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    space = [char for char in labels[3] if char.isdigit()]
    left = computation[instruction.operands[0]].arrays[0][1]
    for k, char in enumerate(sorted(space)):
        size *= _meetings(
            {name: value.split("x")[k] for name, value in fields.items() if name != "rhs_reversal"},
            left[labels[1].index(char)],
            outputs[labels[3].index(char)],
        )
    return size * math.prod(outputs)


def _meetings(window: dict[str, str], given: int, made: int) -> float:
    """Along one axis: kernel positions, an output, that meet an element and not padding or a gap."""
    taps, stride = int(window.get("size", 1)), int(window.get("stride", 1))
    low = int(window.get("pad", "0_0").split("_")[0])
    apart, wide = int(window.get("lhs_dilate", 1)), int(window.get("rhs_dilate", 1))
    # Output o reads o·stride + t·wide - low of the spread input.
    where = np.arange(made)[:, None] * stride + np.arange(taps)[None] * wide - low
    return float(np.count_nonzero((where >= 0) & (where <= (given - 1) * apart) & (where % apart == 0))) / made


def _kernel(instruction: Instruction) -> tuple[str, float, tuple[int, int]] | None:
    """An attention kernel's name, the FLOPs of the matrix products that it does, and its (queries, keys)."""
    if instruction.opcode != "custom-call" or "tpu_custom_call" not in instruction.attributes:
        return None
    products = {"fwd": 2, "dq": 3, "dkv": 5}
    name = next((word for word in products if f"_{word}" in instruction.name), None)
    if "splash" not in instruction.name or name is None:
        return None
    given = re.search(r"operand_layout_constraints=\{(.*?)\}\}?, \w+=", instruction.attributes + ", x=")
    shapes = [
        [int(x) for x in match[2].split(",")] for match in _ARRAY.finditer(given[1]) if match[1] in ("bf16", "f32")
    ]
    queries, keys = [shape for shape in shapes if len(shape) >= 3][:2]
    size = queries[-2], keys[-2]
    return name, 2.0 * products[name] * math.prod(queries[:-2]) * math.prod(size) * queries[-1], size
