"""Compiled programs: kept in memory, counted, and kept on the disk for the next process.

JAX's persistent cache spares the compiler but not the tracing and lowering, which for a network of 60 blocks take
longer than loading. A `Store` with a folder keeps the executables themselves, as `refine-jax compile` writes them.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from refine_jax import __version__
from refine_jax.errors import RefineError

SUFFIX = ".executable"
# Beside a model's weights, where `refine-jax compile` writes unless told otherwise.
BESIDE = "executables"
_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Counts:
    """What a `Store` did: programs compiled, read from its folder, refused there; seconds of both."""

    compiled: int = 0
    loaded: int = 0
    refused: int = 0
    compile_seconds: float = 0.0
    load_seconds: float = 0.0


class Later:
    """A tree of arrays that a thread reads while programs for them are compiled."""

    def __init__(self, shapes: Any, read: Callable[[], Any]):
        """shapes: `jax.ShapeDtypeStruct`s with shardings; read: makes the arrays; nothing is read before `begin`."""
        self.shapes, self._read = shapes, read
        self._lock = threading.Lock()
        self._found: Future | None = None

    def begin(self) -> Future:
        """Start to read, once."""
        with self._lock:
            if self._found is None:
                reader = ThreadPoolExecutor(1, "weights")
                self._found = reader.submit(self._read)
                reader.shutdown(wait=False)
            return self._found

    def arrays(self) -> Any:
        """Wait for the arrays. Raises what reading raises."""
        return self.begin().result()


class Store:
    """Compiled programs by their functions, static arguments, and the shapes of the others.

    folder: of executables written earlier, for these very devices and versions; one that does not fit is left aside
    with a warning and its program compiled. Its files are code: name a folder that you trust. write: keep there what is
    compiled. dry: compile only; calls return zeros. most: programs kept in memory, the least recently used go first.
    """

    def __init__(
        self, folder: str | os.PathLike | None = None, *, write: bool = False, dry: bool = False, most: int = 256
    ):
        self.folder = None if folder is None else Path(folder)
        if write and self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RefineError(f"executables {str(folder)!r}: {error.strerror}; give another folder") from None
        self.counts = Counts()
        self._write, self._dry, self._most = write, dry, most
        self._programs: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._making: dict[str, threading.Lock] = {}
        self._untried: set[Any] = set()  # loaded, never called
        self._broken: set[str] = set()

    def call(self, program: Any, *args: Any, **static: Any) -> Any:
        """`program(*args, **static)`, a `parallel.Program`, compiled once for arguments of these shapes.

        An argument may be `Later`: the program is compiled meanwhile.
        """
        if not self._dry:
            for x in args:
                if isinstance(x, Later):
                    x.begin()
        shapes = tuple(x.shapes if isinstance(x, Later) else x for x in args)
        made = self.get(program, shapes, static)
        if self._dry:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), made.out_info)
        arrays = tuple(x.arrays() if isinstance(x, Later) else x for x in args)
        if made not in self._untried:
            return made(*arrays)
        try:
            result = jax.block_until_ready(made(*arrays))
        except Exception as error:  # loaded without complaint, and cannot run
            key = _key(program, shapes, static)
            with self._lock:
                first = key not in self._broken
                if first:
                    self._programs.pop(key, None)
                    self._broken.add(key)
            if first:
                self._refuse(self.folder / f"{key}{SUFFIX}", f"does not run ({type(error).__name__})")
            return self.get(program, shapes, static)(*arrays)
        self._untried.discard(made)
        return result

    def get(self, program: Any, args: tuple, static: Mapping[str, Any]) -> Callable[..., Any]:
        """The executable for `args`, arrays or `jax.ShapeDtypeStruct`s; called with the arrays alone."""
        key = _key(program, args, static)
        with self._lock:
            if key in self._programs:
                self._programs.move_to_end(key)
                return self._programs[key]
            own = self._making.setdefault(key, threading.Lock())
        with own:
            with self._lock:
                if key in self._programs:
                    return self._programs[key]
            made = self._read(key)
            if made is None:
                started = time.perf_counter()
                with _without_cache() if self._write else contextlib.nullcontext():
                    made = program.lower(*args, **static).compile()
                with self._lock:
                    self.counts.compiled += 1
                    self.counts.compile_seconds += time.perf_counter() - started
                if self._write and self.folder is not None:
                    self._keep(key, made, program)
            with self._lock:
                self._programs[key] = made
                self._making.pop(key, None)
                while len(self._programs) > self._most:
                    self._programs.popitem(last=False)
        return made

    def _read(self, key: str) -> Any:
        if self.folder is None or key in self._broken:
            return None
        path, started = self.folder / f"{key}{SUFFIX}", time.perf_counter()
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            return self._refuse(path, error.strerror)
        head, _, body = data.partition(b"\n")
        try:
            said = json.loads(head)
            if said["hardware"] != _hardware():
                return self._refuse(path, f"made for {said['hardware']['kind']}")
            if said["versions"] != _versions():
                return self._refuse(path, "made by other versions")
            if said["sha256"] != hashlib.sha256(body).hexdigest():
                return self._refuse(path, "damaged")
            made = serialize_executable.deserialize_and_load(*pickle.loads(body))
        except Exception as error:  # of whatever kind a foreign or damaged file brings about
            return self._refuse(path, f"cannot be loaded ({type(error).__name__})")
        self._untried.add(made)
        with self._lock:
            self.counts.loaded += 1
            self.counts.load_seconds += time.perf_counter() - started
        return made

    def _refuse(self, path: Path, reason: str) -> None:
        self.counts.refused += 1
        _log.warning("%s: %s; the program is compiled instead", path, reason)

    def _keep(self, key: str, made: Any, program: Any) -> None:
        body = pickle.dumps(serialize_executable.serialize(made))
        head = dict(
            program=program.__name__,
            hardware=_hardware(),
            versions=_versions(),
            sha256=hashlib.sha256(body).hexdigest(),
        )
        path = self.folder / f"{key}{SUFFIX}"
        aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            aside.write_bytes(json.dumps(head).encode() + b"\n" + body)
            aside.replace(path)
        except OSError as error:
            _log.warning("%s: not kept (%s)", path, error.strerror)
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """What comes out of JAX's cache cannot be serialized again: on a CPU it loads, and its functions are missing."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # whether to use it is decided once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _hardware() -> dict[str, Any]:
    """What an executable is bound to: the devices of the mesh in force, or the first."""
    device = jax.devices()[0]
    return dict(
        platform=device.platform,
        kind=device.device_kind,
        runtime=device.client.platform_version,
        devices=jax.device_count(),
        processes=jax.process_count(),
        features=_processor() if device.platform == "cpu" else "",
    )


@cache
def _processor() -> str:
    """What a host's compiled code may use."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return hashlib.sha256(line.encode()).hexdigest()[:16]
    import platform

    return platform.processor() or platform.machine()


@cache
def _versions() -> dict[str, str]:
    """What decides the code of a program besides its arguments, this package's sources included."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    import flax
    import jaxlib

    return dict(
        jax=jax.__version__,
        jaxlib=jaxlib.__version__,
        flax=flax.__version__,
        refine_jax=__version__,
        source=digest.hexdigest()[:16],
        flags=os.environ.get("XLA_FLAGS", "") + os.environ.get("LIBTPU_INIT_ARGS", ""),
    )


def _key(program: Any, args: tuple, static: Mapping[str, Any]) -> str:
    """A digest of a program, its static arguments, the shapes and places of the others, and the mesh in force."""
    leaves, tree = jax.tree.flatten(args)
    # Where an array lies counts only on a mesh: a plain array and a numpy one run the same program.
    shapes = [(np.shape(x), _dtype(x), _placed(x)) for x in leaves]
    mesh = jax.sharding.get_mesh()
    placed = ""
    if not mesh.empty:
        placed = repr((mesh.shape_tuple, [d.id for d in mesh.devices.flat], nn.get_logical_axis_rules()))
    text = repr((program.__name__, sorted(static.items()), str(tree), shapes, placed))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _dtype(x: Any) -> str:
    dtype = getattr(x, "dtype", None) or np.asarray(x).dtype
    return str(jax.dtypes.canonicalize_dtype(dtype) if isinstance(dtype, np.dtype) else dtype)


def _placed(x: Any) -> str:
    sharding = getattr(x, "sharding", None)
    return str(sharding.spec) if isinstance(sharding, jax.sharding.NamedSharding) else ""
