"""What all commands print with: one table printer, lines of prose, progress bars."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_GAP = 2  # between two columns
_quiet = False
_LOADING = "loading the model"
_LINES_EVERY_S = 60.0
_NARROWEST_PROSE = 16
_FIGURE = re.compile(r"[-+.]?\d|-$")


def set_quiet(quiet: bool) -> bool:
    """Whether standard error gets nothing but errors from now on; returns how it was."""
    global _quiet
    was, _quiet = _quiet, quiet
    return was


def is_quiet() -> bool:
    """Whether only results and errors are wanted."""
    return _quiet


def note(text: str) -> None:
    """Says something on standard error that is no result, unless only results are wanted."""
    from shareprefill.files import printable

    if not _quiet:
        print(printable(text, 2000), file=sys.stderr)  # noqa: T201


def show_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    less_important: Sequence[str] = (),
    prose: Sequence[str] = (),
) -> None:
    """Prints a table that breaks no word and cuts no value, however narrow the terminal is.

    Where it does not fit, texts are wrapped between words, then columns are left out, then each row
    is printed as a block of lines. A file or a pipe gets all columns, each as wide as it needs.

    Args:
        title: The line above it.
        columns: Names; the first column says what a row is about.
        rows: A cell a column.
        less_important: Columns that may be left out, the least important first; those that the
            table does not have are passed over.
        prose: Columns of texts that may be wrapped.
    """
    from shareprefill.files import printable

    rows = [[printable(cell, sys.maxsize) for cell in row] for row in rows]
    width, shown = _width(), list(range(len(columns)))
    passed_over = [columns.index(name) for name in less_important if name in columns]
    while (widths := _fit(columns, rows, shown, prose, width)) is None and passed_over:
        shown.remove(passed_over.pop(0))
    show_line(title, bold=True)
    if widths is None:
        _show_blocks(columns, rows)
    else:
        _show_columns(columns, rows, shown, widths, prose)
    show_line("")


def show_line(text: str, *, bold: bool = False) -> None:
    """Prints a line of prose; a terminal gets it wrapped between words."""
    width = _width()
    lines = [text] if width is None else _wrapped(text, width)
    # Text, not markup: names may hold what rich takes for it.
    console = Console(width=max(map(cell_len, lines), default=1) or 1)
    console.print(Text("\n".join(lines), style="bold" if bold else ""), soft_wrap=True)


def _width() -> int | None:
    """The terminal's columns; None where output goes into a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _fit(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    shown: Sequence[int],
    prose: Sequence[str],
    width: int | None,
) -> list[int] | None:
    """Widths of the columns that are shown; None where the terminal is too narrow for them."""
    texts = [[columns[number], *(row[number] for row in rows)] for number in shown]
    widths = [max(map(cell_len, column)) for column in texts]
    least = [
        _least(column, full) if columns[number] in prose else full
        for number, column, full in zip(shown, texts, widths, strict=True)
    ]
    room = None if width is None else width - _GAP * (len(shown) - 1)
    if room is None or sum(widths) <= room:
        return widths
    if sum(least) > room:
        return None
    while sum(widths) > room:
        spare = [full - small for full, small in zip(widths, least, strict=True)]
        widths[spare.index(max(spare))] -= 1
    return widths


def _least(texts: Sequence[str], full: int) -> int:
    """The width that a column of prose needs at least."""
    words = (cell_len(word) for text in texts for word in text.split())
    return max(min(full, _NARROWEST_PROSE), *words)


def _show_columns(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    shown: Sequence[int],
    widths: list[int],
    prose: Sequence[str],
) -> None:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
    for number, size in zip(shown, widths, strict=True):
        is_figure = (
            number > 0
            and columns[number] not in prose
            and all(_FIGURE.match(row[number]) for row in rows if row[number])
        )
        table.add_column(
            Text(columns[number]), justify="right" if is_figure else "left", width=size
        )
    for row in rows:
        table.add_row(*(Text(row[number]) for number in shown))
    Console(width=sum(widths) + _GAP * len(widths)).print(table)
    left_out = [name for number, name in enumerate(columns) if number not in shown]
    if left_out:
        show_line(f"not shown for lack of width: {'; '.join(left_out)}")


def _show_blocks(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for row in rows:
        show_line(f"{columns[0]}: {row[0]}")
        for name, cell in zip(columns[1:], row[1:], strict=True):
            if cell not in ("", "-"):
                show_line(f"  {name}: {cell}")


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of whole words; what follows the first is set in as that is, and two more."""
    indent = " " * (len(text) - len(text.lstrip()))
    return [
        line
        for part in text.split("\n")
        for line in textwrap.wrap(
            part,
            max(width, 1),
            subsequent_indent=f"{indent}  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        or [""]
    ]


def size_of(count: float) -> str:
    """Bytes in words.

    >>> size_of(88_000), size_of(300_000_000), size_of(2.5e10)
    ('under 1 MB', '300 MB', '25.0 GB')
    """
    if count < 1e6:
        return "under 1 MB"
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Tells on standard error how far a piece of work is, and how long it will take.

    A terminal gets a bar, with a spinner until the first call, while the model is loaded; elsewhere
    there is a line a minute.

    Args:
        what: What is counted, as `prompts`.

    Yields:
        To be called with (done, all), first before the work begins.
    """
    console = Console(stderr=True)
    if _quiet:
        yield lambda done, total: None
    elif console.is_terminal:
        with _bar(what, console) as advance:
            yield advance
    else:
        work = _Work(what)
        with _line_a_minute(work.line):
            yield work.advance


Say = Callable[[str | None], None]
"""Goes on with another piece of work of that name; None: with none."""


@contextmanager
def status(what: str) -> Iterator[Say]:
    """A spinner on standard error, or a line a minute where that is no terminal.

    Args:
        what: Is done first.

    Yields:
        Changes what is done; None ends the spinner, as the first word of an answer must.
    """
    console = Console(stderr=True)
    if _quiet:
        yield lambda what: None
    elif console.is_terminal:
        with console.status(Text(what)) as spinner:

            def spin(what: str | None) -> None:
                if what is None:
                    spinner.stop()
                else:
                    spinner.update(Text(what))
                    spinner.start()

            yield spin
    else:
        stage = _Stage(what)
        with _line_a_minute(stage.line):
            yield stage.begin


class _Stage:
    """What is done, and since when, for lines."""

    def __init__(self, what: str | None) -> None:
        self.begin(what)

    def begin(self, what: str | None) -> None:
        """Takes what `status` yields."""
        self._what, self._started = what, time.monotonic()

    def line(self) -> str | None:
        """What is done now; None for nothing."""
        spent = duration_of(time.monotonic() - self._started)
        return None if self._what is None else f"{self._what}: {spent}"


@contextmanager
def _bar(what: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        *(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20)),
        *(MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    with Progress(*columns, console=console) as bar:
        task, begun = bar.add_task(_LOADING, total=None), False

        def advance(done: int, total: int) -> None:
            nonlocal task, begun
            if not begun:
                # A task of its own, so that no time told is that of loading.
                bar.remove_task(task)
                task, begun = bar.add_task(what, total=total, completed=done), True
            bar.update(task, completed=done, total=total)

        yield advance


class _Work:
    """How far a piece of work is, for lines."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._started = time.monotonic()
        self._first = self._done = self._total = 0

    def advance(self, done: int, total: int) -> None:
        """Takes what `progress` yields."""
        if not self._total:
            self._started, self._first = time.monotonic(), done
        self._done, self._total = done, total

    def line(self) -> str:
        """How far it is now."""
        spent = time.monotonic() - self._started
        if not self._total:
            return f"{_LOADING}: {duration_of(spent)}"
        line = f"{self._what}: {self._done} of {self._total}, {duration_of(spent)}"
        if self._done == self._first:
            return line
        left = spent / (self._done - self._first) * (self._total - self._done)
        return f"{line}, about {duration_of(left)} left"


@contextmanager
def _line_a_minute(line: Callable[[], str | None]) -> Iterator[None]:
    """Prints a line a minute on standard error, from a thread."""
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(_LINES_EVERY_S):
            if (text := line()) is not None:
                note(text)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def duration_of(seconds: float) -> str:
    """A time in words, of two units at most."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
