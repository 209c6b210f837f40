"""Options that several commands have."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from shareprefill.errors import ConfigError

_UNITS = {"": 1, "k": 1024, "m": 1024**2}

ModelOption = Annotated[
    str, typer.Option("--model", help="Hub id, local folder, .gguf file, or the built-in sp-tiny.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[
    str, typer.Option(help="auto (float32 on a CPU), float32, bfloat16 or float16.")
]
RemoteCodeOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code from the model's repository.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def parse_lengths(text: str) -> tuple[int, ...]:
    """`8K,131072,1M` as tokens.

    Raises:
        ConfigError: a part is no length.

    >>> parse_lengths("8K, 1000")
    (8192, 1000)
    """
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)([kKmM]?)\s*", part)
        if match is None or int(match[1]) == 0:
            raise ConfigError(
                f"lengths = {text!r} is not allowed: give numbers with commas between them, like "
                "8K,131072"
            )
        found.append(int(match[1]) * _UNITS[match[2].lower()])
    return tuple(found)


def parse_length(text: str | int) -> int:
    """One length, like those of `parse_lengths`.

    Raises:
        ConfigError: it is none, or there are several.
    """
    found = parse_lengths(str(text))
    if len(found) != 1:
        raise ConfigError(f"length = {text!r} is not allowed: give one number, like 8K or 8192")
    return found[0]
