"""An evaluation that several processes divide."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shareprefill.artifact import load_artifact, save_artifact
from shareprefill.errors import ArtifactError, ConfigError
from shareprefill.evaluation.config import PERPLEXITY, EvalConfig
from shareprefill.evaluation.questions import Question
from shareprefill.evaluation.results import Cell
from shareprefill.evaluation.runner import PromptJob, artifact_digest
from shareprefill.evaluation.statistics import Estimate
from shareprefill.evaluation.suite import evaluate
from shareprefill.evaluation.workers import WorkerPool
from shareprefill.models import load_model
from tests.support.checkpoint import save_checkpoint
from tests.support.tiny import tiny_artifact, tiny_llama

pytestmark = pytest.mark.slow

PARENT = """
import sys, time
from pathlib import Path
from shareprefill.artifact import load_artifact
from shareprefill.evaluation.config import EvalConfig
from shareprefill.evaluation.runner import artifact_digest
from shareprefill.evaluation.workers import WorkerPool
if __name__ == "__main__":
    asked = EvalConfig(artifact=str(Path(sys.argv[1]) / "clusters.st"), workers=2)
    with WorkerPool(asked, [artifact_digest(load_artifact(asked.artifact))], False) as pool:
        pool.context()
        print("ready", flush=True)
        time.sleep(300)
"""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread in this process, as each of two workers has: more threads sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    save_checkpoint(folder / "model")
    artifact = tiny_artifact(load_model(str(folder / "model")))
    save_artifact(replace(artifact, model=str(folder / "model")), folder / "clusters.st")
    return folder


def config(folder: Path, **changes: Any) -> EvalConfig:
    options = {
        "artifact": str(folder / "clusters.st"),
        "tasks": ("variable_tracking", "perplexity"),
        "policies": ("auto", "sampled"),
        "gammas": (0.7,),
        "lengths": (400,),
        "samples": 3,
        "max_density": 1.0,
    }
    return EvalConfig(**{**options, **changes})


def untimed(cells: tuple[Cell, ...]) -> list[Cell]:
    """Cells without what differs from run to run."""
    return [replace(cell, ttft_s=Estimate(0.0), speedup=None) for cell in cells]


@pytest.mark.usefixtures("one_thread")
def test_two_workers_find_what_one_process_does(folder: Path, tmp_path: Path) -> None:
    told = []
    one = evaluate(config(folder))
    two = evaluate(config(folder, workers=2), out=tmp_path, progress=lambda *s: told.append(s))
    assert untimed(two.cells) == untimed(one.cells)
    assert two.context["workers"] == 2
    assert "workers" not in one.context
    assert told == [(done, 18) for done in range(19)]

    # Three outcomes are lost, as after a kill; the others are used again.
    kept = tmp_path / "outcomes.jsonl"
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:-3]))
    told.clear()
    again = evaluate(config(folder, workers=2), out=tmp_path, progress=lambda *s: told.append(s))
    assert untimed(again.cells) == untimed(two.cells)
    assert told == [(done, 18) for done in range(15, 19)]
    # Times beside another process are not those of one alone.
    told.clear()
    evaluate(config(folder), out=tmp_path, progress=lambda *s: told.append(s))
    assert told[0] == (0, 18)


@pytest.mark.usefixtures("one_thread")
def test_workers_compare_artifacts(folder: Path, tmp_path: Path) -> None:
    plain = load_artifact(folder / "clusters.st")
    save_artifact(replace(plain, gamma=plain.gamma * 0.9), tmp_path / "less.st")
    others = (str(tmp_path / "less.st"),)
    one, two = (
        evaluate(config(folder, tasks=("perplexity",), others=others, workers=workers))
        for workers in (1, 2)
    )
    assert untimed(two.cells) == untimed(one.cells)
    assert two.context["others"] == [artifact_digest(load_artifact(others[0]))]


def test_what_workers_cannot_do_is_told_in_words(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="length = 5000 is beyond the model's maximum of 4096"):
        evaluate(config(folder, workers=2, lengths=(5000,)))
    save_artifact(tiny_artifact(tiny_llama(seed=1)), tmp_path / "other.st")
    other = config(folder, workers=2, artifact=str(tmp_path / "other.st"))
    with pytest.raises(ArtifactError):
        evaluate(replace(other, model=str(folder / "model")))
    with (
        WorkerPool(config(folder, workers=2), ["another digest"], False) as pool,
        pytest.raises(ArtifactError, match="changed while the workers began"),
    ):
        pool.context()


def test_a_killed_worker_is_told_of(folder: Path) -> None:
    asked = config(folder, workers=2)
    with WorkerPool(asked, [artifact_digest(load_artifact(asked.artifact))], False) as pool:
        pool.context()
        for worker in multiprocessing.active_children():
            worker.kill()
        job = PromptJob(Question(torch.arange(9), PERPLEXITY), 400, (0,), warm_up=False)
        with pytest.raises(ConfigError, match=r"a worker ended before .* lower --workers \(2\)"):
            list(pool.run([job]))


def test_what_is_done_is_kept_of_a_long_job(folder: Path) -> None:
    asked = config(folder, workers=2)
    with WorkerPool(asked, [artifact_digest(load_artifact(asked.artifact))], False) as pool:
        pool.context()
        columns = (0,) * 400
        job = PromptJob(Question(torch.arange(300), PERPLEXITY), 400, columns, warm_up=False)
        outcomes = pool.run([job])
        kept = [next(outcomes) for _ in range(8)]
        assert {column for _, column, _ in kept} == {0}
        for worker in multiprocessing.active_children():
            worker.kill()
        with pytest.raises(ConfigError, match="a worker ended"):
            list(outcomes)


def test_workers_end_with_their_parent(folder: Path) -> None:
    script = folder / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
    finally:
        parent.kill()
    # The workers hold the other end of the pipe too: it ends when all of them are gone.
    parent.communicate(timeout=60)
