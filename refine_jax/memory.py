"""Whether arrays fit the devices that they are to lie on, asked before any is made."""

import os
from collections import Counter
from typing import Any

import jax

from refine_jax.errors import RefineError

_GIB = 2**30


def limit(device: jax.Device) -> int | None:
    """Bytes that arrays on `device` can take at most; None where nobody says.

    A CPU's is the memory of the machine, which all its CPU devices share.
    """
    if device.platform == "cpu":
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None
    return (device.memory_stats() or {}).get("bytes_limit") or None


def check(tree: Any, what: str, remedy: str) -> None:
    """Raises `RefineError` where the arrays of `tree` alone are more than a device here holds.

    tree: `jax.ShapeDtypeStruct`s with their shardings. what: "the weights of tiny in float32"; remedy: "give …".
    """
    needed: Counter[str | jax.Device] = Counter()
    limits: dict[str | jax.Device, int | None] = {}
    for leaf in jax.tree.leaves(tree):
        size = jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
        for device in leaf.sharding.addressable_devices:
            place = "this machine" if device.platform == "cpu" else device
            needed[place] += size.size * size.dtype.itemsize
            if place not in limits:
                limits[place] = limit(device)
    for place, size in needed.items():
        most = limits[place]
        if most is not None and size > most:
            raise RefineError(
                f"{what}: take {size / _GIB:.1f} GiB on {place}, which has {most / _GIB:.1f} GiB for arrays; {remedy}"
            )
