"""Counts and tables as plain text, and tables as HTML: what commands, Python and notebooks show."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def prompt_count(count: int) -> str:
    """So many prompts, in words.

    >>> prompt_count(1), prompt_count(2)
    ('1 prompt', '2 prompts')
    """
    return f"{count} prompt{'' if count == 1 else 's'}"


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their cells; the first is a name, the others are figures.

    >>> print(text_table(["policy", "recall"], [["flex", "0.91"], ["streaming", "0.7"]]))
    policy     recall
    flex         0.91
    streaming     0.7
    """
    every = [columns, *rows]
    widths = [max(map(len, cells)) for cells in zip(*every, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in every
    )


def html_table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a table of HTML, with its caption on top."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    lines = "<br>".join(map(escape, caption.splitlines()))
    return (
        f'<table><caption style="text-align: left">{lines}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
