"""Rung 3 in full: every cell of the matrix against diffusers' pipeline and the released geometry, from one noise.

    python tools/parity.py --output runs/parity.json

{with, without reference} x {CFG off, CFG with a negative prompt} x {2509, 2511} x {focus, no focus} x {landscape,
portrait, square} x {no, one, two adapters}: 144 small pipelines with random weights, saved in the true layout,
converted, loaded. Prints the largest difference in 0…255; exits with 1 where one exceeds 1. Killed, it goes on.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import jax
import torch
from reference_pipeline import MATRIX, Pair
from tqdm import tqdm

from refine_jax.checkpoint import write_text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("parity.json"), help="one line a cell")
    args = parser.parse_args()
    torch.set_num_threads(1)
    key = lambda case: json.dumps(dataclasses.asdict(case))
    done = json.loads(args.output.read_text()) if args.output.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        pairs: dict[bool, Pair] = {}
        for case in tqdm(sorted(MATRIX, key=lambda c: (c.zero_cond_t, c.loras)), unit="cell"):
            if key(case) in done:
                continue
            if case.zero_cond_t not in pairs:
                path = Path(folder) / str(case.zero_cond_t)
                path.mkdir()
                pairs = {case.zero_cond_t: Pair(path, case.zero_cond_t)}
            started = time.perf_counter()
            ours, theirs, request = pairs[case.zero_cond_t].compare(case)
            changed = (theirs != request["image"])[request["mask_or_box"] > 0].mean()
            done[key(case)] = dict(
                worst=int(abs(ours - theirs).max()),
                differing=int((ours != theirs).sum()),
                changed=round(float(changed), 3),
                seconds=round(time.perf_counter() - started, 1),
            )
            write_text(args.output, json.dumps(done, indent=0))
            jax.clear_caches()
    worst = Counter(value["worst"] for value in done.values())
    print(f"{len(done)} cells; largest difference -> cells: {dict(sorted(worst.items()))}")
    print(f"least part of the region that was changed: {min(v['changed'] for v in done.values())}")
    return int(max(worst) > 1)


if __name__ == "__main__":
    sys.exit(main())
