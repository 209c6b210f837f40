from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from shareprefill.report.drawing import (
    MARKERS,
    SERIES,
    figure_style,
    legend_figure,
    plain_label,
    value_png,
)
from shareprefill.report.grids import Cell, Grid
from shareprefill.report.page import Page, Picture
from tests.report.browser import Browser, running_browser

HOSTILE = "</style><script>alert(1)</script><img src=x onerror=alert(2)>'\"&$x^$\u202e\x00\ud800"


def hostile_page() -> Page:
    page = Page(HOSTILE, HOSTILE)
    page.heading(HOSTILE)
    page.heading(HOSTILE, level=3)
    page.text(HOSTILE)
    page.note(HOSTILE)
    page.warning(HOSTILE)
    page.table([HOSTILE, "n"], [[HOSTILE, HOSTILE]], caption=HOSTILE)
    with figure_style():
        figure = Figure(figsize=(8, 3), layout="constrained")
        left, right = figure.subplots(1, 2)
        for number, (colour, marker) in enumerate(zip(SERIES, MARKERS, strict=True)):
            left.plot([0, 1], [number, 1], color=colour, marker=marker, label=plain_label(HOSTILE))
        left.legend()
        left.set_title(plain_label(HOSTILE))
        right.imshow(np.arange(12.0).reshape(3, 4))
        right.bar([0, 1], [2, 1], hatch="//")
        page.figure(figure, caption=HOSTILE, alt=HOSTILE)
        page.panels([figure, legend_figure(*left.get_legend_handles_labels())], HOSTILE, HOSTILE)
        page.figure(figure, caption="again")
    page.verdict(HOSTILE, is_good=True)
    cell = Cell("#2f9fd8", HOSTILE, "<&", target="row")
    page.grids([Grid(HOSTILE, ["<l>"], [[cell] * 9], [("#fff", 0.5, HOSTILE)], HOSTILE)])
    with page.details(HOSTILE):
        page.pictures([Picture(HOSTILE, [(value_png(np.eye(4), np.eye(4) > 0), HOSTILE)])])
        page.table(["a", HOSTILE, "c", "d", "e"], [["x"] * 5], names=["row"])
    return page


@functools.cache
def hostile_html() -> str:
    return hostile_page().html()


class _Reader(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def cells(page: Page) -> list[str]:
    return re.findall(r"<td[^>]*>(.*?)</td>", page.html())


def test_hostile_text_stays_text() -> None:
    html = hostile_html()
    html.encode()  # a lone surrogate would raise
    read = _Reader(html)
    assert not read.of("script")
    assert [image["src"][:22] for image in read.of("img")] == ["data:image/png;base64,"]
    assert len(read.of("style")) == 1
    assert not [a for _, a in read.elements if "style" in a or any(k.startswith("on") for k in a)]
    assert read.words.count("<script>alert(1)</script>") >= 9 + 2 * 9  # texts, and two drawings
    assert "\u202e" not in html
    assert "\x00" not in html
    drawing = read.of("svg")[0]
    assert (drawing["aria-label"] or "").startswith("</style><script>alert(1)</script>")
    assert drawing["role"] == "img"


def test_the_policy_allows_the_style_sheet_and_nothing_else() -> None:
    html = hostile_html()
    style = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    metas = _Reader(html).of("meta")
    policy = next(m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy")
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    assert not re.search(r"https?://", html)
    assert "@import" not in style


def test_equal_input_gives_equal_bytes() -> None:
    page = hostile_page()
    assert page.html() == page.html() == hostile_html()


def test_ids_are_unique_and_references_are_met() -> None:
    html = hostile_html()
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    wanted = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html)
    assert len(wanted) > 4
    assert {a or b for a, b in wanted} <= set(ids)


def test_sections_are_listed() -> None:
    page = Page("t")
    page.heading("One")
    page.heading("Inner", level=3)
    page.heading("Two")
    assert re.findall(r'<li><a href="#([^"]+)">(.*?)</a>', page.html()) == [
        ("section-1", "One"),
        ("section-2", "Two"),
    ]
    assert '<h2 id="section-2">Two</h2>' in page.html()
    assert "<h3>Inner</h3>" in page.html()


def test_cells() -> None:
    page = Page("t")
    page.table(
        ["name", "text", "count", "share", "interval"],
        [["a", "12 heads", 1, 0.12345, "0.10 ± 0.02"], ["b", "7", None, 1.0, "−3 %"]],
        caption="c",
    )
    assert cells(page) == [
        *("12 heads", "1", "0.123", "0.10 ± 0.02"),
        *("7", "–", "1.000", "−3 %"),
    ]
    kinds = [a.get("class") for a in _Reader(page.html()).of("td")]
    assert kinds == [None, *["number"] * 3, None, "number empty", "number", "number"]


def test_a_drawing_follows_the_scheme_and_has_no_fonts_of_its_own() -> None:
    page = Page("t")
    with figure_style():
        figure = Figure(figsize=(3, 2), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1])
        axes.set_xlabel("a label")
        page.figure(figure, alt="a line")
    html = page.html()
    assert "stroke: var(--muted)" in html
    assert "fill: var(--ink)" in html
    assert "DejaVu" not in html.split("</style>")[1]
    assert ">a label</text>" in html
    assert '<svg viewBox="0 0 216 144" width="288" height="192"' in html


def test_settings_of_matplotlib_are_restored() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with figure_style():
        assert matplotlib.rcParams["svg.fonttype"] == "none"
    hostile_page()
    assert dict(matplotlib.rcParams) == before


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running_browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (400, False), (1200, True)])
def test_a_browser_shows_it(tmp_path: Path, browser: Browser, width: int, dark: bool) -> None:
    path = tmp_path / "page.html"
    path.write_text(hostile_html(), encoding="utf-8")
    shown = browser.render(path, width, dark=dark)
    assert shown.complaints == []
    assert all(address.startswith("data:image/png") for address in shown.requests)
    assert shown.width == width
    assert shown.wide == []
    assert len(shown.svgs) == 5
    # Two figures and a panel; a legend and a row of heads are lower.
    assert sorted(height for _, height in shown.svgs)[2] > 100
    assert "Warning:" in shown.text
    ground = 21 if dark else 255
    assert shown.share_of(range(ground - 6, min(256, ground + 6))) < 0.95


def test_the_browser_reports_what_is_wrong(tmp_path: Path, browser: Browser) -> None:
    """A script, a fetch, a style attribute and a wide element, put into a page by force."""
    bad = (
        "<script>alert(1)</script><img src='http://127.0.0.1:9/x.png'>"
        "<p style='color:red'>x</p><div><svg width=1500 height=9></svg></div>"
    )
    path = tmp_path / "bad.html"
    path.write_text(hostile_html().replace("<main>", f"<main>{bad}", 1), encoding="utf-8")
    shown = browser.render(path, 400)
    complaints = "\n".join(shown.complaints)
    for directive in ("script-src", "img-src", "style-src"):
        assert directive in complaints
    assert shown.width > 400
    assert "svg" in shown.wide


def test_columns_of_numbers_are_set_flush_right() -> None:
    page = Page("t")
    page.table(
        ["name", "kl", "words"], [["a", "8.6e-05 [1e-05, 0.001]", "4 heads"], ["b", "0.2", "x"]]
    )
    html = page.html()
    assert '<th scope="col" class="number">kl</th><th scope="col">words</th>' in html
