"""Small datasets for the tests: noise pictures whose records can be told apart."""

import io
import time

import numpy as np
from PIL import Image

from refine_jax.data import records, writer


def pair(number: int, seed: int = 0):
    """(image, target, mask, reference or None, instruction) of record `number`."""
    rng = np.random.default_rng([seed, number])
    height, width = (int(v) for v in rng.integers(24, 90, 2))
    target = rng.integers(0, 256, (height, width, 3), np.uint8)
    x1, y1 = int(rng.integers(0, width - 12)), int(rng.integers(0, height - 12))
    x2, y2 = int(rng.integers(x1 + 4, width + 1)), int(rng.integers(y1 + 4, height + 1))
    mask = np.zeros((height, width), np.uint8)
    mask[y1:y2, x1:x2] = 255 * rng.integers(0, 2, (y2 - y1, x2 - x1), np.uint8)
    mask[y1, x1] = mask[y2 - 1, x2 - 1] = 255
    image = np.where(mask[..., None] > 0, rng.integers(0, 256, target.shape, np.uint8), target)
    reference = rng.integers(0, 256, (*rng.integers(16, 60, 2), 3), np.uint8) if number % 3 else None
    return image, target, mask, reference, f"Refine the thing {number}" + " at length" * (number % 4)


def make(number: int) -> records.Record:
    image, target, mask, reference, instruction = pair(number)
    return writer.make_record(
        image, target, mask, instruction, reference, kind="toy", source=f"noise {number}", licence="CC0"
    )


def slow(number: int) -> records.Record:
    time.sleep(0.05)
    return make(number)


def write(folder, count: int = 30, shards: int = 3) -> records.Dataset:
    return writer.write_dataset(folder, make, count, {"kind": "toy"}, shards=shards)


def damage(path, data: bytes) -> None:
    """Flip the bits of one byte in the middle of `data`, where it lies in the file `path`."""
    whole, middle = bytearray(path.read_bytes()), len(data) // 2
    whole[whole.index(data[middle : middle + 24])] ^= 0xFF  # a shard has a header every 64 KiB: not the whole of it
    path.write_bytes(whole)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))
