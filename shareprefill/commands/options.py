"""Options: those of a configuration's fields, and those that several commands have."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from shareprefill.commands.settings import LIST
from shareprefill.errors import ConfigError, DataError
from shareprefill.files import kind_of, printable
from shareprefill.policy_names import POLICIES

POLICY_HELP = (
    f"One of {', '.join(POLICIES)}, or module:Class of your own; parameters may follow, "
    "as in streaming:local_blocks=16."
)
# Enough of a page or figure to say what it is of.
_MARKED_BYTES = 1 << 16
_UNITS = {"": 1, "k": 1024, "m": 1024**2}

DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[
    str, typer.Option(help="auto (float32 on a CPU), float32, bfloat16 or float16.")
]
RemoteCodeOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code from the model's repository.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]

OtherModelOption = Annotated[
    str | None,
    typer.Option("--model", help="The model; by default the artifact's, if calibrated here."),
]
RepositoryArgument = Annotated[str, typer.Argument(help="organisation/name.")]
FileOption = Annotated[str | None, typer.Option("--file", help="Its name in the repository.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


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


@dataclass(frozen=True, kw_only=True)
class Written:
    """How a field's option is written.

    Attributes:
        field: Its name.
        type: What typer reads.
        default: Of the option; `...` where it must be given.
        names: The option's names; none: the field's own.
        help: Its line in the help.
        parser: Makes the value of one word; its errors are those of a wrong option.
        metavar: What the word stands for, in the help.
        words: What a shell may complete.
        read: Makes the field's value of the option's.
    """

    field: str
    type: Any
    default: Any
    help: str
    names: tuple[str, ...] = ()
    parser: Callable[[str], Any] | None = None
    metavar: str | None = None
    words: tuple[str, ...] = ()
    read: Callable[[Any], Any] = lambda value: value

    def parameter(self) -> inspect.Parameter:
        """The parameter of a command that typer makes the option from."""
        names = self.names
        if not names and self.type is not bool:
            # typer 0.27 would name an option after its metavar.
            names = (f"--{self.field.replace('_', '-')}",)
        option = typer.Option(
            *names,
            help=self.help,
            parser=self.parser,
            metavar=self.metavar,
            autocompletion=self._complete if self.words else None,
        )
        return inspect.Parameter(
            self.field,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if self.default is ... else self.default,
            annotation=Annotated[self.type, option],
        )

    def _complete(self, incomplete: str) -> list[str]:
        """What a word that was begun may become; of a list, its last part."""
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + word for word in self.words if word.startswith(last)]


Writing = Callable[[Written], Written]
"""Changes how an option is written from how its field's type says."""


def options_of(
    configuration: type, *, leave_out: Iterable[str] = (), **writings: Writing
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command an option for each field of a configuration, in place of `options`.

    Names, types and defaults are the fields', help is what the docstring says of them. The command
    gets the values as the dictionary `options`.

    Args:
        configuration: A dataclass whose docstring has `Attributes`.
        leave_out: Fields without an option.
        writings: For fields that are written otherwise.
    """
    said, types = attributes_of(configuration), get_type_hints(configuration)
    written = {
        field.name: writings.pop(field.name, lambda same: same)(
            _written(field, types[field.name], said[field.name])
        )
        for field in fields(configuration)
        if field.name not in leave_out
    }
    assert not writings, f"{configuration.__name__} has no {', '.join(writings)}"

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**values: Any) -> None:
            options = {name: option.read(values.pop(name)) for name, option in written.items()}
            command(options=options, **values)

        hints = get_type_hints(command, include_extras=True)
        parameters = []
        for name, own in inspect.signature(command).parameters.items():
            if name == "options":
                parameters += [option.parameter() for option in written.values()]
            else:
                keyword = inspect.Parameter.KEYWORD_ONLY
                parameters.append(own.replace(annotation=hints[name], kind=keyword))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {own.name: own.annotation for own in parameters}
        return run

    return with_options


def attributes_of(configuration: type) -> dict[str, str]:
    """What a docstring's `Attributes` say, by name, in one line for a help text.

    >>> from shareprefill.config import TrainConfig
    >>> attributes_of(TrainConfig)["code_size"]
    'Dimensions of a code.'
    """
    _, _, listed = (inspect.getdoc(configuration) or "").partition("Attributes:\n")
    found = {field.name: "" for field in fields(configuration)}
    for part in re.split(r"(?m)^    (?=\w)", listed)[1:]:
        name, _, text = part.partition(": ")
        text = " ".join(text.replace("`", "").split()).replace(" (None)", "")
        # On the command line, None is what an option has where it is not given.
        found[name] = text.replace("; None:", "; by default:").replace("None:", "By default:")
    return found


def _written(field: Field[Any], kind: Any, text: str) -> Written:
    default = ... if field.default is MISSING else field.default
    if get_origin(kind) is Literal:
        words = get_args(kind)
        if not all(word in text for word in words):
            text = f"{text} One of {', '.join(words)}."
        return Written(field=field.name, type=str, default=default, help=text, words=words)
    return Written(field=field.name, type=kind, default=default, help=text)


def explained(more: str, *words: str) -> Writing:
    """Adds a sentence to the help, and words that a shell completes."""
    return lambda option: replace(option, help=f"{option.help} {more}", words=words)


def named(*names: str) -> Writing:
    """Other names, among them `--flag` alone for a flag that is off by default."""
    return lambda option: replace(option, names=names)


def required(text: str) -> Writing:
    """An option that must be given, with a help of its own."""
    return lambda option: replace(option, default=..., help=text)


def repeated(name: str, text: str | None = None, words: tuple[str, ...] = ()) -> Writing:
    """A tuple as an option that is given once a value."""

    def write(option: Written) -> Written:
        (kind, _) = get_args(option.type)
        return replace(
            option,
            type=list[kind] | None,
            default=list(option.default) or None,
            names=(name,),
            words=words,
            help=text or f"{option.help} May be repeated.",
            read=lambda values: tuple(values or ()),
        )

    return write


def with_commas(option: Written) -> Written:
    """A tuple of words as one option with commas."""
    default = ",".join(option.default)
    return replace(option, type=str, default=default, metavar=LIST, read=listed)


def lengths_option(option: Written) -> Written:
    """Several lengths, as `8K,128K`."""
    text = f"{option.help} 8K is 8192."
    default = ",".join(map(str, option.default))
    return replace(option, type=str, default=default, metavar=LIST, help=text, read=parse_lengths)


def length_option(option: Written) -> Written:
    """One length, as `8K`."""
    text = f"{option.help} 8K is 8192."
    return replace(option, help=text, parser=parse_length, metavar="LENGTH")


def number_or_auto(option: Written) -> Written:
    """A number, or `auto` for None."""

    def read(value: str) -> int | None:
        if value == "auto":
            return None
        try:
            return int(value)
        except ValueError:
            raise ConfigError(
                f"{option.field} = {value!r} is not allowed: give auto or a number"
            ) from None

    return replace(option, type=str, default="auto", read=read)


def require_own(path: Path, starts: tuple[bytes, ...], *, force: bool) -> None:
    """Refuses to replace a file of another kind than the one to be written.

    Args:
        path: The file to write.
        starts: What files of its kind begin with.
        force: Whether the user has said to replace it.

    Raises:
        DataError: there is a file that begins otherwise.
    """
    start = b"" if force else _start_of(path, max(map(len, starts)))
    if start and not start.startswith(starts):
        raise DataError(
            f"{printable(path)} is there and of another kind: use --force to replace it, or name "
            "another file"
        )


def require_same(path: Path, kind: str, model: str, *, force: bool) -> None:
    """Refuses to replace a page or a figure of another kind or model than the one to be written.

    Args:
        path: The file to write.
        kind: Of `report.marks`.
        model: That it will be of.
        force: Whether the user has said to replace it.

    Raises:
        DataError: there is a file that is no such page or figure, or one of another model.
    """
    from shareprefill.report.marks import mark_of, read_mark

    start = b"" if force else _start_of(path, _MARKED_BYTES)
    if not start or (found := read_mark(start)) == mark_of(kind, model):
        return
    what = "of another kind" if found is None else f"holds another one: {printable(found)}"
    raise DataError(
        f"{printable(path)} is there and {what}: use --force to replace it, or name another file"
    )


def _start_of(path: Path, count: int) -> bytes:
    """The first bytes of a file; none where there is no file."""
    if kind_of(path) != "file":
        return b""
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise DataError(f"{printable(path)} cannot be read: {error.strerror}") from error


def listed(text: str) -> tuple[str, ...]:
    """The parts of a list with commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
