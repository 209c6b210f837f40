"""Tasks that need more than one look-up: variable chains, order statistics, call chains."""

from __future__ import annotations

import random

from shareprefill.calib.tasks import wording
from shareprefill.calib.tasks.example import Example
from shareprefill.calib.tasks.haystack import Haystack, hide
from shareprefill.calib.tasks.identifiers import distinct, random_digits, random_variable

CHAIN_LENGTH = 4
"""Variables of one assignment chain, the first of which holds the number."""

_TARGETS = {
    "largest": lambda numbers: numbers[-1],
    "second largest": lambda numbers: numbers[-2],
    "third largest": lambda numbers: numbers[-3],
    "smallest": lambda numbers: numbers[0],
    "second smallest": lambda numbers: numbers[1],
    "third smallest": lambda numbers: numbers[2],
    "median": lambda numbers: numbers[len(numbers) // 2],
}


class VariableTrackingDraft:
    """The number behind a chain of assignments scattered in real text (RULER VT)."""

    smallest = 0

    def __init__(self, rng: random.Random, length: int) -> None:
        chains = rng.choice((2, 3, 4))
        self._haystack = Haystack(rng)
        names = distinct(rng, chains * CHAIN_LENGTH, random_variable)
        values = distinct(rng, chains, lambda r: random_digits(r, 5))
        self._facts: list[tuple[float, str]] = []
        for chain, value in enumerate(values):
            own = names[chain * CHAIN_LENGTH : (chain + 1) * CHAIN_LENGTH]
            facts = chain_facts(own, value)
            depths = sorted(rng.random() for _ in own)
            self._facts += zip(depths, facts, strict=True)
        asked = rng.randrange(len(names))
        self._name = names[asked]
        self._value = values[asked // CHAIN_LENGTH]

    def render(self, size: int) -> Example:
        body = hide(self._haystack.words(size), self._facts)
        prompt = body + wording.variable_query(self._name)
        return Example("variable_tracking", prompt, self._value, (self._value,))


def chain_facts(names: list[str], value: str) -> list[str]:
    """The assignments of one chain: the first holds `value`, each other copies the one before."""
    copies = zip(names[1:], names[:-1], strict=True)
    return [wording.variable_root(names[0], value), *(wording.variable_copy(*c) for c in copies)]


class MathFindDraft:
    """An order statistic of a list of different numbers (InfiniteBench Math.Find)."""

    smallest = 2

    def __init__(self, rng: random.Random, length: int) -> None:
        self._target = rng.choice(tuple(_TARGETS))
        self._rng = rng
        self._numbers: dict[int, None] = {}

    def render(self, size: int) -> Example:
        count = 2 * size + 1  # odd, so that the median is a number of the list
        while len(self._numbers) < count:
            self._numbers[self._rng.randrange(1_000_000)] = None
        numbers = list(self._numbers)[:count]
        answer = str(_TARGETS[self._target](sorted(numbers)))
        prompt = wording.math_header(self._target) + str(numbers) + wording.math_query(self._target)
        return Example("math_find", prompt, f" {answer}", (answer,))


class CodeRunDraft:
    """The value of a call through a chain of small functions (InfiniteBench Code.Run)."""

    smallest = 0

    def __init__(self, rng: random.Random, length: int) -> None:
        depth = rng.randint(2, 5)
        self._chain = [f"func_{n}" for n in rng.sample(range(10_000), depth)]
        offsets = [_random_offset(rng) for _ in self._chain]
        callees = [*self._chain[1:], None]
        self._facts = [
            (rng.random(), wording.code_function(name, callee, offset))
            for name, callee, offset in zip(self._chain, callees, offsets, strict=True)
        ]
        argument = rng.randrange(1, 100)
        self._call = f"{self._chain[0]}({argument})"
        self._value = str(argument + sum(offsets))
        self._rng = rng
        # Numbers from 10 000 on: never a name of the asked chain.
        self._others: list[str] = []

    def render(self, size: int) -> Example:
        while len(self._others) < size:
            number = 10_000 + len(self._others)
            callee = None
            if self._others and self._rng.random() < 0.7:
                callee = f"func_{self._rng.randrange(10_000, number)}"
            offset = _random_offset(self._rng)
            self._others.append(wording.code_function(f"func_{number}", callee, offset))
        code = hide(self._others[:size], self._facts)
        prompt = wording.code_header(self._chain[0]) + code + wording.code_query(self._call)
        return Example("code_run", prompt, f" {self._value}", (self._value,))


def _random_offset(rng: random.Random) -> int:
    return rng.choice((1, -1)) * rng.randrange(1, 100)
