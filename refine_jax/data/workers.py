"""A function of many items, on worker processes."""

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from refine_jax.errors import RefineError

_work: Callable  # what a worker process does


def _employ(function: Callable) -> None:
    global _work
    _work = function
    end_with_parent()


def end_with_parent() -> None:
    """In a worker process: end when the process that started it does, however it does (SIGKILL, for want of memory).

    Otherwise it would go on with what is queued, beside those of the run that takes over.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


def _do(item: Any) -> Any:
    return _work(item)


def spread(function: Callable, items: Sequence, workers: int) -> Iterator:
    """`function` of every item, in order; on `workers` processes, 0: on this one.

    Raises what `function` raises, and `RefineError` where a process dies.
    """
    if not workers:
        yield from map(function, items)
        return
    # Not forked: a process with threads (JAX, grain) cannot be copied safely.
    context = multiprocessing.get_context("spawn")
    # The function goes to each process once: it may hold the list of a million files.
    start = dict(mp_context=context, initializer=_employ, initargs=(function,))
    with concurrent.futures.ProcessPoolExecutor(max(1, min(workers, len(items))), **start) as pool:
        futures = [pool.submit(_do, item) for item in items]
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool:
            raise RefineError("a worker process was killed, perhaps for its memory; run it again with fewer") from None
        finally:
            for future in futures:
                future.cancel()
