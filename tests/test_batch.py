"""Batch inference: every request once, the same bits as alone, whatever dies on the way."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
from jax.sharding import AbstractMesh
from PIL import Image

from refine_jax import batch, cli, executables, parallel, recipes
from refine_jax.errors import RefineError
from refine_jax.refine import Refiner
from refine_jax.regenerate import Regenerator


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Programs compiled once for all processes of this module."""
    folder = tmp_path_factory.mktemp("cache")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    yield folder
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a toy model that refines, and of one that regenerates."""
    root = tmp_path_factory.mktemp("models")
    toy.write_model(root / "refine")
    toy.write_model(root / "regenerate", seed=1)
    path = root / "regenerate" / "refine_jax.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "conditioning": "rvr"}))
    return root / "refine", root / "regenerate"


SIZES = ((40, 40), (90, 60), (50, 120))  # of the pictures, (width, height)


def write_requests(folder: Path, count: int, seed: int = 0) -> Path:
    """A manifest of requests of all tasks, and its pictures."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for k, (width, height) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"p{k}.png")
    Image.fromarray(rng.integers(0, 256, (33, 30, 3), np.uint8)).save(folder / "r.png")
    mask = np.zeros((60, 90), np.uint8)
    mask[20:40, 30:50] = 255
    Image.fromarray(mask).save(folder / "m.png")
    lines = []
    for number in range(count):
        kind, name = number % 6, number % 3
        line = dict(id=f"a{number}", prompt=f"word {number}", seed=number)
        if kind < 3:
            x, y = (int(v) for v in rng.integers(0, 10, 2))
            line |= dict(image=f"p{name}.png", box=[x, y, x + 24, y + 24])
            if number % 4 == 0:
                line["reference"] = "r.png"
        elif kind == 3:
            line |= dict(image="p1.png", regions=[{"mask": "m.png"}, {"box": [40, 30, 60, 50], "prompt": "other"}])
        elif kind == 4:
            line |= dict(image=f"p{number % 2}.png", rounds=1 + number // 6 % 2)
        lines.append(line)
    path = folder / "requests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(models, **changes):
    return recipes.batch(**{"model": str(models[0]), "regenerator": str(models[1]), "batch_size": 4, **changes})


def arguments(models, manifest: Path, output: Path) -> list[str]:
    """Of the command line, the same settings."""
    return [
        "batch", "--manifest", str(manifest), "--output-dir", str(output), "--model", str(models[0]),
        "--regenerator", str(models[1]), "--batch-size", "4", "--quiet",
    ]  # fmt: skip


def entries(output: Path) -> list[dict]:
    """All lines of all journals."""
    return [json.loads(line) for path in sorted(output.glob("journal/*")) for line in path.read_text().splitlines()]


def results(output: Path) -> dict[str, str]:
    """Digests of the result files; what a killed process was writing is none."""
    written = (path for path in output.glob("results/*") if path.suffix != ".partial")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in written}


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """A manifest and the output of an undisturbed run."""
    root = tmp_path_factory.mktemp("batch")
    manifest = write_requests(root / "in", 30)
    summary = batch.run(settings(models), manifest, root / "out", progress=False)
    return manifest, root / "out", summary


def test_every_result_has_the_bits_of_its_request_alone(models, finished):
    manifest, output, summary = finished
    assert (summary.done, summary.refused, summary.failed) == (30, 0, 0)
    assert summary.rows == 30 + 5 and summary.padding < summary.rows
    refiner = Refiner.load(models[0], batch_size=4, aspects=settings(models).aspects)
    regenerator = Regenerator.load(models[1], batch_size=4)
    # The command runs in one batch what a call alone runs in another, so this compares shapes, neighbours and places.
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for line in lines[::2] + lines[3::12]:
        given = {
            name: manifest.parent / value if name in ("image", "reference") else value for name, value in line.items()
        }
        name = given.pop("id")
        if "regions" in given:
            regions = given.pop("regions")
            given["mask_or_box"] = [manifest.parent / r["mask"] if "mask" in r else tuple(r["box"]) for r in regions]
            given["prompt"] = [r.get("prompt", given["prompt"]) for r in regions]
            alone = refiner.refine(**given)
        elif "box" in given:
            alone = refiner.refine(mask_or_box=tuple(given.pop("box")), **given)
        else:
            alone = (regenerator.regenerate if "image" in given else regenerator.generate)(**given)
        with Image.open(output / "results" / f"{name}.png") as result:
            np.testing.assert_array_equal(np.asarray(alone), np.asarray(result), err_msg=name)


def test_the_report_is_in_the_order_of_the_manifest(finished):
    manifest, output, summary = finished
    reported = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in reported] == [f"a{k}" for k in range(30)]
    assert {entry["status"] for entry in reported} == {"done"} and all((output / e["file"]).is_file() for e in reported)
    said = json.loads((output / "summary.json").read_text())
    assert said["done"] == 30 and said["run_programs"] == summary.programs
    buckets = {
        (line.get("box") is None, line.get("regions") is None, line.get("reference"))
        for line in map(json.loads, manifest.read_text().splitlines())
    }
    assert 0 < summary.programs <= 12 >= len(buckets)
    assert 0 < summary.device_seconds <= summary.seconds + 1e-6 <= summary.total_seconds


def test_nothing_is_done_twice(models, finished):
    manifest, output, _ = finished
    before, times = results(output), {path: path.stat().st_mtime_ns for path in output.glob("results/*")}
    again = batch.run(settings(models), manifest, output, progress=False)
    assert (again.done, again.skipped, again.batches) == (0, 30, 0)
    assert times == {path: path.stat().st_mtime_ns for path in output.glob("results/*")} and results(output) == before
    lost = output / "results" / "a7.png"
    lost.unlink()
    assert batch.run(settings(models), manifest, output, progress=False).done == 1
    assert results(output) == before


def test_one_run_at_a_time(models, finished):
    manifest, output, _ = finished
    with open(output / ".lock", "w") as claim:
        fcntl.flock(claim, fcntl.LOCK_SH)  # as any process of a run holds it
        with pytest.raises(RefineError, match="another run is writing there"):
            batch.run(settings(models), manifest, output, progress=False)
    assert batch.run(settings(models), manifest, output, progress=False).skipped == 30


def test_other_settings_do_not_mix(models, finished):
    manifest, output, _ = finished
    config = settings(models)
    config.batch_size = 2
    with pytest.raises(RefineError, match="batch_size 4, now 2"):
        batch.run(config, manifest, output, progress=False)
    with pytest.raises(RefineError, match="holds other files"):
        batch.run(config, manifest, manifest.parent, progress=False)
    for changes, words in (
        (dict(mesh=dict(fsdp=-1)), "mesh.fsdp -1"),
        (dict(mesh=dict(fsdp=64)), "takes 64 devices a model"),
        (dict(model="nowhere"), "no such model"),
        (dict(regenerator="nowhere"), "no such model"),
        (dict(quantize="int3"), "int3"),
    ):
        with pytest.raises(RefineError, match=words):
            batch.run(settings(models, **changes), manifest, output.parent / "never", progress=False)
    assert not (output.parent / "never").exists()


def test_weights_and_adapters_are_told_apart_by_what_they_hold(models, tmp_path):
    def names(**changes) -> dict:
        return batch.Doors(settings(models, **changes), executables.Store()).names()

    file = tmp_path / "a.safetensors"
    lora = dict(model=(str(file),))
    found = []
    for content in (b"one" + bytes(3 << 20), b"two" + bytes(3 << 20), bytes((3 << 20) + 3)):
        file.write_bytes(content)
        found.append(str(names(lora=lora)))
    assert len({*found, str(names()), str(names(lora=dict(model=((str(file), 0.5),))))}) == 5
    assert names(regenerator="tiny")["regenerator"] != names(model="tiny")["model"]


def test_adapters_are_named_on_the_command_line(models, finished, tmp_path, capsys):
    manifest, *_ = finished
    adapter = ["--lora", f"{tmp_path}/none.safetensors:0.5", "--merge-lora"]
    assert cli.main([*arguments(models, manifest, tmp_path / "out"), *adapter]) == 2
    assert "none.safetensors: no such file" in capsys.readouterr().err


def test_rows_that_devices_cannot_share_out_are_refused(models, monkeypatch):
    mesh = AbstractMesh((1, 4, 2, 1, 1), parallel.MESH_AXES)
    monkeypatch.setattr(batch, "_group", lambda axes: (mesh, (0, 1, True)))
    with pytest.raises(RefineError, match="batch_size 4: .* give a multiple of 8"):
        batch.Doors(settings(models, batch_size=4), executables.Store())
    assert batch.Doors(settings(models, batch_size=8), executables.Store()).mesh is mesh


AGREEING = """
import sys
from refine_jax import batch, distributed, parallel
from refine_jax.errors import RefineError
me = distributed.start().process
agree = batch._agreement(parallel.make_mesh({"fsdp": 2}))
said = [agree(False, "a batch"), agree(me == 1, "a batch"), agree(me == 0, None if me else "more"), agree(False, None)]
for mine in (f"request {me}", None if me else "a last one"):
    try:
        said.append(agree(False, mine))
    except RefineError as error:
        said.append("different requests" in str(error))
print(said)
"""


def test_processes_of_one_model_compare_what_they_are_about_to_do(cache):
    """Nothing is launched where one process has read what the other has not, unless one of them stops anyway."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    told = lambda number: dict(
        JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(number), JAX_PLATFORMS="cpu"
    )
    command = [sys.executable, "-c", AGREEING]
    two = [
        subprocess.Popen(command, env=environment(cache) | told(number), stdout=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    for process in two:
        said = process.communicate(timeout=120)[0]
        assert said.splitlines()[-1] == "[False, True, True, False, True, True]", said


def environment(cache: Path) -> dict[str, str]:
    return dict(
        os.environ, JAX_COMPILATION_CACHE_DIR=str(cache), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.1",
        PYTHONUNBUFFERED="1",
    )  # fmt: skip


def start(command: list[str], cache: Path, **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "refine_jax", *command],
        env=environment(cache) | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(output: Path, count: int, process: subprocess.Popen) -> None:
    """Until so many results stand, or the process is at its end."""
    while process.poll() is None and len(list(output.glob("results/*.png"))) < count:
        time.sleep(0.02)


def test_killed_and_told_to_stop_it_goes_on(models, finished, cache, tmp_path):
    manifest, output, _ = finished
    command = arguments(models, manifest, tmp_path / "out")
    process = start(command, cache)
    wait_for(tmp_path / "out", 9, process)
    process.kill()
    process.wait()
    process = start(command, cache)
    wait_for(tmp_path / "out", 15, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode in (75, 0), said
    process = start(command, cache)
    said, _ = process.communicate()
    assert process.returncode == 0 and "0 refused, 0 failed" in said, said
    assert results(tmp_path / "out") == results(output)
    assert not list((tmp_path / "out").rglob("*.partial"))
    done = [entry["id"] for entry in entries(tmp_path / "out")]
    assert sorted(set(done)) == sorted(f"a{k}" for k in range(30))
    assert len(done) - len(set(done)) == 0, "a journal line is written once the result stands"


def test_keys_that_a_batch_does_not_have(finished, tmp_path, capsys):
    manifest, _, _ = finished
    file = tmp_path / "mine.py"
    text = "from refine_jax import recipes\ndef get_config():\n    c = recipes.batch()\n    {}\n    return c\n"
    cases = {"c.quantise = 'int8'": "no key 'quantise'; did you mean quantize?", "del c.mesh": "mesh: missing"}
    for line, said in cases.items():
        file.write_text(text.format(line))
        words = ["batch", "--manifest", str(manifest), "--output-dir", str(tmp_path / "out"), "--config", str(file)]
        assert cli.main(words) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_bad_requests_are_recorded_and_hinder_nobody(models, finished, tmp_path, capsys):
    manifest, output, _ = finished
    folder = manifest.parent
    (folder / "broken.png").write_bytes((folder / "p0.png").read_bytes()[:200])
    good = manifest.read_text().splitlines()[:2]
    bad = [
        dict(id="broken", image="broken.png", box=[0, 0, 20, 20], prompt="x"),
        dict(id="outside", image="p0.png", box=[0, 0, 200, 20], prompt="x"),
        dict(id="escape", image="../../etc/passwd", box=[0, 0, 20, 20], prompt="x"),
        dict(id="endless", image="p0.png", box=[0, 0, 20, 20], prompt="x" * 15000),
        dict(id="unknown", image="p0.png", box=[0, 0, 20, 20], prompt="x", sed=3),
    ]
    path = folder / "hostile.jsonl"
    path.write_text("\n".join([*map(json.dumps, bad), "{", *good]))
    assert cli.main(arguments(models, path, tmp_path / "out")) == 3
    assert "2 done, 6 refused, 0 failed" in capsys.readouterr().out
    found = {entry["id"]: entry for entry in entries(tmp_path / "out")}
    assert {name for name, entry in found.items() if entry["status"] == "done"} == {"a0", "a1"}
    for name, word in dict(broken="damaged", outside="outside", endless="too long", unknown="sed").items():
        assert (
            found[name]["status"] == "refused" and word in found[name]["reason"] and "\n" not in found[name]["reason"]
        )
    assert results(tmp_path / "out") == {name: results(output)[name] for name in ("a0.png", "a1.png")}
    assert cli.main(["batch", "--check", str(path)]) == 3
    assert "8 requests, 4 refused" in capsys.readouterr().out, "what pixels and tokens tell is not seen by headers"


def test_executables_written_ahead_are_used(models, finished, tmp_path, caplog, capsys):
    manifest, output, summary = finished
    model = shutil.copytree(models[0], tmp_path / "model")
    few = manifest.parent / "few.jsonl"
    few.write_text("\n".join(manifest.read_text().splitlines()[:1] + manifest.read_text().splitlines()[3:9]))
    command = arguments((model, models[1]), few, tmp_path / "out")
    assert cli.main(["compile", *command[1:3], *command[5:]]) == 0
    made = model / executables.BESIDE
    said = capsys.readouterr().out
    written, programs = (int(number) for number in re.findall(r"\d+ (?=executables to|programs)", said))
    assert 2 < programs < written == len(list(made.iterdir())), "beside the model"

    warm = executables.Store(made)
    summary = batch.run(settings((model, models[1])), few, tmp_path / "out", store=warm, progress=False)
    assert summary.done == 7 and warm.counts.compiled == 0 and warm.counts.loaded == written
    assert results(tmp_path / "out").items() <= results(output).items()

    kept = shutil.move(made, tmp_path / "kept")
    assert cli.main(command) == 0, "the model is the same one without them"
    for path in kept.iterdir():
        path.write_bytes(path.read_bytes()[:-50])
    worn = executables.Store(kept)
    summary = batch.run(settings(models), few, tmp_path / "again", store=worn, progress=False)
    assert summary.done == 7 and worn.counts.refused == written and "damaged" in caplog.text
    assert results(tmp_path / "again") == results(tmp_path / "out")


def test_compile_wants_to_know_where(finished, capsys):
    manifest, *_ = finished
    assert cli.main(["compile", "--manifest", str(manifest)]) == 2
    assert "give --executables" in capsys.readouterr().err


def test_processes_share_a_manifest_and_a_lost_one_is_made_up_for(models, finished, cache, tmp_path):
    manifest, output, _ = finished
    command = arguments(models, manifest, tmp_path / "out")

    def run(kill: bool) -> list[int]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        group = dict(JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES="2")
        processes = [start(command, cache, **group, JAX_PROCESS_ID=str(k)) for k in range(2)]
        if kill:
            wait_for(tmp_path / "out", 4, processes[0])
            processes[1].kill()
        return [(process.communicate(), process.returncode)[1] for process in processes]

    run(kill=True)
    kept = results(tmp_path / "out")
    assert len(kept) >= 4 and kept.items() <= results(output).items()
    assert run(kill=False) == [0, 0]
    assert results(tmp_path / "out") == results(output)
    reported = [json.loads(line)["status"] for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert reported == ["done"] * 30
