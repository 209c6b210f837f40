from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from shareprefill.artifact import load_artifact
from shareprefill.commands.regenerate import regenerate_command
from shareprefill.errors import ConfigError, DataError
from shareprefill.regeneration import pipeline
from shareprefill.regeneration.outcomes import Outcome
from tests.support.checkpoint import save_checkpoint
from tests.support.processes import die

# A callback keeps the command's name with a single command.
app = typer.Typer()
app.command("regenerate")(regenerate_command)
app.callback()(lambda: None)
MODELS = """
[defaults]
data = ["retr_kv", "text"]
lengths = [320]
samples = 3
block_size = 32
target_recall = 0.8
train.epochs = 3
eval = { tasks = ["perplexity"], samples = 1 }

[[model]]
name = "small"
model = "model"
artifact = "committed/small.st"

[[model]]
name = "broken"
model = "no-such-model-folder/x/y"
artifact = "committed/broken.st"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of models in a folder of its own; the current folder is another one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    place = tmp_path / "models"
    save_checkpoint(place / "model")
    (place / "models.toml").write_text(MODELS)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return place


def sp(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["regenerate", *map(str, arguments)])


def test_list_and_bad_selections(folder: Path) -> None:
    found = sp(folder / "models.toml", "--list")
    assert (found.exit_code, json.loads(found.stdout)) == (0, ["small", "broken"])
    assert json.loads(sp(folder / "models.toml", "--list", "--shard", "2/2").stdout) == ["broken"]
    assert isinstance(sp(folder / "models.toml", "--only", "x").exception, ConfigError)
    assert list(Path().iterdir()) == []


def test_options_reach_the_jobs_that_are_selected(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[Any, ...]] = []

    def in_process(job: Any, _path: Path, place: Path, **options: bool) -> Outcome:
        done.append((job.name, place, *options.values()))
        return Outcome(name=job.name, status="equal", artifact="a.st")

    monkeypatch.setattr(pipeline, "_in_process", in_process)
    kept = Path("kept").absolute()
    found = sp(folder / "models.toml", "--work", "kept", "--shard", "2/2", "--update", "--fresh")
    assert found.exit_code == 0, found.output
    assert sp(folder / "models.toml", "--only", "small", "--trust-remote-code").exit_code == 0
    assert done == [
        ("broken", kept / "broken", True, True, False, False),
        ("small", Path("artifacts/regenerated/small").absolute(), False, False, True, False),
    ]
    names = sp(folder / "models.toml", "--list", "--only", "broken").stdout
    assert json.loads(names) == ["broken"]


def test_a_summary_replaces_no_other_file(folder: Path) -> None:
    Path("notes.md").write_text("mine")
    found = sp(folder / "models.toml", "--summary", "notes.md")
    with pytest.raises(DataError, match="notes.md is there and of another kind"):
        raise found.exception or AssertionError(found.output)
    assert [path.name for path in Path().iterdir()] == ["notes.md"]
    assert Path("notes.md").read_text() == "mine"


@pytest.mark.slow
def test_one_model_s_failure_does_not_stop_the_others(folder: Path) -> None:
    committed = folder / "committed" / "small.st"
    text = MODELS.split("[[model]]")
    # The broken one first.
    (folder / "models.toml").write_text("[[model]]".join((text[0], text[2], text[1])))
    found = sp(folder / "models.toml", "--json", "--update", "--summary", "summary.md")
    assert found.exit_code == 1
    broken, small = json.loads(found.stdout)["models"]
    assert (small["status"], broken["status"]) == ("updated", "failed")
    assert "there is no model folder" in broken["lines"][0]
    assert "| small | updated |" in Path("summary.md").read_text()
    assert load_artifact(committed).model == "model"
    kept = Path("artifacts/regenerated/small/artifact.st")
    assert kept.read_bytes() == committed.read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
def test_a_killed_command_leaves_no_worker(folder: Path) -> None:
    code = (
        "import sys, typer; from shareprefill.commands.regenerate import regenerate_command;"
        "app = typer.Typer(); app.command()(regenerate_command); app()"
    )
    command = [sys.executable, "-c", code, str(folder / "models.toml"), "--only", "small"]
    outcome = Path("artifacts/regenerated/small")
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not (outcome / "calibration" / "index.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        workers = _children(process.pid)
        process.kill()
    assert workers
    end = time.monotonic() + 20
    while time.monotonic() < end and any(map(_lives, workers)):
        time.sleep(0.05)
    assert not any(map(_lives, workers))


def _lives(process: int) -> bool:
    return _stat(process)[:1] not in ([], ["Z"])


def _children(parent: int) -> list[int]:
    """Processes that a process has started."""
    every = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return [process for process in every if _stat(process)[1:2] == [str(parent)]]


def _stat(process: int) -> list[str]:
    """State, parent, and more of a process; nothing where it is gone."""
    try:
        # "pid (name) state parent ...", where a name may hold anything.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
def test_a_worker_that_dies_is_an_outcome(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "work_on", die)
    kept = Path("artifacts/regenerated/small/stages.json")
    kept.parent.mkdir(parents=True)
    kept.touch()
    found = sp(folder / "models.toml", "--json", "--fresh")
    assert found.exit_code == 1
    # Nothing is removed by one that does not hold the folder.
    assert kept.exists()
    for model in json.loads(found.stdout)["models"]:
        assert model["status"] == "failed"
        assert "ended with SIGKILL" in model["lines"][0]
