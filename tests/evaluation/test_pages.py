from __future__ import annotations

import re

from shareprefill.evaluation.config import SweepConfig
from shareprefill.evaluation.pages import evaluation_page, sweep_page
from shareprefill.evaluation.results import summarize_cells
from shareprefill.evaluation.statistics import Estimate
from shareprefill.evaluation.sweep import Curve, Sweep
from tests.support.evaluations import dense_cell, made_cell, made_evaluation, perplexity_cells


def test_the_page_of_an_evaluation() -> None:
    cells = [dense_cell(), *perplexity_cells(settings={"gamma": 0.9})]
    for gamma, recall in ((0.8, 0.93), (0.9, 0.97)):
        cells.append(made_cell(settings={"gamma": gamma}, recall=Estimate(recall)))
    html = evaluation_page(made_evaluation(cells))
    # Recall and score: two tasks and a legend each; errors by layer, perplexity by position.
    assert html.count("<svg") == 3 + 3 + 2
    assert "At a mean recall of 0.95" in html
    assert "auto, gamma 0.8" in html
    assert '0.750 <span class="interval">[0.300, 0.950]</span>' in html
    verdict = html.split('<div class="verdict')[1].split("</div>")[0]
    assert "auto, gamma 0.9: 32.0% of dense attention&#39;s work" in verdict
    assert "of the attention" in verdict
    assert "nan" not in html.lower()
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", html)


def test_a_page_without_measured_recall() -> None:
    bare = made_cell(recall=None, recall_worst=None, layer_errors=())
    html = evaluation_page(made_evaluation([dense_cell(), bare]))
    assert html.count("<svg") == 2  # a task and its legend
    assert "At a mean recall" not in html


def test_names_cannot_bring_markup() -> None:
    name = "ruler:<script>$x$.jsonl"
    html = evaluation_page(made_evaluation([dense_cell(task=name), made_cell(task=name)]))
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_the_page_of_a_sweep_marks_the_knee() -> None:
    cells = [dense_cell()]
    values = (0.1, 0.2, 0.3, 0.4)
    for value, recall in zip(values, (0.5, 0.9, 0.95, 0.96), strict=True):
        cell = made_cell(settings={"slack": value}, recall=Estimate(recall))
        cells.append(cell)
    dense, *points = summarize_cells(tuple(cells))
    knees: dict[str, float | None] = {
        f"{gain} against {cost}": 0.2 if gain == "recall" else None
        for gain in ("recall", "accuracy")
        for cost in ("effective_density", "ttft_s")
    }
    curve = Curve("slack", values, tuple(points), knees)
    config = SweepConfig(artifact="a.st", slacks=values)
    context = {"model": "tiny", "device": "CPU", "dtype": "float32"}
    html = sweep_page(Sweep(config, context, dense, (curve,), tuple(cells)))
    assert html.count("<svg") == 4  # two gains, two costs
    assert "recall against effective density" in html
