from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from matplotlib.figure import Figure
from typer.testing import CliRunner, Result

from shareprefill.artifact import save_artifact
from shareprefill.commands.evaluate import eval_command
from shareprefill.errors import ArtifactError, ConfigError, DataError
from shareprefill.evaluation import suite
from shareprefill.evaluation.results import load_evaluation
from shareprefill.models import load_model
from shareprefill.policy_names import POLICIES
from shareprefill.report.drawing import figure_file, figure_style
from shareprefill.report.marks import EVALUATION, mark_of, read_mark
from shareprefill.report.page import Page
from tests.support.checkpoint import save_checkpoint
from tests.support.tiny import tiny_artifact

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(eval_command)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    model = load_model(str(save_checkpoint(folder / "model")))
    artifact = replace(tiny_artifact(model), model=str(folder / "model"))
    save_artifact(artifact, folder / "clusters.st")
    return folder


def sp_eval(folder: Path, *options: object) -> Result:
    places = ("--artifact", folder / "clusters.st", "--model", folder / "model")
    small = (*places, "--lengths", 400, "--samples", 1)
    return CliRunner().invoke(app, [*map(str, small), *map(str, options)])


def test_a_table_and_files(folder: Path, tmp_path: Path) -> None:
    options = ("--tasks", "variable_tracking,perplexity", "--policies", "sampled,dense")
    gammas = ("--gamma", 0.5, "--gamma", 0.9)
    files = ("--plot", tmp_path / "frontier.svg", "--markdown", tmp_path / "tables.md")
    (tmp_path / "evaluation.json").write_text("mine")
    (tmp_path / "tables.md").write_text("mine")
    result = sp_eval(folder, *options, *gammas, "--out", tmp_path, "--html", *files, "--force")
    assert result.exit_code == 0, result.output
    for words in ("policies, over all tasks and lengths", "by task", "sampled, gamma 0.5"):
        assert words in result.stdout
    evaluation = load_evaluation(tmp_path / "evaluation.json")
    assert evaluation.config.gammas == (0.5, 0.9)
    assert len(evaluation.cells) == 2 * 3
    assert "<svg" in (tmp_path / "evaluation.html").read_text()
    assert ">sampled</text>" in (tmp_path / "frontier.svg").read_text()
    assert "| sampled, gamma 0.5 |" in (tmp_path / "tables.md").read_text()
    assert read_mark((tmp_path / "frontier.svg").read_bytes()) == f"evaluation of {folder}/model"
    # The same again, from the outcomes that are kept.
    stamp = (tmp_path / "outcomes.jsonl").stat().st_mtime_ns
    again = sp_eval(folder, *options, *gammas, "--out", tmp_path, "--json")
    assert again.stdout == evaluation.to_json()
    assert (tmp_path / "outcomes.jsonl").stat().st_mtime_ns == stamp


def test_fresh_forgets_outcomes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def evaluate(*_: object, fresh: bool, **__: object) -> None:
        given.append(fresh)
        raise DataError("enough")

    monkeypatch.setattr(suite, "evaluate", evaluate)
    for option in ("--resume", "--fresh"):
        sp_eval(folder, "--out", tmp_path, option)
    assert given == [False, True]


@pytest.mark.parametrize("name", ["evaluation.json", "evaluation.html"])
def test_a_folder_in_the_results_place_is_told_before_the_work(
    folder: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).mkdir()
    result = sp_eval(folder, "--out", tmp_path, "--html")
    assert isinstance(result.exception, DataError)
    assert f"{name} is a folder: move it away" in str(result.exception)
    assert not (tmp_path / "outcomes.jsonl").exists()


def test_all_policies_run(folder: Path) -> None:
    result = sp_eval(
        folder, "--tasks", "perplexity", "--policies", "all", "--json", "--max-density", 1
    )
    assert result.exit_code == 0, result.output
    cells = json.loads(result.stdout)["cells"]
    assert {cell["policy"] for cell in cells} == set(POLICIES)
    for cell in cells:
        assert 0 < cell["density"]["value"] <= 1
        if cell["policy"] != "dense":
            assert 0.1 < cell["recall"]["value"] <= 1.0001


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--policies", "flux"), "policy = 'flux'"),
        (("--lengths", "4q"), "lengths = '4q'"),
        (("--tasks", ""), r"tasks = \(\)"),
        (("--html",), "--html needs a folder"),
        (("--plot", "frontier.gif"), "must end in .svg or .png"),
        (("--plot", "frontier.svg", "--no-measure"), "--plot shows recall"),
        (("--workers", 0), "workers = 0"),
    ],
)
def test_bad_options(folder: Path, options: tuple, message: str) -> None:
    result = sp_eval(folder, *options)
    with pytest.raises(ConfigError, match=message):
        raise result.exception or AssertionError(result.output)


def test_a_plot_replaces_no_file_of_another_kind(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.svg").write_text("mine")
    result = sp_eval(folder, "--plot", tmp_path / "notes.svg")
    with pytest.raises(DataError, match="of another kind"):
        raise result.exception or AssertionError(result.output)
    assert (tmp_path / "notes.svg").read_text() == "mine"


def test_a_figure_or_page_of_another_model_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    other = Page("t", mark=mark_of(EVALUATION, "other")).html()
    with figure_style():
        drawn = figure_file(Figure(figsize=(1, 1)), "png", mark_of(EVALUATION, "other"))
    (tmp_path / "evaluation.html").write_text(other)
    (tmp_path / "frontier.png").write_bytes(drawn)
    for options in (("--plot", tmp_path / "frontier.png"), ("--out", tmp_path, "--html")):
        result = sp_eval(folder, *options)
        with pytest.raises(DataError, match="holds another one: evaluation of other: use --force"):
            raise result.exception or AssertionError(result.output)
    assert {path.name for path in tmp_path.iterdir()} == {"evaluation.html", "frontier.png"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"context": {"model": "other", "weights": "0f"}}, "results of another model, other"),
        ({"context": {}}, "no results that can be read"),
        ([1], "no results that can be read"),
    ],
)
def test_results_of_another_model_are_not_replaced(
    folder: Path, tmp_path: Path, content: object, message: str
) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    result = sp_eval(folder, "--out", tmp_path)
    with pytest.raises(DataError, match=message):
        raise result.exception or AssertionError(result.output)
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
    assert json.loads((tmp_path / "evaluation.json").read_text()) == content


@pytest.mark.parametrize("text", ["my notes", "other: 3 prompts of each task and length"])
def test_tables_replace_no_file_of_another_kind(folder: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "tables.md").write_text(text)
    result = sp_eval(folder, "--markdown", tmp_path / "tables.md")
    with pytest.raises(DataError, match="of another kind"):
        raise result.exception or AssertionError(result.output)
    assert (tmp_path / "tables.md").read_text() == text


def test_a_model_that_only_a_file_names_is_not_loaded(folder: Path) -> None:
    result = CliRunner().invoke(app, ["--artifact", str(folder / "clusters.st")])
    with pytest.raises(ArtifactError, match="say --model"):
        raise result.exception or AssertionError("no error")
