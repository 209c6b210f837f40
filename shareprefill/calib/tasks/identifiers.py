"""Random names, keys and numbers; the draws are stable across processes and Python versions."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

from shareprefill.calib.tasks.wording import NEEDLE_WORDS


def random_uuid(rng: random.Random) -> str:
    digits = f"{rng.getrandbits(128):032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def random_hex(rng: random.Random, digits: int) -> str:
    return f"{rng.getrandbits(4 * digits):0{digits}x}"


def random_digits(rng: random.Random, digits: int) -> str:
    """A number of exactly `digits` digits, the first of them not zero."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def random_needle_key(rng: random.Random) -> str:
    return f"{rng.choice(NEEDLE_WORDS)}-{rng.randrange(1000)}"


def random_variable(rng: random.Random) -> str:
    return "".join(rng.choice(string.ascii_uppercase) for _ in range(5))


def distinct(rng: random.Random, count: int, draw: Callable[[random.Random], str]) -> list[str]:
    """`count` different values of `draw`, in the order of their first appearance."""
    values: dict[str, None] = {}
    while len(values) < count:
        values[draw(rng)] = None
    return list(values)
