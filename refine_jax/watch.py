"""Watching a run: the progress line, scalars, step times, pictures of fixed samples, profiles on request."""

import contextlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import ml_collections
import numpy as np
from PIL import Image
from tqdm import tqdm

from refine_jax import checkpoint, flops, focus, images, parallel
from refine_jax.errors import RefineError

PROFILED_STEPS = 5


class Watch:
    """What a run tells while it goes; all of it by the first process alone, but for the pictures' computation.

    Under the work folder: `metrics.jsonl`, a line of mean scalars a log; `validation.jsonl`, a line of the loss on
    held-out batches; `tensorboard/`, the same and histograms of the steps' seconds (where the package tensorboardX is
    installed); `pictures/STEP.png`, rows of input, result, target of the objective's samples; `profile/`, a trace of
    the steps `config.profile` = (first, last), or of the next five after a signal SIGUSR1.
    """

    def __init__(
        self,
        workdir: Path,
        config: ml_collections.ConfigDict,
        program: Any,
        objective: Any,
        batches: Any,
        first: int,
        elapsed: float,
        progress: bool,
    ):
        self._workdir, self._config, self._program, self._objective = workdir, config, program, objective
        self._batches = batches
        self._before, self._started = elapsed, time.perf_counter()
        self._recent: list[dict[str, Any]] = []
        self._seconds: list[float] = []
        self._waited, self._logged, self._moment = 0.0, (first, time.perf_counter()), None
        self._aside = 0.0  # seconds since the last log that were no training
        self._speaks = jax.process_index() == 0
        self._stack = contextlib.ExitStack()
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.state.params))
        self._bar = self._stack.enter_context(
            tqdm(
                total=config.steps,
                initial=first,
                unit="step",
                disable=not (progress and self._speaks),
                desc=f"{count / 1e6:.2f}M",
                smoothing=0.05,
            )
        )
        # What the step needs and what the chips could do; nothing is counted where the chip is not known.
        self._chip, self._flops, self._needed = flops.chip(program.mesh.devices.flat[0]), {}, 0.0
        self._samples: list[dict[str, Any]] | None = None
        self._board = None
        if self._speaks:
            self._scalars = self._stack.enter_context(_history(workdir / "metrics.jsonl", first))
            self._board = _board(workdir / "tensorboard", first, self._stack)
            if (config.get("pictures") or {}).get("every") and objective.sampler is None:
                tqdm.write("pictures: none are made, since this objective has no sampler", file=sys.stderr)
        self._held_out, self._measured = None, None
        if (config.get("validation") or {}).get("every"):
            self._held_out = self._stack.enter_context(contextlib.closing(objective.held_out()))
            self._from = self._held_out.get_state()
            if self._speaks:  # that of the step resumed from is told again: it may have ended before it was told
                self._measured = self._stack.enter_context(_history(workdir / "validation.jsonl", first - 1))
        self._profile = tuple(config.get("profile", ())) or None
        self._tracing = False
        self._asked = threading.Event()
        if threading.current_thread() is threading.main_thread():
            old = signal.signal(signal.SIGUSR1, lambda *_: self._asked.set())
            self._stack.callback(signal.signal, signal.SIGUSR1, old)

    def elapsed(self) -> float:
        """Seconds of training, those before a resumption included."""
        return self._before + time.perf_counter() - self._started

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, data are fetched. It counts as waiting unless the device still had a step to do when they came."""
        asked = time.perf_counter()
        if not self._recent and self._moment is not None:  # after a log, and what comes with it
            self._moment = asked
        yield
        if not self._recent or all(x.is_ready() for x in jax.tree.leaves(self._recent[-1])):
            self._waited += time.perf_counter() - asked

    def step(self, done: int, batch: Any, metrics: dict[str, Any]) -> None:
        """The step `done` of `batch` was handed over; waits for the one before it, so that the device never idles."""
        if self._recent:
            jax.block_until_ready(self._recent[-1])
            now = time.perf_counter()
            if self._moment is not None:
                self._seconds.append(now - self._moment)
            self._moment = now
        self._recent.append(metrics)
        if self._chip is not None:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
            bucket = str(jax.tree.leaves(shapes))
            if bucket not in self._flops:
                self._flops[bucket] = flops.of_step(self._config, self._objective.model, shapes).total
            self._needed += self._flops[bucket]
        self._bar.update()
        self._trace(done)

    def log(self, done: int) -> None:
        """Write the means since the last log. Raises `FloatingPointError` naming a tensor that is not finite."""
        values = jax.device_get(self._recent)
        now, (before, moment) = time.perf_counter(), self._logged
        if self._moment is not None:
            self._seconds.append(now - self._moment)
        self._moment = now
        for offset, value in enumerate(values):
            if (bad := int(value["bad"])) >= 0:
                name = self._program.tensors[bad]
                raise FloatingPointError(f"{name} is not finite at step {done - len(values) + 1 + offset}")
        means = {k: float(np.mean([v[k] for v in values if k in v])) for k in values[-1] if k != "bad"}
        spent = now - moment - self._aside
        rate = (done - before) / spent
        means |= {"step": done, "seconds": self.elapsed(), "data_wait": self._waited / spent}
        means["learning_rate"] = self._program.rate(done)
        means["images_per_second"] = rate * self._config.batch_size
        if self._chip is not None:
            means["mfu"] = self._needed / spent / (self._chip.flops * self._program.mesh.size)
        if corrupt := getattr(self._batches, "corrupt", 0):
            means["corrupt_records"] = corrupt if isinstance(corrupt, int) else len(corrupt)
        if self._speaks:
            _write_line(self._scalars, means)
            shown = ("loss", "grad_norm", "images_per_second", "mfu", "data_wait", "corrupt_records")
            names = {"images_per_second": "images/s", "data_wait": "wait", "corrupt_records": "corrupt"}
            self._bar.set_postfix({names.get(k, k): f"{means[k]:.3g}" for k in shown if k in means}, refresh=False)
        if self._board is not None:
            for name, value in means.items():
                if name not in ("step", "seconds"):
                    self._board.add_scalar(name, value, done)
            if self._seconds:
                self._board.add_histogram("step_seconds", np.array(self._seconds), done)
        self._recent, self._seconds, self._waited, self._needed, self._aside = [], [], 0.0, 0.0, 0.0
        self._logged = (done, time.perf_counter())

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Inside is what counts as no training."""
        jax.block_until_ready(self._recent)
        began = time.perf_counter()
        yield
        self._aside += time.perf_counter() - began
        self._moment = None  # this was no step

    def validate(self, done: int, params: Any, frozen: Any) -> None:
        """Every `config.validation.every` steps, and before the first of a start: the loss on the objective's first
        `config.validation.batches` held-out batches, each time with the same draws of noise and time."""
        if self._held_out is None or done % self._config.validation.every:
            return
        with self._beside():
            self._held_out.set_state(self._from)
            found = []
            for draw in range(self._config.validation.batches):
                batch = parallel.shard_batch(next(self._held_out), self._program.mesh, self._config.batch_size)
                found.append(self._program.measure(params, frozen, batch, np.uint32(draw)))
            found = jax.device_get(found)
            means = {name: float(np.mean([value[name] for value in found])) for name in found[0]}
        if self._speaks:
            _write_line(self._measured, {"step": done, **means})
            tqdm.write(f"held out, step {done}: loss {means['loss']:.4g}", file=sys.stderr)
        if self._board is not None:
            for name, value in means.items():
                self._board.add_scalar(f"held_out/{name}", value, done)

    def pictures(self, done: int, params: Any, frozen: Any) -> None:
        """Every `config.pictures.every` steps: the objective's samples, made with the present weights."""
        wanted = self._config.get("pictures")
        if not wanted or not wanted.every or self._objective.sampler is None or done % wanted.every:
            return
        with self._beside():
            if self._samples is None:
                self._samples = self._objective.samples(wanted.count)
            make = self._objective.sampler(params, frozen, self._program.mesh, self._program.rules)
            results = make([{k: v for k, v in sample.items() if k != "target"} for sample in self._samples])
        if self._speaks:
            grid = _grid([_row(sample, result) for sample, result in zip(self._samples, results)])
            path = self._workdir / "pictures" / f"{done:08d}.png"
            path.parent.mkdir(exist_ok=True)
            aside = path.with_suffix(".partial")
            grid.save(aside, format="PNG")
            aside.replace(path)
            if self._board is not None:
                self._board.add_image("samples", np.asarray(grid), done, dataformats="HWC")

    def close(self) -> None:
        """End the bar, the files and a trace that still runs."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
        self._stack.close()

    def _trace(self, done: int) -> None:
        if self._asked.is_set() and not self._tracing:
            self._asked.clear()
            self._profile = (done + 1, done + PROFILED_STEPS)
        if self._profile is None:
            return
        first, last = self._profile
        if done == first - 1 and not self._tracing:
            jax.profiler.start_trace(str(self._workdir / "profile"))
            self._tracing = True
        elif done == last and self._tracing:
            jax.block_until_ready(self._recent[-1])
            jax.profiler.stop_trace()
            self._tracing, self._profile = False, None
            tqdm.write(f"steps {first} to {last} profiled: {self._workdir / 'profile'}", file=sys.stderr)


def _board(folder: Path, first: int, stack: contextlib.ExitStack) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        tqdm.write('no TensorBoard scalars without tensorboardX: pip install -e ".[watch]"', file=sys.stderr)
        return None
    # A resumed run writes over what the killed one wrote after its last checkpoint.
    return stack.enter_context(SummaryWriter(str(folder), purge_step=first + 1))


def _history(path: Path, last: int) -> TextIO:
    """A file of lines to append to, with those up to step `last`."""
    checkpoint.write_text(path, "".join(line + "\n" for line in _lines(path, last)))
    return open(path, "a", encoding="utf-8")


def _write_line(file: TextIO, values: Mapping[str, float]) -> None:
    short = lambda v: v if isinstance(v, int) else float(f"{v:.7g}") if math.isfinite(v) else None
    rounded = {k: short(v) for k, v in values.items()}
    file.write(json.dumps(rounded) + "\n")
    file.flush()


def _lines(history: Path, last: int) -> list[str]:
    """The lines of scalars up to step `last`: what a killed run did after its last checkpoint is done again."""
    lines = []
    for line in history.read_text(encoding="utf-8").splitlines() if last and history.is_file() else []:
        try:
            if json.loads(line)["step"] <= last:
                lines.append(line)
        except (ValueError, KeyError, TypeError):  # cut off when the run was killed
            continue
    return lines


def _row(sample: Mapping[str, Any], result: Image.Image) -> list[np.ndarray]:
    """Input where there is one, result, target; around the region where there is one."""
    if "mask_or_box" not in sample:
        pictures = (sample.get("image"), result, sample["target"])
        return [np.array(picture)[..., :3] for picture in pictures if picture is not None]
    box, _ = focus.mask_box(images.region_masks(sample["mask_or_box"], result.size)[0])
    x1, y1, x2, y2 = focus.focus_box(box, *result.size) if sample.get("focus", True) else (0, 0, *result.size)
    return [np.array(picture)[y1:y2, x1:x2, :3].copy() for picture in (sample["image"], result, sample["target"])]


def _grid(rows: list[list[np.ndarray]], height: int = 128) -> Image.Image:
    """Pictures of a row side by side at one height, rows one below the other."""
    if not rows:
        raise RefineError("pictures.count: give at least 1")
    strips = []
    for row in rows:
        tiles = [Image.fromarray(tile) for tile in row]
        tiles = [tile.resize((max(1, round(tile.width * height / tile.height)), height)) for tile in tiles]
        strip = Image.new("RGB", (sum(tile.width + 4 for tile in tiles), height + 4), "white")
        x = 0
        for tile in tiles:
            strip.paste(tile, (x, 0))
            x += tile.width + 4
        strips.append(strip)
    grid = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)), "white")
    y = 0
    for strip in strips:
        grid.paste(strip, (0, y))
        y += strip.height
    return grid
