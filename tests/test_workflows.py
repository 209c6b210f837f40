"""The reusable workflow's steps, run in order in a repository of their own; and a step of ours.

Bash runs what stands under `run`, as GitHub does. The actions that it uses are played by functions
here, `origin` is a bare repository beside it, and pip, gh and the hub's upload are programs on PATH
that write down what they were given. All else is real.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from shareprefill.artifact import load_artifact
from shareprefill.regeneration.jobs import load_jobs

ROOT = Path(__file__).parents[1]
MODELS_FILE = ROOT / "artifacts" / "models.toml"
JOBS = yaml.safe_load((ROOT / ".github" / "workflows" / "regenerate.yml").read_text("utf-8"))
MODELS = """
[[model]]
name = "sp-tiny"
artifact = "made/sp-tiny.st"
lengths = [128]
samples = 3
data = ["text"]
block_size = 32
train = { epochs = 1 }
cluster = { k = 2 }
"""
# `python` makes environments that hold it and `sp`, and installs nothing.
PYTHON = """#!/bin/sh
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$(dirname "$0")/sp" "$3/bin" ;;
  "-m pip") echo "pip $*" >> "$CALLS" ;;
  *) exit 9 ;;
esac
"""
SP = """#!/bin/sh
case "$1" in
  push) echo "sp $*" >> "$CALLS" ;;
  *) exec {python} -m shareprefill "$@" ;;
esac
"""
GH = """#!/bin/sh
echo "gh $*" >> "$CALLS"
if [ "$2" = list ]; then cat "$OPEN_REQUESTS"; fi
"""


class Runner:
    """A machine that runs jobs of the workflow."""

    def __init__(self, folder: Path, **inputs: str) -> None:
        self.folder = folder
        self.origin = folder / "origin.git"
        self.calls = folder / "calls"
        self.open_requests = folder / "open"
        self.uploads = folder / "uploads"
        self.values = {
            "inputs.models": "artifacts/models.toml",
            "inputs.deliver": "pull-request",
            "inputs.python": "3.12",
            "github.run_id": "1",
            "inputs.hub-repository": "",
            "inputs.version && format('=={0}', inputs.version) || ''": "==0.1.0",
            "matrix.model": "sp-tiny",
            "secrets.hf-token": "",
            "github.token": "t",
        } | {f"inputs.{name.replace('_', '-')}": value for name, value in inputs.items()}
        self._programs()
        self._repository()

    def _programs(self) -> None:
        (self.folder / "bin").mkdir(parents=True)
        sp = SP.format(python=sys.executable)
        for name, text in (("python", PYTHON), ("sp", sp), ("gh", GH)):
            (self.folder / "bin" / name).write_text(text)
            (self.folder / "bin" / name).chmod(0o755)
        for path in (self.calls, self.open_requests):
            path.write_text("")

    def _repository(self) -> None:
        self.git("init", "--quiet", "--bare", "--initial-branch=main", str(self.origin))
        start = self.folder / "start"
        self.git("clone", "--quiet", str(self.origin), str(start))
        (start / "artifacts").mkdir()
        (start / "artifacts" / "models.toml").write_text(MODELS)
        self.commit(start)

    def commit(self, clone: Path) -> None:
        """Pushes all that is in a clone to main."""
        who = ("-c", "user.name=n", "-c", "user.email=n@example.com")
        self.git("-C", str(clone), "add", "--all")
        self.git("-C", str(clone), *who, "commit", "--quiet", "--message", "m")
        self.git("-C", str(clone), "push", "--quiet", "origin", "HEAD:main")

    def git(self, *words: str) -> str:
        """What git prints."""
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=True)
        return done.stdout

    def job(self, name: str) -> tuple[int, str]:
        """Runs a job in a folder of its own; returns the last step's status, and what was said."""
        job = JOBS["jobs"][name]
        place = self.folder / f"job-{name}-{len(list(self.folder.iterdir()))}"
        place.mkdir()
        said = ""
        for step in job["steps"]:
            if "uses" in step:
                self._use(step["uses"].partition("@")[0], step.get("with", {}), place)
                continue
            done = subprocess.run(
                # As GitHub runs a step that names no shell.
                ["bash", "-e", "-c", step["run"]],
                cwd=place,
                env=self._environment(place, job, step),
                capture_output=True,
                text=True,
                check=False,
            )
            said += done.stdout + done.stderr
            if done.returncode:
                return done.returncode, said
        return 0, said

    def _environment(self, place: Path, job: Any, step: Any) -> dict[str, str]:
        declared = {**JOBS["env"], **job.get("env", {}), **step.get("env", {})}
        files = {"GITHUB_OUTPUT": "output", "GITHUB_STEP_SUMMARY": "summary"}
        return {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RUNNER_TEMP": str(self.folder),
            "CALLS": str(self.calls),
            "OPEN_REQUESTS": str(self.open_requests),
            **{name: str(self.folder / file) for name, file in files.items()},
            **{name: self._evaluated(str(value)) for name, value in declared.items()},
        }

    def _evaluated(self, text: str) -> str:
        return re.sub(r"\$\{\{ (.*?) \}\}", lambda found: self.values[found[1]], text)

    def _use(self, action: str, options: dict[str, Any], place: Path) -> None:
        path = {name: self._evaluated(str(value)) for name, value in options.items()}.get("path")
        if action == "actions/checkout":
            self.git("clone", "--quiet", str(self.origin), str(place))
        elif action == "actions/upload-artifact":
            shutil.copytree(place / str(path), self.uploads)
        elif action == "actions/download-artifact":
            shutil.copytree(self.uploads, place / str(path))
        else:
            # Nothing was kept before, and Python is there.
            assert action in (
                *("actions/setup-python", "actions/cache/restore", "actions/cache/save"),
            )

    def called(self, program: str) -> list[str]:
        """What a program was given, each call a line."""
        lines = self.calls.read_text().splitlines()
        return [line for line in lines if line.startswith(program)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A runner that has listed the models, and made the artifact of the only one."""
    runner = Runner(tmp_path_factory.mktemp("workflow"))
    code, said = runner.job("models")
    assert code == 0, said
    assert (runner.folder / "output").read_text() == 'names=["sp-tiny"]\n'
    code, said = runner.job("regenerate")
    assert code == 0, said
    return runner


@pytest.fixture
def runner(made: Runner, tmp_path: Path) -> Callable[..., Runner]:
    """Makes a runner of its own that has what the models' jobs uploaded."""

    def make(**inputs: str) -> Runner:
        own = Runner(tmp_path / "runner", **inputs)
        shutil.copytree(made.uploads, own.uploads)
        return own

    return make


def test_an_artifact_is_made_and_uploaded(made: Runner) -> None:
    assert made.called("pip") == ["pip -m pip install shareprefill==0.1.0"] * 2
    files = {str(path.relative_to(made.uploads)) for path in made.uploads.rglob("*.*")}
    assert files == {"made/sp-tiny.st", "summary-sp-tiny.md"}
    assert load_artifact(made.uploads / "made" / "sp-tiny.st").model == "sp-tiny"
    summary = (made.folder / "summary").read_text()
    assert "| sp-tiny | updated |" in summary
    assert (made.uploads / "summary-sp-tiny.md").read_text() == summary


def test_a_pull_request_is_opened_then_brought_up_to_date(runner: Callable[..., Runner]) -> None:
    own = runner()
    branch = "shareprefill/artifacts"
    for listed, last in (("", "gh pr create --title"), ("7\n", f"gh pr edit {branch}")):
        own.open_requests.write_text(listed)
        code, said = own.job("pull-request")
        assert code == 0, said
        changed = own.git("-C", str(own.origin), "diff", "--name-only", "main", branch)
        assert changed.split() == ["artifacts/made/sp-tiny.st"]
        assert own.called("gh")[-1].startswith(last)
        assert "| sp-tiny | updated |" in (own.folder / "text.md").read_text()
    subject = own.git("-C", str(own.origin), "log", "-1", "--format=%s", branch)
    assert subject == "Regenerate artifacts with shareprefill==0.1.0\n"


def test_no_pull_request_where_nothing_changed(runner: Callable[..., Runner]) -> None:
    own = runner()
    start = own.folder / "start" / "artifacts"
    shutil.copytree(own.uploads / "made", start / "made")
    own.commit(start.parent)
    code, said = own.job("pull-request")
    assert (code, own.called("gh")) == (0, []), said
    assert (own.folder / "summary").read_text() == "nothing changed\n"
    assert own.git("-C", str(own.origin), "branch", "--list").split() == ["*", "main"]


def test_artifacts_go_to_the_hub(runner: Callable[..., Runner]) -> None:
    own = runner(deliver="hub", hub_repository="org/artifacts")
    assert own.job("hub")[0] == 0
    assert own.called("sp") == [
        "sp push new/made/sp-tiny.st org/artifacts --file sp-tiny.st --force"
    ]


@pytest.mark.parametrize(
    ("inputs", "word"),
    [
        ({"deliver": "ftp"}, "pull-request, hub or none, not ftp"),
        ({"deliver": "hub"}, "deliver: hub needs hub-repository"),
    ],
)
def test_wrong_inputs_are_said_first(tmp_path: Path, inputs: dict[str, str], word: str) -> None:
    own = Runner(tmp_path / "runner", **inputs)
    code, said = own.job("models")
    assert (code, own.calls.read_text()) == (1, "")
    assert word in said


def test_a_wrong_file_of_models_ends_the_first_job(tmp_path: Path) -> None:
    own = Runner(tmp_path / "runner", models="artifacts/missing.toml")
    code, said = own.job("models")
    assert code == 1
    assert "missing.toml" in said
    assert not (own.folder / "output").exists()


def test_our_workflow_makes_the_models_that_are_folders(tmp_path: Path) -> None:
    """Each step says for which model it is, and makes the folder that the file of models names."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "artifacts.yml").read_text("utf-8"))
    steps = {step["if"]: step for step in workflow["jobs"]["regenerate"]["steps"] if "if" in step}
    folders = [j for j in load_jobs(MODELS_FILE) if j.calibrate.model.startswith("./")]
    assert folders
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\nmkdir -p "$2" && echo "$1" > "$2/made-by"\n')
    python.chmod(0o755)
    for job in folders:
        step = steps[f"matrix.model == '{job.name}'"]
        subprocess.run(["bash", "-e", "-c", step["run"]], cwd=tmp_path, check=True)
        made_by = (tmp_path / "artifacts" / job.calibrate.model / "made-by").read_text().strip()
        assert (ROOT / made_by).is_file()


def test_every_job_is_run_here() -> None:
    source = Path(__file__).read_text()
    assert all(f'job("{name}")' in source for name in JOBS["jobs"])
