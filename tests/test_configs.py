"""The shipped recipes: what the paper says, and what the hardware that they name can hold. Their text is golden in
test_train.py."""

import math

import jax
import pytest
import toy
from flax import traverse_util

from refine_jax import flops, objectives, recipes
from refine_jax.model import PUBLISHED
from refine_jax.models.layers import init_lora
from refine_jax.train import load_config

EDIT = sorted(path for path in toy.CONFIGS.glob("edit_2*.py"))
HARDWARE = {"v5e_64": 64, "v5p_16": 8, "v6e_16": 16, "v6e_256": 256, "8xh100": 8, "1xh100": 1, "v5p_128": 64}
# Google counts a v5p's two cores: v5p-16 are 8 chips. Whole slices of these sizes have these shapes.
CHIPS = {64: ("8x8", "4x4x4"), 8: ("2x2x2",), 16: ("4x4",), 256: ("16x16",)}


def test_every_recipe_is_there_for_both_models():
    names = {path.stem for path in EDIT}
    lora = set(HARDWARE) - {"v5p_128"}
    assert names == {f"edit_{v}_{h}" for v in ("2509", "2511") for h in lora} | {"edit_2511_full_v5p_128"}


@pytest.mark.parametrize("path", EDIT, ids=lambda path: path.stem)
def test_a_recipe_fits_its_hardware(path):
    config = load_config(path)
    hardware = path.stem.removeprefix("edit_").split("_", 1)[1].removeprefix("full_")
    chips = math.prod(config.mesh.values())
    assert chips == HARDWARE[hardware]
    if config.topology:
        kind, _, shape = config.topology.partition(":")
        assert kind == hardware.split("_")[0] and shape in CHIPS[chips]
        assert any(chip.name == kind for chip in flops.CHIPS.values())
    ways = config.mesh.get("fsdp", 1) * config.mesh.get("data", 1)
    rows = config.batch_size // (ways * config.optimizer.accumulate)
    assert rows == 1, "a sample at a time on a device, or on those that share it"
    # What the mesh splits is divided evenly in every bucket: no device computes what another does.
    mmdit, ways = PUBLISHED[config.variant].mmdit, config.mesh.get("context", 1)
    assert mmdit.num_attention_heads % config.mesh.get("tensor", 1) == 0
    assert (config.data.text_length - 64) % ways == 0
    for height, width in config.data.buckets:
        assert 4 * height * width // 256 % ways == 0 and height % 32 == width % 32 == 0
        assert abs(height * width / 2**20 - 1) < 0.04
    # The encoder and the VAE are not in the program.
    assert config.data.source == "cache" and config.init_from.endswith(config.variant[-4:])
    assert config.variant[-4:] in path.stem and path.stem in load_text(path)


def load_text(path) -> str:
    return path.read_text(encoding="utf-8").split('"""')[1]


@pytest.mark.parametrize("path", [path for path in EDIT if "full" not in path.stem], ids=lambda path: path.stem)
def test_the_lora_is_the_papers(path):
    config = load_config(path)
    assert config.steps * config.batch_size == 160_000 and config.boundary.to_dict() == dict(r_out=16, r_in=16, alpha=9)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.b1, optimizer.b2, optimizer.eps) == ("adamw", 0.9, 0.999, 1e-8)
    assert (optimizer.weight_decay, optimizer.decay, config.dtype) == (0.01, 0.0, "bfloat16")
    scale = math.sqrt(config.batch_size / 8)
    assert optimizer.learning_rate == pytest.approx(2e-4 * scale) and bool(optimizer.warmup) == (scale > 1)
    assert config.lora.rank == config.lora.alpha == 256


def test_what_the_lora_adapts():
    """Four matrices of the image stream in each of 60 blocks, 377 M parameters."""
    config = load_config(EDIT[0])
    base = jax.eval_shape(lambda: PUBLISHED[config.variant].init(jax.random.key(0), ("mmdit",)))["mmdit"]
    lora = jax.eval_shape(lambda: init_lora(jax.random.key(0), base, config.lora.targets, config.lora.rank))
    assert set(lora) == {"blocks"} and set(lora["blocks"]) == {"attn"}
    assert set(lora["blocks"]["attn"]) == {"to_q", "to_k", "to_v", "to_out"}
    assert sum(leaf.size for leaf in jax.tree.leaves(lora)) == 60 * 4 * 2 * 3072 * 256


# ---------------------------------------------------------------------------------------------------------------- BAGEL

BAGEL = {
    "v5p_64": (32, "v5p:4x4x2"),
    "v6e_64": (64, "v6e:8x8"),
    "32xh100": (32, ""),
    "lora_v6e_16": (16, "v6e:4x4"),
    "lora_1xh100": (1, ""),
}


def test_every_bagel_recipe_is_there():
    assert {path.stem for path in toy.CONFIGS.glob("bagel_rvr_*.py")} == {f"bagel_rvr_{name}" for name in BAGEL}


@pytest.mark.parametrize("name", BAGEL)
def test_a_bagel_recipe_fits_its_hardware(name):
    config = load_config(toy.CONFIGS / f"bagel_rvr_{name}.py")
    chips, topology = BAGEL[name]
    assert math.prod(config.mesh.values()) == chips and config.topology == topology
    ways = config.mesh.fsdp * config.mesh.get("data", 1)
    assert config.batch_size == ways * config.optimizer.accumulate  # a row at a time
    model = PUBLISHED[config.variant]
    for bucket, shapes in zip(config.data.buckets, objectives.make(config, model).batch_shapes(), strict=True):
        rows, pictures, height, width, _ = shapes["painted_pixels"].shape
        seen = shapes["seen_pixels"].shape
        assert (height, width) == bucket and rows == config.batch_size and seen[1] == pictures
        und = pictures * seen[2] * seen[3] // 196 + shapes["text_ids"].shape[1]
        gen = pictures * height * width // 256
        assert (10_000 if name == "lora_1xh100" else 35_000) < und + gen <= config.data.tokens
        assert und % 128 == gen % 128 == 0 and shapes["text_ids"].shape[1] > config.data.text_length - 128
        assert shapes["text_scored"].shape == (rows, config.data.answer_length)


def test_the_bagel_recipe_is_the_released_one():
    """scripts/train.sh, data/configs/rvr.yaml and train/pretrain_unified_navit.py of the authors' code."""
    config = load_config(toy.CONFIGS / "bagel_rvr_v5p_64.py")
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.b1, optimizer.b2, optimizer.eps) == (1e-4, 0.9, 0.95, 1e-15)
    assert (optimizer.warmup, optimizer.decay, optimizer.clip, optimizer.weight_decay) == (2500, 0.0, 1.0, 0.0)
    assert (config.mse_weight, config.ce_weight, config.ema_decay) == (1.0, 0.25, 0.9999)
    assert config.sigma.to_dict() == dict(distribution="logit_normal", shift=4.0)
    assert {name: source.weight for name, source in config.data.sources.items()} == recipes.RVR_MIX
    assert (config.vae_sides, config.vit_sides) == ((1024, 512), (980, 378)) and config.data.text_dropout == 0.1
    assert config.lora is None and config.dtype == "bfloat16"
    lora = load_config(toy.CONFIGS / "bagel_rvr_lora_v6e_16.py").lora
    base = PUBLISHED["bagel-7b-mot"].boxed(("bagel",))["bagel"]
    made = jax.eval_shape(lambda: init_lora(jax.random.key(0), base, lora.targets, lora.rank))
    paths = {path.removesuffix("/a") for path in traverse_util.flatten_dict(made, sep="/") if path.endswith("/a")}
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj")
    assert paths == {f"decoder/layers/{expert}/{name}" for expert in ("und", "gen") for name in names}
