"""What a configuration costs on a TPU, by the real TPU compiler, on a machine with none.

    python tools/aot.py configs/edit_2511_v6e_16.py --topology v6e:4x4
    python tools/aot.py configs/batch_2511_v6e_8.py --json
    python tools/aot.py --all                      # every shipped configuration, and the sampler: docs/pods.json, .md

Needs libtpu (the extra `tpu`), no TPU and no weights: the program is built from shapes. Prints, a chip: bytes of
arguments, temporaries and the peak; FLOPs done and needed; bytes moved to memory and by each kind of collective; the
roofline time of a step and the bound on MFU that follows; and whether trained state and gradients are really split.
A program of 60 blocks compiles in two to four minutes on two cores. `--all` keeps what it has measured of unchanged
programs and can be stopped at any time.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask about
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor to be shared: several may compile at once
os.environ["JAX_PLATFORMS"] = "cpu"

import hlo
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn
from flax.linen import meta
from tqdm import tqdm

from refine_jax import bagel_objective, checkpoint, configuration, flops, loading, objectives, parallel, prompts, train
from refine_jax.bagel import BagelModel
from refine_jax.errors import RefineError
from refine_jax.model import PUBLISHED, ModelConfig
from refine_jax.models.segments import attention_mask, join
from refine_jax.models.splash import block_size
from refine_jax.refine import WIDE_TEXT_BUCKETS, reference_room, view_tokens
from refine_jax.refine_programs import Reference, Spec, refine_program

# A kernel's text has the places of the source that made it: marks would tell installations apart.
jax.config.update("jax_traceback_in_locations_limit", 0)

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
TABLE = ROOT / "docs" / "pods.md"
MEASURED = ROOT / "docs" / "pods.json"
PROGRAMS = ("train", "sample")
SAMPLER_STEPS = 8  # without guidance, as the Lightning adapters ask for it
INSTRUCTION = 64  # tokens of a request's text besides the template's and the pictures'
CROP = (1024, 1024)  # of a call of the sampler


@dataclasses.dataclass(frozen=True)
class Report:
    """A compiled program's figures; bytes, FLOPs and seconds are of one chip and one step (or one call)."""

    config: str
    program: str
    topology: str
    chips: int
    chip: str
    batch: int
    mesh: dict[str, int]
    argument_bytes: float
    temporary_bytes: float
    output_bytes: float
    peak_bytes: float
    hbm_bytes: float
    needed_flops: float
    needed_attention: float
    done_flops: float
    done_attention: float
    moved_bytes: float
    collective_bytes: dict[str, float]
    largest_collective: str
    compute_seconds: float
    memory_seconds: float
    link_seconds: float
    whole: list[str]
    trained_bytes: float
    compile_seconds: float

    @property
    def seconds(self) -> float:
        """The roofline: the slowest of arithmetic, memory and links, the others hidden behind it."""
        return max(self.compute_seconds, self.memory_seconds, self.link_seconds)

    @property
    def bound(self) -> str:
        times = {"compute": self.compute_seconds, "memory": self.memory_seconds, "links": self.link_seconds}
        return max(times, key=times.get)

    def mfu(self, seconds: float) -> float:
        return self.needed_flops / seconds / flops.CHIPS[self.chip].flops


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program before it is compiled. needed: counts the FLOPs of all chips; program: of a training step; computed:
    what `hlo.Module.work` is told of kernels that skip blocks."""

    lowered: Any
    mesh: jax.sharding.Mesh
    needed: Callable[[], flops.Flops]
    program: train.Program | None
    computed: Callable[[], dict[tuple[int, int], float]] = dict

    def mark(self, topology: str) -> str:
        """A digest of all that decides a measured figure: the program, the topology, the compiler, its options."""
        versions = [version(name) for name in ("jax", "jaxlib", "libtpu")]
        options = parallel.compiler_options(self.mesh)
        digest = hashlib.sha256(json.dumps([topology, versions, options], sort_keys=True).encode())
        digest.update(self.lowered.as_text().encode())
        return digest.hexdigest()[:16]


def lower(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, program: str, bucket: int) -> Lowered:
    """The step that the trainer would run, or a call of the sampler, for the mesh's platform."""
    model = architecture(config)
    if program == "sample":
        return lower_sample(config, mesh, model)
    if not 0 <= bucket < len(config.data.buckets):
        raise RefineError(f"--bucket {bucket}: the configuration has {len(config.data.buckets)}")
    return lower_train(config, mesh, model, bucket)


def lower_train(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, model: ModelConfig | None, bucket: int
) -> Lowered:
    """The step of `train.make_program`, of shapes alone."""
    objective = objectives.make(config, model)
    program = train.make_program(config, objective, mesh)
    rows = parallel.batch_sharding(mesh)
    shapes = objective.batch_shapes()[bucket]
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows), shapes)
    with program.context():
        traced = program.step.trace(program.state, program.frozen, batch)
        lowered = traced.lower(lowering_platforms=(mesh.devices.flat[0].platform,))
    needed = lambda: flops.of_step(config, objective.model, shapes)
    if not isinstance(objective.model, BagelModel):
        return Lowered(lowered, mesh, needed, program)
    pieces = mesh.shape["context"]  # each of its chips has a part of every stream's queries, and all keys
    return Lowered(lowered, mesh, needed, program, lambda: computed_blocks(objective.model, shapes, pieces))


def computed_blocks(model: BagelModel, batch: Any, pieces: int) -> dict[tuple[int, int], float]:
    """Of attention over a packed row, full and with samples as MFU counts them: (queries, keys) of the kernel -> the
    share of its blocks that are computed, those in which a query sees a key, on the busiest of the `pieces` chips that
    share the row."""
    text, seen, painted = bagel_objective.row_segments(model, bagel_objective.even_row(batch))
    streams = join(text, seen), painted
    keys = join(*streams)
    # As `segments.segment_mask` sorts them.
    order = np.lexsort([np.asarray(x[0]) for x in (keys.index, keys.segment, ~keys.noisy, keys.sample)])
    sees = jax.jit(lambda queries: attention_mask(queries, keys)[0, 0, :, order].T)
    length, shares = keys.sample.shape[1], []
    block_q, block_kv = block_size(length // pieces), block_size(length)
    for piece in range(pieces):
        cut = lambda x: np.split(x, pieces, axis=1)[piece]  # noqa: B023
        queries = join(*(jax.tree.map(cut, stream) for stream in streams))
        met = []
        for start in range(0, length // pieces, block_q):
            block = sees(jax.tree.map(lambda x: x[:, start : start + block_q], queries))  # noqa: B023
            met.append(np.add.reduceat(block.any(axis=0), range(0, length, block_kv)) > 0)
        shares.append(float(np.mean(met)))
    padded = lambda length, block: -(-length // block) * block
    return {(padded(length // pieces, block_q), padded(length, block_kv)): max(shares)}


def lower_sample(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, model: ModelConfig, size: tuple[int, int] = CROP
) -> Lowered:
    """A batch of `refine-jax batch`: `batch_size` crops of `size`, each with a reference that is encoded already, in
    `SAMPLER_STEPS` steps without guidance, adapters merged."""
    rules = parallel.make_rules(config.rules)
    kinds = dict(dtype=config.dtype, param_dtype=config.dtype)
    parts = {name: dataclasses.replace(getattr(model, name), **kinds) for name in ("mmdit", "vae", "vl")}
    model = loading.quantized(dataclasses.replace(model, **parts), config.quantize or None)
    whole = parallel.replicated(mesh)
    shape = lambda dtype, *sides: jax.ShapeDtypeStruct(sides, dtype, sharding=whole)
    rows, (height, width) = config.batch_size, size
    views, (tokens, seen) = model.vl_sizes(width / height), reference_room(model)
    length = model.prompt.drop_tokens + 2 * view_tokens(model, views) + seen + INSTRUCTION
    length = prompts.bucket_length(length, WIDE_TEXT_BUCKETS)
    spec = Spec(size, views)
    prompt = dict(
        ids=shape(jnp.int32, rows, length),
        mask=shape(jnp.bool_, rows, length),
        positions=shape(jnp.int32, rows, length, 3),
        image_index=shape(jnp.int32, rows, length),
    )
    dtype = jnp.dtype(config.dtype)
    inputs = dict(
        pictures=shape(jnp.uint8, rows, height, width, 3),
        mask=shape(jnp.uint8, rows, height, width),
        box=shape(jnp.int32, rows, 4),
        reference=Reference(
            shape(jnp.float32, rows, tokens, model.mmdit.in_channels),
            shape(jnp.int32, rows, 2),
            shape(dtype, rows, seen, model.vl.text.hidden_size),
        ),
        has_reference=shape(jnp.bool_, rows),
        prompt=prompt,
        sigmas=shape(jnp.float32, SAMPLER_STEPS + 1),
        true_cfg_scale=shape(jnp.float32, rows),
        noise=shape(jnp.float32, rows, *model.latent_size(size), model.vae.z_dim),
    )
    boxed = model.boxed()
    variables = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        meta.unbox(boxed),
        parallel.param_shardings(boxed, mesh, rules),
    )
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        traced = refine_program.trace(variables, {}, inputs, model=model, spec=spec)
        lowered = traced.lower(lowering_platforms=(mesh.devices.flat[0].platform,))
    plain = dataclasses.replace(model, mmdit=dataclasses.replace(model.mmdit, attention_impl="xla"))
    run = lambda *trees: refine_program(*trees, model=plain, spec=spec)
    return Lowered(lowered, mesh, lambda: flops.count(run, variables, {}, inputs), None)


# ----------------------------------------------------------------------------------------------------------- the report


def analyse(
    config: ml_collections.ConfigDict, name: str, topology: str, program: str, made: Lowered
) -> tuple[Report, str]:
    """Compile and read; the report, and the text of the compiled program."""
    mesh, started = made.mesh, time.perf_counter()
    compiled = made.lowered.compile()  # with the options that the program is jitted with
    seconds = time.perf_counter() - started
    text = compiled.as_text()
    module = hlo.Module(text)
    work, memory, needed = module.work(made.computed()), compiled.memory_analysis(), made.needed()
    device, count = mesh.devices.flat[0], mesh.size
    chip = flops.chip(device)
    moved: dict[str, float] = collections.defaultdict(float)
    slow: dict[str, float] = collections.defaultdict(float)
    for collective in work.collectives:
        moved[collective.kind] += collective.bytes * collective.times
        what = re.sub(r"jit\(\w+\)/|while/body/|closed_call/|checkpoint/|rematted_computation/", "", collective.what)
        slow[f"{collective.kind} of {what}"] += link_seconds(collective, mesh, chip)
    whole, trained = ([], 0.0) if made.program is None else unsplit(made.program, module)
    return Report(
        config=name,
        program=program,
        topology=topology,
        chips=count,
        chip=_kind(chip),
        batch=config.batch_size,
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        peak_bytes=max(
            memory.peak_memory_in_bytes,
            memory.argument_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes,
        ),
        hbm_bytes=chip.hbm,
        needed_flops=needed.total / count,
        needed_attention=needed.attention / count,
        done_flops=work.flops,
        done_attention=work.attention_flops,
        moved_bytes=work.hbm_bytes,
        collective_bytes=dict(moved),
        largest_collective=max(slow, key=slow.get) if slow else "",
        compute_seconds=work.flops / chip.flops,
        memory_seconds=work.hbm_bytes / chip.bandwidth,
        link_seconds=sum(slow.values()),
        whole=whole,
        trained_bytes=trained,
        compile_seconds=seconds,
    ), text


def _kind(chip: flops.Chip) -> str:
    return next(kind for kind, known in flops.CHIPS.items() if known is chip)


def architecture(config: ml_collections.ConfigDict) -> ModelConfig | None:
    """The network that a configuration trains, without opening a file of weights; None for the VAE's objective."""
    if config.get("objective") == "vae":
        return None
    if config.get("variant"):
        return PUBLISHED[config.variant]
    if config.get("init_from"):
        return loading.read_config(config.init_from)
    raise RefineError("model: only the published variants and models at hand can be compiled ahead; set init_from")


def link_seconds(collective: hlo.Collective, mesh: jax.sharding.Mesh, chip: flops.Chip) -> float:
    """A collective's least time: its bytes over the links that its group has, one or, in a ring, two an axis.

    A chip at the end of an open axis has one link along it, and the slowest chip decides.
    """
    devices = mesh.devices.reshape(-1)
    where = np.array([device.coords for device in devices])
    sides = where.max(0) - where.min(0) + 1
    group = where[collective.groups[0]]
    if collective.kind == "collective-permute":
        return collective.times * collective.bytes / chip.link
    spans = [axis for axis in range(where.shape[1]) if len(set(group[:, axis])) > 1]
    closed = [len(set(group[:, axis])) == sides[axis] and sides[axis] % chip.wraps == 0 for axis in spans]
    links = sum(2 if ring else 1 for ring in closed)
    return collective.times * collective.bytes / (chip.link * max(links, 1))


def unsplit(program: train.Program, module: hlo.Module) -> tuple[list[str], float]:
    """(names of large trained arrays, of their optimizer state and of gradients that are whole on a chip, bytes of
    trained state a chip): what is declared; and in the compiled program no result of a split array's whole shape, and
    no sum over chips of a whole layer's gradient, where a reduce-scatter would do with half the traffic."""
    ways = program.mesh.size // math.prod(program.mesh.shape[axis] for axis in ("slice", "data"))
    found, total = [], 0.0
    state = {"params": program.state.params, "opt_state": program.state.opt_state, "ema": program.state.ema}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        local = leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(local) * leaf.dtype.itemsize
        if leaf.size >= 2**20 and ways > 1 and math.prod(local) == leaf.size:
            found.append(jax.tree_util.keystr(path, simple=True, separator="/"))
    kinds = {"float32": "f32", "bfloat16": "bf16"}
    standing = module.buffers()
    summed = {shape for one in module.work().collectives if one.kind == "all-reduce" for _, shape in one.shapes}
    for path, leaf in jax.tree_util.tree_leaves_with_path(program.state.params):
        split = leaf.sharding.shard_shape(leaf.shape) != leaf.shape
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if leaf.size >= 2**20 and split and (kinds[leaf.dtype.name], leaf.shape) in standing:
            found.append(f"gradient of {name}")
        layer = leaf.shape[1:] if leaf.ndim > 2 else leaf.shape  # of a stack
        if math.prod(layer) >= 2**20 and split and {layer, (1, *layer)} & summed:
            found.append(f"sum of gradients of {name}")
    return found, total


def describe(report: Report) -> str:
    """For a reader."""
    gib = lambda size: f"{size / GIB:.2f} GiB"
    moved = ", ".join(f"{kind} {size / 1e9:.1f} GB" for kind, size in sorted(report.collective_bytes.items()))
    overlapped, summed = report.seconds, report.compute_seconds + report.memory_seconds + report.link_seconds
    lines = [
        f"{report.config} {report.program} on {report.topology}: {report.chips} x {flops.CHIPS[report.chip].name},"
        f" batch {report.batch}, mesh {' x '.join(f'{k} {v}' for k, v in report.mesh.items()) or '1'}",
        f"memory       arguments {gib(report.argument_bytes)}, temporaries {gib(report.temporary_bytes)},"
        f" peak {gib(report.peak_bytes)} of {gib(report.hbm_bytes)}: {report.peak_bytes / report.hbm_bytes:.0%}",
        f"FLOPs        needed {report.needed_flops / 1e12:.1f} T, attention {_share(report, 'needed'):.0%};"
        f" done {report.done_flops / 1e12:.1f} T, attention {_share(report, 'done'):.0%}",
        f"moved        memory {report.moved_bytes / 1e9:.0f} GB; {moved or 'no collectives'}",
        f"roofline     compute {report.compute_seconds:.3f} s, memory {report.memory_seconds:.3f} s,"
        f" links {report.link_seconds:.3f} s (most: {report.largest_collective or '-'})",
        f"MFU          at most {report.mfu(overlapped):.0%} at {overlapped:.2f} s a"
        f" {'step' if report.program == 'train' else f'call, {_each(report)} a picture'}, bound by {report.bound};"
        f" {report.mfu(summed):.0%} with nothing hidden",
    ]
    if report.program == "train":
        lines.append(
            f"trained      {gib(report.trained_bytes)} a chip;"
            f" {'whole on every chip: ' + ', '.join(report.whole) if report.whole else 'all of it split'}"
        )
    return "\n".join([*lines, f"compiled in  {report.compile_seconds:.0f} s"])


def _each(report: Report) -> str:
    return f"{report.seconds / report.batch:.2f} s"


def _share(report: Report, kind: str) -> float:
    return getattr(report, f"{kind}_attention") / max(getattr(report, f"{kind}_flops"), 1.0)


HEAD = """\
| configuration | program | topology | batch | mesh | arguments | temporaries | peak of HBM | FLOPs needed / done | \
attention | memory | collectives | compute / memory / links | step, at least | MFU, at most |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def row(report: Report) -> str:
    """A line of the table."""
    mesh = " × ".join(f"{k} {v}" for k, v in report.mesh.items()) or "1"
    moved = ", ".join(
        f"{kind} {size / 1e9:.0f}" for kind, size in sorted(report.collective_bytes.items()) if size > 5e8
    )
    cells = [
        report.config,
        report.program,
        f"{report.topology} ({report.chips})",
        report.batch,
        mesh,
        f"{report.argument_bytes / GIB:.1f}",
        f"{report.temporary_bytes / GIB:.1f}",
        f"{report.peak_bytes / GIB:.1f} ({report.peak_bytes / report.hbm_bytes:.0%})",
        f"{report.needed_flops / 1e12:.0f} / {report.done_flops / 1e12:.0f}",
        f"{_share(report, 'needed'):.0%}",
        f"{report.moved_bytes / 1e9:.0f}",
        moved or "–",
        f"{report.compute_seconds:.2f} / {report.memory_seconds:.2f} / {report.link_seconds:.2f}",
        f"{report.seconds:.2f} s"
        if report.program == "train"
        else f"{report.seconds:.2f} s, {_each(report)} a picture",
        f"{report.mfu(report.seconds):.0%} ({report.bound})",
    ]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def write_table(reports: list[Report]) -> None:
    """The table in docs/pods.md, between its marks."""
    text = TABLE.read_text(encoding="utf-8")
    start, end = "<!-- table: python tools/aot.py --all -->", "<!-- end of table -->"
    if start not in text or end not in text:
        raise RefineError(f"{TABLE}: the marks of the table are gone; put back {start!r} and {end!r}")
    before, _, rest = text.partition(start)
    body = "\n".join([HEAD, *map(row, reports)])
    checkpoint.write_text(TABLE, f"{before}{start}\n{body}\n{end}{rest.partition(end)[2]}")


# ---------------------------------------------------------------------------------------------------------- the command


def described_devices(topology: str) -> list:
    """The devices of a TPU topology that is not there. Raises RefineError where there is no compiler for it."""
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # of several kinds, by what is missing
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RefineError(
            f"--topology {topology!r}: {first}; give one such as v5e:8x8, v5p:2x2x2 or v6e:4x4, and install libtpu"
        ) from None


def shipped() -> list[tuple[Path, str]]:
    """(configuration, topology) of those in configs/ that are for TPUs: they say so themselves (`topology`)."""
    found = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        topology = configuration.load(path).get("topology", "")
        if topology:
            found.append((path, topology))
    return found


def programs(program: str | None = None) -> list[tuple[str, str]]:
    """What `--all` compiles, of one kind or all: (configuration, its program), those that train first."""
    found = [(path.stem, kind_of(configuration.load(path))) for path, _ in shipped()]
    return [item for item in sorted(found, key=lambda item: item[1] == "sample") if program in (None, item[1])]


def kind_of(config: ml_collections.ConfigDict) -> str:
    """The program of a configuration: one for training has an objective, one for batch inference has none."""
    return "train" if "objective" in config else "sample"


def _measured() -> dict[str, dict]:
    return json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else {}


def measure_all(again: bool, only: str, program: str | None) -> list[Report]:
    """Reports of all shipped configurations; what is unchanged since it was measured is taken from docs/pods.json.

    only: an expression; programs whose keys do not match are taken as they stand there, or left out; so are those of
    another kind than `program` ("train", "sample", None: all).
    """
    for name, kind in tqdm([item for item in programs(program) if re.search(only, item[0])], unit="program"):
        config = configuration.load(ROOT / "configs" / f"{name}.py")
        mesh = parallel.make_mesh(dict(config.mesh), described_devices(config.topology))
        made = lower(config, mesh, kind, 0)
        mark = made.mark(config.topology)
        if again or _measured().get(name, {}).get("mark") != mark:
            report, _ = analyse(config, name, config.topology, kind, made)
            known = _measured()  # another process may have added to it meanwhile
            known[name] = {"mark": mark, "report": dataclasses.asdict(report)}
            checkpoint.write_text(MEASURED, json.dumps(known, indent=1, sort_keys=True) + "\n")
    known = _measured()
    return [Report(**known[name]["report"]) for name, _ in programs() if name in known]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", help="a configuration file")
    parser.add_argument("--topology", help="v5e:8x8, v5p:2x2x2, v6e:4x4, …; default: the configuration's own")
    parser.add_argument(
        "--program", choices=PROGRAMS, help="default: the configuration's; with --all: those of both kinds"
    )
    parser.add_argument("--bucket", type=int, default=0, help="which of the configuration's buckets")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--text", type=Path, help="write the compiled program's text there")
    parser.add_argument(
        "--all", action="store_true", help="all shipped configurations; rewrites the table of docs/pods.md"
    )
    parser.add_argument("--again", action="store_true", help="with --all: also what is unchanged")
    parser.add_argument(
        "--only", default="", help="with --all: an expression for keys of docs/pods.json; the others stay as they are"
    )
    args, rest = parser.parse_known_args(argv)
    try:
        if args.all:
            reports = measure_all(args.again, args.only, args.program)
            write_table(reports)
        elif args.config:
            overrides = {}
            for item in rest:
                found = re.fullmatch(r"--config\.([\w.]+)=(.*)", item)
                if not found:
                    raise RefineError(f"{item!r}: give --config.key=value")
                overrides[found[1]] = found[2]
            config = configuration.load(args.config, overrides)
            topology = args.topology or config.get("topology", "")
            if not topology:
                raise RefineError("--topology: this configuration names none; give one such as v6e:4x4")
            mesh = parallel.make_mesh(dict(config.mesh), described_devices(topology))
            reports = []
            program = args.program or kind_of(config)
            made = lower(config, mesh, program, args.bucket)
            report, text = analyse(config, Path(args.config).stem, topology, program, made)
            if args.text:
                checkpoint.write_text(args.text, text)
            reports.append(report)
        else:
            raise RefineError("give a configuration, or --all")
    except RefineError as error:
        print(f"aot: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps([dataclasses.asdict(report) for report in reports], indent=1))
    elif args.markdown:
        print("\n".join([HEAD, *map(row, reports)]))
    else:
        print("\n\n".join(map(describe, reports)))
    # Too much memory, or state that is not split, is a failure.
    return int(any(report.peak_bytes > 0.9 * report.hbm_bytes or report.whole for report in reports))


if __name__ == "__main__":
    sys.exit(main())
