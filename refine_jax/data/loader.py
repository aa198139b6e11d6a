"""Batches of procedural pairs for the trainer: deterministic in (seed, step), sharded by host, resumable.

An iterator's state is its position alone ({"step": n}), so a run may be resumed with another number of worker
processes and still sees the same pairs in the same order; a global batch does not depend on the number of hosts.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import grain
import numpy as np
from absl import flags

from refine_jax.data import assets, synth
from refine_jax.errors import RefineError

Size = tuple[int, int]

INSTRUCTION_BYTES = 96


def encode_instruction(text: str) -> np.ndarray:
    """[96] uint8: the UTF-8 bytes, zero-padded; cut before a character that would not fit."""
    data = text.encode()[:INSTRUCTION_BYTES].decode(errors="ignore").encode()
    return np.frombuffer(data.ljust(INSTRUCTION_BYTES, b"\0"), np.uint8)


def decode_instruction(row: np.ndarray) -> str:
    """The text of a row [96] uint8."""
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
      batch_size: global; each of `process_count` hosts yields its equal share of the rows, in order of host.
      workers: processes that make rows; 0 makes them in this process.
    """

    def __init__(
        self,
        make: Callable[[int, int], dict[str, np.ndarray]],
        batch_size: int,
        *,
        start: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        workers: int = 0,
    ):
        self._source = None
        super().__init__()
        if batch_size <= 0 or batch_size % process_count:
            raise RefineError(f"batch_size: {batch_size} is not a positive multiple of the {process_count} processes")
        if not 0 <= process_index < process_count:
            raise RefineError(f"process_index: got {process_index}, expected 0..{process_count - 1}")
        self._rows = batch_size // process_count
        self._first = process_index * self._rows
        self._make, self._workers = make, workers
        self._step = int(start)

    def _build(self):
        rows = grain.MapDataset.range(self._step * self._rows, 2**62)
        batches = rows.map(partial(_row, self._make, self._rows, self._first)).batch(self._rows)
        data = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        if self._workers:
            if not flags.FLAGS.is_parsed():  # grain reads its own absl flags when it starts workers
                flags.FLAGS.mark_as_parsed()
            data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2))
        return iter(data)

    def __next__(self) -> dict[str, np.ndarray]:
        if self._source is None:
            self._source = self._build()
        batch = next(self._source)
        if self._workers:  # out of the shared memory, which ends with the workers
            batch = {name: np.array(value) for name, value in batch.items()}
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
        """Ends the worker processes; the next batch starts new ones."""
        if self._source is not None:
            self._source.close()
        self._source = None

    def close(self) -> None:
        self.close_workers()
        super().close()


def _row(make: Callable, rows: int, first: int, position: int) -> dict[str, np.ndarray]:
    step, row = divmod(int(position), rows)
    return make(step, first + row)


@dataclass(frozen=True)
class _Pairs:
    seed: int
    batch_size: int
    order: tuple[Size, ...]
    split: str

    def __call__(self, step: int, row: int) -> dict[str, np.ndarray]:
        bucket = self.order[step % len(self.order)]
        pair = synth.sample(self.seed, step * self.batch_size + row, bucket, self.split)
        return {
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
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    start: int = 0,
) -> Batches:
    """Endless batches of pairs, each of a single bucket (h, w); all hosts have the same bucket at the same step.

    Yields {image, target, reference: [b, h, w, 3] uint8, mask: [b, h, w] uint8 (0 or 255), has_reference, is_logo:
    [b] bool, instruction: [b, 96] uint8} with b = batch_size / process_count; the global batch is the hosts' batches
    one after the other. Buckets alternate by `weights` (default: synth.WEIGHTS, or equal ones for other buckets).
    Raises RefineError when asset packages are missing, before the first batch.
    """
    buckets = [tuple(bucket) for bucket in buckets]
    if weights is None:
        weights = [synth.WEIGHTS.get(bucket, 1.0 / 3.0) for bucket in buckets]
    assets.faces(split), assets.logos(split), assets.photo_files(split)
    make = _Pairs(seed, batch_size, schedule(buckets, weights), split)
    return Batches(
        make, batch_size, start=start, process_index=process_index, process_count=process_count, workers=workers
    )


@dataclass(frozen=True)
class _Patches:
    seed: int
    batch_size: int
    size: int
    split: str

    def __call__(self, step: int, row: int) -> dict[str, np.ndarray]:
        return {"image": synth.patch(self.seed, step * self.batch_size + row, self.size, self.split)}


def vae_batches(
    seed: int,
    batch_size: int,
    size: int = 64,
    split: str = "train",
    *,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    start: int = 0,
) -> Batches:
    """Endless batches {"image": [b, size, size, 3] uint8} of everything that the VAE must carry (`synth.patch`)."""
    assets.faces(split), assets.logos(split), assets.photo_files(split)
    make = _Patches(seed, batch_size, size, split)
    return Batches(
        make, batch_size, start=start, process_index=process_index, process_count=process_count, workers=workers
    )
