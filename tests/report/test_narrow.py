"""All pages at 420 pixels: tables and panels are stacked, nothing stands out at the side."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from shareprefill.audit.findings import examine
from shareprefill.audit.page import build_page
from shareprefill.evaluation.pages import evaluation_page, sweep_page
from tests.audit.synthetic import made_up_artifact
from tests.audit.test_trace import page_of, traced
from tests.report.browser import Browser, running_browser
from tests.support.evaluations import dense_cell, made_evaluation, made_sweep, perplexity_cells

WIDTH = 420
_STACKED = 4  # a table of more columns


def of_audit() -> str:
    return build_page(examine(made_up_artifact(3, 8), None)).html()


def of_evaluation() -> str:
    return evaluation_page(made_evaluation([dense_cell(), *perplexity_cells()]))


def of_sweep() -> str:
    return sweep_page(made_sweep({0.01: 0.91, 0.02: 0.95}, knee=0.01))


def of_trace() -> str:
    return page_of(*traced())


PAGES = {"audit": of_audit, "evaluation": of_evaluation, "sweep": of_sweep, "trace": of_trace}


@functools.cache
def page(name: str) -> str:
    """A page, made once."""
    return PAGES[name]()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running_browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("name", PAGES)
def test_markup_and_style_stack(name: str) -> None:
    html = page(name)
    style = html.split("<style>")[1].split("</style>")[0]
    narrow = style.split("@media screen and (max-width:640px){")[1].split("@media")[0]
    assert re.search(r"table\.stacks[^{}]*td[^{}]*\{display:block\}", narrow)
    assert "repeat(auto-fill,minmax(min(18rem,100%),1fr))" in style
    tables = re.findall(r"<table([^>]*)>\s*<thead><tr>(.*?)</tr>", html)
    assert tables
    for attributes, head in tables:
        assert ("stacks" in attributes) == (head.count("<th") > _STACKED)
    # What is wider than the screen shrinks with its panel, or is in a box that scrolls.
    for before, width in re.findall(r'(.{300})<svg[^>]* width="(\d+)"', html, re.DOTALL):
        is_held = re.search(r'class="(?:panel|scroll)"[^>]*>$|class="whole', before)
        assert is_held or int(width) <= WIDTH - 40, width


@pytest.mark.parametrize("name", PAGES)
def test_a_browser_finds_nothing_at_the_side(name: str, browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page(name).replace("<details", "<details open"), encoding="utf-8")
    shown = browser.render(path, WIDTH)
    assert (shown.width, shown.wide, shown.complaints) == (WIDTH, [], [])
