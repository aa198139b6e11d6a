"""Progress of a jitted sampler on a terminal: seconds while it compiles, and on a CPU steps while it denoises."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from tqdm import tqdm


class Progress:
    """A bar whose `step` a compiled program may call; the same object serves every program of a `Refiner`.

    Programs compiled with `step` inside call it wherever they run, so it does nothing outside `show`.

    counts: whether steps are counted, by such a program. JAX keeps none in its compilation cache, nor can a
    `executables.Store`, so by default it is done on a CPU alone, where compiling takes seconds.
    """

    def __init__(self, counts: bool | None = None) -> None:
        self.counts = jax.default_backend() == "cpu" if counts is None else counts
        self._bar: tqdm | None = None
        self._running = False
        self._lock = threading.Lock()

    def step(self, finished: Any) -> None:
        """`finished` steps are done; callbacks may arrive in any order."""
        with self._lock:
            if self._bar is not None:
                self._bar.set_description("denoising", refresh=False)
                self._bar.n = max(self._bar.n, int(finished))
                self._bar.refresh()

    def compiled(self) -> None:
        """The program runs; for one that does not call `step`."""
        with self._lock:
            if self._bar is not None:
                self._running = True
                self._bar.set_description_str(f"denoising, {self._bar.total} steps,")

    @contextlib.contextmanager
    def show(self, steps: int) -> Iterator[None]:
        """A bar of `steps` steps; until the first of them it counts the seconds of preparing and compiling."""
        started, done = time.perf_counter(), threading.Event()
        shape = "{desc}{bar} {n_fmt}/{total_fmt} {elapsed}" if self.counts else "{desc} {elapsed}"
        with tqdm(total=steps, unit="step", desc="compiling", bar_format=shape) as bar:
            self._bar, self._running = bar, False

            def tick() -> None:
                while not done.wait(0.5):
                    with self._lock:
                        if self._running:
                            bar.refresh()
                        elif bar.n == 0:
                            bar.set_description(f"compiling {time.perf_counter() - started:.0f} s", refresh=True)

            thread = threading.Thread(target=tick, daemon=True)
            thread.start()
            try:
                yield
            finally:
                done.set()
                thread.join()
                self._bar = None
