"""`import shareprefill`: its names, its functions, what its objects print, and the notebooks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import shareprefill
from shareprefill.artifact import Policy
from shareprefill.errors import ConfigError, DataError
from shareprefill.policies import BlockPolicy
from shareprefill.runtime.policies.streaming import Streaming
from tests.support.evaluations import dense_cell, made_cell, made_evaluation
from tests.support.notebooks import code_cells, run_notebook
from tests.support.tiny import tiny_artifact, tiny_llama, token_ids

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"
P, S, R = Policy.PIVOT, Policy.SHARE, Policy.SAMPLED


def test_names_are_found_on_first_use() -> None:
    assert shareprefill.RuntimeConfig(gamma=0.5).gamma == 0.5
    assert shareprefill.testing.check_policy is not None
    with pytest.raises(AttributeError, match="has no attribute 'share_prefil'"):
        shareprefill.share_prefil  # noqa: B018


@torch.no_grad()
def test_a_session_and_its_report_are_a_few_lines() -> None:
    model = tiny_llama()
    artifact = tiny_artifact(model, [[P, S, R, R]] * 3)
    options = {"gamma": 0.6, "min_tokens": 0, "max_density": 1.0}
    with shareprefill.share_prefill(model, artifact, measure_recall=True, **options) as session:
        assert "3 layers of 4 heads, entered" in repr(session)
        model(input_ids=token_ids(1, 160))
        model(input_ids=token_ids(1, 8))
    assert "policy 'auto', artifact of 'tiny', blocks of 16 tokens" in repr(session)
    assert "planned: 3 pivot, 3 share, 6 sampled" in repr(session)
    assert repr(artifact).splitlines()[1] == "heads: 3 pivot, 3 share, 6 sampled"
    report = session.report()
    lines = report.summary().splitlines()
    assert lines[0] == "1 sparse prefill, 1 dense"
    assert lines[1].startswith(f"density {report.density:.3f}, selection work 0.")
    assert lines[3].startswith("recall: mean 0.")
    assert report.summary() in repr(report)
    # NaN, as of heads that share nothing, is no JSON.
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (values["prefills"], values["layers"][0]["covered"][2]) == (1, None)
    assert report._repr_html_().count("<tr>") == 1 + 3


@torch.no_grad()
def test_what_ran_dense_says_why() -> None:
    model = tiny_llama()
    with shareprefill.share_prefill(model, policy="flex", min_tokens=500) as session:
        model(input_ids=token_ids(1, 160))
        with session.dense():
            model(input_ids=token_ids(1, 160))
    lines = session.report().summary().splitlines()
    assert lines[0] == "0 sparse prefills, 1 dense, 1 dense as asked for"
    why = "no prefill was sparse: prompts were below min_tokens (500), or masks not causal"
    assert lines[2] == why


def test_an_evaluation_is_a_line_a_policy() -> None:
    found = made_evaluation([dense_cell(), made_cell(policy="<flex>")])
    lines = found.summary().splitlines()
    assert [line.split("  ")[0] for line in lines[1:3]] == ["policy", "dense"]
    assert lines[3].startswith("<flex>")
    assert found.summary() in repr(found)
    assert "&lt;flex&gt;" in found._repr_html_()


def test_options_are_the_fields_of_the_configurations(tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(ConfigError, match=r"no option 'smaples' \(did you mean 'samples'\?\)"):
        shareprefill.calibrate("sp-tiny", out=tmp_path, smaples=3)
    with pytest.raises(ConfigError, match="target_recall = 2"):
        shareprefill.cluster(tmp_path, target_recall=2)
    with pytest.raises(DataError):
        shareprefill.cluster(tmp_path / "nothing", out=tmp_path / "clusters.st")
    assert not (tmp_path / "clusters.st").exists()
    with pytest.raises(ConfigError, match="policy 'auto' needs an artifact"):
        shareprefill.evaluate(model="sp-tiny")
    with pytest.raises(ConfigError, match="write yours with save_artifact"):
        shareprefill.evaluate(tiny_artifact(model))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="retr_vk"):
        shareprefill.evaluate(model="sp-tiny", policies=Streaming(), tasks="retr_vk")


@pytest.mark.parametrize("name", ["first-steps", "add-and-compare-a-policy"])
def test_notebooks_run(name: str) -> None:
    path = NOTEBOOKS / f"{name}.ipynb"
    names, printed = run_notebook(path)
    cells = code_cells(json.loads(path.read_text("utf-8")))
    assert [bool(text) for text in printed] == [bool(cell["outputs"]) for cell in cells]
    session: Any = names["session"]
    assert session.report().prefills == 1
    policies = [cell.policy for cell in names["found"].cells]
    if name == "first-steps":
        assert policies == ["dense", "auto"]
        assert sum(names["artifact"].policy_counts().values()) == names["artifact"].heads
    else:
        assert policies[:2] == ["dense", "notebook:Strided:stride=2"]
        assert issubclass(names["Strided"], BlockPolicy)
