"""Qwen2.5-VL against transformers: submodules (<= 1e-5), networks (<= 1e-4), positions, patches, names and shapes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from reference_utils import QUICK
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as reference
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from refine_jax.convert.keys_vl import layout_of, vl_table
from refine_jax.convert.mapping import assign, reference_shapes, to_reference, to_tree
from refine_jax.errors import RefineError
from refine_jax.models import qwen_vl
from refine_jax.models.qwen_vl import QwenVL, QwenVLConfig

torch.set_num_threads(1)
IMAGE, START, END = 290, 291, 292
# Compiling is most of the time here, and the arithmetic is the same at any level.
quick = functools.partial(jax.jit, compiler_options=QUICK)

# Windows of 4 merge cells; none of these grids divides into whole windows, one fits into a single window.
GRIDS = ((10, 14), (6, 4), (12, 22))


def tiny_dict(**vision) -> dict:
    return dict(
        text_config=dict(
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=300,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        ),
        vision_config=dict(
            depth=4,
            hidden_size=32,
            intermediate_size=36,
            num_heads=2,
            out_hidden_size=32,
            fullatt_block_indexes=[1, 3],
            **vision,
        ),
        image_token_id=IMAGE,
        video_token_id=293,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def as_numpy(state: dict) -> dict:
    return {key: value.detach().numpy() for key, value in state.items()}


def relative(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def assert_close(ours, theirs, bound: float) -> None:
    assert relative(ours, theirs) <= bound
    assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() <= bound * max(1.0, np.abs(np.asarray(theirs)).max())


@functools.cache
def pair(seed: int):
    """The reference with no trivial parameter, our configuration, and the reference's parameters in our tree."""
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(**tiny_dict())
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    for name, p in model.named_parameters():
        p.data = torch.randn_like(p) * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5) + (
            "norm" in name or "ln_q" in name
        )
    ours = QwenVLConfig.from_dict(config.to_dict())
    params = to_tree(as_numpy(model.state_dict()), vl_table(ours), abstract(ours))
    return model, ours, {"params": params}


def abstract(config: QwenVLConfig) -> dict:
    cell = config.vision.spatial_merge_size
    images = (jnp.zeros((1, cell * cell, config.vision.patch_dim)),)
    ids = jnp.zeros((1, 2), jnp.int32)
    positions = jnp.zeros((1, 2, 3), jnp.int32)
    model = QwenVL(config)
    init = functools.partial(model.init, grids=((cell, cell),))
    return nn.meta.unbox(jax.eval_shape(init, jax.random.key(0), ids, ids > 0, positions, images, ids))["params"]


def prompt(grids, rng, tail: int = 5) -> np.ndarray:
    parts = [rng.integers(0, 256, 4)]
    for grid in grids:
        parts += [[START], np.full(qwen_vl.merged_tokens(grid, 2), IMAGE), [END], rng.integers(0, 256, 2)]
    return np.concatenate([*parts, rng.integers(0, 256, tail)]).astype(np.int32)


def reference_positions(model, ids, grids) -> np.ndarray:
    kinds = torch.tensor((ids == IMAGE).astype(np.int64))[None]
    thw = torch.tensor([(1, *g) for g in grids]) if grids else None
    positions, _ = model.model.get_rope_index(torch.tensor(ids)[None].long(), kinds, image_grid_thw=thw)
    return positions[:, 0].T.numpy()


# --------------------------------------------------------------------------------------------------- rung 1: submodules
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("index, full", [(0, False), (1, True)])
def test_vision_block(grid, index, full):
    model, config, variables = pair(0)
    tower, cfg = model.model.visual, config.vision
    x = np.random.default_rng(1).normal(size=(2, grid[0] * grid[1], cfg.hidden_size)).astype(np.float32)
    thw = torch.tensor([[1, *grid]])
    with torch.no_grad():
        order, edges = reference.get_vision_window_index(thw, 2, cfg.window_size, cfg.patch_size)
        cells = (np.asarray(order)[:, None] * 4 + np.arange(4)).reshape(-1)
        rope = tower.rotary_pos_emb(torch.zeros(1), reference.get_vision_position_ids(thw, 2))
        rope = tuple(r[cells] for r in rope)
        edges = torch.tensor([0, len(cells)], dtype=torch.int32) if full else edges
        theirs = np.zeros_like(x)
        for b in range(2):
            theirs[b, cells] = tower.blocks[index](
                torch.tensor(x[b, cells]), cu_seqlens=edges, position_embeddings=rope
            ).numpy()
    cos, sin = qwen_vl.rotary_angles(qwen_vl.patch_positions(grid, 2)[None], (8, 8))
    windows = qwen_vl.Windows(grid[0] // 2, grid[1] // 2, cfg.window_cells, 4)
    params = jax.tree.map(lambda leaf: leaf[index], variables["params"]["visual"]["blocks"])
    block = qwen_vl.VisionBlock(cfg, "float32", "float32")
    ours, _ = quick(block.apply)({"params": params}, x, jnp.asarray(full), cos, sin, windows)
    assert_close(ours, theirs, 1e-5)


def test_vision_rotary():
    model, config, _ = pair(0)
    cos, sin = model.model.visual.rotary_pos_emb(
        torch.zeros(1), reference.get_vision_position_ids(torch.tensor([[1, 12, 22]]), 2)
    )
    ours = qwen_vl.rotary_angles(qwen_vl.patch_positions((12, 22), 2), (8, 8), config.vision.rope_theta)
    assert_close(ours[0], cos.numpy()[:, :8], 1e-6)
    assert_close(ours[1], sin.numpy()[:, :8], 1e-6)


def test_merger():
    model, config, variables = pair(1)
    x = np.random.default_rng(2).normal(size=(3, 24, 32)).astype(np.float32)
    with torch.no_grad():
        theirs = model.model.visual.merger(torch.tensor(x)).numpy().reshape(3, 6, 32)
    merger = qwen_vl.PatchMerger(config.vision, "float32", "float32")
    assert_close(quick(merger.apply)({"params": variables["params"]["visual"]["merger"]}, x), theirs, 1e-5)


def test_text_layer_and_rotary():
    model, config, variables = pair(2)
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 9, 32)).astype(np.float32)
    positions = rng.integers(0, 60, (2, 9, 3)).astype(np.int32)
    with torch.no_grad():
        language = model.model.language_model
        rope = language.rotary_emb(torch.tensor(x), torch.tensor(positions).permute(2, 0, 1))
        bias = torch.full((9, 9), -torch.inf).triu(1)[None, None]
        theirs = language.layers[1](torch.tensor(x), attention_mask=bias, position_embeddings=rope).numpy()
    cos, sin = qwen_vl.mrope_angles(jnp.asarray(positions), config.text)
    assert_close(cos, rope[0].numpy()[..., :4], 1e-6)
    assert_close(sin, rope[1].numpy()[..., :4], 1e-6)
    params = jax.tree.map(lambda leaf: leaf[1], variables["params"]["language_model"]["layers"])
    mask = np.tril(np.ones((9, 9), bool))[None, None]
    layer = qwen_vl.TextLayer(config.text, "float32", "float32")
    ours, _ = quick(layer.apply)({"params": params}, x, mask, cos, sin)
    assert_close(ours, theirs, 1e-5)


# ----------------------------------------------------------------------------------------------------- rung 2: networks
@pytest.mark.parametrize("seed, grid", [(0, GRIDS[0]), (1, GRIDS[1]), (2, GRIDS[2]), (0, (8, 16))])
def test_vision_tower(seed, grid):
    model, config, variables = pair(seed)
    patches = np.random.default_rng(seed).normal(size=(2, grid[0] * grid[1], config.vision.patch_dim))
    patches = patches.astype(np.float32)
    with torch.no_grad():
        out = model.model.visual(torch.tensor(patches).flatten(0, 1), grid_thw=torch.tensor([[1, *grid]] * 2))
    ours = quick(lambda p: QwenVL(config).apply(variables, p, grid, method="vision"))(patches)
    assert_close(ours, out.pooler_output.numpy().reshape(ours.shape), 1e-4)


def encode_reference(model, ids, patches, grids):
    kinds = torch.tensor((ids == IMAGE).astype(np.int64))[None]
    with torch.no_grad():
        out = model.model(
            input_ids=torch.tensor(ids)[None].long(),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            pixel_values=torch.tensor(np.concatenate(patches)) if grids else None,
            image_grid_thw=torch.tensor([(1, *g) for g in grids]) if grids else None,
            mm_token_type_ids=kinds,
            output_hidden_states=True,
        )
    # What diffusers reads (the last of all hidden states) is the state after the final norm.
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    return out.last_hidden_state[0].numpy()


@functools.cache
def compiled(config, grids):
    return quick(functools.partial(QwenVL(config).apply, grids=grids))


def batch_of(prompts, patches_of, grids, present, length):
    """Several prompts over the same image slots, padded to one length."""
    ids, mask = np.zeros((len(prompts), length), np.int32), np.zeros((len(prompts), length), bool)
    positions, index = np.zeros((len(prompts), length, 3), np.int32), np.full((len(prompts), length), -1, np.int32)
    for b, p in enumerate(prompts):
        n = len(p)
        ids[b, :n], mask[b, :n] = p, True
        shown = [g for g, here in zip(grids, present[b]) if here]
        positions[b, :n] = qwen_vl.mrope_positions(p, shown, IMAGE)
        index[b, :n] = qwen_vl.image_index(p, grids, IMAGE, present=present[b])
    images = tuple(np.stack([patches[k] for patches in patches_of]) for k in range(len(grids)))
    return ids, mask, positions, images, index


@pytest.mark.parametrize("seed", [0, 1])
def test_encoder_batch_of_different_pictures_and_lengths(seed):
    """One padded batch: three pictures, two with a hole, one, none; two slots share a grid."""
    model, config, variables = pair(seed)
    rng = np.random.default_rng(seed)
    grids = (GRIDS[0], GRIDS[1], GRIDS[0]) if seed == 0 else (GRIDS[2], GRIDS[1], GRIDS[0])
    present = [(True, True, True), (True, False, True), (False, True, False), (False, False, False)]
    patches = [[rng.normal(size=(g[0] * g[1], 1176)).astype(np.float32) for g in grids] for _ in present]
    shown = [[k for k in range(3) if here[k]] for here in present]
    prompts = [prompt([grids[k] for k in ks], rng, tail=3 + 2 * b) for b, ks in enumerate(shown)]
    longest = max(map(len, prompts))
    theirs = [
        encode_reference(model, p, [patches[b][k] for k in shown[b]], [grids[k] for k in shown[b]])
        for b, p in enumerate(prompts)
    ]
    outputs = []
    for spare in (3, 19) if seed == 0 else (3,):
        arguments = batch_of(prompts, patches, grids, present, longest + spare)
        ours = np.asarray(compiled(config, grids)(variables, *arguments))
        assert np.isfinite(ours).all()
        for b, p in enumerate(prompts):
            assert_close(ours[b, : len(p)], theirs[b], 1e-4)
        outputs.append(ours[:, :longest] * arguments[1][:, :longest, None])
    assert np.abs(outputs[0] - outputs[-1]).max() <= 1e-5, "padding changes nothing"


def test_absent_images_and_neighbours_have_no_influence():
    _, config, variables = pair(0)
    rng = np.random.default_rng(7)
    grids, present = (GRIDS[0], GRIDS[1]), [(True, False), (True, True)]
    prompts = [prompt([grids[0]], rng), prompt(list(grids), rng)]
    patches = [[rng.normal(size=(g[0] * g[1], 1176)).astype(np.float32) for g in grids] for _ in present]
    ids, mask, positions, images, index = batch_of(prompts, patches, grids, present, 80)
    run = compiled(config, grids)
    before = run(variables, ids, mask, positions, images, index)[0]
    changed = (images[0].copy(), images[1].copy())
    changed[0][1], changed[1][:] = 3.0, -2.0
    after = run(variables, ids, mask, positions, changed, index)[0]
    assert np.abs(np.asarray(after - before))[mask[0]].max() <= 1e-5


def test_bfloat16_against_float32():
    _, config, variables = pair(0)
    rng = np.random.default_rng(5)
    grids = GRIDS[:1]
    p = prompt(list(grids), rng)
    patches = [[rng.normal(size=(g[0] * g[1], 1176)).astype(np.float32) for g in grids]]
    arguments = batch_of([p], patches, grids, [(True,)], len(p))
    half = dataclasses.replace(config, dtype="bfloat16")
    ours = compiled(half, grids)(variables, *arguments)
    assert ours.dtype == jnp.bfloat16
    assert relative(ours.astype(jnp.float32), compiled(config, grids)(variables, *arguments)) <= 2e-2


def test_shared_image_tokens_and_gradients_with_remat():
    _, config, variables = pair(1)
    rng = np.random.default_rng(6)
    grids = (GRIDS[0],)
    p = prompt(list(grids), rng)
    patches = [[rng.normal(size=(g[0] * g[1], 1176)).astype(np.float32) for g in grids]]
    ids, mask, positions, images, index = batch_of([p], patches, grids, [(True,)], len(p))
    whole = compiled(config, grids)(variables, ids, mask, positions, images, index)
    model = QwenVL(config)

    @quick
    def shared(ids):
        tokens = model.apply(variables, images, grids, method="image_tokens")
        return model.apply(variables, ids, mask, positions, tokens, index, method="text")

    parts = shared(ids)
    assert_close(parts, whole, 1e-5)

    def loss(config, params):
        out = QwenVL(config).apply({"params": params}, ids, mask, positions, images, index, grids=grids)
        return jnp.mean(jnp.square(out))

    saved = quick(jax.grad(functools.partial(loss, dataclasses.replace(config, remat="full"))))
    gradient = saved(variables["params"])
    assert all(np.abs(np.asarray(leaf)).max() > 0 for leaf in jax.tree.leaves(gradient))
    # Forward mode without remat must see the same slope along the gradient.
    _, slope = quick(lambda p, t: jax.jvp(functools.partial(loss, config), (p,), (t,)))(variables["params"], gradient)
    assert_close(slope, sum(np.square(leaf).sum() for leaf in jax.tree.leaves(gradient)), 1e-4)


# ----------------------------------------------------------------------------------------- positions, patches and sizes
def test_positions_equal_the_reference():
    model, _, _ = pair(0)
    rng = np.random.default_rng(0)
    for grids in ([], [(10, 14)], [(14, 10), (6, 4)], [(4, 4), (2, 30), (22, 12)]):
        ids = prompt(grids, rng)
        ours = qwen_vl.mrope_positions(ids, grids, IMAGE)
        np.testing.assert_array_equal(ours, reference_positions(model, ids, grids))


def test_positions_refuse_what_does_not_fit():
    ids = prompt([(4, 4)], np.random.default_rng(0))
    for grids in ([], [(4, 6)], [(4, 4), (4, 4)]):
        with pytest.raises(ValueError):
            qwen_vl.mrope_positions(ids, grids, IMAGE)
    with pytest.raises(ValueError):
        qwen_vl.image_index(ids, [(4, 4), (2, 2)], IMAGE)


@pytest.mark.parametrize("height, width", [(56, 84), (140, 56)])
def test_patches_equal_the_processor(height, width):
    config = pair(0)[1].vision
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    out = Qwen2VLImageProcessorPil()(images=[image], return_tensors="np")
    ours = jax.jit(qwen_vl.pixels_to_patches, static_argnums=1)(jnp.asarray(image, jnp.float32)[None], config)
    assert qwen_vl.patch_grid(height, width, config) == tuple(out["image_grid_thw"][0][1:])
    assert np.abs(np.asarray(ours[0]) - out["pixel_values"]).max() <= 1e-5


def test_image_size_equals_smart_resize():
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 3000, (300, 2)).tolist():
        if max(height, width) > 200 * min(height, width):
            with pytest.raises(RefineError):
                qwen_vl.vl_image_size(height, width)
            continue
        limits = dict(min_pixels=56 * 56, max_pixels=int(rng.choice([28 * 28 * 1280, 200 * 200])))
        assert qwen_vl.vl_image_size(height, width, **limits) == smart_resize(height, width, **limits)


# -------------------------------------------------------------------------------------------------- names and the table
@pytest.mark.parametrize("layout", ["nested", "flat"])
def test_table_there_and_back(layout):
    model, config, variables = pair(0)
    state = as_numpy(model.state_dict())
    if layout == "flat":
        state = {
            k.replace("model.visual", "visual").replace("model.language_model", "model"): v for k, v in state.items()
        }
    assert layout_of(state) == layout
    table = vl_table(config, layout)
    tree = to_tree(state, table, abstract(config))
    jax.tree.map(np.testing.assert_array_equal, tree, variables["params"])
    back = to_reference(tree, table)
    assert set(state) - set(back) == {"lm_head.weight"}
    for key, value in back.items():
        np.testing.assert_array_equal(value, state[key])


def test_published_configuration_has_the_published_tensors():
    """The 7B release: every name and shape, through the table, and its count."""
    text = dict(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
    )
    vision = dict(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        in_chans=3,
        out_hidden_size=3584,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31],
    )
    config = QwenVLConfig.from_dict({**text, "vision_config": vision, "image_token_id": 151655})
    assert config == QwenVLConfig()
    vision["in_channels"] = vision.pop("in_chans")
    with torch.device("meta"):
        theirs = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    tree, table = abstract(config), vl_table(config)
    assign(shapes, table, tree)
    head = shapes.pop("lm_head.weight")
    assert reference_shapes(table, tree) == shapes
    count = sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert count + head[0] * head[1] == sum(p.numel() for p in theirs.parameters()) == 8_292_166_656


def test_configuration_there_and_back():
    for config in (QwenVLConfig(), pair(0)[1]):
        assert QwenVLConfig.from_dict(config.to_dict()) == config
        theirs = Qwen2_5_VLConfig(**config.to_dict()).to_dict()
        assert QwenVLConfig.from_dict(theirs) == config
    odd = dataclasses.replace(pair(0)[1].vision, image_mean=(0.5, 0.5, 0.5))
    odd = dataclasses.replace(pair(0)[1], vision=odd)
    assert QwenVLConfig.from_dict(odd.to_dict()) == odd


def test_every_parameter_has_logical_axes():
    config = pair(0)[1]
    ids = jnp.zeros((1, 2), jnp.int32)
    arguments = (ids, ids > 0, jnp.zeros((1, 2, 3), jnp.int32), (jnp.zeros((1, 4, 1176)),), ids)
    boxed = jax.eval_shape(functools.partial(QwenVL(config).init, grids=((2, 2),)), jax.random.key(0), *arguments)
    boxes = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    for box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned)
        assert len(box.names) == box.value.ndim and None not in box.names


def test_lora_on_a_scanned_layer():
    _, config, variables = pair(0)
    rng = np.random.default_rng(8)
    ids = prompt([], rng, tail=8)[None]
    positions = qwen_vl.mrope_positions(ids[0], [], IMAGE)[None]
    arguments = (ids, np.ones_like(ids, bool), positions)
    a, b = rng.normal(size=(3, 32, 4)).astype(np.float32), rng.normal(size=(3, 4, 32)).astype(np.float32) * 0.1
    lora = {"language_model": {"layers": {"self_attn": {"q_proj": {"a": a, "b": b}}}}}
    merged = jax.tree.map(np.copy, variables)
    merged["params"]["language_model"]["layers"]["self_attn"]["q_proj"]["kernel"] += a @ b
    run = compiled(config, ())
    ours = run({**variables, "lora": lora}, *arguments)
    assert relative(ours, run(variables, *arguments)) > 1e-3
    assert_close(ours, run(merged, *arguments), 1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["text_config"].update(hidden_act="gelu"),
        lambda d: d["text_config"].update(use_sliding_window=True),
        lambda d: d["text_config"].update(rope_parameters={"rope_type": "yarn", "factor": 4.0}),
        lambda d: d["vision_config"].pop("depth"),
        lambda d: d["vision_config"].update(out_hidden_size=16),
        lambda d: d["text_config"].update(rope_parameters={"mrope_section": [1, 1, 1]}),
    ],
)
def test_unsupported_configurations_say_so(change):
    config = tiny_dict(in_channels=3, patch_size=14, spatial_merge_size=2, temporal_patch_size=2, window_size=112)
    QwenVLConfig.from_dict(config)
    change(config)
    with pytest.raises(RefineError):
        QwenVLConfig.from_dict(config)
