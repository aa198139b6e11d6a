"""One LoRA training step against PEFT on diffusers' transformer: same weights, batch, σ and noise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import toy
from peft import LoraConfig
from reference_utils import randn, relative_error
from test_mmdit import pair

from refine_jax import flow, objectives

RANK, SCALE, LAYERS = 3, 5.0 / 3.0, ("to_q", "to_k", "to_v", "to_out")
GRID = (4, 6)  # latent; target, image, reference and mask share it, as the objective's batches do


@pytest.mark.parametrize("variant", ["2509", "2511"])
def test_loss_and_gradients_equal_pefts(variant):
    reference, config, params = pair(21, zero_cond_t=variant == "2511", joint_attention_dim=16)
    model = dataclasses.replace(toy.model_config(), mmdit=config)
    batch, channels, length = 2, config.out_channels, 7
    rng = np.random.default_rng(2)
    names = ("target", "image", "reference", "mask")
    encoded = {name: randn(k, batch, *GRID, channels) for k, name in enumerate(names)}
    encoded |= dict(
        has_reference=np.ones(batch, bool),
        text=randn(9, batch, length, config.joint_attention_dim),
        text_mask=np.array([[True] * 7, [True] * 4 + [False] * 3]),
        band=rng.random((batch, *GRID), np.float32),
        region=rng.random((batch, *GRID)).astype(np.float32),
    )

    # ------------------------------------------------------------------------------------------------------- PEFT
    reference.add_adapter(
        LoraConfig(r=RANK, lora_alpha=5, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    )
    torch.manual_seed(0)
    weights = {n: p for n, p in reference.named_parameters() if "lora_" in n}
    assert len(weights) == 2 * 4 * config.num_layers and all(p.requires_grad for p in weights.values())
    for p in weights.values():
        torch.nn.init.normal_(p, std=0.2)
    key = jax.random.key(4)
    k_sigma, k_noise = jax.random.split(key)
    sigma = flow.sample_sigma(k_sigma, (batch,), "logit_normal", shift=3.0)
    noise = jax.random.normal(k_noise, encoded["target"].shape)
    pack = lambda x: torch.from_numpy(np.array(flow.pack_latents(jnp.asarray(x))))
    z0, eps, level = pack(encoded["target"]), pack(noise), torch.from_numpy(np.array(sigma))[:, None, None]
    images = [pack(encoded[name]) for name in names[1:]]
    prediction = reference(
        hidden_states=torch.cat([(1 - level) * z0 + level * eps, *images], 1),
        encoder_hidden_states=torch.from_numpy(encoded["text"]),
        encoder_hidden_states_mask=torch.from_numpy(encoded["text_mask"]),
        timestep=level[:, 0, 0],
        img_shapes=[[(1, GRID[0] // 2, GRID[1] // 2)] * 4] * batch,
        return_dict=False,
    )[0][:, : z0.shape[1]]
    # The paper's loss, written on the latent grid.
    unpack = lambda x: x.reshape(batch, GRID[0] // 2, GRID[1] // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    error = unpack((prediction - (eps - z0)) ** 2).reshape(batch, channels, *GRID).mean(1)
    wanted = (error * (1 + 9.0 * torch.from_numpy(encoded["band"]))).mean()
    wanted.backward()

    # ------------------------------------------------------------------------------------------------------- ours
    def tree(read):
        def stacked(layer, kind):
            name = {"to_out": "to_out.0"}.get(layer, layer)
            key = "transformer_blocks.{}.attn.{}.lora_{}.default.weight"
            leaves = [read(weights[key.format(block, name, kind)]) for block in range(config.num_layers)]
            return np.stack([leaf.detach().numpy().T for leaf in leaves])

        return {"blocks": {"attn": {k: {"a": stacked(k, "A"), "b": stacked(k, "B")} for k in LAYERS}}}

    def loss(lora):
        lora = jax.tree_util.tree_map_with_path(lambda path, x: x * SCALE if path[-1].key == "b" else x, lora)
        settings = dict(distribution="logit_normal", shift=3.0)
        return objectives.flow_loss(model, {"mmdit": params}, {"mmdit": lora}, encoded, key, settings, 9.0)

    (found, parts), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(tree(lambda p: p))
    assert relative_error(found, wanted.detach()) <= 1e-5
    assert relative_error(parts["base"], error.mean().detach()) <= 1e-5
    expected = tree(lambda p: p.grad)
    worst = jax.tree.map(relative_error, gradients, expected)
    assert max(jax.tree.leaves(worst)) <= 1e-4, worst
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))
