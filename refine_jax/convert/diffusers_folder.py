"""A Qwen-Image-Edit pipeline as diffusers lays it out -> `ModelConfig` and parameters, from mappings at hand."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from refine_jax.convert.keys_mmdit import TABLE as MMDIT_TABLE
from refine_jax.convert.keys_vae import VAE_TABLE
from refine_jax.convert.keys_vl import layout_of, vl_table
from refine_jax.convert.mapping import to_tree
from refine_jax.errors import RefineError
from refine_jax.flow import SchedulerConfig
from refine_jax.model import ModelConfig
from refine_jax.models.mmdit import MMDiTConfig
from refine_jax.models.qwen_vae import VAEConfig
from refine_jax.models.qwen_vl import QwenVLConfig

# Sub-folder of a pipeline -> network.
NETWORKS = {"transformer": "mmdit", "vae": "vae", "text_encoder": "vl"}


def model_config(
    configs: Mapping[str, Mapping[str, Any]], *, dtype: str = "float32", param_dtype: str = "float32", **settings: Any
) -> ModelConfig:
    """The configuration of a pipeline.

    configs: sub-folder ("transformer", "vae", "text_encoder" and, if there is one, "scheduler") -> its config.json.
    settings: the other fields of `ModelConfig`. Raises RefineError for a missing folder or what is not supported.
    """
    missing = [name for name in NETWORKS if name not in configs]
    if missing:
        raise RefineError(f"pipeline: no configuration of {', '.join(missing)}; give a whole Qwen-Image-Edit pipeline")
    kinds = dict(dtype=dtype, param_dtype=param_dtype)
    if "scheduler" in configs:
        settings = {"scheduler": SchedulerConfig.from_dict(configs["scheduler"]), **settings}
    return ModelConfig(
        mmdit=MMDiTConfig.from_dict(configs["transformer"], **kinds),
        vae=VAEConfig.from_dict(configs["vae"], **kinds),
        vl=QwenVLConfig.from_dict(configs["text_encoder"], **kinds),
        **settings,
    )


def from_tensors(
    model: ModelConfig,
    tensors: Mapping[str, Mapping[str, np.ndarray]],
    *,
    place: Callable[[str, np.ndarray], Any] | None = None,
) -> dict[str, Any]:
    """The parameters of `model`, strictly accounted for: {"mmdit": tree, "vae": tree, "vl": tree}.

    tensors: sub-folder -> name -> array (memory-mapped readers stay so). place(path, leaf): see `mapping.to_tree`; the
    path begins with the network's name. Raises RefineError listing every tensor that does not fit.
    """
    missing = [name for name in NETWORKS if name not in tensors]
    if missing:
        raise RefineError(f"pipeline: no tensors of {', '.join(missing)}; give a whole Qwen-Image-Edit pipeline")
    tables = {
        "transformer": MMDIT_TABLE,
        "vae": VAE_TABLE,
        "text_encoder": vl_table(model.vl, layout_of(tensors["text_encoder"])),
    }
    abstract = model.abstract()

    def placed(network: str) -> Callable[[str, np.ndarray], Any] | None:
        return None if place is None else lambda path, leaf: place(f"{network}/{path}", leaf)

    return {
        network: to_tree(tensors[folder], tables[folder], abstract[network], place=placed(network), what=folder)
        for folder, network in NETWORKS.items()
    }
