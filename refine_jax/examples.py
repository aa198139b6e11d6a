"""The bundled examples: a real photograph with a garbled word, a misaligned picture, and what to ask for."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from refine_jax.data import world
from refine_jax.data.world import Spec
from refine_jax.errors import RefineError

# Which of the held-out prompts.
_MISALIGNED = 104
ASSETS = Path(__file__).parent / "assets" / "example"


@dataclasses.dataclass(frozen=True)
class Example:
    """Paths of the picture and of the region's mask, the instruction, and a reference where there is one."""

    image: Path
    region: Path
    prompt: str
    reference: Path | None = None


def sign() -> Example:
    """The example that `refine-jax refine` runs when it is given nothing.

    Raises `RefineError` in an installation without the bundled example.
    """
    try:
        request = json.loads((ASSETS / "request.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RefineError(
            "this installation holds no bundled example; give --image, --mask or --box, --prompt and --model FOLDER"
        ) from None
    reference = request.get("reference")
    return Example(
        ASSETS / request["image"],
        ASSETS / request["mask"],
        request["prompt"],
        ASSETS / reference if reference else None,
    )


def misaligned() -> tuple[np.ndarray, str, Spec]:
    """The example that `refine-jax regenerate` runs when it is given nothing: a picture of the small world `[64, 64, 3]
    uint8`, a prompt that it does not fulfil and that no training states, and what the prompt says (`world.check`)."""
    sample = world.sample(seed=7_000, index=_MISALIGNED, split="eval")
    return sample["misaligned_image"], sample["prompt"], sample["spec"]
