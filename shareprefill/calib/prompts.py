"""Calibration prompts: generated tasks, local files, and data sets of the hub, as token ids."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from shareprefill.calib.tasks import TASKS, generate
from shareprefill.config import DATA_SETS, CalibrateConfig
from shareprefill.data.sources import (
    HUB,
    TEXT_FIELDS,
    TEXT_FILES,
    Span,
    read_rows,
    reread,
    row_text,
)
from shareprefill.errors import ConfigError, DataError, did_you_mean
from shareprefill.files import kind_of, printable
from shareprefill.plain_tables import prompt_count
from shareprefill.tokens import Messages, encode, encode_either

MIXTURE = "mixture"
TEXT = "text"

# Rows of a hub data set that are looked at for one prompt before it is given up as too short.
_HUB_ROWS_PER_SAMPLE = 100


@dataclass(frozen=True)
class Prompt:
    """One calibration prompt.

    Attributes:
        source: The data set, file or address it comes from; for `mixture`, the task.
        input_ids: int64 `[N]`.
    """

    source: str
    input_ids: Tensor

    @property
    def digest(self) -> str:
        """SHA-256 of the token ids: tells whether the data changed between two runs."""
        return hashlib.sha256(self.input_ids.numpy().tobytes()).hexdigest()


def make_prompts(config: CalibrateConfig, tokenizer: Any) -> list[Prompt]:
    """The prompts of a configuration, always the same for the same data, tokenizer and seed.

    Args:
        config: Data sets, number, length and seed.
        tokenizer: The model's tokenizer.

    Returns:
        `config.samples` prompts that alternate between the data sets.

    Raises:
        ConfigError: a data set's name is unknown.
        DataError: a file is missing or has too few usable rows.
    """
    check_data(config)
    sources = [_open(data, config, tokenizer) for data in config.data]
    prompts = []
    for number in range(config.samples):
        index = number % len(sources)
        prompt = next(sources[index], None)
        if prompt is None:
            raise DataError(
                f"{config.data[index]} has only {prompt_count(number // len(sources))} of at least "
                f"{_least(config)} tokens, {config.samples} samples are wanted in all; lower "
                "--samples or add --data"
            )
        prompts.append(prompt)
    return prompts


def check_data(config: CalibrateConfig) -> None:
    """Checks that all data sets are known and all files there, before a model is loaded for them.

    Raises:
        ConfigError: a name is unknown.
        DataError: a file is missing.
    """
    for data in config.data:
        if data in DATA_SETS or data.startswith(HUB) or kind_of(data) is not None:
            continue
        if "/" in data or data.lower().endswith(TEXT_FILES):
            raise DataError(f"{printable(data)} does not exist: name a file or a folder of them")
        raise ConfigError(
            f"data set {printable(data)!r} is not known: give one of "
            f"{', '.join(DATA_SETS)}, a .jsonl, .json or .txt file, a folder of them, or "
            f"hub:<dataset>:<config>:<split>{did_you_mean(data, DATA_SETS)}"
        )


def _least(config: CalibrateConfig) -> int:
    """Tokens under which a row of a file is left out: its map would have fewer than four blocks."""
    return 4 * config.block_size


def _open(data: str, config: CalibrateConfig, tokenizer: Any) -> Iterator[Prompt]:
    if data == MIXTURE:
        return _generated((*TASKS, TEXT), config, tokenizer)
    if data in TASKS or data == TEXT:
        return _generated((data,), config, tokenizer)
    if data.startswith(HUB):
        return _from_texts(data, _hub_texts(data, config), config, tokenizer)
    return _from_files(data, config, tokenizer)


def _generated(tasks: tuple[str, ...], config: CalibrateConfig, tokenizer: Any) -> Iterator[Prompt]:
    number = 0
    while True:
        task = tasks[number % len(tasks)]
        # A seed of its own for every prompt: one more sample leaves the others as they are.
        seed = config.seed * 1_000_003 + number
        example = generate(task, tokenizer, config.length, seed)
        yield Prompt(task, encode(tokenizer, example.prompt))
        number += 1


def _from_files(address: str, config: CalibrateConfig, tokenizer: Any) -> Iterator[Prompt]:
    # Every row is read once, so that a damaged one is known now; the places alone are kept.
    places: list[Span | str | Messages] = []
    usable: dict[str, bool] = {}
    # A long text is several prompts of about the length, at four characters a token.
    for row in read_rows(address, TEXT_FILES, text_size=4 * config.length):
        text = row_text(row.values, row.place)
        usable[row.source] = text is not None or usable.get(row.source, False)
        if text is not None:
            places.append(row.span or text)
    for source in (source for source, is_usable in usable.items() if not is_usable):
        raise DataError(
            f"{source} has no usable rows: a row is a string, or an object with one of the fields "
            f"{', '.join(TEXT_FIELDS)}"
        )
    random.Random(config.seed).shuffle(places)
    texts = (
        row_text(reread(place), address) if isinstance(place, Span) else place for place in places
    )
    return _from_texts(address, texts, config, tokenizer)


def _from_texts(
    source: str, texts: Iterator[str | Messages | None], config: CalibrateConfig, tokenizer: Any
) -> Iterator[Prompt]:
    for text in texts:
        if text is None:
            continue
        ids = encode_either(tokenizer, text)
        if len(ids) > config.length:
            # The instruction stands at the beginning, the question at the end: cut the middle.
            head = config.length // 2
            ids = torch.cat([ids[:head], ids[len(ids) - (config.length - head) :]])
        if len(ids) >= _least(config):
            yield Prompt(source, ids)


def _hub_texts(address: str, config: CalibrateConfig) -> Iterator[str | Messages | None]:
    for row in islice(read_rows(address), config.samples * _HUB_ROWS_PER_SAMPLE):
        yield row_text(row.values, row.place)
