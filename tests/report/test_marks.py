from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from shareprefill.commands.options import require_same
from shareprefill.errors import DataError
from shareprefill.report.drawing import figure_file, figure_style
from shareprefill.report.marks import EVALUATION, mark_of, read_mark
from shareprefill.report.page import Page

NAMES = ["sp-tiny", 'a"&<b>\n', "mod\u00e8le \u6a21\u578b", "\ud800", "x" * 300]


def written(kind: str, mark: str) -> bytes:
    """A page or a figure, as bytes."""
    if kind == "html":
        return Page("t", mark=mark).html().encode()
    with figure_style():
        return figure_file(Figure(figsize=(1, 1)), kind, mark)


@pytest.mark.parametrize("kind", ["html", "svg", "png"])
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_what_is_written_is_read(kind: str, name: str) -> None:
    data = written(kind, mark_of(EVALUATION, name))
    assert read_mark(data[: 1 << 16]) == mark_of(EVALUATION, name)


@pytest.mark.parametrize("kind", ["html", "svg", "png"])
def test_a_page_or_figure_replaces_its_own_alone(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"here.{kind}"
    require_same(path, EVALUATION, "mine", force=False)
    path.write_bytes(written(kind, mark_of(EVALUATION, "mine")))
    require_same(path, EVALUATION, "mine", force=False)
    for what, model, word in (
        (EVALUATION, "other", "holds another one: evaluation of mine"),
        ("audit", "mine", "holds another one: evaluation of mine"),
    ):
        with pytest.raises(DataError, match=word):
            require_same(path, what, model, force=False)
        require_same(path, what, model, force=True)
    for content in (written(kind, ""), b"notes", b"\x89PNG\r\n\x1a\ncut"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="of another kind: use --force"):
            require_same(path, EVALUATION, "mine", force=False)
