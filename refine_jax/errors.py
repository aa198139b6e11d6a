"""What a user may cause and can mend, and what a machine may."""

from collections.abc import Iterable

_MOST = 5000


class RefineError(ValueError):
    """Bad input. The message is one line that names the file or field, the value and the remedy."""


class Preempted(Exception):
    """A training was told to end (SIGTERM) and has saved its present step: the same command continues it."""

    def __init__(self, step: int, steps: int):
        super().__init__(f"preempted: saved at step {step} of {steps}; run the same command again to continue")


def listed(items: Iterable[str]) -> str:
    """Every offender, sorted, for a message; of a hostile file's millions the first 5000 and how many more."""
    items = sorted(name if name.isprintable() and len(name) <= 400 else repr(name[:400]) for name in items)
    more = f" and {len(items) - _MOST} more" if len(items) > _MOST else ""
    return ", ".join(items[:_MOST]) + more
