"""A pipeline folder in the true layout through the converter and through every door; damaged folders."""

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
import toy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from refine_jax import checkpoint, flow, loading, memory, objectives, parallel
from refine_jax.cli import main
from refine_jax.convert import convert as converter
from refine_jax.convert import export, lora, reader, writer
from refine_jax.convert.convert import convert
from refine_jax.convert.diffusers_folder import from_tensors, model_config
from refine_jax.errors import RefineError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(pipeline folder, model, its parameters as the mapping makes them from memory)."""
    import torch
    from reference_pipeline import parts_of, save_pipeline, tiny_pipeline  # not in the processes that tests start here

    folder = tmp_path_factory.mktemp("pipeline")
    pipe = tiny_pipeline(folder / "plain", 30)
    # As published: the MMDiT and the encoder in bfloat16, the VAE in float32.
    pipe.transformer.to(torch.bfloat16), pipe.text_encoder.to(torch.bfloat16)
    save_pipeline(pipe, folder / "source")
    pipe.transformer.float(), pipe.text_encoder.float()
    configs, tensors = parts_of(pipe)
    model = model_config(configs)
    return folder / "source", model, from_tensors(model, tensors)


@pytest.fixture(scope="module")
def converted(made, tmp_path_factory):
    return convert(made[0], tmp_path_factory.mktemp("converted") / "model")


def same(a, b) -> bool:
    check = lambda x, y: x.shape == y.shape and bool((np.asarray(x, np.float32) == np.asarray(y, np.float32)).all())
    return jax.tree.all(jax.tree.map(check, a, b))


# ------------------------------------------------------------------------------------------------------------- the way


def test_every_parameter_arrives_through_every_door(made, converted):
    source, model, expected = made
    assert same(checkpoint.load_weights(converted, model.abstract()), expected)
    for door in (source, converted):
        for dtype in ("float32", "bfloat16"):
            loaded = loading.load(door, dtype=dtype)
            assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.variables)} == {dtype}
            assert same(loaded.variables, jax.tree.map(partial(np.asarray, dtype=dtype), expected))
            assert loaded.config.mmdit.dtype == loaded.config.vl.param_dtype == dtype
            assert loaded.tokenizer.get_vocab_size() == model.vl.text.vocab_size


@pytest.mark.parametrize("stored, dtype", [("bfloat16", "bfloat16"), ("float32", "float32"), ("float16", "float32")])
def test_the_dtype_is_the_stored_one_by_default(made, tmp_path, stored, dtype):
    _, model, expected = made
    checkpoint.save_model(tmp_path, model.to_manifest(), expected, dtype=stored)
    (tmp_path / "tokenizer").symlink_to(made[0] / "tokenizer")
    loaded = loading.load(tmp_path)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.variables)} == {dtype}
    assert loaded.config.mmdit.dtype == loaded.config.vae.param_dtype == dtype


def test_a_folder_is_loaded_as_most_of_its_weights_are_stored(made, converted):
    source, model, _ = made
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in model.abstract().items()}
    dtype = "bfloat16" if 2 * (sizes["mmdit"] + sizes["vl"]) > 4 * sizes["vae"] else "float32"
    for door in (source, converted):
        assert loading.open_model(door).stored_dtype() == loading.load(door).config.mmdit.dtype == dtype


def test_weights_that_cannot_fit_are_refused_unread(made, converted, monkeypatch):
    monkeypatch.setattr(memory, "limit", lambda device: 1000)
    for door in (made[0], converted):
        with pytest.raises(RefineError, match=r"take \d+\.\d GiB on this machine, which has 0\.0 GiB") as error:
            loading.load(door, dtype="float32")
        assert "give dtype bfloat16 or quantize int8 or a mesh" in str(error.value)
        with pytest.raises(RefineError, match="; give a mesh of more devices"):
            loading.load(door, dtype="bfloat16", quantize="int8")
    monkeypatch.setattr(memory, "limit", lambda device: None)  # nobody knows
    assert loading.load(converted).variables


def test_limits_are_what_devices_say():
    device = lambda platform, stats: SimpleNamespace(platform=platform, memory_stats=lambda: stats)
    assert memory.limit(device("gpu", {"bytes_limit": 5, "bytes_in_use": 1})) == 5
    assert memory.limit(device("tpu", None)) is None and memory.limit(device("gpu", {"bytes_limit": 0})) is None
    assert 2**28 < memory.limit(jax.devices()[0]) < 2**50


def test_orbax_alone_reads_what_was_written(made, converted):
    _, model, expected = made
    with ocp.StandardCheckpointer() as checkpointer:
        for network in ("mmdit", "vae", "vl"):
            path = (converted / "weights" / network).absolute()
            assert same(checkpointer.restore(path, model.abstract()[network]), expected[network])
            stored = checkpointer.metadata(path).item_metadata.tree
            kinds = {np.dtype(leaf.dtype).name for leaf in jax.tree.leaves(stored)}
            assert kinds == {"float32" if network == "vae" else "bfloat16"}


def test_an_export_may_have_another_dtype(made, converted, tmp_path, capsys):
    words = ["convert", str(converted), str(tmp_path / "wide"), "--dialect", "diffusers", "--quiet"]
    assert main([*words, "--dtype", "float32"]) == 0
    wide = load_file(tmp_path / "wide" / "diffusion_pytorch_model.safetensors")
    shards = (made[0] / "transformer").glob("*.safetensors")
    own = {name: array for file in shards for name, array in load_file(file).items()}
    assert {array.dtype.name for array in wide.values()} == {"float32"} and wide.keys() == own.keys()
    assert all((wide[name] == own[name].astype(np.float32)).all() for name in own)
    checkpoint.save_model(tmp_path / "full", made[1].to_manifest(), made[2])
    back = export.export_diffusers(tmp_path / "full", tmp_path / "narrow", dtype="bfloat16")
    narrow = load_file(back / "diffusion_pytorch_model.safetensors")
    assert all(narrow[name].dtype == own[name].dtype and (narrow[name] == own[name]).all() for name in own)
    assert main(["convert", str(made[0]), str(tmp_path / "no"), "--dtype", "bfloat16"]) == 2
    assert "--dtype: is of --dialect bagel or diffusers" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a%20b", "run#2", "50%", "what?", "a|b"])
def test_paths_that_are_no_urls(made, tmp_path, name):
    model = convert(made[0], tmp_path / name / "model")
    assert same(checkpoint.load_weights(model, made[1].abstract()), made[2])
    export.export_diffusers(model, tmp_path / name / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_a_tokenizer_of_another_vocabulary_is_refused(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "pipeline")
    tokenizer = loading.open_model(folder).tokenizer()
    tokenizer.add_tokens([f"token {k}" for k in range(100)])
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    with pytest.raises(RefineError, match="its tokenizer has token .*, its vocab_size is"):
        loading.load(folder)
    checkpoint.save_model(tmp_path / "own", made[1].to_manifest(), made[2])
    shutil.copytree(folder / "tokenizer", tmp_path / "own" / "tokenizer")
    with pytest.raises(RefineError, match="own: its tokenizer has token"):
        loading.load(tmp_path / "own")


def test_the_manifest_is_readable_and_names_its_sources(made, converted):
    source, model, _ = made
    manifest = checkpoint.read_manifest(converted)
    assert loading.ModelConfig.from_manifest(manifest) == model
    files = [*source.glob("*/*.safetensors"), *source.glob("tokenizer/*")]
    files = sorted(p.relative_to(source).as_posix() for p in files)
    assert sorted(manifest["source"]["sha256"]) == files and len(files) > 6
    import hashlib

    for name, digest in manifest["source"]["sha256"].items():
        assert hashlib.sha256((source / name).read_bytes()).hexdigest() == digest
    assert manifest["scheduler"]["max_shift"] == pytest.approx(np.log(3))


@pytest.mark.parametrize("shard", [None, 20_000])
def test_the_transformer_goes_back_to_diffusers(made, converted, tmp_path, shard):
    """What `convert` read comes back, bit by bit, with the architecture, and diffusers loads it."""
    import torch
    from diffusers import QwenImageTransformer2DModel

    target = tmp_path / "transformer"
    if shard:
        export.export_diffusers(converted, target, shard=shard)
    else:
        assert main(["convert", str(converted), str(target), "--dialect", "diffusers", "--quiet"]) == 0
    assert (len(list(target.glob("*.safetensors"))) > 1) == bool(shard) == (target / INDEX).is_file()
    load = partial(QwenImageTransformer2DModel.from_pretrained, torch_dtype=torch.bfloat16, low_cpu_mem_usage=False)
    back, before = load(target), load(made[0], subfolder="transformer")
    tensors = before.state_dict()
    assert tensors.keys() == back.state_dict().keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in back.state_dict().items())
    assert all(back.config[name] == value for name, value in before.config.items() if not name.startswith("_"))
    again = {name: load_file(file) for file in target.glob("*.safetensors") for name in [file.name]}
    assert {value.dtype.name for held in again.values() for value in held.values()} == {"bfloat16"}


INDEX = "diffusion_pytorch_model.safetensors.index.json"


def test_what_cannot_go_back_to_diffusers(made, converted, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    for words, text in (
        ([converted, tmp_path / "there"], "exists"),
        ([made[0], tmp_path / "x"], "refine_jax.json"),
        ([converted, tmp_path / "x", "--weights", "ema"], "--weights: is of BAGEL"),
        ([converted, tmp_path / "x", "--model", "tiny"], "--model: is of LoRA files"),
    ):
        assert main(["convert", *map(str, words), "--dialect", "diffusers", "--quiet"]) == 2
        assert text in capsys.readouterr().err and not (tmp_path / "x").exists()
    for words, text in (
        (["--dialect", "comfyui"], "--dialect comfyui: is of LoRA files"),
        (["--model", "tiny"], "--model: is of LoRA files"),
    ):
        assert main(["convert", str(made[0]), str(tmp_path / "x"), *words]) == 2
        assert text in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_what_is_trained_of_it_is_sampled_alike(made, tmp_path):
    """A full fine-tuning of a foreign model keeps the sampler that the model has here."""
    config = toy.refine_config("")
    config.init_from, config.model, config.train_encoder, config.ema_decay = str(made[0]), {}, False, 0.0
    objective = objectives.make(config)
    boxed = {"params": jax.eval_shape(objective.init, jax.random.key(0)), "frozen": objective.frozen}
    placed = {name: parallel.param_shardings(tree, None) for name, tree in boxed.items()}
    objective.export(objective.initial(placed["params"]), objective.load(placed["frozen"]), tmp_path / "tuned")
    settings = ("scheduler", "steps", "true_cfg_scale", "negative_prompt")
    base, tuned = (loading.load(folder).config for folder in (made[0], tmp_path / "tuned"))
    assert [getattr(tuned, name) for name in settings] == [getattr(base, name) for name in settings]
    assert tuned.scheduler == flow.SCHEDULERS["refineanything"]
    assert [getattr(objective.model, name) for name in settings] == [getattr(base, name) for name in settings]


def test_sampler_defaults_follow_the_checkpoint_or_the_released_code(made, converted, tmp_path):
    for door in (made[0], converted):
        released, own = loading.load(door).config, loading.load(door, scheduler="checkpoint").config
        assert released.scheduler == flow.SCHEDULERS["refineanything"]
        assert (released.steps, released.true_cfg_scale, released.negative_prompt) == (28, 4.0, " ")
        assert own.scheduler == flow.SchedulerConfig.from_dict(
            json.loads((made[0] / "scheduler/scheduler_config.json").read_text())
        )
    name = "Qwen-Image-Edit-2511-Lightning-{}steps-V1.0-bf16.safetensors"
    for steps in (4, 8):
        paths = [Path("RefineAny.safetensors"), Path(name.format(steps))]
        config = loading._sampling(made[1], True, paths, [lora.Adapter({}, source=str(path)) for path in paths])
        assert (config.steps, config.true_cfg_scale) == (steps, 1.0)
        assert config.scheduler == flow.SCHEDULERS["refineanything"]


def restore_on_devices(folder: str) -> None:
    """Runs in a process of its own: restores on 1, 2 and 8 virtual devices, prints what differs and what each holds."""
    from refine_jax import parallel

    sums, most = [], []
    for axes in ({}, {"fsdp": 2}, {"fsdp": 4, "tensor": 2}):
        count = int(np.prod(list(axes.values()), initial=1))
        mesh = parallel.make_mesh(axes, jax.devices()[:count])
        variables = loading.load(folder, mesh=mesh).variables
        held = {device: 0 for device in mesh.devices.flat}
        for leaf in jax.tree.leaves(variables):
            for shard in leaf.addressable_shards:
                held[shard.device] += shard.data.nbytes
        most.append(max(held.values()))
        sums.append(jax.tree.map(lambda x: np.asarray(x).tobytes(), variables))
    print(json.dumps({"same": sums[0] == sums[1] == sums[2], "held": [m / most[0] for m in most]}))


@pytest.mark.parametrize("door", ["converted", "source"])
def test_restoring_on_1_2_and_8_devices_gives_the_same_bits(made, converted, door):
    folder = converted if door == "converted" else made[0]
    code = f"import test_convert; test_convert.restore_on_devices({str(folder)!r})"
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr[-2000:]
    result = json.loads(out.stdout.splitlines()[-1])
    assert result["same"]
    assert result["held"][1] < 0.7 and result["held"][2] < 0.4, "norms and the VAE stay whole"


def test_what_is_killed_goes_on_and_ends_the_same(made, tmp_path):
    """SIGKILL in the middle of parts, again and again; finished parts are not written again."""
    source, model, expected = made
    code = (
        "import os, signal, sys\n"
        "from refine_jax.convert import convert as c, writer as w\n"
        "c._PART, left = 20_000, int(sys.argv[3])\n"
        "put = w.Part.put\n"
        "def counted(self, *args):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if left < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    put(self, *args)\n"
        "w.Part.put = counted\n"
        "c.convert(sys.argv[1], sys.argv[2])\n"
    )
    target, aside = tmp_path / "model", tmp_path / "model.partial"
    parts: dict[str, int] = {}
    for pieces in (60, 80, 100_000):
        out = subprocess.run([sys.executable, "-c", code, source, target, str(pieces)], capture_output=True, text=True)
        if pieces < 1000:
            assert out.returncode == -signal.SIGKILL, out.stderr[-2000:]
            assert not target.exists() and not (aside / checkpoint.MANIFEST).exists()
            with pytest.raises(RefineError, match=checkpoint.MANIFEST):
                loading.load(aside)
        final = target if target.exists() else aside
        found = {str(p.relative_to(final)): p.stat().st_ino for p in final.glob("weights/*/ocdbt.process_*[0-9]")}
        assert parts.items() <= found.items() and len(found) > len(parts), "what was finished is still the same"
        parts = found
    assert out.returncode == 0, out.stderr[-2000:]
    assert same(checkpoint.load_weights(target, model.abstract()), expected) and not aside.exists()


def test_another_source_or_another_conversion_is_noticed(made, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(made[0], source)
    target, aside = tmp_path / "model", tmp_path / "model.partial"
    (aside / "weights").mkdir(parents=True)
    (aside / "weights" / "rubbish").write_text("of another conversion")
    (aside / "conversion.json").write_text('{"layout": 0}')
    convert(source, target)
    assert not (target / "weights" / "rubbish").exists()
    with pytest.raises(RefineError, match="exists"):
        convert(source, target)
    assert sorted(p.name for p in target.iterdir()) == ["refine_jax.json", "tokenizer", "weights"]


def test_no_room_is_said_before_anything_is_written(made, tmp_path, monkeypatch):
    monkeypatch.setattr(converter.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(RefineError, match="GB free"):
        convert(made[0], tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_full_disk_is_said_and_what_was_written_stays(made, tmp_path, monkeypatch):
    monkeypatch.setattr(converter, "_PART", 20_000)
    sync, left = writer.sync, [4]

    def full(folder, deep=True):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        sync(folder, deep)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "sync", full)
        with pytest.raises(RefineError, match="No space left.*go on"):
            convert(made[0], tmp_path / "model")
    parts = {p.name: p.stat().st_ino for p in (tmp_path / "model.partial/weights/mmdit").glob("*[0-9]")}
    assert len(parts) == 4 and not (tmp_path / "model").exists()
    target = convert(made[0], tmp_path / "model")
    assert parts.items() <= {p.name: p.stat().st_ino for p in target.glob("weights/mmdit/*[0-9]")}.items()
    assert same(checkpoint.load_weights(target, made[1].abstract()), made[2])


def test_what_the_store_says_of_the_disk_is_an_error_of_the_disk(tmp_path):
    (tmp_path / "file").write_text("")
    leaf = jax.ShapeDtypeStruct((2, 2), np.float32)
    with pytest.raises(OSError):
        with (
            contextlib.closing(writer.Writer(tmp_path / "store", {"a": leaf}, frozenset())) as out,
            out.part(0) as part,
        ):
            part._folder.rmdir()
            part._folder.write_text("no folder")
            part.put("a", (0, 0), np.ones((2, 2), np.float32))
            part.wait()


def test_the_command(made, converted, tmp_path, capsys):
    assert main(["convert", str(made[0]), str(tmp_path / "model"), "--quiet"]) == 0
    assert str(tmp_path / "model") in capsys.readouterr().out
    assert main(["convert", "--inspect", str(made[0])]) == 0
    text = capsys.readouterr().out
    assert "bfloat16" in text and "mmdit" in text and "zero_cond_t=True" in text
    assert main(["convert", "--inspect", str(converted)]) == 0
    assert "sha256" in capsys.readouterr().out
    assert main(["convert", str(made[0])]) == 2
    assert "DST" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nothing"), str(tmp_path / "x")]) == 2
    assert "model_index.json" in capsys.readouterr().err


def test_the_command_rewrites_and_describes_lora_files(made, tmp_path, capsys):
    name = "transformer.transformer_blocks.{}.attn.to_q.lora_{}.weight"
    a, b = np.ones((2, 32), np.float32), np.full((32, 2), 0.5, np.float32)
    source, target = tmp_path / "peft.safetensors", tmp_path / "comfy.safetensors"
    save_file({name.format(k, "A"): a for k in (0, 1)} | {name.format(k, "B"): b for k in (0, 1)}, source)
    command = ["convert", str(source), str(target), "--dialect", "comfyui", "--model", str(made[0])]
    assert main(command) == 0
    stored = load_file(target)
    assert stored["diffusion_model.transformer_blocks.1.attn.to_q.lora_A.weight"].tolist() == a.tolist()
    capsys.readouterr()
    assert main(command) == 2 and "exists" in capsys.readouterr().err
    assert main([*command[:2], str(tmp_path / "x.safetensors")]) == 2
    assert "expected [r, 3072]" in capsys.readouterr().err, "it is not for the published model"
    assert main(["refine", "--model", str(made[0]), "--lora", f"{source}:0.5", "--image", "no.png", *BOX]) == 2
    assert "no.png" in capsys.readouterr().err


BOX = ["--box", "0,0,8,8", "--prompt", "x"]


def test_what_is_missing_is_said_before_a_model_is_fetched(tmp_path):
    with pytest.raises(RefineError, match="none.safetensors: no such file"):
        loading.load("no/such-model-anywhere", adapters=[str(tmp_path / "none.safetensors")])
    with pytest.raises(RefineError, match="give a file, a pair"):
        loading.load("no/such-model-anywhere", adapters=[0.5])
    (tmp_path / "whole.safetensors").write_bytes(b"x")
    with pytest.raises(RefineError, match="whole.safetensors': is a file"):
        loading.load(tmp_path / "whole.safetensors", adapters=None)


@pytest.mark.parametrize("name", ["no/such-model-anywhere", "owner/name@revision"])
def test_a_hub_name_where_there_is_no_network(name, monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(RefineError, match="hub.*download it elsewhere") as error:
        loading.load(name)
    assert "\n" not in str(error.value)


def test_a_hub_name_is_downloaded_and_opened(made, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **kw: asked.append((name, kw["revision"])) or str(made[0])
    )
    assert same(loading.load("owner/name@v1", dtype="float32").variables, made[2])
    assert asked == [("owner/name", "v1")]


# ------------------------------------------------------------------------------------------------------ damaged folders


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def retensor(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def shard(folder: Path) -> Path:
    return sorted((folder / "transformer").glob("*.safetensors"))[1]


def index_of(folder: Path) -> Path:
    return folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"


def remap(folder: Path, file: str) -> None:
    weights = json.loads(index_of(folder).read_text())["weight_map"]
    edit(index_of(folder), weight_map={**weights, next(iter(weights)): file})


def header(path: Path, length: int) -> None:
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


def duplicate(folder: Path) -> None:
    first = sorted((folder / "transformer").glob("*.safetensors"))[0]
    retensor(shard(folder), lambda t: t.update(dict([next(iter(load_file(first).items()))])))


BIAS = "quant_conv.bias"
VAE = "vae/diffusion_pytorch_model.safetensors"
DAMAGES = {
    "truncated shard": (lambda f: os.truncate(shard(f), shard(f).stat().st_size - 3), "not a sound safetensors"),
    "empty shard": (lambda f: os.truncate(shard(f), 0), "not a sound safetensors"),
    "absurd header": (lambda f: header(shard(f), 2**62), "header of 46116860"),
    "header beyond the file": (lambda f: header(shard(f), 10**7), "header of 10000000"),
    "header is not JSON": (lambda f: shard(f).write_bytes(struct.pack("<Q", 4) + b"{{{{"), "not JSON"),
    "missing shard": (lambda f: shard(f).unlink(), "missing"),
    "missing index": (lambda f: index_of(f).unlink(), "holds neither"),
    "index points to another shard": (lambda f: remap(f, shard(f).name), "the index says"),
    "index leaves the folder": (lambda f: remap(f, "../../x.safetensors"), "outside its folder"),
    "index is absolute": (lambda f: remap(f, "/etc/passwd"), "outside its folder"),
    "index is no object": (lambda f: index_of(f).write_text("[1]"), "not an object"),
    "index without a map": (lambda f: index_of(f).write_text("{}"), "no weight_map"),
    "index maps to a number": (lambda f: edit(index_of(f), weight_map={"a": 1}), "no weight_map"),
    "key in two shards": (duplicate, " and in "),
    "unknown tensor": (
        lambda f: retensor(f / VAE, lambda t: t.update(extra=np.zeros(1, np.float32))),
        "unknown keys: extra",
    ),
    "missing tensor": (
        lambda f: retensor(f / VAE, lambda t: t.pop("quant_conv.bias")),
        "missing leaves: quant_conv/bias",
    ),
    "wrong shape": (
        lambda f: retensor(f / VAE, lambda t: t.update({"quant_conv.bias": np.zeros(3, np.float32)})),
        "wrong shapes: quant_conv.bias",
    ),
    "wrong dtype": (
        lambda f: retensor(f / VAE, lambda t: t.update({"quant_conv.bias": t["quant_conv.bias"].astype(np.int32)})),
        "quant_conv.bias is int32",
    ),
    "NaN in a configuration": (lambda f: (f / "vae/config.json").write_text('{"base_dim": NaN}'), "NaN"),
    "a key twice in a configuration": (
        lambda f: (f / "vae/config.json").write_text('{"z_dim": 1, "z_dim": 2}'),
        "twice",
    ),
    "a deep configuration": (lambda f: (f / "vae/config.json").write_text("[" * 100_000), "cannot be read as JSON"),
    "text for a number": (lambda f: edit(f / "transformer/config.json", num_layers="two"), "num_layers is 'two'"),
    "a negative size": (lambda f: edit(f / "transformer/config.json", num_attention_heads=-2), "num_attention_heads"),
    "a billion blocks": (lambda f: edit(f / "transformer/config.json", num_layers=10**9), "num_layers is 1000000000"),
    "an absurd size": (
        lambda f: edit(f / "transformer/config.json", joint_attention_dim=10**15),
        "joint_attention_dim",
    ),
    "another network": (lambda f: edit(f / "transformer/config.json", guidance_embeds=True), "guidance_embeds"),
    "another pipeline": (lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"), "FluxPipeline"),
    "another VAE": (lambda f: edit(f / "model_index.json", vae=["diffusers", "AutoencoderKL"]), "AutoencoderKL"),
    "no end of a configuration": (
        lambda f: ((f / "vae/config.json").unlink(), (f / "vae/config.json").symlink_to("/dev/zero")),
        "it is no file",
    ),
    "a tensor in disguise": (
        lambda f: retensor(f / VAE, lambda t: t.update({"a\x1b[2J\nb": np.zeros(1)})),
        "unknown keys: 'a\\x1b[2J\\nb'",
    ),
    "no model_index": (lambda f: (f / "model_index.json").unlink(), "model_index.json"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer"),
    "pickled weights": (
        lambda f: (f / VAE).rename(f / "vae/diffusion_pytorch_model.bin"),
        "safe_serialization",
    ),
    "a folder in place of a file": (lambda f: ((f / VAE).unlink(), (f / VAE).mkdir()), "holds neither"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_named_and_nothing_is_written(made, tmp_path, name):
    damage, says = DAMAGES[name]
    folder = tmp_path / "source"
    shutil.copytree(made[0], folder)
    damage(folder)
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(RefineError) as error:
        convert(folder, tmp_path / "out" / "model")
    assert says in str(error.value) and "\n" not in str(error.value)
    assert sorted(p for p in tmp_path.rglob("*")) == before
    if name != "no model_index":
        with pytest.raises(RefineError):
            loading.load(folder)


def test_a_damaged_checkpoint_is_no_zeros(made, converted, tmp_path):
    folder = tmp_path / "model"
    for damage in ("data", "chunk", "metadata", "network"):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(converted, folder)
        if damage == "data":
            for file in (folder / "weights/vl/ocdbt.process_0/d").iterdir():
                os.truncate(file, file.stat().st_size // 2)
        elif damage == "chunk":
            base = f"file://{(folder / 'weights/vl').absolute()}/"
            store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
            key = next(k for k in store.list().result() if k.endswith(b"norm.scale/0"))
            store.write(key, None).result()
        elif damage == "metadata":
            (folder / "weights/vl/_METADATA").unlink()
        else:
            shutil.rmtree(folder / "weights/vl")
        with pytest.raises(RefineError, match="vl: cannot be read"):
            loading.load(folder)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_bytes_are_a_safetensors_file_or_an_error(tmp_path, data):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 4), np.int8)}, path)
    sound = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(sound) - 1))
        sound[place] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(sound)))
    path.write_bytes(bytes(sound[:end]) + data.draw(st.binary(max_size=9)))
    try:
        tensors, _ = reader.read_header(path)
    except RefineError as error:
        assert str(path) in str(error)
        return
    assert sum(t.nbytes for t in tensors.values()) <= path.stat().st_size
    for tensor in tensors.values():
        assert tensor.read().shape == tensor.shape


# ------------------------------------------------------------------------------------------------------------- pieces


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 700),
    kind=st.sampled_from([np.float32, ml_dtypes.bfloat16, np.float16]),
    cut=st.booleans(),
)
def test_transposed_copies_are_copies(rows, columns, kind, cut):
    source = np.random.default_rng(rows).normal(size=(columns, rows)).astype(kind).T
    if cut:
        source = source[rows // 3 :, columns // 4 :]
    out = np.empty(source.shape, kind)
    writer.copy_into(out, source)
    np.testing.assert_array_equal(out.view(np.uint8), np.ascontiguousarray(source).view(np.uint8))


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=3), st.booleans())
def test_chunks_divide_their_leaf(shape, stacked):
    chunk = writer.chunk_shape(tuple(shape), 2, stacked)
    splits = [n // c for n, c in zip(shape, chunk)]
    assert all(n % c == 0 for n, c in zip(shape, chunk))
    assert max(splits[1:] if stacked else splits, default=1) <= 16
    assert not stacked or chunk[0] == 1
    full = [16 if k == 0 and stacked else s for k, s in enumerate(splits)]
    done = all(c % 2 or s >= 16 for c, s in zip(chunk, full))
    assert np.prod(chunk) * 2 <= 1 << 20 or done


def test_large_tensors_travel_in_slabs(made, tmp_path, monkeypatch):
    """A table and a matrix that exceed the slab: cut at chunks, whole in the result."""
    monkeypatch.setattr(converter, "_SLAB", 2000)
    monkeypatch.setattr(converter, "_PART", 5000)
    monkeypatch.setattr(writer, "_CHUNK", 500)
    target = convert(made[0], tmp_path / "model")
    assert same(checkpoint.load_weights(target, made[1].abstract()), made[2])
    assert len(list(target.glob("weights/vl/ocdbt.process_*"))) > 10
