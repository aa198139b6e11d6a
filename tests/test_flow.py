"""Schedules, stepping, guidance and packing, against diffusers."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_jax import flow
from refine_jax.errors import RefineError

torch.set_num_threads(1)
some = settings(max_examples=60, deadline=None, derandomize=True)
few = settings(max_examples=20, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def reference_sigmas(config: dict, num_steps: int, image_tokens: int):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    get = scheduler.config.get
    mu = edit_plus.calculate_shift(
        image_tokens,
        get("base_image_seq_len", 256),
        get("max_image_seq_len", 4096),
        get("base_shift", 0.5),
        get("max_shift", 1.15),
    )
    sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
    edit_plus.retrieve_timesteps(scheduler, num_steps, "cpu", sigmas=sigmas, mu=mu)
    return scheduler.sigmas.numpy()


@some
@given(
    config=st.fixed_dictionaries(
        {},
        optional={
            "use_dynamic_shifting": st.booleans(),
            "base_shift": st.floats(0.1, 1.5),
            "max_shift": st.floats(0.1, 2.5),
            "base_image_seq_len": st.integers(16, 512),
            "max_image_seq_len": st.integers(1024, 8192),
            "shift": st.floats(0.5, 6.0),
            "shift_terminal": st.one_of(st.none(), st.floats(0.001, 0.3)),
            "time_shift_type": st.sampled_from(["exponential", "linear"]),
            "num_train_timesteps": st.sampled_from([1000, 100]),
            "invert_sigmas": st.just(False),
            "stochastic_sampling": st.just(False),
        },
    ),
    num_steps=st.integers(2, 60),
    image_tokens=st.integers(16, 9000),
)
def test_schedule_equals_diffusers(config, num_steps, image_tokens):
    got = flow.schedule(flow.SchedulerConfig.from_dict(config), num_steps, image_tokens)
    assert got.dtype == np.float32 and got.shape == (num_steps + 1,)
    np.testing.assert_allclose(got, reference_sigmas(config, num_steps, image_tokens), atol=1e-6)


def test_the_released_schedule_is_a_shift_by_three():
    config = flow.SCHEDULERS["refineanything"]
    for n in (1, 4, 8, 40):
        s = np.linspace(1, 1 / n, n)
        got = flow.schedule(config, n, 1234)
        np.testing.assert_allclose(got[:-1], 3 * s / (1 + 2 * s), atol=1e-7)
        assert got[-1] == 0 and got[0] == 1
    released = {
        "base_image_seq_len": 256, "base_shift": math.log(3), "max_image_seq_len": 8192, "max_shift": math.log(3),
        "num_train_timesteps": 1000, "shift": 1.0, "shift_terminal": None, "use_dynamic_shifting": True,
    }  # fmt: skip
    np.testing.assert_allclose(flow.schedule(config, 8, 4096), reference_sigmas(released, 8, 4096), atol=1e-6)
    assert flow.SchedulerConfig.from_dict(released) == config


def test_the_base_models_schedule():
    published = {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.34.0.dev0",
        "base_image_seq_len": 256, "base_shift": 0.5, "invert_sigmas": False, "max_image_seq_len": 8192,
        "max_shift": 0.9, "num_train_timesteps": 1000, "shift": 1.0, "shift_terminal": 0.02,
        "stochastic_sampling": False, "time_shift_type": "exponential", "use_beta_sigmas": False,
        "use_dynamic_shifting": True, "use_exponential_sigmas": False, "use_karras_sigmas": False,
    }  # fmt: skip
    config = flow.SchedulerConfig.from_dict(json.loads(json.dumps(published)))
    assert config == flow.SCHEDULERS["qwen-image"]
    got = flow.schedule(config, 40, 4096)
    np.testing.assert_allclose(got, reference_sigmas(published, 40, 4096), atol=1e-6)
    np.testing.assert_allclose(got[[0, -2, -1]], [1, 0.02, 0], atol=1e-7)
    assert flow.dynamic_mu(config, 256) == pytest.approx(0.5) and flow.dynamic_mu(config, 8192) == pytest.approx(0.9)
    assert flow.schedule(config, 1, 4096).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "config",
    [
        {"invert_sigmas": True},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"stochastic_sampling": True},
        {"time_shift_type": "cosine"},
        {"surprise": 1},
        {"_class_name": "DDIMScheduler"},
        {"use_dynamic_shifting": True, "base_image_seq_len": 256, "max_image_seq_len": 256},
        {"shift_terminal": 1.0},
    ],
)
def test_unsupported_schedulers_are_refused(config):
    with pytest.raises(RefineError) as error:
        flow.SchedulerConfig.from_dict(config)
    assert "\n" not in str(error.value) and "scheduler" in str(error.value)


def test_no_steps_are_refused():
    with pytest.raises(RefineError, match="steps"):
        flow.schedule(flow.SchedulerConfig(), 0, 16)


def test_shift_is_defined_at_both_ends_and_on_jax_arrays():
    ends = jnp.array([0.0, 1.0])
    for kind, mu in (("exponential", 0.7), ("linear", 2.0)):
        np.testing.assert_allclose(flow.time_shift(ends, mu, kind), ends, atol=1e-7)
    s = jnp.linspace(0.1, 1, 7)
    got = jax.jit(lambda s: flow.stretch_to_terminal(s[::-1], 0.02))(s)
    np.testing.assert_allclose(got[jnp.array([0, -1])], [1, 0.02], atol=1e-6)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@few
@given(seed=seeds)
def test_noising_target_and_euler_agree(seed):
    """One Euler step along the exact velocity walks the straight line exactly; per-item and scalar sigmas agree."""
    z0, eps = normal(seed, 3, 4, 6, 5), normal(seed + 1, 3, 4, 6, 5)
    s, t = np.random.default_rng(seed).random((2, 3)).astype(np.float32)
    x = flow.noise_latents(z0, eps, s)
    got = flow.euler_step(x, flow.velocity_target(z0, eps), s, t)
    np.testing.assert_allclose(got, flow.noise_latents(z0, eps, t), atol=2e-6)
    for i in range(3):
        np.testing.assert_allclose(flow.noise_latents(z0[i : i + 1], eps[i : i + 1], s[i]), x[i : i + 1], atol=1e-6)
    np.testing.assert_array_equal(flow.noise_latents(z0, eps, 1.0), eps)
    np.testing.assert_array_equal(flow.noise_latents(z0, eps, 0.0), z0)
    assert flow.noise_latents(jnp.asarray(z0, jnp.bfloat16), eps, s).dtype == jnp.bfloat16


def test_a_whole_sampling_run_equals_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    scheduler.set_timesteps(sigmas=flow.sigmas(9), mu=0.7)
    x = normal(0, 2, 10, 8)
    ours, theirs = jnp.asarray(x), torch.from_numpy(x)
    sigma = scheduler.sigmas.numpy()
    for i, t in enumerate(scheduler.timesteps):
        v = normal(i + 1, 2, 10, 8)
        theirs = scheduler.step(torch.from_numpy(v), t, theirs, return_dict=False)[0]
        ours = flow.euler_step(ours, jnp.asarray(v), sigma[i], sigma[i + 1])
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)


@few
@given(seed=seeds, scale=st.floats(0, 8))
def test_true_cfg_equals_the_pipelines_formula(seed, scale):
    pos, neg = normal(seed, 2, 7, 64), normal(seed + 1, 2, 7, 64)
    p, n = torch.from_numpy(pos), torch.from_numpy(neg)
    combined = n + scale * (p - n)
    want = combined * (torch.norm(p, dim=-1, keepdim=True) / torch.norm(combined, dim=-1, keepdim=True))
    got = jax.jit(flow.true_cfg)(pos, neg, scale)
    np.testing.assert_allclose(got, want.numpy(), atol=1e-6 * max(1, np.abs(want.numpy()).max()))
    np.testing.assert_allclose(flow.true_cfg(pos, neg, np.full(2, scale, np.float32)), got, atol=1e-5)


def test_true_cfg_edges():
    pos, neg = normal(0, 2, 3, 8), normal(1, 2, 3, 8)
    np.testing.assert_allclose(flow.true_cfg(pos, neg, 1.0), pos, atol=1e-6)
    zero = np.zeros_like(pos)
    assert not np.any(flow.true_cfg(zero, zero, 4.0))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=seeds, rows=st.integers(1, 4), columns=st.integers(1, 4), channels=st.sampled_from([1, 3, 16]))
def test_packing_equals_the_pipeline(seed, rows, columns, channels):
    pipeline = edit_plus.QwenImageEditPlusPipeline
    h, w = 2 * rows, 2 * columns
    x = normal(seed, 2, h, w, channels)
    want = pipeline._pack_latents(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), 2, channels, h, w)
    got = flow.pack_latents(x)
    np.testing.assert_array_equal(got, want.numpy())
    back = pipeline._unpack_latents(want, h * 8, w * 8, 8)[:, :, 0].permute(0, 2, 3, 1)
    np.testing.assert_array_equal(back.numpy(), x)
    np.testing.assert_array_equal(flow.unpack_latents(got, (h, w)), x)


def test_packing_refuses_sizes_that_do_not_fit():
    with pytest.raises(RefineError, match="3x4"):
        flow.pack_latents(np.zeros((1, 3, 4, 2)))
    with pytest.raises(RefineError, match="4x4"):
        flow.unpack_latents(np.zeros((1, 5, 8)), (4, 4))


def test_training_sigmas_have_their_distribution():
    key = jax.random.key(0)
    n = (20_000,)
    uniform = np.asarray(flow.sample_sigma(key, n))
    assert 0 <= uniform.min() and uniform.max() <= 1 and abs(uniform.mean() - 0.5) < 0.01
    np.testing.assert_array_equal(uniform, flow.sample_sigma(key, n))
    logits = np.asarray(flow.sample_sigma(key, n, "logit_normal", mean=0.5, std=2.0))
    logits = np.log(logits / (1 - logits))
    assert abs(logits.mean() - 0.5) < 0.05 and abs(logits.std() - 2) < 0.05
    np.testing.assert_allclose(
        flow.sample_sigma(key, n, shift=3.0), 3 * uniform / (1 + 2 * uniform), rtol=1e-5, atol=1e-7
    )
    with pytest.raises(RefineError, match="beta"):
        flow.sample_sigma(key, n, "beta")
