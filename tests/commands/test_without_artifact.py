"""`sp run` and `sp eval` on a model that was never calibrated."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from shareprefill.artifact import save_artifact
from shareprefill.commands.evaluate import eval_command
from shareprefill.commands.run import run_command
from shareprefill.commands.sweep import sweep_command
from shareprefill.models import load_model, warn_once
from tests.support.checkpoint import save_checkpoint
from tests.support.tiny import tiny_artifact

app = typer.Typer(pretty_exceptions_enable=False)
app.command("run")(run_command)
app.command("eval")(eval_command)
app.command("sweep")(sweep_command)
POLICY = """
import torch

from shareprefill.policies import BlockPolicy


class FirstBlock(BlockPolicy):
    def blocks(self, layer, gamma):
        first = torch.arange(layer.geometry.shape[1], device=layer.query.device) < 1
        return first.expand(len(layer.query), *layer.geometry.shape)

    def work(self, inputs):
        return 0.0
"""
RUN = ("run", "prompt.txt", "--model", "model", "--min-tokens", "0", "--max-new-tokens", "1")
EVAL = ("eval", "--model", "model", "--tasks", "perplexity", "--lengths", "700", "--samples", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uncalibrated")
    save_checkpoint(folder / "model")
    (folder / "first_block.py").write_text(POLICY)
    (folder / "prompt.txt").write_text("A line of text that is read. " * 60)
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    warn_once.cache_clear()


def sp(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_run_takes_a_policy_without_an_artifact(caplog: pytest.LogCaptureFixture) -> None:
    result = sp(*RUN, "--policy", "smoothed", "--gamma", 0.5, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["policies"].keys() <= {"smoothed", "dense"}
    assert caplog.text.count("A calibration plans every head") == 1
    assert "not fitted to this model" in caplog.text


def test_eval_compares_policies_without_an_artifact(folder: Path, tmp_path: Path) -> None:
    policies = "streaming:sink_blocks=1,local_blocks=2,first_block:FirstBlock"
    options = (*EVAL, "--policies", policies, "--max-density", 1, "--no-measure")
    result = sp(*options, "--out", tmp_path, "--html", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["config"]["artifact"] is None
    densities = {cell["policy"]: cell["density"]["value"] for cell in found["cells"]}
    named, outside = policies.rsplit(",", 1)
    assert densities.keys() == {"dense", named, outside}
    # Both read the first block and the last two of every query block.
    assert densities[named] == densities[outside] < 1
    assert named in (tmp_path / "evaluation.html").read_text()
    # The outcomes of a policy's file are not those of another one, once that one is loaded.
    kept = (tmp_path / "outcomes.jsonl").read_text().count("\n")
    (folder / "first_block.py").write_text(POLICY + "\n# changed\n")
    for more in (0, 1):
        assert sp(*options, "--out", tmp_path).exit_code == 0
        assert (tmp_path / "outcomes.jsonl").read_text().count("\n") == kept + more
        sys.modules.pop("first_block")


def test_sweep_varies_gamma_without_an_artifact() -> None:
    values = ("--gamma", 0.3, "--gamma", 0.9, "--max-density", 1)
    options = ("--model", "model", "--tasks", "perplexity", "--length", 700, "--samples", 1)
    result = sp("sweep", *options, "--policy", "smoothed", *values, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["context"]["artifact"] is None
    low, high = (point["density"] for point in found["curves"][0]["points"])
    assert 0 < low < high <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (RUN, "policy 'auto' needs an artifact, and there is no clusters.st in this folder"),
        (("run", "prompt.txt", "--policy", "flex"), "name a model with --model"),
        ((*RUN, "--policy", "flex", "--trace", "t.html"), "--trace shows what an artifact planned"),
        ((*EVAL, "--policies", "flex,share"), "policy 'share' needs an artifact"),
        ((*EVAL, "--policies", "flix"), "did you mean 'flex'"),
        ((*RUN, "--policy", "first_block:Frist"), r"has no Frist"),
        (("sweep", "--model", "model", "--gamma", "0.5"), "policy 'auto' needs an artifact"),
        (("sweep", "--model", "m", "--policy", "flex", "--k", "2"), "name the artifact"),
        ((*EVAL, "--policies", "first_block:FirstBlock:n=1"), "has no parameter 'n'"),
    ],
)
def test_what_is_missing_is_named(arguments: tuple[str, ...], message: str) -> None:
    result = sp(*arguments)
    assert message in str(result.exception)


def test_the_folder_s_artifact_is_read_where_it_is_of_the_model(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = tiny_artifact(load_model(str(folder / "model")))
    for name, is_read in (("model", True), ("another", False)):
        save_artifact(replace(artifact, model=name), folder / "clusters.st")
        caplog.clear()
        result = sp(*RUN, "--policy", "smoothed", "--json")
        assert result.exit_code == 0, result.output
        assert ("A calibration plans" not in caplog.text) == is_read
        assert ("of the model another and not read" not in result.stderr) == is_read
    (folder / "clusters.st").unlink()
