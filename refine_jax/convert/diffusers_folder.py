"""A Qwen-Image-Edit pipeline as diffusers lays it out -> `ModelConfig` and parameters.

`read_pipeline` opens a folder; `model_config` and `from_tensors` do the same from mappings at hand.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refine_jax import prompts
from refine_jax.convert import reader
from refine_jax.convert.keys_mmdit import TABLE as MMDIT_TABLE
from refine_jax.convert.keys_vae import VAE_TABLE
from refine_jax.convert.keys_vl import layout_of, vl_table
from refine_jax.convert.mapping import Table, to_tree
from refine_jax.convert.source import Folder, Tensors, small_files
from refine_jax.errors import RefineError
from refine_jax.flow import SchedulerConfig
from refine_jax.model import ModelConfig
from refine_jax.models.mmdit import MMDiTConfig
from refine_jax.models.qwen_vae import VAEConfig
from refine_jax.models.qwen_vl import QwenVLConfig

# Sub-folder of a pipeline -> network.
NETWORKS = {"transformer": "mmdit", "vae": "vae", "text_encoder": "vl"}

MODEL_INDEX = "model_index.json"
# The pipeline whose prompts show several pictures; what Qwen-Image-Edit-2509 and -2511 name.
PIPELINE = "QwenImageEditPlusPipeline"
_STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_CLASSES = {
    "transformer": "QwenImageTransformer2DModel",
    "vae": "AutoencoderKLQwenImage",
    "text_encoder": "Qwen2_5_VLForConditionalGeneration",
}


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


class Pipeline(Folder):
    """An opened pipeline folder."""

    kind, family = PIPELINE, ModelConfig

    def read_model(self, **settings: Any) -> ModelConfig:
        """`model_config` of the folder."""
        return model_config(self.configs, **settings)

    def table(self, network: str) -> Table:
        """The key table of a sub-folder's tensors."""
        folder = next(folder for folder, name in NETWORKS.items() if name == network)
        return _table(self.model(), folder, self.networks[network].tensors)

    def tokenizer_sources(self) -> list[Path]:
        """All of `tokenizer/`."""
        folder = self.folder / "tokenizer"
        return small_files(folder.iterdir()) if folder.is_dir() else []

    def tokenizer(self) -> Any:
        """Of `tokenizer/`."""
        tokenizer = prompts.load_tokenizer(self.folder / "tokenizer")
        prompts.check_vocabulary(tokenizer, self.model().vl.text.vocab_size, str(self.folder))
        return tokenizer

    def tokenizer_files(self) -> dict[str, bytes]:
        """`tokenizer/` as it is."""
        self.tokenizer()
        return {path.name: path.read_bytes() for path in self.tokenizer_sources()}

    def describe(self, model: ModelConfig) -> list[str]:
        """What the configurations decide."""
        return [f"zero_cond_t={model.mmdit.zero_cond_t}", f"scheduler: {model.scheduler}"]


def read_pipeline(folder: str | Path) -> Pipeline:
    """Open a pipeline folder: model_index.json, and of each network its config.json and the headers of its tensors.

    Raises RefineError for another pipeline, a missing or damaged file, an index that points elsewhere.
    """
    folder = Path(folder)
    index = reader.read_object(folder / MODEL_INDEX)
    kind = index.get("_class_name")
    if kind != PIPELINE:
        raise RefineError(
            f"{folder / MODEL_INDEX}: the pipeline is {kind!r}, refinement needs {PIPELINE}; give the folder of "
            "Qwen-Image-Edit-2509 or -2511"
        )
    for name, wanted in _CLASSES.items():
        given = index.get(name)
        if not isinstance(given, list) or len(given) != 2 or given[1] != wanted:
            raise RefineError(f"{folder / MODEL_INDEX}: {name} is {given!r}, expected a {wanted}")
    configs = {name: reader.read_object(folder / name / "config.json") for name in NETWORKS}
    configs["scheduler"] = reader.read_object(folder / "scheduler" / "scheduler_config.json")
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (path := folder / "processor" / name).is_file():
            configs["text_encoder"] = _with_processor(configs["text_encoder"], reader.read_object(path))
            break
    networks = {NETWORKS[name]: Tensors(name, reader.read_folder(folder / name, _STEMS[name])) for name in NETWORKS}
    return Pipeline(folder, configs, networks)


def _with_processor(encoder: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder's configuration with the pixel statistics of its image processor."""
    values = processor.get("image_processor") or processor
    known = {name: values[name] for name in ("image_mean", "image_std") if isinstance(values, dict) and name in values}
    vision = encoder.get("vision_config")
    return {**encoder, "vision_config": {**vision, **known}} if isinstance(vision, dict) else dict(encoder)


def _table(model: ModelConfig, folder: str, names: Mapping[str, Any]) -> Table:
    """The key table of a sub-folder's tensors."""
    if folder == "text_encoder":
        return vl_table(model.vl, layout_of(names))
    return {"transformer": MMDIT_TABLE, "vae": VAE_TABLE}[folder]


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
    abstract = model.abstract()

    def placed(network: str) -> Callable[[str, np.ndarray], Any] | None:
        return None if place is None else lambda path, leaf: place(f"{network}/{path}", leaf)

    return {
        network: to_tree(
            tensors[folder],
            _table(model, folder, tensors[folder]),
            abstract[network],
            place=placed(network),
            what=folder,
        )
        for folder, network in NETWORKS.items()
    }
