from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from shareprefill.artifact import Policy
from shareprefill.audit import map_figures
from shareprefill.audit.findings import examine
from shareprefill.audit.page import build_page
from tests.audit.synthetic import clustered, made_up_artifact, made_up_calibration
from tests.report.browser import Browser, running_browser

SECTIONS = [
    "Summary",
    "Recall and density by policy",
    "Codes",
    "Distances within and across clusters",
    "Dendrogram",
    "Heads by layer",
    "Maps",
    "Stability over prompts",
    "Noise",
    "Settings",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_calibration(tmp_path_factory.mktemp("calibration"))


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return build_page(examine(clustered(folder), folder)).html()


def sections(html: str) -> list[str]:
    return [unescape(name) for name in re.findall(r"<h2[^>]*>(.*?)</h2>", html)]


def labels(html: str) -> list[str]:
    return [unescape(label) for label in re.findall(r'<svg[^>]* aria-label="([^"]*)"', html)]


def words(html: str) -> str:
    return unescape(re.sub(r"<[^>]*>", " ", html.split("</style>")[1]))


def test_every_section_is_there(page: str) -> None:
    assert sections(page) == SECTIONS
    found = labels(page)
    for part in (
        "Recall and density of every head by policy",
        "coloured by recall",
        "coloured by density",
        "codes in two dimensions",
        "Histograms of distances",
        "Dendrogram of the heads, cut at",
        "coloured by the cluster of each head",
        "coloured by the policy of each head",
        "Spread of codes over prompts",
    ):
        assert any(part in label for label in found), part
    text = words(page)
    for part in ("made-up", "t-SNE of codes", "PCA of codes", "cut: 3 clusters", "within clusters"):
        assert part in text, part
    assert "--calibration" not in text
    assert "Warning:" not in text


def test_every_cluster_has_its_maps(page: str, folder: Path) -> None:
    findings = examine(clustered(folder), folder)
    assert findings.thumbnails is not None
    for maps in findings.thumbnails.clusters:
        assert f"<h3>Cluster {maps.picked.cluster}</h3>" in page
        name = findings.heads.name(maps.picked.head)
        role = "pivot" if maps.picked.is_pivot else "centre"
        assert f"{role} {name}" in words(page)
        assert f"{maps.loss:.4f}" in words(page)
        for what in ("mean, and its decoded code", "an unseen prompt, and its reconstruction"):
            assert page.count(f'alt="{role} {name}: {what}"') == 2
        assert 'alt="cluster: consensus"' in page


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        ({"budget": 0.7, "max_kl": None}, "planned for a density of 0.7."),
        (
            {"budget": None, "max_kl": 0.01},
            "planned for a KL divergence of 0.01 nats a position.",
        ),
        ({}, "planned for a recall of 0.95 in every head."),
    ],
)
def test_the_verdict_names_the_goal_that_was_given(goal: dict[str, Any], said: str) -> None:
    """Not the recall of a plan by a budget, which nobody asked for."""
    configuration = {"cluster": {"target_recall": 0.95, **goal}}
    artifact = made_up_artifact(2, 3, configuration=configuration)
    page = build_page(examine(artifact)).html()
    assert said in words(page).split("the 6 heads")[0]
    assert ("target 0.95" in page) == (not goal)
    low = replace(artifact, recall=torch.full((2, 3), 0.5))
    assert ('class="verdict doubtful"' in build_page(examine(low)).html()) == (not goal)


def test_the_verdict_comes_first_and_heads_have_their_numbers(page: str, folder: Path) -> None:
    heads = examine(clustered(folder), folder).heads
    first = page.split("<main>")[1][:900]
    assert re.search(r'<div class="verdict[^>]*><p>[\d.]+% of the blocks hold [\d.]+% of', first)
    assert "planned for a recall of 0.8 in every head" in first
    for index in range(heads.count):
        said = f"<title>head {heads.name(index)}: "
        # Recall, density, cluster and policy.
        assert page.count(said) == 4
    recall = f"recall {float(heads.recall[0]):.3f}\ndensity {float(heads.density[0]):.3f}"
    assert recall in unescape(page)


def test_equal_findings_give_equal_bytes(page: str, folder: Path) -> None:
    assert build_page(examine(clustered(folder), folder)).html() == page


def test_without_a_calibration_the_page_says_what_is_missing(tmp_path: Path) -> None:
    html = build_page(examine(made_up_artifact(3, 4), tmp_path / "nowhere")).html()
    assert sections(html) == SECTIONS
    notes = re.findall(r'<div class="note"[^>]*><p>(.*?)</p>', html)
    assert len(notes) == 4  # the whole page's, and those of distances, maps and stability
    assert all("--calibration FOLDER" in note for note in notes)
    assert any("nowhere holds no calibration" in note for note in notes)


def test_hostile_names_stay_text() -> None:
    bad = "</script><script>alert('x')</script>$\\frac$ <img src=x onerror=alert(1)>"
    artifact = made_up_artifact(
        2,
        3,
        model=bad,
        configuration={bad: {bad: bad}, "cluster": {"metric": bad, "target_recall": bad}},
        summary={"held_out_prompts": [bad, [bad]], "held_out_tokens": bad, "cost": bad},
    )
    artifact = replace(artifact, fingerprint=replace(artifact.fingerprint, model_type=bad[:100]))
    html = build_page(examine(artifact)).html()
    assert "<script" not in html
    assert "<img" not in html
    assert "onerror=alert(1)>" not in html
    assert words(html).count("<script>alert('x')</script>") >= 5


def test_left_out_clusters_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_figures, "CLUSTERS_SHOWN", 1)
    findings = examine(clustered(folder), folder)
    _, *hidden = findings.heads.sizes().values()
    html = build_page(findings).html()
    assert html.count("<h3>Cluster ") == 1
    assert f"2 more clusters with {sum(hidden)} heads are left out here" in html


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (1, 130)])
def test_odd_shapes_are_drawn(layers: int, heads: int) -> None:
    artifact = made_up_artifact(layers, heads, families=1)
    artifact.policy.fill_(int(Policy.DENSE))
    artifact.pivot.fill_(-1)
    assert sections(build_page(examine(artifact)).html()) == SECTIONS


@pytest.mark.filterwarnings("error")
def test_extreme_values_are_drawn_and_warned_of() -> None:
    artifact = made_up_artifact(
        2, 3, code=1e37 * torch.randn(2, 3, 8), instability=torch.full((2, 3), 3e38)
    )
    html = build_page(examine(artifact)).html()
    assert '<div class="warning" role="note"><p><strong>Warning:</strong> 100% of the heads' in html


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running_browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def large_page() -> str:
    return build_page(examine(made_up_artifact(12, 32, families=20))).html()


@pytest.mark.parametrize(("which", "width"), [("page", 1200), ("page", 400), ("large_page", 400)])
def test_a_browser_shows_it(
    request: pytest.FixtureRequest, browser: Browser, tmp_path: Path, which: str, width: int
) -> None:
    html = request.getfixturevalue(which)
    path = tmp_path / "audit.html"
    path.write_text(html, encoding="utf-8")
    shown = browser.render(path, width)
    assert shown.complaints == []
    assert all(address.startswith("data:image/png") for address in shown.requests)
    assert (shown.width, shown.wide) == (width, [])
    assert len(shown.svgs) == len(labels(html))
    # Of those, legends are low.
    assert min(min(size) for size in shown.svgs) > 40
    # The tree alone is scrolled.
    assert sum(wide > width for wide, _ in shown.svgs) == (width < 760)
    assert 0.4 < shown.share_of(range(250, 256)) < 0.97
    for section in SECTIONS:
        assert section in shown.text


def test_a_page_about_many_heads_stays_small(large_page: str) -> None:
    assert "Only the last merges are drawn" in large_page
    assert len(large_page) < 1_000_000
