"""What all commands have: `--config`, `-q` and `-v`."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import typer

from shareprefill import cli, console
from shareprefill.commands.common import register

COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
ARTIFACT = Path(__file__).parents[1] / "data" / "format-1.st"
Sp = Any


def parsed(name: str, *arguments: str) -> dict[str, Any]:
    """What a command would be run with."""
    parent = typer.main.get_command(cli.app).make_context("sp", [name])
    return COMMANDS[name].make_context(name, [*arguments], parent=parent).params


def test_a_file_gives_options_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'prompt = "~/question.txt"\nmax-new-tokens = 5\ngamma = 1\ncompare_dense = true\n'
    )
    found = parsed("run", "--config", str(file), "--gamma", "0.5")
    assert (found["max_new_tokens"], found["gamma"], found["compare_dense"]) == (5, 0.5, True)
    assert found["prompt"] == Path("~/question.txt")
    assert found["policy"] == "auto"
    assert parsed("run", "--config", str(file))["gamma"] == 1


def test_lists_flags_and_other_names(tmp_path: Path) -> None:
    file = tmp_path / "eval.toml"
    file.write_text(
        'tasks = ["retr_kv", "text"]\nlengths = ["4K", 8192]\ngamma = [0.8, 0.9]\n'
        'samples = 3\nno-measure = true\nartifact = "a.st"\nfresh = true\n'
    )
    found = parsed("eval", "--config", str(file))
    assert (found["tasks"], found["lengths"]) == ("retr_kv,text", "4K,8192")
    assert (found["gammas"], found["samples"]) == ([0.8, 0.9], 3)
    assert (found["measure"], found["resume"]) == (False, False)
    assert found["artifact"] == [Path("a.st")]


def test_a_file_for_several_commands(tmp_path: Path) -> None:
    file = tmp_path / "all.toml"
    file.write_text('[calibrate]\nmodel = "sp-tiny"\nlength = "4K"\n[cluster]\nk = 3\n')
    assert parsed("calibrate", "--config", str(file))["length"] == 4096
    assert parsed("cluster", "--config", str(file))["k"] == "3"
    assert parsed("inspect", "--config", str(file))["artifact"] == Path("clusters.st")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gama = 0.9", ("'gama'", "did you mean 'gamma'", "sp run --help")),
        ("[cluter]\nk = 3", ("[cluter]", "did you mean 'cluster'")),
        ("gamma = 0.9\n[cluster]\nk = 3", ("gamma stands in no table",)),
        ("compare-dense = 1", ("compare-dense", "true or false")),
        ("max-new-tokens = true", ("max-new-tokens", "a text or a number")),
        ("policy = ['auto']", ("policy", "one value, not a list")),
        ("gamma = ", ("run.toml is no TOML",)),
        ("config = 'other.toml'", ("no option 'config'",)),
    ],
)
def test_what_a_file_may_not_hold(sp: Sp, tmp_path: Path, text: str, words: Any) -> None:
    (tmp_path / "run.toml").write_text(text)
    code, _, err = sp("run", "prompt.txt", "--config", "run.toml")
    assert code == 1
    for word in ("run.toml", *words):
        assert word in err


def test_wrong_values_and_missing_files(sp: Sp, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('max-new-tokens = "many"')
    code, _, err = sp("run", "prompt.txt", "--config", "run.toml")
    assert code == 2
    assert "--config has 'many'" in err
    assert "--max-new-tokens" in err
    code, _, err = sp("run", "prompt.txt", "--config", "none.toml")
    assert code == 1
    assert "none.toml does not exist" in err


def test_every_command_takes_a_file_and_its_options_as_keys(tmp_path: Path) -> None:
    for name, command in COMMANDS.items():
        assert {"--config", "-q", "--quiet", "-v", "--verbose"} <= {
            option for parameter in command.params for option in parameter.opts
        }, name
        (tmp_path / "c.toml").write_text("quiet = true")
        required = ["x"] * sum(p.required for p in command.params if not p.opts[0].startswith("-"))
        required += ["--model", "m"] if any("--model" in p.opts for p in command.params) else []
        assert parsed(name, *required, "--config", str(tmp_path / "c.toml"))["quiet"] is True


def test_how_much_is_said(sp: Sp, capfd: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    def speak_command() -> None:
        """Say something."""
        logger = logging.getLogger("shareprefill.test")
        logger.info("loading")
        logger.warning("slow")
        # As rich does for a spinner, which else would stand in the line.
        with contextlib.redirect_stderr(io.StringIO()) as replaced:
            logger.warning("meanwhile")
        console.note(f"a note {replaced.getvalue().strip()}".strip())

    register(app, speak_command)
    said = {}
    for option in ((), ("-q",), ("-v",)):
        with pytest.raises(SystemExit):
            app([*option])
        said[option] = capfd.readouterr().err.splitlines()
    assert said[()] == ["sp: warning: slow", "a note sp: warning: meanwhile"]
    assert said["-q",] == []
    assert said["-v",] == ["sp: options: none", "sp: loading", *said[()]]
    assert logging.getLogger("shareprefill").handlers == []
    code, _, err = sp("inspect", ARTIFACT, "-q", "-v")
    assert (code, "exclude each other" in err) == (1, True)
    code, out, _ = sp("inspect", ARTIFACT, "-q", "--json")
    assert json.loads(out)["heads"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("calibrate", "--model", "m"), ("Finished prompts are kept", "the same command goes on")),
        (("calibrate", "--model", "m", "--fresh"), ("without --fresh",)),
        (("eval", "--artifact", "a.st", "--out", "found"), ("kept in found",)),
        (("eval", "--artifact", "a.st"), ("Nothing is kept", "--out FOLDER")),
        (("regenerate", "models.toml"), ("artifacts/regenerated",)),
        (("push", "a.st", "me/patterns"), ("may be in the repository",)),
        (("inspect", "a.st"), ("Nothing was written",)),
    ],
)
def test_a_stopped_command_says_what_is_kept(
    sp: Sp, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for name in (
        *("calib.pipeline.capture_maps", "commands.evaluate.model_of", "artifact.load_artifact"),
        "regeneration.jobs.load_jobs",
        "regeneration.pipeline.regenerate",
        "hub.transfer.push",
    ):
        monkeypatch.setattr(f"shareprefill.{name}", stop)
    code, out, err = sp(*arguments)
    assert (code, out) == (130, "")
    assert "sp: stopped." in err
    assert "Traceback" not in err
    for word in words:
        assert word in err
