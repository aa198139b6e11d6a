"""Kill a training with SIGKILL at random moments until it is done; compare it with one that was left alone.

    python tools/kill_resume.py --kills 20
    python tools/kill_resume.py --kills 20 --config configs/edit_debug.py --config.steps=60 --config.save_every=3

Moments are drawn anew for every start, from importing to saving; every third kill waits for a save to begin. Both runs
must end with the same bits: step, key, parameters, optimizer state, average; and the same scalars, so the same samples
in the same order. Prints one line a kill and a summary; exits with 1 where anything differs.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).resolve().parent.parent
TIMINGS = ("seconds", "data_wait", "images_per_second", "mfu")


def command(config: str, workdir: Path, more: list[str]) -> list[str]:
    train = [sys.executable, "-m", "refine_jax", "train", "--quiet"]
    return [*train, "--config", config, "--workdir", str(workdir), *more]


def state(workdir: Path) -> tuple[int, dict[str, np.ndarray], list[dict]]:
    """(newest step, flattened state, scalars without timings)."""
    with ocp.CheckpointManager(workdir.absolute() / "checkpoints") as manager:
        step = manager.latest_step()
        tree = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    leaves = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return step, leaves, [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def latest(workdir: Path) -> int:
    """The newest complete checkpoint's step; 0 where there is none."""
    steps = [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
    return max(steps, default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--config", default=str(ROOT / "configs" / "edit_debug.py"))
    parser.add_argument("--workdir", type=Path, help="keep the runs there (default: a folder that is removed)")
    args, more = parser.parse_known_args()
    draw = random.Random(args.seed)
    folder = args.workdir or Path(tempfile.mkdtemp(prefix="kill_resume_"))
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}

    started = time.perf_counter()
    subprocess.run(command(args.config, folder / "straight", more), env=environment, check=True, cwd=ROOT)
    print(f"left alone: {time.perf_counter() - started:.0f} s, {latest(folder / 'straight')} steps", flush=True)
    # Once more, with everything compiled: how long a start and a run take.
    started = time.perf_counter()
    subprocess.run(command(args.config, folder / "again", more), env=environment, check=True, cwd=ROOT)
    whole = time.perf_counter() - started
    same = _differences(state(folder / "straight"), state(folder / "again"))
    if same:
        print(f"two undisturbed runs differ: {same}")
        return 1

    killed, kills, saving = folder / "killed", 0, 0
    while kills < args.kills:
        process = subprocess.Popen(
            command(args.config, killed, more), env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        try:
            if kills % 3 == 2:
                _wait_for_save(process, killed / "checkpoints")
            else:
                process.wait(draw.uniform(0.1, 1.0) * whole)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            half = [p.name for p in (killed / "checkpoints").glob("*tmp*")]
            saving += bool(half)
            print(f"kill {kills}: newest checkpoint {latest(killed)}{', a save half done' if half else ''}", flush=True)
            continue
        if process.returncode:
            print(process.stderr.read()[-2000:])
            return 1
        if kills < args.kills:  # it finished too soon: the rest of the kills meet a run begun anew
            found = _differences(state(folder / "straight"), state(killed))
            print(f"finished after {kills} kills: {found or 'the same bits'}", flush=True)
            if found:
                return 1
            shutil.rmtree(killed)
    subprocess.run(command(args.config, killed, more), env=environment, check=True, cwd=ROOT)
    found = _differences(state(folder / "straight"), state(killed))
    print(f"{kills} kills ({saving} in the middle of a save): {found or 'the same bits, the same scalars'}")
    if args.workdir is None:
        shutil.rmtree(folder)
    return 1 if found else 0


def _wait_for_save(process: subprocess.Popen, checkpoints: Path) -> None:
    """Raises `TimeoutExpired` as soon as a checkpoint is half written."""
    before = set(checkpoints.glob("*tmp*"))  # left by an earlier kill
    while process.poll() is None:
        if set(checkpoints.glob("*tmp*")) - before:
            raise subprocess.TimeoutExpired(process.args, 0)
        time.sleep(0.0005)


def _differences(a: tuple, b: tuple) -> str:
    (step, leaves, lines), (other_step, other_leaves, other_lines) = a, b
    if step != other_step:
        return f"step {step} and {other_step}"
    if leaves.keys() != other_leaves.keys():
        return f"leaves {sorted(leaves.keys() ^ other_leaves.keys())[:5]}"
    off = [name for name in leaves if leaves[name].tobytes() != other_leaves[name].tobytes()]
    if off:
        return f"{len(off)} leaves differ, {off[0]} among them"
    return "" if lines == other_lines else "scalars differ"


if __name__ == "__main__":
    sys.exit(main())
