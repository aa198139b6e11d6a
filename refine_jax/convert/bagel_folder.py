"""A BAGEL-7B-MoT or RvR-7B-MoT folder as its authors release it -> `BagelModel` and parameters.

Beside each other lie `llm_config.json`, `vit_config.json`, sometimes `config.json`, the FLUX autoencoder
(`ae.safetensors`), the files of a Qwen2 tokenizer, and the weights of one model or of both: `ema.safetensors` is BAGEL,
`rvr.safetensors` is RvR; nothing else differs between them.
"""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from refine_jax import prompts
from refine_jax.bagel import MARKS, BagelModel
from refine_jax.convert import keys_bagel, reader
from refine_jax.convert.keys_flux_vae import FLUX_VAE_TABLE
from refine_jax.convert.mapping import Table
from refine_jax.convert.source import Folder, Tensors, small_files
from refine_jax.errors import RefineError, listed
from refine_jax.models.bagel import BagelConfig
from refine_jax.models.flux_vae import FluxVAEConfig

LLM, VIT, MODEL = "llm_config.json", "vit_config.json", "config.json"
VAE = "ae.safetensors"
# What a folder may call its weights; of several the first is taken. The last is how the authors' trainer writes them.
WEIGHTS = ("rvr", "ema", "model")
TOKENIZER = (
    *("tokenizer.json", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"),
)
_TABLES: dict[str, Table] = {"bagel": keys_bagel.TABLE, "vae": FLUX_VAE_TABLE}
# Of `AutoEncoderParams`: what says nothing about the network, or what it follows from.
_INERT_VAE = {"resolution", "downsample", "out_ch"}


@dataclasses.dataclass(frozen=True)
class BagelFolder(Folder):
    """An opened folder; weights: the name of its file of weights, without the suffix."""

    kind, family = "BAGEL", BagelModel

    weights: str

    def read_model(self, *, dtype: str = "float32", param_dtype: str = "float32", **settings: Any) -> BagelModel:
        """The configuration of the folder; the grids' sides are those of the position tables in its weights."""
        kinds = dict(dtype=dtype, param_dtype=param_dtype)
        bagel = self.networks["bagel"]
        sides = keys_bagel.grid_sides({key: t.shape for key, t in bagel.tensors.items()}, bagel.name)
        given = {**self.configs[MODEL], **sides}
        return BagelModel(
            bagel=BagelConfig.from_dict(self.configs[LLM], self.configs[VIT], given, **kinds),
            vae=vae_config(given.get("vae_config") or {}, **kinds),
            **settings,
        )

    def table(self, network: str) -> Table:
        """The key table of a network's tensors."""
        return _TABLES[network]

    def check(self, model: BagelModel) -> None:
        """The position tables, which are in the file and not in our trees, must be those that we compute."""
        bagel = self.networks["bagel"]
        given = {key: _Lazy(tensor) for key, tensor in bagel.tensors.items() if key in keys_bagel.SIDES}
        keys_bagel.check_position_tables(given, model.bagel, str(self.folder / bagel.name))

    def notes(self) -> dict[str, Any]:
        """Which weights, and how their position tables are stored; an export follows them."""
        held = self.networks["bagel"].tensors
        tables = {key: held[key].dtype.name for key in keys_bagel.SIDES if key in held}
        return {"weights": self.networks["bagel"].name, "position_tables": tables}

    def describe(self, model: BagelModel) -> list[str]:
        """Which of the files of weights is meant, and the sides of the grids."""
        others = [name for name in _held(self.folder) if name != self.weights]
        chosen = f"weights: {self.weights}"
        return [
            chosen + (f" ({', '.join(others)} is there too: --weights)" if others else ""),
            f"latents up to {model.bagel.max_latent_size} tokens a side, "
            f"ViT up to {model.bagel.vit_max_num_patch_per_side} patches",
        ]

    # --------------------------------------------------------------------------------------------------- the tokenizer

    def tokenizer_sources(self) -> list[Path]:
        """The files of a Qwen2 tokenizer that lie there."""
        return small_files(self.folder / name for name in TOKENIZER)

    def tokenizer(self) -> tokenizers.Tokenizer:
        """As the authors make it, with the marks around texts and images (`add_special_tokens`)."""
        return self._tokenizer[0]

    def tokenizer_files(self) -> dict[str, bytes]:
        """Those of the folder, `tokenizer.json` with the marks."""
        return {path.name: path.read_bytes() for path in self.tokenizer_sources()} | {
            "tokenizer.json": self._tokenizer[1]
        }

    @cached_property
    def _tokenizer(self) -> tuple[tokenizers.Tokenizer, bytes]:
        found = {path.name: path for path in self.tokenizer_sources()}
        whole, parts = found.get("tokenizer.json"), {"vocab.json", "merges.txt"} <= found.keys()
        if whole is None and not parts:
            raise RefineError(
                f"{self.folder}: holds neither tokenizer.json nor vocab.json and merges.txt; copy or download them"
            )
        try:
            tokenizer, text = None, b""
            if whole is not None:
                text = whole.read_bytes()
                tokenizer = tokenizers.Tokenizer.from_str(text.decode())
            if tokenizer is None or (parts and _lacking(tokenizer)):
                tokenizer = _build(found)
            if tokenizer.padding or tokenizer.truncation:  # what a file written after padded use keeps
                tokenizer.no_padding()
                tokenizer.no_truncation()
                text = b""
            if missing := _lacking(tokenizer):
                tokenizer.add_special_tokens([_special(mark) for mark in missing])
                text = b""
            text = text or tokenizer.to_str(pretty=True).encode()
        except RefineError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
            raise RefineError(
                f"{self.folder}: its tokenizer cannot be read ({reason}); copy or download its files again"
            ) from None
        prompts.check_vocabulary(tokenizer, self.model().bagel.vocab_size, str(self.folder))
        return tokenizer, text


def vae_config(given: Mapping[str, Any], **kinds: Any) -> FluxVAEConfig:
    """From `vae_config` of a `config.json` (`AutoEncoderParams`); what it leaves out is as released.

    Raises RefineError for an unknown field, or one that contradicts the others.
    """
    known = {field.name for field in dataclasses.fields(FluxVAEConfig)} - {"dtype", "param_dtype"}
    if unknown := sorted(given.keys() - known - _INERT_VAE):
        raise RefineError(f"{MODEL}: vae_config holds {', '.join(unknown)}; use a BAGEL-7B-MoT or RvR-7B-MoT folder")
    config = FluxVAEConfig(**{name: value for name, value in given.items() if name in known}, **kinds)
    for name, own in (("downsample", config.downsample), ("out_ch", config.in_channels)):
        if given.get(name, own) != own:
            raise RefineError(f"{MODEL}: vae_config.{name} is {given[name]!r}, its other fields make it {own}")
    return config


# ------------------------------------------------------------------------------------------------------------- opening


def locate(path: str | Path) -> tuple[Path, str | None] | None:
    """(folder, weights that are named or None) where `path` is such a folder, or a file of weights in it."""
    path = Path(path)
    try:
        if path.is_dir():
            names = (LLM, VIT, VAE, *(f"{name}.safetensors" for name in WEIGHTS[:2]))
            other = (path / "model_index.json").exists()
            return (path, None) if not other and any((path / name).exists() for name in names) else None
        if path.suffix != ".safetensors" or not path.is_file() or not (path.parent / LLM).is_file():
            return None
    except (OSError, ValueError):  # a name that no file system can hold
        return None
    if any("lora" in name for name in reader.read_header(path)[0]):
        return None
    return path.parent, path.stem


def read_bagel(folder: str | Path, weights: str | None = None) -> BagelFolder:
    """Open a folder: its configurations and the headers of its tensors.

    weights: which file of weights, "rvr", "ema" or another name that lies there (default: the first of `WEIGHTS`).
    Raises RefineError for a missing or damaged file.
    """
    folder = Path(folder)
    configs = {name: reader.read_object(folder / name) for name in (LLM, VIT)}
    configs[MODEL] = reader.read_object(folder / MODEL) if (folder / MODEL).exists() else {}
    held = _held(folder)
    name = next(iter(held), None) if weights is None else weights.removesuffix(".safetensors")
    if name not in held:
        there = f"holds {listed(held)}" if held else f"holds neither {' nor '.join(WEIGHTS[:2])}.safetensors"
        remedy = f"choose weights among them, not {weights!r}" if held and weights else "copy or download its weights"
        raise RefineError(f"{folder}: {there}; {remedy}")
    files = {"bagel": f"{name}.safetensors", "vae": VAE}
    networks = {network: Tensors(file, reader.read_header(folder / file)[0]) for network, file in files.items()}
    return BagelFolder(folder, configs, networks, name)


def _held(folder: Path) -> list[str]:
    """The files of weights that lie there, without suffix; those of `WEIGHTS` first."""
    found = {path.stem for path in folder.iterdir() if path.suffix == ".safetensors" and path.name != VAE}
    return [name for name in WEIGHTS if name in found] + sorted(found - set(WEIGHTS))


class _Lazy:
    """A tensor of a file with the shape of an array, read when it is asked for its numbers."""

    def __init__(self, tensor: reader.Tensor):
        self.shape, self._tensor = tensor.shape, tensor

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self._tensor.read()


# ------------------------------------------------------------------------------------------------------- the tokenizer


def _special(text: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(text, special=True, normalized=False)


def _lacking(tokenizer: tokenizers.Tokenizer) -> list[str]:
    return [mark for mark in MARKS if tokenizer.token_to_id(mark) is None]


def _build(found: Mapping[str, Path]) -> tokenizers.Tokenizer:
    """From vocab.json and merges.txt, as transformers' `Qwen2Tokenizer`: then the tokens that tokenizer_config.json
    adds, each at its own id, and the special ones that it names."""
    vocab = reader.read_object(found["vocab.json"])
    lines = found["merges.txt"].read_bytes().decode().split("\n")
    merges = [tuple(line.split()) for k, line in enumerate(lines) if line.strip() and (k or line[0] != "#")]
    tokenizer = prompts.qwen_tokenizer(vocab, merges)
    settings = reader.read_object(found["tokenizer_config.json"]) if "tokenizer_config.json" in found else {}
    older = reader.read_object(found["added_tokens.json"]) if "added_tokens.json" in found else {}
    added = {int(index): token["content"] for index, token in settings.get("added_tokens_decoder", {}).items()}
    for index, text in sorted((added or {index: text for text, index in older.items()}).items()):
        tokenizer.add_special_tokens([_special(text)])
        if tokenizer.token_to_id(text) != index:
            raise RefineError(
                f"{found['vocab.json'].parent}: token {text[:60]!r} has id {index} in tokenizer_config.json, after"
                f" vocab.json it is {tokenizer.token_to_id(text)}; copy or download both of the same model"
            )
    named = [settings.get(name, "<|endoftext|>") for name in ("eos_token", "unk_token", "pad_token")]
    named += [settings.get("bos_token"), *(settings.get("additional_special_tokens") or [])]
    for text in (token["content"] if isinstance(token, dict) else token for token in named):
        if text is not None and tokenizer.token_to_id(text) is None:
            tokenizer.add_special_tokens([_special(text)])
    return tokenizer
