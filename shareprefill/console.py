"""What all commands print with: one table printer, lines of prose, progress bars."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_GAP = 2  # between two columns
_quiet = False
_NARROWEST_PROSE = 16
_FIGURE = re.compile(r"[-+.]?\d|-$")


def set_quiet(quiet: bool) -> bool:
    """Whether standard error gets nothing but errors from now on; returns how it was."""
    global _quiet
    was, _quiet = _quiet, quiet
    return was


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
        _show_columns(columns, rows, shown, widths)
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
    columns: Sequence[str], rows: Sequence[Sequence[str]], shown: Sequence[int], widths: list[int]
) -> None:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
    for number, size in zip(shown, widths, strict=True):
        is_figure = number > 0 and all(_FIGURE.match(row[number]) for row in rows if row[number])
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


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, silent where that is no terminal; yields its (done, all) setter."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=_quiet or not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def status(what: str) -> Iterator[None]:
    """A spinner on stderr, silent where that is no terminal."""
    console = Console(stderr=True)
    if _quiet or not console.is_terminal:
        yield
        return
    with console.status(what):
        yield
