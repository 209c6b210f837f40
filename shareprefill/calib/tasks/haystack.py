"""The held-out documentation text that needles are hidden in, cut at word boundaries."""

from __future__ import annotations

import gzip
import random
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources

from shareprefill.calib.tasks.example import Example


@lru_cache(maxsize=1)
def held_out_text() -> str:
    """The shipped excerpt of the Python documentation, which sp-tiny never saw in training."""
    asset = resources.files("shareprefill") / "assets" / "text" / "python-docs.txt.gz"
    return gzip.decompress(asset.read_bytes()).decode("utf-8")


@lru_cache(maxsize=1)
def _words() -> tuple[str, ...]:
    """Words of the text, each with the white space behind it."""
    return tuple(re.findall(r"\S+\s*", held_out_text()))


class Haystack:
    """A stretch of the text from a random word on; beyond its end it goes on at its start."""

    def __init__(self, rng: random.Random) -> None:
        self._start = rng.randrange(len(_words()))

    def words(self, size: int) -> list[str]:
        words = _words()
        return [words[(self._start + i) % len(words)] for i in range(size)]


def hide(pieces: Sequence[str], facts: Sequence[tuple[float, str]]) -> str:
    """Joins `pieces` with every fact put in at its depth (0 before all pieces, 1 after all).

    Facts of the same place keep the order in which they are given.
    """
    parts: list[str] = []
    done = 0
    for depth, fact in sorted(facts, key=lambda item: item[0]):
        place = int(depth * len(pieces))
        parts += pieces[done:place]
        parts.append(fact)
        done = place
    return "".join([*parts, *pieces[done:]])


class TextDraft:
    """Plain documentation of a given number of words; it asks nothing."""

    smallest = 1

    def __init__(self, rng: random.Random, length: int) -> None:
        self._haystack = Haystack(rng)

    def render(self, size: int) -> Example:
        return Example("text", "".join(self._haystack.words(size)), "", ())
