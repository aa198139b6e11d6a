"""A Qwen-Image-Edit pipeline as diffusers lays it out -> `ModelConfig` and parameters.

`read_pipeline` opens a folder; `model_config` and `from_tensors` do the same from mappings at hand.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from refine_jax.convert import reader
from refine_jax.convert.keys_mmdit import TABLE as MMDIT_TABLE
from refine_jax.convert.keys_vae import VAE_TABLE
from refine_jax.convert.keys_vl import layout_of, vl_table
from refine_jax.convert.mapping import Table, Transform, assign, to_tree
from refine_jax.errors import RefineError, listed
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


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter and the tensors that it is made of: (block of the stack or None, tensor, transform)."""

    path: str
    abstract: jax.ShapeDtypeStruct
    pieces: tuple[tuple[int | None, reader.Tensor, Transform], ...]

    @property
    def stacked(self) -> bool:
        """Whether axis 0 counts blocks."""
        return self.pieces[0][0] is not None


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """An opened folder: configurations and headers, no tensor read yet."""

    folder: Path
    configs: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, reader.Tensor]]

    def model(self, **settings: Any) -> ModelConfig:
        """`model_config` of the folder."""
        try:
            model = model_config(self.configs, **settings)
            for folder, network in NETWORKS.items():
                _check_numbers(getattr(model, network), f"{folder}/config.json: ")
            return model
        except RefineError as error:
            raise RefineError(f"{self.folder}: {error}") from None
        except (TypeError, ValueError, ArithmeticError, AttributeError) as error:  # a field of another type
            reason = " ".join(str(error).split())[:200]
            raise RefineError(
                f"{self.folder}: a configuration holds what it cannot ({reason}); copy or download the folder again"
            ) from None

    @cached_property
    def leaves(self) -> dict[str, dict[str, Leaf]]:
        """Network -> path -> leaf, with the dtypes of the files.

        Raises RefineError that lists every tensor that does not fit, and every leaf whose tensors differ in dtype.
        """
        model = self.model()
        try:
            abstract = model.abstract()
        except (TypeError, ValueError, ArithmeticError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RefineError(f"{self.folder}: no network has the sizes of its config.json ({reason})") from None
        found: dict[str, dict[str, Leaf]] = {}
        for folder, network in NETWORKS.items():
            tensors = self.tensors[folder]
            shapes = {name: tensor.shape for name, tensor in tensors.items()}
            plan = assign(shapes, _table(model, folder, tensors), abstract[network], str(self.folder / folder))
            problems, leaves = [], {}
            flat = traverse_util.flatten_dict(abstract[network], sep="/")
            for path, pieces in plan.items():
                pieces = tuple((index, tensors[key], how) for index, key, how in sorted(pieces, key=_by_index))
                kinds = {tensor.dtype.name for _, tensor, _ in pieces}
                if len(kinds) > 1 or not kinds <= {"float32", "bfloat16", "float16"}:
                    problems += [f"{tensor.name} is {tensor.dtype.name}" for _, tensor, _ in pieces]
                leaves[path] = Leaf(path, jax.ShapeDtypeStruct(flat[path].shape, pieces[0][1].dtype), pieces)
            if problems:
                raise RefineError(
                    f"{self.folder / folder}: dtypes that cannot be used or differ within a stack: {listed(problems)}; "
                    "give a checkpoint in bfloat16, float16 or float32"
                )
            found[network] = leaves
        return found


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
    return Pipeline(folder, configs, {name: reader.read_folder(folder / name, stem) for name, stem in _STEMS.items()})


def _with_processor(encoder: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder's configuration with the pixel statistics of its image processor."""
    values = processor.get("image_processor") or processor
    known = {name: values[name] for name in ("image_mean", "image_std") if isinstance(values, dict) and name in values}
    vision = encoder.get("vision_config")
    return {**encoder, "vision_config": {**vision, **known}} if isinstance(vision, dict) else dict(encoder)


def _check_numbers(config: Any, where: str) -> None:
    """Whole numbers where a configuration counts something, none of them absurd."""
    kinds = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), kinds[field.name]
        if dataclasses.is_dataclass(value):
            _check_numbers(value, where)
            continue
        counts = [value] if kind is int else value if kind == tuple[int, ...] and isinstance(value, tuple) else []
        wrong = kind == tuple[int, ...] and not isinstance(value, tuple) or kind is bool and not isinstance(value, bool)
        modules = any(word in field.name for word in ("layers", "depth", "blocks"))
        most = 500 if modules else 2**24
        wrong = wrong or len(counts) > 64
        if wrong or any(type(n) is not int or not 0 <= n <= most for n in counts):
            raise RefineError(f"{where}{field.name} is {value!r}, which no such network has")


def _by_index(piece: tuple[int | None, str, Transform]) -> int:
    return -1 if piece[0] is None else piece[0]


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
