"""RULER's needle family: magic numbers hidden in real text, of several keys, values or queries."""

from __future__ import annotations

import random

from shareprefill.calib.tasks import wording
from shareprefill.calib.tasks.example import Example
from shareprefill.calib.tasks.haystack import Haystack, hide
from shareprefill.calib.tasks.identifiers import distinct, random_digits, random_needle_key

_NEEDLES = 4


class _NeedleFamilyDraft:
    """`keys` keys with `values` numbers each, of which `asked` keys are asked for."""

    smallest = 0
    task: str
    keys = 1
    values = 1
    asked = 1

    def __init__(self, rng: random.Random, length: int) -> None:
        self._haystack = Haystack(rng)
        keys = distinct(rng, self.keys, random_needle_key)
        values = distinct(rng, self.keys * self.values, lambda r: random_digits(r, 7))
        depths = [rng.random() for _ in values]
        chosen = sorted(rng.sample(range(self.keys), self.asked))
        owners = [keys[number // self.values] for number in range(len(values))]
        self._asked = [keys[number] for number in chosen]
        # In the order of the keys that are asked for; the numbers of one key as the text has them.
        self._answers = tuple(
            value
            for key in self._asked
            for _, owner, value in sorted(zip(depths, owners, values, strict=True))
            if owner == key
        )
        facts = (wording.needle_fact(*pair) for pair in zip(owners, values, strict=True))
        self._facts = list(zip(depths, facts, strict=True))

    def render(self, size: int) -> Example:
        body = hide(self._haystack.words(size), self._facts)
        if len(self._answers) == 1:
            query = wording.needle_query(self._asked[0])
        else:
            query = wording.needles_query(self._asked)
        prompt = wording.NEEDLE_HEADER + body + query
        return Example(self.task, prompt, ", ".join(self._answers), self._answers)


class SingleNeedleDraft(_NeedleFamilyDraft):
    """One number of one key (RULER niah_single)."""

    task = "niah_single"


class MultiKeyNeedleDraft(_NeedleFamilyDraft):
    """The number of one of four keys (RULER niah_multikey)."""

    task = "niah_multikey"
    keys = _NEEDLES


class MultiValueNeedleDraft(_NeedleFamilyDraft):
    """All four numbers of one key (RULER niah_multivalue)."""

    task = "niah_multivalue"
    values = _NEEDLES


class MultiQueryNeedleDraft(_NeedleFamilyDraft):
    """The numbers of four keys, all asked for (RULER niah_multiquery)."""

    task = "niah_multiquery"
    keys = _NEEDLES
    asked = _NEEDLES
