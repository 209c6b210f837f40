from __future__ import annotations

import logging
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shareprefill.artifact import load_artifact
from shareprefill.config import CalibrateConfig, ClusterConfig, TrainConfig
from shareprefill.files import locked_folder
from shareprefill.regeneration import worker
from shareprefill.regeneration.jobs import EvalOptions, Job, Tolerances
from shareprefill.regeneration.outcomes import Figures, Outcome
from shareprefill.regeneration.worker import run_job
from tests.support.checkpoint import save_checkpoint, small_calibration


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job whose artifact was written by `--update`, and whose stages are done."""
    folder = tmp_path_factory.mktemp("job")
    options = small_calibration(save_checkpoint(folder / "model"), samples=3)
    made = Job(
        name="small",
        artifact=folder / "committed" / "small.st",
        lengths=(320,),
        calibrate=CalibrateConfig(**options, data=("retr_kv", "text")),
        train=TrainConfig(epochs=3),
        cluster=ClusterConfig(target_recall=0.8),
        evaluation=EvalOptions(tasks=("perplexity",), samples=1),
        tolerances=Tolerances(),
    )
    outcome = run_job(made, folder / "work", update=True)
    assert outcome.status == "updated"
    assert "small.st is missing" in outcome.lines[0]
    return made


def work(job: Job) -> Path:
    return job.artifact.parents[1] / "work"


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by their paths in it."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def run(job: Job, **options: Any) -> Outcome:
    return run_job(job, work(job), **options)


def test_an_unchanged_job_is_equal_and_does_no_stage_again(
    job: Job, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "shareprefill.regeneration")
    done = []
    for module, name in (
        ("shareprefill.calib.pipeline", "capture"),
        ("shareprefill.autoencoder.pipeline", "train"),
        ("shareprefill.clustering.pipeline", "cluster"),
    ):
        monkeypatch.setattr(f"{module}.{name}", lambda *_, name=name, **__: done.append(name))
    run(job)  # evaluates, as --update did not
    assert any("evaluating" in line and "2 of 2 outcomes to do" in line for line in caplog.messages)
    caplog.clear()
    outcome = run(job)
    assert (outcome.status, outcome.lines, outcome.moved, outcome.heads) == ("equal", (), 0, 12)
    stages = ("calibrated", "trained", "clustered", "evaluated")
    assert caplog.messages == [f"small: {stage} already" for stage in stages]
    assert {change.name for change in outcome.changes} >= {"density", "recall", "expected recall"}
    assert done == []


def test_another_threshold_drifts_and_only_its_stage_is_done_again(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shareprefill.calib.pipeline.capture", None)
    monkeypatch.setattr("shareprefill.autoencoder.pipeline.train", None)
    before = job.artifact.read_bytes()
    changed = replace(job, cluster=ClusterConfig(target_recall=0.95))
    outcome = run(changed)
    assert outcome.status == "drifted"
    assert "setting configuration.cluster.target_recall 0.8 -> 0.95" in outcome.lines
    assert any(line.startswith("expected recall 0.") for line in outcome.lines)
    assert job.artifact.read_bytes() == before
    # Figures within the tolerances do not hide a setting.
    wide = Tolerances(accuracy=1, density=1, recall=1)
    outcome = run(replace(changed, tolerances=wide))
    assert outcome.lines == ("setting configuration.cluster.target_recall 0.8 -> 0.95",)
    assert outcome.status == "drifted"


def test_both_artifacts_are_measured(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(_job: Job, artifact: Path, _folder: Path, **_: Any) -> Figures:
        measured.append(artifact)
        return Figures(accuracy=None, density=0.1 * len(measured), recall=None)

    monkeypatch.setattr(worker, "measure", measure)
    outcome = run(replace(job, cluster=ClusterConfig(target_recall=0.95)))
    assert measured == [work(job) / worker.ARTIFACT, job.artifact]
    (density,) = (change for change in outcome.changes if change.name == "density")
    assert (density.before, density.after) == (0.2, 0.1)


def test_code_that_changed_does_its_stages_again(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    digests = {part: worker.code_digest([part]) for part in ("calib", "clustering", "config.py")}
    assert len(set(digests.values())) == 3
    monkeypatch.setattr(worker, "_PACKAGE", tmp_path)
    (tmp_path / "calib").mkdir()
    (tmp_path / "calib" / "a.py").write_text("1")
    first = worker.code_digest(["calib"])
    (tmp_path / "calib" / "a.py").write_text("2")
    assert worker.code_digest(["calib"]) != first


@pytest.mark.parametrize("library", ["numpy", "scipy", "tokenizers", "torch", "transformers"])
def test_another_version_of_a_library_does_stages_again(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = worker.code_digest(["config.py"])
    version = worker.version
    monkeypatch.setattr(worker, "version", lambda name: "0" if name == library else version(name))
    assert worker.code_digest(["config.py"]) != first


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "small.st is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "small.st is not usable"),
    ],
)
def test_without_a_usable_artifact_nothing_is_written_unasked(
    spoil: Any, message: str, job: Job
) -> None:
    good = job.artifact.read_bytes()
    spoil(job.artifact)
    left = job.artifact.read_bytes() if job.artifact.exists() else None
    outcome = run(job)
    assert outcome.status == "missing"
    assert message in outcome.lines[0]
    assert "--update writes it" in outcome.lines[0]
    assert (job.artifact.read_bytes() if job.artifact.exists() else None) == left
    assert run(job, update=True).status == "updated"
    assert job.artifact.read_bytes() == good


def test_an_artifact_of_another_model_is_none(job: Job, tmp_path: Path) -> None:
    from shareprefill.artifact import save_artifact

    loaded = load_artifact(job.artifact)
    other = replace(loaded, fingerprint=replace(loaded.fingerprint, weights="0b" * 32))
    elsewhere = replace(job, artifact=tmp_path / "other.st")
    save_artifact(other, elsewhere.artifact)
    outcome = run(elsewhere)
    assert outcome.status == "missing"
    assert "attention weights differ" in outcome.lines[0]


def test_damaged_stamps_do_everything_again(job: Job) -> None:
    (work(job) / "stages.json").write_text("{")
    before = job.artifact.read_bytes()
    assert run(job).status == "equal"
    assert (work(job) / "artifact.st").read_bytes() == before


@pytest.mark.parametrize("fresh", [False, True])
def test_a_second_process_fails_clearly_and_changes_nothing(job: Job, fresh: bool) -> None:
    (work(job) / "outcome.json").write_text("of the first one")
    before = contents(work(job))
    started, end = threading.Event(), threading.Event()

    def hold() -> None:
        with locked_folder(work(job)):
            started.set()
            end.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        started.wait()
        outcome = run(job, fresh=fresh)
    finally:
        end.set()
        thread.join()
    assert outcome.status == "failed"
    assert "is in use by another process" in outcome.lines[0]
    assert contents(work(job)) == before


def test_a_fresh_run_keeps_nothing_but_the_lock(job: Job, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    (folder / "calibration").mkdir(parents=True)
    (folder / "calibration" / "index.json").write_text("{")
    (folder / "stages.json").symlink_to(folder / "calibration")
    broken = replace(job, calibrate=replace(job.calibrate, model="no/such/model"))
    assert run_job(broken, folder, fresh=True).status == "failed"
    assert contents(folder).keys() == {".lock", "stages.json", "outcome.json"}


@pytest.mark.parametrize("fresh", [False, True])
def test_what_no_run_has_made_is_kept(job: Job, tmp_path: Path, fresh: bool) -> None:
    """Such as a calibration of `sp calibrate`, or a model, in a folder of the job's name."""
    (tmp_path / "model.safetensors").write_text("weights")
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "index.json").write_text("{")
    before = contents(tmp_path)
    outcome = run_job(job, tmp_path, fresh=fresh)
    assert outcome.status == "failed"
    assert "was not made by sp regenerate" in outcome.lines[0]
    assert contents(tmp_path).items() >= before.items()
    (tmp_path / "stages.json").write_text("{}")
    broken = replace(job, calibrate=replace(job.calibrate, model="no/such/model"))
    assert run_job(broken, tmp_path, fresh=fresh).status == "failed"
    assert (tmp_path / "model.safetensors").read_text() == "weights"


def test_a_stage_that_fails_is_the_outcome(job: Job, tmp_path: Path) -> None:
    outcome = run_job(
        replace(job, calibrate=replace(job.calibrate, model="no/such/model")), tmp_path / "work"
    )
    assert outcome.status == "failed"
    assert "there is no model folder" in outcome.lines[0]


@pytest.mark.parametrize(
    ("stage", "parts"),
    [("calib", worker._CAPTURE), ("autoencoder", worker._TRAIN), ("clustering", worker._CLUSTER)],
)
def test_a_stage_is_done_again_when_code_that_it_imports_changes(
    stage: str, parts: tuple[str, ...]
) -> None:
    package = worker._PACKAGE
    imported = set()
    for path in (package / stage).rglob("*.py"):
        imported |= set(re.findall(r"from shareprefill\.(\w+)", path.read_text(encoding="utf-8")))
    # What is there for messages, tables of text and folders changes no figure.
    changed = imported - {part.removesuffix(".py") for part in parts}
    assert changed <= {"errors", "files", "plain_tables"}
