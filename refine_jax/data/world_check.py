"""The small world's checker: which parts of a statement hold in a picture or in a scene.

The reading of a statement:
- one group: all shapes of the picture. "count": their number; "colour", "shape", "size", a place: every one is so.
- two groups: every shape belongs to one of them; of all such divisions the one that fulfils the most dimensions, then
  the most parts, counts. A relation compares the groups' mean centres along its axis, which must be the one on which
  they differ most.
- what is not stated is not judged, except that a shape too many belongs to some group.
- what the reader could not name fulfils no statement.
"""

from dataclasses import dataclass

import numpy as np

from refine_jax.data.world_read import Observation, Seen, read
from refine_jax.data.world_scene import Scene
from refine_jax.data.world_spec import DIMENSIONS, Part, Spec


@dataclass(frozen=True)
class Report:
    """`parts`: (part, holds) of everything stated; `observed`: what was seen."""

    parts: tuple[tuple[Part, bool], ...]
    observed: Observation

    @property
    def dimensions(self) -> dict[str, bool]:
        """Of each stated dimension, whether all its parts hold."""
        result: dict[str, bool] = {}
        for part, holds in self.parts:
            result[part.dimension] = result.get(part.dimension, True) and holds
        return {name: result[name] for name in DIMENSIONS if name in result}

    @property
    def wrong(self) -> tuple[str, ...]:
        """The stated dimensions that do not hold."""
        return tuple(name for name, holds in self.dimensions.items() if not holds)

    @property
    def correct(self) -> bool:
        """Everything stated holds."""
        return all(holds for _, holds in self.parts)

    @property
    def score(self) -> float:
        """The share of stated dimensions that hold, in 0..1; 1 when nothing is stated."""
        values = self.dimensions.values()
        return sum(values) / len(values) if values else 1.0


# ---------------------------------------------------------------------------------------------- the logic

_FAR = 0.1  # by how much the centres of two groups must differ, of the side
_CENTRE = 0.14
_COUNTED = 10  # shapes beyond these are counted but not divided among groups: 2^10 divisions


def observe(scene: Scene) -> Observation:
    """What a perfect reader sees in a picture of the scene."""
    items = tuple(Seen(item.shape, item.colour, item.size, item.x, item.y) for item in scene.items)
    return Observation(items, scene.text, scene.text_y + 3.5 * scene.cell if scene.text else None)


def _at(place: str, x: float, y: float, slack: float) -> bool:
    if place == "centre":
        return max(abs(x - 0.5), abs(y - 0.5)) < _CENTRE - slack
    sides = {"left": 0.5 - x, "right": x - 0.5, "top": 0.5 - y, "bottom": y - 0.5}
    return all(sides[word] > slack for word in place.split())


def _related(relation: str, dx: float, dy: float, slack: float) -> bool:
    """Whether a thing is so related to another whose centre lies (dx, dy) from its own."""
    along, across = (dx, dy) if relation in ("left", "right") else (dy, dx)
    along = along if relation in ("left", "above") else -along
    return along > _FAR + slack and along > abs(across) + slack


def judge(observed: Observation, spec: Spec, slack: float = 0.0) -> Report:
    """Which parts of a statement hold. `slack` (fractions of the side) makes positions harder, negative easier."""
    seen = observed.items[:_COUNTED]
    total, divided, whole = len(observed.items), len(seen), (1 << len(seen)) - 1
    x, y = [item.x for item in seen], [item.y for item in seen]
    # Of each part a test of the members (bits) of group 0.
    fixed: dict[int, bool] = {}
    tests = []
    for k, (dimension, subject, value) in enumerate(spec.parts):
        if subject == "text":
            if dimension == "text":
                fixed[k] = observed.text == value
            else:
                fixed[k] = observed.text_y is not None and _at(value, 0.5, observed.text_y, slack)
        elif subject == "0:1":
            tests.append((k, "relation", 0, value))
        elif dimension == "count":
            tests.append((k, "count", int(subject), value))
        else:
            if dimension == "position":
                so = [_at(value, item.x, item.y, slack) for item in seen]
            else:
                so = [getattr(item, dimension) == value for item in seen]
            tests.append((k, "every", int(subject), sum(1 << i for i, yes in enumerate(so) if yes)))
    best, best_rank = None, None
    for members in range(whole + 1) if len(spec.groups) == 2 else (whole,):
        holds = dict(fixed)
        for k, kind, group, value in tests:
            chosen = whole & ~members if group else members
            if kind == "every":
                holds[k] = chosen != 0 and chosen & ~value == 0
            elif kind == "count":
                # Shapes beyond the divided ones are too many for any group.
                holds[k] = chosen.bit_count() + total - divided == value
            else:
                holds[k] = _mean_related(value, members, whole & ~members, x, y, slack)
        truth = tuple(holds[k] for k in range(len(spec.parts)))
        wrong = {part.dimension for part, so in zip(spec.parts, truth) if not so}
        # The truth itself breaks ties, so that the order in which shapes were found does not matter.
        rank = (-len(wrong), sum(truth), truth)
        if best_rank is None or rank > best_rank:
            best, best_rank = truth, rank
    return Report(tuple(zip(spec.parts, best)), observed)


def _mean_related(relation: str, first: int, second: int, x: list, y: list, slack: float) -> bool:
    if not first or not second:
        return False

    def mean(values: list, members: int) -> float:
        return sum(v for i, v in enumerate(values) if members >> i & 1) / members.bit_count()

    return _related(relation, mean(x, second) - mean(x, first), mean(y, second) - mean(y, first), slack)


def check(image: np.ndarray, spec: Spec) -> Report:
    """Which parts of a statement hold in a picture [H, W, 3] uint8. Raises RefineError for another form."""
    return judge(read(image), spec)
