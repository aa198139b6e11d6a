"""Weights in 8 bits: the numbers, the networks on them, and every way in which such a model is loaded."""

import dataclasses
import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import toy
from flax import linen as nn
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import PartitionSpec

from refine_jax import checkpoint, loading, parallel
from refine_jax.convert import lora
from refine_jax.convert.convert import convert
from refine_jax.errors import RefineError
from refine_jax.model import PUBLISHED, ModelConfig
from refine_jax.models import quantize
from refine_jax.models.bagel import Bagel, BagelConfig, segment
from refine_jax.models.layers import init_lora
from refine_jax.models.mmdit import MMDiT
from refine_jax.models.qwen_vl import QwenVL, mrope_positions
from refine_jax.models.siglip import SiglipConfig


def flatten(tree) -> dict:
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat) -> dict:
    return traverse_util.unflatten_dict(flat, sep="/")


def same(a, b) -> bool:
    """Whether two trees have the same leaves, dtypes and bits."""
    check = lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(check, a, b))


def error(ours, theirs) -> float:
    """Root mean square of the difference, of theirs."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)))


def in_8_bits(tree, abstract) -> dict:
    """A tree in full with the int8 matrices that `abstract` wants, made one by one."""
    flat = flatten(tree)
    for path, scale in quantize.quantized_paths(flatten(abstract)).items():
        flat[path], flat[scale] = quantize.quantize(flat[path])
    return unflatten(flat)


def in_full(tree) -> dict:
    """The numbers that the int8 matrices of `tree` stand for, as float32."""
    flat = flatten(tree)
    for path, scale in quantize.quantized_paths(flat).items():
        flat[path] = quantize.dequantize(flat[path], flat.pop(scale))
    return unflatten(flat)


# --------------------------------------------------------------------------------------------------------- the numbers

NUMBERS = st.floats(-(2.0**121), 2.0**121, width=32) | st.floats(-1, 1, width=32) | st.sampled_from([0.0, -0.0, -1e-38])


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 4)).flatmap(
        lambda sides: arrays(np.float32, (2, *sides), elements=NUMBERS)
    ),
    st.sampled_from([np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]),
    st.integers(0, 3),
)
def test_no_weight_moves_by_more_than_half_a_step(kernel, kind, empty):
    kernel = np.clip(kernel, -6e4, 6e4) if kind == np.float16 else kernel
    kernel = kernel.astype(kind)
    kernel[..., min(empty, kernel.shape[-1] - 1)] = 0
    values, scale = quantize.quantize(kernel)
    assert values.shape == kernel.shape and scale.shape == (2, kernel.shape[-1])
    assert (values.dtype, scale.dtype) == (np.int8, np.float32) and np.abs(values.astype(int)).max() <= 127
    exact, step = kernel.astype(np.float64), scale.astype(np.float64)[:, None]
    assert (np.abs(exact - values * step) <= step / 2 * (1 + 1e-4)).all()
    assert (values[exact == 0] == 0).all() and (step > 0).all() and np.isfinite(step).all()
    largest = np.abs(exact).max(1)
    assert (np.abs(values.astype(int)).max(1)[largest > 1e-28] == 127).all(), "a column's largest takes the last level"


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16])
def test_numpy_and_jax_give_the_same_bits(kind):
    kernel = (np.random.default_rng(0).standard_normal((3, 64, 96)) * np.logspace(-30, 30, 96)).astype(kind)
    values, scale = quantize.quantize(kernel)
    assert same((values, scale), jax.jit(quantize.quantize)(jnp.asarray(kernel)))
    transposed = np.ascontiguousarray(kernel[0].T).T  # as a matrix of PyTorch comes
    assert same(quantize.quantize(transposed), (values[0], scale[0]))


# -------------------------------------------------------------------------------------------------------- the networks


def mmdit_inputs(model: ModelConfig) -> tuple:
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    positions = np.stack(np.meshgrid([0], [0, 1], [0, 1, 2], indexing="ij"), -1).reshape(1, 6, 3).astype(np.int32)
    text = (1, 5, model.mmdit.joint_attention_dim)
    return (
        draw(1, 6, model.mmdit.in_channels),
        draw(*text),
        np.full(1, 0.5, np.float32),
        positions,
        np.zeros((1, 5), int),
    )


@functools.partial(jax.jit, static_argnums=0)
def _mmdit(config, params, adapter, inputs):
    return MMDiT(config).apply({"params": params, "lora": adapter}, *inputs, target_length=6)


def run_mmdit(model: ModelConfig, params, adapter=None) -> np.ndarray:
    return np.asarray(_mmdit(model.mmdit, params, adapter or {}, mmdit_inputs(model)))


@functools.partial(jax.jit, static_argnums=0)
def _vl(config, params, adapter, inputs):
    return QwenVL(config).apply({"params": params, "lora": adapter}, *inputs, grids=[(4, 4)])


def run_vl(model: ModelConfig, params, adapter=None) -> np.ndarray:
    patches = np.random.default_rng(2).standard_normal((1, 16, model.vl.vision.patch_dim)).astype(np.float32)
    order, image = np.arange(12), model.vl.image_token_id
    ids = np.where((order >= 3) & (order < 7), image, 100 + order)
    index = np.where(ids == image, order - 3, -1)
    inputs = ids[None], np.ones((1, 12), bool), mrope_positions(ids, [(4, 4)], image)[None], [patches], index[None]
    return np.asarray(_vl(model.vl, params, adapter or {}, inputs), np.float32)


@pytest.fixture(scope="module")
def toys():
    """(model, its variables, the model in 8 bits, its variables), wide enough for an error to say something."""
    model = toy.model_config()
    mmdit = dataclasses.replace(model.mmdit, num_attention_heads=8, joint_attention_dim=64)
    text = dataclasses.replace(model.vl.text, hidden_size=64, intermediate_size=96, num_attention_heads=8)
    vision = dataclasses.replace(model.vl.vision, hidden_size=64, intermediate_size=96, out_hidden_size=64)
    vl = dataclasses.replace(model.vl, text=text, vision=vision)
    model = dataclasses.replace(model, mmdit=mmdit, vl=vl)
    variables = jax.tree.map(np.float32, toy.random_variables(model))
    small = loading.quantized(model, "int8")
    return model, variables, small, in_8_bits(variables, small.abstract())


@pytest.mark.parametrize("name,run", [("mmdit", run_mmdit), ("vl", run_vl)])
def test_a_network_on_int8_is_the_network_on_what_they_stand_for(toys, name, run):
    """To float32's rounding, with an adapter on top and without; and not far from the one they were made of."""
    model, variables, small, quantized = toys
    targets = r".*(blocks|layers)/.*"
    adapter = jax.tree.map(lambda x: x + 0.02, init_lora(jax.random.key(0), variables[name], targets, 4))
    got = run(small, quantized[name])
    assert error(got, run(model, in_full(quantized[name]))) < 2e-6
    assert 1e-4 < error(got, run(model, variables[name])) < 0.02
    adapted = run(small, quantized[name], adapter)
    assert error(adapted, run(model, in_full(quantized[name]), adapter)) < 2e-6 and error(adapted, got) > 0.05


def test_in_bfloat16_a_result_is_rounded_as_without(toys):
    """The int8 are exact in bfloat16 and the scale stays float32: nothing but the products' own rounding is added."""
    model, _, small, quantized = toys
    half = lambda m: dataclasses.replace(m, mmdit=dataclasses.replace(m.mmdit, dtype="bfloat16"))
    exact = run_mmdit(model, in_full(quantized["mmdit"]))
    plain = error(run_mmdit(half(model), in_full(quantized["mmdit"])), exact)
    assert error(run_mmdit(half(small), quantized["mmdit"]), exact) < 1.3 * plain < 0.02


def test_the_matrices_of_the_blocks_are_int8_and_nothing_else(toys):
    model, variables, small, quantized = toys
    abstract = flatten(small.abstract())
    assert {k: (v.shape, v.dtype) for k, v in abstract.items()} == {
        k: (v.shape, v.dtype) for k, v in flatten(quantized).items()
    }
    scales = quantize.quantized_paths(abstract)
    within = ("mmdit/blocks/", "vl/visual/blocks/", "vl/language_model/layers/")
    kernels = {path for path in flatten(variables) if path.startswith(within) and path.endswith("/kernel")}
    assert kernels == scales.keys() and len(kernels) == 14 + 5 + 7
    count = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    saved = sum(3 * abstract[path].size - 4 * abstract[scale].size for path, scale in scales.items())
    assert count(quantized) == count(variables) - saved
    # Nothing that is there by default changes.
    assert flatten(model.abstract()).keys() == flatten(variables).keys() and model == loading.quantized(model, None)


def test_the_released_models_fit():
    """Two bytes a parameter do not fit 40 GB, nor 16 GiB on each of four chips; these do, each part on its axis."""
    half = dict(dtype="bfloat16", param_dtype="bfloat16")
    model = PUBLISHED["qwen-image-edit-2511"]
    parts = {name: dataclasses.replace(getattr(model, name), **half) for name in ("mmdit", "vae", "vl")}
    model = loading.quantized(dataclasses.replace(model, **parts), "int8")
    boxed = model.boxed()
    leaves = jax.tree.leaves(nn.meta.unbox(boxed))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert {leaf.dtype.name for leaf in leaves} == {"int8", "bfloat16", "float32"} and 26.5 < total / 2**30 < 27
    mesh = jax.sharding.AbstractMesh((1, 1, 2, 2, 1), parallel.MESH_AXES)
    placed = flatten(parallel.param_shardings(boxed, mesh))
    assert placed["mmdit/blocks/img_mlp/up/kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert placed["mmdit/blocks/img_mlp/up/kernel_scale"].spec == PartitionSpec(None, "tensor")
    assert placed["mmdit/blocks/img_mlp/down/kernel_scale"].spec == PartitionSpec(None, "fsdp")
    shards = zip(jax.tree.leaves(parallel.param_shardings(boxed, mesh)), leaves, strict=True)
    held = sum(np.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize for where, leaf in shards)
    assert held < 1.03 * total / 4


def test_bagels_layers():
    kinds = dict(dtype="float32", param_dtype="float32")
    vit = SiglipConfig(hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, image_size=28)
    config = BagelConfig(
        **dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
        **dict(num_key_value_heads=2, vocab_size=40, latent_channels=4, vit=vit, **kinds),
    )
    small = dataclasses.replace(config, param_dtype="int8")
    ids = jnp.arange(6)[None]
    where = segment(6, count=6, segment=0, position=0, causal=True)
    latents = jnp.asarray(np.random.default_rng(3).standard_normal((1, 4, config.latent_dim)), jnp.float32)
    there = segment(4, count=4, segment=1, position=6, noisy=True)
    inputs = dict(latents=latents, t=jnp.full(1, 0.5), latent_positions=jnp.arange(4)[None], gen_segments=there)
    start = lambda config: Bagel(config).init(jax.random.key(0), ids, where, **inputs)["params"]
    rng = np.random.default_rng(4)
    shapes = nn.meta.unbox(jax.eval_shape(lambda: start(config)))
    draw = lambda leaf: rng.standard_normal(leaf.shape, np.float32) / np.sqrt(leaf.shape[-2] if leaf.ndim > 1 else 1)
    params = jax.tree.map(draw, shapes)
    quantized = in_8_bits(params, nn.meta.unbox(jax.eval_shape(lambda: start(small))))
    paths = quantize.quantized_paths(flatten(quantized))
    assert len(paths) == 2 * 7 and all(path.startswith("decoder/layers/") for path in paths)
    apply = lambda config, params: Bagel(config).apply({"params": params}, ids, where, **inputs)
    run = jax.jit(apply, static_argnums=0)
    for ours, theirs, other in zip(run(small, quantized), run(config, in_full(quantized)), run(config, params)):
        assert error(ours, theirs) < 2e-6 and 1e-4 < error(ours, other) < 0.03


# ------------------------------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model in every layout: of PyTorch files, converted (orbax), and as our trainer writes it; and an adapter."""
    from reference_pipeline import (  # not in the process that a test starts here
        random_lora,
        save_pipeline,
        tiny_pipeline,
    )

    base = tmp_path_factory.mktemp("models")
    pipe = tiny_pipeline(base / "tokenizer", 30)
    save_pipeline(pipe, base / "source")
    random_lora(pipe, base / "adapter.safetensors", 5, 3, ("to_q", "img_mod.1", "net.2"))
    random_lora(pipe, base / "edge.safetensors", 6, 2, ("img_in", "add_v_proj"))
    convert(base / "source", base / "converted")
    loaded = loading.load(base / "source")
    manifest = json.loads((base / "converted" / checkpoint.MANIFEST).read_text())
    (base / "own").mkdir()
    (base / "converted" / "tokenizer").rename(base / "own" / "tokenizer")
    (base / "converted" / "tokenizer").symlink_to(base / "own" / "tokenizer")
    checkpoint.save_model(base / "own", {k: v for k, v in manifest.items() if k != "format"}, loaded.variables)
    return base, loaded


DOORS = ("source", "converted", "own")


def test_every_door_gives_the_same_int8(folders, monkeypatch):
    """Of the numbers in the files, whatever the dtype; one matrix in full at a time, the largest first."""
    base, loaded = folders
    asked, restore = [], checkpoint._restore

    def counted(checkpointer, path, leaves, partial):
        asked.append([leaf.size * (name.endswith("/kernel")) for name, leaf in leaves.items()])
        return restore(checkpointer, path, leaves, partial)

    monkeypatch.setattr(checkpoint, "_restore", counted)
    small = loading.quantized(loaded.config, "int8")
    expected = in_8_bits(loaded.variables, small.abstract())
    assert same(loading.load(base / "own", quantize="int8").variables, expected)
    rounded = lambda leaf: leaf.astype(ml_dtypes.bfloat16)
    pairs = quantize.quantized_paths(flatten(expected))
    eights = {*pairs.keys(), *pairs.values()}
    expected = {path: leaf if path in eights else rounded(leaf) for path, leaf in flatten(expected).items()}
    for door in ("source", "converted"):
        got = loading.load(base / door, quantize="int8", dtype="bfloat16")
        assert same(got.variables, unflatten(expected)), door
        assert (got.config.mmdit.param_dtype, got.config.vl.param_dtype, got.config.vae.param_dtype) == (
            *("int8", "int8", "bfloat16"),
        )
    mmdit = asked[:15]
    assert all(len(sizes) == 1 for sizes in mmdit[:14]) and mmdit[:14] == sorted(mmdit[:14], reverse=True)
    assert len(mmdit[14]) > 14 and max(mmdit[14]) < mmdit[0][0]


@pytest.fixture(scope="module")
def merged(folders):
    """(adapters, the variables that merging and quantising give, the config)."""
    base, loaded = folders
    given = [base / "adapter.safetensors", (base / "edge.safetensors", 0.5)]
    abstract = loaded.config.abstract()
    extra = lora.combine([lora.read_adapter(path, abstract) for path in (given[0], given[1][0])], [1.0, 0.5])
    small = loading.quantized(loaded.config, "int8")
    full = lora.merge(loaded.variables, extra)
    return given, full, in_8_bits(full, small.abstract()), small


def test_what_is_merged_is_merged_before(folders, merged):
    base, loaded = folders
    given, _, expected, small = merged
    plain = flatten(in_8_bits(loaded.variables, small.abstract()))
    for name in ("attn/to_q", "img_mod", "txt_mlp/down"):
        assert not same(plain[f"mmdit/blocks/{name}/kernel"], flatten(expected)[f"mmdit/blocks/{name}/kernel"])
    for door in DOORS:
        got = loading.load(base / door, quantize="int8", adapters=given, merge=True)
        assert same(got.variables, expected) and got.lora == {} and got.config == small, door


def test_live_adapters_stay_beside(folders, merged):
    given, full, *_ = merged
    got = loading.load(folders[0] / "converted", quantize="int8", adapters=given)
    live = run_mmdit(got.config, got.variables["mmdit"], got.lora["mmdit"])
    expected = run_mmdit(folders[1].config, full["mmdit"])
    without = run_mmdit(folders[1].config, folders[1].variables["mmdit"])
    assert error(live, expected) < 0.03 < error(without, expected)


def digest(tree) -> str:
    """Of all leaves, their names and dtypes."""
    parts = [
        f"{path} {leaf.dtype} {leaf.shape}".encode() + np.asarray(leaf).tobytes()
        for path, leaf in flatten(tree).items()
    ]
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()


def on_four_devices(folder: str, result: str) -> None:
    """Runs in a process of its own: loads on 2 x 2 virtual devices; writes digests, what a device holds, an output."""
    mesh = parallel.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    given = [Path(folder) / "adapter.safetensors", (Path(folder) / "edge.safetensors", 0.5)]
    digests = {}
    for door in DOORS:
        four = loading.load(Path(folder) / door, quantize="int8", adapters=given, merge=True, mesh=mesh)
        digests[door] = digest(four.variables)
    held = {device: 0 for device in mesh.devices.flat}
    for leaf in jax.tree.leaves(four.variables["mmdit"]["blocks"]):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    with jax.set_mesh(mesh), nn.logical_axis_rules(parallel.DEFAULT_RULES):
        np.save(result, run_mmdit(four.config, four.variables["mmdit"]))
    print(json.dumps({"digests": digests, "held": max(held.values())}))


def test_four_devices_hold_a_quarter_and_compute_the_same(folders, merged, tmp_path):
    *_, expected, small = merged
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    arguments = f"{str(folders[0])!r}, {str(tmp_path / 'output.npy')!r}"
    done = subprocess.run(
        [sys.executable, "-c", f"import test_quantize; test_quantize.on_four_devices({arguments})"],
        cwd=Path(__file__).parent,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["digests"] == dict.fromkeys(DOORS, digest(expected))
    assert result["held"] < 0.4 * sum(leaf.nbytes for leaf in jax.tree.leaves(expected["mmdit"]["blocks"]))
    assert error(np.load(tmp_path / "output.npy"), run_mmdit(small, expected["mmdit"])) < 2e-6


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("kind", ["int4", "INT8", "", 8])
def test_another_kind_is_an_error(folders, kind):
    for refuse in (
        lambda: loading.load(folders[0] / "own", quantize=kind),
        lambda: loading.quantized(folders[1].config, kind),
    ):
        with pytest.raises(RefineError, match=f"quantize {kind!r}: give 'int8', or leave it out"):
            refuse()


def test_numbers_that_are_not_finite_are_named(folders, tmp_path):
    base, loaded = folders
    variables = jax.tree.map(np.array, loaded.variables)
    variables["mmdit"]["blocks"]["img_mlp"]["up"]["kernel"][1, 3, 2] = np.inf
    manifest = json.loads((base / "own" / checkpoint.MANIFEST).read_text())
    (tmp_path / "tokenizer").symlink_to(base / "own" / "tokenizer")
    checkpoint.save_model(tmp_path, {k: v for k, v in manifest.items() if k != "format"}, variables)
    with pytest.raises(RefineError, match="mmdit/blocks/img_mlp/up/kernel: holds numbers that are not finite"):
        loading.load(tmp_path, quantize="int8")


def test_a_stored_model_is_never_int8(folders):
    """What training and converting write says nothing of 8 bits: loading decides."""
    base, loaded = folders
    for door in ("converted", "own"):
        assert "int8" not in (base / door / checkpoint.MANIFEST).read_text()
    assert "int8" not in json.dumps(loaded.config.to_manifest())
