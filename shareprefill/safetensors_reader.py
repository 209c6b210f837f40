"""The strict reading of a safetensors file: nothing in it is believed before it is checked.

Memory follows the file, never a number that stands in it: the header is read alone and bounded
before it is parsed, and the tensors are read once, into the buffer that they stay in.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NoReturn

import torch

from shareprefill.files import printable

MAX_DATA = 256 << 20
MAX_DEPTH = 32
# Parsing takes up to some 8 times a text's bytes, and up to some 100 bytes a JSON value (which may
# be 2 in the file). What a small file needs is free; more is allowed only as the file grows, so
# that a header never takes more memory than the tensors behind it.
MAX_HEADER = 8 << 20
BASE_HEADER = 256 << 10
FILE_PER_HEADER = 8
BASE_VALUES = 8192
FILE_PER_VALUE = 128
MAX_INTEGER = 2**63 - 1

_DTYPES = {"F32": torch.float32, "I32": torch.int32, "I8": torch.int8}
_METADATA = "__metadata__"
# The closing quote is optional: a text without it would be searched again from each of its quotes.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")
# Control characters, line separators, and the marks that turn the direction of text round.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class RefusedError(Exception):
    """What is wrong with a file; the caller adds its path and the way out."""


@dataclass(frozen=True)
class Header:
    """A safetensors header: the metadata string, each tensor's entry, and the data's place."""

    metadata: str
    entries: dict[str, Any]
    start: int
    size: int


def quoted(value: object) -> str:
    """A value out of a file as it may be shown: escaped, in quotes if it is text, cut short."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def open_regular(path: Path) -> BufferedIOBase:
    """Opens a regular file, or a link to one.

    Raises:
        RefusedError: there is none, it is of another kind, or it may not be read.
    """
    try:
        # Looked at before it is opened: opening a device can act on it, a pipe's opening can wait.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise RefusedError("it is not a regular file, but a folder, a pipe or a device")
        return open(path, "rb")
    except FileNotFoundError:
        raise RefusedError("there is no such file") from None
    except ValueError:
        raise RefusedError("the path holds a null character") from None
    except OSError as error:
        raise RefusedError(f"it cannot be opened ({error.strerror})") from error


def read_header(file: BufferedIOBase, size: int, key: str) -> Header:
    """Reads the header of a safetensors file of `size` bytes, its metadata one string under `key`.

    Raises:
        RefusedError: the header is cut off, too large, or not what safetensors writes.
    """
    prefix = _read(file, 8)
    length = int.from_bytes(prefix, "little")
    limit = min(MAX_HEADER, BASE_HEADER + size // FILE_PER_HEADER)
    if length > limit:
        raise RefusedError(f"its header claims {length} bytes, more than {limit}")
    if 8 + length > size:
        raise RefusedError(f"it is truncated: {size} bytes, the header alone needs {8 + length}")
    header = parse_json(_read(file, length), size, "header")
    if not isinstance(header, dict):
        raise RefusedError("its header is not an object")
    metadata = header.pop(_METADATA, None)
    if not isinstance(metadata, dict) or list(metadata) != [key]:
        raise RefusedError(f"its metadata is not the one key {key!r}")
    if not isinstance(metadata[key], str):
        raise RefusedError(f"its metadata {key!r} is not a string")
    return Header(metadata[key], header, 8 + length, size - 8 - length)


def read_tensors(file: BufferedIOBase, header: Header, layout: Layout) -> dict[str, torch.Tensor]:
    """Reads exactly the tensors of `layout`, as views of one buffer.

    Raises:
        RefusedError: the file's tensors have other names, dtypes, shapes or places.
    """
    expected = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in layout.items()}
    total = sum(expected.values())
    if total > MAX_DATA:
        raise RefusedError(f"it declares tensors of {total} bytes, more than {MAX_DATA}")
    _check_names("tensors", set(header.entries), set(layout))
    places = {name: _check_entry(name, header.entries[name], *layout[name]) for name in layout}
    end = 0
    for name, (first, last) in sorted(places.items(), key=lambda item: item[1]):
        if first != end or last - first != expected[name]:
            raise RefusedError(
                f"tensor {name!r} lies at bytes {first} to {last}, expected {end} to "
                f"{end + expected[name]}"
            )
        if first % layout[name][0].itemsize:
            raise RefusedError(f"tensor {name!r} lies at byte {first}, which is not aligned")
        end = last
    if header.size != total:
        kind = "is truncated" if header.size < total else "has trailing bytes"
        raise RefusedError(f"it {kind}: {header.size} bytes of tensors, expected {total}")
    buffer = bytearray(total)
    if file.readinto(buffer) != total or file.read(1):
        raise RefusedError("it changed while it was read")
    return {
        name: torch.frombuffer(
            buffer, dtype=dtype, count=math.prod(shape), offset=places[name][0]
        ).reshape(shape)
        for name, (dtype, shape) in layout.items()
    }


def parse_json(text: bytes, file_size: int, what: str) -> Any:
    """Parses JSON of bounded size and depth, each key once, all numbers finite.

    Raises:
        RefusedError: the text breaks one of these rules.
    """
    values = 1 + text.count(b",") + text.count(b"[") + text.count(b"{")
    limit = BASE_VALUES + file_size // FILE_PER_VALUE
    if values > limit:
        raise RefusedError(f"its {what} holds {values} JSON values, more than {limit}")
    depth = deepest = 0
    for bracket in _BRACKET.findall(_STRING.sub(b"", text)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise RefusedError(f"its {what} is nested {deepest} deep, more than {MAX_DEPTH}")
    try:
        return json.loads(
            text.decode("ascii"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_number,
            parse_float=_finite,
            parse_int=_integer,
        )
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError among them
        raise RefusedError(f"its {what} is not JSON ({printable(error, 80)})") from error


def check_json(value: object, name: str, depth: int = 0) -> None:
    """Checks that a value can be written as JSON, and that its texts are safe to print.

    Raises:
        RefusedError: naming the first value that is not.
    """
    if depth > MAX_DEPTH // 2:
        raise RefusedError(f"{name} is nested more than {MAX_DEPTH // 2} deep")
    match value:
        case None | bool():
            pass
        case int():
            if abs(value) > MAX_INTEGER:
                raise RefusedError(f"{name} holds an integer of more than 64 bits")
        case float():
            if not math.isfinite(value):
                raise RefusedError(f"{name} holds {value}, which is not finite")
        case str():
            check_text(value, name)
        case list() | tuple():
            for item in value:
                check_json(item, name, depth + 1)
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise RefusedError(f"{name} has the key {quoted(key)}, which is not text")
                check_text(key, name)
                check_json(item, name, depth + 1)
        case _:
            raise RefusedError(f"{name} holds a {type(value).__name__}, which JSON does not have")


def check_text(value: object, name: str, limit: int | None = None) -> str:
    """Checks that a value is text, safe to print, and of at most `limit` characters.

    Raises:
        RefusedError: it is not.
    """
    if not isinstance(value, str):
        raise RefusedError(f"{name} is {quoted(value)}, not text")
    if limit is not None and not 1 <= len(value) <= limit:
        raise RefusedError(f"{name} has {len(value)} characters, expected 1 to {limit}")
    if _UNSAFE.search(value):
        raise RefusedError(f"{name} holds control characters: {quoted(value)}")
    return value


def check_keys(value: object, name: str, keys: set[str]) -> dict[str, Any]:
    """Checks that a value is an object with exactly these keys.

    Raises:
        RefusedError: it is not.
    """
    if not isinstance(value, dict):
        raise RefusedError(f"{name} is {quoted(value)}, not an object")
    _check_names(f"keys of {name}", set(value), keys)
    return value


def canonical_json(value: object) -> str:
    """The one way to write a JSON value: keys sorted, no spaces, ASCII, finite numbers."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _read(file: BufferedIOBase, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise RefusedError(f"it is truncated: {len(data)} bytes where {count} were expected")
    return data


def _check_names(what: str, found: set[str], expected: set[str]) -> None:
    if missing := sorted(expected - found):
        raise RefusedError(f"{what}: {quoted(missing[0])} is missing")
    if unknown := sorted(found - expected):
        raise RefusedError(f"{what}: {quoted(unknown[0])} is unknown")


def _check_entry(
    name: str, entry: object, dtype: torch.dtype, shape: tuple[int, ...]
) -> tuple[int, int]:
    entry = check_keys(entry, f"tensor {name!r}", {"dtype", "shape", "data_offsets"})
    code = entry["dtype"]
    if not isinstance(code, str) or _DTYPES.get(code) is not dtype:
        expected = next(key for key, value in _DTYPES.items() if value is dtype)
        raise RefusedError(f"tensor {name!r} has dtype {quoted(code)}, expected {expected!r}")
    if not _are_integers(entry["shape"]) or tuple(entry["shape"]) != shape:
        raise RefusedError(
            f"tensor {name!r} has shape {quoted(entry['shape'])}, expected {list(shape)}"
        )
    place = entry["data_offsets"]
    if not _are_integers(place) or len(place) != 2:
        raise RefusedError(f"tensor {name!r} has data_offsets {quoted(place)}, not two integers")
    return place[0], place[1]


def _are_integers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise RefusedError(f"the key {quoted(twice)} occurs twice")
    return result


def _refuse_number(text: str) -> NoReturn:
    raise RefusedError(f"it holds the number {quoted(text)}, which is not finite")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse_number(text)
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or abs(value := int(text)) > MAX_INTEGER:
        raise RefusedError(f"it holds the integer {quoted(text)}, of more than 64 bits")
    return value
