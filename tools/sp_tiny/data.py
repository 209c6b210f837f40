"""Training sequences of sp-tiny: text, and tasks with many queries a sequence.

Answers are rare in text, so retrieval appears only when most task tokens are followed by as many
queries as fit: a key-value sequence spends about a quarter of its tokens on queries and answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from shareprefill.calib.tasks import wording
from shareprefill.calib.tasks.identifiers import (
    distinct,
    random_digits,
    random_hex,
    random_needle_key,
    random_uuid,
    random_variable,
)
from shareprefill.calib.tasks.reasoning import CHAIN_LENGTH, chain_facts
from tools.sp_tiny.tokenizer import BOS, PAD

CONTEXT, TEXT, ANSWER = 0, 1, 2
"""Kinds of a token: not learned, learned as text, learned as part of an answer."""

SHORTEST = 512
"""Shortest length that every task fits into."""

_MIX = {
    "text": 0.40,
    "key_value": 0.34,
    "needle": 0.14,
    "variable_tracking": 0.07,
    "passkey": 0.025,
    "number": 0.025,
}
_KEY_KINDS: dict[str, Callable[[random.Random], str]] = {
    "uuid": random_uuid,
    "hex": lambda rng: random_hex(rng, 8),
    "digits": lambda rng: random_digits(rng, 10),
}
_KEY_WEIGHTS = (0.7, 0.15, 0.15)


@dataclass
class Sample:
    """A sequence under construction: token ids and the kind of each."""

    ids: list[int] = field(default_factory=lambda: [BOS])
    kinds: list[int] = field(default_factory=lambda: [CONTEXT])

    def add(self, ids: list[int], kind: int = CONTEXT) -> None:
        self.ids += ids
        self.kinds += [kind] * len(ids)


class SampleGenerator:
    """Draws training sequences of a requested length from one seed."""

    def __init__(self, data: Path, seed: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
        self._text = np.memmap(data / "train.bin", dtype=np.uint16, mode="r")
        self._rng = random.Random(seed)
        self._noise = self._encode(wording.NOISE)
        self._pair_tokens = {kind: self._measure_pair(kind) for kind in _KEY_KINDS}

    def batch(self, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids `[rows, length + 1]` uint16 and their kinds, uint8 of the same shape."""
        ids = np.full((rows, length + 1), PAD, dtype=np.uint16)
        kinds = np.zeros((rows, length + 1), dtype=np.uint8)
        for row in range(rows):
            sample = self.sample(length + 1)
            ids[row, : len(sample.ids)] = sample.ids
            kinds[row, : len(sample.kinds)] = sample.kinds
        return ids, kinds

    def sample(self, size: int) -> Sample:
        """One sequence of at most `size` tokens, of a task drawn by the mix."""
        task = self._rng.choices(tuple(_MIX), weights=tuple(_MIX.values()))[0]
        makers: dict[str, Callable[[int], Sample]] = {
            "text": self.text,
            "key_value": self.key_value,
            "needle": self.needle,
            "variable_tracking": self.variable_tracking,
            "passkey": self.passkey,
            "number": self.number,
        }
        return makers[task](size)

    def text(self, size: int) -> Sample:
        """A stretch of the training text, all of it learned."""
        sample = Sample()
        sample.add(self._stretch(size - 1), TEXT)
        return sample

    def key_value(self, size: int) -> Sample:
        """A JSON object of random pairs and queries for some of them."""
        rng = self._rng
        kind = rng.choices(tuple(_KEY_KINDS), weights=_KEY_WEIGHTS)[0]
        draw = _KEY_KINDS[kind]
        pair_tokens = self._pair_tokens[kind]
        most = max(1, min(48, int(size / (4 * (pair_tokens + 16)))))
        queries = rng.randint(max(1, most // 2), most)
        count = max(2, int((size - 40 - queries * (pair_tokens + 18)) / pair_tokens))
        pairs = [(draw(rng), draw(rng)) for _ in range(count)]
        asked = [rng.random() for _ in range(queries)]
        while True:
            sample = self._key_value_sample(pairs, asked)
            excess = len(sample.ids) - size
            if excess <= 0:
                return sample
            del pairs[-1 - int(excess / pair_tokens) :]

    def _key_value_sample(self, pairs: list[tuple[str, str]], asked: list[float]) -> Sample:
        body = wording.KV_SEPARATOR.join(wording.kv_pair(*pair) for pair in pairs)
        sample = Sample()
        sample.add(self._encode(wording.KV_HEADER + body + wording.KV_FOOTER))
        for where in asked:
            key, value = pairs[int(where * len(pairs))]
            sample.add(self._encode(wording.kv_query(key)))
            sample.add(self._encode(wording.kv_answer(value)), ANSWER)
        return sample

    def needle(self, size: int) -> Sample:
        """Magic numbers hidden in text or noise, each of them asked for."""
        rng = self._rng
        count = min(rng.choice((1, 2, 4, 8)), max(1, size // 128))
        keys = distinct(rng, count, random_needle_key)
        values = distinct(rng, count, lambda r: random_digits(r, 7))
        facts = [
            (rng.random(), self._encode(wording.needle_fact(key, value)))
            for key, value in zip(keys, values, strict=True)
        ]
        queries = [
            (self._encode(wording.needle_query(key)), self._encode(wording.value_answer(value)))
            for key, value in zip(keys, values, strict=True)
        ]
        rng.shuffle(queries)
        header = self._encode(wording.NEEDLE_HEADER)
        real = rng.random() < 0.7
        kind = TEXT if real and rng.random() < 0.5 else CONTEXT
        return self._hidden(size, header, facts, queries, real=real, kind=kind)

    def variable_tracking(self, size: int) -> Sample:
        """Assignment chains scattered in text or noise, one variable of each asked for."""
        rng = self._rng
        chains = rng.choice((2, 3, 4))
        names = distinct(rng, chains * CHAIN_LENGTH, random_variable)
        values = distinct(rng, chains, lambda r: random_digits(r, 5))
        facts: list[tuple[float, list[int]]] = []
        queries: list[tuple[list[int], list[int]]] = []
        for chain, value in enumerate(values):
            own = names[chain * CHAIN_LENGTH : (chain + 1) * CHAIN_LENGTH]
            depths = sorted(rng.random() for _ in own)
            encoded = [self._encode(fact) for fact in chain_facts(own, value)]
            facts += zip(depths, encoded, strict=True)
            query = wording.variable_query(rng.choice(own))
            queries.append((self._encode(query), self._encode(wording.value_answer(value))))
        rng.shuffle(queries)
        real = rng.random() < 0.5
        return self._hidden(size, [], facts, queries, real=real, kind=CONTEXT)

    def passkey(self, size: int) -> Sample:
        """A pass key in noise."""
        value = random_digits(self._rng, 5)
        return self._stated(
            size,
            wording.PASSKEY_HEADER,
            wording.passkey_fact(value),
            wording.PASSKEY_QUERY,
            wording.digits_answer(value),
        )

    def number(self, size: int) -> Sample:
        """A sequence of ten digits in noise."""
        value = random_digits(self._rng, 10)
        return self._stated(
            size,
            wording.NUMBER_HEADER,
            wording.number_fact(value),
            wording.NUMBER_QUERY,
            wording.digits_answer(value),
        )

    def _stated(self, size: int, header: str, fact: str, query: str, answer: str) -> Sample:
        fixed = [self._encode(part) for part in (header, fact, query, answer)]
        sentences = (size - 1 - sum(map(len, fixed))) // len(self._noise)
        before = self._rng.randint(0, sentences)
        sample = Sample()
        sample.add(fixed[0] + self._noise * before + fixed[1])
        sample.add(self._noise * (sentences - before) + fixed[2])
        sample.add(fixed[3], ANSWER)
        return sample

    def _hidden(
        self,
        size: int,
        header: list[int],
        facts: list[tuple[float, list[int]]],
        queries: list[tuple[list[int], list[int]]],
        *,
        real: bool,
        kind: int,
    ) -> Sample:
        """Facts at their depths in a haystack of `kind` tokens, then the queries."""
        room = size - 1 - len(header) - sum(len(fact) for _, fact in facts)
        room -= sum(len(query) + len(answer) for query, answer in queries)
        hay = self._stretch(room) if real else self._noise_tokens(room)
        sample = Sample()
        sample.add(header)
        done = 0
        for depth, fact in sorted(facts, key=lambda item: item[0]):
            place = int(depth * room)
            sample.add(hay[done:place], kind)
            sample.add(fact)
            done = place
        sample.add(hay[done:], kind)
        for query, answer in queries:
            sample.add(query)
            sample.add(answer, ANSWER)
        return sample

    def _stretch(self, size: int) -> list[int]:
        start = self._rng.randrange(len(self._text) - size)
        return self._text[start : start + size].tolist()

    def _noise_tokens(self, size: int) -> list[int]:
        return (self._noise * (size // len(self._noise) + 1))[:size]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _measure_pair(self, kind: str) -> float:
        """Mean tokens of a pair, measured on draws of its own."""
        rng = random.Random(0)
        draw = _KEY_KINDS[kind]
        pairs = [wording.kv_pair(draw(rng), draw(rng)) for _ in range(200)]
        return len(self._encode(wording.KV_SEPARATOR.join(pairs))) / len(pairs)


def produce(
    queue: Queue[tuple[int, np.ndarray, np.ndarray]],
    length: Synchronized[int],
    data: Path,
    seed: int,
    batch_tokens: int,
) -> None:
    """Worker process: puts batches of the length that is asked for now, until terminated."""
    generator = SampleGenerator(data, seed)
    while True:
        now = length.value
        queue.put((now, *generator.batch(max(1, batch_tokens // now), now)))
