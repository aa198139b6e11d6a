"""What a training reads of a loader's pairs: instructions as tokens, and what is left out at random."""

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np
from tqdm import tqdm

from refine_jax import prompts
from refine_jax.data import loader
from refine_jax.errors import RefineError
from refine_jax.model import ModelConfig


class Cut:
    """Counts instructions that lose their end, and says so at the first: `ModelConfig.fit_prompt` calls it."""

    def __init__(self, length: int):
        self.count, self.most, self._length = 0, 0, length

    def __call__(self, tokens: int, most: int) -> None:
        self.count, self.most = self.count + 1, max(self.most, tokens)
        if self.count == 1:
            limit, remedy = f"data.text_length {self._length}", "give more to keep it"
            if most <= self._length:
                limit, remedy = f"the {most} that the model reads", "shorten it"
            text = f"an instruction takes {tokens} tokens with its pictures, and loses what is above"
            tqdm.write(f"{text} {limit}; {remedy}", file=sys.stderr)

    def close(self) -> None:
        """Say how many they were."""
        if self.count > 1:
            text = f"{self.count} instructions lost their end; the longest took {self.most} tokens"
            tqdm.write(text, file=sys.stderr)
        self.count = 0


class Prompted:
    """The pairs of a loader with tokenised instructions under "prompt" in place of their bytes.

    config: `instruction_dropout`, how often an instruction is replaced by the model's negative prompt;
    `data.reference_dropout`, how often a reference is left out (has_reference is False); `data.text_to_image`, how
    often the picture of a pair without a mask is (has_image is False). Draws depend on the seed, the position and the
    row in the global batch alone. rows: those of the global batch that the pairs are.
    """

    def __init__(
        self,
        pairs: Any,
        model: ModelConfig,
        tokenizer: Any,
        config: ml_collections.ConfigDict,
        rows: Sequence[int],
    ):
        data = config.data
        self._dropout, self._alone = config.instruction_dropout, data.get("text_to_image", 0.0)
        self._unseen = data.get("reference_dropout", 0.0)
        for name, share in (("text_to_image", self._alone), ("reference_dropout", self._unseen)):
            if not 0 <= share <= 1:
                raise RefineError(f"data.{name} {share}: give a share from 0 to 1")
        self._pairs, self._model, self._tokenizer, self._length = pairs, model, tokenizer, data.text_length
        self._cut = Cut(data.text_length)
        self._seed, self._batch_size, self._own = config.seed, config.batch_size, np.asarray(rows)

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> dict[str, Any]:
        step = self._pairs.get_state()["step"]
        batch = dict(next(self._pairs))
        names = self._model.pictures.read
        shapes = [batch[name].shape for name in names]
        grids = [self._model.vl_grid(shape[2] / shape[1]) for shape in shapes]
        rows = len(self._own)
        draw = lambda kind: np.random.default_rng([self._seed, step, kind]).random(self._batch_size)[self._own]
        draws = draw(0)
        if "reference" in names and self._unseen:
            batch["has_reference"] = batch["has_reference"] & (draw(2) >= self._unseen)
        if "mask" not in names:
            batch["has_image"] = draw(1) >= self._alone
            if self._alone == 1 and not self._model.pictures.seen:
                del batch["image"]  # nor need it be encoded
        texts = [loader.decode_instruction(row) for row in batch.pop("instruction")]
        texts = [self._model.negative_prompt if drawn < self._dropout else text for drawn, text in zip(draws, texts)]
        how = dict(grids=grids, length=self._length, cut=self._cut)
        fit = functools.partial(self._model.fit_prompt, self._tokenizer, **how)
        there = np.stack([batch.get(f"has_{name}", np.ones(rows, bool)) for name in names], axis=1).tolist()
        encoded = [fit(text, present=present) for text, present in zip(texts, there)]
        batch["prompt"] = vars(prompts.pad_prompts(encoded, self._length))
        for name in ("is_logo", "skipped"):
            batch.pop(name, None)
        return batch

    @property
    def corrupt(self) -> int:
        """How many records this host had to leave out so far."""
        return len(getattr(self._pairs, "corrupt", ()))

    def get_state(self) -> dict[str, Any]:
        """The pairs' position."""
        return self._pairs.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue at a position that `get_state` gave."""
        self._pairs.set_state(state)

    def close(self) -> None:
        """End the pairs' worker processes."""
        self._cut.close()
        self._pairs.close()
