"""Instructions to token ids: the one step of a refinement that stays on the host.

A prompt is a chat template around pictures and an instruction. How it reads is data of the checkpoint
(`PromptTemplate`), not code. Every image placeholder is expanded to the number of tokens that its picture
takes in the language model, and each prompt carries its own positions and feature rows, so prompts with different
pictures present share one program.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from refine_jax.errors import RefineError
from refine_jax.models.qwen_vl_config import Grid, image_index, merged_tokens, mrope_positions

IMAGE_TOKEN = "<|image_pad|>"
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    IMAGE_TOKEN,
    "<|video_pad|>",
)
# How Qwen2 splits text before byte-pair merging.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# ------------------------------------------------------------------------------------------------------------ templates
@dataclass(frozen=True)
class PromptTemplate:
    """How a checkpoint wants its prompt.

    template: the whole chat, with one ``{}`` where the pictures and then the instruction go, or two, the second for
    the instruction; picture: one picture, with one image placeholder and at most one ``{}`` for its number (from 1);
    drop_tokens: leading hidden states that conditioning leaves out (the system text); max_tokens: limit on the tokens
    kept after that, pictures included.
    """

    template: str
    picture: str
    drop_tokens: int
    max_tokens: int = 1024

    def __post_init__(self):
        if self.template.count("{}") not in (1, 2):
            raise RefineError(f"prompt template {self.template[:60]!r}: must hold exactly one {{}}, or two")
        if self.picture.count("{}") > 1:
            raise RefineError(f"prompt picture {self.picture[:60]!r}: must hold one {{}} at most")
        if self.picture.count(IMAGE_TOKEN) != 1 or IMAGE_TOKEN in self.template:
            raise RefineError(f"prompt picture {self.picture[:60]!r}: must hold {IMAGE_TOKEN} once, the template never")
        if self.drop_tokens < 0 or self.max_tokens < 1:
            raise RefineError(
                f"prompt template: drop_tokens={self.drop_tokens} or max_tokens={self.max_tokens} too small"
            )

    def text(self, instruction: str, pictures: int) -> str:
        """The prompt before placeholders are expanded."""
        shown = "".join(self.picture.replace("{}", str(k + 1)) for k in range(pictures))
        before, *between, after = self.template.split("{}")
        return before + shown + "".join(between) + instruction + after


# Qwen-Image-Edit-2509 and -2511, as in diffusers' `QwenImageEditPlusPipeline`.
EDIT_PLUS = PromptTemplate(
    template=(
        "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
        "background), then explain how the user's text instruction should alter or modify the image. Generate a new "
        "image that meets the user's requirements while maintaining consistency with the original input where "
        "appropriate."
        "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    ),
    picture="Picture {}: <|vision_start|><|image_pad|><|vision_end|>",
    drop_tokens=64,
    max_tokens=1024,
)

# RvR (arXiv 2604.25636) in Qwen2.5-VL's chat. The released code trains with one system text and samples with a longer
# one. Here a model is sampled with the prompt that its manifest names; the released pair is "rvr-training" in training,
# then `dataclasses.replace(model, prompt=TEMPLATES["rvr-inference"])`.
_RVR_SYSTEM = (
    "Analyze the potential misalignment between the generated image and the user's prompt. Then, re-generate the image "
    "to precisely align with the user's prompt.\n"
)


def _rvr(system: str, drop_tokens: int) -> PromptTemplate:
    return PromptTemplate(
        template=(
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{{}}Here is the user's prompt: {{}}. "
            "<|im_end|>\n<|im_start|>assistant\n"
        ),
        picture="<|vision_start|><|image_pad|><|vision_end|>",
        drop_tokens=drop_tokens,
        max_tokens=1024,
    )


# By the names that a training configuration's `prompt` gives; drop_tokens are those of Qwen's own tokenizer.
TEMPLATES: dict[str, PromptTemplate] = {
    "edit-plus": EDIT_PLUS,
    "rvr-training": _rvr(_RVR_SYSTEM, 40),
    "rvr-inference": _rvr(_RVR_SYSTEM + "\nHere is the generated image:\n", 46),
}


def for_tokenizer(template: PromptTemplate, tokenizer: Any) -> PromptTemplate:
    """The template with `drop_tokens` as `tokenizer` counts them: all that stands before the pictures is left out."""
    return replace(template, drop_tokens=prefix_tokens(tokenizer, template.template))


# ------------------------------------------------------------------------------------------------------------- encoding
@dataclass(frozen=True)
class TokenizedPrompt:
    """One prompt of L tokens: ids [L], positions [L, 3] (time, row, column), image_index [L] (-1 = text); all int32."""

    ids: np.ndarray
    positions: np.ndarray
    image_index: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class PromptBatch:
    """Prompts padded at the right: ids [B, L], mask [B, L] bool, positions [B, L, 3], image_index [B, L]."""

    ids: np.ndarray
    mask: np.ndarray
    positions: np.ndarray
    image_index: np.ndarray


def encode_prompt(
    tokenizer: Any,
    template: PromptTemplate,
    instruction: str,
    grids: Sequence[Grid] = (),
    merge: int = 2,
    present: Sequence[bool] | None = None,
) -> TokenizedPrompt:
    """Tokenise an instruction about the pictures present.

    tokenizer: a `tokenizers.Tokenizer` (see `load_tokenizer`) or a tokenizer of transformers. grids: patch rows and
    columns of every image slot of the program, in order; present: which of them this prompt shows (default all).
    Pictures are numbered by presence, while `image_index` counts rows through all slots, so an absent slot leaves a
    hole in the rows and none in the text. RefineError where the prompt is too long or spells the placeholder itself.
    """
    present = [True] * len(grids) if present is None else list(present)
    if len(present) != len(grids):
        raise ValueError(f"present has {len(present)} entries for {len(grids)} image slots")
    if IMAGE_TOKEN in instruction:
        raise RefineError(f"prompt: {IMAGE_TOKEN} is reserved for the pictures; take it out of the instruction")
    shown = [grid for grid, here in zip(grids, present) if here]
    token = image_token_id(tokenizer)
    ids = np.asarray(encode_text(tokenizer, template.text(instruction, len(shown))), np.int32)
    counts = np.ones(len(ids), np.int64)
    sizes = [merged_tokens(grid, merge) for grid in shown]
    counts[ids == token] = sizes
    ids = np.repeat(ids, counts)
    kept = len(ids) - template.drop_tokens
    if kept > template.max_tokens:
        raise RefineError(
            f"prompt too long: {kept} tokens, of which {sum(sizes)} are pictures; the limit is {template.max_tokens}: "
            "shorten the instruction"
        )
    return TokenizedPrompt(
        ids=ids,
        positions=mrope_positions(ids, shown, token, merge),
        image_index=image_index(ids, grids, token, merge, present),
    )


def pad_prompts(prompts: Sequence[TokenizedPrompt], length: int) -> PromptBatch:
    """Stack prompts, padded at the right to `length` (a bucket, see `bucket_length`). RefineError if one is longer."""
    longest = max(map(len, prompts))
    if longest > length:
        raise RefineError(f"prompt too long: {longest} tokens, the limit is {length}: shorten the instruction")

    def stack(name: str, fill: int) -> np.ndarray:
        rows = [getattr(prompt, name) for prompt in prompts]
        return np.stack(
            [np.pad(r, [(0, length - len(r))] + [(0, 0)] * (r.ndim - 1), constant_values=fill) for r in rows]
        )

    lengths = np.array([len(prompt) for prompt in prompts])
    return PromptBatch(
        ids=stack("ids", 0),
        mask=np.arange(length) < lengths[:, None],
        positions=stack("positions", 0),
        image_index=stack("image_index", -1),
    )


def bucket_length(length: int, buckets: Iterable[int]) -> int:
    """The smallest bucket that holds `length` tokens; RefineError where none does."""
    buckets = list(buckets)
    limit = max(buckets, default=0)
    fitting = [bucket for bucket in buckets if bucket >= length]
    if not fitting:
        raise RefineError(f"prompt too long: {length} tokens, the limit is {limit}: shorten the instruction")
    return min(fitting)


def prefix_tokens(tokenizer: Any, template: str) -> int:
    """Tokens before the ``{}`` of a template: its `drop_tokens` (64 for `EDIT_PLUS` and Qwen's own tokenizer)."""
    return len(encode_text(tokenizer, template.split("{}")[0]))


# ----------------------------------------------------------------------------------------------------------- tokenizers
def load_tokenizer(folder: str | Path, placeholder: bool = True) -> Any:
    """The tokenizer in a checkpoint's folder; the network is never asked.

    From ``tokenizer.json`` a `tokenizers.Tokenizer` (no import of transformers, which takes seconds); from older files
    (``vocab.json`` and ``merges.txt``) transformers' own. RefineError where there is none or it does not know images;
    without `placeholder` it need not (BAGEL needs other marks, see `bagel.Marks`).
    """
    folder = Path(folder)
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            # Files written after padded use keep these settings.
            tokenizer.no_padding()
            tokenizer.no_truncation()
        elif (folder / "vocab.json").is_file():
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        else:
            raise FileNotFoundError("no tokenizer.json or vocab.json there")
    except Exception as error:  # The tokenizers library raises bare Exception on a damaged file.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = "give the folder of a Qwen tokenizer"
        raise RefineError(f"tokenizer in {folder} cannot be read ({reason}); {remedy}") from None
    if placeholder:
        image_token_id(tokenizer)
    return tokenizer


def check_vocabulary(tokenizer: Any, rows: int, where: str) -> None:
    """Raises `RefineError` for a tokenizer with tokens that embeddings of `rows` rows do not hold."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise RefineError(
            f"{where}: its tokenizer has token {largest}, its vocab_size is {rows}; copy or download the tokenizer of "
            "the same model"
        )


def image_token_id(tokenizer: Any) -> int:
    """Id of the image placeholder."""
    if isinstance(tokenizer, tokenizers.Tokenizer):
        token = tokenizer.token_to_id(IMAGE_TOKEN)
    else:
        token = tokenizer.get_vocab().get(IMAGE_TOKEN)
    if token is None:
        raise RefineError(f"tokenizer has no {IMAGE_TOKEN}; give that of a Qwen2-VL or Qwen2.5-VL checkpoint")
    return token


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, without anything around it; special tokens that it spells are read as such.

    Raises `RefineError` for a text that is no Unicode, as undecodable bytes of a command line are.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RefineError("prompt: holds bytes that are not UTF-8, or half a surrogate pair; leave them out") from None
    if isinstance(tokenizer, tokenizers.Tokenizer):
        return tokenizer.encode(text, add_special_tokens=False).ids
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def qwen_tokenizer(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> tokenizers.Tokenizer:
    """A Qwen2 tokenizer from the contents of ``vocab.json`` and ``merges.txt``, without any special token."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=dict(vocab), merges=list(merges)))
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def byte_tokenizer(folder: str | Path, texts: Iterable[str] = (), merges: int = 0) -> tokenizers.Tokenizer:
    """Write a byte-level Qwen2 tokenizer to `folder` and load it.

    Ids 0…255 are bytes, then come `merges` pairs, those that are most frequent in `texts`, and `SPECIAL_TOKENS`. The
    folder holds what a Qwen2 checkpoint's holds (tokenizer.json, tokenizer_config.json, vocab.json, merges.txt), so
    transformers' AutoTokenizer and Qwen2Tokenizer load it too. RefineError where the texts have not so many pairs.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pairs = _frequent_pairs(symbols, texts, merges) if merges else []
    vocab = {symbol: i for i, symbol in enumerate([*symbols, *map("".join, pairs)])}
    tokenizer = qwen_tokenizer(vocab, pairs)
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": {str(tokenizer.token_to_id(t)): {"content": t, **flags} for t in SPECIAL_TOKENS},
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "unk_token": None,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    texts = {
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        "vocab.json": json.dumps(vocab, ensure_ascii=False) + "\n",
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, pairs)]) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return load_tokenizer(folder)


def _frequent_pairs(symbols: Sequence[str], texts: Iterable[str], merges: int) -> list[tuple[str, str]]:
    """The first `merges` pairs that byte-pair encoding merges."""
    learner = qwen_tokenizer({symbol: i for i, symbol in enumerate(symbols)}, [])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=len(symbols) + merges, initial_alphabet=list(symbols), show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    found = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    if len(found) < merges:
        raise RefineError(f"tokenizer: merges {merges}: the texts have {len(found)}; give more texts or fewer merges")
    return found
