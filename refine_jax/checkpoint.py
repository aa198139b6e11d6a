"""Checkpoints of a training run (orbax: state and data iterator) and the model folder that a trained model ships as.

A model folder holds `refine_jax.json` (format, architecture configurations, scheduler, prompt template, defaults),
`weights.safetensors` (flattened trees, names joined by "/") and `tokenizer/`.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from refine_jax.errors import RefineError

MANIFEST = "refine_jax.json"
WEIGHTS = "weights.safetensors"
FORMAT = 1


# ----------------------------------------------------------------------------------------------- model folders


def write_text(path: Path, text: str) -> None:
    """Write `text` aside, then rename: a reader sees the old file or the whole new one."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_model(
    folder: str | Path, manifest: Mapping[str, Any], trees: Mapping[str, Any], dtype: str = "float32"
) -> None:
    """Write a model folder.

    `trees` maps a network's name ("mmdit", "vae", "vl") to its parameter tree; floating leaves are stored as `dtype`.
    The manifest of an earlier model goes first and the new one comes last: a folder with a manifest is complete. What
    else belongs to the folder (`tokenizer/`) is to be written before.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    flat = {}
    for path, leaf in traverse_util.flatten_dict(dict(trees), sep="/").items():
        array = np.asarray(jax.device_get(leaf))
        flat[path] = np.ascontiguousarray(array.astype(dtype) if _floating(array) else array)
    aside = folder / (WEIGHTS + ".partial")
    try:
        save_file(flat, aside)
        # safetensors writes for the owner alone; a model folder is as readable as the folder's other files.
        aside.chmod(0o666 & ~_umask())
        os.replace(aside, folder / WEIGHTS)
    finally:
        aside.unlink(missing_ok=True)
    write_text(folder / MANIFEST, json.dumps({"format": FORMAT, **manifest}, indent=1) + "\n")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a model folder. Raises `RefineError` when it is missing, unreadable or of another format."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise RefineError(f"model {str(folder)!r}: no {MANIFEST} there; give 'tiny' or a model folder of refine_jax")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RefineError(f"{path}: not valid JSON ({error}); write the model folder again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise RefineError(f"{path}: format {found!r}, this version reads {FORMAT}; write the model folder again")
    return manifest


def _floating(array: np.ndarray) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)  # numpy's own does not know bfloat16


def load_weights(folder: str | Path, abstract: Mapping[str, Any], dtype: str | None = "float32") -> dict[str, Any]:
    """The parameter trees of a model folder, as numpy arrays of `dtype` (None: as stored).

    `abstract` maps each wanted network to its tree of `jax.ShapeDtypeStruct`. Every missing, unexpected or wrongly
    shaped leaf is listed in one `RefineError`.
    """
    path = Path(folder) / WEIGHTS
    wanted = traverse_util.flatten_dict(dict(abstract), sep="/")
    flat, offenders = {}, []
    try:
        with safe_open(path, framework="numpy") as stored:
            names = {n for n in stored.keys() if n.split("/", 1)[0] in abstract}
            offenders += [f"missing {n}" for n in sorted(wanted.keys() - names)]
            offenders += [f"unexpected {n}" for n in sorted(names - wanted.keys())]
            for name in sorted(names & wanted.keys()):
                array = stored.get_tensor(name)
                if array.shape != wanted[name].shape:
                    offenders.append(f"{name} has shape {array.shape}, expected {wanted[name].shape}")
                flat[name] = array.astype(dtype) if dtype and _floating(array) else array
    except FileNotFoundError:
        raise RefineError(f"{path}: no such file; the model folder is incomplete") from None
    except (SafetensorError, OSError) as error:
        raise RefineError(f"{path}: cannot be read ({error}); copy or write the model folder again") from None
    if offenders:
        raise RefineError(f"{path}: does not fit its manifest: " + "; ".join(offenders))
    return traverse_util.unflatten_dict(flat, sep="/")


# ----------------------------------------------------------------------------------------------- training runs


def manager(workdir: str | Path, keep: int = 2, save_every: int = 1000) -> ocp.CheckpointManager:
    """The checkpoint manager of a run: asynchronous saves under `workdir/checkpoints`, `keep` newest kept."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, save_interval_steps=save_every, create=True)
    try:
        return ocp.CheckpointManager(Path(workdir).absolute() / "checkpoints", options=options)
    except OSError as error:
        raise RefineError(f"{workdir}: checkpoints cannot be kept there ({error}); give another work folder") from None


def save_state(
    mngr: ocp.CheckpointManager, step: int, state: Any, data: Mapping[str, Any], force: bool = False
) -> bool:
    """Save the train state and the data iterator's position (JSON values) as of `step`."""
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=ocp.args.JsonSave({"processes": jax.process_count(), **data}),
    )
    return mngr.save(step, args=args, force=force)


def restore_state(mngr: ocp.CheckpointManager, abstract: Any) -> tuple[Any, dict[str, Any]] | None:
    """The newest checkpoint as (state sharded as `abstract`, data position), or None when there is none.

    Raises `RefineError` when the run was saved by another number of processes (the order of data would change), or
    under a configuration whose state has another structure.
    """
    step = mngr.latest_step()
    if step is None:
        return None
    try:
        data = dict(mngr.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"])
        processes = data.pop("processes")
        if processes == jax.process_count():
            state = mngr.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise RefineError(
            f"{mngr.directory}: checkpoint {step} does not fit this configuration or is damaged ({reason}); "
            "continue with the configuration it was made with, or give a new work folder"
        ) from None
    if processes != jax.process_count():
        raise RefineError(
            f"{mngr.directory}: saved by {processes} processes, these are {jax.process_count()}; "
            "continue with the same number"
        )
    return state, data
