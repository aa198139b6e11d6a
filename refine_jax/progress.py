"""Progress of a jitted sampler on a terminal: seconds while it compiles, steps while it denoises."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm


class Progress:
    """A bar whose `step` a compiled program may call; the same object serves every program of a `Refiner`.

    Programs compiled with `step` inside call it wherever they run, so it does nothing outside `show`.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._lock = threading.Lock()

    def step(self, finished: Any) -> None:
        """`finished` steps are done; callbacks may arrive in any order."""
        with self._lock:
            if self._bar is not None:
                self._bar.set_description("denoising", refresh=False)
                self._bar.n = max(self._bar.n, int(finished))
                self._bar.refresh()

    @contextlib.contextmanager
    def show(self, steps: int) -> Iterator[None]:
        """A bar of `steps` steps; until the first of them it counts the seconds of preparing and compiling."""
        started, done = time.perf_counter(), threading.Event()
        with tqdm(
            total=steps, unit="step", desc="compiling", bar_format="{desc}{bar} {n_fmt}/{total_fmt} {elapsed}"
        ) as bar:
            self._bar = bar

            def tick() -> None:
                while not done.wait(0.5):
                    with self._lock:
                        if bar.n == 0:
                            bar.set_description(f"compiling {time.perf_counter() - started:.0f} s", refresh=True)

            thread = threading.Thread(target=tick, daemon=True)
            thread.start()
            try:
                yield
            finally:
                done.set()
                thread.join()
                self._bar = None
