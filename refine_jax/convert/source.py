"""What the converter and the loader ask of a folder of PyTorch files, whoever laid it out.

A layout is a subclass of `Folder`: it opens the files and says which network each tensor belongs to and by which table.
The accounting, and what is done with the tensors afterwards (`convert`, `loading`), is the same for all.
"""

import dataclasses
import hashlib
import json
import typing
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import jax
from flax import traverse_util

from refine_jax.convert import reader
from refine_jax.convert.mapping import Table, Transform, assign
from refine_jax.errors import RefineError, listed

_TOKENIZER = 100_000_000  # bytes; the files of a tokenizer are smaller
_FLOATING = {"float32", "bfloat16", "float16"}


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
class Tensors:
    """A network's tensors in the order of its files. name: of where they lie, for messages."""

    name: str
    tensors: dict[str, reader.Tensor]


@dataclasses.dataclass(frozen=True)
class Folder:
    """An opened folder: configurations and headers, no tensor read yet.

    configs: the JSON files that decide the architecture, by name; networks: name in our trees -> tensors.
    """

    kind: ClassVar[str]  # by which messages and manifests call the layout
    family: ClassVar[type]  # of the model

    folder: Path
    configs: dict[str, dict[str, Any]]
    networks: dict[str, Tensors]

    # ---------------------------------------------------------------------------------------- what a layout has to say

    def read_model(self, **settings: Any) -> Any:
        """The configuration of the whole model (`ModelConfig`, `BagelModel`), as its own classes check it."""
        raise NotImplementedError

    def table(self, network: str) -> Table:
        """The key table of a network's tensors."""
        raise NotImplementedError

    def tokenizer(self) -> Any:
        """The tokenizer, as `prompts.load_tokenizer` gives it. Raises `RefineError` where there is none that fits."""
        raise NotImplementedError

    def tokenizer_files(self) -> dict[str, bytes]:
        """The files of a folder from which `prompts.load_tokenizer` reads it. Raises as `tokenizer` does."""
        raise NotImplementedError

    def tokenizer_sources(self) -> list[Path]:
        """The files that the tokenizer is made from."""
        raise NotImplementedError

    def check(self, model: Any) -> None:
        """What names, shapes and dtypes do not show. Raises `RefineError`."""

    def notes(self) -> dict[str, Any]:
        """What else the manifest is to say of its source; plain JSON."""
        return {}

    def describe(self, model: Any) -> list[str]:
        """Lines for `convert --inspect`."""
        return []

    # ------------------------------------------------------------------------------------------------ what all share

    def model(self, **settings: Any) -> Any:
        """The configuration of the whole model. settings: fields to replace, dtype and param_dtype of all networks."""
        try:
            model = self.read_model(**settings)
            for name, network in self.networks.items():
                check_numbers(getattr(model, name), f"{network.name}: ")
            return model
        except RefineError as error:
            raise RefineError(f"{self.folder}: {error}") from None
        except (TypeError, ValueError, ArithmeticError, AttributeError, KeyError) as error:  # a field of another type
            raise RefineError(
                f"{self.folder}: a configuration holds what it cannot ({_reason(error)}); copy or download the folder"
                " again"
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
            raise RefineError(
                f"{self.folder}: no network has the sizes of its configuration ({_reason(error)})"
            ) from None
        found: dict[str, dict[str, Leaf]] = {}
        for name, network in self.networks.items():
            where = str(self.folder / network.name)
            shapes = {key: tensor.shape for key, tensor in network.tensors.items()}
            plan = assign(shapes, self.table(name), abstract[name], where)
            problems, leaves = [], {}
            flat = traverse_util.flatten_dict(abstract[name], sep="/")
            for path, pieces in plan.items():
                pieces = tuple((index, network.tensors[key], how) for index, key, how in sorted(pieces, key=_by_index))
                kinds = {tensor.dtype.name for _, tensor, _ in pieces}
                if len(kinds) > 1 or not kinds <= _FLOATING:
                    problems += [f"{tensor.name} is {tensor.dtype.name}" for _, tensor, _ in pieces]
                leaves[path] = Leaf(path, jax.ShapeDtypeStruct(flat[path].shape, pieces[0][1].dtype), pieces)
            if problems:
                raise RefineError(
                    f"{where}: dtypes that cannot be used or differ within a stack: {listed(problems)}; give a"
                    " checkpoint in bfloat16, float16 or float32"
                )
            found[name] = leaves
        self.check(model)
        return found

    def fingerprint(self) -> dict[str, Any]:
        """Plain JSON by which the same folder is known again."""
        files = sorted({t.file for network in self.networks.values() for t in network.tensors.values()})
        sizes = {f.relative_to(self.folder).as_posix(): [f.stat().st_size, f.stat().st_mtime_ns] for f in files}
        return {
            "files": sizes,
            "configs": hashlib.sha256(json.dumps(self.configs, sort_keys=True).encode()).hexdigest(),
        }


def small_files(paths: Iterable[Path]) -> list[Path]:
    """Those that are files of a size that a tokenizer's have, by name."""
    return sorted(path for path in paths if path.is_file() and path.stat().st_size <= _TOKENIZER)


def check_numbers(config: Any, where: str) -> None:
    """Whole numbers where a configuration counts something, none of them absurd."""
    kinds = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), kinds[field.name]
        if dataclasses.is_dataclass(value):
            check_numbers(value, where)
            continue
        counts = [value] if kind is int else value if kind == tuple[int, ...] and isinstance(value, tuple) else []
        wrong = kind == tuple[int, ...] and not isinstance(value, tuple) or kind is bool and not isinstance(value, bool)
        modules = any(word in field.name for word in ("layers", "depth", "blocks"))
        most = 500 if modules else 2**24
        wrong = wrong or len(counts) > 64
        if wrong or any(type(n) is not int or not 0 <= n <= most for n in counts):
            raise RefineError(f"{where}{field.name} is {value!r}, which no such network has")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _by_index(piece: tuple[int | None, str, Transform]) -> int:
    return -1 if piece[0] is None else piece[0]
