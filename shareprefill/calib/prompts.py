"""Calibration prompts: generated tasks, local files, and data sets of the hub, as token ids."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shareprefill.calib.tasks import TASKS, generate
from shareprefill.config import CalibrateConfig
from shareprefill.errors import ConfigError, DataError

MIXTURE = "mixture"
TEXT = "text"
HUB = "hub:"
FILE_TYPES = (".jsonl", ".json", ".txt")

# Columns that hold a prompt, by preference: ours and RULER's, InfiniteBench's, LongBench's.
_COLUMNS = ("prompt", "input", "text", "content", "context")
_CONTEXT_FIRST = ("context", "input")
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
    sources = [_open(data, config, tokenizer) for data in config.data]
    prompts = []
    for number in range(config.samples):
        index = number % len(sources)
        prompt = next(sources[index], None)
        if prompt is None:
            raise DataError(
                f"{config.data[index]} has only {number // len(sources)} usable prompts of at "
                f"least {_least(config)} tokens, {config.samples} samples are wanted in all; lower "
                "--samples or add --data"
            )
        prompts.append(prompt)
    return prompts


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
    path = Path(data)
    if not path.exists():
        raise ConfigError(
            f"data set {data!r} is not known: give one of {', '.join((*TASKS, TEXT, MIXTURE))}, "
            "a .jsonl, .json or .txt file, a folder of them, or hub:<dataset>:<config>:<split>"
        )
    return _from_files(path, config, tokenizer)


def _generated(tasks: tuple[str, ...], config: CalibrateConfig, tokenizer: Any) -> Iterator[Prompt]:
    number = 0
    while True:
        task = tasks[number % len(tasks)]
        # A seed of its own for every prompt: one more sample leaves the others as they are.
        seed = config.seed * 1_000_003 + number
        example = generate(task, tokenizer, config.length, seed)
        yield Prompt(task, _encode(example.prompt, tokenizer))
        number += 1


def _from_files(path: Path, config: CalibrateConfig, tokenizer: Any) -> Iterator[Prompt]:
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in FILE_TYPES and p.is_file())
    if not files or any(p.suffix not in FILE_TYPES for p in files):
        raise DataError(f"{path} holds no .jsonl, .json or .txt file; give one of these")
    texts = [text for file in files for text in _file_texts(file, config)]
    random.Random(config.seed).shuffle(texts)
    return _from_texts(str(path), iter(texts), config, tokenizer)


def _from_texts(
    source: str, texts: Iterator[str], config: CalibrateConfig, tokenizer: Any
) -> Iterator[Prompt]:
    for text in texts:
        ids = _encode(text, tokenizer)
        if len(ids) > config.length:
            # The instruction stands at the beginning, the question at the end: cut the middle.
            head = config.length // 2
            ids = torch.cat([ids[:head], ids[len(ids) - (config.length - head) :]])
        if len(ids) >= _least(config):
            yield Prompt(source, ids)


def _file_texts(file: Path, config: CalibrateConfig) -> list[str]:
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text: {error}") from error
    if file.suffix == ".txt":
        return list(_pieces(content, config))
    try:
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in content.splitlines() if line.strip()]
        else:
            rows = json.loads(content)
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON: {error}") from error
    if isinstance(rows, dict):
        rows = rows.get("data", [rows])
    if not isinstance(rows, list):
        raise DataError(f"{file} must hold a list of rows, got a {type(rows).__name__}")
    texts = [text for row in rows if (text := _row_text(row)) is not None]
    if not texts:
        raise DataError(
            f"{file} has no usable rows: a row is a string, or an object with one of the fields "
            f"{', '.join(_COLUMNS)}"
        )
    return texts


def _pieces(content: str, config: CalibrateConfig) -> Iterator[str]:
    """A long text in pieces of about `config.length` tokens, at four characters a token."""
    size = config.length * 4
    for start in range(0, len(content), size):
        yield content[start : start + size]


def _row_text(row: Any) -> str | None:
    if isinstance(row, str):
        return row or None
    if not isinstance(row, Mapping):
        return None
    parts = [row.get(name) for name in _CONTEXT_FIRST]
    if all(isinstance(part, str) and part for part in parts):
        return "\n\n".join(str(part) for part in parts)
    for name in _COLUMNS:
        if isinstance(row.get(name), str) and row[name]:
            return row[name]
    return None


def _hub_texts(address: str, config: CalibrateConfig) -> Iterator[str]:
    parts = address.removeprefix(HUB).split(":")
    if len(parts) != 3 or not parts[0] or not parts[2]:
        raise ConfigError(
            f"{address!r} is no hub address: write hub:<dataset>:<config>:<split>, with an empty "
            "config for the default one"
        )
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, subset, split = parts
    try:
        rows = load_dataset(name, subset or None, split=split, streaming=True)
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(f"{address} cannot be opened: {_first_line(error)}") from error
    for row in islice(rows, config.samples * _HUB_ROWS_PER_SAMPLE):
        if (text := _row_text(row)) is not None:
            yield text


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _encode(text: str, tokenizer: Any) -> Tensor:
    return torch.tensor(tokenizer(text).input_ids, dtype=torch.int64)
