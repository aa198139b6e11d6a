"""What is set into a photograph: words, numbers, letter strings in a face, or a logo, and how it is asked for."""

import functools
import string
from dataclasses import dataclass, replace

import numpy as np

from refine_jax.data import assets

Rng = np.random.Generator
Size = tuple[int, int]  # (height, width)

_LETTERS = {(32, 96): (3, 6), (32, 128): (5, 9), (64, 64): (2, 3)}
_LOGO_SHARE = {(32, 96): 0.05, (32, 128): 0.0, (64, 64): 0.55}


@dataclass(frozen=True)
class Content:
    """What is drawn: lines of text in a face, or a logo (`logo` set, `lines` its title)."""

    lines: tuple[str, ...]
    face: assets.Face | None = None
    logo: assets.Logo | None = None

    @property
    def word(self) -> str:
        return " ".join(self.lines)


@functools.cache
def _by_length(split: str) -> dict[int, tuple[str, ...]]:
    words = assets.words(split)
    return {n: tuple(word for word in words if len(word) == n) for n in range(2, 10)}


def _letters(rng: Rng, alphabet: str, count: int) -> str:
    return "".join(alphabet[i] for i in rng.integers(0, len(alphabet), count))


def _number(rng: Rng, count: int) -> str:
    kind = rng.integers(5)
    digits = _letters(rng, string.digits, count)
    if kind == 0 and count >= 4:
        return f"${digits[:-3]}.{digits[-2:]}"
    if kind == 1 and count >= 3:
        return f"{digits[:-1]}%"
    if kind == 2 and count >= 4:
        return f"{rng.integers(24)}:{rng.integers(60):02d}"
    if kind == 3:
        half = max(1, count // 2)
        return _letters(rng, string.ascii_uppercase, half) + digits[half:]
    return digits


def _syllables(rng: Rng, count: int) -> str:
    vowels, consonants = "aeiou", "bcdfghjklmnprstvwz"
    first = rng.integers(2)
    return "".join(_letters(rng, vowels if (i + first) % 2 else consonants, 1) for i in range(count))


def _word(rng: Rng, split: str, shortest: int, longest: int) -> str:
    count = int(rng.integers(shortest, longest + 1))
    kind = rng.random()
    if kind < 0.62:
        words = _by_length(split)[count]
        return words[rng.integers(len(words))]
    if kind < 0.77:
        return _syllables(rng, count)
    if kind < 0.87:
        return _letters(rng, string.ascii_lowercase, count)
    return _number(rng, count)


@functools.cache
def _families(split: str) -> tuple[tuple[tuple[assets.Face, ...], ...], np.ndarray]:
    families: dict[str, list[assets.Face]] = {}
    for face in assets.faces(split):
        families.setdefault(face.family, []).append(face)
    # Between uniform over families (too much of the single-face ones) and uniform over faces.
    share = np.sqrt([len(faces) for faces in families.values()])
    return tuple(map(tuple, families.values())), share / share.sum()


def _text(rng: Rng, split: str, bucket: Size) -> Content:
    families, share = _families(split)
    family = families[rng.choice(len(families), p=share)]
    face = family[rng.integers(len(family))]
    shortest, longest = _LETTERS.get(bucket, (3, 6))
    if bucket[0] == bucket[1] and rng.random() < 0.6:
        lines = tuple(_word(rng, split, 3, 6) for _ in range(2 if rng.random() < 0.8 else 3))
    else:
        lines = (_word(rng, split, shortest, longest),)
    case = rng.random()
    if case < 0.5 or face.family == "AmaticSC":  # its lower case is drawn as capitals
        lines = tuple(line.upper() for line in lines)
    elif case < 0.8:
        lines = tuple(line.capitalize() for line in lines)
    return Content(lines, face=face)


def choose(rng: Rng, split: str, bucket: Size) -> Content:
    if rng.random() >= _LOGO_SHARE.get(bucket, 0.2):
        return _text(rng, split, bucket)
    logos = assets.logos(split)
    logo = logos[rng.integers(len(logos))]
    return Content((logo.title,), logo=logo)


def other(rng: Rng, split: str, content: Content) -> Content:
    """The same thing with wrong glyphs: letters replaced or shuffled, or another logo."""
    if content.logo:
        logos = assets.logos(split)
        return replace(content, logo=logos[rng.integers(len(logos))])

    def garble(line: str) -> str:
        letters = list(line)
        if len(letters) > 3 and rng.random() < 0.25:
            letters = [letters[i] for i in rng.permutation(len(letters))]
        keep = rng.uniform(0.0, 0.6)
        for i, letter in enumerate(letters):
            if rng.random() >= keep:
                alphabet = next(
                    (a for a in (string.ascii_uppercase, string.ascii_lowercase, string.digits) if letter in a), "#-+=:"
                )
                letters[i] = _letters(rng, alphabet, 1)
        changed = "".join(letters)
        return changed if changed != line else line[1:] + ("X" if line[0].isupper() else "x")

    return replace(content, lines=tuple(garble(line) for line in content.lines))


_TEXT_PROMPTS = ("Fix the word '{}'", "Repair the text '{}'", "Restore the word '{}'", "Make the text '{}' readable")
_LOGO_PROMPTS = ("Fix the logo '{}'", "Repair the logo '{}'", "Restore the '{}' logo")


def instruction(rng: Rng, content: Content) -> str:
    usual, others = ("Refine the logo '{}'", _LOGO_PROMPTS) if content.logo else ("Refine the text '{}'", _TEXT_PROMPTS)
    template = usual if rng.random() < 0.82 else others[rng.integers(len(others))]
    return template.format(content.word)
