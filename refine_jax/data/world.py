"""A small world in which refinement can be seen to work: prompts, pictures that fit them, and pictures that do not.

Scenes of one to four shapes with number, colour, shape, size and position, and up to four letters; prompts that state
one to five of these dimensions in English and Chinese; a checker that reads any picture and says which parts hold.

    pair = world.sample(seed=0, index=7, split="train")
    world.check(pair["image"], pair["spec"]).correct             # True
    world.check(pair["misaligned_image"], pair["spec"]).wrong    # == pair["wrong"], for instance ("colour",)

Everything is a pure function of its arguments. What the "eval" split states (a tenth of all combinations, whichever the
language and the wording) is never stated by "train".
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from refine_jax.data.world_check import Report, check, judge, observe
from refine_jax.data.world_read import Observation, Seen, read
from refine_jax.data.world_scene import LABELS, Item, Scene, arrange, fits, labels, render
from refine_jax.data.world_spec import (
    COLOURS,
    DIMENSIONS,
    LETTERS,
    MOST,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Group,
    Part,
    Rng,
    Spec,
    draw_spec,
    draw_text,
    other,
    pick,
)
from refine_jax.data.world_words import LANGUAGES, edit_instruction, prompt
from refine_jax.errors import RefineError

__all__ = [
    "COLOURS", "DIMENSIONS", "LABELS", "LANGUAGES", "LETTERS", "PLACES", "RELATIONS", "SHAPES", "SIZES", "SPLITS",
    "Group", "Item", "Observation", "Part", "Report", "Scene", "Seen", "Spec",
    "check", "compose", "edit_instruction", "judge", "labels", "misalign", "observe", "prompt", "read", "render",
    "sample", "scores", "table", "wordings",
]  # fmt: skip

# No prompt is longer, in UTF-8.
PROMPT_BYTES = 136
# How clearly a position holds or fails in every scene made here, in fractions of the side.
_CLEAR = 0.025


def _wrong(scene: Scene, spec: Spec) -> tuple[str, ...] | None:
    """The stated dimensions that fail in a scene; None where a position neither clearly holds nor clearly fails."""
    observed = observe(scene)
    wrong = judge(observed, spec, _CLEAR).wrong
    if "position" not in spec.dimensions:
        return wrong
    return wrong if judge(observed, spec, -_CLEAR).wrong == wrong else None


def _looks(rng: Rng, spec: Spec) -> tuple[Item, ...]:
    """Shapes as stated; what is not stated is drawn, for a whole group or for each of its shapes."""
    items = []
    for number, group in enumerate(spec.groups):
        # Not stated is said with a plural: two or more.
        count = group.count or 2 + int(rng.random() * (3 if len(spec.groups) == 1 else 1))
        columns = []
        for stated, values in ((group.shape, SHAPES), (group.colour, COLOURS), (group.size, SIZES)):
            alike = stated or (pick(rng, values) if rng.random() < 0.5 else None)
            columns.append([alike or pick(rng, values) for _ in range(count)])
        items += [Item(*looks, number) for looks in zip(*columns)]
    return tuple(items)


def compose(spec: Spec, rng: Rng) -> Scene | None:
    """A scene in which everything stated clearly holds, all else being drawn; None when no room was found for it."""
    for _ in range(16):
        items = _looks(rng, spec)
        scene = arrange(rng, items, spec.place, spec.relation, spec.text or "", spec.text_place)
        if scene is not None and _wrong(scene, spec) == ():
            return scene
    return None


def _changed_text(rng: Rng, text: str) -> str:
    """Letters as a weak generator writes them: one wrong, left out, doubled or exchanged, or all; at times none."""
    kind, at = rng.random(), int(rng.random() * len(text))
    if kind < 0.1:
        return ""
    if kind < 0.25 and len(text) > 1:
        return text[:at] + text[at + 1 :]
    if kind < 0.4 and len(text) < MOST:
        return text[:at] + text[at] + text[at:]
    if kind < 0.5 and len(text) > 1:
        return text[::-1]
    if kind < 0.6:
        return draw_text(rng)
    return text[:at] + other(rng, LETTERS, text[at]) + text[at + 1 :]


def _changed_looks(rng: Rng, items: list[Item], name: str, values: Sequence[str]) -> list[Item]:
    """One attribute changed: exchanged between two groups, or another for a group or for one shape of it."""
    if items[-1].group and rng.random() < 0.4:
        first = next(getattr(item, name) for item in items if item.group == 0)
        second = next(getattr(item, name) for item in items if item.group == 1)
        return [replace(item, **{name: first if item.group else second}) for item in items]
    chosen = pick(rng, items)
    changed = other(rng, values, getattr(chosen, name))
    whole = rng.random() < 0.7
    return [
        replace(item, **{name: changed}) if item is chosen or (whole and item.group == chosen.group) else item
        for item in items
    ]


def misalign(scene: Scene, spec: Spec, rng: Rng, keep: bool = False) -> Scene | None:
    """A scene in which exactly one to three of the stated dimensions fail, as a weak generator fails.

    Args:
      scene: one in which all of `spec` holds.
      keep: the background stays, and where only looks and letters change also the arrangement: the same picture with
        a fault. Otherwise everything that is not stated is drawn anew: another generator's attempt at the prompt.

    Returns None when no such scene was found (rare: little room).
    """
    names = spec.dimensions
    most = min(len(names), 1 + int(np.searchsorted((0.5, 0.8), rng.random())))
    for attempt in range(24):
        # With little room, fewer faults.
        number = max(1, most - attempt // 8)
        chosen = tuple(names[k] for k in sorted(rng.permutation(len(names))[:number]))
        items = list(scene.items if keep else _looks(rng, spec))
        place, relation, text, text_place = spec.place, spec.relation, scene.text, spec.text_place
        for name, values in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)):
            if name in chosen:
                items = _changed_looks(rng, items, name, values)
        if "count" in chosen:
            at = int(rng.random() * len(items))
            if len(items) == 1 or (len(items) < MOST and rng.random() < 0.5):
                items[at:at] = [items[at]] * (1 + int(rng.random() < 0.2 and len(items) < MOST - 1))
            else:
                del items[at]
        if "position" in chosen:
            stated = [name for name in ("place", "relation", "text_place") if getattr(spec, name)]
            moved = pick(rng, stated)
            if moved == "place":
                place = other(rng, PLACES[:4] if place in PLACES[:4] else PLACES, place)
            elif moved == "relation":
                relation = RELATIONS[relation] if rng.random() < 0.6 else other(rng, tuple(RELATIONS), relation)
            else:
                text_place = "top" if text_place == "bottom" else "bottom"
        if "text" in chosen:
            text = _changed_text(rng, text)
        result = None
        if keep and not {"count", "size", "position"} & set(chosen):
            result = replace(scene, items=tuple(items), text=text)
            if not fits(result):
                result = None
        if result is None:
            result = arrange(rng, tuple(items), place, relation, text, text_place)
        if result is not None and _wrong(result, spec) == chosen:
            return replace(result, seed=scene.seed) if keep else result
    return None


def sample(seed: int, index: int, split: str = "train", size: int = 64, keep_share: float = 0.5) -> dict:
    """One prompt with a picture that fits it and one that does not: a pure function of its arguments.

    Args:
      split: "train" or "eval"; no combination is stated by both.
      size: the side of the pictures in pixels.
      keep_share: how often the misaligned picture is the aligned one with faults (see `misalign`).

    Returns {prompt: str, language: "en" (even indices) | "zh" (odd), spec: Spec, dimensions: the stated ones, wrong:
    those of them that fail in the misaligned picture, scene, misaligned_scene: Scene, image, misaligned_image: [size,
    size, 3] uint8}. Raises RefineError for an unknown split or a size below 16.
    """
    if split not in SPLITS:
        raise RefineError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, index, SPLITS.index(split), 7))))
    language = LANGUAGES[index % 2]
    while True:
        spec = draw_spec(rng)
        if spec.split != split:
            continue
        scene = compose(spec, rng)
        misaligned = scene and misalign(scene, spec, rng, keep=bool(rng.random() < keep_share))
        if misaligned:
            break
    return {
        "prompt": prompt(spec, language, rng),
        "language": language,
        "spec": spec,
        "dimensions": spec.dimensions,
        "wrong": judge(observe(misaligned), spec).wrong,
        "scene": scene,
        "misaligned_scene": misaligned,
        "image": render(scene, size),
        "misaligned_image": render(misaligned, size),
    }


def wordings(count: int, seed: int = 0, split: str = "train") -> list[str]:
    """`count` prompts, English and Chinese by turns; letters that are to be drawn are left out, as no two are alike."""
    found = []
    while len(found) < count:
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, len(found), SPLITS.index(split), 8))))
        spec = draw_spec(rng)
        while spec.split != split:
            spec = draw_spec(rng)
        text = prompt(spec, LANGUAGES[len(found) % 2], rng)
        found.append(re.sub(rf"([\"“”]){spec.text}([\"“”])", r"\1\2", text) if spec.text else text)
    return found


# ---------------------------------------------------------------------------------------------- scores


def _wilson(right: int, count: int) -> list[float]:
    """[share, low, high]: Wilson's 95 % interval of a binomial proportion."""
    if not count:
        return [math.nan] * 3
    z2, share = 1.959964**2, right / count
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return [share, max(0.0, middle - half), min(1.0, middle + half)]


_FIGURES = ("score", "low", "high")


def scores(reports: Sequence[Report], languages: Sequence[str]) -> dict[str, dict[str, float]]:
    """What share of pictures fulfils its prompt: {row: {score, low, high (95 % interval), count}}.

    Rows: "all" (a prompt counts when all its parts hold), "dimensions" (the mean share of stated dimensions that hold),
    each of DIMENSIONS over the prompts that state it, each language and "1 stated" … "5 stated" as "all". Intervals
    are Wilson's, that of "dimensions" the normal one of a mean. Raises RefineError where the lengths differ.
    """
    if len(reports) != len(languages):
        raise RefineError(f"languages: got {len(languages)} for {len(reports)} reports, expected one for each")
    groups = {"all": [report.correct for report in reports]}
    for name in DIMENSIONS:
        groups[name] = [report.dimensions[name] for report in reports if name in report.dimensions]
    for language in LANGUAGES:
        groups[language] = [report.correct for report, said in zip(reports, languages) if said == language]
    for stated in range(1, 6):
        groups[f"{stated} stated"] = [report.correct for report in reports if len(report.dimensions) == stated]
    rows = {name: (*_wilson(sum(values), len(values)), len(values)) for name, values in groups.items()}
    shares = np.array([report.score for report in reports])
    mean, half = (shares.mean(), 1.959964 * shares.std() / math.sqrt(len(shares))) if len(shares) else (math.nan,) * 2
    rows["dimensions"] = (float(mean), max(0.0, float(mean - half)), min(1.0, float(mean + half)), len(shares))
    order = ["all", "dimensions", *DIMENSIONS, *LANGUAGES, *(f"{stated} stated" for stated in range(1, 6))]
    return {name: dict(zip((*_FIGURES, "count"), rows[name])) for name in order}


def _cell(row: Mapping[str, float]) -> str:
    return "{:.1f} ({:.1f}–{:.1f})".format(*(100 * row[name] for name in _FIGURES)) if row["count"] else "–"


def table(columns: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A Markdown table of `scores` side by side, in percent: {"initial": scores(…), "round 1": scores(…)}."""
    names = list(columns)
    lines = ["| | prompts | " + " | ".join(names) + " |", "|---|---:|" + "---:|" * len(names)]
    for row in columns[names[0]] if names else ():
        cells = [columns[name][row] for name in names]
        if any(cell["count"] for cell in cells):
            lines.append(f"| {row} | {cells[0]['count']} | " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines)
