"""The converter on a synthetic checkpoint at true widths: memory, speed against `cp`, and SIGKILLs.

    python tools/benchmark_convert.py --workdir runs/convert

Writes a pipeline folder of about 8.6 GB (MMDiT of width 3072 with fewer blocks, Qwen2.5-VL of width 3584 with one layer
and the whole vocabulary, the whole VAE; random bytes), converts it, copies it with `cp`, all with a sync at the end and
caches dropped before where that is allowed; then converts it again in a process that is killed at random moments, and
compares every byte of both results. Needs four times the size on the disk.
"""

import argparse
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import tensorstore as ts

from refine_jax import prompts
from refine_jax.convert.diffusers_folder import MMDIT_TABLE, VAE_TABLE, model_config, vl_table
from refine_jax.convert.mapping import reference_shapes
from refine_jax.models.qwen_vl import QwenVLConfig, TextConfig, VisionConfig

SHARD = 4_000_000_000  # bytes; published shards have about 5 GB


def write_source(folder: Path, blocks: int) -> None:
    """A pipeline folder in the published layout; bfloat16, the VAE float32."""
    vl = QwenVLConfig(vision=VisionConfig(depth=1, fullatt_block_indexes=(0,)), text=TextConfig(num_hidden_layers=1))
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    configs = {
        "transformer": {"num_layers": blocks, "zero_cond_t": True},
        "vae": {"base_dim": 96, "z_dim": 16},
        "text_encoder": vl.to_dict(),
        "scheduler": scheduler,
    }
    abstract = model_config(configs).abstract()
    tables = {"transformer": MMDIT_TABLE, "vae": VAE_TABLE, "text_encoder": vl_table(vl, "flat")}
    names = {"transformer": "mmdit", "vae": "vae", "text_encoder": "vl"}
    classes = {
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    }
    for part, table in tables.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(configs[part]))
        kind = "F32" if part == "vae" else "BF16"
        write_shards(
            folder / part,
            "model" if part == "text_encoder" else "diffusion_pytorch_model",
            reference_shapes(table, abstract[names[part]]),
            kind,
        )
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    prompts.byte_tokenizer(folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "QwenImageEditPlusPipeline", **classes}))


def write_shards(folder: Path, stem: str, shapes: dict[str, tuple[int, ...]], kind: str) -> None:
    """Random bytes as safetensors, tensor by tensor."""
    size = {"F32": 4, "BF16": 2}[kind]
    shards: list[list[str]] = [[]]
    for name in sorted(shapes):
        if shards[-1] and sum(math.prod(shapes[n]) for n in [*shards[-1], name]) * size > SHARD:
            shards.append([])
        shards[-1].append(name)
    weight_map = {}
    for number, members in enumerate(shards, 1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else f"{stem}.safetensors"
        header, offset = {}, 0
        for name in members:
            length = math.prod(shapes[name]) * size
            header[name] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [offset, offset + length]}
            offset += length
            weight_map[name] = file
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in members:
                source = np.random.PCG64(abs(hash(name)) % 2**32)
                length = math.prod(shapes[name]) * size
                out.write(source.random_raw(-(-length // 8)).tobytes()[:length])
    if len(shards) > 1:
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def drop_caches() -> bool:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def timed(command: list[str]) -> float:
    """Seconds until a command and the sync after it are done."""
    dropped = drop_caches()
    started = time.perf_counter()
    subprocess.run(command, check=True)
    os.sync()
    seconds = time.perf_counter() - started
    print(f"{seconds:7.1f} s  {command[0]} (caches dropped: {dropped})", flush=True)
    return seconds


def leaves(folder: Path) -> dict[str, ts.TensorStore]:
    """Every leaf of a converted folder."""
    found = {}
    for network in sorted((folder / "weights").iterdir()):
        store = {"driver": "ocdbt", "base": f"file://{network.absolute()}/"}
        metadata = json.loads((network / "_METADATA").read_text())["tree_metadata"].values()
        for entry in metadata:
            name = ".".join(key["key"] for key in entry["key_metadata"])
            spec = {"driver": "zarr", "kvstore": {**store, "path": f"{name}/"}}
            found[f"{network.name}.{name}"] = ts.open(spec, read=True).result()
    return found


def same(first: Path, second: Path) -> bool:
    """Every byte of every leaf, a block of a stack at a time."""
    one, other = leaves(first), leaves(second)
    if one.keys() != other.keys():
        return False
    for name, array in one.items():
        pieces = range(array.shape[0]) if array.ndim == 3 else [slice(None)]
        for piece in pieces:
            a, b = (x[piece].read().result().view(np.uint8) for x in (array, other[name]))
            if not np.array_equal(a, b):
                print(f"{name}[{piece}] differs")
                return False
    return True


def expected(source: Path, result: Path) -> bool:
    """Some leaves against the files, read by the safetensors library."""
    from safetensors import safe_open

    array = leaves(result)["mmdit.blocks.img_mlp.up.kernel"]
    file = sorted((source / "transformer").glob("*.safetensors"))
    for path in file:
        with safe_open(path, framework="numpy") as tensors:
            for block in range(array.shape[0]):
                name = f"transformer_blocks.{block}.img_mlp.net.0.proj.weight"
                if name in tensors.keys():
                    theirs = tensors.get_tensor(name).astype(ml_dtypes.bfloat16).T
                    ours = array[block].read().result()
                    if not np.array_equal(ours.view(np.uint16), np.ascontiguousarray(theirs).view(np.uint16)):
                        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=1, help="timed rounds of cp, convert, cp")
    args = parser.parse_args()
    source, target, copy, again = (args.workdir / name for name in ("source", "model", "copy", "again"))
    if not (source / "model_index.json").exists():
        shutil.rmtree(source, ignore_errors=True)
        write_source(source, args.blocks)
    size = sum(p.stat().st_size for p in source.rglob("*") if p.is_file())
    print(f"{size / 1e9:.2f} GB", flush=True)

    command = [str(Path(sys.executable).parent / "refine-jax"), "convert", "--quiet", str(source)]
    for _ in range(args.repeats):
        for folder in (target, copy):
            shutil.rmtree(folder, ignore_errors=True)
        before = timed(["cp", "-r", str(source), str(copy)])
        shutil.rmtree(copy)
        ours = timed([*command, str(target)])
        after = timed(["cp", "-r", str(source), str(copy)])
        shutil.rmtree(copy)
        ratio = min(before, after) / ours  # against the faster copy: a slow one says something of the disk alone
        print(f"throughput: {ratio:.2f} of cp's, {size / ours / 1e6:.0f} MB/s", flush=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"peak memory: {peak / 2**30:.2f} GiB; leaves as in the files: {expected(source, target)}", flush=True)

    shutil.rmtree(again, ignore_errors=True)
    shutil.rmtree(again.with_name("again.partial"), ignore_errors=True)
    rng, killed = random.Random(0), 0
    while not again.exists():
        process = subprocess.Popen([*command, str(again)])
        if killed < args.kills:
            # Most of the time goes to starting and to the first part; a part takes a few seconds.
            time.sleep(rng.uniform(2, 2 + ours / 3))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                killed += 1
                process.wait()
                parts = len(list(again.with_name("again.partial").glob("weights/*/ocdbt.process_*[0-9]")))
                print(f"killed {killed}, {parts} parts done, loadable: {again.exists()}", flush=True)
                continue
        if process.wait():
            return 1
    equal = same(target, again)
    print(f"killed {killed} times; every byte equal: {equal}")
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
