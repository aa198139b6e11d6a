"""Batches for the trainer, of procedural pairs or of a dataset's: deterministic in (seed, step), sharded, resumable.

An iterator's state is its position alone ({"step": n}), so a run may be resumed with another number of workers and
still sees the same pairs in the same order; a global batch does not depend on the number of hosts.
"""

import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import grain
import numpy as np
from absl import flags

from refine_jax import focus
from refine_jax.data import assets, pixels, synth, world
from refine_jax.data.plan import Plan, enlarge
from refine_jax.data.records import Dataset, Record, open_picture
from refine_jax.data.workers import end_with_parent
from refine_jax.errors import RefineError

Size = tuple[int, int]

INSTRUCTION_BYTES = 96
_WORLD_BYTES = 256
# Pixels a side of a cell of a label map, and how many kinds of labels the pairs have that are made here.
LABEL_CELL = 4
LABELS = {"synth": synth.LABELS, "world": world.LABELS}
_COPIED = 1 << 20  # bytes
_AHEAD = 2  # batches that a worker makes before they are asked for
_DEATHS = 3  # of workers, after which it is no accident
_GRACE = 30.0  # seconds that a worker lives on after SIGTERM


def encode_instruction(text: str, width: int = INSTRUCTION_BYTES) -> np.ndarray:
    """[width] uint8: the UTF-8 bytes, zero-padded; cut before a character that would not fit."""
    data = text.encode()[:width].decode(errors="ignore").encode()
    return np.frombuffer(data.ljust(width, b"\0"), np.uint8)


def decode_instruction(row: np.ndarray) -> str:
    """The text of a row [width] uint8."""
    return bytes(row).rstrip(b"\0").decode()


def schedule(buckets: Sequence[Size], weights: Sequence[float], period: int = 120) -> tuple[Size, ...]:
    """The buckets of `period` consecutive steps, each as evenly spread as its weight allows (smooth round robin)."""
    shares = np.asarray(weights, np.float64)
    if len(shares) != len(buckets) or not len(buckets) or (shares <= 0).any():
        raise RefineError(f"weights: got {list(weights)}, expected one positive number for each of {list(buckets)}")
    shares = shares / shares.sum()
    credit, order = np.zeros(len(buckets)), []
    for _ in range(period):
        credit += shares
        k = int(np.argmax(np.round(credit, 9)))  # rounded: a tie falls to the first wherever it is computed
        credit[k] -= 1.0
        order.append(tuple(buckets[k]))
    return tuple(order)


class Batches(grain.DatasetIterator):
    """Endless batches of rows `make(step, row)`; a grain iterator, so orbax can save it.

    Args:
      make: (step, row in the global batch) -> dict of arrays; picklable when there are workers.
      batch_size: global; rows: those of it that are yielded, in this order (default: all; a host's are
        `parallel.own_rows`).
      workers: processes, or threads, that make batches; 0 makes each when it is asked for.
      threads: workers are threads of this process, for rows whose work goes on without Python's lock, as decoding and
        resizing do: what a process makes is copied into new shared memory, an eighth of the time of such rows.
    """

    def __init__(
        self,
        make: Callable[[int, int], dict[str, np.ndarray]],
        batch_size: int,
        *,
        start: int = 0,
        rows: Sequence[int] | None = None,
        workers: int = 0,
        threads: bool = False,
    ):
        self._source = None
        super().__init__()
        self._rows = tuple(range(batch_size) if rows is None else map(int, rows))
        if not self._rows or not 0 <= min(self._rows) <= max(self._rows) < batch_size:
            raise RefineError(f"batch_size {batch_size}: has no rows {list(self._rows)}; give a positive number")
        self._make, self._workers = make, workers
        self._threads = threads and workers > 0
        self._processes = workers if not threads else 0
        self._step, self._deaths = int(start), 0

    def _build(self):
        steps = grain.MapDataset.range(self._step, 2**62)
        batches = steps.map(partial(_stack, self._make, self._rows))
        ahead = dict(num_threads=self._workers, prefetch_buffer_size=_AHEAD * self._workers)
        data = batches.to_iter_dataset(grain.ReadOptions(**ahead if self._threads else dict.fromkeys(ahead, 0)))
        if self._processes:
            if not flags.FLAGS.is_parsed():  # grain reads its own absl flags when it starts workers
                flags.FLAGS.mark_as_parsed()
            how = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=_AHEAD)
            data = data.mp_prefetch(how)
        return iter(data)

    def __next__(self) -> dict[str, np.ndarray]:
        if self._source is None:
            self._source = self._build()
        try:
            batch = next(self._source)
        except OSError as error:
            if not self._processes or error.errno != errno.ENOSPC:
                raise
            raise RefineError(
                f"data.workers {self._workers}: no room in the memory that they share (/dev/shm), for "
                f"{len(self._rows)} rows a batch; make it larger, or give fewer workers, or 0"
            ) from error
        except RuntimeError as error:
            if not self._processes or "terminated unexpectedly" not in str(error):
                raise
            self._deaths += 1
            if self._deaths > _DEATHS:
                raise RefineError(
                    f"data.workers {self._workers}: a worker process died {self._deaths} times, by the system or for "
                    "want of memory; give fewer workers, or find who ends them"
                ) from error
            self.close_workers()  # whoever takes over begins where the others stopped
            return Batches.__next__(self)  # not a subclass's, which would do its part twice
        if self._processes:
            # A large array stays in the memory that it shares with the worker, which lasts as long as the array does. A
            # small one is copied out of it: each holds an open file.
            batch = {name: (np.array if value.nbytes < _COPIED else np.asarray)(value) for name, value in batch.items()}
        self._step += 1
        return batch

    def get_state(self) -> dict:
        """{"step": batches given so far (and skipped by `start`)}."""
        return {"step": self._step}

    def set_state(self, state: dict) -> None:
        """Continues as after the `state["step"]`-th batch."""
        self.close_workers()
        self._step = int(state["step"])

    def close_workers(self) -> None:
        """Ends the workers; the next batch starts new ones."""
        if self._source is not None:
            self._source.close()
        self._source = None

    def close(self) -> None:
        self.close_workers()
        super().close()


def _outlive_sigterm() -> None:
    """In a worker process: go on for a while when told to end.

    A machine that shuts down tells all processes. The training ends after its present step, for which it may still need
    a batch, and ends its workers itself.
    """
    here = multiprocessing.parent_process() and threading.current_thread() is threading.main_thread()
    if here and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        end = threading.Timer(_GRACE, os._exit, (128 + signal.SIGTERM,))
        end.daemon = True
        end_with_parent()
        signal.signal(signal.SIGTERM, lambda *_: None if end.is_alive() else end.start())


def _stack(make: Callable, rows: Sequence[int], step: int) -> dict[str, np.ndarray]:
    """Some rows of a step; each goes into the batch as it is made, none is kept."""
    _outlive_sigterm()
    batch: dict[str, np.ndarray] = {}
    for place, row in enumerate(rows):
        for name, value in make(int(step), row).items():
            if place == 0:
                batch[name] = np.empty((len(rows), *np.shape(value)), np.asarray(value).dtype)
            batch[name][place] = value
    return batch


@dataclass(frozen=True)
class _Pairs:
    seed: int
    batch_size: int
    order: tuple[Size, ...]
    split: str
    reference_share: float | None
    labels: bool

    def __call__(self, step: int, row: int) -> dict[str, np.ndarray]:
        bucket = self.order[step % len(self.order)]
        pair = synth.sample(
            self.seed,
            step * self.batch_size + row,
            bucket,
            self.split,
            reference_share=self.reference_share,
            cell=LABEL_CELL if self.labels else 0,
        )
        told = {"labels": pair["labels"]} if self.labels else {}
        return told | {
            "image": pair["image"],
            "target": pair["target"],
            "mask": pair["mask"],
            "reference": pair["reference"],
            "has_reference": np.bool_(pair["has_reference"]),
            "instruction": encode_instruction(pair["instruction"]),
            "is_logo": np.bool_(pair["kind"] == "logo"),
        }


def refine_batches(
    seed: int,
    batch_size: int,
    buckets: Iterable[Size] = tuple(synth.WEIGHTS),
    split: str = "train",
    *,
    weights: Sequence[float] | None = None,
    reference_share: float | None = None,
    labels: bool = False,
    rows: Sequence[int] | None = None,
    workers: int = 0,
    start: int = 0,
) -> Batches:
    """Endless batches of pairs, each of a single bucket (h, w); all hosts have the same bucket at the same step.

    Yields {image, target, reference: [b, h, w, 3] uint8, mask: [b, h, w] uint8 (0 or 255), has_reference, is_logo:
    [b] bool, instruction: [b, 96] uint8} with b = len(rows), those of the global batch that are wanted (`Batches`).
    Buckets alternate by `weights` (default: synth.WEIGHTS, or equal ones for other buckets). reference_share: as
    `synth.sample` takes it. labels: `labels [b, h/4, w/4, synth.LABELS] uint8` too (`synth.labels`). Raises
    RefineError when asset packages are missing, before the first batch.
    """
    buckets = [tuple(bucket) for bucket in buckets]
    if weights is None:
        weights = [synth.WEIGHTS.get(bucket, 1.0 / 3.0) for bucket in buckets]
    assets.faces(split), assets.logos(split), assets.photo_files(split)
    make = _Pairs(seed, batch_size, schedule(buckets, weights), split, reference_share, labels)
    return Batches(make, batch_size, start=start, rows=rows, workers=workers)


WORLD_PAIRS = ("regenerate", "edit", "reconstruct")


@dataclass(frozen=True)
class _World:
    seed: int
    batch_size: int
    order: tuple[Size, ...]
    split: str
    pairs: str
    labels: bool

    def __call__(self, step: int, row: int) -> dict[str, np.ndarray]:
        side = self.order[step % len(self.order)][0]
        keep = 1.0 if self.pairs == "edit" else 0.5
        pair = world.sample(self.seed, step * self.batch_size + row, self.split, side, keep)
        text = pair["prompt"]
        if self.pairs == "edit":
            text = world.edit_instruction(text, pair["language"], pair["wrong"])
        made = {
            "image": pair["image" if self.pairs == "reconstruct" else "misaligned_image"],
            "target": pair["image"],
            "instruction": encode_instruction(text, _WORLD_BYTES),
        }
        return made | ({"labels": world.labels(pair["scene"], side // LABEL_CELL)} if self.labels else {})


def world_batches(
    seed: int,
    batch_size: int,
    buckets: Iterable[Size] = ((64, 64),),
    split: str = "train",
    *,
    weights: Sequence[float] | None = None,
    pairs: str = WORLD_PAIRS[0],
    labels: bool = False,
    rows: Sequence[int] | None = None,
    workers: int = 0,
    start: int = 0,
) -> Batches:
    """Endless batches of the small world's pairs, each of a single square bucket, as `refine_batches` gives its own.

    Yields {image (misaligned), target (aligned with the prompt): [b, h, h, 3] uint8, instruction: [b, 256] uint8, the
    prompt}. Buckets alternate by `weights` (default: equal ones). pairs: "regenerate"; "edit", the ablation of RvR's
    paper: every misaligned picture is the aligned one with faults, and the instruction names them
    (`world.edit_instruction`); "reconstruct": the aligned picture in place of the misaligned one, which teaches an
    encoder to see. labels: `labels [b, h/4, h/4, world.LABELS] uint8` of the targets too (`world.labels`). Raises
    RefineError for other pairs and for a bucket that is not square.
    """
    if pairs not in WORLD_PAIRS:
        raise RefineError(f"data.pairs {pairs!r}: choose one of {', '.join(WORLD_PAIRS)}")
    buckets = [tuple(bucket) for bucket in buckets]
    for bucket in buckets:
        if len(bucket) != 2 or bucket[0] != bucket[1]:
            raise RefineError(f"data.buckets: the world's pictures are square, got {bucket}; give (side, side)")
    make = _World(seed, batch_size, schedule(buckets, weights or [1.0] * len(buckets)), split, pairs, labels)
    return Batches(make, batch_size, start=start, rows=rows, workers=workers)


@dataclass(frozen=True)
class _Patches:
    seed: int
    batch_size: int
    size: int
    split: str
    source: str

    def __call__(self, step: int, row: int) -> dict[str, np.ndarray]:
        number = step * self.batch_size + row
        if self.source == "synth":
            return {"image": synth.patch(self.seed, number, self.size, self.split)}
        pair = world.sample(self.seed, number // 2, self.split, self.size)
        return {"image": pair["misaligned_image" if number % 2 else "image"]}


def vae_batches(
    seed: int,
    batch_size: int,
    size: int = 64,
    split: str = "train",
    *,
    source: str = "synth",
    rows: Sequence[int] | None = None,
    workers: int = 0,
    start: int = 0,
) -> Batches:
    """Endless batches {"image": [b, size, size, 3] uint8} of everything that a VAE must carry.

    source: "synth" (`synth.patch`), or "world", the small world's pictures. Raises `RefineError` for another.
    """
    if source not in ("synth", "world"):
        raise RefineError(f"data.source {source!r}: a VAE is trained on 'synth' or 'world'")
    if source == "synth":
        assets.faces(split), assets.logos(split), assets.photo_files(split)
    make = _Patches(seed, batch_size, size, split, source)
    return Batches(make, batch_size, start=start, rows=rows, workers=workers)


# ------------------------------------------------------------------------------------------------------------ datasets

_ATTEMPTS = 32  # records tried for one row before the dataset counts as damaged


def first_usable(plan: Plan, step: int, row: int, read: Callable[[int], Any]) -> tuple[Any, int]:
    """What `read` makes of the record of a row, or of what takes its place where that cannot be used, and how many were
    tried in vain. Raises `RefineError` when too many were."""
    attempts = min(_ATTEMPTS, plan.attempts(step))
    for attempt in range(attempts):
        try:
            return read(plan.record(step, row, attempt)), attempt
        except RefineError as error:
            last = error
    raise RefineError(f"{attempts} records in a row cannot be used, at last: {last}; check the dataset")


@dataclass(frozen=True)
class _Records:
    """Rows of a dataset by its plan."""

    dataset: Dataset
    plan: Plan
    margin: float
    jitter: float
    instruction_bytes: int

    def __call__(self, step: int, row: int) -> dict[str, np.ndarray]:
        sizes = self.plan.group(step)
        made, attempt = first_usable(self.plan, step, row, lambda number: self._row(number, step, row, *sizes))
        return {**made, "skipped": np.int32(attempt)}

    def read(self, number: int) -> str:
        """What a record is called; raises `RefineError` where it cannot be used."""
        self._row(number, 0, 0, *self.plan.groups[0])
        return repr(self.dataset[number].instruction)

    def _row(self, number: int, step: int, row: int, size: Size, reference_size: Size) -> dict[str, np.ndarray]:
        margin = self.margin
        if self.jitter:
            draw = np.random.PCG64(np.random.SeedSequence((self.plan.seed, step, row))).random_raw() / 2**64
            margin *= 1.0 + self.jitter * (2.0 * draw - 1.0)
        return pair(self.dataset[number], size, reference_size, margin, self.instruction_bytes)


def pair(
    record: Record, size: Size, reference_size: Size, margin: float, instruction_bytes: int
) -> dict[str, np.ndarray]:
    """One row of `record_batches` without "skipped": a record in focus, at the sizes of its buckets.

    Raises `RefineError` where a picture of it cannot be decoded.
    """
    box = focus.focus_box(np.array(record.box), *record.size, margin=margin)
    crop = enlarge(box, *record.size, size[1] / size[0])
    image, target = pixels.image_and_target(record, crop, size)
    if record.reference is None:
        reference = np.zeros((*reference_size, 3), np.uint8)
    else:
        shown = open_picture(record.reference, record.reference_size, "reference")
        reference = pixels.array(pixels.resize(shown, reference_size))
    return {
        "image": image,
        "target": target,
        "mask": pixels.region(record, crop, size),
        "reference": reference,
        "has_reference": np.bool_(record.reference is not None),
        "instruction": encode_instruction(record.instruction, instruction_bytes),
    }


@dataclass(frozen=True)
class _WholeRecords(_Records):
    """Whole pictures of records; mask and reference are not opened."""

    def _row(self, number: int, step: int, row: int, size: Size, reference_size: Size) -> dict[str, np.ndarray]:
        record = self.dataset[number]
        image, target = pixels.image_and_target(record, (0, 0, *record.size), size)
        instruction = encode_instruction(record.instruction, self.instruction_bytes)
        return {"image": image, "target": target, "instruction": instruction}


class RecordBatches(Batches):
    """Batches of a dataset's records; `corrupt` collects those that this host had to leave out.

    make: has `dataset`, `plan`, and `read(number)`, which says what a record is called or why it cannot be used.
    """

    def __init__(self, make: Any, batch_size: int, max_corrupt: float, threads: bool = True, **hosts):
        super().__init__(make, batch_size, threads=threads, **hosts)
        total = len(make.dataset)
        self._limit = int(max_corrupt * total) if max_corrupt < 1 else int(max_corrupt)
        self.corrupt: set[int] = set()
        self.plan = make.plan

    def __next__(self) -> dict[str, np.ndarray]:
        step = self._step
        batch = super().__next__()
        for row in np.flatnonzero(batch["skipped"]):
            tries = range(int(batch["skipped"][row]))
            self.corrupt.update(self.plan.record(step, self._rows[row], attempt) for attempt in tries)
        if len(self.corrupt) > self._limit:
            shown = "; ".join(self._reason(number) for number in sorted(self.corrupt)[:5])
            raise RefineError(
                f"{len(self.corrupt)} corrupt records, data.max_corrupt allows {self._limit}: {shown}; copy or build "
                "the dataset again, or allow more"
            )
        return batch

    def _reason(self, number: int) -> str:
        try:
            name = self._make.read(number)
        except RefineError as error:
            text = str(error)
            return text if "record " in text else str(self._make.dataset.corrupt(number, error))
        return f"record {number}: {name} could not be read, now it can"


def record_batches(
    dataset: Dataset,
    seed: int,
    batch_size: int,
    buckets: Iterable[Size],
    *,
    reference_buckets: Iterable[Size] | None = None,
    margin: float = focus.FOCUS_MARGIN,
    margin_jitter: float = 0.0,
    instruction_bytes: int | None = None,
    max_corrupt: float = 0.01,
    rows: Sequence[int] | None = None,
    workers: int = 0,
    start: int = 0,
) -> RecordBatches:
    """Endless batches of a dataset's records in focus, in an order of its own in each epoch (`plan.Plan`).

    Yields {image, target: [b, h, w, 3] uint8, mask: [b, h, w] uint8 (0 or 255), reference: [b, h', w', 3] uint8 (zeros
    where there is none), has_reference: [b] bool, instruction: [b, n] uint8, skipped: [b] int32} with
    b = len(rows) (`Batches`); (h, w) is one of `buckets` and (h', w') one of `reference_buckets` (default:
    `buckets`), the same on all hosts at a step. Crops are those of `refine` (`focus.focus_box`), grown to the bucket's
    aspect as far as the picture allows; pictures are resized as there, masks to the nearest pixel.

    Args:
      margin: around the region, in pixels of a picture scaled to `focus.FOCUS_AREA`; margin_jitter: each row's margin
        is multiplied by a draw from 1 ± this, which depends on the seed, the step and the row alone.
      instruction_bytes: n (default: the dataset's longest instruction); longer ones are cut.
      max_corrupt: a record that cannot be used is replaced by another of its group and counted in `skipped` (how many
        were tried in vain for a row); a host that saw more than this share (below 1) or number of them raises
        `RefineError` and names the first.

    Raises `RefineError` for settings out of range. The dataset was checked when it was opened.
    """
    buckets = [tuple(bucket) for bucket in buckets]
    references = buckets if reference_buckets is None else [tuple(bucket) for bucket in reference_buckets]
    if not 0 <= margin_jitter < 1:
        raise RefineError(f"data.margin_jitter {margin_jitter}: give 0 or more, and less than 1")
    check_corrupt(max_corrupt)
    if instruction_bytes is None:
        instruction_bytes = max(1, int(dataset.index[:, 8].max()))
    plan = Plan(dataset.index, seed, batch_size, buckets, references, margin)
    make = _Records(dataset, plan, margin, margin_jitter, instruction_bytes)
    return RecordBatches(make, batch_size, max_corrupt, start=start, rows=rows, workers=workers)


def whole_batches(
    dataset: Dataset,
    seed: int,
    batch_size: int,
    buckets: Iterable[Size],
    *,
    instruction_bytes: int | None = None,
    max_corrupt: float = 0.01,
    rows: Sequence[int] | None = None,
    workers: int = 0,
    start: int = 0,
) -> RecordBatches:
    """As `record_batches`, of whole pictures: {image, target: [b, h, w, 3] uint8, instruction, skipped}.

    A pair goes to the bucket of its picture's aspect, and is resized to it. Masks and references are not looked at.
    """
    check_corrupt(max_corrupt)
    index = np.array(dataset.index)
    index[:, 2:4], index[:, 4:6], index[:, 6:8] = 0, index[:, :2], 0
    if instruction_bytes is None:
        instruction_bytes = max(1, int(index[:, 8].max()))
    buckets = [tuple(bucket) for bucket in buckets]
    plan = Plan(index, seed, batch_size, buckets, buckets, 0.0)
    make = _WholeRecords(dataset, plan, 0.0, 0.0, instruction_bytes)
    return RecordBatches(make, batch_size, max_corrupt, start=start, rows=rows, workers=workers)


def check_corrupt(limit: float) -> None:
    """Raises `RefineError` for a `data.max_corrupt` that is none."""
    if not limit >= 0:
        raise RefineError(f"data.max_corrupt {limit}: give a share below 1, or a number of records")
