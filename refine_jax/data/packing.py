"""Samples packed into rows of fixed shapes: how many of which pictures, which samples together, and the arrays.

A batch has one bucket: all its painted pictures have one size, all its seen pictures another, and a row has so many
places for either and for tokens of text. What a row's tokens are (`models.bagel.Segments`) is in integers, a few for a
picture and a few for a token of text, so shapes depend on the bucket alone. The plan is a pure function of the sources'
indices, the settings and the seed: every host and worker process comes to the same one, and a position in it is a step.
"""

import hashlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from refine_jax.data import loader
from refine_jax.data.sequences import Item, Painted, Seen, Source, Text, fitted
from refine_jax.errors import RefineError

Size = tuple[int, int]  # (height, width)

# A sample that fits nowhere waits, and others are tried: so many, then the batch is closed.
_WAITING = 50
_PERIOD = 1000  # draws after which the mix repeats
_KEPT = 64  # batches of the plan that are remembered
_NAMED = 8  # samples of a row that can be named as unreadable


class Bucket(NamedTuple):
    """painted, seen: (height, width) in pixels of the two views; places in a row: pictures of either view, text of the
    text stream's tokens, scored of those that are to be predicted."""

    painted: Size
    seen: Size
    pictures: int
    text: int
    scored: int

    @property
    def room(self) -> tuple[int, int, int, int]:
        """What a row holds, as an index counts it."""
        return self.pictures, self.pictures, self.text, self.scored


class Packing:
    """Which samples make which rows: an endless stream of batches, known from the indices, the settings and the seed.

    Args:
      indices: a source's index (`sequences.Source.index`) each, in a fixed order; weights: how often a sample is drawn
        from it, in proportion; names: of the sources, for messages (default: their numbers).
      batch_size: rows of a global batch.
      fit: (height, width) of a picture -> of its painting (`BagelModel.painted_size`).

    A source is passed through in an order of its own, again and again. A sample goes to the bucket that is nearest to
    its painting in width and height (one without pictures to the first), and waits there until a batch is full: nothing
    that fits is lost. `left_out[k]` counts the samples of source k that are too long for a row. Raises `RefineError`
    where that is all of them, or a bucket stands there twice.
    """

    def __init__(
        self,
        indices: Sequence[np.ndarray],
        weights: Sequence[float],
        batch_size: int,
        buckets: Sequence[Bucket],
        seed: int,
        fit: Callable[[Size], Size] = lambda size: size,
        names: Sequence[str] = (),
    ):
        self.buckets, self._batch, self._seed = tuple(buckets), batch_size, seed
        self.names = tuple(names or map(str, range(len(indices))))
        twice = [bucket.painted for bucket in buckets if [b.painted for b in buckets].count(bucket.painted) > 1]
        if twice:
            raise RefineError(f"data.buckets: {twice[0]} stands there twice; take one out")
        sides = np.log([bucket.painted for bucket in buckets])
        self._needs, self._bucket, self._usable, self.left_out = [], [], [], []
        for number, index in enumerate(indices):
            sizes, which = np.unique(index[:, [5, 4]], axis=0, return_inverse=True)
            painted = np.log([fit(tuple(map(int, size))) if size.all() else buckets[0].painted for size in sizes])
            nearest = np.abs(painted[:, None] - sides).sum(axis=2).argmin(axis=1)
            bucket = nearest[which.reshape(-1)]
            room = np.array([b.room for b in buckets])[bucket]
            usable = np.flatnonzero((index[:, :4] <= room).all(axis=1))
            self.left_out.append(len(index) - len(usable))
            if not len(usable):
                raise RefineError(
                    f"data.sources: no sample of {self.names[number]} fits into a row of {buckets[0].text} tokens of "
                    f"text, {buckets[0].scored} of answers and {buckets[0].pictures} pictures; raise data.tokens, "
                    "data.text_length and data.answer_length"
                )
            self._needs.append(index[:, :4])
            self._bucket.append(bucket)
            self._usable.append(usable)
        # Of each source in turn, as its weight says.
        self._order = [int(k) for (k,) in loader.schedule([(k,) for k in range(len(indices))], weights, _PERIOD)]
        if len(set(self._order)) < len(indices):
            raise RefineError(f"data.sources: weights {list(weights)}: give numbers within a factor of {_PERIOD}")
        self._rewind()

    def _rewind(self) -> None:
        self._batches, self._first, self._recent = self._stream(), 0, []

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_batches", "_first", "_recent")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rewind()

    def rows(self, step: int) -> tuple[Bucket, list[list[tuple[int, int]]]]:
        """The bucket of a step, and the rows of its global batch: (source, number) of their samples.

        Batches follow from one another, so the first call for a late step takes a while: a minute for four million
        samples.
        """
        if step < self._first:
            self._rewind()
        while step >= self._first + len(self._recent):
            self._recent.append(next(self._batches))
            if len(self._recent) > _KEPT:
                self._recent.pop(0)
                self._first += 1
        return self._recent[step - self._first]

    def _stream(self) -> Iterator[tuple[Bucket, list[list[tuple[int, int]]]]]:
        filling = [_Filling(self._batch, bucket.room) for bucket in self.buckets]
        passes = [self._passes(source) for source in range(len(self._usable))]
        while True:
            for source in self._order:
                number = next(passes[source])
                bucket = int(self._bucket[source][number])
                rows = filling[bucket].put((source, number), self._needs[source][number])
                if rows is not None:
                    yield self.buckets[bucket], rows

    def _passes(self, source: int) -> Iterator[int]:
        """The samples of a source, pass after pass."""
        for number in itertools.count():
            yield from np.random.default_rng([self._seed, source, number]).permutation(self._usable[source]).tolist()


class _Filling:
    """A batch that is being filled: each sample goes to the first row with room for it."""

    def __init__(self, rows: int, room: tuple[int, ...]):
        self._room = room
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
        if len(self._waiting) <= min(_WAITING, self._rows * self._room[0]):
            return None
        closed, waiting = self._samples, self._waiting
        self._empty()
        self._waiting = [pair for pair in waiting if not self._place(*pair)]
        return closed


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
    dropout: float
    seed: int

    def __call__(self, step: int, row: int) -> dict[str, np.ndarray]:
        bucket, rows = self.packing.rows(step)
        rng = np.random.default_rng([self.seed, step, row])
        filled, skipped = Row(bucket), []
        for number, (source, index) in enumerate(rows[row]):
            try:
                items, pictures = self.sources[source].sample(index)
                kept = [item for item in items if not self._dropped(item, rng)]
                filled.add(number, kept, pictures, self.encode, self.marks)
            except RefineError:  # named by `PackedBatches` where there are many
                skipped.append((source, index))
        shown = np.full((_NAMED, 2), -1, np.int64)
        for place, sample in zip(shown, skipped):
            place[:] = sample
        return {**filled.arrays(), "skipped": shown}

    def _dropped(self, item: Item, rng: np.random.Generator) -> bool:
        return isinstance(item, Text) and item.optional and rng.random() < self.dropout


# What stands of a token of text, and of a picture, in a batch; `models.bagel.Segments` says what it means.
PLACES = ("sample", "segment", "index", "position")


class Row:
    """A row that is being filled with samples."""

    def __init__(self, bucket: Bucket):
        self._bucket, self._used, self._scored = bucket, 0, []
        self._text = {name: np.zeros(bucket.text, np.int32) for name in ("ids", *PLACES)}
        self._text |= {name: np.zeros(bucket.text, bool) for name in ("causal", "noisy")}
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
        """As `PackedDataset.pack_sequence` lays a sample out: texts count positions on, an image takes one.

        Where this raises `RefineError` (a text that cannot be encoded, two targets), nothing of the sample is there.
        """
        if sum(isinstance(item, Painted) and not item.clean for item in items) > 1:
            raise RefineError("a sample with several pictures to be painted: the mask of a row takes one; split it")
        size = lambda item: getattr(self._bucket, "seen" if isinstance(item, Seen) else "painted")
        ready = [
            encode(item.text) if isinstance(item, Text) else fitted(pictures[item.picture], size(item))
            for item in items
        ]
        position = order = 0
        for segment, (item, value) in enumerate(zip(items, ready)):
            place = dict(sample=sample, segment=segment, index=order, position=position)
            if isinstance(item, Text):
                count = np.arange(len(value))
                if item.scored:  # every token but the last predicts the next one
                    self._scored += (self._used + count[:-1]).tolist()
                running = dict(index=order + count, position=position + count)
                self._write(value, {**place, **running, "causal": True, "noisy": False})
                position, order = position + len(value), order + len(value)
                continue
            seen = isinstance(item, Seen)
            noisy = isinstance(item, Painted) and not item.clean
            self._write(np.array(marks), {**place, "causal": False, "noisy": noisy})
            name = "seen" if seen else "painted"
            into, slot = self._pictures[name], self._filled[name]
            self._filled[name] += 1
            for key in PLACES:
                into[key][slot] = place[key]
            if not seen:
                into["noisy"][slot] = noisy
            into["pixels"][slot] = value
            # What would follow the picture to be painted stands at its position.
            position, order = position + (not noisy), order + 1

    def _write(self, ids: np.ndarray, values: Mapping[str, Any]) -> None:
        at = slice(self._used, self._used + len(ids))
        self._used += len(ids)
        self._text["ids"][at] = ids
        for name, value in values.items():
            self._text[name][at] = value

    def arrays(self) -> dict[str, np.ndarray]:
        """Flat: text_ids, text_sample, …; text_scored, the places in the text stream of the tokens that predict, then
        -1; seen_pixels, seen_sample, …; painted_pixels, painted_noisy, …."""
        scored = np.full(self._bucket.scored, -1, np.int32)
        scored[: len(self._scored)] = self._scored
        parts = {"text": {**self._text, "scored": scored}, **self._pictures}
        return {f"{part}_{name}": value for part, values in parts.items() for name, value in values.items()}


def shapes(bucket: Bucket) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """(shape, dtype) of every array of a row of `bucket`."""
    return {name: (value.shape, value.dtype) for name, value in Row(bucket).arrays().items()}


class PackedBatches(loader.Batches):
    """Endless batches of packed rows; samples that cannot be read are left out, and counted in `corrupt`.

    A state holds, besides the position, a digest of the indices: where it is another, the order goes on from other
    samples, which is said.

    Args:
      max_corrupt: more than this share of all samples (below 1), or this number of them, raises `RefineError`, which
        names the first ones.
    """

    def __init__(self, make: Rows, batch_size: int, max_corrupt: float, digest: str, **hosts: Any):
        super().__init__(make, batch_size, **hosts)
        self._sources, self._names, self._digest = make.sources, make.packing.names, digest
        total = sum(map(len, make.sources))
        self._limit = max_corrupt * total if max_corrupt < 1 else max_corrupt
        self._bad: set[tuple[int, int]] = set()

    @property
    def corrupt(self) -> int:
        """How many samples this host had to leave out so far."""
        return len(self._bad)

    def __next__(self) -> dict[str, np.ndarray]:
        batch = super().__next__()
        skipped = batch.pop("skipped").reshape(-1, 2)
        self._bad.update(map(tuple, skipped[skipped[:, 0] >= 0].tolist()))
        if len(self._bad) > self._limit:
            named = "; ".join(self._reason(*sample) for sample in sorted(self._bad)[:5])
            raise RefineError(
                f"{len(self._bad)} samples could not be read, data.max_corrupt allows {self._limit:g}: {named}; copy "
                "their pictures again, or allow more"
            )
        return batch

    def _reason(self, source: int, number: int) -> str:
        try:
            self._sources[source].sample(number)
        except RefineError as error:
            return str(error)
        return f"sample {number} of {self._names[source]}: a text that spells a mark, or a picture that can be read now"

    def get_state(self) -> dict[str, Any]:
        """{"step": batches given so far, "data": digest of the indices}."""
        return {**super().get_state(), "data": self._digest}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue at a position that `get_state` gave."""
        if state.get("data", self._digest) != self._digest:
            print("the samples are others than before: the order goes on with the present ones", file=sys.stderr)
        super().set_state(state)


def digest(indices: Sequence[np.ndarray]) -> str:
    """Of all that the plan knows of the samples."""
    found = hashlib.sha256()
    for index in indices:
        found.update(np.ascontiguousarray(index, np.int64).tobytes() + b"|")
    return found.hexdigest()[:16]
