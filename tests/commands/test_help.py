from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from shareprefill import cli
from shareprefill.calib.tasks import TASKS
from shareprefill.commands.help import COMMANDS as COMMAND_GROUPS
from shareprefill.commands.help import GROUPS
from shareprefill.config import DATA_SETS, RuntimeConfig
from shareprefill.runtime import crossover

COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def help_of(monkeypatch: pytest.MonkeyPatch, width: int, *arguments: str) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    found = CliRunner().invoke(cli.app, [*arguments])
    assert found.exit_code == 0, found.output
    return found.output


@pytest.mark.parametrize("width", [60, 80, 140])
@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_fits_and_breaks_no_name(
    monkeypatch: pytest.MonkeyPatch, width: int, name: str
) -> None:
    text = help_of(monkeypatch, width, name, "-h")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("sp ")]
    assert max(map(len, lines)) <= width
    for parameter in COMMANDS[name].params:
        for option in parameter.opts + parameter.secondary_opts:
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), option
    # A hyphen at a line's end is a word that was broken there.
    assert not [line for line in lines if re.search(r"\w-$", line)]
    assert text == help_of(monkeypatch, width, name, "--help")


def test_every_option_is_in_a_group_once() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert len(set(grouped)) == len(grouped)
    options = {p.name for c in COMMANDS.values() for p in c.params if p.param_type_name == "option"}
    assert options | {"help"} == set(grouped)
    assert sorted(name for names in COMMAND_GROUPS.values() for name in names) == sorted(COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_examples_in_the_help_are_understood(name: str) -> None:
    lines = [line.strip() for line in (COMMANDS[name].help or "").splitlines()]
    examples = [shlex.split(line) for line in lines if line.startswith("sp ")]
    assert examples
    for _, called, *arguments in examples:
        assert called == name
        # Parsed, but not run.
        COMMANDS[name].make_context(name, list(arguments))


def test_the_front_says_what_each_command_does_in_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(help_of(monkeypatch, 80, "-h").split())
    for name, command in COMMANDS.items():
        assert f"{name} {command.help.splitlines()[0]}" in text
    assert "HF_HOME" in text
    assert "--install-completion" in text


def test_defaults_that_are_told_are_those_that_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join((RuntimeConfig.__doc__ or "").split())
    for known, device in ((crossover._CPU, "CPU"), (crossover._HOPPER, "GPU")):
        assert f"{known.tokens} on a {device}" in text
        assert f"{known.density:g} on a {device}" in text
    assert (*TASKS, "text", "mixture") == DATA_SETS


def test_typing_errors_are_answered_with_what_was_meant() -> None:
    found = CliRunner().invoke(cli.app, ["calibrat"])
    assert (found.exit_code, "'calibrate'" in found.output) == (2, True)
    found = CliRunner().invoke(cli.app, ["run", "prompt.txt", "--max-token", "3"])
    assert (found.exit_code, "--max-new-tokens" in found.output) == (2, True)


def test_a_shell_completes_commands_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def completed(words: str) -> list[str]:
        found = CliRunner().invoke(
            cli.app,
            prog_name="sp",
            env={
                "_SP_COMPLETE": "complete_bash",
                "COMP_WORDS": words,
                "COMP_CWORD": str(len(words.split()) - 1),
            },
        )
        return found.output.split()

    assert completed("sp cl") == ["cluster"]
    assert "--max-new-tokens" in completed("sp run --max")
    assert completed("sp run --policy smo") == ["smoothed"]
    assert completed("sp calibrate --data retr_k") == ["retr_kv"]
    assert completed("sp eval --policies auto,smo") == ["auto,smoothed"]
