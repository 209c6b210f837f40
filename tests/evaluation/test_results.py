from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from shareprefill.errors import ConfigError, DataError
from shareprefill.evaluation.config import EvalConfig, SweepConfig
from shareprefill.evaluation.results import Cell, load_evaluation, make_cell
from shareprefill.evaluation.runner import Outcome
from shareprefill.evaluation.statistics import Estimate
from tests.support.evaluations import dense_cell, made_cell, made_evaluation, perplexity_cells


def test_an_evaluation_survives_json(tmp_path: Path) -> None:
    evaluation = made_evaluation(
        [dense_cell(), made_cell(settings={"gamma": 0.9}), *perplexity_cells()]
    )
    (tmp_path / "evaluation.json").write_text(evaluation.to_json())
    assert load_evaluation(tmp_path / "evaluation.json") == evaluation
    values = json.loads(evaluation.to_json())
    assert values["schema"] == 1
    assert values["cells"][1]["effective_density"] == pytest.approx(0.32)


def test_summaries_are_means_over_cells_by_policy_and_setting() -> None:
    cells = [
        made_cell(settings={"gamma": 0.9}),
        made_cell(settings={"gamma": 0.9}, length=1024, score=Estimate(0.25)),
        made_cell(settings={"gamma": 0.8}),
        *perplexity_cells(settings={"gamma": 0.9}),
        dense_cell(),
    ]
    dense, high, low = made_evaluation(cells).summaries()
    assert (dense.label, high.label, low.label) == ("dense", "auto, gamma 0.9", "auto, gamma 0.8")
    assert high.accuracy == pytest.approx(0.5)
    assert high.perplexity_change == pytest.approx(0.015)
    assert low.perplexity_change is None
    assert high.attention_error == pytest.approx(0.15)
    assert dense.recall is None
    assert dense.accuracy == 1


def test_no_speedup_where_nothing_was_sparse() -> None:
    outcome = Outcome(1.0, "x", 400, ttft_s=0.5, dense_ttft_s=1.0)
    dense = [outcome] * 3

    def cell(*densities: float) -> Cell:
        outcomes = [replace(outcome, density=density) for density in densities]
        return make_cell("retr_kv", "exact_match", 400, "auto", {}, outcomes, dense)

    assert cell(1.0, 1.0, 1.0).speedup is None
    speedup = cell(1.0, 0.4, 0.5).speedup
    assert speedup is not None
    assert speedup.value == 2
    assert cell(0.4, 0.4, 0.4).kl is None


def test_what_some_prompts_lack_is_no_figure_of_all() -> None:
    whole = Outcome(1.0, "x", 400, ttft_s=0.5, dense_ttft_s=1.0, kl=0.1, density=0.5)
    dense = replace(whole, density=1.0)
    for name in ("ttft_s", "kl"):
        part = replace(whole, **{name: None})
        cell = make_cell("retr_kv", "exact_match", 512, "auto", {}, [whole, part], [dense] * 2)
        assert getattr(cell, name) is None
        assert (cell.ttft_s is None) == (cell.speedup is None)
        assert cell.density.value == 0.5


def test_positions_without_a_token_have_no_perplexity() -> None:
    def read(*bins: float | None) -> Outcome:
        return Outcome(1.0, "", 80, ttft_s=None, dense_ttft_s=None, bins=bins)

    ours, dense = (
        [read(None, 2.0, 3.0, None), read(None, 4.0, None, None)],
        [
            read(None, 1.0, 3.0, None),
            read(None, 3.0, None, None),
        ],
    )
    cell = make_cell("perplexity", "perplexity", 90, "auto", {}, ours, dense)
    # As `position * 4 // 90` says.
    assert [(b.start, b.stop) for b in cell.bins] == [(23, 45), (45, 68)]
    assert [math.log(b.score.value) for b in cell.bins] == pytest.approx([3.0, 3.0])
    assert [b.difference.value for b in cell.bins if b.difference] == pytest.approx(
        [math.expm1(1.0), 0.0]
    )


def test_files_without_the_newer_figures_are_read(tmp_path: Path) -> None:
    evaluation = made_evaluation([dense_cell(), made_cell()])
    values = json.loads(evaluation.to_json())
    for cell in values["cells"]:
        del cell["kl"], cell["top1_agreement"]
    (tmp_path / "old.json").write_text(json.dumps(values))
    assert load_evaluation(tmp_path / "old.json") == evaluation
    del values["cells"][0]["score"]
    (tmp_path / "old.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="damaged"):
        load_evaluation(tmp_path / "old.json")


def test_a_cell_by_name() -> None:
    evaluation = made_evaluation([made_cell(settings={"gamma": g}) for g in (0.8, 0.9)])
    assert evaluation.cell("retr_kv", 512, "auto", gamma=0.9) is evaluation.cells[1]
    with pytest.raises(KeyError, match=r"share, gamma 0\.9"):
        evaluation.cell("retr_kv", 512, "share", gamma=0.9)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 1}', '{"schema": 99}'])
def test_what_is_no_evaluation_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError):
        load_evaluation(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ()}, "tasks = .* at least one"),
        ({"policies": ("flux",)}, "policy = 'flux'"),
        ({"gammas": (1.5,)}, "gamma = 1.5"),
        ({"lengths": (0,)}, "lengths = 0"),
        ({"lengths": (64, 64)}, "without repetitions"),
        ({"samples": 0}, "samples = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"artifact": ""}, "artifact = ''"),
        ({"cut_middle": True, "tasks": ("retr_kv", "perplexity:a.txt")}, "cut_middle is for rows"),
        (
            {"policies": ("dense", "streaming:local_blocks=4"), "gammas": (0.9,)},
            r"gammas = \(0.9,\) does nothing to dense, streaming:local_blocks=4",
        ),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvalConfig(**{"artifact": "a.st", **options})


def test_every_policy_gets_every_gamma_but_those_that_have_none() -> None:
    policies = ("dense", "auto", "shareprefill", "streaming:local_blocks=4")
    config = EvalConfig(artifact="a.st", policies=policies, gammas=(0.8, 0.9))
    assert [(r.policy, r.gamma, r.min_tokens) for r in config.runtimes()] == [
        ("auto", 0.8, 0),
        ("auto", 0.9, 0),
        ("shareprefill", 0.8, 0),
        ("shareprefill", 0.9, 0),
        ("streaming:local_blocks=4", None, 0),
    ]
    assert EvalConfig.from_dict(config.to_dict()) == config
    assert EvalConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "at least one value of slack, tau, delta, gamma, block size or k"),
        ({"ks": (4,)}, "needs the calibration"),
        ({"block_sizes": (48,), "calibrations": ("x",)}, "block_size = 48"),
        ({"gammas": (0.9,), "policy": "dense"}, "policy = 'dense'"),
        ({"gammas": (0.9,), "policy": "streaming"}, "gamma = 0.9 does nothing to policy"),
        ({"gammas": (0.9,), "calibrations": ("c",)}, "calibration is for other block sizes"),
        ({"taus": (2.0,), "policy": "shareprefill"}, "tau = 2.0"),
        ({"taus": (0.2,)}, "tau = 0.2 .* policy 'auto', it is for shareprefill: use slack"),
        ({"slacks": (0.1, 0.1)}, "slacks = .* without repetitions"),
        ({"gammas": (0.9,), "samples": 0}, "samples = 0"),
    ],
)
def test_bad_sweeps(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SweepConfig(**{"artifact": "a.st", **options})
