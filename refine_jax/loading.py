"""One door to weights: "tiny", a model folder, a folder of PyTorch files (a pipeline, BAGEL, RvR), or a hub name."""

import collections
import dataclasses
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from flax.linen import meta
from tqdm import tqdm

from refine_jax import checkpoint, executables, flow, memory, parallel, prompts
from refine_jax.bagel import BagelModel, Marks
from refine_jax.convert import bagel_folder, folders, lora
from refine_jax.convert.source import Folder, Leaf
from refine_jax.convert.writer import copy_into
from refine_jax.errors import RefineError
from refine_jax.limits import DTYPES
from refine_jax.model import ModelConfig, Size
from refine_jax.models.bagel import BagelConfig
from refine_jax.models.quantize import check_finite, check_kind, quantized_paths
from refine_jax.models.quantize import quantize as quantize_matrix

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "weights/**", "tokenizer/**"]

# Models of the package: their folders, and what made them. To `Regenerator.load` "tiny" is the second.
BUNDLED = {
    "tiny": ("tiny", "configs/tiny_vae.py, then configs/tiny.py, then configs/tiny_letters.py"),
    "tiny-rvr": ("tiny_rvr", "configs/tiny_world_vae.py, tiny_world.py, tiny_world_see.py, tiny_rvr.py"),
}

# In the header of an adapter's file: what it was trained to be shown.
_SHOWN = "refine_jax_conditioning"

Model = ModelConfig | BagelModel
_NETWORKS: dict[type, tuple[str, ...]] = {ModelConfig: ("mmdit", "vae", "vl"), BagelModel: ("bagel", "vae")}
LoraLike = str | os.PathLike | tuple[str | os.PathLike, float]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model in memory, its weights maybe on their way: configuration, trees under "mmdit", "vae", "vl" or "bagel",
    "vae", LoRA trees under the same names."""

    config: Model
    variables: dict[str, Any] | executables.Later
    lora: dict[str, Any]
    tokenizer: Any


def load(
    model: str | os.PathLike,
    *,
    dtype: str | None = None,
    vae_area: int | None = None,
    condition_area: int | None = None,
    vae_sides: Size | None = None,
    vit_sides: Size | None = None,
    scheduler: str | None = None,
    weights: str | None = None,
    adapters: LoraLike | Sequence[LoraLike] = (),
    merge: bool = False,
    quantize: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: parallel.Rules = parallel.DEFAULT_RULES,
    progress: bool = False,
    later: bool = False,
    wanted: tuple[str, ...] = (),
) -> Loaded:
    """Load a model; the arguments are those of `Refiner.load` and `Regenerator.load`.

    dtype: None is `Source.stored_dtype`. vae_area, condition_area, scheduler: of the Qwen-Image family; vae_sides,
    vit_sides, weights: of BAGEL and RvR (`open_model`). quantize: None, or "int8" (`quantized`): matrices are quantised
    one at a time as they are read, with the adapters that are to be merged. wanted: (who asks, and the kinds of
    conditioning that will do), as `ModelConfig.require` takes them; checked before any weight is read. Without, whoever
    calls takes both families. Weights that the devices cannot hold are an error before any is read.
    """
    if dtype not in (None, *DTYPES):
        raise RefineError(f"dtype {dtype!r}: give 'float32' or 'bfloat16'")
    if scheduler not in (None, "released", "checkpoint"):
        raise RefineError(f"scheduler {scheduler!r}: give 'released' or 'checkpoint'")
    check_kind(quantize)
    given = _adapters(adapters)
    sizes = dict(vae_area=vae_area, condition_area=condition_area, vae_sides=vae_sides, vit_sides=vit_sides)
    settings = {name: value for name, value in sizes.items() if value is not None}
    source = open_model(model, weights=weights, **settings)
    dtype = dtype or source.stored_dtype()
    config = quantized(_with_kinds(source.config, dtype=dtype, param_dtype=dtype), quantize)
    if isinstance(config, BagelModel):
        if wanted:
            _require_bagel(config, *wanted)
        if scheduler is not None:
            raise RefineError(f"scheduler {scheduler!r}: a BAGEL or RvR model has but one; leave it out")
    else:
        released = source.foreign if scheduler is None else scheduler == "released"

    tokenizer = source.tokenizer()
    boxed = config.boxed()
    abstract = meta.unbox(boxed)
    # Read before the weights: a bad file costs no time.
    read = [lora.read_adapter(path, abstract) for path, _ in given]
    extra = lora.combine(read, [weight for _, weight in given])
    if isinstance(config, ModelConfig):
        config = _sampling(_shown(config, read), released, [path for path, _ in given], read)
    if wanted and isinstance(config, ModelConfig):
        config.require(*wanted)
    shardings = parallel.param_shardings(boxed, mesh, rules)
    placed = parallel.placed(abstract, shardings)
    remedies = ["dtype bfloat16"] * (dtype != "bfloat16") + ["quantize int8"] * (not quantize)
    remedies.append("a mesh of more devices (mesh.fsdp)")
    memory.check(placed, f"model {str(model)!r}: its weights", f"give {' or '.join(remedies)}")
    read = lambda: source.parameters(abstract, shardings, dtype, progress)
    if extra and merge:
        before, after = _by_kernel(extra, abstract)
        extra = {}
        read = lambda: lora.merge(source.parameters(abstract, shardings, dtype, progress, before), after, consume=True)
    if later:
        variables = executables.Later(placed, read)
    else:
        variables = read()
    extra = jax.tree.map(lambda x: np.asarray(x).astype(dtype), extra)
    return Loaded(config, variables, parallel.place(extra, mesh), tokenizer)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model on the disk, its files checked and its weights not yet read.

    foreign: it comes from another program's files, converted or not.
    """

    folder: Path
    config: Model
    foreign: bool
    _files: Folder | None

    def to_train(self) -> Model:
        """The configuration, sampled as `load` has it sampled: what is trained goes on so, in pictures and folders."""
        return _released(self.config) if self.foreign and isinstance(self.config, ModelConfig) else self.config

    def stored_dtype(self) -> str:
        """What the weights take in memory if nobody asks for more: "bfloat16" where most of them are stored so, or else
        "float32"."""
        if self._files is None:
            sizes = checkpoint.stored_sizes(self.folder)
        else:
            sizes = collections.Counter()
            for leaf in (leaf.abstract for leaves in self._files.leaves.values() for leaf in leaves.values()):
                sizes[leaf.dtype.name] += leaf.size * leaf.dtype.itemsize
        return "bfloat16" if 2 * sizes["bfloat16"] > sizes.total() else "float32"

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        if self._files is not None:
            return self._files.tokenizer()
        of_bagel = isinstance(self.config, BagelModel)
        tokenizer = prompts.load_tokenizer(self.folder / "tokenizer", placeholder=not of_bagel)
        rows = self.config.bagel.vocab_size if of_bagel else self.config.vl.text.vocab_size
        prompts.check_vocabulary(tokenizer, rows, str(self.folder))
        if of_bagel:
            Marks.of(tokenizer)
        return tokenizer

    def write_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer's files to `folder`."""
        if self._files is None:
            shutil.copytree(self.folder / "tokenizer", folder, dirs_exist_ok=True)
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self._files.tokenizer_files().items():
            (folder / name).write_bytes(data)

    def parameters(
        self,
        abstract: Mapping[str, Any],
        shardings: Mapping[str, Any],
        dtype: str,
        progress: bool = False,
        merged: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The parameters of the networks of `abstract`, floating ones as `dtype`, placed as `shardings` says.

        Matrices that are int8 in `abstract` are quantised as they are read. merged: a ``lora`` collection to add to
        such matrices before.
        """
        change = _adding(merged or {})
        if self._files is None:
            return checkpoint.load_weights(self.folder, abstract, dtype, shardings, progress, change)
        return _load_files(self._files, abstract, shardings, dtype, progress, change)


def open_model(
    model: str | os.PathLike,
    *,
    weights: str | None = None,
    dtype: str | None = None,
    param_dtype: str | None = None,
    **settings: Any,
) -> Source:
    """The model that `Refiner.load` or `Regenerator.load` would load: its configuration, and a way to its weights.

    weights: which file of weights of a BAGEL or RvR folder, "rvr" or "ema" (default: rvr where there is one); the path
    of the file in place of the folder's says the same. dtype, param_dtype: of computation and of parameters, as all
    networks' configurations are to say. settings: fields of `ModelConfig` or `BagelModel` to replace. Raises
    `RefineError` as `Refiner.load` does.
    """
    folder = resolve(model)
    kinds = {name: value for name, value in (("dtype", dtype), ("param_dtype", param_dtype)) if value}
    if (folder / checkpoint.MANIFEST).is_file() or not folders.is_foreign(folder):
        manifest = checkpoint.read_manifest(folder)
        if weights is not None:
            raise RefineError(f"{folder}: is a model folder with its own weights; leave out weights {weights!r}")
        family = BagelModel if "bagel" in manifest else ModelConfig
        _check_settings(family, settings)
        config = _with_kinds(family.from_manifest(manifest, **settings), **kinds)
        return Source(folder, config, "source" in manifest, None)
    files = folders.open_folder(folder, weights)
    _check_settings(files.family, settings)
    return Source(files.folder, files.model(**kinds, **settings), True, files)


def _with_kinds(config: Model, **kinds: str) -> Model:
    """The configuration with other dtypes in all its networks, BAGEL's tower included."""

    def other(network: Any) -> Any:
        tower = {"vit": dataclasses.replace(network.vit, **kinds)} if isinstance(network, BagelConfig) else {}
        return dataclasses.replace(network, **kinds, **tower)

    parts = {name: other(getattr(config, name)) for name in _NETWORKS[type(config)]}
    return dataclasses.replace(config, **parts)


def quantized(config: Model, kind: str | None) -> Model:
    """The configuration of the same model with the matrices of its large networks in 8 bits: the MMDiT and the encoder,
    or BAGEL's decoder; as it is where `kind` is None. Its `abstract()` and `boxed()` have them so.

    kind: "int8", weights alone (`models.quantize`). Raises `RefineError` for another.
    """
    names = [name for name in _NETWORKS[type(config)] if name != "vae"]
    return dataclasses.replace(config, **{name: quantized_part(getattr(config, name), kind) for name in names})


def quantized_part(network: Any, kind: str | None) -> Any:
    """`quantized`, of one network's configuration."""
    check_kind(kind)
    return network if kind is None else dataclasses.replace(network, param_dtype=kind)


def _check_settings(family: type, settings: Mapping[str, Any]) -> None:
    if foreign := sorted(settings.keys() - {field.name for field in dataclasses.fields(family)}):
        what = "BAGEL or RvR" if family is BagelModel else "Qwen-Image-Edit"
        raise RefineError(f"{', '.join(foreign)}: this is a {what} model, which has no such setting; leave it out")


def _require_bagel(config: BagelModel, purpose: str, *kinds: str) -> None:
    """As `ModelConfig.require`."""
    if config.conditioning not in kinds:
        raise RefineError(
            f"{purpose}: this is a BAGEL or RvR model, which regenerates whole pictures (Regenerator, refine-jax"
            f" regenerate), with conditioning {config.conditioning!r}; {' or '.join(map(repr, kinds))} is wanted"
        )


def read_config(model: str | os.PathLike, **settings: Any) -> Model:
    """The configuration of a model, without its weights."""
    return open_model(model, **settings).config


def resolve(model: str | os.PathLike) -> Path:
    """The folder of a model, or the file of weights in one of BAGEL.

    Downloads a name of the model hub ("owner/name" or "owner/name@revision").
    """
    bundled = BUNDLED.get(model) if isinstance(model, str) else None
    folder = Path(__file__).parent / "assets" / bundled[0] if bundled else Path(model)
    try:
        found = folder.is_dir() or bagel_folder.locate(folder) is not None
    except (OSError, ValueError):  # a name that no file system can hold
        found = False
    if found:
        return folder
    if bundled:
        raise RefineError(
            f"model {model!r}: this installation holds no bundled model; train it ({bundled[1]}) and give the folder"
            " that the run wrote, WORKDIR/model"
        )
    if _test(folder, Path.is_file):
        raise RefineError(
            f"model {str(model)!r}: is a file; give 'tiny', the folder of a model or of a diffusers pipeline, or"
            " owner/name (a LoRA is given beside a model, as lora)"
        )
    if not isinstance(model, str) or not _HUB_NAME.fullmatch(model):
        raise RefineError(f"model {str(model)!r}: no such model; give 'tiny', the folder of a model, or owner/name")
    from huggingface_hub import snapshot_download

    name, _, revision = model.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=_HUB_FILES))
    except Exception as error:  # the network's, the hub's and the file system's, all of other classes
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise RefineError(
            f"model {model!r}: is no folder here, and cannot be had from the model hub ({type(error).__name__}: "
            f"{reason}); download it elsewhere and give its folder"
        ) from None


def _test(path: Path, what: Callable[[Path], bool]) -> bool:
    """`what(path)`; False of a name that no file system can hold."""
    try:
        return what(path)
    except (OSError, ValueError):
        return False


def weighted_file(text: str) -> tuple[str, float]:
    """An adapter as commands name it, FILE or FILE:WEIGHT."""
    file, colon, weight = text.rpartition(":")
    try:
        return (file, float(weight)) if colon and file else (text, 1.0)
    except ValueError:
        return text, 1.0


def _adapters(given: LoraLike | Sequence[LoraLike] | None) -> list[tuple[Path, float]]:
    """None, one adapter or several, each with its weight."""
    if given is None:
        return []
    single = isinstance(given, (str, os.PathLike))
    single |= isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], (int, float))
    found = []
    for item in [given] if single else given:
        pair = isinstance(item, (tuple, list)) and len(item) == 2
        path, weight = item if pair else (item, 1.0)
        if not isinstance(path, (str, os.PathLike)):
            raise RefineError(f"lora {item!r}: give a file, a pair (file, weight), or a list of these")
        if not isinstance(weight, (int, float)) or not np.isfinite(weight):
            raise RefineError(f"lora {str(path)!r}: weight {weight!r}, give a finite number")
        if _test(Path(path), lambda file: not file.exists()):
            raise RefineError(f"{path}: no such file; give a LoRA as .safetensors")
        found.append((Path(path), float(weight)))
    return found


def adapter_metadata(config: ModelConfig) -> dict[str, str]:
    """What an adapter's file says of the conditioning that it was trained with; `load` acts on it."""
    said = {"conditioning": config.conditioning, "prompt": dataclasses.asdict(config.prompt)}
    return {_SHOWN: json.dumps(said)}


def adapter_to_train(settings: Mapping[str, Any], config: Model, init: Callable[[jax.Array], Any]) -> dict[str, Any]:
    """What a training that goes on from the adapter `settings["init_from"]` starts with, in the place of `init(key)`.

    settings: `config.lora`. config: the model that is trained; it must be shown what the adapter was trained with.
    Raises `RefineError` naming the file, as `convert.lora.training_values` does too.
    """
    wanted = meta.unbox(jax.eval_shape(init, jax.random.key(0)))["lora"]
    adapter = lora.read_adapter(settings["init_from"], config.abstract())
    if isinstance(config, ModelConfig):
        shown = _shown(config, [adapter])
        if (shown.conditioning, shown.prompt) != (config.conditioning, config.prompt):
            raise RefineError(
                f"{adapter.source}: was trained with conditioning {shown.conditioning!r} and its prompt, this training "
                f"has {config.conditioning!r}; set conditioning and prompt alike"
            )
    return {"lora": lora.training_values(adapter, wanted, settings["alpha"] / settings["rank"])}


def _shown(config: ModelConfig, adapters: Sequence[lora.Adapter]) -> ModelConfig:
    """The model with the conditioning of its adapters. Raises `RefineError` where they contradict each other."""
    found: dict[str, tuple[str, prompts.PromptTemplate]] = {}
    for adapter in adapters:
        if _SHOWN not in adapter.metadata:
            continue  # of another program
        try:
            said = json.loads(adapter.metadata[_SHOWN])
            found[adapter.source] = said["conditioning"], prompts.PromptTemplate(**said["prompt"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            reason = " ".join(str(error).split())[:100]
            raise RefineError(
                f"{adapter.source}: {_SHOWN} in its header is damaged ({reason}); copy it again"
            ) from None
    kinds = {kind for kind, _ in found.values()} | ({config.conditioning} - {"refine"})
    if len(kinds) > 1 or len(set(found.values())) > 1:
        names = ", ".join(f"{Path(source).name} with {kind!r}" for source, (kind, _) in found.items())
        raise RefineError(
            f"lora: the model's conditioning is {config.conditioning!r}, adapters were trained {names}, each with its"
            " prompt; give those of one kind"
        )
    for kind, prompt in found.values():  # the base of what regenerates may have been made to refine
        config = dataclasses.replace(config, conditioning=kind, prompt=prompt)
    return config


def _sampling(
    config: ModelConfig, released: bool, paths: Sequence[Path], adapters: Sequence[lora.Adapter]
) -> ModelConfig:
    """The sampler's defaults: RefineAnything's for a foreign checkpoint, and a Lightning adapter's few steps."""
    if released:
        config = _released(config)
    for path, adapter in zip(paths, adapters):
        if steps := lora.lightning_steps(adapter, path.name):
            config = dataclasses.replace(config, steps=steps, true_cfg_scale=1.0)
    return config


def _released(config: ModelConfig) -> ModelConfig:
    """With the sampler of the released RefineAnything code."""
    return dataclasses.replace(
        config, scheduler=flow.SCHEDULERS["refineanything"], steps=28, true_cfg_scale=4.0, negative_prompt=" "
    )


def _by_kernel(extra: Mapping[str, Any], abstract: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A ``lora`` collection in two: of matrices that are int8, and of the others."""
    leaves = traverse_util.flatten_dict(dict(abstract), sep="/")
    parts: tuple[dict, dict] = {}, {}
    for path, leaf in traverse_util.flatten_dict(dict(extra), sep="/").items():
        kernel = leaves.get(f"{path.rpartition('/')[0]}/kernel")
        parts[kernel is None or kernel.dtype != np.int8][path] = leaf
    return tuple(traverse_util.unflatten_dict(part, sep="/") for part in parts)


def _adding(extra: Mapping[str, Any]) -> Callable[..., Any]:
    """(path, kernel, index or None of its block) -> the kernel with the entry of `extra` added (`lora.merge`)."""
    leaves = traverse_util.flatten_dict(dict(extra), sep="/")

    def add(path: str, kernel: Any, block: int | None = None) -> Any:
        layer = path.rpartition("/")[0]
        pair = {name: leaves[f"{layer}/{name}"] for name in "ab" if f"{layer}/{name}" in leaves}
        if not pair:
            return kernel
        pair = pair if block is None else {name: leaf[block] for name, leaf in pair.items()}
        merged = lora.merge({layer: {"kernel": kernel}}, {layer: pair})
        return traverse_util.flatten_dict(merged, sep="/")[path]

    return add


def _load_files(
    files: Folder, abstract: Any, shardings: Any, dtype: str, progress: bool, change: Callable[..., Any]
) -> dict[str, Any]:
    """The tensors of a folder of PyTorch files, one at a time, each straight to the devices that hold a part of it."""
    total = sum(t.nbytes for network in abstract for leaf in files.leaves[network].values() for _, t, _ in leaf.pieces)
    trees = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=not progress) as bar:
        for network in abstract:
            placed = traverse_util.flatten_dict(shardings[network], sep="/")
            wanted = traverse_util.flatten_dict(abstract[network], sep="/")
            scales, flat = quantized_paths(wanted), {}
            for path, leaf in files.leaves[network].items():
                kinds = {path: np.dtype(dtype)}
                make = lambda block, made: (made,)
                if path in scales:
                    kinds = {path: np.dtype(np.int8), scales[path]: np.dtype(np.float32)}
                    make = functools.partial(_quantized, f"{network}/{path}", change)
                arrays = {name: _Assembly(wanted[name].shape, kind, placed[name]) for name, kind in kinds.items()}
                _read_leaf(leaf, list(arrays.values()), make, bar)
                for name, array in arrays.items():
                    flat[name] = array.finish()
            trees[network] = traverse_util.unflatten_dict(flat, sep="/")
    return trees


def _quantized(path: str, change: Callable[..., Any], block: int | None, made: np.ndarray) -> tuple[Any, Any]:
    values, scale = quantize_matrix(change(path, made, block))
    check_finite(scale, path if block is None else f"{path}, block {block}")
    return values, scale


def _read_leaf(
    leaf: Leaf, arrays: Sequence["_Assembly"], make: Callable[[int | None, np.ndarray], tuple[Any, ...]], bar: tqdm
) -> None:
    """Fill the arrays that are made of a leaf; make: (block, what the transform gives) -> a piece of each."""
    for block, tensor, how in leaf.pieces:
        bar.update(tensor.nbytes)
        if any(array.wants(block) for array in arrays):  # otherwise another host's
            for array, piece in zip(arrays, make(block, how.forward(tensor.read()))):
                array.put(block, piece)


class _Assembly:
    """An array that grows on the host, as far as the devices here hold it; what several hold is made once."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding):
        self._shape, self._sharding = shape, sharding
        self._devices: dict[tuple[range, ...], list[jax.Device]] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            region = tuple(range(*axis.indices(size)) for axis, size in zip(index, shape))
            self._devices.setdefault(region, []).append(device)
        self._parts = {region: np.empty([len(axis) for axis in region], dtype) for region in self._devices}

    def wants(self, block: int | None) -> bool:
        """Whether a device here holds a part of this block of axis 0 (None: of the whole)."""
        return block is None or any(block in region[0] for region in self._parts)

    def put(self, block: int | None, made: np.ndarray) -> None:
        """Set a block, or the whole."""
        for region, part in self._parts.items():
            if block is not None and block not in region[0]:
                continue
            inner = region if block is None else region[1:]
            cut = made[tuple(slice(axis.start, axis.stop) for axis in inner)]
            copied = np.empty(cut.shape, cut.dtype)
            copy_into(copied, cut)
            part[... if block is None else block - region[0].start] = copied

    def finish(self) -> jax.Array:
        """The array on its devices."""
        arrays = [jax.device_put(self._parts[region], d) for region, devices in self._devices.items() for d in devices]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, arrays)
