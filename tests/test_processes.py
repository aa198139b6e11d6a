"""Real processes on this machine, joined by jax.distributed: they train what one does, stop and continue together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import toy
from safetensors.numpy import load_file

from refine_jax import loading
from refine_jax.convert.lora import write_adapter
from refine_jax.models.layers import init_lora
from refine_jax.objective import LORA_FILE
from refine_jax.train import load_config, train

HERE = Path(__file__).parent
CONFIG = f"""
import json, os, sys
sys.path.insert(0, {str(HERE)!r})
import toy

def get_config():
    config = toy.vae_config()
    config.batch_size, config.steps, config.save_every, config.seed = 4, 6, 3, 3
    config.mesh = json.loads(os.environ.get("MESH", '{{"data": 1, "fsdp": -1}}'))
    config.vae.update(dim_mult=(1, 2), temperal_downsample=(False,))
    return config
"""

ADAPTED = f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import toy

def get_config():
    config = toy.refine_config("")
    config.init_from, config.model, config.train_encoder, config.ema_decay = os.environ["BASE"], {{}}, False, 0.0
    config.batch_size, config.steps, config.save_every, config.log_every = 2, 1, 1, 1
    config.pictures = dict(every=1, count=1)
    config.mesh = dict(fsdp=-1)
    config.optimizer.update(dict(learning_rate=1e-5, warmup=0, decay=0.0))
    config.lora = dict(rank=2, alpha=6.0, targets="blocks/attn/to_q")
    return config
"""


def launch(folder: Path, processes: int, *more: str, config: str = CONFIG, **environment: str) -> subprocess.Popen:
    (folder / "config.py").write_text(config)
    command = ["bash", str(HERE.parent / "launch" / "local.sh"), "--processes", str(processes)]
    command += ["--config", str(folder / "config.py"), "--workdir", str(folder / f"run-{processes}"), *more]
    environment = (
        os.environ
        | environment
        | {
            "JAX_PLATFORMS": "cpu",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=1",
        }
    )
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def scalars(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_four_processes_that_share_samples_train_what_one_does(tmp_path):
    """Two along `context` hold the same rows, and each makes its own copy of them."""
    mesh = json.dumps(dict(data=1, fsdp=2, context=2))
    more = ["--config.log_every=1", "--config.steps=3"]
    four = launch(tmp_path, 4, *more, MESH=mesh)
    said = four.communicate(timeout=400)[0]
    assert four.returncode == 0, said[-3000:]
    config = load_config(tmp_path / "config.py", {"log_every": "1", "steps": "3"})
    train(config, tmp_path / "run-1", progress=False)
    one, shared = scalars(tmp_path / "run-1"), scalars(tmp_path / "run-4")
    assert [line["step"] for line in one] == [line["step"] for line in shared] == [1, 2, 3]
    for a, b in zip(one, shared):
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5)


def test_two_processes_go_on_with_an_adapter(tmp_path):
    """What every process reads from files goes to the devices of all, and so do the pictures that a run shows."""
    model = toy.write_model(tmp_path / "base")
    tree = init_lora(jax.random.key(0), model.abstract(("mmdit",))["mmdit"], "blocks/attn/to_q", 2)
    tree = jax.tree.map(lambda x: np.asarray(x) + 0.1, tree)
    start = tmp_path / "start.safetensors"
    write_adapter(start, {"mmdit": tree}, metadata=loading.adapter_metadata(model))
    more = [f"--config.lora.init_from={start}"]
    two = launch(tmp_path, 2, *more, config=ADAPTED, BASE=str(tmp_path / "base"))
    said = two.communicate(timeout=400)[0]
    assert two.returncode == 0, said[-3000:]
    run = tmp_path / "run-2"
    assert (run / "pictures" / "00000001.png").is_file()
    before, after = load_file(start), load_file(run / "model" / LORA_FILE)
    assert before.keys() == after.keys()
    assert 0 < max(np.abs(after[name] - before[name]).max() for name in before) < 1e-3


def test_two_processes_train_what_one_does(tmp_path, capsys):
    # Two, told to stop in the middle: both save the same step; then they finish.
    run = tmp_path / "run-2"
    two = launch(tmp_path, 2, "--config.log_every=1")
    deadline = time.monotonic() + 300
    while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").read_text():
        assert two.poll() is None and time.monotonic() < deadline, two.communicate()[0][-3000:]
        time.sleep(0.05)
    two.send_signal(signal.SIGTERM)
    said = two.communicate(timeout=300)[0]
    assert two.returncode == 75, said[-3000:]
    stopped = scalars(run)[-1]["step"]
    assert f"saved at step {stopped} of 6" in said and 1 <= stopped < 6
    two = launch(tmp_path, 2)
    said = two.communicate(timeout=300)[0]
    assert two.returncode == 0, said[-3000:]

    config = load_config(tmp_path / "config.py")
    train(config, tmp_path / "run-1", progress=False)
    one, both = scalars(tmp_path / "run-1"), scalars(run)
    assert [line["step"] for line in one] == [line["step"] for line in both] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(one, both):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    one, both = (load_file(folder / "model" / "weights.safetensors") for folder in (tmp_path / "run-1", run))
    assert one.keys() == both.keys()
    # Adam's first steps blow up the rounding of gradients that are zero (a key's bias): not every element can agree.
    close = np.concatenate([np.isclose(one[name], both[name], rtol=1e-3, atol=1e-4).reshape(-1) for name in one])
    assert close.mean() > 0.97

    # One process continues what two saved.
    with config.unlocked():
        config.steps = 7
    capsys.readouterr()
    train(config, run, progress=False)
    assert "saved by 2: the order of samples is unchanged" in capsys.readouterr().err
    assert scalars(run)[-1]["step"] == 7
