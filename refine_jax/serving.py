"""What the doors to both systems share: decoded requests as rows of batches, buckets of static shapes, one way to run.

A door (`Refiner`, `Regenerator`) reads a request into a `Job` of rows; rows of one bucket run as one batch of one
compiled program; `Job.finish` makes the picture of its rows' results.

Bits. A compiled program gives a row the same bits wherever it stands and whatever its neighbours are. Programs of other
shapes need not, since a compiler orders sums as the shapes suggest. So a door with a `batch_size` runs every program
with exactly so many rows, padded, in the bucket that the row alone decides: a result then depends on its request alone.
Without, batches are padded to a power of two and buckets are joined, so that few programs serve few calls; results then
agree within the last bits, and a batch has as many rows as `_PIXELS` allow: one of 1024², 64 of a tiny model.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from PIL import Image

from refine_jax import executables, parallel
from refine_jax.errors import RefineError
from refine_jax.model import ModelConfig
from refine_jax.progress import Progress

# Of a batch whose number of rows nobody chose: what one picture of the released models has.
_PIXELS = 1024**2
_ROWS = 64


class Bucket(NamedTuple):
    """The static shapes of a batch. base: what rows must share; sizes: what may be padded to more, as `join` does."""

    base: Hashable
    sizes: tuple[int, ...]


def join(buckets: Iterable[Bucket]) -> Bucket:
    """The least bucket that holds the rows of all; their bases are the same."""
    found = list(buckets)
    return Bucket(found[0].base, tuple(map(max, zip(*(bucket.sizes for bucket in found)))))


@dataclasses.dataclass(frozen=True)
class Job:
    """One request, decoded. rows: each has a `bucket`; finish: from a result for each row, as numpy arrays; pixels: so
    many are kept in memory until then."""

    rows: tuple[Any, ...]
    finish: Callable[[Sequence[Any]], Image.Image]
    pixels: int


class Launched(NamedTuple):
    """A batch on the devices: results, a tree of arrays, and finite `[R] bool`; rows first, padding behind."""

    results: Any
    finite: jax.Array


class Door:
    """A loaded model that turns requests into pictures."""

    def __init__(
        self,
        model: Any,
        variables: Mapping[str, Any] | executables.Later,
        tokenizer: Any,
        lora: Mapping[str, Any] | None = None,
        *,
        mesh: jax.sharding.Mesh | None = None,
        rules: parallel.Rules = parallel.DEFAULT_RULES,
        batch_size: int | None = None,
        store: executables.Store | None = None,
    ):
        """variables, lora: trees under the networks' names (lora may be empty); with a mesh, both are already placed on
        it; variables may come `executables.Later`. batch_size: rows of every program (see above). store: of compiled
        programs."""
        if batch_size is not None and not 1 <= batch_size <= 4096:
            raise RefineError(f"batch_size {batch_size}: give a number from 1 to 4096, or none")
        self.model = model
        later = isinstance(variables, executables.Later)
        # What is on devices, perhaps of several processes, stays where it is.
        placed = lambda tree: jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jax.device_put(x), dict(tree))
        self.weights = variables if later else placed(variables)
        self.lora = placed(lora or {})
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.programs = store or executables.Store()
        self._mesh, self._rules = mesh, rules
        # Rows that the devices cannot share out, each of them would compute.
        self._ways = 1 if mesh is None else parallel.batch_ways(mesh)
        self._progress = Progress()

    @property
    def variables(self) -> dict[str, Any]:
        """The weights; waits for those that are on their way."""
        return self.weights.arrays() if isinstance(self.weights, executables.Later) else self.weights

    def launch(self, bucket: Bucket, rows: Sequence[Any], progress: Progress | None = None) -> Launched:
        """Start the rows of one bucket, at most `batch_size`."""
        raise NotImplementedError

    def fetch(self, launched: Launched, count: int) -> list[Any]:
        """Wait for what `launch` returned: of each of the `count` rows its result as numpy arrays.

        A `RefineError` stands in the place of one that is not made of numbers, which in 8 bits is black.
        """
        arrays = jax.tree.map(parallel.fetch, launched)
        error = RefineError(
            "result: holds values that are not finite; look for such in the files of weights and adapters, or give "
            "dtype float32"
        )
        taken = lambda row: jax.tree.map(lambda array: array[row], arrays.results)
        return [taken(row) if arrays.finite[row] else error for row in range(count)]

    def parts(self, row: Any) -> tuple:
        """Shapes that decide programs of a row besides its bucket's."""
        return ()

    @property
    def most_rows(self) -> int:
        """Rows of the largest program: `batch_size`, or what `_PIXELS` allow on each of the mesh's devices."""
        if self.batch_size:
            return self.batch_size
        model = self.model
        pixels = model.vae_area if isinstance(model, ModelConfig) else model.vae_sides[0] ** 2
        return min(_ROWS, 1 << max(0, (_PIXELS // pixels).bit_length() - 1)) * self._ways

    def rows_of(self, count: int) -> int:
        """Rows of the program that runs `count`."""
        return self.batch_size or power_of_two(-(-count // self._ways)) * self._ways

    @contextlib.contextmanager
    def placed(self) -> Iterator[None]:
        """The mesh and its rules in force, where there is one."""
        with contextlib.ExitStack() as stack:
            if self._mesh is not None:
                stack.enter_context(jax.set_mesh(self._mesh))
                stack.enter_context(nn.logical_axis_rules(self._rules))
            yield

    def sample(self, program: Any, inputs: Any, spec: Any, progress: Progress | None, **static: Any) -> Any:
        """`program`, one with a sampler inside and a `report` in its spec, on the weights and `inputs`; in the mesh."""
        static |= dict(model=self.model)
        if progress and progress.counts:
            spec = dataclasses.replace(spec, report=progress.step)
            return jax.block_until_ready(program(self.variables, self.lora, inputs, spec=spec, **static))
        made = self.programs.call(program, self.weights, self.lora, inputs, spec=spec, **static)
        if progress:
            progress.compiled()
            jax.block_until_ready(made)
        return made

    def run(self, jobs: Sequence[Job], progress: bool = False) -> list[Image.Image]:
        """All jobs, batch after batch; pictures in the order of the jobs."""
        groups: dict[Any, list[tuple[int, int]]] = {}
        for number, job in enumerate(jobs):
            for order, row in enumerate(job.rows):
                key = row.bucket.base if self.batch_size is None else row.bucket
                groups.setdefault(key, []).append((number, order))
        if progress and self._progress.counts and isinstance(self.weights, executables.Later):
            self.weights.arrays()  # its bar comes before ours, which would call it compiling
        results: dict[tuple[int, int], Any] = {}
        for members in groups.values():
            size = self.most_rows
            for first in range(0, len(members), size):
                batch = members[first : first + size]
                rows = [jobs[number].rows[order] for number, order in batch]
                bucket = join(row.bucket for row in rows)
                launched = self.launch(bucket, rows, self._progress if progress else None)
                fetched = self.fetch(launched, len(batch))
                if bad := next((found for found in fetched if isinstance(found, RefineError)), None):
                    raise bad
                results.update(zip(batch, fetched))
        return [
            job.finish([results[number, order] for order in range(len(job.rows))]) for number, job in enumerate(jobs)
        ]


def read_noise(given: Any, shape: tuple[int, ...], axes: str) -> np.ndarray | None:
    """A request's own noise as float32 of `shape`, None where there is none. axes: the shape in words, for messages.

    Raises `RefineError` for another shape, and for what are no finite numbers.
    """
    if given is None:
        return None
    try:
        found = np.asarray(given, np.float32)
    except (TypeError, ValueError):
        raise RefineError(f"noise: cannot use a {type(given).__name__}; give float32 {shape} ({axes})") from None
    if found.shape != shape:
        raise RefineError(f"noise of shape {found.shape}: the latents are {shape} ({axes})")
    if not np.isfinite(found).all():
        raise RefineError("noise: holds values that are not finite; draw it from a normal distribution")
    return found


def read_all(read: Callable[..., Job], requests: Iterable[Mapping[str, Any]]) -> list[Job]:
    """All requests, each a dict of the arguments of `read`.

    Raises `RefineError` for the first bad one, also one that is no dict, or lacks an argument, or has another's.
    """
    jobs = []
    for number, request in enumerate(requests):
        try:
            inspect.signature(read).bind(**request)
        except TypeError as error:
            raise RefineError(f"request {number}: {error}; give a dict of one request's arguments") from None
        jobs.append(read(**request))
    return jobs


def draw_noise(rows: Sequence[tuple[int, tuple[int, ...], Any]], shape: tuple[int, ...]) -> jax.Array:
    """Noise `[R, *shape] float32`: a row's own where one is given, else drawn from its (seed, numbers) alone."""
    words = [(seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, *numbers) for seed, numbers, _ in rows]
    drawn = _drawn(np.array(words, np.uint32), shape)
    for index, (_, _, given) in enumerate(rows):
        if given is not None:
            drawn = drawn.at[index].set(jnp.asarray(given, jnp.float32))
    return drawn


@functools.partial(jax.jit, static_argnums=1)
def _drawn(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    def one(row: jax.Array) -> jax.Array:
        key = functools.reduce(jax.random.fold_in, row[1:], jax.random.key(row[0]))
        return jax.random.normal(key, shape, jnp.float32)

    return jax.lax.map(one, words)


def power_of_two(count: int) -> int:
    """The least power of two that is not less."""
    return 1 << (count - 1).bit_length()


def canvas_side(side: int) -> int:
    """The canvas bucket of a side: 64, 96, 128, 192, 256, …, so that few programs serve all sizes."""
    top = max(64, power_of_two(side))
    return top * 3 // 4 if top > 64 and side <= top * 3 // 4 else top
