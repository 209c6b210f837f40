"""Retrieval: a pair of a JSON object, a pass key or digits in noise, needles in real text."""

from __future__ import annotations

import random

from shareprefill.calib.tasks import wording
from shareprefill.calib.tasks.example import Example
from shareprefill.calib.tasks.haystack import Haystack, hide
from shareprefill.calib.tasks.identifiers import (
    distinct,
    random_digits,
    random_needle_key,
    random_uuid,
)


class KeyValueDraft:
    """One value of a JSON object of UUIDs (InfiniteBench Retrieve.KV)."""

    smallest = 2

    def __init__(self, rng: random.Random, length: int) -> None:
        self._depth = rng.random()
        self._rng = rng
        self._pairs: list[tuple[str, str]] = []

    def render(self, size: int) -> Example:
        while len(self._pairs) < size:
            self._pairs.append((random_uuid(self._rng), random_uuid(self._rng)))
        pairs = self._pairs[:size]
        key, value = pairs[int(self._depth * size)]
        body = wording.KV_SEPARATOR.join(wording.kv_pair(*pair) for pair in pairs)
        prompt = wording.KV_HEADER + body + wording.KV_FOOTER + wording.kv_query(key)
        return Example("retr_kv", prompt, value, (value,))


class _NoiseDraft:
    """Digits stated once between repeated sentences."""

    smallest = 1
    task: str
    digits: int

    def __init__(self, rng: random.Random, length: int) -> None:
        self._depth = rng.random()
        self._value = random_digits(rng, self.digits)

    def _wording(self, value: str) -> tuple[str, str, str]:
        """Header, fact and query."""
        raise NotImplementedError

    def render(self, size: int) -> Example:
        header, fact, query = self._wording(self._value)
        prompt = header + hide([wording.NOISE] * size, [(self._depth, fact)]) + query
        return Example(self.task, prompt, f" {self._value}", (self._value,))


class PasskeyDraft(_NoiseDraft):
    """A pass key of five digits (InfiniteBench Retrieve.PassKey)."""

    task = "retr_passkey"
    digits = 5

    def _wording(self, value: str) -> tuple[str, str, str]:
        return wording.PASSKEY_HEADER, wording.passkey_fact(value), wording.PASSKEY_QUERY


class NumberDraft(_NoiseDraft):
    """A sequence of ten digits (InfiniteBench Retrieve.Number)."""

    task = "retr_number"
    digits = 10

    def _wording(self, value: str) -> tuple[str, str, str]:
        return wording.NUMBER_HEADER, wording.number_fact(value), wording.NUMBER_QUERY


class NeedleDraft:
    """One of one to eight magic numbers hidden in real text (RULER single- and multi-key NIAH)."""

    smallest = 0

    def __init__(self, rng: random.Random, length: int) -> None:
        # Eight needles take about 250 tokens: short prompts get fewer.
        count = min(rng.choice((1, 2, 4, 8)), max(1, length // 128))
        self._haystack = Haystack(rng)
        self._keys = distinct(rng, count, random_needle_key)
        self._values = distinct(rng, count, lambda r: random_digits(r, 7))
        self._depths = [rng.random() for _ in range(count)]
        self._asked = rng.randrange(count)

    def render(self, size: int) -> Example:
        facts = [wording.needle_fact(*pair) for pair in zip(self._keys, self._values, strict=True)]
        body = hide(self._haystack.words(size), list(zip(self._depths, facts, strict=True)))
        prompt = wording.NEEDLE_HEADER + body + wording.needle_query(self._keys[self._asked])
        value = self._values[self._asked]
        return Example("needle", prompt, value, (value,))
