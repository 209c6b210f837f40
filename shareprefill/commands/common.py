"""What all commands have: `--config`, `-q`, `-v`, home folders in paths, and named values."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from shareprefill.commands.help import Command
from shareprefill.commands.settings import take_settings
from shareprefill.errors import ConfigError, DataError
from shareprefill.files import printable

_METAVARS = {int: "N", float: "X", str: "NAME", Path: "PATH"}

_ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="TOML file of this command's options, by their names without the dashes; what the "
        "command line says wins.",
        callback=take_settings,
        is_eager=True,
    ),
]
_QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Results and errors only: no progress, no notes.")
]
_VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Say more about what is done, on standard error.")
]
_COMMON = {"config": (_ConfigOption, None), "quiet": (_QuietOption, False)} | {
    "verbose": (_VerboseOption, False)
}


Keeps = Callable[[dict[str, Any]], str]
"""Says of a command's values what is kept where it is stopped, and how to go on."""


def register(app: typer.Typer, command: Callable[..., None], keeps: Keeps | None = None) -> None:
    """Makes a function a command, named for it, with what all commands have."""
    name = command.__name__.removesuffix("_command").replace("_", "-")
    app.command(name, cls=Command)(_complete(command, keeps))


def prompts_kept(values: dict[str, Any]) -> str:
    """Of `sp calibrate`."""
    again = "" if values["resume"] else ", without --fresh,"
    return f"Finished prompts are kept: the same command{again} goes on with them."


def stages_kept(values: dict[str, Any]) -> str:
    """Of `sp regenerate`."""
    again = ", without --fresh," if values["fresh"] else ""
    return (
        f"Finished stages are kept in {printable(values['work'])}: the same command{again} goes on."
    )


def outcomes_kept(values: dict[str, Any]) -> str:
    """Of commands that keep outcomes in the folder `out`."""
    if values["out"] is None:
        return "Nothing is kept: with --out FOLDER, the same command goes on where it stopped."
    again = "" if values["resume"] else ", without --fresh,"
    return f"Outcomes are kept in {printable(values['out'])}: the same command{again} goes on."


def loads_told(_values: dict[str, Any]) -> str:
    """Of `sp bench-serve`."""
    return "Loads that ended are in the table; no picture was drawn."


def may_be_sent(_values: dict[str, Any]) -> str:
    """Of `sp push`."""
    return "The artifact may be in the repository, whole or not at all: --force sends it again."


def _complete(command: Callable[..., None], keeps: Keeps | None) -> Callable[..., None]:
    hints = get_type_hints(command, include_extras=True)

    @wraps(command)
    def run(**values: Any) -> None:
        values.pop("config")
        with _told(quiet=values.pop("quiet"), verbose=values.pop("verbose")):
            taken = ", ".join(
                f"{name} = {value}" for name, value in values.items() if value is not None
            )
            logging.getLogger("shareprefill").info("options: %s", taken or "none")
            try:
                command(**{name: _expanded(value) for name, value in values.items()})
            except KeyboardInterrupt:
                kept = "" if keeps is None else f" {keeps(values)}"
                typer.echo(f"\nsp: stopped.{kept or ' Nothing was written.'}", err=True)
                raise typer.Exit(130) from None

    parameters = [
        own.replace(annotation=_named(name, hints[name]))
        for name, own in inspect.signature(command).parameters.items()
    ]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
        for name, (hint, default) in ((n, (_named(n, h), d)) for n, (h, d) in _COMMON.items())
    ]
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    )
    run.__annotations__ = {own.name: own.annotation for own in parameters}
    return run


def _named(name: str, hint: Any) -> Any:
    """An option's annotation that says what stands for its value in the help."""
    assert get_origin(hint) is Annotated, name
    kind, option = get_args(hint)
    if not isinstance(option, type(typer.Option())) or option.metavar is not None:
        return hint
    kinds = [each for each in get_args(kind) or (kind,) if each is not NoneType]
    inner = (get_args(kinds[0]) or kinds)[0]
    if inner is bool:
        return hint
    if not isinstance(option.default, str):  # typer takes a first name for a default at first
        # typer 0.27 would name an option after its metavar.
        option.param_decls = option.param_decls or (f"--{name.replace('_', '-')}",)
    option.metavar = _METAVARS[inner]
    return hint


@contextmanager
def _told(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Sets how much is said on standard error while a command runs."""
    if quiet and verbose:
        raise ConfigError("--quiet and --verbose exclude each other: give one of them")
    from shareprefill import console

    logger = logging.getLogger("shareprefill")
    handler = _Lines()
    level, was_quiet = logger.level, console.set_quiet(quiet)
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        console.set_quiet(was_quiet)


class _Lines(logging.Handler):
    """A record as a line of `sp`, on whatever is standard error then: a spinner may stand in."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints it."""
        level = "warning: " if record.levelno >= logging.WARNING else ""
        line = f"sp: {level}{printable(record.getMessage(), 2000)}"
        print(line, file=sys.stderr)  # noqa: T201


def _expanded(value: Any) -> Any:
    """Puts home folders for `~` and `~user` in paths: a shell does not in `--out=~/x`."""
    if isinstance(value, list):
        return [_expanded(part) for part in value]
    if not isinstance(value, Path) or not str(value).startswith("~"):
        return value
    # Not `Path.expanduser`, which raises where there is no such user.
    found = os.path.expanduser(value)
    if found == str(value):
        raise DataError(
            f"{printable(value)}: there is no such user; write {printable('./' + found)} for a "
            "path in this folder"
        )
    return Path(found)
