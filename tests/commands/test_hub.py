from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from shareprefill.artifact import save_artifact
from shareprefill.commands.pull import pull_command
from shareprefill.commands.push import push_command
from shareprefill.errors import DataError
from shareprefill.hub import transfer
from tests.support.hub import fake_hub
from tests.support.tiny import tiny_artifact, tiny_llama

app = typer.Typer()
app.command("push")(push_command)
app.command("pull")(pull_command)
RUNNER = CliRunner()


def test_push_and_pull(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    save_artifact(tiny_artifact(tiny_llama()), "a.st")
    with fake_hub() as hub:
        for name in ("push", "pull"):
            whole = getattr(transfer, name)
            monkeypatch.setattr(transfer, name, partial(whole, endpoint=hub.address))
        dry = RUNNER.invoke(app, ["push", "a.st", "me/x", "--dry-run"])
        assert dry.exit_code == 0
        assert dry.stdout.startswith("---\nlibrary_name")
        assert "me/x would get a.st and README.md; nothing was sent" in dry.stderr
        assert hub.requests == []
        pushed = RUNNER.invoke(app, ["push", "a.st", "me/x", "--file", "b.st"])
        assert pushed.exit_code == 0
        assert f"pushed as b.st, {hub.address}/me/x/commit/" in pushed.stdout
        again = RUNNER.invoke(app, ["push", "a.st", "me/x"])
        assert isinstance(again.exception, DataError)
        pulled = RUNNER.invoke(app, ["pull", "me/x", "--out", "c.st", "--file", "b.st"])
        assert pulled.exit_code == 0
        assert "c.st: made for tiny, llama of 3 layers" in pulled.stdout
        assert Path("c.st").read_bytes() == Path("a.st").read_bytes()
        again = RUNNER.invoke(app, ["pull", "me/x", "--out", "c.st"])
        assert isinstance(again.exception, DataError)
        assert RUNNER.invoke(app, ["pull", "me/x", "--out", "c.st", "--force"]).exit_code == 0
