from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from shareprefill.artifact import save_artifact
from shareprefill.commands.audit import audit_command
from shareprefill.errors import ArtifactError, DataError
from tests.audit.synthetic import clustered, made_up_artifact, made_up_calibration


def sp_audit(*arguments: str | Path) -> Result:
    app = typer.Typer()
    app.command()(audit_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_artifact(made_up_artifact(2, 4), tmp_path / "clusters.st")
    return tmp_path / "clusters.st"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_calibration(tmp_path_factory.mktemp("calibration"))


def test_the_page_is_written(artifact: Path) -> None:
    found = sp_audit()
    assert found.exit_code == 0
    assert re.match(r"audit.html: 8 heads, 3 clusters, \d+% noise", found.stdout)
    assert "without maps, as no calibration folder was given" in found.stderr
    html = (artifact.parent / "audit.html").read_text(encoding="utf-8")
    assert html.startswith("<!DOCTYPE html>")


def test_with_its_calibration_a_page_and_json(artifact: Path, folder: Path, tmp_path: Path) -> None:
    save_artifact(clustered(folder), artifact)
    found = sp_audit(artifact, "--calibration", folder, "--json", "--out", tmp_path / "page.html")
    assert found.exit_code == 0
    assert found.stderr == ""
    assert json.loads(found.stdout)["calibration"] == {"found": True, "missing": ""}
    assert "<h3>Cluster " in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not (tmp_path / "audit.html").exists()


def test_a_calibration_that_is_not_found_is_said_and_no_error(artifact: Path) -> None:
    found = sp_audit(artifact, "--calibration", "nowhere", "--json")
    assert found.exit_code == 0
    assert "nowhere holds no calibration" in found.stderr
    assert json.loads(found.stdout)["calibration"]["found"] is False


def test_a_calibration_of_another_model_is_an_error(artifact: Path, folder: Path) -> None:
    found = sp_audit(artifact, "--calibration", folder)
    assert isinstance(found.exception, ArtifactError)
    assert "calibration of another model" in str(found.exception)
    assert not (artifact.parent / "audit.html").exists()


def test_a_page_that_cannot_be_written_is_an_error_at_once(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("shareprefill.audit.findings.examine", never)
    found = sp_audit(artifact, "--out", "missing/page.html")
    assert isinstance(found.exception, DataError)
    assert "its folder does not exist" in str(found.exception)


def test_the_page_says_where_the_promise_rests_on_little(artifact: Path) -> None:
    made = made_up_artifact(2, 4)
    made.summary.update(held_out_prompts=["text"] * 2, held_out_tokens=[20_000] * 2)
    save_artifact(made, artifact)
    assert sp_audit().exit_code == 0
    html = (artifact.parent / "audit.html").read_text(encoding="utf-8")
    assert '<div class="verdict doubtful"' in html
    assert "1 of 3 new ones lies below the worst of them" in html


def test_a_page_replaces_a_page_and_nothing_else(artifact: Path) -> None:
    before = artifact.read_bytes()
    found = sp_audit("--out", artifact)
    assert isinstance(found.exception, DataError)
    assert "of another kind: use --force" in str(found.exception)
    assert artifact.read_bytes() == before
    assert [sp_audit("--out", "page.html").exit_code for _ in range(2)] == [0, 0]
    other = (artifact.parent / "page.html").read_text().replace("audit of ", "audit of another ")
    (artifact.parent / "page.html").write_text(other)
    found = sp_audit("--out", "page.html")
    assert "holds another one: audit of another" in str(found.exception)
    assert (artifact.parent / "page.html").read_text() == other
    (artifact.parent / "notes").write_text("mine")
    assert sp_audit("--out", "notes", "--force").exit_code == 0
    assert (artifact.parent / "notes").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_json_instead_of_the_page(artifact: Path) -> None:
    found = sp_audit(artifact, "--json")
    numbers = json.loads(found.stdout)
    assert len(numbers["heads"]) == 8
    assert not (artifact.parent / "audit.html").exists()


def test_noise_is_warned_of(artifact: Path) -> None:
    noisy = made_up_artifact(2, 4)
    noisy.instability.fill_(1e6)
    save_artifact(noisy, artifact)
    found = sp_audit(artifact, "--json")
    assert found.exit_code == 0
    assert "sp: warning: 100% of the heads (8 of 8)" in found.stderr
