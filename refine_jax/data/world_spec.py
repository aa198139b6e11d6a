"""The small world: its words, what a prompt may state (`Spec`), and to which split a statement belongs."""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from refine_jax.errors import RefineError

Rng = np.random.Generator

DIMENSIONS = ("count", "colour", "shape", "size", "position", "text")
SPLITS = ("train", "eval")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart")
SIZES = ("small", "large")
PLACES = ("left", "right", "top", "bottom", "centre", "top left", "top right", "bottom left", "bottom right")
RELATIONS = {"left": "right", "right": "left", "above": "below", "below": "above"}  # and their opposites
MOST = 4  # shapes in a scene, letters in a text
_EVAL_SHARE = 0.1
# Few letters, so that a tiny network can learn to draw them all.
LETTERS = "ACEHLOTUXZ"


class Part(NamedTuple):
    """One thing that a prompt states. `subject`: "0" or "1" (a group), "0:1" (a relation of both) or "text"."""

    dimension: str
    subject: str
    value: str | int


@dataclass(frozen=True)
class Group:
    """What is stated about one group of shapes; None where nothing is stated."""

    count: int | None = None
    colour: str | None = None
    shape: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Spec:
    """What a prompt states about a picture.

    One group: all shapes of the picture, possibly at a `place`. Two groups: every shape belongs to one of them,
    possibly with a `relation` of the first to the second ("left": the first is to the left of the second).
    `text`: the letters written in it; `text_place`: "top" or "bottom". None where nothing is stated.
    """

    groups: tuple[Group, ...] = (Group(),)
    place: str | None = None
    relation: str | None = None
    text: str | None = None
    text_place: str | None = None

    @functools.cached_property
    def parts(self) -> tuple[Part, ...]:
        """Everything stated, in the order of DIMENSIONS."""
        parts = [
            Part(name, str(k), getattr(group, name))
            for name in DIMENSIONS[:4]
            for k, group in enumerate(self.groups)
            if getattr(group, name) is not None
        ]
        stated = (("0", self.place), ("0:1", self.relation), ("text", self.text_place))
        parts += [Part("position", subject, value) for subject, value in stated if value is not None]
        if self.text is not None:
            parts.append(Part("text", "text", self.text))
        return tuple(parts)

    @functools.cached_property
    def dimensions(self) -> tuple[str, ...]:
        """The stated dimensions, in the order of DIMENSIONS."""
        stated = {part.dimension for part in self.parts}
        return tuple(name for name in DIMENSIONS if name in stated)

    @functools.cached_property
    def key(self) -> str:
        """One text a meaning: "A left of B" and "B right of A" have the same."""
        groups = [f"{group.count} {group.size} {group.colour} {group.shape}" for group in self.groups]
        relation = RELATIONS[self.relation] if self.relation and groups[0] > groups[-1] else self.relation
        return f"{' & '.join(sorted(groups))} | {self.place} | {relation} | {self.text} | {self.text_place}"

    @property
    def split(self) -> str:
        """The split to which everything that means this belongs, in both languages and any wording."""
        # A hash of the meaning alone: a change of the drawing of specs moves none across the division.
        share = int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:4], "big") / 2**32
        return "eval" if share < _EVAL_SHARE else "train"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Spec":
        """The inverse of `to_dict`. Raises RefineError for an unknown field or value."""
        try:
            groups = tuple(Group(**group) for group in values.get("groups", ({},)))
            spec = cls(**{**values, "groups": groups})
        except TypeError as error:
            raise RefineError(f"spec: {error}; use the fields that Spec.to_dict writes") from None
        spec.validate()
        return spec

    def validate(self) -> None:
        """Raises RefineError when a value is not of this world."""
        allowed = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "count": range(1, MOST + 1)}
        if len(self.groups) not in (1, 2):
            raise RefineError(f"spec.groups: got {len(self.groups)}, expected one or two groups")
        for name, known in allowed.items():
            for group in self.groups:
                _member(f"groups.{name}", getattr(group, name), known)
        _member("place", self.place, PLACES if len(self.groups) == 1 else ())
        _member("relation", self.relation, RELATIONS if len(self.groups) == 2 else ())
        _member("text_place", self.text_place, ("top", "bottom"))
        if self.text is not None and not (1 <= len(self.text) <= MOST and set(self.text) <= set(LETTERS)):
            raise RefineError(f"spec.text: got {self.text!r}, expected 1 to {MOST} letters of {LETTERS}")
        if self.text_place is not None and self.text is None:
            raise RefineError(f"spec.text_place: got {self.text_place!r} without a text; state `text` too")


def _member(name: str, value: Any, known) -> None:
    if value is not None and value not in known:
        raise RefineError(f"spec.{name}: got {value!r}, expected one of {', '.join(map(str, known)) or 'none here'}")


# ---------------------------------------------------------------------------------------------- what may be stated


def pick(rng: Rng, values):
    """One of a sequence, all alike."""
    return values[int(rng.random() * len(values))]


def other(rng: Rng, values, *unwanted):
    """One of a sequence that is none of `unwanted`."""
    return pick(rng, [value for value in values if value not in unwanted])


def draw_text(rng: Rng) -> str:
    length = 1 + int(np.searchsorted((0.25, 0.55, 0.8), rng.random()))
    return "".join(pick(rng, LETTERS) for _ in range(length))


def draw_spec(rng: Rng) -> Spec:
    """Something to state: 1 to 5 dimensions, about one group of shapes or two that differ in a stated attribute."""
    wanted = 1 + int(np.searchsorted((0.08, 0.25, 0.55, 0.83), rng.random()))
    double = wanted > 1 and rng.random() < 0.5
    while True:
        stated = {DIMENSIONS[k] for k in rng.permutation(6)[:wanted]}
        # Shapes are what a picture is about: few prompts say nothing of them.
        if (double or rng.random() < 0.7) and not stated & {"colour", "shape"}:
            continue
        if double and not ("count" in stated or rng.random() < 0.3):
            continue
        break
    for _ in range(100):
        counts = (1 + int(np.searchsorted((0.4, 0.65, 0.85), rng.random())),)
        if double:
            counts = pick(rng, ((1, 1), (1, 1), (1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2)))
        groups = tuple(
            Group(
                count if "count" in stated else None,
                pick(rng, COLOURS) if "colour" in stated else None,
                pick(rng, SHAPES) if "shape" in stated else None,
                pick(rng, SIZES) if "size" in stated else None,
            )
            for count in counts
        )
        # Groups told apart by their number alone could not be: "two shapes and one shape".
        if not double or (groups[0].colour, groups[0].shape) != (groups[1].colour, groups[1].shape):
            break
    text = draw_text(rng) if "text" in stated else None
    place = relation = text_place = None
    if "position" in stated:
        # Where there are letters, their place may be what is stated, or both.
        kind = rng.random() if text else 0.0
        if text and kind > 0.4:
            text_place = pick(rng, ("top", "bottom"))
        if kind < 0.7:
            if double:
                relation = pick(rng, tuple(RELATIONS))
            else:
                alone = groups[0].count == 1
                place = pick(
                    rng, PLACES if alone and not text else PLACES[:4] if not alone else PLACES[:4] + PLACES[5:]
                )
    return Spec(groups, place, relation, text, text_place)
