from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from shareprefill.evaluation.pages import evaluation_page, sweep_page
from shareprefill.evaluation.statistics import Estimate
from tests.support.evaluations import (
    dense_cell,
    made_cell,
    made_evaluation,
    made_sweep,
    perplexity_cells,
)


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


@pytest.mark.parametrize(
    ("changes", "speed", "is_doubtful"),
    [
        ({}, "The first token came 1.20 times as fast as with dense attention.", False),
        ({"speedup": None, "ttft_s": None}, "Times were not measured.", False),
        ({"speedup": None, "density": Estimate(1.0)}, "No prefill was sparse.", True),
        ({"speedup": Estimate(0.9)}, "The first token came 0.90 times as fast", True),
    ],
)
def test_the_verdict_tells_times_where_there_are_some(
    changes: dict[str, Any], speed: str, is_doubtful: bool
) -> None:
    dense, auto = perplexity_cells(**changes)
    auto = replace(auto, difference=Estimate(0.005))
    verdict = evaluation_page(made_evaluation([dense, auto])).split('<div class="verdict')[1]
    assert speed in verdict.split("</div>")[0]
    assert verdict.startswith(" doubtful") == is_doubtful


def test_the_verdict_is_of_sparse_steps_where_prefills_are_dense() -> None:
    steps = {"answer_kl": Estimate(0.02), "decode_density": Estimate(0.25)}
    cells = [dense_cell(), dense_cell(settings={"decode": 0.2}, **steps)]
    verdict = evaluation_page(made_evaluation(cells)).split('<div class="verdict')[1]
    verdict = verdict.split("</div>")[0]
    assert "<p>dense, decode 0.2: " in verdict
    assert "decode steps read 25.0% of the blocks, KL of the answer 0.02 nats a token" in verdict
    assert "nothing to compare" not in verdict
    alone = evaluation_page(made_evaluation([dense_cell()]))
    assert "Dense attention alone was run: there is nothing to compare." in alone


def test_the_verdict_is_of_the_gamma_nearest_to_the_recall() -> None:
    cells = [dense_cell()]
    for gamma, recall in ((0.6, 0.8), (0.8, 0.94), (0.9, 0.99)):
        cells.append(made_cell(settings={"gamma": gamma}, recall=Estimate(recall)))
    verdict = evaluation_page(made_evaluation(cells)).split('<div class="verdict')[1]
    assert "<p>auto, gamma 0.8: " in verdict


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
    html = sweep_page(made_sweep({0.1: 0.5, 0.2: 0.9, 0.3: 0.95, 0.4: 0.96}, knee=0.2))
    assert html.count("<svg") == 4  # two gains, two costs
    assert "recall against effective density" in html
    verdict = html.split('<div class="verdict')[1].split("</div>")[0]
    assert "slack 0.2: 32.0% of dense attention&#39;s work, 90.0% of the attention" in verdict
