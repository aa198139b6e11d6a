"""The bundled example: a real photograph with a garbled word, and what to ask for."""

import dataclasses
import json
from pathlib import Path

from refine_jax.errors import RefineError

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
