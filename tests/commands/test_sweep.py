from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from shareprefill.artifact import save_artifact
from shareprefill.commands.sweep import sweep_command
from shareprefill.errors import ConfigError, DataError
from shareprefill.evaluation import sweep
from shareprefill.models import load_model
from tests.support.checkpoint import save_checkpoint
from tests.support.tiny import tiny_artifact

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(sweep_command)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    model = load_model(str(save_checkpoint(folder / "model")))
    artifact = replace(tiny_artifact(model), model=str(folder / "model"))
    save_artifact(artifact, folder / "clusters.st")
    return folder


def sp_sweep(folder: Path, *options: object) -> Result:
    places = ("--artifact", folder / "clusters.st", "--model", folder / "model")
    small = (*places, "--length", 400, "--samples", 1)
    return CliRunner().invoke(app, [*map(str, small), *map(str, options)])


def test_a_table_and_files(folder: Path, tmp_path: Path) -> None:
    values = ("--gamma", 0.9, "--gamma", 0.5, "--gamma", 0.7)
    options = (*values, "--tasks", "perplexity", "--max-density", 1, "--out", tmp_path, "--html")
    result = sp_sweep(folder, *options)
    assert result.exit_code == 0, result.output
    assert "gamma, over all tasks" in result.stdout
    assert "recall against effective density" in result.stdout
    values = json.loads((tmp_path / "sweep.json").read_text())
    assert values["curves"][0]["values"] == [0.5, 0.7, 0.9]
    assert "<svg" in (tmp_path / "sweep.html").read_text()
    assert json.loads(sp_sweep(folder, *options, "--json").stdout) == values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "at least one value"),
        (("--k", 3), "name its folder with --calibration"),
        (("--k", 3, "--calibration", "x"), "does not say how it was clustered"),
        (("--slack", 0.2, "--html"), "--html needs a folder"),
        (("--tau", 0.2), "use slack"),
    ],
)
def test_bad_options(folder: Path, options: tuple, message: str) -> None:
    result = sp_sweep(folder, *options)
    with pytest.raises(ConfigError, match=message):
        raise result.exception or AssertionError(result.output)


def test_fresh_forgets_outcomes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def forgetting(*_: object, fresh: bool, **__: object) -> None:
        given.append(fresh)
        raise DataError("enough")

    monkeypatch.setattr(sweep, "sweep", forgetting)
    for option in ("--resume", "--fresh"):
        sp_sweep(folder, "--slack", 0.2, "--out", tmp_path, option)
    assert given == [False, True]


def test_results_of_another_model_are_not_replaced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"context": {"model": "other", "weights": "0f"}}')
    result = sp_sweep(folder, "--slack", 0.2, "--out", tmp_path)
    with pytest.raises(DataError, match="results of another model, other"):
        raise result.exception or AssertionError(result.output)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]
