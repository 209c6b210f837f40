"""Rows of data sets: .jsonl, .json and .txt files, folders of them, and data sets of the hub.

Files are read piece by piece: whoever takes two rows of a large file holds two rows. A .json file
whose rows stand inside an object (`{"data": [...]}`) is the exception.
"""

from __future__ import annotations

import codecs
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shareprefill.errors import ConfigError, DataError
from shareprefill.files import kind_of, printable
from shareprefill.tokens import Messages, conversation

HUB = "hub:"
ROW_FILES = (".jsonl", ".json")
TEXT_FILES = (*ROW_FILES, ".txt")
# Fields that hold a text, by preference: ours and RULER's, InfiniteBench's, LongBench's.
_PLAIN_FIELDS = ("prompt", "input", "text", "content", "context")
TEXT_FIELDS = ("messages", *_PLAIN_FIELDS)
"""Fields of a row that are looked for a text."""

_BLOCK = 1 << 20  # bytes
_SPACE = re.compile(r"[\s\ufeff]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# Control characters inside strings are taken as they are: the line ends of some are among them.
_DECODER = json.JSONDecoder(strict=False)


@dataclass(frozen=True)
class Span:
    """Where a row stands in its file: `size` bytes from byte `start` on."""

    file: Path
    start: int
    size: int


@dataclass(frozen=True)
class Row:
    """One row of a data set.

    Attributes:
        values: Its fields, or whatever else stands there; of a .txt file, a text.
        source: File or hub address, for messages.
        number: Of the row there, from 0 on.
        names: What the data set is called, the closest name first: of the file, its folder, or the
            hub data set's configuration and split.
        span: Where `reread` finds it; None where only the whole file can be read.
    """

    values: Any
    source: str
    number: int
    names: tuple[str, ...]
    span: Span | None = None

    @property
    def place(self) -> str:
        """Source and number, for messages."""
        return f"row {self.number} of {self.source}"


def read_rows(
    address: str, types: tuple[str, ...] = ROW_FILES, *, text_size: int = 1 << 22
) -> Iterator[Row]:
    """The rows of a file, of the files of a folder in the order of their names, or of the hub.

    Args:
        address: A file, a folder, or `hub:<dataset>:<config>:<split>`.
        types: Endings of the files that are read.
        text_size: Characters of a .txt file that make one row, at most.

    Raises:
        ConfigError: the address is no such thing.
        DataError: it cannot be read, or is no JSON; the message names the row.
    """
    if address.startswith(HUB):
        yield from _hub_rows(address)
        return
    for file in _files(Path(address), types):
        names = (file.stem, file.parent.name)
        number = 0
        try:
            for values, span in _values_of(file, text_size):
                yield Row(values, printable(file), number, names, span)
                number += 1
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(f"{printable(file)} cannot be read: {reason}") from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{printable(file)} cannot be read as UTF-8 text (row {number}: {error.reason}): "
                "save it as UTF-8"
            ) from error
        except RecursionError as error:
            raise DataError(
                f"row {number} of {printable(file)} is nested too deeply to be read"
            ) from error
        except ValueError as error:
            raise DataError(
                f"row {number} of {printable(file)} is not valid JSON: {_reason(error)}"
            ) from error


def read_objects(address: str) -> Iterator[Row]:
    """`read_rows` of which every row is an object.

    Raises:
        ConfigError, DataError: as for `read_rows`; a row is no object.
    """
    for row in read_rows(address):
        yield _require_object(row)


def read_texts(address: str, text_size: int = 1 << 22) -> Iterator[str | Messages]:
    """The texts of .txt files and of rows, as `row_text` finds them.

    Empty rows, and rows whose text is empty or null, are left out.

    Args:
        address: As for `read_rows`.
        text_size: A longer .txt file is several texts of so many characters.

    Raises:
        ConfigError, DataError: as for `read_rows`; a row has no such field.
    """
    for row in read_rows(address, TEXT_FILES, text_size=text_size):
        text = row_text(row.values, row.place)
        if text is not None:
            yield text
        elif row.values:
            values = _require_object(row).values
            if not any(name in values and values[name] in (None, "") for name in TEXT_FIELDS):
                raise DataError(
                    f"{row.place} has no text: it must be a string, or an object with one of the "
                    f"fields {', '.join(TEXT_FIELDS)}"
                )


def row_text(values: Any, place: str) -> str | Messages | None:
    """The text or the conversation of a row; None where it has neither.

    That is the conversation in `messages`, the texts in `context` and `input`, one after the other,
    or the first of `TEXT_FIELDS` that has one.

    Args:
        values: The row, an object or a text.
        place: Where it stands, for messages.

    Raises:
        DataError: `messages` is no conversation, or one with tools.
    """
    if isinstance(values, str):
        return values or None
    if not isinstance(values, Mapping):
        return None
    if values.get("messages") is not None:
        return conversation(values, place)
    found = {name: values[name] for name in _PLAIN_FIELDS if isinstance(values.get(name), str)}
    if found.get("context") and found.get("input"):
        return f"{found['context']}\n\n{found['input']}"
    return next((text for text in found.values() if text), None)


def reread(span: Span) -> Any:
    """The values of a row that `read_rows` found, from its file again.

    Raises:
        DataError: the file cannot be read, or has changed.
    """
    try:
        with open(span.file, "rb") as file:
            file.seek(span.start)
            data = file.read(span.size)
        if span.file.suffix.lower() == ".txt":
            return _lines_as_here(data.decode())
        return _parse(data.decode())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{printable(span.file)} cannot be read again: did it change meanwhile? "
            f"({_reason(error)})"
        ) from error


def _files(path: Path, types: tuple[str, ...]) -> list[Path]:
    kind = kind_of(path)
    if kind is None:
        raise ConfigError(f"there is no {printable(path)}: name a file or a folder")
    files = [path]
    if kind == "folder":
        try:
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in types and p.is_file())
        except OSError as error:
            raise DataError(f"{printable(path)} cannot be read: {error.strerror}") from error
    if not files or any(file.suffix.lower() not in types for file in files):
        listed = " or ".join((", ".join(types[:-1]), types[-1]))
        raise ConfigError(f"{printable(path)} holds no {listed} file: name one of these")
    return files


def _values_of(file: Path, text_size: int) -> Iterator[tuple[Any, Span | None]]:
    with open(file, "rb") as opened:
        if file.suffix.lower() == ".txt":
            yield from _texts(file, opened, text_size)
        elif file.suffix.lower() == ".jsonl":
            yield from _lines(file, opened)
        else:
            yield from _json_rows(file, opened)


def _lines(file: Path, opened: BinaryIO) -> Iterator[tuple[Any, Span]]:
    """A row a line. Lines end as files' lines do; `str.splitlines` would end them inside texts."""
    start = 0
    for line in opened:
        # Carriage returns never stand inside JSON's strings: they end lines too.
        for part in line.splitlines(keepends=True) if b"\r" in line else (line,):
            text = part.decode().strip().strip("\ufeff").strip()
            if text:
                yield _parse(text), Span(file, start, len(part))
            start += len(part)


def _texts(file: Path, opened: BinaryIO, size: int) -> Iterator[tuple[str, Span]]:
    """A text in parts of `size` characters."""
    pieces, held, place = _decoded(opened), "", 0
    start = len(codecs.BOM_UTF8) if _has_mark(opened) else 0
    while True:
        while len(held) - place <= size and (piece := next(pieces, "")):
            held, place = held[place:] + piece, 0
        part = held[place : place + size]
        if not part:
            return
        if part.endswith("\r"):
            part = held[place : place + size + 1]  # a line's end may have two characters
        place += len(part)
        length = len(part.encode())
        yield _lines_as_here(part), Span(file, start, length)
        start += length


def _json_rows(file: Path, opened: BinaryIO) -> Iterator[tuple[Any, Span | None]]:
    """The rows of an array, of the field `data` of an object, or of objects one after the other."""
    stream = _JsonStream(file, opened)
    if stream.peek() == "[":
        stream.skip("[")
        while stream.peek() != "]":
            yield stream.value(",]")
            if stream.peek() == ",":
                stream.skip(",")
                if stream.peek() == "]":
                    raise ValueError("a value is missing behind the last comma")
        stream.skip("]")
        if stream.peek():
            raise ValueError("something stands behind the end of its list")
        return
    first, span = stream.value("")
    if stream.peek() == "{":
        yield first, span
        while stream.peek():
            yield stream.value("")
        return
    if stream.peek():
        raise ValueError("something stands behind its end")
    rows = first.get("data", [first]) if isinstance(first, dict) else first
    if not isinstance(rows, list):
        raise DataError(f"{printable(file)} must hold a list of rows")
    for row in rows:
        yield row, None


class _JsonStream:
    """JSON values out of a file, holding no more of it than the next one needs."""

    def __init__(self, file: Path, opened: BinaryIO) -> None:
        self._file = file
        self._start = len(codecs.BOM_UTF8) if _has_mark(opened) else 0  # byte of `_text[_place]`
        self._pieces = _decoded(opened)
        self._text, self._place, self._ended = "", 0, False

    def peek(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            found = _SPACE.match(self._text, self._place)
            assert found is not None
            self._go_to(found.end())
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more(1):
                return ""

    def skip(self, character: str) -> None:
        """Goes behind the next character, which is `character`."""
        assert self.peek() == character
        self._go_to(self._place + 1)

    def value(self, ends: str) -> tuple[Any, Span]:
        """The next value; one of `ends` must follow it, anything may where there are none.

        Raises:
            ValueError: it is no JSON.
        """
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
                # A number may go on in what is still to be read.
                complete = end < len(self._text) and self._text[end] not in "0123456789.eE+-"
            except json.JSONDecodeError as error:
                characters = error.pos - self._place
                if self._more(len(self._text) - self._place):
                    continue
                byte = self._start + len(self._text[:characters].encode())
                raise ValueError(f"{error.msg} at byte {byte}") from error
            if complete or not self._more(len(self._text) - self._place):
                break
        text, start = self._text[self._place : end], self._start
        self._go_to(end)
        if ends and self.peek() not in (*ends,):
            raise ValueError(f"one of {' '.join(ends)} must follow it")
        return _without_surrogates(text, value), Span(self._file, start, len(text.encode()))

    def _go_to(self, place: int) -> None:
        self._start += len(self._text[self._place : place].encode())
        self._place = place

    def _more(self, least: int) -> bool:
        """Reads at least so many characters more; what was passed is let go."""
        parts = [self._text[self._place :]]
        self._place, read = 0, 0
        while read < least and not self._ended:
            piece = next(self._pieces, "")
            self._ended = not piece
            parts.append(piece)
            read += len(piece)
        self._text = "".join(parts)
        return read > 0


def _decoded(opened: BinaryIO) -> Iterator[str]:
    """A file's text in pieces, a byte-order mark left out."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    while block := opened.read(_BLOCK):
        if text := decoder.decode(block):
            yield text
    decoder.decode(b"", final=True)


def _has_mark(opened: BinaryIO) -> bool:
    begin = opened.read(len(codecs.BOM_UTF8))
    opened.seek(0)
    return begin == codecs.BOM_UTF8


def _parse(text: str) -> Any:
    text = text.strip().strip("\ufeff").strip()
    return _without_surrogates(text, _DECODER.decode(text))


def _without_surrogates(text: str, value: Any) -> Any:
    """The value of a JSON text; halves of surrogate pairs, which no tokenizer reads, become �."""
    return _replaced(value) if _SURROGATE.search(text) else value


def _replaced(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_replaced(each) for each in value]
    if isinstance(value, dict):
        return {_replaced(name): _replaced(each) for name, each in value.items()}
    return value


def _lines_as_here(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _hub_rows(address: str) -> Iterator[Row]:
    parts = address.removeprefix(HUB).split(":")
    if len(parts) != 3 or not parts[0] or not parts[2]:
        raise ConfigError(
            f"{printable(address)!r} is no hub address: write hub:<dataset>:<config>:<split>, with "
            "an empty config for the default one"
        )
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, subset, split = parts
    number = -1  # until the data set is open
    try:
        with _quiet_datasets():
            rows = iter(load_dataset(name, subset or None, split=split, streaming=True))
            number = 0
            # A data set without a single row raises StopIteration as it is opened.
            while (values := next(rows, _NO_ROW)) is not _NO_ROW:
                yield Row(values, printable(address), number, (split, subset, name.split("/")[-1]))
                number += 1
    except StopIteration:
        return
    except (DatasetsError, *_READING_ERRORS) as error:
        what = "opened" if number < 0 else f"read from row {number} on"
        raise DataError(f"{printable(address)} cannot be {what}: {_reason(error)}") from error


_NO_ROW = object()
# What the library lets through of the readers below it, and of what a script does.
_READING_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError)


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keeps the library from logging the errors that it raises too."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _require_object(row: Row) -> Row:
    if not isinstance(row.values, Mapping):
        raise DataError(f"{row.place} must be an object, got {type(row.values).__name__}")
    return row


def _reason(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, json.JSONDecodeError):
        place = f"line {error.lineno}, column" if error.lineno > 1 else "column"
        return f"{error.msg} at {place} {error.colno}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return printable(lines[0])
