"""`--config FILE`: options of a command out of a TOML file; the command line wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from shareprefill.errors import ConfigError, DataError, did_you_mean
from shareprefill.files import printable

LIST = "A,B,..."
"""What an option of several values with commas between them is followed by in the help."""

# They are about one call, or come before the file.
_NOT_IN_A_FILE = ("config", "help")


def take_settings(ctx: typer.Context, path: Path | None) -> Path | None:
    """Makes a file's values the defaults of a command's options and arguments.

    A file has the options of one command at its top, or a table for each of several commands.

    Raises:
        ConfigError: a key is no option of the command, or a value of the wrong type.
        DataError: the file cannot be read.
    """
    if path is None or ctx.resilient_parsing:
        return path
    known = _options_of(ctx.command)
    ctx.default_map = {
        option.name: _value(option, known[_plain(key)][1], value, f"{printable(path)}: {key}")
        for key, value in _values(ctx, path, known).items()
        for option in (known[_plain(key)][0],)
    }
    return path


def _options_of(command: Any) -> dict[str, tuple[Any, bool]]:
    """Parameters by every name that they have, and whether a flag of that name is positive."""
    found = {}
    for parameter in command.params:
        if parameter.name in _NOT_IN_A_FILE:
            continue
        for names, is_positive in ((parameter.opts, True), (parameter.secondary_opts, False)):
            for name in names:
                found[_plain(name)] = (parameter, is_positive)
    return found


def _plain(name: str) -> str:
    return name.lstrip("-").replace("_", "-")


def _values(ctx: typer.Context, path: Path, known: dict[str, Any]) -> dict[str, Any]:
    """What a file says for a command, its keys checked."""
    import tomllib

    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{printable(path)} does not exist: --config takes a TOML file") from None
    except OSError as error:
        raise DataError(f"{printable(path)} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{printable(path)} is no TOML: {printable(error)}") from error
    commands = {} if ctx.parent is None else getattr(ctx.parent.command, "commands", {})
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    for key in tables:
        if key not in commands:
            raise ConfigError(
                f"{printable(path)}: [{printable(key)}] is no command of sp"
                f"{did_you_mean(key, commands)}"
            )
    if tables and len(tables) < len(values):
        alone = next(key for key in values if key not in tables)
        raise ConfigError(
            f"{printable(path)}: {printable(alone)} stands in no table: put it into the table of "
            "its command, as the file has tables"
        )
    own = tables.get(str(ctx.info_name), {}) if tables else values
    for key in own:
        if _plain(key) not in known:
            raise ConfigError(
                f"{printable(path)}: sp {ctx.info_name} has no option {printable(key)!r}, "
                f"as sp {ctx.info_name} --help says{did_you_mean(_plain(key), known)}"
            )
    return own


def _value(option: Any, is_positive: bool, value: Any, where: str) -> Any:
    """A value as the command line would have it."""
    if getattr(option, "is_flag", False):
        if not isinstance(value, bool):
            raise ConfigError(f"{where} = {value!r} is not allowed: it must be true or false")
        return value is is_positive
    values = value if isinstance(value, list) else [value]
    if any(isinstance(each, bool) or not isinstance(each, str | int | float) for each in values):
        raise ConfigError(f"{where} = {value!r} is not allowed: give a text or a number")
    words = [str(each) for each in values]
    if option.multiple or option.nargs != 1:
        return words
    if not isinstance(value, list):
        return words[0]
    if option.metavar != LIST:
        raise ConfigError(f"{where} = {value!r} is not allowed: give one value, not a list")
    return ",".join(words)
