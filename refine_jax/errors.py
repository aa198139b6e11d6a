"""What a user may cause and can mend, and what a machine may."""

from collections.abc import Iterable

_MOST = 5000


class RefineError(ValueError):
    """Bad input. The message is one line that names the file or field, the value and the remedy."""


class Preempted(Exception):
    """A long run was told to end (SIGTERM) and has kept what it did: the same command continues it."""

    def __init__(self, what: str):
        """what: how far it came."""
        super().__init__(f"preempted: {what}; run the same command again to continue")


def out_of_memory(error: BaseException) -> bool:
    """Whether the host or a device had too little memory; XLA says so in words alone."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def listed(items: Iterable[str]) -> str:
    """Every offender, sorted, for a message; of a hostile file's millions the first 5000 and how many more."""
    items = sorted(name if name.isprintable() and len(name) <= 400 else repr(name[:400]) for name in items)
    more = f" and {len(items) - _MOST} more" if len(items) > _MOST else ""
    return ", ".join(items[:_MOST]) + more
