"""Rows and texts of local files, folders, and data sets of the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shareprefill.errors import ConfigError, DataError
from shareprefill.files import printable

HUB = "hub:"
_ROW_FILES = (".jsonl", ".json")
_TEXT_FILES = (*_ROW_FILES, ".txt")


@dataclass(frozen=True)
class Row:
    """One row of a data set.

    Attributes:
        values: Its fields.
        place: File and number, for messages.
        names: What the data set is called, the closest name first: of the file, its folder, or the
            hub data set's configuration and split.
    """

    values: Mapping[str, Any]
    place: str
    names: tuple[str, ...]


def read_rows(address: str) -> Iterator[Row]:
    """The rows of a .jsonl or .json file, a folder of them, or `hub:<dataset>:<config>:<split>`.

    Raises:
        ConfigError: the address is no such thing.
        DataError: it cannot be read, or a row is no object.
    """
    if address.startswith(HUB):
        yield from _hub_rows(address)
        return
    for file in _files(Path(address), _ROW_FILES):
        names = (file.stem, file.parent.name)
        for number, values in enumerate(_parse(file)):
            yield _row(values, f"row {number} of {file}", names)


def read_texts(address: str) -> Iterator[str]:
    """The texts of .txt files, and the field `text` (or `content`, `context`) of rows.

    Raises:
        ConfigError: the address is no file, folder or hub address.
        DataError: it cannot be read, or a row has no text.
    """
    if address.startswith(HUB):
        yield from (_text(row) for row in _hub_rows(address))
        return
    for file in _files(Path(address), _TEXT_FILES):
        if file.suffix == ".txt":
            yield _read(file)
        else:
            for number, values in enumerate(_parse(file)):
                yield _text(_row(values, f"row {number} of {file}", ()))


def _files(path: Path, types: tuple[str, ...]) -> list[Path]:
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in types and p.is_file())
    if not files or any(file.suffix not in types for file in files):
        raise ConfigError(
            f"{printable(path)} holds no {' or '.join(types)} file: name one of these"
        )
    return files


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{printable(file)} cannot be read as UTF-8 text: {error}") from error


def _parse(file: Path) -> list[Any]:
    content = _read(file)
    try:
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in content.splitlines() if line.strip()]
        rows = json.loads(content)
    except ValueError as error:
        raise DataError(f"{printable(file)} is not valid JSON: {error}") from error
    if isinstance(rows, dict):
        rows = rows.get("data", [rows])
    if not isinstance(rows, list):
        raise DataError(f"{printable(file)} must hold a list of rows")
    return rows


def _hub_rows(address: str) -> Iterator[Row]:
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
        for number, values in enumerate(rows):
            yield _row(values, f"row {number} of {address}", (split, subset, name.split("/")[-1]))
    except (DatasetsError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{address} cannot be read: {printable(reason)}") from error


def _row(values: Any, place: str, names: tuple[str, ...]) -> Row:
    if not isinstance(values, Mapping):
        raise DataError(f"{place} must be an object, got {type(values).__name__}")
    return Row(values, place, names)


def _text(row: Row) -> str:
    for name in ("text", "content", "context"):
        if isinstance(row.values.get(name), str):
            return row.values[name]
    raise DataError(f"{row.place} has no field text, content or context")
