"""Standard streams as they come: closed, full, or of an encoding that lacks characters."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shareprefill.errors import ConfigError, DataError
from shareprefill.files import printable

if TYPE_CHECKING:
    from shareprefill.tokens import Messages

_OF_STREAMS = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def open_streams() -> None:
    """Makes the standard streams safe to write to.

    Characters that a terminal's encoding lacks are written as escapes: an answer is not lost for
    one of them. A closed stream's number is taken, so that no file that is opened later gets it.
    What a full standard error cannot take is lost.

    Raises:
        DataError: standard output is closed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    elif sys.stderr is sys.__stderr__:  # not where a caller has put a stream of its own
        kept = io.BufferedWriter(_Lossy(sys.stderr.fileno(), "wb", closefd=False))
        sys.stderr = io.TextIOWrapper(kept, sys.stderr.encoding, line_buffering=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is None:
        raise DataError("standard output is closed: send it to a file, or to /dev/null")


class _Lossy(io.FileIO):
    """Standard error: a notice that cannot be written is lost, and the work goes on."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


@contextmanager
def written_output() -> Iterator[None]:
    """Runs a command, and writes out what standard output still holds.

    Raises:
        DataError: it cannot be written.
        SystemExit: whoever read it has gone.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        # Errors of files are told where they arise: these have no name.
        if error.filename is not None or error.errno not in _OF_STREAMS:
            raise
        # What is left is given up, or the interpreter would try to write it again as it ends.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if error.errno == errno.EPIPE:
            raise SystemExit(1) from None
        raise DataError(f"cannot write the output: {error.strerror}") from error


def read_prompt(path: Path) -> str:
    """The text of a file, or of standard input for `-`; a byte-order mark is left out.

    Raises:
        DataError: it cannot be read, or is no UTF-8.
    """
    name = "standard input" if str(path) == "-" else printable(path)
    try:
        if str(path) != "-":
            data = path.read_bytes()
        elif sys.stdin is None:
            raise DataError("standard input is closed: name a text file instead of -")
        else:
            data = sys.stdin.buffer.read()
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(
            f"{name} does not exist: name a text file, or - for standard input"
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{name} cannot be read as UTF-8 text: {printable(reason)}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_chat(path: Path, system: str | None) -> Messages:
    """A conversation out of a file, or a text as the user's only message.

    Args:
        path: A .json or .jsonl file of messages, or of one object with the field `messages`; any
            other file, or `-`, is a text.
        system: The system's message before it.

    Raises:
        ConfigError: the file has a system's message of its own, or is not there.
        DataError: it cannot be read, or holds no conversation.
    """
    from shareprefill.data.sources import ROW_FILES, read_rows
    from shareprefill.tokens import as_messages, conversation

    if path.suffix.lower() not in ROW_FILES:
        messages = [{"role": "user", "content": read_prompt(path)}]
    else:
        rows = [row.values for row in read_rows(str(path))]
        alone = rows[0] if len(rows) == 1 and isinstance(rows[0], dict) else {}
        place = printable(path)
        messages = conversation(alone, place) if "messages" in alone else as_messages(rows, place)
    if system is None:
        return messages
    if messages[0]["role"] == "system":
        raise ConfigError(f"{printable(path)} has a system message: leave out --system")
    return [{"role": "system", "content": system}, *messages]


def print_now(text: str) -> None:
    """Prints a piece of an answer as it is, at once."""
    # Not `typer.echo`, which takes sequences that look like a terminal's out of the text.
    print(text, end="", flush=True)  # noqa: T201
