"""Configurations: Python files with a `get_config()`, and single keys changed on the command line."""

import ast
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from refine_jax.errors import RefineError

# What a training's file need not have, with a value of the type that is wanted (None: any), often the default.
OPTIONAL: dict[str, Any] = {
    "aligned_heads": (),
    "alignment": None,
    "conditioning": "",
    "ema_ramp": True,
    "keep_every": 0,
    "lora": None,
    "lora.init_from": "",
    "model": None,
    "pictures": None,
    "profile": (),
    "prompt": "",
    "quantize": "",
    "remat": "",
    "scan": None,
    "validation": None,
    "condition_area": 0,
    "vae_area": 0,
    "data.margin_jitter": 0.0,
    "data.max_corrupt": 0.01,
    "data.pairs": "",
    "data.path": "",
    "data.reference_buckets": None,
    "data.reference_dropout": 0.0,
    "data.reference_share": 2 / 3,
    "data.text_to_image": 0.0,
    "data.validation": "",
    "data.weights": (),
    "optimizer.accumulate": 1,
}


def load(path: str | Path, overrides: Mapping[str, str] | None = None) -> ml_collections.ConfigDict:
    """The configuration that `get_config()` of a Python file returns, with `overrides` ("a.b": "value") applied.

    Raises `RefineError` naming the file for a missing file, an unknown key or a value of another type.
    """
    path = Path(path)
    if not path.is_file():
        raise RefineError(f"--config {str(path)!r}: no such file; the shipped ones are in configs/")
    spec = importlib.util.spec_from_file_location("refine_jax_config", path)
    if spec is None or spec.loader is None:
        raise RefineError(f"--config {str(path)!r}: not a Python file; the shipped ones are in configs/")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a configuration is the user's code
        raise RefineError(f"--config {str(path)!r}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not hasattr(module, "get_config"):
        raise RefineError(f"--config {str(path)!r}: defines no get_config(); see the shipped ones in configs/")
    config = module.get_config()
    for name, text in (overrides or {}).items():
        override(config, name, text, path.name)
    config.lock()
    return config


def override(config: ml_collections.ConfigDict, name: str, text: str, file: str) -> None:
    """Set the key `name` ("a.b.c") to what `text` says: a JSON or Python value of the old value's type.

    file: where the configuration comes from, for messages. Raises `RefineError` as `load`.
    """
    *above, last = name.split(".")
    group = config
    try:
        for part in above:
            group = group[part]
        # Mesh axes and sharding rules have defaults that a file need not repeat.
        missing = above in (["mesh"], ["rules"]) or name in OPTIONAL and "objective" in config
        old = group.get(last, OPTIONAL.get(name)) if missing else group[last]
    except (KeyError, AttributeError, TypeError):
        raise RefineError(f"--config.{name}: {file} has no such key") from None
    value = text
    if not isinstance(old, str):
        for read in (json.loads, ast.literal_eval):
            try:
                value = read(text)
                break
            except (ValueError, SyntaxError, RecursionError):
                pass
    value = _tuples(value)
    kind = type(old).__name__
    if isinstance(old, ml_collections.ConfigDict):
        fits, kind = isinstance(value, dict) or value is None and OPTIONAL.get(name, "") is None, "dict"
    elif isinstance(old, (tuple, list)):
        fits = isinstance(value, (tuple, list))
    elif isinstance(old, float):
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        value = float(value) if fits else value
    else:
        fits = old is None or type(value) is type(old)
    if not fits:
        raise RefineError(f"--config.{name}={text}: a {kind} is wanted, this is a {type(value).__name__}")
    with config.unlocked():
        group[last] = ml_collections.ConfigDict(value) if isinstance(value, dict) else value


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
