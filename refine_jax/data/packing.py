"""Samples packed into rows of fixed shapes: how many of which pictures, which samples together, and the arrays.

A batch has one bucket: all its painted pictures have one size, all its seen pictures another, and a row has so many
places for either and for tokens of text. What a row's tokens are (`models.bagel.Segments`) is in integers, a few for a
picture and a few for a token of text, so shapes depend on the bucket alone. The plan is a pure function of the sources'
indices, the settings and the seed: every host and worker process comes to the same one, and a position in it is a step.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from refine_jax.data import loader
from refine_jax.data.plan import nearest
from refine_jax.data.sequences import Item, Painted, Seen, Source, Text, fitted
from refine_jax.errors import RefineError

Size = tuple[int, int]  # (height, width)

# A sample that fits nowhere waits, and others are tried: so many, then the batch is closed.
_WAITING = 50
_PERIOD = 1000  # draws after which the mix repeats


class Bucket(NamedTuple):
    """painted, seen: (height, width) in pixels of the two views; pictures: places for each of them in a row."""

    painted: Size
    seen: Size
    pictures: int


class Packing:
    """Which samples make which rows.

    Args:
      indices: a source's index (`sequences.Source.index`) each, in a fixed order; weights: how often a sample is drawn
        from it, in proportion.
      batch_size: rows of a global batch; text: tokens of a row's text stream.

    A source is passed through in an order of its own, again and again; an epoch ends when the largest, by its weight,
    has been passed once. A sample goes to the bucket of the nearest aspect (one without pictures to the first). Samples
    too long for a row are never drawn: `left_out` counts them. Raises `RefineError` where nothing of a source fits.
    """

    def __init__(
        self,
        indices: Sequence[np.ndarray],
        weights: Sequence[float],
        batch_size: int,
        buckets: Sequence[Bucket],
        text: int,
        seed: int,
    ):
        self.buckets, self._batch, self._text, self._seed = tuple(buckets), batch_size, text, seed
        self._needs, self._bucket, self._usable = [], [], []
        self.left_out = 0
        for index in indices:
            width, height = np.maximum(index[:, 3:5], 1).T
            bucket = nearest(width / height, [b.painted for b in buckets])
            bucket = np.where(index[:, 3] > 0, bucket, 0)
            room = np.array([(b.pictures, b.pictures, text) for b in buckets])[bucket]
            usable = np.flatnonzero((index[:, :3] <= room).all(axis=1))
            self.left_out += len(index) - len(usable)
            if not len(usable):
                raise RefineError(
                    f"data: no sample of a source fits into a row of {text} tokens of text and {buckets[0].pictures} "
                    "pictures; raise data.tokens and data.text_length"
                )
            self._needs.append(index[:, :3])
            self._bucket.append(bucket)
            self._usable.append(usable)
        # Of each source in turn, as its weight says.
        self._order = [int(k) for (k,) in loader.schedule([(k,) for k in range(len(indices))], weights, _PERIOD)]
        share = np.bincount(self._order, minlength=len(indices)) / len(self._order)
        if not share.all():
            raise RefineError(f"data.sources: weights {list(weights)}: give numbers within a factor of {_PERIOD}")
        self._draws = int(np.ceil(max(len(u) / s for u, s in zip(self._usable, share))))
        self._ends = [0]  # of epochs, in steps

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ends": [0]}

    def rows(self, step: int) -> tuple[Bucket, list[list[tuple[int, int]]]]:
        """The bucket of a step, and the rows of its global batch: (source, number) of their samples."""
        while step >= self._ends[-1]:
            self._ends.append(self._ends[-1] + len(_epoch(self, len(self._ends) - 1)))
        number = int(np.searchsorted(self._ends, step, side="right")) - 1
        bucket, rows = _epoch(self, number)[step - self._ends[number]]
        return self.buckets[bucket], rows

    def once(self, source: int, number: int) -> np.ndarray:
        """The samples of a source in the order of its pass `number`."""
        rng = np.random.default_rng([self._seed, source, number])
        return rng.permutation(self._usable[source])

    def pack(self, epoch: int) -> list[tuple[int, list[list[tuple[int, int]]]]]:
        """All batches of an epoch, in order: (number of the bucket, rows).

        A bucket's last batch is left out where it has samples for less than half of its rows, unless it is the only
        one; rows of it may be empty.
        """
        size = len(self._order)
        counts = np.bincount(self._order, minlength=len(self._usable))
        drawn = counts * (epoch * self._draws // size)
        for k in self._order[: epoch * self._draws % size]:
            drawn[k] += 1
        batches: list[tuple[int, list[list[tuple[int, int]]]]] = []
        filling = [_Filling(self._batch, bucket.pictures, self._text) for bucket in self.buckets]
        for draw in range(epoch * self._draws, (epoch + 1) * self._draws):
            source = self._order[draw % size]
            usable = len(self._usable[source])
            number = int(_once(self, source, int(drawn[source] // usable))[drawn[source] % usable])
            drawn[source] += 1
            bucket = int(self._bucket[source][number])
            rows = filling[bucket].put((source, number), self._needs[source][number])
            if rows is not None:
                batches.append((bucket, rows))
        rest = [(bucket, rows) for bucket, last in enumerate(filling) for rows in last.rest()]
        batches += [(bucket, rows) for bucket, rows in rest if 2 * sum(map(bool, rows)) >= self._batch]
        return batches or rest[:1]


@functools.lru_cache(maxsize=2)
def _epoch(packing: Packing, number: int) -> list[tuple[int, list[list[tuple[int, int]]]]]:
    return packing.pack(number)


@functools.lru_cache(maxsize=8)
def _once(packing: Packing, source: int, number: int) -> np.ndarray:
    return packing.once(source, number)


class _Filling:
    """A batch that is being filled: each sample goes to the first row with room for it."""

    def __init__(self, rows: int, pictures: int, text: int):
        self._room = (pictures, pictures, text)
        self._rows, self._waiting = rows, []
        self._empty()

    def _empty(self) -> None:
        self._free = np.tile(np.array(self._room, np.int64), (self._rows, 1))
        self._samples: list[list[tuple[int, int]]] = [[] for _ in range(self._rows)]

    def _place(self, sample: tuple[int, int], need: np.ndarray) -> bool:
        fits = (self._free >= need).all(axis=1)
        if not fits.any():
            return False
        row = int(fits.argmax())
        self._free[row] -= need
        self._samples[row].append(sample)
        return True

    def put(self, sample: tuple[int, int], need: np.ndarray) -> list[list[tuple[int, int]]] | None:
        """Returns the batch that this sample closed, if it did."""
        if self._place(sample, need):
            return None
        self._waiting.append((sample, need))
        if len(self._waiting) <= _WAITING:
            return None
        return self._close()

    def _close(self) -> list[list[tuple[int, int]]]:
        """The batch as it is; what waited goes into the next."""
        closed, waiting = self._samples, self._waiting
        self._empty()
        self._waiting = [pair for pair in waiting if not self._place(*pair)]
        return closed

    def rest(self) -> Iterator[list[list[tuple[int, int]]]]:
        """The batches that are left, until nothing waits."""
        while any(self._samples):
            yield self._close()


# ------------------------------------------------------------------------------------------------------------ the rows


@dataclass(frozen=True)
class Rows:
    """The arrays of a row, `make(step, row)` of `loader.Batches`.

    encode: a text -> its ids with the two marks; marks: ids of an image's start and end. dropout: of optional texts, by
    a draw that depends on the seed, the step and the row.
    """

    packing: Packing
    sources: tuple[Source, ...]
    encode: Any
    marks: tuple[int, int]
    text: int
    dropout: float
    seed: int

    def __call__(self, step: int, row: int) -> dict[str, np.ndarray]:
        bucket, rows = self.packing.rows(step)
        rng = np.random.default_rng([self.seed, step, row])
        filled, skipped = Row(self.text, bucket), 0
        for number, (source, index) in enumerate(rows[row]):
            try:
                items, pictures = self.sources[source].sample(index)
            except RefineError:  # counted; the batches say so where there are many
                skipped += 1
                continue
            kept = [
                item for item in items if not (isinstance(item, Text) and item.optional and rng.random() < self.dropout)
            ]
            filled.add(number, kept, pictures, self.encode, self.marks)
        counts = dict(samples=np.int32(len(rows[row])), skipped=np.int32(skipped))
        return {**filled.arrays(), **counts}


# What stands of a token of text, and of a picture, in a batch; `models.bagel.Segments` says what it means.
PLACES = ("sample", "segment", "index", "position")


class Row:
    """A row that is being filled with samples."""

    def __init__(self, text: int, bucket: Bucket):
        self._bucket, self._used = bucket, 0
        self._text = {"ids": np.zeros(text, np.int32)} | {name: np.zeros(text, np.int32) for name in PLACES}
        self._text |= {name: np.zeros(text, bool) for name in ("causal", "noisy", "scored")}
        self._text["sample"][:] = -1
        self._pictures = {}
        for name, size in (("seen", bucket.seen), ("painted", bucket.painted)):
            places = {key: np.zeros(bucket.pictures, np.int32) for key in PLACES}
            places["sample"][:] = -1
            self._pictures[name] = dict(pixels=np.zeros((bucket.pictures, *size, 3), np.uint8), **places)
        self._pictures["painted"]["noisy"] = np.zeros(bucket.pictures, bool)
        self._filled = dict(seen=0, painted=0)

    def add(
        self, sample: int, items: Sequence[Item], pictures: Sequence[np.ndarray], encode: Any, marks: tuple[int, int]
    ) -> None:
        """As `PackedDataset.pack_sequence` lays a sample out: texts count positions on, an image takes one."""
        position = order = 0
        for segment, item in enumerate(items):
            place = dict(sample=sample, segment=segment, index=order, position=position)
            if isinstance(item, Text):
                ids = encode(item.text)
                count = np.arange(len(ids))
                # Every token but the last predicts the next one.
                scored = item.scored & (count < len(ids) - 1)
                running = dict(index=order + count, position=position + count)
                self._write(ids, {**place, **running, "causal": True, "noisy": False, "scored": scored})
                position, order = position + len(ids), order + len(ids)
                continue
            seen = isinstance(item, Seen)
            noisy = isinstance(item, Painted) and not item.clean
            self._write(np.array(marks), {**place, "causal": False, "noisy": noisy, "scored": False})
            name = "seen" if seen else "painted"
            into, slot = self._pictures[name], self._filled[name]
            self._filled[name] += 1
            for key, value in place.items():
                into[key][slot] = value
            if not seen:
                into["noisy"][slot] = noisy
            into["pixels"][slot] = fitted(pictures[item.picture], getattr(self._bucket, name))
            # What would follow the picture to be painted stands at its position.
            position, order = position + (not noisy), order + 1

    def _write(self, ids: np.ndarray, values: Mapping[str, Any]) -> None:
        at = slice(self._used, self._used + len(ids))
        self._used += len(ids)
        self._text["ids"][at] = ids
        for name, value in values.items():
            self._text[name][at] = value

    def arrays(self) -> dict[str, np.ndarray]:
        """Flat: text_ids, text_sample, …; seen_pixels, seen_sample, …; painted_pixels, painted_noisy, …."""
        parts = {"text": self._text, **self._pictures}
        return {f"{part}_{name}": value for part, values in parts.items() for name, value in values.items()}


def shapes(bucket: Bucket, text: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """(shape, dtype) of every array of a row of `bucket`."""
    return {name: (value.shape, value.dtype) for name, value in Row(text, bucket).arrays().items()}


class PackedBatches(loader.Batches):
    """Endless batches of packed rows; samples whose pictures cannot be read are left out and counted.

    max_corrupt: more than this share of the samples so far raises `RefineError` (checked from a hundred samples on).
    """

    def __init__(self, make: Rows, batch_size: int, max_corrupt: float, **hosts: Any):
        super().__init__(make, batch_size, **hosts)
        self._limit, self._count, self.corrupt = max_corrupt, 0, 0

    def __next__(self) -> dict[str, np.ndarray]:
        batch = super().__next__()
        count, lost = batch.pop("samples"), batch.pop("skipped")
        self._count, self.corrupt = self._count + int(count.sum()), self.corrupt + int(lost.sum())
        if self._count >= 100 and self.corrupt > self._limit * self._count:
            raise RefineError(
                f"{self.corrupt} of {self._count} samples could not be read, data.max_corrupt allows a share of "
                f"{self._limit}; copy the pictures again, or allow more"
            )
        return batch
