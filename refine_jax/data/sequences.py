"""Samples as sequences of texts and pictures: what BAGEL is trained on, and where it is read from.

A sample of the three tasks, as the released recipe mixes them:

    rvr             system text, the misaligned picture seen, the prompt, the aligned picture to be painted
    text_to_image   the prompt (at times left out), the picture to be painted
    understanding   pictures seen and texts by turns; the answers are to be predicted

Read from the released files (Parquet tables of paths, JSON lines of conversations), from datasets of ours (`records`),
or drawn in the small world. Every source is picklable, and its samples are known by their numbers.
"""

import ast
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from refine_jax.data import world
from refine_jax.data.records import Dataset, open_picture
from refine_jax.errors import RefineError
from refine_jax.images import ImageLike, picture_size, read_picture

TASKS = ("rvr", "text_to_image", "understanding")
FORMATS = ("parquet", "jsonl", "records", "world")
_PLACE = "<image>"  # of a picture, in a conversation
_THREADS = 16
_QUESTION = {"en": "What does the picture show?", "zh": "图中有什么？"}


@dataclass(frozen=True)
class Text:
    """A text; scored: it is to be predicted. optional: it may be left out, so that guidance learns to do without."""

    text: str
    scored: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Seen:
    """A picture that the tower sees: its number among the sample's."""

    picture: int


@dataclass(frozen=True)
class Painted:
    """A picture in latents: to be painted, or given clean as a condition."""

    picture: int
    clean: bool = False


Item = Text | Seen | Painted


class Source(Protocol):
    """Samples by their numbers.

    index(tokens) -> `[n, 6] int64`: pictures seen, pictures in latents, tokens of the text stream and those of them
    that are to be predicted (both at most), width and height of the last picture (0 without any). It decodes no
    picture; tokens: the length of a text with its marks. sample(number) -> the items and the pictures, `[H, W, 3]
    uint8`, that they number.
    """

    def __len__(self) -> int: ...

    def index(self, tokens: Callable[[str], int]) -> np.ndarray: ...

    def sample(self, number: int) -> tuple[tuple[Item, ...], list[np.ndarray]]: ...


def _counts(items: Sequence[Item], size: tuple[int, int], tokens: Callable[[str], int]) -> tuple[int, ...]:
    """A row of an index; each picture has two marks in the text stream."""
    texts = sum(tokens(item.text) if isinstance(item, Text) else 2 for item in items)
    scored = sum(tokens(item.text) - 1 for item in items if isinstance(item, Text) and item.scored)
    seen = sum(isinstance(item, Seen) for item in items)
    return seen, sum(isinstance(item, Painted) for item in items), texts, scored, *size


@dataclass(frozen=True)
class Wording:
    """What stands around a prompt: the texts of a `BagelModel`, and whether latents of what is seen go before it."""

    system: str
    prompt: str
    latents: bool = False

    def rvr(self, prompt: str) -> tuple[Item, ...]:
        """Picture 0 is regenerated as picture 1."""
        before = (Painted(0, clean=True),) if self.latents else ()
        return Text(self.system), *before, Seen(0), Text(self.prompt.replace("{}", prompt)), Painted(1)

    def said(self, text: str) -> str:
        """The prompt in a text that `rvr` made of it."""
        before, after = self.prompt.split("{}")
        return text.removeprefix(before).removesuffix(after)


def text_to_image(prompt: str) -> tuple[Item, ...]:
    """Picture 0 is painted."""
    return Text(prompt, optional=True), Painted(0)


def conversation(turns: Sequence[Mapping[str, str]], pictures: int) -> tuple[Item, ...]:
    """Turns {"from": "human" | "gpt", "value"} with `<image>` where a picture stands; what "gpt" says is scored.

    Raises ValueError where nothing is scored, a value is no text, or the marks are not as many as the pictures.
    """
    items: list[Item] = []
    shown = 0
    for turn in turns:
        if not isinstance(turn["value"], str):
            raise ValueError(f"a value that is no text: {turn['value']!r}")
        if turn["from"] == "gpt" and turn["value"]:
            items.append(Text(turn["value"], scored=True))
        if turn["from"] != "human":
            continue
        head, *rest = turn["value"].split(_PLACE)
        for piece in [head] + [piece for part in rest for piece in (None, part)]:
            if piece is None:
                items.append(Seen(shown))
                shown += 1
            elif piece.strip():
                items.append(Text(piece.strip() if rest else piece))
    if shown != pictures:
        raise ValueError(f"{shown} times {_PLACE} for {pictures} pictures")
    if not any(isinstance(item, Text) and item.scored for item in items):
        raise ValueError('no turn of "gpt" to learn from')
    return tuple(items)


# ---------------------------------------------------------------------------------------------- files of other programs

# What `Files` keeps of a sample: a prompt or the items of a conversation, the paths of its pictures, where it is from.
_Row = tuple[str | tuple[Item, ...], tuple[str, ...], str]


class Files:
    """Samples whose pictures are files: parsed rows, and the size of each one's last picture, from its header.

    Args:
      rows: each `_Row`, or the reason why it cannot be used.
      what: names the source in messages; make: the items of a prompt.
      max_corrupt: more than this share of unusable samples raises `RefineError`; `corrupt` has the reasons of all.
    """

    def __init__(
        self,
        rows: Sequence[_Row | str],
        what: str,
        make: Callable[[str], tuple[Item, ...]],
        max_corrupt: float = 0.01,
        progress: bool = False,
    ):
        self._what, self._make, self._limit, self._total = what, make, max_corrupt, len(rows)
        self.corrupt = [row for row in rows if isinstance(row, str)]
        good = [row for row in rows if not isinstance(row, str)]

        def measured(row: _Row) -> tuple[int, int] | str:
            try:
                sizes = [picture_size(path) for path in row[1]]
                return sizes[-1] if sizes else (0, 0)
            except RefineError as error:
                return f"{row[2]}: {error}"

        with ThreadPoolExecutor(_THREADS) as pool:
            sizes = list(tqdm(pool.map(measured, good), total=len(good), desc=f"{what}: sizes", disable=not progress))
        self.corrupt += [size for size in sizes if isinstance(size, str)]
        self._rows = [(*row, size) for row, size in zip(good, sizes) if not isinstance(size, str)]
        self._check()

    def _check(self) -> None:
        if not self._rows or len(self.corrupt) > self._limit * self._total:
            reason = "; ".join(self.corrupt[:3]) or "no rows"
            raise RefineError(
                f"{self._what}: {len(self.corrupt)} of {self._total} samples cannot be used ({reason}); set root to "
                "the folder that their paths start from, copy what is missing, or allow more with max_corrupt"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def index(self, tokens: Callable[[str], int]) -> np.ndarray:
        kept, counts = [], []
        for row in self._rows:
            try:
                counts.append(_counts(self._items(row), row[3], tokens))
                kept.append(row)
            except RefineError as error:  # a text that spells a mark
                self.corrupt.append(f"{row[2]}: {error}")
        self._rows = kept
        self._check()
        return np.array(counts, np.int64)

    def _items(self, row: tuple) -> tuple[Item, ...]:
        return self._make(row[0]) if isinstance(row[0], str) else row[0]

    def sample(self, number: int) -> tuple[tuple[Item, ...], list[np.ndarray]]:
        row = self._rows[number]
        return self._items(row), [on_white(path) for path in row[1]]


def on_white(image: ImageLike) -> np.ndarray:
    """A picture's colours, `[H, W, 3] uint8`, on white where it is transparent, as the released loader has them."""
    return read_picture(image).on_white().rgb


def parquet(path: Path, root: Path, task: str, wording: Wording, **checks: Any) -> Files:
    """The released tables: a `.parquet` file, or a folder of them.

    rvr: `image_list` [misaligned, aligned] and `user_prompt`; text_to_image: `image_list` of one or `cache_image`, and
    `user_prompt`. Paths are relative to `root`; a list of them may be written as text, a prompt as a list of one.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise RefineError("data: reading Parquet needs pyarrow; pip install 'refine-jax[parquet]'") from None
    files = sorted(path.glob("**/*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise RefineError(f"{path}: no .parquet file there; give a file, or a folder that holds some")
    rows: list[_Row | str] = []
    wanted = 2 if task == "rvr" else 1
    for file in files:
        try:
            names = pq.read_schema(file).names
            images = next((name for name in ("image_list", "cache_image") if name in names), None)
            if images is None or "user_prompt" not in names:
                raise RefineError(f"{file}: has columns {', '.join(names)}; image_list and user_prompt are wanted")
            table = pq.read_table(file, columns=[images, "user_prompt"])
        except (OSError, ValueError) as error:
            raise RefineError(f"{file}: cannot be read ({' '.join(str(error).split())[:200]}); copy it again") from None
        cells = zip(table[images].to_pylist(), table["user_prompt"].to_pylist(), strict=True)
        for number, (paths, prompt) in enumerate(cells):
            origin = f"{file.name} row {number}"
            try:
                paths, prompt = _paths(paths), prompt if isinstance(prompt, (str, bytes)) else prompt[0]
                prompt = prompt.decode() if isinstance(prompt, bytes) else prompt
                if len(paths) != wanted or not isinstance(prompt, str):
                    raise ValueError(f"{len(paths)} pictures, {task} takes {wanted} and a prompt")
                rows.append((prompt, tuple(str(root / p) for p in paths), origin))
            except (ValueError, TypeError, IndexError, KeyError) as error:
                rows.append(f"{origin}: {' '.join(str(error).split())[:200]}")
    return Files(rows, str(path), wording.rvr if task == "rvr" else text_to_image, **checks)


def _paths(cell: Any) -> list[str]:
    """A list of paths, one that is written as text, or a path."""
    if isinstance(cell, str) and cell.startswith("["):
        try:
            cell = ast.literal_eval(cell)
        except (ValueError, SyntaxError, RecursionError):
            raise ValueError(f"{cell[:60]!r} is no list of paths") from None
    found = [cell] if isinstance(cell, str) else list(cell)
    if not all(isinstance(path, str) for path in found):
        raise ValueError("pictures are to be paths")
    return found


def jsonl(path: Path, root: Path, **checks: Any) -> Files:
    """Conversations, a JSON object a line: {"image": path or list of paths, "conversations": [turn, …]}."""
    rows: list[_Row | str] = []
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(_conversation_row(line, root, f"{path.name} line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise RefineError(f"{path}: cannot be read ({error}); give a file of JSON lines") from None
    return Files(rows, str(path), text_to_image, **checks)


def _conversation_row(line: str, root: Path, origin: str) -> _Row | str:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("is no JSON object")
        if "video" in row:
            raise ValueError("a video, pictures are wanted")
        paths = _paths(row.get("image") or [])
        return conversation(row["conversations"], len(paths)), tuple(str(root / p) for p in paths), origin
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        return f"{origin}: {reason}"


# ---------------------------------------------------------------------------------------------- our own, and drawn ones


class Records:
    """A dataset's pairs: its instruction is the prompt, its target the aligned picture."""

    def __init__(self, path: Path, task: str, wording: Wording):
        self._dataset, self._task, self._wording = Dataset(path), task, wording

    def __len__(self) -> int:
        return len(self._dataset)

    def index(self, tokens: Callable[[str], int]) -> np.ndarray:
        size, length = self._dataset.index[:, :2], self._dataset.index[:, 8]
        seen, painted, around, scored, _, _ = _counts(_items(self._task, self._wording, ""), (0, 0), tokens)
        # A token is a byte at least.
        return np.stack(np.broadcast_arrays(seen, painted, around + length, scored, *size.T), axis=1).astype(np.int64)

    def sample(self, number: int) -> tuple[tuple[Item, ...], list[np.ndarray]]:
        record = self._dataset[number]
        shown = [record.whole_image()] if self._task == "rvr" else []
        pictures = [*shown, open_picture(record.target, record.size, "target")]
        return _items(self._task, self._wording, record.instruction), [on_white(picture) for picture in pictures]


def _items(task: str, wording: Wording, prompt: str) -> tuple[Item, ...]:
    return wording.rvr(prompt) if task == "rvr" else text_to_image(prompt)


@dataclass(frozen=True)
class World:
    """Pairs of the small world, `count` of them; understanding: what a picture shows, in the words of its prompt."""

    task: str
    wording: Wording
    count: int
    seed: int
    side: int
    split: str = "train"

    def __len__(self) -> int:
        return self.count

    def index(self, tokens: Callable[[str], int]) -> np.ndarray:
        # A token is a byte at least.
        size = (self.side, self.side)
        row = np.max([_counts(self._items(question, ""), size, tokens) for question in _QUESTION.values()], axis=0)
        said = world.PROMPT_BYTES if self.task == "understanding" else 0
        return np.tile(row + [0, 0, world.PROMPT_BYTES, said, 0, 0], (self.count, 1))

    def sample(self, number: int) -> tuple[tuple[Item, ...], list[np.ndarray]]:
        pair = world.sample(self.seed, number, self.split, self.side)
        shown = [pair["misaligned_image"]] if self.task == "rvr" else []
        return self._items(_QUESTION[pair["language"]], pair["prompt"]), [*shown, pair["image"]]

    def _items(self, question: str, prompt: str) -> tuple[Item, ...]:
        if self.task == "understanding":
            return Seen(0), Text(question), Text(prompt, scored=True)
        return _items(self.task, self.wording, prompt)


def open_source(name: str, settings: Mapping[str, Any], wording: Wording, progress: bool = False) -> Source:
    """The source that an entry of `config.data.sources` describes.

    settings: format, one of `FORMATS`; task, one of `TASKS`; path; root (default: path, or the folder that it is in),
    which the files' own paths are relative to; max_corrupt (share of unusable samples), both of Parquet and JSON lines;
    of the small world count, seed, side. Raises `RefineError`, naming the entry, for what does not go together.
    """
    given = dict(settings)
    form, task, path = given.pop("format", None), given.pop("task", None), given.pop("path", "")
    given.pop("weight", None)
    if form == "world" and path:
        given["path"] = path
    where = f"data.sources.{name}"
    if form not in FORMATS:
        raise RefineError(f"{where}.format {form!r}: choose one of {', '.join(FORMATS)}")
    tasks = {"parquet": TASKS[:2], "jsonl": TASKS[2:], "records": TASKS[:2], "world": TASKS}[form]
    if task not in tasks:
        raise RefineError(f"{where}.task {task!r}: of {form} choose one of {', '.join(tasks)}")
    if form == "world":
        values = {key: given.pop(key, default) for key, default in (("count", 100_000), ("seed", 0), ("side", 64))}
        _no_more(where, given)
        return World(task, wording, **values)
    if not path:
        raise RefineError(f"{where}.path: is empty; give the {form} file or folder")
    path = Path(path)
    if form == "records":
        _no_more(where, given)
        return Records(path, task, wording)
    root, max_corrupt = given.pop("root", ""), given.pop("max_corrupt", 0.01)
    _no_more(where, given)
    root = Path(root or (path if path.is_dir() else path.parent))
    checks = dict(max_corrupt=max_corrupt, progress=progress)
    if form == "parquet":
        return parquet(path, root, task, wording, **checks)
    return jsonl(path, root, **checks)


def _no_more(where: str, given: Mapping[str, Any]) -> None:
    if given:
        raise RefineError(f"{where}.{sorted(given)[0]}: no such setting here; take it out")


def fitted(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture `[H, W, 3] uint8` at (height, width) `size`, bicubic with antialiasing (the released transforms')."""
    if picture.shape[:2] == tuple(size):
        return picture
    return np.asarray(Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BICUBIC))
