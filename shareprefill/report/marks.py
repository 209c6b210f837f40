"""What a page or a figure is of: written into it, and read before another one takes its place."""

from __future__ import annotations

import html
import io
import re

from shareprefill.files import printable

MARK = "shareprefill"
"""The name that a page has it under, and what it begins with in a figure."""

AUDIT, EVALUATION, LOAD, SWEEP, TRACE = "audit", "evaluation", "load", "sweep", "trace"
"""Kinds of pages and figures."""

_IN_TEXT = (
    re.compile(rf'<meta name="{MARK}" content="([^"]*)">'),
    re.compile(rf"<dc:title>{MARK}: ([^<]*)</dc:title>"),
)
_PNG = b"\x89PNG"


def mark_of(kind: str, model: str) -> str:
    """What a file is of, in one line.

    >>> mark_of("audit", "sp-tiny")
    'audit of sp-tiny'
    """
    return f"{kind} of {printable(model)}"


def read_mark(start: bytes) -> str | None:
    """What a page, an SVG or a PNG is of; None where it does not say.

    Args:
        start: The first 64 KiB of the file, or all of it.
    """
    if start.startswith(_PNG):
        return _of_png(start)
    text = start.decode("utf-8", errors="replace")
    found = next((match for pattern in _IN_TEXT if (match := pattern.search(text))), None)
    return None if found is None else html.unescape(found[1])


def _of_png(start: bytes) -> str | None:
    from PIL import Image

    try:
        # No pixel is decoded: texts stand before them.
        title = Image.open(io.BytesIO(start), formats=["PNG"]).info.get("Title")
    except (OSError, SyntaxError, ValueError):
        return None
    if not isinstance(title, str) or not title.startswith(f"{MARK}: "):
        return None
    return title.removeprefix(f"{MARK}: ")
