"""LoRA files in every dialect: read, applied, written, and applied by diffusers itself."""

import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest
import toy
from diffusers import QwenImageEditPlusPipeline
from flax import linen as nn
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from reference_utils import randn, relative_error
from safetensors.numpy import load_file, save_file
from test_mmdit import SIZES, abstract_params, inputs, pair, reference_velocity, velocity

from refine_jax import loading
from refine_jax.convert.convert import convert_lora
from refine_jax.convert.lora import Adapter, combine, lightning_steps, merge, read_adapter, write_adapter
from refine_jax.errors import RefineError
from refine_jax.models.layers import init_lora
from refine_jax.models.mmdit import MMDiTConfig

ABSTRACT = {
    "mmdit": nn.meta.unbox(abstract_params(MMDiTConfig(**SIZES))),
    "vl": toy.model_config().abstract(("vl",))["vl"],
}
BLOCKS = SIZES["num_layers"]
# Our path -> the reference's name, (in, out); written down a second time, apart from the key tables.
LAYERS = {
    "mmdit/blocks/attn/to_q": ("transformer_blocks.{}.attn.to_q", (48, 48)),
    "mmdit/blocks/attn/to_out": ("transformer_blocks.{}.attn.to_out.0", (48, 48)),
    "mmdit/blocks/attn/add_k_proj": ("transformer_blocks.{}.attn.add_k_proj", (48, 48)),
    "mmdit/blocks/attn/to_add_out": ("transformer_blocks.{}.attn.to_add_out", (48, 48)),
    "mmdit/blocks/img_mod": ("transformer_blocks.{}.img_mod.1", (48, 288)),
    "mmdit/blocks/txt_mlp/up": ("transformer_blocks.{}.txt_mlp.net.0.proj", (48, 192)),
    "mmdit/blocks/img_mlp/down": ("transformer_blocks.{}.img_mlp.net.2", (192, 48)),
    "mmdit/img_in": ("img_in", (16, 48)),
    "mmdit/time_text_embed/linear_2": ("time_text_embed.timestep_embedder.linear_2", (48, 48)),
    "mmdit/norm_out": ("norm_out.linear", (48, 96)),
    "mmdit/proj_out": ("proj_out", (48, 16)),
}
AB, DOWN_UP = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
DEFAULT = (".lora_A.default.weight", ".lora_B.default.weight")
# style -> (dialect that is reported, prefix, suffixes, where alphas go)
STYLES = {
    "diffusers": ("peft", "transformer.", AB, "metadata"),
    "bare": ("peft", "", AB, "metadata"),
    "peft": ("peft", "base_model.model.", AB, "config"),
    "raw-peft": ("peft", "transformer.", DEFAULT, "metadata"),
    "alpha-keys": ("peft", "", AB, "keys"),
    "diffsynth": ("peft", "", DEFAULT, "keys"),
    "lightning": ("lightning", "", DOWN_UP, "keys"),
    "onetrainer": ("lightning", "transformer.", DOWN_UP, "keys"),
    "kohya": ("kohya", "lora_unet_", DOWN_UP, "keys"),
    "lycoris": ("kohya", "lycoris_", DOWN_UP, "keys"),
    "comfyui": ("comfyui", "diffusion_model.", AB, "keys"),
    "comfyui-down-up": ("comfyui", "diffusion_model.", DOWN_UP, "keys"),
}
# Those that diffusers reads as well.
SHARED = ["diffusers", "alpha-keys", "diffsynth", "lightning", "kohya", "comfyui", "comfyui-down-up"]


def spelled(style, name):
    prefix = STYLES[style][1]
    return prefix + (name.replace(".", "_") if prefix.endswith("_") else name)


def write(folder, style, updates, name="adapter_model.safetensors"):
    """updates: (layer, block) -> (a [in, r], b [r, out], alpha or None)."""
    _, _, suffixes, place = STYLES[style]
    tensors, ranks, alphas = {}, {}, {}
    for (layer, block), (a, b, alpha) in updates.items():
        module = LAYERS[layer][0].format(block)
        for suffix, matrix in zip(suffixes, (a, b)):
            tensors[spelled(style, module) + suffix] = np.ascontiguousarray(matrix.T)
        ranks["^" + module], alphas["^" + module] = a.shape[1], alpha or a.shape[1]
        if alpha is not None and place == "keys":
            tensors[spelled(style, module) + ".alpha"] = np.array(alpha, np.float32)
    config = dict(r=1, lora_alpha=1, rank_pattern=ranks, alpha_pattern=alphas, target_modules=[k[1:] for k in ranks])
    packed = {"transformer." + key if style != "bare" else key: value for key, value in config.items()}
    (folder / "adapter_config.json").unlink(missing_ok=True)
    if place == "config":
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    save_file(tensors, folder / name, {"lora_adapter_metadata": json.dumps(packed)} if place == "metadata" else None)
    return folder / name


def expected(updates, dtype=np.float32):
    leaves, ranks = {}, {}
    for layer in {layer for layer, _ in updates}:
        blocks = {block: update for (own, block), update in updates.items() if own == layer}
        inputs_, outputs = LAYERS[layer][1]
        rank, depth = max(a.shape[1] for a, _, _ in blocks.values()), BLOCKS if "blocks" in layer else 1
        # float16 loses small numbers, so what is scaled is float32.
        scaled = dtype == np.float16 and any(alpha not in (None, a.shape[1]) for a, _, alpha in blocks.values())
        wide = np.float32 if scaled else dtype
        a, b = np.zeros((depth, inputs_, rank), dtype), np.zeros((depth, rank, outputs), wide)
        for block, (own_a, own_b, alpha) in blocks.items():
            r = own_a.shape[1]
            a[block, :, :r] = own_a
            scale = np.float32(1 if alpha is None else alpha / r)
            b[block, :r] = own_b if scale == 1 else (own_b.astype(np.float32) * scale).astype(wide)
        ranks[layer] = tuple(blocks[i][0].shape[1] if i in blocks else 0 for i in range(depth))
        leaves |= {f"{layer}/a": a if "blocks" in layer else a[0], f"{layer}/b": b if "blocks" in layer else b[0]}
    return traverse_util.unflatten_dict(leaves, sep="/"), ranks


def draw_updates(seed, chosen, dtype=np.float32):
    """chosen: (layer, block) -> (rank, alpha)."""
    updates = {}
    for (layer, block), (rank, alpha) in chosen.items():
        (n_in, n_out), seed = LAYERS[layer][1], seed + 2
        scale = 0.5 / np.sqrt(n_in)
        updates[layer, block] = (
            (scale * randn(seed, n_in, rank)).astype(dtype),
            randn(seed + 1, rank, n_out).astype(dtype),
            alpha,
        )
    return updates


EVERYWHERE = {
    (layer, block): (2 + (block + index) % 2, (None, 1.0, 3.0)[index % 3])
    for index, layer in enumerate(LAYERS)
    for block in range(BLOCKS if "blocks" in layer else 1)
}


def assert_same(got, wanted):
    got, wanted = (traverse_util.flatten_dict(tree, sep="/") for tree in (got, wanted))
    assert got.keys() == wanted.keys()
    for path in wanted:
        assert got[path].dtype == wanted[path].dtype and got[path].shape == wanted[path].shape, path
        assert got[path].tobytes() == np.ascontiguousarray(wanted[path]).tobytes(), path


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("style", STYLES)
def test_reads(style, dtype, tmp_path):
    updates = draw_updates(1, EVERYWHERE, dtype)
    file = write(tmp_path, style, updates)
    trees, ranks = expected(updates, dtype)
    for path in (file, tmp_path, str(file)):
        adapter = read_adapter(path, ABSTRACT)
        assert_same(adapter.trees, trees)
        assert adapter.ranks == ranks and adapter.dialects == (STYLES[style][0],)


def test_a_scale_loses_no_small_numbers_of_float16(tmp_path):
    layer = next(layer for layer in LAYERS if "blocks" not in layer)
    inputs_, outputs = LAYERS[layer][1]
    b = (1e-4 * randn(3, 128, outputs)).astype(np.float16)
    file = write(tmp_path, "alpha-keys", {(layer, 0): (randn(2, inputs_, 128).astype(np.float16), b, 1.0)})
    adapter = read_adapter(file, ABSTRACT)
    found = traverse_util.flatten_dict(dict(adapter.trees), sep="/")[f"{layer}/b"]
    np.testing.assert_array_equal(found, b.astype(np.float32) / 128)
    found = traverse_util.flatten_dict(combine([adapter], [2**-10]), sep="/")[f"{layer}/b"]
    np.testing.assert_array_equal(found, b.astype(np.float32) / 2**17)


targets = [(layer, block) for layer in LAYERS for block in range(BLOCKS if "blocks" in layer else 1)]
sizes = st.tuples(st.integers(1, 4), st.sampled_from([None, 0.25, 1.0, 3.0, 8.0]))


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(st.sampled_from(targets), sizes, min_size=1, max_size=6), st.integers(0, 99))
def test_every_dialect_gives_the_same_tree(tmp_path_factory, chosen, seed):
    folder = tmp_path_factory.mktemp("lora")
    updates = draw_updates(seed, chosen)
    trees, _ = expected(updates)
    for style in STYLES:
        assert_same(read_adapter(write(folder, style, updates), ABSTRACT).trees, trees)


@pytest.mark.parametrize(
    "prefix",
    [
        "text_encoder.model.language_model.",
        "text_encoder.model.",
        "base_model.model.model.",
        "text_encoders.qwen25_7b.transformer.model.",
        "lora_te_",
        "lora_te1_model_language_model_",
        "lora_te_model_",
    ],
)
def test_reads_the_text_encoder(prefix, tmp_path):
    """Language-model layers under both of the reference's names, next to the transformer's."""
    a, b = randn(0, 2, 16), randn(1, 16, 2)
    q, proj = prefix + "layers.0.self_attn.q_proj", prefix.replace("language_model", "visual") + "blocks.0.attn.proj"
    if not prefix.endswith("model."):
        q = q.replace(".", "_")
    tensors = {q + ".lora_A.weight": a, q + ".lora_B.weight": b}
    tensors |= {"transformer.img_in.lora_A.weight": a, "transformer.img_in.lora_B.weight": randn(2, 48, 2)}
    if "language_model." in proj or "visual." in proj:
        tensors |= {proj + ".lora_A.weight": a, proj + ".lora_B.weight": b}
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = read_adapter(tmp_path, ABSTRACT)
    layer = adapter.trees["vl"]["language_model"]["layers"]["self_attn"]["q_proj"]
    np.testing.assert_array_equal(layer["a"], a.T[None])
    np.testing.assert_array_equal(layer["b"], b.T[None])
    assert ("visual" in adapter.trees["vl"]) == (prefix == "text_encoder.model.language_model.")
    assert adapter.trees["mmdit"]["img_in"]["a"].shape == (16, 2)


def test_reads_what_peft_and_diffusers_save(tmp_path):
    """`save_pretrained` of PEFT (rsLoRA), `save_lora_adapter` and `save_lora_weights` of diffusers, with patterns."""
    reference, config, _ = pair(3)
    common = dict(r=3, lora_alpha=5, target_modules=r".*attn\.(to_q|add_v_proj)|img_in", init_lora_weights=False)
    patterns = dict(rank_pattern={"to_q": 2, r".*\.0\.attn.add_v_proj": 4}, alpha_pattern={"attn.add_v_proj": 7})

    def check(folder, model):
        trees = read_adapter(folder, ABSTRACT).trees["mmdit"]
        count = 0
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                layer = name.removeprefix("base_model.model.").split(".")
                node = trees["img_in"] if layer[0] == "img_in" else trees["blocks"]["attn"][layer[3]]
                a, b = (x if x.ndim == 2 else x[int(layer[1])] for x in (node["a"], node["b"]))
                delta = module.get_delta_weight(module.active_adapters[0]).detach().T
                assert relative_error(a @ b, delta) <= 1e-6
                count += 1
        assert count == 2 * BLOCKS + 1

    for name, settings_ in {"one": patterns, "two": dict(use_rslora=True)}.items():
        reference.add_adapter(LoraConfig(**common, **settings_), adapter_name=name)
        reference.save_lora_adapter(tmp_path / name, adapter_name=name)
        check(tmp_path / name, reference)
        QwenImageEditPlusPipeline.save_lora_weights(
            tmp_path / f"pipeline-{name}",
            transformer_lora_layers=get_peft_model_state_dict(reference, adapter_name=name),
            transformer_lora_adapter_metadata=reference.peft_config[name].to_dict(),
        )
        check(tmp_path / f"pipeline-{name}", reference)
        reference.delete_adapters(name)
    model = get_peft_model(pair(3)[0], LoraConfig(**common, use_rslora=True))
    model.save_pretrained(tmp_path / "peft")
    check(tmp_path / "peft", model)


def test_a_configuration_is_of_its_own_network(tmp_path):
    """What the metadata says of the transformer leaves the text encoder's alpha at its rank."""
    a, b, q = np.ones((2, 16), np.float32), np.ones((16, 2), np.float32), "text_encoder.model.layers.0.self_attn.q_proj"
    tensors = {q + ".lora_A.weight": a, q + ".lora_B.weight": b}
    tensors |= {"transformer.img_in.lora_A.weight": a, "transformer.img_in.lora_B.weight": np.ones((48, 2), np.float32)}
    config = {"transformer.r": 2, "transformer.lora_alpha": 6}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    trees = read_adapter(tmp_path, ABSTRACT).trees
    assert (trees["vl"]["language_model"]["layers"]["self_attn"]["q_proj"]["b"] == 1).all()
    assert (trees["mmdit"]["img_in"]["b"] == 3).all()


# ----------------------------------------------------------------------------------------------------------- applying

GRIDS = [(3, 3), (2, 2)]


def delta(trees, layer):
    node = traverse_util.flatten_dict(trees, sep="/")
    return np.asarray(node[f"{layer}/a"], np.float64) @ np.asarray(node[f"{layer}/b"], np.float64)


@pytest.fixture(scope="module")
def network():
    """A reference transformer, our parameters, inputs."""
    reference, config, params = pair(8)
    return reference, config, params, inputs(config, GRIDS, batch=1, seed=8)


def adapter_of(seed, chosen):
    trees, ranks = expected(draw_updates(seed, chosen))
    return Adapter(trees, ranks=ranks)


def test_live_and_merged_agree(network):
    _, config, params, args = network
    adapters = [adapter_of(1, EVERYWHERE), adapter_of(2, {k: (3, 2.0) for k in list(EVERYWHERE)[:7]})]
    lora = combine(adapters, [0.75, -1.5])
    for layer in LAYERS:
        parts = [w * delta(x.trees, layer) for x, w in zip(adapters, (0.75, -1.5)) if layer in x.ranks]
        assert relative_error(delta(lora, layer), sum(parts)) <= 1e-6
    merged = merge({"mmdit": params}, lora)
    live = velocity(config, params, args, 9, lora=lora["mmdit"])
    assert relative_error(live, velocity(config, merged["mmdit"], args, 9)) <= 1e-5
    assert relative_error(live, velocity(config, params, args, 9)) > 1e-2
    # One after the other is the same as both at once; untouched leaves are passed on.
    twice = merge(merge({"mmdit": params}, combine(adapters[:1], [0.75])), combine(adapters[1:], [-1.5]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), twice, merged)
    assert merged["mmdit"]["txt_in"]["kernel"] is params["txt_in"]["kernel"]


def test_weight_one_changes_no_bit_and_dtypes_stay():
    half = Adapter(expected(draw_updates(1, EVERYWHERE, ml_dtypes.bfloat16), ml_dtypes.bfloat16)[0])
    assert_same(combine([half]), half.trees)
    assert_same(combine([half], [1]), half.trees)
    both = combine([half, adapter_of(2, EVERYWHERE)])["mmdit"]["img_in"]
    assert (
        both["a"].dtype == both["b"].dtype == np.float32
        and both["a"].shape[1] == 2 * half.trees["mmdit"]["img_in"]["a"].shape[1]
    )
    kernel = randn(0, 16, 48).astype(ml_dtypes.bfloat16)
    merged = merge({"mmdit": {"img_in": {"kernel": kernel}}}, {"mmdit": {"img_in": both}})["mmdit"]["img_in"]["kernel"]
    wanted = (kernel.astype(np.float32) + both["a"] @ both["b"]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(merged, wanted)
    assert merged.dtype == kernel.dtype and combine([]) == {}
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "model"))
    placed = {"mmdit": {"img_in": {"kernel": jax.device_put(kernel, sharding)}}}
    placed = merge(placed, {"mmdit": {"img_in": both}})["mmdit"]["img_in"]["kernel"]
    np.testing.assert_array_equal(np.asarray(placed), wanted)
    assert placed.sharding == sharding and placed.dtype == kernel.dtype


def test_combine_and_merge_check_what_they_get(network):
    adapter = adapter_of(1, EVERYWHERE)
    with pytest.raises(RefineError, match="2 given for 1 adapters"):
        combine([adapter], [1, 1])
    for weight in (float("nan"), "1"):
        with pytest.raises(RefineError, match="finite number"):
            combine([adapter], [weight])
    other = Adapter({"mmdit": {"img_in": {"a": randn(0, 8, 2), "b": randn(1, 2, 48)}}})
    with pytest.raises(RefineError, match="other sizes"):
        combine([adapter, other])
    with pytest.raises(RefineError, match=r"mmdit/img_in: \[8, 2\] x \[2, 48\], kernel \[16, 48\]"):
        merge({"mmdit": network[2]}, other.trees)
    with pytest.raises(RefineError, match="vl/x: the model has no dense layer"):
        merge({"mmdit": network[2]}, {"vl": {"x": other.trees["mmdit"]["img_in"]}})
    with pytest.raises(RefineError, match="expected a"):
        merge({"mmdit": network[2]}, {"mmdit": {"img_in": {"a": randn(0, 16, 2)}}})


# -------------------------------------------------------------------------------------------------- equal to diffusers


def adapted_by_diffusers(network, file):
    """The reference's velocity with the file loaded by the pipeline, and the scales that it applies."""
    reference, _, _, args = network
    pipeline = QwenImageEditPlusPipeline(
        scheduler=None, vae=None, text_encoder=None, tokenizer=None, processor=None, transformer=reference
    )
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="x")
    layers = [module for module in reference.modules() if isinstance(module, LoraLayer)]
    result = reference_velocity(reference, args, GRIDS), {module.scaling["x"] for module in layers}, len(layers)
    reference.delete_adapters("x")
    return result


@pytest.mark.parametrize("style", SHARED)
def test_velocity_equals_diffusers(style, network, tmp_path):
    file = write(tmp_path, style, draw_updates(1, EVERYWHERE))
    theirs, _, count = adapted_by_diffusers(network, file)
    assert count == len(EVERYWHERE)
    _, config, params, args = network
    variables = merge({"mmdit": params}, combine([read_adapter(file, ABSTRACT)]))
    assert relative_error(velocity(config, variables["mmdit"], args, 9), theirs) <= 1e-4
    assert relative_error(velocity(config, params, args, 9), theirs) > 1e-2


# ------------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("dialect", ["peft", "comfyui"])
def test_export_round_trip(dialect, network, tmp_path):
    trees, _ = expected(draw_updates(5, EVERYWHERE))
    file = tmp_path / "new" / "trained.safetensors"
    write_adapter(file, jax.tree.map(jax.numpy.asarray, trees), dialect, {"trained_with": "refine_jax"})
    assert os.listdir(file.parent) == [file.name] and file.stat().st_mode & 0o44
    adapter = read_adapter(file, ABSTRACT)
    assert_same(adapter.trees, trees)
    assert adapter.dialects == (dialect,)
    theirs, scales, _ = adapted_by_diffusers(network, file)
    assert scales == {1.0}
    _, config, params, args = network
    assert relative_error(velocity(config, merge({"mmdit": params}, trees)["mmdit"], args, 9), theirs) <= 1e-4


def test_rewriting_keeps_what_an_adapter_says_of_its_base(tmp_path):
    model = toy.model_config()
    tree = init_lora(jax.random.key(0), model.abstract(("mmdit",))["mmdit"], "blocks/attn/to_q", 2)
    said = loading.adapter_metadata(model)
    write_adapter(tmp_path / "ours.safetensors", {"mmdit": tree}, metadata=said)
    convert_lora(tmp_path / "ours.safetensors", tmp_path / "comfy.safetensors", "comfyui", model)
    plain = read_adapter(tmp_path / "comfy.safetensors", model.abstract())
    assert said and said.items() <= plain.metadata.items() and lightning_steps(plain) is None
    # What a Lightning adapter's name says of its steps outlives the name.
    named = tmp_path / "Some-Lightning-8steps-V1.safetensors"
    write_adapter(named, {"mmdit": tree})
    for source, target in ((named, "fast.safetensors"), (tmp_path / "fast.safetensors", "again.safetensors")):
        convert_lora(source, tmp_path / target, "comfyui", model)
        assert lightning_steps(read_adapter(tmp_path / target, model.abstract())) == 8


@pytest.mark.parametrize("dialect", ["peft", "comfyui"])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_export_keeps_bits_of_both_networks(dialect, dtype, tmp_path):
    trees = expected(draw_updates(5, {k: v for k, v in EVERYWHERE.items() if k[1] != 1}, dtype), dtype)[0]
    trees["vl"] = {
        "language_model": {"layers": {"mlp": {"up_proj": {"a": randn(0, 1, 16, 2), "b": randn(1, 1, 2, 16)}}}},
        "visual": {"merger": {"fc2": {"a": randn(2, 64, 3), "b": randn(3, 3, 16)}}},
    }
    trees["vl"] = jax.tree.map(lambda x: x.astype(dtype), trees["vl"])
    write_adapter(tmp_path / "x.safetensors", trees, dialect)
    assert_same(read_adapter(tmp_path, ABSTRACT).trees, trees)
    prefix = {"peft": "text_encoder.model.visual.", "comfyui": "text_encoders.qwen25_7b.transformer.visual."}[dialect]
    assert prefix + "merger.mlp.2.lora_A.weight" in load_file(tmp_path / "x.safetensors")


def test_export_checks_what_it_gets(tmp_path):
    good = {"mmdit": {"img_in": {"a": randn(0, 16, 2), "b": randn(1, 2, 48)}}}
    file = tmp_path / "x.safetensors"
    for match, arguments in {
        "dialect 'kohya'": (file, good, "kohya"),
        "written as .safetensors": (tmp_path / "x.bin", good),
        "LoRA of 'vae'": (file, {"vae": good["mmdit"]}),
        "blocks_0/attn/to_q: not a dense layer": (
            file,
            {"mmdit": {"blocks_0": {"attn": {"to_q": good["mmdit"]["img_in"]}}}},
        ),
        "img_in: not a dense layer": (file, jax.tree.map(lambda x: x.astype(np.float64), good)),
        "empty": (file, {}),
        "cannot be written": (tmp_path / "y" / "x.safetensors", good),
    }.items():
        (tmp_path / "y").write_text("a file") if match == "cannot be written" else None
        with pytest.raises(RefineError, match=match):
            write_adapter(*arguments)
    assert os.listdir(tmp_path) == ["y"]


# ------------------------------------------------------------------------------------------------------------- errors

A, B = np.ones((2, 48), np.float32), np.ones((48, 2), np.float32)
Q, QA, QB, QALPHA = (f"transformer_blocks.0.attn.to_q{end}" for end in ("", *AB, ".alpha"))
GOOD = {QA: A, QB: B}
BAD = {
    "unknown keys: transformer_blocks.0.attn.to_x.lora_A.weight": {**GOOD, Q[:-1] + "x.lora_A.weight": A},
    "unknown keys: transformer_blocks.3.attn.to_q.lora_A.weight": {**GOOD, QA.replace("0", "3"): A},
    "unknown keys: lora_unet_norm.out.alpha": {**GOOD, "lora_unet_norm.out.alpha": A},
    "holds whole weights, such as transformer_blocks.0.attn.to_q.weight": {Q + ".weight": A},
    "without their counterpart: transformer_blocks.0.attn.to_q.lora_A.weight": {QA: A},
    "without their counterpart: transformer_blocks.0.attn.to_k.alpha": {**GOOD, QALPHA.replace("_q", "_k"): A[0, 0:1]},
    r"wrong shapes: .*to_q.lora_A.weight \[2, 47\], expected \[r, 48\]": {QA: A[:, :47].copy(), QB: B},
    r"wrong shapes: .*to_q.lora_B.weight \[47, 2\], expected \[48, r\]": {QA: A, QB: B[:47]},
    r"lora_B.weight \[48, 2, 1, 1\]": {QA: A, QB: B[..., None, None]},
    r"lora_A.weight \[0, 48\]": {QA: A[:0], QB: B[:, :0]},
    "ranks that disagree: 2 of .* and 3 of": {QA: A, QB: np.ones((48, 3), np.float32)},
    "DoRA.*: transformer_blocks.0.attn.to_q.dora_scale": {**GOOD, Q + ".dora_scale": A},
    "DoRA.*lora_magnitude_vector": {**GOOD, Q + ".lora_magnitude_vector": A},
    "LoHa, LoKr.*: lycoris_img_in.hada_w1_a": {"lycoris_img_in.hada_w1_a": A},
    "LoHa, LoKr.*: lycoris_img_in.lokr_w1": {"lycoris_img_in.lokr_w1": A},
    "patches of whole weights.*: diffusion_model.img_in.diff_b": {**GOOD, "diffusion_model.img_in.diff_b": A},
    "biases of LoRA.*: transformer_blocks.0.attn.to_q.lora_B.bias": {**GOOD, Q + ".lora_B.bias": A},
    "not dense layers: transformer_blocks.0.attn.norm_q.lora_A.weight": {**GOOD, QA.replace("to_q", "norm_q"): A},
    "not dense layers: text_encoder.model.embed_tokens": {**GOOD, "text_encoder.model.embed_tokens.lora_A.weight": A},
    "convolutions or embeddings: .*embed_tokens": {**GOOD, "text_encoder.model.embed_tokens.lora_embedding_A": A},
    "the same thing twice: .*to_q.lora_A.weight and": {**GOOD, "transformer." + QA: A},
    "alphas that are not finite: .*alpha": {**GOOD, QALPHA: np.array(np.nan, np.float32)},
    "expected one number": {**GOOD, QALPHA: A},
    "not finite: .*lora_B": {QA: A, QB: B * np.float32(np.inf)},
    "F64 of .*lora_A": {QA: A.astype(np.float64), QB: B},
    "the file is empty": {},
    "unknown keys: x0, x1, .*x9": {f"x{i}": A for i in range(10)},
    r"unknown keys: 'a\\nb'": {"a\nb": A},
}  # fmt: skip


@pytest.mark.parametrize("match", BAD)
def test_what_does_not_fit_is_listed(match, tmp_path):
    save_file(BAD[match], tmp_path / "bad.safetensors")
    with pytest.raises(RefineError, match=match) as error:
        read_adapter(tmp_path, ABSTRACT)
    assert str(tmp_path / "bad.safetensors") in str(error.value) and "\n" not in str(error.value)


def test_all_offenders_in_one_error(tmp_path):
    save_file({QA: A, "x": A, Q + ".dora_scale": A, "img_in.lora_B.weight": B}, tmp_path / "bad.safetensors")
    with pytest.raises(RefineError, match="DoRA.*unknown keys: x.*img_in.lora_B.weight"):
        read_adapter(tmp_path, ABSTRACT)


@pytest.mark.parametrize(
    "match, metadata",
    {
        "cannot be read": "{",
        "not an object": "[]",
        "recursion|Expecting": "[" * 100_000,
        "asks for more than LoRA: use_dora": '{"use_dora": true}',
        "asks for more than LoRA: peft_type": '{"peft_type": "IA3"}',
        "changed base .*path_initial_.*: init_lora_weights pissa_niter_4": '{"init_lora_weights": "PISSA_niter_4"}',
        "changed base .*: init_lora_weights olora": '{"r": 2, "lora_alpha": 4, "init_lora_weights": "olora"}',
        "ranks that disagree: 2 of .* and 3": '{"r": 3, "lora_alpha": 3}',
        "not finite": '{"r": 2, "lora_alpha": NaN}',
        "cannot be read: .*list": '{"r": [2], "lora_alpha": 1}',
        "cannot be read: pattern": '{"r": 2, "alpha_pattern": {"(.*)*x": 1}}',
        "cannot be read: .*unterminated": '{"r": 2, "alpha_pattern": {"(": 1}}',
        "alphas that disagree: 4 of .* and 2": '{"r": 2, "lora_alpha": 2}',
    }.items(),
)
def test_bad_configurations(match, metadata, tmp_path):
    alpha = {QALPHA: np.array(4, np.float32)} if "4 of" in match else {}
    save_file({**GOOD, **alpha}, tmp_path / "x.safetensors", {"lora_adapter_metadata": metadata})
    with pytest.raises(RefineError, match=match):
        read_adapter(tmp_path, ABSTRACT)
    save_file({**GOOD, **alpha}, tmp_path / "x.safetensors")
    (tmp_path / "adapter_config.json").write_text(metadata)
    with pytest.raises(RefineError, match=match):
        read_adapter(tmp_path, ABSTRACT)
    # Next to other files it is nobody's.
    save_file(GOOD, tmp_path / "y.safetensors")
    read_adapter(tmp_path / "y.safetensors", ABSTRACT)


def test_damaged_and_missing_files(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(GOOD, file)
    whole = file.read_bytes()
    damaged = {
        "truncated": whole[:-10],
        "header cut": whole[:40],
        "empty": b"",
        "short": b"\x01\x02",
        "absurd header": (2**62).to_bytes(8, "little") + whole[8:],
        "no JSON": whole[:8] + b"\xff" * (len(whole) - 8),
        "long": whole + b"more",
    }
    for name, content in damaged.items():
        file.write_bytes(content)
        with pytest.raises(RefineError, match="x.safetensors: cannot be read"):
            read_adapter(file, ABSTRACT), name
    for match, path in {
        "no such file": tmp_path / "missing.safetensors",
        "holds 0 .safetensors files": tmp_path / "none",
        "holds 2 .safetensors files .*a.safetensors, b": tmp_path / "two",
        "b: no such file": "a\0b",
    }.items():
        (tmp_path / "none").mkdir(exist_ok=True)
        (tmp_path / "two" / "a.safetensors").mkdir(exist_ok=True, parents=True)
        (tmp_path / "two" / "b.safetensors").mkdir(exist_ok=True)
        with pytest.raises(RefineError, match=match):
            read_adapter(path, ABSTRACT)
