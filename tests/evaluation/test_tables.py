from __future__ import annotations

import re

import pytest

from shareprefill.evaluation.pages import frontier_figure
from shareprefill.evaluation.results import Cell, Evaluation
from shareprefill.evaluation.statistics import Estimate
from shareprefill.evaluation.tables import markdown
from shareprefill.report.drawing import figure_file
from tests.support.evaluations import dense_cell, made_cell, made_evaluation, perplexity_cells


def frontier_cells(policies: tuple[str, ...], length: int = 512) -> list[Cell]:
    """Two tasks, two gammas a policy."""
    return [
        made_cell(
            task=task,
            length=length,
            policy=policy,
            settings={"gamma": gamma},
            recall=Estimate(recall),
            density=Estimate(gamma / 2),
        )
        for task, recall in (("retr_kv", 0.8), ("code_run", 0.9))
        for policy in policies
        for gamma in (0.5, 0.9)
    ]


def evaluation_of(*policies: str, lengths: tuple[int, ...] = (512,)) -> Evaluation:
    cells = [dense_cell(length=length) for length in lengths]
    for length in lengths:
        cells += frontier_cells(policies, length)
    return made_evaluation(cells)


def test_the_plot_has_every_policy_at_its_means() -> None:
    figure = frontier_figure(evaluation_of("oracle", "flash", "auto", lengths=(512, 1024)))
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["512 tokens", "1024 tokens"]
    lines = {str(line.get_label()): line for line in figure.axes[1].get_lines()}
    assert {"oracle", "flash", "auto"} <= set(lines)
    # The oracle's own selection work is left out, as it is a bound.
    assert list(lines["oracle"].get_xdata()) == pytest.approx([0.25, 0.45])
    assert list(lines["flash"].get_xdata()) == pytest.approx([0.27, 0.47])
    assert list(lines["flash"].get_ydata()) == pytest.approx([0.85, 0.85])


def test_the_plot_has_divergence_and_perplexity_where_they_were_measured() -> None:
    cells = [dense_cell(), perplexity_cells()[0]]
    for density, kl in ((0.2, 0.01), (0.4, 0.001)):
        own = {"settings": {"gamma": density}, "density": Estimate(density)}
        cells += [made_cell(**own, kl=Estimate(kl)), perplexity_cells(**own)[1]]
    figure = frontier_figure(made_evaluation(cells))
    labels = ["recall", "KL from dense, nats", "perplexity against dense"]
    assert [panel.get_ylabel() for panel in figure.axes] == labels
    recall, kl, perplexity = figure.axes
    assert (recall.get_yscale(), kl.get_yscale()) == ("linear", "log")
    (line,) = kl.get_lines()
    assert list(line.get_xdata()) == pytest.approx([0.22, 0.42])
    assert list(line.get_ydata()) == pytest.approx([0.01, 0.001])
    assert list(perplexity.get_lines()[0].get_ydata()) == pytest.approx([0.015, 0.015])


def test_policies_beyond_the_colours_look_different() -> None:
    figure = frontier_figure(evaluation_of("oracle", *(f"policy {n}" for n in range(12))))
    lines = figure.axes[0].get_lines()[:13]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(looks) == 13


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_an_equal_plot_is_an_equal_file(kind: str) -> None:
    one, other = (
        figure_file(frontier_figure(evaluation_of("oracle", "auto")), kind) for _ in range(2)
    )
    assert one == other
    assert one != figure_file(frontier_figure(evaluation_of("oracle", "flash")), kind)
    assert len(one) < 100_000
    if kind == "svg":
        assert b">oracle</text>" in one
    else:
        assert one.startswith(b"\x89PNG")


def test_the_tables() -> None:
    cells = [dense_cell(), *perplexity_cells()]
    for gamma, recall in ((0.8, 0.93), (0.9, 0.97)):
        measured = {"kl": Estimate(0.0123, 0.01, 0.02), "top1_agreement": Estimate(0.987)}
        density = Estimate(gamma - 0.6)
        changes = {"settings": {"gamma": gamma}, "recall": Estimate(recall), "density": density}
        cells.append(made_cell(**changes, **measured))
    text = markdown(made_evaluation(cells))
    titles = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert titles == [
        "Policies, over all tasks and lengths",
        "At a mean recall of 0.95",
        "At equal effective density",
        "Attention error by layer, mean over tasks and lengths",
        "perplexity at 512 tokens against dense attention, by position",
        "All figures",
    ]
    assert "| policy | all | 0 – 255 | 256 – 511 |" in text
    assert "| auto | +1.50% | +1.00% | +2.00% |" in text
    assert "0.750 [0.300, 0.950]" in text
    assert "| 0.012 [0.01, 0.02] | 0.987 |" in text
    assert "| retr_kv | 512 | auto | 0.25 | 0.012 |" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_names_cannot_break_a_table() -> None:
    text = markdown(made_evaluation([dense_cell(task="ruler:a|<b>"), made_cell(task="x")]))
    assert r"ruler:a\|&lt;b&gt;" in text


def test_without_recall_there_are_fewer_tables() -> None:
    bare = made_cell(recall=None, recall_worst=None, layer_errors=())
    text = markdown(made_evaluation([dense_cell(), bare]))
    assert "by layer" not in text
    assert "At a mean recall" not in text
