"""Batch inference: every request of a manifest to its result file, whatever dies on the way.

One pass over the manifest: requests are read and decoded by a pool of threads, consumed in the manifest's order, and
their rows put into queues, one for each bucket (`serving.Bucket`: a compiled program and its shapes). A full queue is a
batch. Batches run one behind the other while earlier results are encoded and written and later requests decoded.

Which rows make a batch follows from the order of the requests alone (`scheduling`), and a row's bits do not depend on
its batch (`serving`).

    OUTPUT/run.json              what decides the results; a run with other settings is refused
    OUTPUT/results/ID.png        written aside, then renamed
    OUTPUT/journal/*.jsonl       a line a request, appended once its result stands; a file for each process and start
    OUTPUT/results.jsonl         the last line of each request, in the manifest's order
    OUTPUT/summary.json          how many of each, and how well the device was used
    OUTPUT/.lock                 held by the processes that write there now
"""

import collections
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import ml_collections
import numpy as np
from tqdm import tqdm

from refine_jax import checkpoint, executables, images, loading, parallel, serving
from refine_jax.errors import Preempted, RefineError
from refine_jax.manifest import Manifest, Refused, Request
from refine_jax.refine import Refiner
from refine_jax.regenerate import Regenerator
from refine_jax.scheduling import DONE, Scheduler, Summary

_PARTS = 32  # of 64 KiB, of a large file that are looked at to tell it from others


# ---------------------------------------------------------------------------------------------------------- the journal


class Journal:
    """What became of each request, by its id: the lines of all processes and starts."""

    def __init__(self, folder: Path, process: int = 0):
        """Reads the journals of earlier starts. A line that a killed process left unfinished does not count."""
        self.folder = folder
        self.entries: dict[str, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.jsonl")):
            self.entries.update((entry["id"], entry) for entry in _complete_lines(path))
        # A file of its own, read after those before it: whoever was killed may have left half a line in the last one.
        numbers = [int(path.name[:6]) for path in folder.glob("*.jsonl") if path.name[:6].isdigit()]
        number = max(numbers, default=-1) + 1
        self._file = open(folder / f"{number:06d}-{process:05d}.jsonl", "x", encoding="utf-8")
        self._lock = threading.Lock()

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append a line, in one write. Raises `RefineError` when the disk is full."""
        with self._lock:
            try:
                self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                self._file.flush()
            except OSError as error:
                raise RefineError(f"{self._file.name}: cannot be written ({error.strerror}); run again") from None

    def close(self) -> None:
        """Lines that a full disk kept back are lost: `add` has said so."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            if os.path.getsize(self._file.name) == 0:
                os.unlink(self._file.name)


def _complete_lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                entry = json.loads(line) if line.endswith(b"\n") else None
                if isinstance(entry, dict) and isinstance(entry.get("id"), str):
                    yield entry


# -------------------------------------------------------------------------------------------------------------- the run


def run(
    config: ml_collections.ConfigDict,
    manifest: str | os.PathLike,
    output: str | os.PathLike,
    *,
    root: str | os.PathLike | None = None,
    store: executables.Store | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Summary:
    """Do, or go on with, all requests of a manifest. config: of `recipes.batch`.

    Returns what this process did and, of requests done by an earlier start, that they were. Raises `RefineError` for a
    manifest that cannot be read, an output folder of other settings, a full disk; `Preempted` after SIGTERM or SIGINT.
    """
    output = Path(output)
    listed = Manifest(manifest, root)
    doors = Doors(config, store or executables.Store())
    doors.open(listed)
    if jax.process_index() == 0:
        claim = _claim(output, config, doors)
    _meet("the output folder is claimed")
    if jax.process_index():
        claim = _claim(output, config, doors)
    journal = Journal(output / "journal", jax.process_index())
    todo = _remaining(listed, journal.entries, output)
    _meet("all know what is left")  # nobody writes before
    share, shares, leads = doors.share
    # Nothing more to say to each other: who dies from here on, dies alone. GPUs of one process find each other through
    # the service that this ends.
    through = doors.mesh is not None and doors.mesh.size > 1 and jax.default_backend() == "gpu"
    if shares == jax.process_count() > 1 and not through:
        jax.distributed.shutdown()
    mine = todo[share::shares]
    written = journal if leads else None
    lock = threading.Lock()
    bar = tqdm(total=len(mine), unit="request", disable=not progress, desc="requests", file=_Stderr())

    def record(request: Request | Refused, status: str, **more: Any) -> None:
        entry = dict(id=request.id or f"line {request.line}", line=request.line, status=status)
        if isinstance(request, Request):
            entry["digest"] = request.digest
        entry |= more
        if written is not None and journal.entries.get(entry["id"]) != entry:
            written.add(entry)
        with lock:
            setattr(scheduler.summary, status, getattr(scheduler.summary, status) + 1)
            bar.update()

    def finish(request: Request, picture: Any) -> None:
        file = f"results/{request.id}.png"
        if written is not None:
            before = journal.entries.get(request.id, {})
            if before.get("status") == DONE and before.get("digest") != request.digest:
                # Whoever is killed between the picture and its line leaves no line that speaks of another picture.
                written.add(dict(id=request.id, line=request.line, status="open"))
            images.save_picture(picture, output / file, "result", fast=True)
        record(request, DONE, file=file, size=list(picture.size))

    def refuse(request: Request | Refused, status: str, reason: str) -> None:
        record(request, status, reason=reason)

    scheduler = Scheduler(
        doors.by_task,
        finish,
        refuse,
        batch_size=config.batch_size,
        workers=workers or min(8, os.cpu_count() or 1),
        # Processes that share one model launch in one order.
        streams=3 if jax.default_backend() == "cpu" and shares == jax.process_count() else 1,
        agree=None if shares == jax.process_count() else _agreement(doors.mesh),
    )
    try:
        with bar, _signals(scheduler.stop):
            scheduler.run(listed.read(index) for index in mine)
    finally:
        journal.close()
        claim.close()
        summary = scheduler.summary
        summary.requests, summary.skipped = len(listed), len(listed) - len(todo)
        summary.programs, summary.programs_loaded = doors.store.counts.compiled, doors.store.counts.loaded
        summary.compile_seconds = doors.store.counts.compile_seconds
        if leads:
            with contextlib.suppress(RefineError, OSError):  # not in place of what ended the run
                _report(output, listed, summary, share)
    if scheduler.stopped:
        done = summary.done + summary.refused + summary.failed
        raise Preempted(f"{done} of {len(mine)} requests are recorded")
    return summary


def compile_ahead(
    config: ml_collections.ConfigDict,
    manifest: str | os.PathLike,
    store: executables.Store,
    *,
    root: str | os.PathLike | None = None,
    progress: bool = True,
) -> int:
    """Compile what the requests of a manifest need, with a dry `store` from shapes alone; the number of their buckets.

    Requests that are refused are left out. Raises `RefineError` as `run`.
    """
    listed = Manifest(manifest, root)
    doors = Doors(config, store)
    seen: set[Any] = set()
    buckets: set[Any] = set()
    for request in tqdm(listed, unit="request", disable=not progress, desc="requests"):
        if isinstance(request, Refused):
            continue
        door = doors.by_task[request.task]()
        try:
            job = (door.read_generation if request.task == "generate" else door.read)(**request.arguments)
        except Exception:  # what `run` refuses too
            continue
        keys = [(id(door), row.bucket) for row in job.rows]
        buckets.update(keys)
        # References have programs by their sizes; several regions are pasted by one of their own.
        keys = [(*key, *door.parts(row)) for key, row in zip(keys, job.rows)]
        if set(keys) <= seen and (len(keys) == 1 or tuple(keys) in seen):
            continue
        launched = [door.launch(row.bucket, [row]).results for row in job.rows]
        made = jax.tree.map(lambda x: parallel.fetch(x)[0], launched)
        if len(keys) > 1:
            job.finish(made)
        seen.update(keys, [tuple(keys)])
    return len(buckets)


class _Stderr:
    """Standard error, for a bar: when nobody reads it any more, that is no error."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


def _meet(where: str) -> None:
    """Wait for the other processes, where there are any."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(where)


class Doors:
    """The models of a batch, loaded when a request first asks for one; their mesh and this process's share."""

    def __init__(self, config: ml_collections.ConfigDict, store: executables.Store):
        self._config, self.store = config, store
        self._lock = threading.Lock()
        self._loaded: dict[str, serving.Door] = {}
        self.by_task = {
            "refine": lambda: self._door("model"),
            "regenerate": lambda: self._door("regenerator"),
            "generate": lambda: self._door("regenerator"),
        }
        self.mesh, self.share = _group(dict(config.mesh))
        if self.mesh is not None:  # rows that the devices cannot share out, each of them would compute
            parallel.check_batch(config.batch_size, self.mesh)

    def open(self, listed: Manifest) -> None:
        """Load the models that requests ask for, or raise `RefineError`: one that is not there is no request's fault.

        Of most requests only the task is read: looking up all their files takes minutes where these are far away.
        """
        left = dict(self.by_task)
        for index in range(len(listed)):
            task = listed.head(index)[1]
            if task in left and isinstance(listed.read(index), Request):
                left.pop(task)()
            if not left:
                break

    def names(self) -> dict[str, Any]:
        """What the run's models and adapters are, for its identity."""
        found: dict[str, Any] = {}
        for name in ("model", "regenerator"):
            model = self._config[name]
            found[name] = _identity("tiny-rvr" if (name, model) == ("regenerator", "tiny") else model)
            adapters = [item if isinstance(item, (list, tuple)) else (item, 1.0) for item in self._config.lora[name]]
            found[f"adapters of {name}"] = [[_identity(file), weight] for file, weight in adapters]
        return found

    def _door(self, name: str) -> serving.Door:
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self._load(name)
            return self._loaded[name]

    def _load(self, name: str) -> serving.Door:
        config = self._config
        common = dict(
            dtype=config.dtype or None,
            quantize=config.quantize or None,
            later=True,
            mesh=self.mesh,
            rules=parallel.make_rules(config.rules),
            batch_size=config.batch_size,
            store=self.store,
            merge_lora=config.merge_lora,
            lora=[tuple(item) if isinstance(item, (list, tuple)) else item for item in config.lora[name]],
        )
        if name == "regenerator":
            return Regenerator.load(config.regenerator, side_step=config.side_step or None, **common)
        return Refiner.load(
            config.model,
            scheduler=config.scheduler or None,
            aspects=config.aspects or None,
            vae_area=config.vae_area or None,
            condition_area=config.condition_area or None,
            **common,
        )


def _group(axes: Mapping[str, int]) -> tuple[jax.sharding.Mesh | None, tuple[int, int, bool]]:
    """The mesh of the processes that share one model with this one, and (share, shares, whether this one writes).

    As few processes as hold the axes other than `data` together; `data` spans what is left of them.
    """
    if bad := [name for name, size in axes.items() if name != "data" and not (isinstance(size, int) and size >= 1)]:
        raise RefineError(f"mesh.{bad[0]} {axes[bad[0]]!r}: give a whole number of at least 1; only data may be -1")
    here, processes = jax.local_device_count(), jax.process_count()
    ways = int(np.prod([size for name, size in axes.items() if name != "data"]))
    together = -(-ways // here)
    if processes % together or (together * here) % ways:
        raise RefineError(
            f"mesh: {dict(axes)} takes {ways} devices a model; {processes} processes of {here} devices do not divide so"
        )
    share, member = divmod(jax.process_index(), together)
    shares = processes // together
    if ways == 1 and here == 1:
        return None, (share, shares, True)
    group = range(share * together, (share + 1) * together)
    devices = [device for device in jax.devices() if device.process_index in group]
    return parallel.make_mesh({"data": -1, **axes}, devices), (share, shares, member == 0)


def _agreement(mesh: jax.sharding.Mesh) -> Callable[[bool, str | None], bool]:
    """A function that all processes of a mesh call together: whether one of them said True.

    Its second argument is what each is about to do. Raises `RefineError` on all where that differs, as after a file
    that one host alone could not read: results would go under the names of others.
    """
    each = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    ends = jax.jit(lambda x: (x.min(0), x.max(0)), out_shardings=parallel.replicated(mesh))

    def agree(flag: bool, plan: str | None) -> bool:
        digest = int.from_bytes(hashlib.sha256(plan.encode()).digest()[:3], "big") if plan else 0
        own = np.array([[flag, digest]], np.int32)
        least, most = ends(jax.make_array_from_callback((mesh.size, 2), each, lambda _: own))
        if not np.asarray(most)[0] and np.asarray(least)[1] != np.asarray(most)[1]:
            raise RefineError(
                "batch: the processes that share a model have read different requests, as where a file can be read on "
                "one host alone; see the refusals, mend the file, and run the same command again"
            )
        return bool(np.asarray(most)[0])

    return agree


def _identity(model: str) -> str:
    """A model or an adapter by its files: names, sizes, and their bytes; of large ones, samples."""
    folder = loading.BUNDLED.get(model)
    folder = Path(loading.__file__).parent / "assets" / folder[0] if folder else Path(model)
    if not folder.exists():
        return str(model)
    digest = hashlib.sha256()
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else [folder]
    files = [path for path in files if folder / executables.BESIDE not in path.parents]
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder.parent)} {size}\n".encode())
        with path.open("rb") as file:
            for part in range(1 if size < 2**20 else _PARTS):
                file.seek(part * max(0, size - 2**16) // max(1, _PARTS - 1))
                digest.update(file.read(2**20 if size < 2**20 else 2**16))
    return f"{Path(model).name} {digest.hexdigest()[:16]}"


def _claim(output: Path, config: ml_collections.ConfigDict, doors: Doors) -> IO[str]:
    """Make the output folder this run's, or see that it is; clear it of what killed processes left half written.

    Returns a file: until all processes of a run have closed theirs, no other run gets the folder.
    """
    settings = {**json.loads(config.to_json_best_effort()), **doors.names()}
    for name in ("topology", "variant"):
        settings.pop(name, None)
    path, first = output / "run.json", jax.process_index() == 0
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not path.exists() and any(p for p in output.iterdir() if p.suffix != ".partial" and p.name != ".lock"):
            raise RefineError(f"--output-dir {str(output)!r}: holds other files; give a new folder")
        claim = open(output / ".lock", "a")
        try:
            # The first process sees that it is alone; then all hold the lock together.
            for kind in (fcntl.LOCK_EX, fcntl.LOCK_SH) if first else (fcntl.LOCK_SH,):
                fcntl.flock(claim, kind | fcntl.LOCK_NB)
                if kind == fcntl.LOCK_EX:
                    for left in output.rglob("*.partial"):
                        left.unlink(missing_ok=True)
        except BlockingIOError:
            raise RefineError(
                f"--output-dir {str(output)!r}: another run is writing there; wait until it ends, or give another"
                " folder"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a file system without locks
                raise
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
        else:
            checkpoint.write_text(path, json.dumps(settings, indent=1, sort_keys=True) + "\n")
            found = settings
        (output / "results").mkdir(exist_ok=True)
    except RefineError:
        raise
    except OSError as error:
        raise RefineError(f"--output-dir {str(output)!r}: {error.strerror}; give another folder") from None
    except ValueError:
        raise RefineError(f"{path}: damaged; give a new folder") from None
    changed = sorted(name for name in settings.keys() | found.keys() if settings.get(name) != found.get(name))
    if changed:
        name = changed[0]
        raise RefineError(
            f"--output-dir {str(output)!r}: its results were made with {name} {found.get(name)!r}, now"
            f" {settings.get(name)!r}; give the same settings, or another folder"
        )
    return claim


def _remaining(listed: Manifest, entries: Mapping[str, Mapping[str, Any]], output: Path) -> Sequence[int]:
    """The requests that have no result yet."""
    if not entries:
        return range(len(listed))
    todo = []
    for index in range(len(listed)):
        request = listed.read(index)
        entry = entries.get(request.id or f"line {request.line}")
        done = (
            entry is not None
            and isinstance(request, Request)
            and entry.get("digest") == request.digest
            and entry.get("status") == DONE
            and (output / entry.get("file", "")).is_file()
        )
        if not done:
            todo.append(index)
    return todo


def _report(output: Path, listed: Manifest, summary: Summary, share: int) -> None:
    """The results in the manifest's order; whoever ends last has them all."""
    with open(output / ".lock-report", "a") as turn:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(turn, fcntl.LOCK_EX)
        _write_report(output, listed, summary, share)


def _write_report(output: Path, listed: Manifest, summary: Summary, share: int) -> None:
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted((output / "journal").glob("*.jsonl")):
        entries.update((entry["id"], entry) for entry in _complete_lines(path))
    lines, counts = [], collections.Counter()
    for index in range(len(listed)):
        name = listed.head(index)[0]
        entry = entries.get(name, dict(id=name, line=listed.line(index), status="open"))
        counts[entry["status"]] += 1
        lines.append(json.dumps(entry, ensure_ascii=False))
    checkpoint.write_text(output / "results.jsonl", "\n".join(lines) + "\n", str(share))
    own = {f"run_{name}": value for name, value in dataclasses.asdict(summary).items()}
    checkpoint.write_text(
        output / "summary.json", json.dumps({**counts, "share": share, **own}, indent=1) + "\n", str(share)
    )


@contextlib.contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT end the run in order; a second one at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {}

    def handler(number: int, frame: Any) -> None:
        stop()
        signal.signal(number, old[number])
        with contextlib.suppress(OSError):
            print("refine-jax: stopping; what runs is finished and written", file=sys.stderr, flush=True)

    for number in (signal.SIGTERM, signal.SIGINT):
        old[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
