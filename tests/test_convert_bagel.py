"""BAGEL and RvR folders in the released layout through the converter, every door, and back; damaged folders."""

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from refine_jax import bagel, checkpoint, loading, parallel, prompts
from refine_jax.bagel import BagelModel
from refine_jax.cli import main
from refine_jax.convert import bagel_folder, export, folders, keys_bagel, lora
from refine_jax.convert import convert as converter
from refine_jax.convert.convert import convert
from refine_jax.convert.keys_flux_vae import FLUX_VAE_TABLE
from refine_jax.convert.mapping import reference_shapes, to_tree
from refine_jax.errors import RefineError
from refine_jax.refine import Refiner

# Names and shapes of the layout at these and at the released sizes are proven against the authors' code in test_bagel.
LLM = {
    **dict(hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2),
    **dict(vocab_size=288, rope_theta=1e6, rms_norm_eps=1e-6, architectures=["Qwen2ForCausalLM"], qk_norm=True),
}
VIT = dict(
    hidden_size=16, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2, patch_size=4, image_size=24
)
VAE = dict(z_channels=4, downsample=2, ch=8, ch_mult=[1, 2], num_res_blocks=1, num_groups=4)
# As in the released one, the side of the latents' grid is not what the weights have.
MODEL = dict(max_latent_size=3, latent_patch_size=2, vit_max_num_patch_per_side=6, vae_config=VAE, visual_gen=True)
MERGES = [("t", "w"), ("tw", "o"), ("Ġ", "c"), ("å", "½")]


def tensors_of(seed: int, table, abstract, dtype) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    shapes = reference_shapes(table, abstract)
    return {key: draw.standard_normal(shape, np.float32).astype(dtype) for key, shape in sorted(shapes.items())}


def released_model() -> BagelModel:
    kinds = {**MODEL, "max_latent_size": 5}
    return BagelModel(bagel=bagel.BagelConfig.from_dict(LLM, VIT, kinds), vae=bagel_folder.vae_config(VAE))


def write_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt, and a configuration that knows the marks of texts but not those of images."""
    import tokenizers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: k for k, text in enumerate([*letters, *map("".join, MERGES)])}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {str(len(vocab) + k): {"content": name, **flags} for k, name in enumerate(names)},
        "additional_special_tokens": names[1:],
        **dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None, bos_token=None),
    }
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder with both models' weights, model, {"rvr": parameters, "ema": parameters})."""
    folder = tmp_path_factory.mktemp("released") / "RvR-tiny"
    folder.mkdir()
    for name, values in (("llm_config.json", LLM), ("vit_config.json", VIT), ("config.json", MODEL)):
        (folder / name).write_text(json.dumps(values))
    write_tokenizer(folder)
    model = released_model()
    abstract = model.abstract()
    vae = tensors_of(0, FLUX_VAE_TABLE, abstract["vae"], np.float32)
    save_file(vae, folder / "ae.safetensors")
    trees = {}
    tables = {k: v.astype(ml_dtypes.bfloat16) for k, v in keys_bagel.position_tables(model.bagel).items()}
    for seed, name in enumerate(("rvr", "ema"), 1):
        own = tensors_of(seed, keys_bagel.TABLE, abstract["bagel"], ml_dtypes.bfloat16) | tables
        save_file(own, folder / f"{name}.safetensors")
        trees[name] = {
            "bagel": to_tree(own, keys_bagel.TABLE, abstract["bagel"]),
            "vae": to_tree(vae, FLUX_VAE_TABLE, abstract["vae"]),
        }
    return folder, model, trees


@pytest.fixture(scope="module")
def converted(made, tmp_path_factory):
    return convert(made[0], tmp_path_factory.mktemp("converted") / "model")


def same(a, b) -> bool:
    check = lambda x, y: x.shape == y.shape and bool((np.asarray(x, np.float32) == np.asarray(y, np.float32)).all())
    return jax.tree.all(jax.tree.map(check, a, b))


# ------------------------------------------------------------------------------------------------------------- the way


def test_every_parameter_arrives_through_every_door(made, converted):
    folder, model, trees = made
    assert same(checkpoint.load_weights(converted, model.abstract()), trees["rvr"])
    for door, weights, name in (
        (folder, None, "rvr"),
        (folder, "ema", "ema"),
        (folder / "ema.safetensors", None, "ema"),
        (converted, None, "rvr"),
    ):
        loaded = loading.load(door, weights=weights, vae_sides=(64, 8), wanted=("regenerating", "rvr"))
        assert same(loaded.variables, trees[name])
        assert loaded.config == BagelModel(model.bagel, model.vae, vae_sides=(64, 8))
        assert bagel.Marks.of(loaded.tokenizer) == (261, 262, 263, 264)
    half = loading.load(converted, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.variables)} == {"bfloat16"}
    assert half.config.bagel.vit.dtype == half.config.vae.param_dtype == half.config.bagel.dtype == "bfloat16"
    assert same(half.variables["bagel"], trees["rvr"]["bagel"])


def test_the_manifest_names_its_sources(made, converted):
    folder, model, _ = made
    manifest = checkpoint.read_manifest(converted)
    assert BagelModel.from_manifest(manifest) == model
    source = manifest["source"]
    assert (source["weights"], set(source["position_tables"].values())) == ("rvr.safetensors", {"bfloat16"})
    names = ["ae.safetensors", "merges.txt", "rvr.safetensors", "tokenizer_config.json", "vocab.json"]
    assert sorted(source["sha256"]) == names
    for name, digest in source["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("missing", ["nothing", "tokenizer_config.json", "vocab.json"])
def test_the_tokenizer_is_the_authors(made, tmp_path, missing):
    """Ids as of transformers' `Qwen2Tokenizer` after the authors' `add_special_tokens`."""
    from transformers import Qwen2Tokenizer

    folder = tmp_path / "source"
    shutil.copytree(made[0], folder)
    if missing == "tokenizer_config.json":
        (folder / missing).unlink()
    theirs = Qwen2Tokenizer.from_pretrained(folder)
    if missing == "vocab.json":  # as a newer release may look
        theirs.save_pretrained(folder)
        (folder / missing).unlink(), (folder / "merges.txt").unlink()
    theirs.add_tokens([mark for mark in bagel.MARKS if mark not in theirs.all_special_tokens])
    ours = folders.open_folder(folder).tokenizer()
    assert tuple(bagel.Marks.of(ours)) == tuple(theirs.convert_tokens_to_ids(list(bagel.MARKS)))
    for text in ("two cups", "", "彩色的猫 twotwo\n\n  x1 23", "a<|im_end|>b", "e\u0301"):
        assert ours.encode(text, add_special_tokens=False).ids == theirs(text)["input_ids"]
    loading.open_model(folder).write_tokenizer(tmp_path / "tokenizer")
    again = prompts.load_tokenizer(tmp_path / "tokenizer", placeholder=False)
    assert again.get_vocab() == ours.get_vocab() and again.encode("two cups").ids == ours.encode("two cups").ids


def restore_on_devices(source: str, converted: str) -> None:
    """Runs in a process of its own: digests of the parameters on 1 and 8 virtual devices, and what each holds."""
    found = []
    for folder, count in ((source, 1), (source, 8), (converted, 8)):
        mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2} if count > 1 else {}, jax.devices()[:count])
        variables = loading.load(folder, mesh=mesh).variables
        held: dict = {}
        for leaf in jax.tree.leaves(variables):
            for shard in leaf.addressable_shards:
                held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
        digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(variables)))
        found.append((digest.hexdigest(), max(held.values())))
    print(json.dumps(found))


def test_restoring_on_8_devices_gives_the_same_bits(made, converted):
    code = f"import test_convert_bagel as t; t.restore_on_devices({str(made[0])!r}, {str(converted)!r})"
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr[-2000:]
    (digest, whole), *sharded = json.loads(out.stdout.splitlines()[-1])
    assert all(other == digest and most < 0.7 * whole for other, most in sharded), "norms and the VAE stay whole"


def test_what_is_killed_goes_on_and_ends_the_same(made, tmp_path, monkeypatch):
    """SIGKILL in the middle of a part; what is finished is not written again; another choice of weights starts anew."""
    folder, model, trees = made
    code = (
        "import os, signal, sys\n"
        "from refine_jax.convert import convert as c, writer as w\n"
        "c._PART, left = 20_000, 60\n"
        "put = w.Part.put\n"
        "def counted(self, *args):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if left < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    put(self, *args)\n"
        "w.Part.put = counted\n"
        "c.convert(sys.argv[1], sys.argv[2], weights='ema')\n"
    )
    target, aside = tmp_path / "model", tmp_path / "model.partial"
    out = subprocess.run([sys.executable, "-c", code, folder, target], capture_output=True, text=True)
    assert out.returncode == -signal.SIGKILL, out.stderr[-2000:]
    assert not target.exists() and not (aside / checkpoint.MANIFEST).exists()
    with pytest.raises(RefineError, match=checkpoint.MANIFEST):
        loading.load(aside)
    parts = {p.name: p.stat().st_ino for p in aside.glob("weights/bagel/ocdbt.process_*[0-9]")}
    assert parts
    shutil.copytree(aside, tmp_path / "other.partial")
    monkeypatch.setattr(converter, "_PART", 20_000)
    convert(folder, target, weights="ema")
    found = {p.name: p.stat().st_ino for p in target.glob("weights/bagel/ocdbt.process_*[0-9]")}
    assert parts.items() <= found.items() and len(found) > len(parts)
    assert same(checkpoint.load_weights(target, model.abstract()), trees["ema"]) and not aside.exists()
    other = convert(folder, tmp_path / "other", weights="rvr")
    assert same(checkpoint.load_weights(other, model.abstract()), trees["rvr"])


# ------------------------------------------------------------------------------------------------------------ and back


@pytest.mark.parametrize("slab", [300, None])
def test_what_is_exported_is_what_was_converted(made, converted, tmp_path, monkeypatch, slab):
    folder, model, _ = made
    if slab:
        monkeypatch.setattr(export, "_SLAB", slab)
    target = export.export_bagel(converted, tmp_path / "back")
    for name in ("rvr.safetensors", "ae.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (target / name).read_bytes() == (folder / name).read_bytes(), name
    assert {"latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"} <= load_file(target / "rvr.safetensors").keys()
    again = folders.open_folder(target)
    assert again.model() == model
    assert again.tokenizer().get_vocab() == folders.open_folder(folder).tokenizer().get_vocab()
    assert json.loads((target / "vit_config.json").read_text())["num_hidden_layers"] == VIT["num_hidden_layers"]


def test_a_model_of_our_trainer_is_exported(made, tmp_path):
    """`weights.safetensors`, with what it was trained from unknown."""
    folder, model, trees = made
    source = tmp_path / "trained"
    loading.open_model(folder).write_tokenizer(source / "tokenizer")
    checkpoint.save_model(source, model.to_manifest(), trees["ema"], "float32")
    target = export.export_bagel(source, tmp_path / "back", weights="ema")
    assert sorted(p.name for p in target.glob("*.safetensors")) == ["ae.safetensors", "ema.safetensors"]
    assert load_file(target / "ema.safetensors")["latent_pos_embed.pos_embed"].dtype == np.float32
    assert same(loading.load(target).variables, trees["ema"])
    with pytest.raises(RefineError, match="exists"):
        export.export_bagel(source, target)
    with pytest.raises(RefineError, match="plain name"):
        export.export_bagel(source, tmp_path / "x", weights="../x")
    os.truncate(source / "weights.safetensors", 1000)
    with pytest.raises(RefineError, match="not a sound safetensors"):
        export.export_bagel(source, tmp_path / "x")
    assert not list(tmp_path.glob("x*"))


def test_a_hole_in_the_store_is_no_zeros(converted, tmp_path):
    import tensorstore

    folder = tmp_path / "model"
    shutil.copytree(converted, folder)
    base = f"file://{(folder / 'weights/bagel').absolute()}/"
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    key = next(k for k in store.list().result() if k.endswith(b"decoder.norm.scale/0"))
    store.write(key, None).result()
    with pytest.raises(RefineError, match="decoder/norm/scale cannot be read"):
        export.export_bagel(folder, tmp_path / "back")
    assert not list(tmp_path.glob("back*"))


def test_the_command(made, converted, tmp_path, capsys):
    folder = made[0]
    assert main(["convert", "--inspect", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "rvr.safetensors -> bagel" in text and "ema is there too: --weights" in text and "5 tokens a side" in text
    assert main(["convert", str(folder), str(tmp_path / "model"), "--weights", "ema", "--quiet"]) == 0
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "back"), "--dialect", "bagel", "--quiet"]) == 0
    assert (tmp_path / "back/ema.safetensors").read_bytes() == (folder / "ema.safetensors").read_bytes()
    capsys.readouterr()
    for arguments, says in (
        ([str(folder), str(tmp_path / "y"), "--weights", "sft"], "choose weights among them"),
        ([str(folder), str(tmp_path / "y"), "--dialect", "bagel"], "refine_jax.json"),
        ([str(converted), str(tmp_path / "y")], "already"),
    ):
        assert main(["convert", *arguments]) == 2
        assert says in capsys.readouterr().err


def test_each_family_is_refused_where_the_other_is_wanted(made, converted):
    for door in (made[0], converted):
        with pytest.raises(RefineError, match="BAGEL or RvR model, which regenerates whole pictures") as error:
            Refiner.load(door)
        assert "\n" not in str(error.value)
    with pytest.raises(RefineError, match="vae_area: this is a BAGEL or RvR model"):
        Refiner.load(converted, vae_area=64**2)
    with pytest.raises(RefineError, match="leave out weights"):
        loading.load(converted, weights="ema")
    with pytest.raises(RefineError, match="vit_sides: this is a Qwen-Image-Edit model"):
        loading.load("tiny", vit_sides=(64, 32))
    with pytest.raises(RefineError, match="regenerating: .*'refine'.*'rvr' is wanted"):
        loading.load("tiny", wanted=("regenerating", "rvr"))


def test_a_hub_name_is_downloaded_and_opened(made, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **kw: asked.append((name, kw["revision"])) or str(made[0])
    )
    assert same(loading.load("owner/RvR-7B-MoT@v1").variables, made[2]["rvr"])
    assert asked == [("owner/RvR-7B-MoT", "v1")]


# ---------------------------------------------------------------------------------------------------------------- LoRA


def test_lora_in_peft_naming(made, converted, tmp_path):
    _, model, trees = made
    abstract = model.abstract()["bagel"]
    draw = np.random.default_rng(3)

    def pair(path: str, rank: int) -> dict:
        *stack, inputs, outputs = flat[f"{path}/kernel"].shape
        matrix = lambda *shape: draw.standard_normal((*stack, *shape), np.float32).astype(ml_dtypes.bfloat16)
        return {"a": matrix(inputs, rank), "b": matrix(rank, outputs)}

    flat = traverse_util.flatten_dict(abstract, sep="/")
    layers = "decoder/layers/und/q_proj", "decoder/layers/gen/q_proj", "decoder/layers/gen/mlp/down_proj", "llm2vae"
    adapter = traverse_util.unflatten_dict({path: pair(path, 2 + k) for k, path in enumerate(layers)}, sep="/")
    file = tmp_path / "adapter.safetensors"
    lora.write_adapter(file, {"bagel": adapter})
    names = load_file(file)
    for name in (
        "language_model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "language_model.model.layers.1.self_attn.q_proj_moe_gen.lora_B.weight",
        "language_model.model.layers.1.mlp_moe_gen.down_proj.lora_A.weight",
        "llm2vae.lora_A.weight",
    ):
        assert name in names
    read = lora.read_adapter(file, model.abstract())
    assert read.dialects == ("peft",) and same(read.trees["bagel"], adapter)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(read.trees)} == {"bfloat16"}

    # As PEFT saves a model of the authors' classes, its configuration beside it.
    theirs = tmp_path / "peft"
    theirs.mkdir()
    kept = {k: v for k, v in names.items() if "layers.0.self_attn.q_proj." in k}
    save_file({f"base_model.model.{k}": v for k, v in kept.items()}, theirs / "adapter_model.safetensors")
    (theirs / "adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=2, lora_alpha=4)))
    (up,) = jax.tree.leaves({k: v for k, v in kept.items() if "lora_B" in k})
    got = lora.read_adapter(theirs, model.abstract()).trees["bagel"]["decoder"]["layers"]["und"]["q_proj"]["b"]
    np.testing.assert_array_equal(got[0], 2 * up.T)
    assert not got[1].any()

    loaded = loading.load(converted, adapters=[(file, 0.5)])
    assert set(loaded.lora) == {"bagel"}
    merged = loading.load(converted, adapters=file, merge=True).variables["bagel"]["llm2vae"]["kernel"]
    later = loading.load(converted, adapters=file, merge=True, later=True).variables
    assert later.shapes["bagel"]["llm2vae"]["kernel"].shape == merged.shape
    np.testing.assert_array_equal(later.arrays()["bagel"]["llm2vae"]["kernel"], merged)
    plain = trees["rvr"]["bagel"]["llm2vae"]["kernel"]
    product = adapter["llm2vae"]["a"].astype(np.float32) @ adapter["llm2vae"]["b"].astype(np.float32)
    np.testing.assert_allclose(merged, plain + product, rtol=1e-6)
    with pytest.raises(RefineError, match="comfyui.*bagel"):
        lora.write_adapter(tmp_path / "x.safetensors", {"bagel": adapter}, "comfyui")
    with pytest.raises(RefineError, match="unknown keys"):
        lora.read_adapter(file, {"mmdit": {}})


# ------------------------------------------------------------------------------------------------------ damaged folders


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def retensor(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def set_table(folder: Path, value: np.ndarray) -> None:
    retensor(folder / "rvr.safetensors", lambda t: t.update({"latent_pos_embed.pos_embed": value}))


def header(path: Path, length: int) -> None:
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


NORM = "language_model.model.norm.weight"
Q0 = "language_model.model.layers.0.self_attn.q_proj_moe_gen.weight"
RVR, LLM_FILE, AE = "rvr.safetensors", "llm_config.json", "ae.safetensors"
DAMAGES = {
    "truncated": (lambda f: os.truncate(f / RVR, (f / RVR).stat().st_size - 3), "not a sound safetensors"),
    "absurd header": (lambda f: header(f / RVR, 2**62), "header of 46116860"),
    "no weights": (lambda f: ((f / RVR).unlink(), (f / "ema.safetensors").unlink()), "holds neither rvr nor ema"),
    "no VAE": (lambda f: (f / AE).unlink(), "ae.safetensors: no such file"),
    "no llm_config": (lambda f: (f / LLM_FILE).unlink(), "llm_config.json: no such file"),
    "no vit_config": (lambda f: (f / "vit_config.json").unlink(), "vit_config.json: no such file"),
    "unknown tensor": (lambda f: retensor(f / RVR, lambda t: t.update(extra=t[NORM])), "unknown keys: extra"),
    "missing tensor": (lambda f: retensor(f / RVR, lambda t: t.pop(Q0)), "gen/q_proj/kernel[0]"),
    "wrong shape": (lambda f: retensor(f / RVR, lambda t: t.update({NORM: t[NORM][:3]})), f"wrong shapes: {NORM}"),
    "wrong dtype": (lambda f: retensor(f / RVR, lambda t: t.update({NORM: t[NORM].astype(np.int8)})), "is int8"),
    "two dtypes in a stack": (lambda f: retensor(f / RVR, lambda t: t.update({Q0: t[Q0].astype("f4")})), "is float32"),
    "another VAE": (lambda f: shutil.copy(f / "ema.safetensors", f / AE), "unknown keys"),
    "a table that is not ours": (lambda f: set_table(f, np.zeros((25, 24), np.float32)), "off the sine-cosine table"),
    "NaN in a table": (lambda f: set_table(f, np.full((25, 24), np.nan, np.float32)), "off the sine-cosine table"),
    "a table of no grid": (lambda f: set_table(f, np.zeros((24, 24), np.float32)), "no square grid"),
    "a table of one axis": (lambda f: set_table(f, np.zeros(25, np.float32)), "no square grid"),
    "an empty table": (lambda f: set_table(f, np.zeros((0, 24), np.float32)), "no square grid"),
    "a huge empty table": (lambda f: set_table(f, np.zeros((2**40, 0), np.float32)), "gives [1099511627776, 24]"),
    "NaN in a configuration": (lambda f: (f / LLM_FILE).write_text('{"hidden_size": NaN}'), "NaN"),
    "text for a number": (lambda f: edit(f / LLM_FILE, num_hidden_layers="two"), "num_hidden_layers is 'two'"),
    "a billion layers": (lambda f: edit(f / LLM_FILE, num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "no layer": (lambda f: edit(f / "vit_config.json", num_hidden_layers=1), "num_hidden_layers 1"),
    "another decoder": (lambda f: edit(f / LLM_FILE, layer_module="Qwen2MoEDecoderLayer"), "layer_module"),
    "a list for a number": (lambda f: edit(f / LLM_FILE, hidden_size=[24]), "holds what it cannot"),
    "no text model": (lambda f: edit(f / "config.json", visual_und=False), "visual_und"),
    "another autoencoder": (lambda f: edit(f / "config.json", vae_config={"z_channels": 4, "depth": 3}), "holds depth"),
    "a VAE that contradicts itself": (
        lambda f: edit(f / "config.json", vae_config={**VAE, "downsample": 8}),
        "make it 2",
    ),
    "VAE of text": (lambda f: edit(f / "config.json", vae_config="flux"), "holds what it cannot"),
    "no tokenizer": (lambda f: (f / "vocab.json").unlink(), "holds neither tokenizer.json"),
    "merges of another vocabulary": (lambda f: (f / "merges.txt").write_text("x\nq q\n"), "tokenizer cannot be read"),
    "half of the vocabulary": (
        lambda f: (f / "vocab.json").write_text(
            json.dumps(dict([*json.loads((f / "vocab.json").read_text()).items()][:99]))
        ),
        "tokenizer",
    ),
    "ids that do not follow": (
        lambda f: edit(f / "tokenizer_config.json", added_tokens_decoder={"300": {"content": "<|x|>"}}),
        "has id 300",
    ),
    "a tokenizer larger than the table": (lambda f: edit(f / LLM_FILE, vocab_size=262), "wrong shapes"),
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
    with pytest.raises(RefineError):
        loading.load(folder)


def test_a_token_beyond_the_embeddings_is_noticed(made, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(made[0], folder)
    edit(folder / "tokenizer_config.json", additional_special_tokens=[f"<|{k}|>" for k in range(40)])
    with pytest.raises(RefineError, match="token 30[0-9], its vocab_size is 288"):
        loading.load(folder)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.text(max_size=3), st.just([])
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_configuration_is_a_model_or_an_error(made, tmp_path, data):
    """One value of a configuration is anything: what opens is the model that the tensors are of, else a clear error."""
    folder = tmp_path / "source"
    if not folder.exists():
        shutil.copytree(made[0], folder)
    name = data.draw(st.sampled_from(["llm_config.json", "vit_config.json", "config.json"]))
    values = json.loads((made[0] / name).read_text())
    values[data.draw(st.sampled_from(sorted(values)))] = data.draw(VALUES)
    (folder / name).write_text(json.dumps(values))
    try:
        opened = folders.open_folder(folder)
        model = opened.model()
        assert isinstance(model, BagelModel)
    except RefineError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
    (folder / name).write_text((made[0] / name).read_text())
