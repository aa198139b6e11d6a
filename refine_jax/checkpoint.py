"""Checkpoints of a training run (orbax: state and data iterator) and the model folder that a trained model ships as.

A model folder holds `refine_jax.json` (format, architecture configurations, scheduler, prompt template, defaults),
`tokenizer/`, and its weights: `weights.safetensors` (flattened trees, names joined by "/"; small models), or `weights/`
with one orbax checkpoint a network (converted ones; each device reads its own part).
"""

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from refine_jax import configuration, distributed, parallel
from refine_jax.convert.reader import DTYPES
from refine_jax.errors import RefineError, listed, out_of_memory
from refine_jax.models import quantize

MANIFEST = "refine_jax.json"
WEIGHTS = "weights.safetensors"
ORBAX = "weights"
FORMAT = 1
LARGE = 4 << 30  # bytes: from here on nothing may be gathered on one host
_CHUNK = 2 << 20  # bytes of a chunk of such a tree


# ----------------------------------------------------------------------------------------------- model folders


def write_text(path: Path, text: str, owner: str = "") -> None:
    """Write `text` aside, then rename: a reader sees the old file or the whole new one.

    owner: tells those apart that may write it at the same time.
    """
    aside = path.with_name(f"{path.name}{owner and '.'}{owner}.partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file aside, then rename it. Raises what the library and the file system raise."""
    aside = path.with_name(path.name + ".partial")
    try:
        aside.touch()
        mode = aside.stat().st_mode  # what the user's umask gives; safetensors writes for the owner alone
        save_file(dict(tensors), aside, metadata=metadata and dict(metadata))
        aside.chmod(mode)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def save_model(
    folder: str | Path, manifest: Mapping[str, Any], trees: Mapping[str, Any], dtype: str = "float32"
) -> None:
    """Write a model folder: every process calls it, the first writes.

    `trees` maps a network's name ("mmdit", "vae", "vl") to its parameter tree; floating leaves are stored as `dtype`.
    The manifest of an earlier model goes first and the new one comes last: a folder with a manifest is complete. What
    else belongs to the folder (`tokenizer/`) is to be written before. Trees of more than `LARGE` bytes become one orbax
    checkpoint a network, written by all processes, each its own part, in the dtypes they have.
    """
    folder, first = Path(folder), jax.process_index() == 0
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
    leaves = traverse_util.flatten_dict(dict(trees), sep="/")
    if sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values()) > LARGE:
        (folder / WEIGHTS).unlink(missing_ok=True)
        with ocp.PyTreeCheckpointer() as checkpointer:
            for network, tree in trees.items():
                # A block of a stack alone, for who reads one block after the other (`convert.export`).
                cut = lambda leaf: ocp.SaveArgs(chunk_byte_size=_CHUNK, shard_axes=(0,) if leaf.ndim else ())
                how = jax.tree.map(cut, tree)
                checkpointer.save((folder / ORBAX / network).absolute(), tree, force=True, save_args=how)
    else:
        if first:
            shutil.rmtree(folder / ORBAX, ignore_errors=True)
        flat = {}
        for path, leaf in leaves.items():
            array = parallel.fetch(leaf)
            if first:
                flat[path] = np.ascontiguousarray(array.astype(dtype) if _floating(array) else array)
        if first:
            write_tensors(folder / WEIGHTS, flat)
    if first:
        write_manifest(folder, manifest)


def write_manifest(folder: str | Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest: the last file of a model folder."""
    write_text(Path(folder) / MANIFEST, json.dumps({"format": FORMAT, **manifest}, indent=1) + "\n")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a model folder. Raises `RefineError` when it is missing, unreadable or of another format."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise RefineError(f"model {str(folder)!r}: no {MANIFEST} there; give 'tiny' or a model folder of refine_jax")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RefineError(f"{path}: not valid JSON ({error}); write the model folder again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise RefineError(f"{path}: format {found!r}, this version reads {FORMAT}; write the model folder again")
    return manifest


def _floating(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)  # numpy's own does not know bfloat16


def load_weights(
    folder: str | Path,
    abstract: Mapping[str, Any],
    dtype: str | None = "float32",
    shardings: Any = None,
    progress: bool = False,
    change: Callable[[str, Any], Any] = lambda path, kernel: kernel,
) -> dict[str, Any]:
    """The parameter trees of a model folder, floating leaves as `dtype` (None: as stored).

    `abstract` maps each wanted network to its tree of `jax.ShapeDtypeStruct`. shardings: a tree like it; then the
    leaves are jax arrays placed so, and of an orbax checkpoint a host reads what its devices hold, no more. Without,
    numpy arrays. Every missing, unexpected or wrongly shaped leaf is listed in one `RefineError`.

    A matrix that is int8 in `abstract` is quantised as it is read, from the dtype in which it is stored, so that no
    two of them are there in full; change(path, matrix): what to do to it before.
    """
    folder = Path(folder)
    wanted = traverse_util.flatten_dict(dict(abstract), sep="/")
    placed = None if shardings is None else traverse_util.flatten_dict(dict(shardings), sep="/")
    if (folder / ORBAX).is_dir():
        return _load_orbax(folder / ORBAX, wanted, placed, dtype, progress, change)
    path = folder / WEIGHTS
    flat: dict[str, Any] = {}
    scales = quantize.quantized_paths(wanted)
    with _stored(path) as stored:
        found = {name: leaf for name, leaf in _header(stored).items() if name.split("/", 1)[0] in abstract}
        _account(path, found, {name: leaf for name, leaf in wanted.items() if name not in scales.values()})
        for name in sorted(found):
            array = stored.get_tensor(name)
            if name in scales:
                parts = _quantized(f"{path}: {name}", change(name, array))
            else:
                parts = [array.astype(dtype) if dtype and _floating(array) else array]
            for own, part in zip((name, scales.get(name)), parts):
                flat[own] = part if placed is None else parallel.put(part, placed[own])
    return traverse_util.unflatten_dict(flat, sep="/")


def stored_sizes(folder: str | Path) -> Counter[str]:
    """Bytes of a model folder's weights by the dtype in which they are stored; reads headers alone.

    Raises `RefineError` where `load_weights` would.
    """
    folder, sizes, found = Path(folder), Counter(), []
    if (folder / ORBAX).is_dir():
        for path in sorted(path for path in (folder / ORBAX).absolute().iterdir() if path.is_dir()):
            with _restoring(path) as (_, stored):
                found += stored.values()
    else:
        with _stored(folder / WEIGHTS) as stored:
            found += _header(stored).values()
    for leaf in found:
        sizes[np.dtype(leaf.dtype).name] += math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    return sizes


def _header(stored: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """What an opened safetensors file holds; of a dtype that nobody here knows, bytes."""
    held = {name: stored.get_slice(name) for name in stored.keys()}
    kind = lambda slice_: DTYPES.get(slice_.get_dtype(), np.dtype(np.uint8))
    return {name: jax.ShapeDtypeStruct(slice_.get_shape(), kind(slice_)) for name, slice_ in held.items()}


@contextlib.contextmanager
def _stored(path: Path) -> Iterator[Any]:
    """The safetensors file of a model folder, opened. Raises `RefineError` for one that cannot be read."""
    try:
        with safe_open(path, framework="numpy") as stored:
            yield stored
    except FileNotFoundError:
        raise RefineError(f"{path}: no such file; the model folder is incomplete") from None
    except (SafetensorError, OSError) as error:
        raise RefineError(f"{path}: cannot be read ({error}); copy or write the model folder again") from None


@contextlib.contextmanager
def _restoring(path: Path) -> Iterator[tuple[ocp.PyTreeCheckpointer, dict[str, Any]]]:
    """(what reads an orbax checkpoint, the metadata of its leaves). Raises `RefineError` for one that is damaged.

    path: absolute; orbax finds no metadata otherwise.
    """
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path).item_metadata
            if metadata is None:
                raise ValueError("its metadata are missing or cut off")
            yield checkpointer, traverse_util.flatten_dict(metadata.tree, sep="/")
    except RefineError:
        raise
    except Exception as error:  # orbax reports a damaged array with the base class
        if distributed.lost_peer(error) or out_of_memory(error):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise RefineError(f"{path}: cannot be read ({reason}); copy or convert the model again") from None


def _quantized(name: str, kernel: Any, scale: Any = None) -> tuple[Any, Any]:
    """`quantize.quantize` of a matrix; of a jax array on its devices, `scale` says where the scale goes."""
    made = quantize.quantize
    if isinstance(kernel, jax.Array):
        made = jax.jit(made, out_shardings=(kernel.sharding, scale))
    values, scales = made(kernel)
    quantize.check_finite(scales, name)
    return values, scales


def _account(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    offenders = [f"missing {name}" for name in wanted.keys() - found.keys()]
    offenders += [f"unexpected {name}" for name in found.keys() - wanted.keys()]
    for name in found.keys() & wanted.keys():
        if (shape := tuple(found[name].shape)) != wanted[name].shape:
            offenders.append(f"{name} has shape {shape}, expected {wanted[name].shape}")
        if not _floating(found[name]):
            offenders.append(f"{name} is {np.dtype(found[name].dtype).name}, no floating numbers")
    if offenders:
        raise RefineError(f"{path}: does not fit its manifest: {listed(offenders)}")


def _load_orbax(
    folder: Path,
    wanted: Mapping[str, Any],
    placed: Mapping[str, Any] | None,
    dtype: str | None,
    progress: bool,
    change: Callable[[str, Any], Any],
) -> dict[str, Any]:
    """The networks under `folder`, each an orbax checkpoint."""
    trees: dict[str, Any] = {}
    networks = sorted({name.split("/", 1)[0] for name in wanted})
    for network in tqdm(networks, unit="network", desc="loading", disable=not progress):
        path = (folder / network).absolute()
        own = {name.split("/", 1)[1]: leaf for name, leaf in wanted.items() if name.startswith(network + "/")}
        scales = quantize.quantized_paths(own)
        where = {name: None if placed is None else placed[f"{network}/{name}"] for name in own}
        with _restoring(path) as (checkpointer, stored):
            there = {name: leaf for name, leaf in own.items() if name not in scales.values()}
            _account(path, stored, there)
            flat, left = {}, {}
            for name, leaf in there.items():
                kind = stored[name].dtype
                if dtype and name not in scales and jnp.issubdtype(kind, jnp.floating):
                    kind = np.dtype(dtype)
                left[name] = jax.ShapeDtypeStruct(leaf.shape, kind, sharding=where[name])
            # The largest first: what is there in full has as little as can be beside it.
            for name in sorted(scales, key=lambda name: -left[name].size):
                kernel = _restore(checkpointer, path, {name: left.pop(name)}, partial=True)[name]
                kernel, full = change(f"{network}/{name}", kernel), f"{path}: {name}"
                flat[name], flat[scales[name]] = _quantized(full, kernel, where[scales[name]])
                del kernel
            flat |= _restore(checkpointer, path, left, partial=bool(scales))
            trees[network] = traverse_util.unflatten_dict(flat, sep="/")
    return trees


def _restore(
    checkpointer: ocp.PyTreeCheckpointer, path: Path, leaves: Mapping[str, jax.ShapeDtypeStruct], partial: bool
) -> dict[str, Any]:
    """Leaves of an orbax checkpoint, all unless `partial`: dtypes and shardings as given, numpy where there is none."""
    item, how = {}, {}
    for name, leaf in leaves.items():
        item[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        if leaf.sharding is None:
            how[name] = ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        else:
            how[name] = ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
    nest = lambda flat: traverse_util.unflatten_dict(flat, sep="/")
    args = ocp.args.PyTreeRestore(item=nest(item), restore_args=nest(how), partial_restore=partial)
    return traverse_util.flatten_dict(checkpointer.restore(path, args=args), sep="/")


# ----------------------------------------------------------------------------------------------- training runs

_SHARED = 20.0  # seconds until a file of one host is seen by the others, in a folder that they share


class Preemption:
    """Notices SIGTERM, on whichever host it arrives, and makes all hosts stop after the same step."""

    def __init__(self) -> None:
        self._asked, self._old = False, None

    def __enter__(self) -> "Preemption":
        # With several processes the coordination service of jax.distributed listens.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def go_on_from(self, first: int) -> None:
        """A run continues after step `first`; every process calls it, before its first `reached`.

        The service names the step after the furthest that any process has asked about, and says yes to that one alone:
        where a signal came before, to step 1. So the steps before are asked about; a yes holds for the next one.
        """
        if jax.process_count() > 1:
            calls = [multihost_utils.reached_preemption_sync_point(step) for step in range(1, first + 1)]
            self._asked = any(calls)

    def reached(self, step: int) -> bool:
        """Whether to save and stop after `step`. Every process calls it at every step."""
        if jax.process_count() == 1:
            return self._asked
        return multihost_utils.reached_preemption_sync_point(step) or self._asked


def claim(workdir: Path) -> None:
    """Make the work folder. Raises `RefineError`, on all hosts, where one cannot write it, or each has its own."""
    token = int(np.random.default_rng().integers(2**31))
    if jax.process_count() > 1:
        token = int(multihost_utils.broadcast_one_to_all(np.int32(token)))
    mark, reason = workdir / f".seen-{token}", ""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            mark.touch()
    except OSError as error:
        reason = str(error.strerror)
    cannot = f"--workdir {str(workdir)!r}: cannot be written ({reason}); give another folder"
    if jax.process_count() == 1:
        if reason:
            raise RefineError(cannot)
        mark.unlink()
        return
    failed = _hosts(bool(reason))
    deadline = time.monotonic() + _SHARED  # a network's folder may lag
    while not (failed or _exists(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [] if failed else _hosts(not _exists(mark))
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):
            mark.unlink()
    if failed:
        other = f"--workdir {str(workdir)!r}: process {failed[0]} cannot write it; give a folder that all hosts can"
        raise RefineError(cannot if reason else other)
    if blind:
        raise RefineError(
            f"--workdir {str(workdir)!r}: process {blind[0]} does not see what process 0 wrote there; give a folder"
            " that all hosts share"
        )


def _exists(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.exists()
    return False


def _hosts(fact: bool) -> list[int]:
    """The processes of which `fact` is true; all of them call it."""
    return np.flatnonzero(multihost_utils.process_allgather(np.array([fact])).ravel()).tolist()


def write_config(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """The resolved configuration of a run, in its `config.json`; when it is known that the run can go on with it."""
    if jax.process_index() == 0:
        write_text(workdir / "config.json", config.to_json_best_effort(indent=1) + "\n")


def manager(workdir: str | Path, keep: int = 2, save_every: int = 1000, keep_every: int = 0) -> ocp.CheckpointManager:
    """The checkpoint manager of a run: asynchronous saves under `workdir/checkpoints`.

    The `keep` newest are kept, and with `keep_every` those of its multiples for good.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, keep_period=keep_every or None, save_interval_steps=save_every, create=True
    )
    try:
        return ocp.CheckpointManager(Path(workdir).absolute() / "checkpoints", options=options)
    except OSError as error:
        raise RefineError(f"{workdir}: checkpoints cannot be kept there ({error}); give another work folder") from None


def keep_folders(folder: Path, steps: Collection[int]) -> None:
    """Of the folders that are called by a step, remove all but those of `steps`; the first process does."""
    if jax.process_index() == 0 and folder.is_dir():
        for path in folder.iterdir():
            if path.name.isdigit() and int(path.name) not in steps:
                shutil.rmtree(path, ignore_errors=True)


def save_state(
    mngr: ocp.CheckpointManager, step: int, state: Any, data: Mapping[str, Any], force: bool = False
) -> bool:
    """Save the train state and the data iterator's position (JSON values) as of `step`.

    Returns as soon as the state has left the devices; the writing goes on beside the training. Raises `RefineError`
    when this or the save before it could not be written.
    """
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=ocp.args.JsonSave({"processes": jax.process_count(), **data}),
    )
    with _written(mngr, step):
        return mngr.save(step, args=args, force=force)


def finish(mngr: ocp.CheckpointManager) -> None:
    """Wait until what was saved is on the disk. Raises `RefineError` when it could not be written."""
    with _written(mngr, mngr.latest_step()):
        mngr.wait_until_finished()


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextlib.contextmanager
def room(workdir: Path) -> Iterator[None]:
    """Inside, a file that cannot be written for want of room is a `RefineError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise RefineError(
            f"{error.filename or workdir}: cannot be written ({error.strerror}); make room, then run the same command"
            " again: it continues from the newest complete checkpoint"
        ) from error


@contextlib.contextmanager
def _written(mngr: ocp.CheckpointManager, step: int | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # orbax and tensorstore report a full disk in several classes
        if distributed.lost_peer(error):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise RefineError(
            f"{mngr.directory}: the checkpoint of step {step} or the one before cannot be written ({reason});"
            " make room, then run the same command again: it continues from the newest complete checkpoint"
        ) from error


def restore_state(mngr: ocp.CheckpointManager, abstract: Any) -> tuple[Any, dict[str, Any]] | None:
    """The newest checkpoint as (state sharded as `abstract`, data position), or None when there is none.

    The mesh and the number of processes may differ from those that saved. Raises `RefineError` for a damaged
    checkpoint, or a configuration whose state has another structure.
    """
    step = mngr.latest_step()
    if step is None:
        return None
    try:
        data = dict(mngr.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"])
        state = mngr.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        if distributed.lost_peer(error):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise RefineError(
            f"{mngr.directory}: checkpoint {step} does not fit this configuration or is damaged ({reason}); "
            "continue with the configuration it was made with, or give a new work folder"
        ) from None
    return state, data


# Settings of data that decide no order of samples.
_NO_ORDER = ("data.workers", "data.validation", "data.max_corrupt")
# Settings that change nothing of what is trained, and those without which the weights mean something else.
_BESIDE = {
    *("log_every", "save_every", "keep", "keep_every", "pictures", "validation", "profile"),
    *("topology", "rules", "remat", "lora.init_from", "lora.targets", "objective"),
}
_FIXED = ("variant", "conditioning", "prompt", "lora.alpha")


def _named(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, their names joined by dots."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _named(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def changes(position: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a resumption changes, one sentence each; `position` is what was saved.

    now: of the run, seed, batch_size, data and mesh of its configuration, and the rest under "settings". Raises
    `RefineError` for another setting without which the weights mean something else.
    """
    lines = []
    if position.get("processes") != jax.process_count():
        lines.append(
            f"resumed with {jax.process_count()} processes, saved by {position.get('processes')}: the order of"
            " samples is unchanged (a global batch does not depend on the number of hosts)"
        )
    now = json.loads(json.dumps(dict(now)))
    lines += _other_settings(position.get("settings"), now.pop("settings", None))
    mesh, before = now.pop("mesh", None), position.get("mesh")
    if before is not None and mesh != before:
        lines.append(f"resumed on the mesh {mesh}, saved on {before}: the state and the order of samples are unchanged")
    flat = lambda tree: {name: value for name, value in _named(tree) if name not in _NO_ORDER}
    saved, wanted = flat({name: position[name] for name in now if name in position}), flat(now)
    for name in sorted(saved.keys() | wanted.keys()):
        if name.partition(".")[0] in position and saved.get(name) != wanted.get(name):
            unless = "unless it is the same dataset, " if name.endswith("path") else ""
            lines.append(
                f"resumed with another {name}: {unless}the order of samples changes from here on; the position in it is"
                " kept"
            )
    return lines


def _other_settings(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> list[str]:
    if before is None or now is None:
        return []
    saved, wanted = (dict(_named(tree)) for tree in (before, now))
    lines = []
    for name in sorted(saved.keys() | wanted.keys()):
        # A key that is left out has its default; None, "" and () all say nothing.
        old, new = (found.get(name, configuration.OPTIONAL.get(name)) for found in (saved, wanted))
        old, new = (None if value in ("", [], (), {}) else value for value in (old, new))
        if old == new or name in _BESIDE or name.partition(".")[0] in _BESIDE:
            continue
        said = f"resumed with another {name}: {new!r}, saved with {old!r}"
        if name in _FIXED:
            raise RefineError(f"{said}, which the weights were trained with; give that again, or a new work folder")
        lines.append(f"{said}; it must be the same model" if name in ("init_from", "vae_from") else said)
    return lines
