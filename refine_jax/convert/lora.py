"""LoRA files of Qwen-Image(-Edit) in the dialects in circulation, and of BAGEL in PEFT's <-> our ``lora`` collections.

A module is called by its name in the reference (diffusers' transformer, transformers' text encoder) behind a prefix,
its two matrices and its alpha by a suffix:

=========  =====================================================  =============================================
dialect    module                                                 suffixes
=========  =====================================================  =============================================
peft       ``transformer.``, ``base_model.model.``, …, or bare    ``.lora_A.weight``, ``.lora_A.default.weight``
lightning  as peft (Qwen-Image-Lightning is bare)                 ``.lora_down.weight``, ``.alpha``
comfyui    ``diffusion_model.``, ``text_encoders.qwen25_7b.…``    either pair, ``.alpha``
kohya      ``lora_unet_`` / ``lora_te_`` with ``_`` for ``.``     ``.lora_down.weight``, ``.alpha``
=========  =====================================================  =============================================

Stored are A ``[r, in]`` and B ``[out, r]``; the layer adds ``alpha / r · B A x``. Alpha stands in an ``.alpha`` key, in
the file's ``lora_adapter_metadata`` (diffusers >= 0.34) or in PEFT's ``adapter_config.json``; without one it is r.

BAGEL's modules are called as in its released weights (``language_model.model.layers.3.self_attn.q_proj_moe_gen``).
"""

import json
import math
import numbers
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from refine_jax.checkpoint import write_tensors
from refine_jax.convert.keys_bagel import TABLE as BAGEL_TABLE
from refine_jax.convert.keys_mmdit import TABLE as MMDIT_TABLE
from refine_jax.convert.keys_vl import LAYOUTS, vl_table
from refine_jax.convert.mapping import Table, reference_shapes
from refine_jax.errors import RefineError, listed
from refine_jax.models.qwen_vl_config import QwenVLConfig

# Prefix of a dotted module name -> dialect; None where the suffix decides (A/B: peft, down/up: lightning).
_DOTTED: dict[str, dict[str, str | None]] = {
    "mmdit": {
        **dict.fromkeys(("", "transformer.", "base_model.model.", "transformer.base_model.model.", "pipe.dit.")),
        "diffusion_model.": "comfyui",
    },
    "vl": {
        **dict.fromkeys(("", "text_encoder.", "base_model.model.", "text_encoder.base_model.model.")),
        "text_encoders.qwen25_7b.transformer.": "comfyui",
    },
    "bagel": dict.fromkeys(("", "base_model.model.", "bagel.")),
}
# Prefixes of names in which every dot became an underscore.
_FLAT = {"mmdit": ("lora_unet_", "lora_transformer_", "lycoris_"), "vl": ("lora_te_", "lora_te1_"), "bagel": ()}
# What we write: dialect -> network -> (prefix, layout of the text encoder's names).
_WRITTEN = {
    "peft": {"mmdit": ("transformer.", ""), "vl": ("text_encoder.", "nested"), "bagel": ("", "")},
    "comfyui": {"mmdit": ("diffusion_model.", ""), "vl": ("text_encoders.qwen25_7b.transformer.", "flat")},
}
_COMPONENTS = {"mmdit": "transformer", "vl": "text_encoder", "bagel": "bagel"}

_SUFFIX = re.compile(
    r"(?P<module>.+)\.(?:(?P<a>lora_A|lora[._]down)|(?P<b>lora_B|lora[._]up))(?:\.[^.]+)?\.weight|(?P<of>.+)\.alpha"
)
# What a plain pair of matrices cannot express -> what to look for in a key.
_FOREIGN = {
    "DoRA, which is not low-rank (merge it into a checkpoint where it was trained)": r"dora_scale|lora_magnitude",
    "LoHa, LoKr, OFT and the like (extract a plain LoRA from them)": r"hada_|lokr_|oft_|boft|glora|\.[ab][12]\.weight",
    "patches of whole weights (merge them into a checkpoint)": r"\.(diff|diff_b|set_weight|reshape_weight|[wb]_norm)$",
    "biases of LoRA layers (train with bias='none')": r"lora_?[AB]?([._](up|down))?(\.[^.]+)?\.bias$",
    "LoRA of convolutions or embeddings": r"lora_mid|lora_embedding",
}
# Settings of a PEFT configuration under which a layer is no longer alpha / r · B A.
_FOREIGN_SETTINGS = (
    *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "layer_replication", "target_parameters"),
    *("modules_to_save", "trainable_token_indices", "alora_invocation_tokens"),
)
# Ways to begin (`init_lora_weights`) that take what B A begins with out of the base model.
_FOREIGN_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_METADATA = "lora_adapter_metadata"
_PEFT_DEFAULT = 8  # of r and lora_alpha, where a configuration does not say
_DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
_STORABLE = {np.dtype(kind) for kind in _DTYPES.values()}
_ALPHA_DTYPES = (*_DTYPES, "F64", "I64", "I32")


@dataclass(frozen=True)
class Adapter:
    """A LoRA as read from a file.

    trees: "mmdit", "vl", "bagel" (those that it adapts) -> nested dict, ``{"a": [.., in, r], "b": [.., r, out]}`` at
    the path of each dense layer; numpy, dtypes as stored, alpha / r folded into ``b``. Blocks are stacked on axis 0,
    zero where the file has none, and ranks zero-padded to the largest of the stack. dialects: how the file names
    things. ranks: "mmdit/blocks/attn/to_q" -> the rank of each block (0: none), one number for a layer of its own.
    source: the file. metadata: the entries of its header.
    """

    trees: Mapping[str, Any]
    dialects: tuple[str, ...] = ()
    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    source: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


# Adapters distilled to few steps say so in their names: "Qwen-Image-Edit-2511-Lightning-8steps-V1.0-bf16.safetensors".
_LIGHTNING = re.compile(r"lightning.*?(\d+)[\s_-]*steps?", re.IGNORECASE)
# In the header of an adapter that was converted: what its old name said.
STEPS = "refine_jax_steps"


def lightning_steps(adapter: Adapter, name: str = "") -> int | None:
    """For how many steps an adapter was distilled: by its header, or by its file's name, or by another `name` of it."""
    if (said := adapter.metadata.get(STEPS, "")).isdigit():
        return int(said)
    found = [_LIGHTNING.search(text) for text in (name, Path(adapter.source).name)]
    return next((int(match[1]) for match in found if match), None)


# ------------------------------------------------------------------------------------------------------------ names


class _Module(NamedTuple):
    """One module of the reference. index: its place in a stack of `depth`, both None where it is a layer of its own.
    shape: (in, out), None where it is not dense."""

    network: str
    path: str
    index: int | None
    depth: int | None
    reference: str
    shape: tuple[int, int] | None


def _modules(network: str, tree: Mapping[str, Any], layouts: Sequence[str] = tuple(LAYOUTS)) -> Iterator[_Module]:
    """The reference's modules that the leaves of `tree` (anything with a shape) stand for."""
    leaves = traverse_util.flatten_dict(dict(tree), sep="/")
    # Sizes of the encoder only matter to its patch convolution, which is not named by a string and left out here.
    own: dict[str, Table] = {"mmdit": MMDIT_TABLE, "bagel": BAGEL_TABLE}
    tables = [own[network]] if network in own else [vl_table(QwenVLConfig(), layout) for layout in layouts]
    for table in tables:
        rules = [rule for rule in table if rule.path is not None and isinstance(rule.transform, str)]
        for path, leaf in leaves.items():
            if not any(rule.path_pattern.fullmatch(path) for rule in rules):
                continue
            dense = path.endswith("/kernel")
            depth = leaf.shape[0] if dense and len(leaf.shape) == 3 else None
            shape = tuple(leaf.shape[-2:]) if dense else None
            for index, key in enumerate(reference_shapes(rules, {path: leaf})):
                if key.endswith(".weight"):
                    place = (None, None) if depth is None else (index, depth)
                    yield _Module(network, path.rpartition("/")[0], *place, key.removesuffix(".weight"), shape)


def _spellings(abstract: Mapping[str, Any]) -> dict[str, tuple[_Module, str | None]]:
    """Every name by which a file may call a module -> the module, and the dialect that it speaks for."""
    names: dict[str, tuple[_Module, str | None]] = {}
    for network in _DOTTED.keys() & abstract.keys():
        for module in _modules(network, abstract[network]):
            for prefix, dialect in _DOTTED[network].items():
                names[prefix + module.reference] = module, dialect
            # Of the text encoder's names ComfyUI leaves out the leading "model".
            for name in {module.reference, module.reference.removeprefix("model.")}:
                for prefix in _FLAT[network]:
                    names[prefix + name.replace(".", "_")] = module, "kohya"
    return names


# ---------------------------------------------------------------------------------------------------------- problems


class _Problems(dict[str, list[str]]):
    """What does not fit: kind -> offenders."""

    def add(self, kind: str, offender: str) -> None:
        self.setdefault(kind, []).append(offender)

    def check(self, file: Path) -> None:
        """Raise one bounded error if there is any."""
        parts = [f"{kind}: {listed(offenders)}" for kind, offenders in self.items()]
        if parts:
            raise RefineError(f"{file}: not a LoRA that fits this model ({'; '.join(parts)}); give one made for it")


_UNKNOWN = "unknown keys"


def _unknown(key: str) -> str:
    return next((kind for kind, pattern in _FOREIGN.items() if re.search(pattern, key)), _UNKNOWN)


# ------------------------------------------------------------------------------------------------------------ reading


def read_adapter(path: str | os.PathLike, abstract: Mapping[str, Any]) -> Adapter:
    """Read a LoRA file, whatever its dialect (the module's docstring lists them).

    path: a .safetensors file, or a folder that holds exactly one. abstract: `ModelConfig.abstract()` or that of
    `BagelModel`, with scanned blocks: trees of shapes under "mmdit" and, to adapt the text encoder, "vl"; or "bagel".

    Raises RefineError naming the file: missing, truncated or corrupt, or with a bounded list of all that does not fit
    (unknown keys, an A without its B, wrong shapes or ranks, other dtypes than bfloat16, float16 and float32, numbers
    that are not finite, anything but plain LoRA of dense layers).
    """
    file = _find(path)
    try:
        with safe_open(file, framework="numpy") as stored:
            return _read(file, stored, _spellings(abstract))
    except FileNotFoundError:
        raise RefineError(f"{file}: no such file; give a LoRA as .safetensors") from None
    except (SafetensorError, OSError) as error:
        raise RefineError(f"{file}: cannot be read as safetensors ({error}); copy or download it again") from None


def _find(path: str | os.PathLike) -> Path:
    path = Path(path)
    try:
        if not path.is_dir():
            return path
        found = sorted(p for p in path.iterdir() if p.suffix == ".safetensors")
    except (OSError, ValueError) as error:
        raise RefineError(f"{str(path)!r}: cannot be opened ({error}); give a LoRA as .safetensors") from None
    if len(found) != 1:
        names = listed(p.name for p in found) or "none"
        raise RefineError(f"{path}: holds {len(found)} .safetensors files ({names}); name the one to load")
    return found[0]


def _read(file: Path, stored: Any, spellings: Mapping[str, tuple[_Module, str | None]]) -> Adapter:
    names = list(stored.keys())
    whole = [key for key in names if key.endswith((".weight", ".bias"))]
    if whole and not any(_SUFFIX.fullmatch(key) or _unknown(key) != _UNKNOWN for key in names):
        raise RefineError(
            f"{file}: holds whole weights, such as {listed(whole[:1])}, and no LoRA; give a LoRA (whole weights load"
            " from the folder of a diffusers pipeline)"
        )
    problems = _Problems()
    parts: dict[_Module, dict[str, str]] = {}  # module -> "a", "b", "alpha" -> key
    dialects = set()
    for key in names:
        found = _SUFFIX.fullmatch(key)
        module, dialect = spellings.get(found and (found["module"] or found["of"]), (None, None))
        if module is None:
            problems.add(_unknown(key), key)
            continue
        if module.shape is None:
            problems.add("targets that are not dense layers", key)
            continue
        part = "a" if found["a"] else "b" if found["b"] else "alpha"
        # The text encoder's modules have two names in the reference; they are one to us.
        own = parts.setdefault(module._replace(reference=""), {"name": module.reference})
        if part in own:
            problems.add("the same thing twice", f"{own[part]} and {key}")
        own[part] = key
        if part != "alpha":
            dialects.add(dialect or ("peft" if found["a"] == "lora_A" or found["b"] == "lora_B" else "lightning"))
    if not parts and not problems:
        problems.add("no tensors", "the file is empty")

    metadata = stored.metadata() or {}
    settings = _settings(file, metadata, problems)
    scales: dict[_Module, float] = {}
    for module, keys in parts.items():
        held = {part: stored.get_slice(key) for part, key in keys.items() if part != "name"}
        shapes = {part: tuple(held[part].get_shape()) for part in held}
        if not {"a", "b"} <= held.keys():
            problems.add("keys without their counterpart", " and ".join(keys[part] for part in held))
        elif _fits(module, keys, shapes, {part: held[part].get_dtype() for part in held}, problems):
            alpha = float(stored.get_tensor(keys["alpha"]).reshape(())) if "alpha" in keys else None
            scales[module] = _scale(keys, shapes["a"][0], alpha, settings.get(module.network), problems)
    problems.check(file)

    layers: dict[str, list[_Module]] = {}
    for module in parts:
        layers.setdefault(f"{module.network}/{module.path}", []).append(module)
    flat: dict[str, np.ndarray] = {}
    ranks: dict[str, tuple[int, ...]] = {}
    for layer, modules in layers.items():
        keys = [parts[module] for module in modules]
        flat[f"{layer}/a"], ranks[layer] = _stack(stored, modules, [k["a"] for k in keys], problems)
        flat[f"{layer}/b"], _ = _stack(stored, modules, [k["b"] for k in keys], problems, scales)
    problems.check(file)
    return Adapter(traverse_util.unflatten_dict(flat, sep="/"), tuple(sorted(dialects)), ranks, str(file), metadata)


def _fits(
    module: _Module,
    keys: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    problems: _Problems,
) -> bool:
    """Whether A [r, in], B [out, r] and alpha (one number) are what the module takes; if not, says so."""
    before = sum(map(len, problems.values()))
    a, b = shapes["a"], shapes["b"]
    inputs, outputs = module.shape
    if len(a) != 2 or a[0] == 0 or a[1] != inputs:
        problems.add("wrong shapes", f"{keys['a']} {list(a)}, expected [r, {inputs}]")
    if len(b) != 2 or b[1] == 0 or b[0] != outputs:
        problems.add("wrong shapes", f"{keys['b']} {list(b)}, expected [{outputs}, r]")
    if len(a) == len(b) == 2 and a[0] != b[1]:
        problems.add("ranks that disagree", f"{a[0]} of {keys['a']} and {b[1]} of {keys['b']}")
    if math.prod(shapes.get("alpha", ())) != 1:
        problems.add("wrong shapes", f"{keys['alpha']} {list(shapes['alpha'])}, expected one number")
    for part, dtype in dtypes.items():
        if dtype not in (_ALPHA_DTYPES if part == "alpha" else _DTYPES):
            problems.add("dtypes that are not supported (use BF16, F16 or F32)", f"{dtype} of {keys[part]}")
    return before == sum(map(len, problems.values()))


def _stack(
    stored: Any,
    modules: Sequence[_Module],
    keys: Sequence[str],
    problems: _Problems,
    scales: Mapping[_Module, float] | None = None,
) -> tuple[np.ndarray, tuple[int, ...]]:
    """One leaf from the tensors of a layer's blocks, A unless `scales` are given, and each block's rank."""
    slices = [stored.get_slice(key) for key in keys]
    kinds = {s.get_dtype() for s in slices}
    dtype = _DTYPES[kinds.pop()] if len(kinds) == 1 else np.float32
    if scales is not None and any(scales[module] != 1 for module in modules):
        dtype = _scaled(dtype)
    sizes = [s.get_shape()[0 if scales is None else 1] for s in slices]
    (inputs, outputs), depth = modules[0].shape, modules[0].depth
    shape = (inputs, max(sizes)) if scales is None else (max(sizes), outputs)
    leaf = np.zeros((depth or 1, *shape), dtype)
    ranks = [0] * len(leaf)
    for module, key, size in zip(modules, keys, sizes):
        tensor = stored.get_tensor(key).T
        tensor = tensor if scales is None else _times(tensor, scales[module])
        if not np.isfinite(tensor).all():
            problems.add("numbers that are not finite", key)
        leaf[module.index or 0, : tensor.shape[0], : tensor.shape[1]] = tensor
        ranks[module.index or 0] = size
    return leaf if depth is not None else leaf[0], tuple(ranks)


def _times(x: np.ndarray, factor: float) -> np.ndarray:
    """x · factor in float32, rounded to x's dtype unless that is float16; factor 1 leaves every bit."""
    return x if factor == 1 else (x.astype(np.float32) * np.float32(factor)).astype(_scaled(x.dtype))


def _scaled(dtype: Any) -> np.dtype:
    """What holds numbers of `dtype` times any factor: float16 has no small ones."""
    return np.dtype(np.float32 if dtype == np.float16 else dtype)


def _settings(file: Path, metadata: Mapping[str, str], problems: _Problems) -> dict[str, Mapping[str, Any]]:
    """Network -> its PEFT configuration, from the file's metadata or from what PEFT writes next to it."""
    beside, where, text = file.parent / "adapter_config.json", _METADATA, metadata.get(_METADATA)
    # In a folder of many LoRAs, a configuration belongs to the file that PEFT names so.
    if text is None and beside.is_file():
        if file.stem == "adapter_model" or len(list(file.parent.glob("*.safetensors"))) == 1:
            where, text = beside.name, beside.read_text(encoding="utf-8", errors="replace")
    if text is None:
        return {}
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        problems.add(f"{where} that cannot be read", str(error))
        return {}
    settings = {}
    for network, component in _COMPONENTS.items():
        own = {key.removeprefix(component + "."): v for key, v in values.items() if key.startswith(component + ".")}
        # `save_lora_adapter` of a single network and PEFT itself write no prefix.
        own = own or {key: value for key, value in values.items() if "." not in key}
        if not own:
            continue
        if own.get("peft_type", "LORA") != "LORA":
            problems.add(f"{where} that asks for more than LoRA", f"peft_type {own['peft_type']}")
        for name in _FOREIGN_SETTINGS:
            if own.get(name):
                problems.add(f"{where} that asks for more than LoRA", name)
        start = str(own.get("init_lora_weights")).lower()
        if start.startswith(_FOREIGN_STARTS):
            kind = f"{where} of an adapter to a changed base (save it with path_initial_model_for_weight_conversion)"
            problems.add(kind, f"init_lora_weights {start}")
        try:
            for name in ("rank_pattern", "alpha_pattern"):
                own[name] = [(_compiled(pattern), float(value)) for pattern, value in dict(own.get(name) or {}).items()]
            for name in ("r", "lora_alpha"):
                own[name] = float(own.get(name, _PEFT_DEFAULT))
        except (TypeError, ValueError, ArithmeticError, RecursionError, re.error) as error:
            problems.add(f"{where} that cannot be read", str(error))
            return {}
        settings[network] = own
    return settings


def _compiled(pattern: str) -> re.Pattern[str]:
    """PEFT's rule: a pattern matches the end of a module's name, from a dot or from the start."""
    # Repeated groups and many repetitions may take for ever to match; no writer needs them.
    if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 3:
        raise ValueError(f"pattern {pattern!r}")
    return re.compile(rf"(?:.*\.)?(?:{pattern})$")


def _scale(
    keys: Mapping[str, str], rank: int, alpha: float | None, settings: Mapping[str, Any] | None, problems: _Problems
) -> float:
    """What B A is multiplied with."""
    scale = 1.0 if alpha is None else alpha / rank
    if settings:
        matching = lambda name: (value for pattern, value in settings[name] if pattern.match(keys["name"]))
        wanted, told = (
            next(matching("rank_pattern"), settings["r"]),
            next(matching("alpha_pattern"), settings["lora_alpha"]),
        )
        if wanted != rank:
            problems.add("ranks that disagree", f"{rank} of {keys['a']} and {wanted:g} of its PEFT configuration")
        if alpha is not None and alpha != told:
            problems.add("alphas that disagree", f"{alpha:g} of {keys['alpha']} and {told:g} of its PEFT configuration")
        scale = told / math.sqrt(rank) if settings.get("use_rslora") else told / rank
    if not math.isfinite(scale):
        problems.add("alphas that are not finite", keys.get("alpha", keys["a"]))
    return scale


# ----------------------------------------------------------------------------------------------------------- applying


def _pairs(tree: Mapping[str, Any], what: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Layer path -> (a [.., in, r], b [.., r, out]) as numpy. Raises RefineError for what is not such a pair."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for path, leaf in traverse_util.flatten_dict(dict(tree), sep="/").items():
        layer, _, name = path.rpartition("/")
        found.setdefault(layer, {})[name] = np.asarray(leaf)
    for layer, pair in found.items():
        a, b = pair.get("a"), pair.get("b")
        if pair.keys() != {"a", "b"} or a.ndim not in (2, 3) or (*a.shape[:-2], a.shape[-1]) != b.shape[:-1]:
            shapes = ", ".join(f"{name} {list(leaf.shape)}" for name, leaf in sorted(pair.items()))
            raise RefineError(f"{what}: {layer} holds {shapes}; expected a [.., in, r] and b [.., r, out]")
    return {layer: (pair["a"], pair["b"]) for layer, pair in found.items()}


def combine(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> dict[str, Any]:
    """The ``lora`` collection that applies several adapters at once: {"mmdit": tree, "vl": tree}, as far as adapted.

    Adapters stand side by side along the rank, each weight multiplied into its ``b`` (a weight of 1 changes no bit);
    leaves keep their dtype, float32 where adapters differ. weights: default 1 each. Raises RefineError where the number
    of weights is another, one is not finite, or adapters are of models of other sizes.
    """
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters):
        raise RefineError(f"LoRA weights: {len(weights)} given for {len(adapters)} adapters; give one for each")
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for adapter, weight in zip(adapters, weights):
        if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
            raise RefineError(f"LoRA weight {weight!r} of {adapter.source or 'an adapter'}: give a finite number")
        for layer, (a, b) in _pairs(adapter.trees, f"LoRA {adapter.source}").items():
            parts.setdefault(layer, []).append((a, _times(b, weight)))
    flat = {}
    for layer, pairs in parts.items():
        if len({(*a.shape[:-1], b.shape[-1]) for a, b in pairs}) > 1:
            raise RefineError(f"LoRA layer {layer}: adapters of models of other sizes; combine those of one model")
        for name, axis, leaves in (("a", -1, [a for a, _ in pairs]), ("b", -2, [b for _, b in pairs])):
            kinds = {leaf.dtype for leaf in leaves}
            leaves = leaves if len(kinds) == 1 else [leaf.astype(np.float32) for leaf in leaves]
            flat[f"{layer}/{name}"] = leaves[0] if len(leaves) == 1 else np.concatenate(leaves, axis)
    return traverse_util.unflatten_dict(flat, sep="/")


def training_values(adapter: Adapter, wanted: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """The adapter as a training goes on with it: float32, `scale` (alpha / rank of the training) taken out of ``b``.

    wanted: the collection that is trained, {"mmdit": tree, …} of anything with a shape. Raises RefineError, naming the
    file, where it adapts other layers, or has another rank.
    """
    found, needed = _pairs(adapter.trees, f"LoRA {adapter.source}"), {}
    for path, leaf in traverse_util.flatten_dict(dict(wanted), sep="/").items():
        needed.setdefault(path.rpartition("/")[0], {})[path.rpartition("/")[2]] = leaf
    problems = {
        "layers that are not trained (widen lora.targets; those of vl never are)": sorted(found.keys() - needed.keys()),
        "trained layers that it lacks (narrow lora.targets)": sorted(needed.keys() - found.keys()),
    }
    for layer in found.keys() & needed.keys():
        rank, ranks = needed[layer]["a"].shape[-1], set(adapter.ranks[layer])
        if ranks != {rank}:
            text = f"{layer} {', '.join(map(str, sorted(ranks)))}"
            problems.setdefault(f"ranks other than {rank} (set lora.rank; 0: a block is missing)", []).append(text)
    said = [f"{kind}: {listed(names)}" for kind, names in problems.items() if names]
    if said:
        raise RefineError(f"{adapter.source}: lora.init_from is not of the LoRA that is trained; {'; '.join(said)}")
    flat = {}
    for layer, (a, b) in found.items():
        flat[f"{layer}/a"], flat[f"{layer}/b"] = a.astype(np.float32), b.astype(np.float32) / np.float32(scale)
    return traverse_util.unflatten_dict(flat, sep="/")


def merge(variables: Mapping[str, Any], lora: Mapping[str, Any], consume: bool = False) -> dict[str, Any]:
    """The parameters with ``kernel + a @ b`` where `lora` has an entry: float32 sums, rounded to the kernel's dtype.

    variables, lora: {"mmdit": tree, …}; kernels [in, out] or stacked. Sums are made on the host, a kernel at a time: of
    numpy kernels they are numpy, of jax arrays each shard is summed alone and goes back to its device. Everything else
    is passed on as it is. consume: empty the dict `variables`, so that no kernel is held twice.

    Raises RefineError for an entry without its kernel.
    """
    merged = traverse_util.flatten_dict(dict(variables), sep="/")
    if consume:
        variables.clear()
    for layer, (a, b) in _pairs(lora, "LoRA").items():
        kernel = merged.get(f"{layer}/kernel")
        if kernel is None:
            raise RefineError(f"LoRA entry {layer}: the model has no dense layer there")
        if (*a.shape[:-1], b.shape[-1]) != tuple(kernel.shape):
            raise RefineError(f"LoRA entry {layer}: {list(a.shape)} x {list(b.shape)}, kernel {list(kernel.shape)}")
        if isinstance(kernel, jax.Array):
            pieces = []
            for shard in kernel.addressable_shards:
                *stack, rows, columns = shard.index
                piece = _plus(shard.data, a[(*stack, rows)], b[(*stack, slice(None), columns)])
                pieces.append(jax.device_put(piece, shard.device))
            kernel = jax.make_array_from_single_device_arrays(kernel.shape, kernel.sharding, pieces)
        else:
            kernel = _plus(kernel, a, b)
        merged[f"{layer}/kernel"] = kernel
    return traverse_util.unflatten_dict(merged, sep="/")


def _plus(kernel: Any, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    kernel = np.array(kernel)
    for index in np.ndindex(kernel.shape[:-2]):
        delta = a[index].astype(np.float32) @ b[index].astype(np.float32)
        kernel[index] = (kernel[index].astype(np.float32) + delta).astype(kernel.dtype)
    return kernel


# ------------------------------------------------------------------------------------------------------------ writing


def write_adapter(
    path: str | os.PathLike,
    lora: Mapping[str, Any],
    dialect: str = "peft",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a ``lora`` collection ({"mmdit": tree, "vl": tree}, one of them, or {"bagel": tree}) as a file for others.

    path: ends with .safetensors; written aside, then renamed. dialect: "peft" (diffusers' `load_lora_weights`; ranks,
    alphas in its metadata) or "comfyui" (`diffusion_model.…`, ``.alpha`` keys). Alpha is recorded as the rank, so the
    scale is exactly 1 everywhere and `read_adapter` gives the same trees, bit for bit. Of "vl", PEFT names are those of
    transformers >= 4.52. metadata: further entries of the file's header. Raises RefineError for another dialect, an
    entry that is no layer of the reference, or a path that cannot be written.
    """
    path = Path(path)
    if dialect not in _WRITTEN:
        raise RefineError(f"LoRA dialect {dialect!r}: give one of {', '.join(_WRITTEN)}")
    if path.suffix != ".safetensors":
        raise RefineError(f"{path}: a LoRA is written as .safetensors; give such a name")
    tensors: dict[str, np.ndarray] = {}
    settings: dict[str, Any] = {}
    for network, tree in lora.items():
        if network not in _COMPONENTS:
            raise RefineError(f"LoRA of {network!r}: give trees under {', '.join(_COMPONENTS)}")
        if network not in _WRITTEN[dialect]:
            raise RefineError(f"LoRA dialect {dialect!r}: has no names for {network}; write it as peft")
        pairs = _pairs(tree, f"LoRA of {network}")
        prefix, layout = _WRITTEN[dialect][network]
        kernels = {f"{k}/kernel": SimpleNamespace(shape=(*a.shape[:-1], b.shape[-1])) for k, (a, b) in pairs.items()}
        ranks: dict[str, int] = {}
        known = set()
        for module in _modules(network, kernels, (layout,)):
            known.add(module.path)
            name, slot = prefix + module.reference, () if module.index is None else module.index
            for matrix, leaf in zip("AB", pairs[module.path]):
                tensors[f"{name}.lora_{matrix}.weight"] = np.ascontiguousarray(leaf[slot].T)
            rank = ranks[module.reference] = pairs[module.path][0].shape[-1]
            if dialect == "comfyui":
                tensors[f"{name}.alpha"] = np.array(rank, np.float32)
        strange = sorted(pairs.keys() - known) + [k for k, pair in pairs.items() if {x.dtype for x in pair} - _STORABLE]
        if strange:
            raise RefineError(
                f"LoRA of {network}: {', '.join(strange)}: not a dense layer of the reference (blocks stacked) in"
                " bfloat16, float16 or float32"
            )
        if ranks:
            usual = Counter(ranks.values()).most_common(1)[0][0]
            # Anchored, so that a pattern matches one module; diffusers writes them so.
            other = {f"^{name}": rank for name, rank in ranks.items() if rank != usual}
            own = dict(r=usual, lora_alpha=usual, rank_pattern=other, alpha_pattern=other, target_modules=list(ranks))
            settings |= {f"{_COMPONENTS[network]}.{name}": value for name, value in own.items()}
    if not tensors:
        raise RefineError(f"{path}: the LoRA to write is empty")
    header = {**(metadata or {}), "format": "pt"}
    if dialect == "peft":
        header[_METADATA] = json.dumps(settings, sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, header)
    except (SafetensorError, OSError) as error:
        raise RefineError(f"{path}: cannot be written ({error}); give another place") from None
