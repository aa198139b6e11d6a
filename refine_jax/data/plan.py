"""Which records make which batch: buckets, groups and the order of an epoch, from a dataset's index alone.

Everything is a pure function of the index, the settings and (seed, epoch): every host and every worker process comes to
the same plan by itself, and a position in it is a step number.
"""

import functools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from refine_jax import focus
from refine_jax.errors import RefineError

Size = tuple[int, int]  # (height, width)


def enlarge(box: Sequence[int], width: int, height: int, ratio: float) -> tuple[int, int, int, int]:
    """The crop `box` (x1, y1, x2, y2) made wider or higher, as far as a picture of (width, height) allows, to `ratio`.

    ratio = width / height of the bucket that the crop is resized to: what is reached here is not stretched there. The
    crop grows evenly on both sides, and into the picture where it meets a border.
    """
    x1, y1, x2, y2 = map(int, box)
    wide, high = x2 - x1, y2 - y1
    if wide < ratio * high:
        grown = max(wide, min(width, round(ratio * high)))
        x1 = min(max(0, x1 - (grown - wide) // 2), width - grown)
        x2 = x1 + grown
    else:
        grown = max(high, min(height, round(wide / ratio)))
        y1 = min(max(0, y1 - (grown - high) // 2), height - grown)
        y2 = y1 + grown
    return x1, y1, x2, y2


def _nearest(ratios: np.ndarray, buckets: Sequence[Size]) -> np.ndarray:
    """The bucket of the nearest aspect for each of `ratios` (width / height), by the factor between them."""
    aspects, first = np.unique([width / height for height, width in buckets], return_index=True)
    return first[np.searchsorted(np.sqrt(aspects[:-1] * aspects[1:]), ratios)]


def _merged(counts: np.ndarray, buckets: Sequence[Size], least: int) -> np.ndarray:
    """For each bucket the one that takes its records: itself, or where fewer than `least` come together the nearest."""
    sizes = np.asarray(buckets, np.float64)
    aspect = np.log(sizes[:, 1] / sizes[:, 0])
    counts, into = counts.copy(), np.arange(len(counts))
    while True:
        alive = np.flatnonzero(counts)
        if len(alive) < 2 or counts[alive].min() >= least:
            return into
        small = alive[counts[alive].argmin()]
        others = alive[alive != small]
        chosen = others[np.abs(aspect[others] - aspect[small]).argmin()]
        counts[chosen] += counts[small]
        counts[small] = 0
        into[into == small] = chosen


def _whole_batches(free: int, fixed: np.ndarray, batch: int) -> np.ndarray:
    """How many of `free` records join each group of `fixed` ones: first to complete batches, then in proportion."""
    extra = np.zeros(len(fixed), np.int64)
    lacking = -fixed % batch
    for group in np.argsort(lacking, kind="stable"):
        extra[group] = min(int(lacking[group]), free)
        free -= int(extra[group])
    share = fixed / fixed.sum() * (free // batch)
    whole = np.floor(share).astype(np.int64)
    whole[np.argsort(whole - share, kind="stable")[: free // batch - int(whole.sum())]] += 1
    extra += whole * batch
    extra[fixed.argmax()] += free % batch
    return extra


class Plan:
    """Batches of one group each; a group shares the bucket of the crop and that of the reference.

    A crop (`focus.focus_box` of the region) goes to the bucket of the nearest aspect, a reference likewise. Buckets
    with fewer records than a batch, and reference buckets of a crop bucket too, join the nearest: better slightly
    stretched than the same few pictures over and over. A record without a reference joins any group of its crop
    bucket; where no group there has references, the reference bucket is the one nearest to the crop's.

    In an epoch every record comes once, in an order of its own; only the last batch of a group is completed with the
    group's first records of that epoch.

    Args:
      index: [N, 9] int32 (`records.COLUMNS`).
      margin: of the crop, in pixels of a picture scaled to `focus.FOCUS_AREA`.
    """

    def __init__(
        self,
        index: np.ndarray,
        seed: int,
        batch_size: int,
        buckets: Sequence[Size],
        reference_buckets: Sequence[Size],
        margin: float,
    ):
        for name, sizes in (("buckets", buckets), ("reference_buckets", reference_buckets)):
            if not len(sizes) or any(len(size) != 2 or min(size) < 1 for size in sizes):
                raise RefineError(f"data.{name} {tuple(sizes)}: give at least one (height, width)")
            if len({Fraction(*size) for size in sizes}) < len(sizes):
                raise RefineError(f"data.{name} {tuple(sizes)}: two have one aspect, which decides; give one of each")
        self._check(seed, batch_size)
        width, height = index[:, 0], index[:, 1]
        crops = focus.focus_box(index[:, 2:6], width, height, margin).astype(np.int64)
        ratios = (crops[:, 2] - crops[:, 0]) / (crops[:, 3] - crops[:, 1])
        crop = _nearest(ratios, buckets)
        crop = _merged(np.bincount(crop, minlength=len(buckets)), buckets, batch_size)[crop]
        has = index[:, 6] > 0
        shape = np.where(has[:, None], index[:, 6:8], 1).astype(np.float64)
        reference = np.where(has, _nearest(shape[:, 0] / shape[:, 1], reference_buckets), -1)
        self._arrange(crop, reference, buckets, reference_buckets, batch_size)

    @classmethod
    def fixed(cls, sizes: np.ndarray, seed: int, batch_size: int) -> "Plan":
        """The plan of records whose buckets are given: sizes [N, 4], (h, w) of the crop and of the reference, or 0."""
        plan = cls.__new__(cls)
        plan._check(seed, batch_size)
        buckets, crop = np.unique(sizes[:, :2], axis=0, return_inverse=True)
        has = sizes[:, 2] > 0
        references, reference = np.unique(
            np.where(has[:, None], sizes[:, 2:], sizes[:, :2]), axis=0, return_inverse=True
        )
        as_tuples = lambda rows: [tuple(row) for row in rows.tolist()]
        reference = np.where(has, reference.reshape(-1), -1)
        plan._arrange(crop.reshape(-1), reference, as_tuples(buckets), as_tuples(references), 1)
        return plan

    def _check(self, seed: int, batch_size: int) -> None:
        if seed < 0:
            raise RefineError(f"seed {seed}: give 0 or more")
        if batch_size < 1:
            raise RefineError(f"batch_size {batch_size}: give at least 1")
        self.seed, self.batch_size = seed, batch_size

    def _arrange(
        self,
        crop: np.ndarray,
        reference: np.ndarray,
        buckets: Sequence[Size],
        reference_buckets: Sequence[Size],
        least: int,
    ) -> None:
        """Form the groups: crop, reference [N]: places in the lists of buckets, -1 without a reference."""
        # Groups, in order of crop bucket, then of reference bucket; free records carry -1 - (crop bucket).
        self.groups: list[tuple[Size, Size]] = []
        self._free: list[tuple[int, np.ndarray, np.ndarray]] = []
        self._group = np.empty(len(crop), np.int32)
        sizes = []
        together = np.argsort(crop, kind="stable")
        for inside in np.split(together, np.flatnonzero(np.diff(crop[together])) + 1):
            bucket = crop[inside[0]]
            fixed, free = inside[reference[inside] >= 0], inside[reference[inside] < 0]
            counts = np.bincount(reference[fixed], minlength=len(reference_buckets))
            into = _merged(counts, reference_buckets, least)
            counts = np.bincount(into, weights=counts, minlength=len(reference_buckets)).astype(np.int64)
            own = int(_nearest(np.array([buckets[bucket][1] / buckets[bucket][0]]), reference_buckets)[0])
            kinds = np.flatnonzero(counts) if counts.any() else np.array([own])
            first, number = len(self.groups), np.zeros(len(reference_buckets), np.int32)
            number[kinds] = np.arange(first, first + len(kinds))
            self._group[fixed] = number[into[reference[fixed]]]
            self._group[free] = -1 - bucket
            extra = np.array([len(free)])
            if counts.any():
                extra = _whole_batches(len(free), counts[kinds], self.batch_size)
            self._free.append((int(bucket), np.arange(first, first + len(kinds), dtype=np.int32), extra))
            self.groups += [(tuple(buckets[bucket]), tuple(reference_buckets[kind])) for kind in kinds]
            sizes += (counts[kinds] + extra).tolist()
        self.sizes = np.array(sizes)  # records in each group, the same in every epoch
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._batches = -(-self.sizes // self.batch_size)
        self.steps = int(self._batches.sum())  # of an epoch

    def __getstate__(self) -> dict:
        state = dict(self.__dict__)
        state.pop("_epoch", None)  # each process has its own
        return state

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(records by group, each in the epoch's order; group of each batch; which of the group's batches it is)."""
        # The bit generator's raw output, which numpy promises never to change.
        bits = np.random.PCG64(np.random.SeedSequence((self.seed, epoch)))
        shuffled = lambda n: np.argsort(bits.random_raw(n), kind="stable")
        order = shuffled(len(self._group))
        group = self._group[order]
        for bucket, groups, extra in self._free:
            where = np.flatnonzero(group == -1 - bucket)
            group[where] = np.repeat(groups, extra)[shuffled(len(where))] if len(where) else 0
        members = order[np.argsort(group, kind="stable")].astype(np.int32)
        kind = np.repeat(np.arange(len(self.groups)), self._batches)
        within = np.arange(self.steps) - np.repeat(np.cumsum(self._batches) - self._batches, self._batches)
        batches = shuffled(self.steps)
        return members, kind[batches], within[batches]

    @functools.cached_property
    def _epoch(self):
        return functools.lru_cache(maxsize=2)(self._order)

    def members(self, epoch: int) -> list[np.ndarray]:
        """The records of each group, in the epoch's order."""
        return np.split(self._epoch(epoch)[0], self._starts[1:-1])

    def group(self, step: int) -> tuple[Size, Size]:
        """The buckets of crop and reference of a step."""
        epoch, position = divmod(step, self.steps)
        return self.groups[self._epoch(epoch)[1][position]]

    def record(self, step: int, row: int, attempt: int = 0) -> int:
        """The record of a row of the global batch; attempt 1, 2, …: what takes its place where that cannot be used."""
        epoch, position = divmod(step, self.steps)
        members, kinds, within = self._epoch(epoch)
        kind = kinds[position]
        place = within[position] * self.batch_size + row + attempt
        return int(members[self._starts[kind] + place % self.sizes[kind]])

    def attempts(self, step: int) -> int:
        """How many records a step's group has: so many different ones `record` can offer."""
        epoch, position = divmod(step, self.steps)
        return int(self.sizes[self._epoch(epoch)[1][position]])
