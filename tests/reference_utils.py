"""Helpers for comparing our networks with their PyTorch references on random weights."""

import os

import numpy as np
import torch

torch.set_num_threads(1)

# Compiling is most of the time of small programs, and the arithmetic is the same at any level (see conftest.py).
QUICK = None if os.environ.get("REFINE_JAX_TESTS_COMPILE") == "default" else {"xla_backend_optimization_level": 0}


def randomise(module: torch.nn.Module, seed: int, *, gain: float = 1.0) -> torch.nn.Module:
    """Give every parameter non-trivial values in place, at scales that keep activations of order one.

    Matrices and kernels: normal / sqrt(fan in) times `gain`. Vectors named bias: 0.1 x normal. Every other vector (norm
    scales, also those stored as [C, 1, 1]): 1 + 0.2 x normal. Many of these initialise to ones and zeros, which would
    hide a forgotten or transposed one.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if name.endswith("bias"):
                value = 0.1 * noise
            elif parameter.numel() == parameter.shape[0] or parameter.ndim < 2:
                value = 1.0 + 0.2 * noise
            else:
                value = gain * noise / np.sqrt(parameter[0].numel())
            parameter.copy_(value.to(parameter.dtype))
    return module.eval()


def numpy_state(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The state dict as numpy arrays (bfloat16 becomes float32)."""
    state = module.state_dict()
    return {
        key: (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()
        for key, value in state.items()
    }


def meta_shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the state dict; the module may live on the "meta" device."""
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def as_numpy(x) -> np.ndarray:
    """torch, jax or numpy array -> float64 numpy."""
    if isinstance(x, torch.Tensor):
        x = x.detach().float().cpu().numpy()
    return np.asarray(x, dtype=np.float64)


def relative_error(ours, reference) -> float:
    """‖ours − reference‖ / ‖reference‖; the shapes must be equal and everything finite."""
    ours, reference = as_numpy(ours), as_numpy(reference)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    assert np.isfinite(ours).all() and np.isfinite(reference).all()
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def difference(ours, reference) -> float:
    """The larger of ‖ours − reference‖ / ‖reference‖ and max |ours − reference| / max |reference|."""
    return max(
        relative_error(ours, reference), largest_error(ours, reference) / float(np.abs(as_numpy(reference)).max())
    )


def largest_error(ours, reference) -> float:
    """max |ours − reference|."""
    ours, reference = as_numpy(ours), as_numpy(reference)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.abs(ours - reference).max())


def randn(seed: int, *shape: int) -> np.ndarray:
    """Standard normal float32."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
