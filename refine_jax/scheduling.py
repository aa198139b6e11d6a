"""The scheduler of batch inference: requests' rows into batches in order, the host's work overlapped with the device's.

Which rows make a batch follows from the order of the requests alone, never from timing, so that processes that share
the chips of one model agree on it without a word.
"""

import collections
import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from refine_jax import parallel, serving
from refine_jax.errors import RefineError, out_of_memory
from refine_jax.manifest import Refused, Request

DONE, REFUSED, FAILED = "done", "refused", "failed"
_AHEAD = 2  # batches decoded before they are needed
_WAITING = 64  # batches' worth of rows that may wait in queues for others of their bucket
_PIXELS = 200_000_000  # of pictures that may wait there, and of decoded ones that may wait before them
_FAILURES = 3  # batches in a row, and the run stops


@dataclasses.dataclass
class Summary:
    """What a run did. seconds: from the first launch on, without waits for the compiler; device_seconds: of work."""

    requests: int = 0
    done: int = 0
    refused: int = 0
    failed: int = 0
    skipped: int = 0
    batches: int = 0
    rows: int = 0
    padding: int = 0
    programs: int = 0
    programs_loaded: int = 0
    compile_seconds: float = 0.0
    first_result_seconds: float = 0.0
    seconds: float = 0.0
    device_seconds: float = 0.0
    total_seconds: float = 0.0

    @property
    def busy(self) -> float:
        """Share of the time after the first batch in which the device worked."""
        return self.device_seconds / self.seconds if self.seconds > 0 else 1.0

    def text(self) -> str:
        """For a reader."""
        rate = self.done / self.total_seconds if self.total_seconds else 0.0
        lines = [
            f"{self.done} done, {self.refused} refused, {self.failed} failed"
            + (f", {self.skipped} done before" if self.skipped else "")
            + f", of {self.requests}",
            f"{self.batches} batches, {self.rows} rows and {self.padding} of padding;"
            f" {self.programs} programs compiled in {self.compile_seconds:.1f} s, {self.programs_loaded} loaded",
            f"first result after {self.first_result_seconds:.1f} s, {self.total_seconds:.1f} s in all"
            f" ({rate:.2f} results/s); after warm-up the device was busy {self.busy:.1%} of {self.seconds:.1f} s",
        ]
        return "\n".join(lines)


@dataclasses.dataclass
class _Task:
    """A request on its way: its job and the results of its rows so far."""

    request: Request
    door: serving.Door
    job: serving.Job
    results: list[Any]
    missing: int


@dataclasses.dataclass(frozen=True)
class _Batch:
    door: serving.Door
    bucket: serving.Bucket
    rows: list[tuple[_Task, int]]


class Scheduler:
    """Fills batches from requests in order and runs them, with the host's work before and behind overlapped."""

    def __init__(
        self,
        doors: Mapping[str, Callable[[], serving.Door]],
        finish: Callable[[Request, Any], None],
        refuse: Callable[[Request | Refused, str, str], None],
        *,
        batch_size: int,
        workers: int,
        streams: int = 1,
        agree: Callable[[bool, str | None], bool] | None = None,
    ):
        """doors: makers of the doors, by task. finish: takes a request and its picture, in threads of its own; refuse:
        a request, what it is (`REFUSED`, `FAILED`) and why. workers: threads that decode, and as many that finish.
        streams: threads that launch; a CPU runs what one thread launches in turn, and half idle. agree: of processes
        that share one model, whether one of them is to stop; called by all before each batch, with what it is, and once
        at the end, with None."""
        self._doors, self._finish, self._refuse = doors, finish, refuse
        self._batch_size, self._workers = batch_size, workers
        self._queues: collections.OrderedDict[Any, list[tuple[_Task, int]]] = collections.OrderedDict()
        self._batches: queue.Queue[_Batch | None] = queue.Queue(maxsize=2)
        self._streams, self._agree = streams, agree
        self._flying: queue.Queue[tuple[_Batch, Any, float] | None] = queue.Queue(maxsize=streams)
        self._clock = _Clock()
        self._open = threading.Semaphore(4 * batch_size + 2 * workers)  # results that wait to be written
        self._errors: list[BaseException] = []
        self._stop = threading.Event()
        self._pixels = 0
        self._failed: set[Any] = set()  # since the last batch that ran
        self._failing = threading.Lock()
        self.summary = Summary()

    def stop(self) -> None:
        """Start nothing more; `run` ends once what runs is written. For signal handlers."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    def run(self, requests: Iterator[Request | Refused]) -> None:
        """Until all are done. Raises what cannot be laid to one request: a full disk, a lost device."""
        self._started = time.perf_counter()
        with (
            ThreadPoolExecutor(self._workers, "decode") as decoders,
            ThreadPoolExecutor(self._workers, "write") as self._writers,
        ):
            targets = [*[self._launch_all] * self._streams, self._land_all]
            threads = [threading.Thread(target=target, daemon=True) for target in targets]
            for thread in threads:
                thread.start()
            try:
                self._feed(requests, decoders)
            except BaseException as error:
                self._errors.append(error)
                self._stop.set()
            for _ in range(self._streams):
                self._batches.put(None)
            for thread in threads:
                thread.join()
        self.summary.seconds, self.summary.device_seconds = self._clock.read()
        self.summary.total_seconds = time.perf_counter() - self._started
        if self._errors:
            raise self._errors[0]

    def _feed(self, requests: Iterator[Request | Refused], decoders: ThreadPoolExecutor) -> None:
        ahead: collections.deque[tuple[Request | Refused, Future | None]] = collections.deque()
        exhausted = False
        while not self._stop.is_set():
            while not exhausted and (not ahead or self._room(ahead)):
                request = next(requests, None)
                if request is None:
                    exhausted = True
                else:
                    refused = isinstance(request, Refused)
                    ahead.append((request, None if refused else decoders.submit(self._decode, request)))
            if not ahead:
                break
            request, future = ahead.popleft()
            if future is None:
                self._refuse(request, REFUSED, request.reason)
                continue
            try:
                task = future.result()
            except RefineError as error:
                self._refuse(request, REFUSED, str(error))
                continue
            except Exception as error:  # whatever a strange file brings about is that request's own
                self._refuse(request, FAILED, _reason(error))
                continue
            self._add(task)
        for _, future in ahead:
            if future is not None:
                future.cancel()
        while self._queues and not self._stop.is_set():
            self._dispatch(next(iter(self._queues)))

    def _room(self, ahead: Collection[tuple[Request | Refused, Future | None]]) -> bool:
        """Whether another request may be decoded: neither too many are, nor, as few are at work, too large ones."""
        futures = [future for _, future in ahead if future is not None]
        made = [future for future in futures if future.done()]
        pixels = sum(future.result().job.pixels for future in made if future.exception() is None)
        busy = len(futures) - len(made)
        return len(ahead) < _AHEAD * self._batch_size and busy < 2 * self._workers and pixels < _PIXELS

    def _decode(self, request: Request) -> _Task:
        door = self._doors[request.task]()
        read = door.read_generation if request.task == "generate" else door.read
        job = read(**request.arguments)
        return _Task(request, door, job, [None] * len(job.rows), len(job.rows))

    def _add(self, task: _Task) -> None:
        if not task.job.rows:
            self._done(task)
        for order, row in enumerate(task.job.rows):
            key = (id(task.door), row.bucket)
            self._queues.setdefault(key, []).append((task, order))
            self._pixels += _share(task)
            if len(self._queues[key]) == self._batch_size:
                self._dispatch(key)
        waiting = sum(map(len, self._queues.values()))
        while self._queues and (waiting > _WAITING * self._batch_size or self._pixels > _PIXELS):
            key = next(iter(self._queues))  # the oldest
            waiting -= len(self._queues[key])
            self._dispatch(key)

    def _dispatch(self, key: Any) -> None:
        rows = self._queues.pop(key)
        self._pixels -= sum(_share(task) for task, _ in rows)
        batch = _Batch(rows[0][0].door, key[1], rows)
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._batches.put(batch, timeout=0.2)
                return

    # ------------------------------------------------------------------------------------------- the device's threads

    def _launch_all(self) -> None:
        """Launches batches, at most one ahead of the one that runs (of each stream)."""
        agreed = False  # to stop
        while (batch := self._batches.get()) is not None:
            if self._agree is None:
                agreed = self._stop.is_set()
            elif not agreed and (agreed := self._ask(self._stop.is_set(), batch)):
                self._stop.set()
            if not agreed:
                self._guarded(self._launch, batch)
        if self._agree is not None and not agreed:
            self._ask(self._stop.is_set(), None)
        self._flying.put(None)

    def _ask(self, stop: bool, batch: _Batch | None) -> bool:
        """Whether a process of this model stops, before some launch what the others do not."""
        answers: list[bool] = []
        said = batch and repr((batch.bucket, [(task.request.line, order) for task, order in batch.rows]))
        self._guarded(lambda: answers.append(self._agree(stop, said)))
        return not answers or answers[0]

    def _guarded(self, step: Callable[..., None], *args: Any) -> None:
        """What a step raises ends the run; its thread lives on and empties its queue, so that nobody waits for it."""
        try:
            step(*args)
        except BaseException as error:
            self._errors.append(error)
            self._stop.set()

    def _launch(self, batch: _Batch) -> None:
        counts = batch.door.programs.counts
        made, started = counts.compiled + counts.loaded, time.perf_counter()
        try:
            launched = batch.door.launch(batch.bucket, [task.job.rows[order] for task, order in batch.rows])
            at = time.perf_counter()
            if self._agree is not None:  # to gather is a program too, and all processes run theirs in one order
                launched = jax.tree.map(parallel.fetch, launched)
        except Exception as error:
            self._fail(batch, error)
            return
        if counts.compiled + counts.loaded > made:
            self._clock.preparing.append((started, at))
        self._flying.put((batch, launched, at))

    def _land_all(self) -> None:
        """Waits for batches, in the order in which they were launched."""
        ended = 0
        while ended < self._streams:
            item = self._flying.get()
            if item is None:
                ended += 1
            else:
                self._guarded(self._land, *item)

    def _land(self, batch: _Batch, launched: Any, at: float) -> None:
        try:
            jax.block_until_ready(launched)
            self._clock.working.append((at, time.perf_counter()))
            results = batch.door.fetch(launched, len(batch.rows))
            bad = [result for result in results if isinstance(result, RefineError)]
            if len(bad) == len(results):
                raise bad[0]
        except Exception as error:
            self._fail(batch, error)
            return
        with self._failing:
            self._failed.clear()
        self.summary.batches += 1
        self.summary.rows += len(batch.rows)
        self.summary.padding += batch.door.rows_of(len(batch.rows)) - len(batch.rows)
        for (task, order), result in zip(batch.rows, results):
            if isinstance(result, RefineError):
                self._lose([task], _reason(result))
                continue
            task.results[order] = result
            task.missing -= 1
            if task.missing == 0:
                self._done(task)

    def _fail(self, batch: _Batch, error: Exception) -> None:
        """A batch that did not run, for want of memory for instance: its requests have failed, others go on."""
        reason = _reason(error)
        # A bucket that is too large for the device says nothing of the others, however often it comes.
        large = out_of_memory(error)
        with self._failing:
            self._failed.add((id(batch.door), batch.bucket) if large else object())
            many = len(self._failed) >= _FAILURES
        self._lose([task for task, _ in batch.rows], reason)
        if many:
            self._errors.append(
                RefineError(
                    f"{_FAILURES} batches in a row failed ({reason}); "
                    + ("give a smaller batch" if large else "run again")
                )
            )
            self._stop.set()

    def _lose(self, tasks: Iterable[_Task], reason: str) -> None:
        """These requests have failed, whatever becomes of their other rows."""
        with self._failing:
            lost = {id(task): task for task in tasks if task.missing > 0}
            for task in lost.values():
                task.missing = -(2**30)
        for task in lost.values():
            self._refuse(task.request, FAILED, reason)

    def _done(self, task: _Task) -> None:
        self._open.acquire()

        def finish() -> None:
            try:
                try:
                    picture = task.job.finish(task.results)
                except Exception as error:
                    self._refuse(task.request, FAILED, _reason(error))
                    return
                self._finish(task.request, picture)
                if not self.summary.first_result_seconds:
                    self.summary.first_result_seconds = time.perf_counter() - self._started
            except BaseException as error:
                self._errors.append(error)
                self._stop.set()
            finally:
                self._open.release()

        self._writers.submit(finish)


class _Clock:
    """When the device worked (from launch to result), and when programs were compiled or loaded: intervals."""

    def __init__(self) -> None:
        self.working: list[tuple[float, float]] = []
        self.preparing: list[tuple[float, float]] = []

    def read(self) -> tuple[float, float]:
        """(seconds from the first launch to the last result, without those in which a program was made and the device
        had nothing else to do; seconds of work in them)."""
        if not self.working:
            return 0.0, 0.0
        first, last = self.working[0][0], max(end for _, end in self.working)
        work = _measure(self.working)
        within = [(max(start, first), min(end, last)) for start, end in self.preparing if start < last and end > first]
        return last - first - (_measure([*self.working, *within]) - work), work


def _measure(intervals: Sequence[tuple[float, float]]) -> float:
    """The length of a union of intervals."""
    total, reached = 0.0, -float("inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _reason(error: Exception) -> str:
    """In one line; what a user can mend as it is."""
    said = " ".join(str(error).split())[:300]
    return said if isinstance(error, RefineError) else f"{type(error).__name__}: {said}"


def _share(task: _Task) -> int:
    """Pixels that a waiting row keeps in memory."""
    return task.job.pixels // len(task.job.rows)
