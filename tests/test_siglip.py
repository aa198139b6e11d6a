"""BAGEL's SigLIP tower against the authors' numbers and, live, against transformers' `SiglipVisionModel`."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.linen import meta
from reference_utils import largest_error, meta_shapes, numpy_state, randn, randomise, relative_error
from transformers import SiglipVisionConfig, SiglipVisionModel

from refine_jax.convert.keys_siglip import SIGLIP_TABLE, linear_from_conv2d, siglip_table
from refine_jax.convert.mapping import assign, reference_shapes, to_reference, to_tree
from refine_jax.errors import RefineError
from refine_jax.models import siglip
from refine_jax.models.layers import init_lora
from refine_jax.models.mmdit import unstack_blocks
from refine_jax.models.siglip import Siglip, SiglipConfig, pixels_to_patches, position_ids

# Weights (under the released names), inputs and outputs of `SiglipVisionModel` in modeling/bagel/siglip_navit.py of
# github.com/LeapLabTHU/RvR after `convert_conv2d_to_linear`, float32 throughout: flash attention's place was taken by a
# float32 softmax over each image. The configuration is GOLDEN with one layer fewer, as its loader builds it. Weights
# are from numpy's generator, rounded to float16. Three images were packed into one sequence, normalised and cut by the
# authors' transform (0.5, 0.5), `patchify` and `get_flattened_position_ids_extrapolate`.
GOLDEN = dict(
    hidden_size=32,
    intermediate_size=44,
    num_hidden_layers=3,
    num_attention_heads=4,
    patch_size=4,
    image_size=28,
    model_type="siglip_vision_model",
)
RELEASED = dict(
    hidden_size=1152,
    image_size=980,
    intermediate_size=4304,
    model_type="siglip_vision_model",
    num_attention_heads=16,
    num_hidden_layers=27,
    patch_size=14,
)
CONFIG = SiglipConfig.from_dict(GOLDEN)


def abstract(config: SiglipConfig) -> dict:
    args = (jnp.zeros((1, 2, config.patch_dim)), jnp.zeros((1, 2), jnp.int32))
    return meta.unbox(jax.eval_shape(Siglip(config).init, jax.random.key(0), *args))["params"]


@functools.cache
def golden():
    """(numbers, our variables, patches [3, P, 48], position ids [3, P], mask [3, P]) with the images as a batch."""
    with np.load(Path(__file__).parent / "data" / "siglip_navit.npz") as file:
        numbers = dict(file)
    state = {key: value.astype(np.float32) for key, value in numbers.items() if key.startswith("vit_model.")}
    params = to_tree(state, SIGLIP_TABLE, abstract(CONFIG))
    images = [numbers[f"image{k}"] for k in range(3)]
    cut = [np.asarray(pixels_to_patches(image[None], CONFIG))[0] for image in images]
    ids = [position_ids(image.shape[0] // 4, image.shape[1] // 4, CONFIG) for image in images]
    return numbers, {"params": params}, pad(cut), pad(ids), pad([np.ones(len(x), bool) for x in cut])


def pad(rows, length: int | None = None) -> np.ndarray:
    """Arrays of different lengths as the rows of a batch, zeros at the end."""
    length = length or max(len(row) for row in rows)
    return np.stack([np.pad(row, [(0, length - len(row))] + [(0, 0)] * (row.ndim - 1)) for row in rows])


def unpack(packed: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The authors' packed sequence [sum of lengths, …] as a batch [B, P, …] with zeros at the padding."""
    batch = np.zeros((*mask.shape, *packed.shape[1:]), packed.dtype)
    batch[mask] = packed
    return batch


def run(config: SiglipConfig, variables, *args):
    return jax.jit(Siglip(config).apply)(variables, *args)


# --- the authors' numbers -----------------------------------------------------------------------------------------


def test_position_ids_are_the_authors():
    numbers, _, _, ids, mask = golden()
    np.testing.assert_array_equal(ids[mask], numbers["position_ids"])
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(position_ids(2, 3, SiglipConfig()), [0, 1, 2, 70, 71, 72])


@pytest.mark.parametrize("part", ["embeddings", "attention", "mlp", "block"])
def test_submodules_equal_the_authors(part):
    numbers, variables, patches, ids, mask = golden()
    params = variables["params"]
    first = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    embedded, after_one = (unpack(x, mask) for x in numbers["hidden"])
    by_key = mask[:, None, None, :]
    if part == "embeddings":
        y = patches @ params["patch_embedding"]["kernel"] + params["patch_embedding"]["bias"]
        ours, theirs = y + params["position_embedding"][ids], embedded
    elif part == "attention":
        x, theirs = (unpack(numbers[f"attention_{end}"], mask) for end in ("in", "out"))
        ours = siglip.Attention(CONFIG).apply({"params": first["self_attn"]}, x, by_key)
    elif part == "mlp":
        theirs = unpack(numbers["mlp_out"], mask)
        x = embedded + unpack(numbers["attention_out"], mask)
        x = siglip.LayerNorm(CONFIG.layer_norm_eps).apply({"params": first["layer_norm2"]}, x)
        ours = siglip.MLP(CONFIG).apply({"params": first["mlp"]}, x)
    else:
        ours, theirs = siglip.Block(CONFIG).apply({"params": first}, embedded, by_key)[0], after_one
    assert relative_error(np.asarray(ours)[mask], theirs[mask]) <= 1e-5


@pytest.mark.parametrize("how", [{}, {"scan": False}, {"remat": "dots"}])
def test_the_tower_equals_the_authors(how):
    numbers, variables, patches, ids, mask = golden()
    if how.get("scan") is False:
        variables = {"params": unstack_blocks(variables["params"])}
    ours = run(SiglipConfig.from_dict(GOLDEN, **how), variables, patches, ids, mask)
    assert ours.dtype == jnp.float32 and np.isfinite(ours).all()
    assert relative_error(np.asarray(ours)[mask], numbers["output"]) <= 1e-5
    assert largest_error(np.asarray(ours)[mask], numbers["output"]) <= 1e-5


def test_padding_and_neighbours_do_not_matter():
    _, variables, patches, ids, mask = golden()
    whole = np.asarray(run(CONFIG, variables, patches, ids, mask))
    rng = np.random.default_rng(0)
    for k in range(3):
        own = mask[k]
        alone = run(CONFIG, variables, patches[k : k + 1, own], ids[k : k + 1, own])  # no padding, no mask
        # The same patches in another order among garbage, position ids outside of the table included.
        place = rng.permutation(50)[: own.sum()]
        spread, where = 9.0 * randn(k, 1, 50, CONFIG.patch_dim), np.zeros((1, 50), bool)
        far = rng.choice([-7, 10**6], (1, 50)).astype(np.int32)
        spread[0, place], far[0, place], where[0, place] = patches[k, own], ids[k, own], True
        scattered = run(CONFIG, variables, spread, far, where)
        assert np.isfinite(scattered).all()
        assert relative_error(alone[0], whole[k, own]) <= 1e-5
        assert relative_error(np.asarray(scattered)[0, place], whole[k, own]) <= 1e-5


def test_bfloat16_stays_near_float32():
    _, variables, patches, ids, mask = golden()
    exact = np.asarray(run(CONFIG, variables, patches, ids, mask))[mask]
    half = run(SiglipConfig.from_dict(GOLDEN, dtype="bfloat16"), variables, patches, ids, mask)
    assert half.dtype == jnp.bfloat16
    assert 0 < relative_error(np.asarray(half, np.float32)[mask], exact) <= 2e-2


# --- transformers, live -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed, patch, side", [(0, 4, 28), (1, 2, 10)])
def test_a_square_image_equals_transformers(seed, patch, side):
    sizes = GOLDEN | dict(num_hidden_layers=2, patch_size=patch, image_size=side)
    config = SiglipConfig.from_dict(sizes, select_layer=-1)
    torch.manual_seed(seed)
    ref = randomise(SiglipVisionModel(SiglipVisionConfig(**sizes, vision_use_head=bool(seed))), seed)
    table = siglip_table("", "vit/", linear_from_conv2d(3, patch))
    state = numpy_state(ref)
    assert any(key.startswith("head.") for key in state) == bool(seed)
    variables = {"params": to_tree(state, table, {"vit": abstract(config)})["vit"]}
    image = np.random.default_rng(seed).integers(0, 256, (2, side, side, 3), np.uint8)
    with torch.no_grad():
        pixels = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 127.5 - 1
        theirs = ref(pixels).last_hidden_state
    ids = np.tile(position_ids(side // patch, side // patch, config), (2, 1))
    ours = run(config, variables, pixels_to_patches(jnp.asarray(image), config), ids)
    assert relative_error(ours, theirs) <= 1e-5
    back = to_reference({"vit": variables["params"]}, table)
    assert back.keys() == {key for key in state if not key.startswith("head.")}
    for key, value in back.items():
        np.testing.assert_array_equal(value, state[key])


def test_released_size_has_exactly_the_references_parameters():
    config = SiglipConfig.from_dict(RELEASED)
    assert config == SiglipConfig() and config.num_layers == 26 and config.side == 70
    with torch.device("meta"):
        sizes = {**RELEASED, "num_hidden_layers": config.num_layers, "vision_use_head": False}
        ref = SiglipVisionModel(SiglipVisionConfig(**sizes))
    shapes = {f"vit_model.vision_model.{key}": shape for key, shape in meta_shapes(ref).items()}
    assert shapes["vit_model.vision_model.embeddings.patch_embedding.weight"] == (1152, 3, 14, 14)
    # `convert_conv2d_to_linear`
    shapes["vit_model.vision_model.embeddings.patch_embedding.weight"] = (1152, 588)
    tree = abstract(config)
    assign(shapes, SIGLIP_TABLE, tree)
    assert reference_shapes(SIGLIP_TABLE, tree) == shapes
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
    assert count == sum(p.numel() for p in ref.parameters()) == 402_552_736


# --- accounting, training, errors ---------------------------------------------------------------------------------


def test_round_trip_is_bit_equal_and_strict():
    numbers, variables, *_ = golden()
    state = {key: value.astype(np.float32) for key, value in numbers.items() if key.startswith("vit_model.")}
    back = to_reference(variables["params"], SIGLIP_TABLE)
    assert back.keys() == state.keys()
    for key, value in back.items():
        assert value.dtype == state[key].dtype
        np.testing.assert_array_equal(value, state[key])
    layer = "vit_model.vision_model.encoder.layers."
    spoiled = {key: value for key, value in state.items() if key != f"{layer}1.mlp.fc1.bias"}
    spoiled[f"{layer}2.mlp.fc1.bias"] = state[f"{layer}1.mlp.fc1.bias"]
    spoiled["vit_model.vision_model.rope.cos_h"] = np.zeros((2, 2), np.float32)
    spoiled["vit_model.vision_model.embeddings.patch_embedding.weight"] = np.zeros((32, 3, 4, 4), np.float32)
    with pytest.raises(RefineError) as caught:
        to_tree(spoiled, SIGLIP_TABLE, abstract(CONFIG))
    for offender in (
        f"{layer}2.mlp.fc1.bias",
        "rope.cos_h",
        "blocks/mlp/fc1/bias[1]",
        "patch_embedding.weight [32, 3, 4, 4]",
    ):
        assert offender in str(caught.value)


def test_every_parameter_names_its_axes():
    args = (jnp.zeros((1, 2, CONFIG.patch_dim)), jnp.zeros((1, 2), jnp.int32))
    boxed = jax.eval_shape(Siglip(CONFIG).init, jax.random.key(0), *args)["params"]
    boxes = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata))
    assert all(len(box.names) == box.value.ndim and any(box.names) for box in boxes)
    assert boxed["blocks"]["self_attn"]["q_proj"]["kernel"].names == ("layers", "embed", "heads")
    assert boxed["blocks"]["mlp"]["fc2"]["kernel"].names == ("layers", "mlp", "embed")


def test_gradients_reach_every_parameter_and_adapters_act():
    _, variables, patches, ids, mask = golden()

    def loss(params, lora, config=CONFIG):
        out = Siglip(config).apply({"params": params, "lora": lora}, patches, ids, mask)
        return jnp.mean(jnp.where(mask[..., None], jnp.square(out - 0.5), 0.0))

    lora = init_lora(jax.random.key(0), variables["params"], r"blocks/(self_attn/q_proj|mlp/fc1)", 2)
    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, (of_params, of_lora) = grad(variables["params"], lora)
    assert relative_error(value, loss(variables["params"], {})) <= 1e-6
    # A bias on all keys moves every score of a query alike.
    silent = of_params["blocks"]["self_attn"]["k_proj"].pop("bias")
    assert np.abs(silent).max() < 1e-6
    for path, leaf in jax.tree_util.tree_leaves_with_path(of_params):
        assert np.isfinite(leaf).all(), path
        assert all(np.any(layer) for layer in (leaf if "blocks" in str(path) else [leaf])), path
    moved = jax.tree.map(lambda a, g: a - g, lora, of_lora)
    assert abs(float(grad(variables["params"], moved)[0]) - float(value)) > 1e-4


def without(name: str) -> dict:
    return {key: value for key, value in RELEASED.items() if key != name}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: SiglipConfig.from_dict(without("patch_size")), "lacks patch_size"),
        (lambda: SiglipConfig.from_dict(RELEASED | {"num_register_tokens": 4}), "num_register_tokens not supported"),
        (lambda: SiglipConfig.from_dict(RELEASED | {"hidden_act": "gelu"}), "hidden_act 'gelu'"),
        (lambda: SiglipConfig.from_dict(RELEASED | {"num_hidden_layers": 1}), "num_hidden_layers 1 leaves 0"),
        (lambda: SiglipConfig.from_dict(RELEASED | {"num_hidden_layers": "27"}), "num_hidden_layers '27'"),
        (lambda: SiglipConfig.from_dict(RELEASED | {"hidden_size": 1150}), "hidden_size 1150.*num_attention_heads 16"),
        (lambda: SiglipConfig.from_dict(RELEASED | {"intermediate_size": 0}), "intermediate_size 0"),
        (lambda: SiglipConfig.from_dict(RELEASED | {"image_size": 13}), "image_size 13"),
        (lambda: SiglipConfig(remat="some"), "remat 'some'"),
        (lambda: position_ids(71, 4, SiglipConfig()), "71x4 patches; give 1 to 70"),
        (lambda: position_ids(0, 4, SiglipConfig()), "0x4 patches"),
        (lambda: pixels_to_patches(jnp.zeros((1, 28, 30, 3)), SiglipConfig()), "28x30 pixels; .* multiples of 14"),
        (lambda: pixels_to_patches(jnp.zeros((28, 28, 3)), SiglipConfig()), r"\[28, 28, 3\]"),
        (lambda: pixels_to_patches(jnp.zeros((1, 28, 28, 4)), SiglipConfig()), "height, width, 3"),
        (lambda: Siglip(CONFIG).apply({}, jnp.zeros((1, 2, 47)), jnp.zeros((1, 2), int)), "patches, 48"),
        (lambda: Siglip(CONFIG).apply({}, jnp.zeros((1, 2, 48)), jnp.zeros((1, 3), int)), r"position_ids.*\[1, 2\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(RefineError, match=message):
        call()


def test_a_saved_configuration_of_transformers_is_read():
    saved = json.loads(SiglipVisionConfig(**RELEASED).to_json_string(use_diff=False))
    assert SiglipConfig.from_dict(saved) == SiglipConfig()
    assert SiglipConfig.from_dict(RELEASED | {"rope": True}) == SiglipConfig()  # the authors' loader switches it off
