"""The names on docs/stability.md are those of the package, no more and no fewer."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

import shareprefill
from shareprefill import cli
from shareprefill.artifact import FORMAT_VERSION, artifact_bytes, load_artifact

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
ROWS = {
    name: (state, set(re.findall(r"`(--[a-z0-9-]+)`", options)))
    for name, state, options in re.findall(r"(?m)^\| `sp ([a-z-]+)` \| (\w+) \| (.*) \|$", PAGE)
}
OF_ALL = set(re.findall(r"`(--[a-z0-9-]+)`", re.search(r"(?m)^\| all commands .*$", PAGE)[0]))  # type: ignore[index]
COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def options(command: Any) -> set[str]:
    return {
        option
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("--")
    }


def test_all_commands_are_on_the_page() -> None:
    assert sorted(ROWS) == sorted(COMMANDS)
    assert {state for state, _ in ROWS.values()} == {"stable", "experimental"}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_all_options_are_on_the_page(name: str) -> None:
    page, found = ROWS[name][1] | OF_ALL, options(COMMANDS[name])
    assert page == found, f"only on the page: {page - found}; only in sp {name}: {found - page}"


def test_public_python_names_are_on_the_page() -> None:
    page = set(re.findall(r"(?m)^\| `shareprefill\.(\w+)` \|", PAGE))
    assert page == {*shareprefill.__all__}
    assert set(shareprefill.__all__) <= set(dir(shareprefill))
    for name in shareprefill.__all__:
        assert getattr(shareprefill, name) is not None


def test_the_format_s_number_is_on_the_page() -> None:
    assert f"The format has a number of its own, {FORMAT_VERSION} now" in PAGE


def test_every_format_can_be_read() -> None:
    files = {int(path.stem.split("-")[1]): path for path in (ROOT / "tests/data").glob("format-*")}
    assert sorted(files) == list(range(1, FORMAT_VERSION + 1))
    artifact = load_artifact(files[2])
    assert artifact_bytes(artifact) == files[2].read_bytes()
    assert artifact.fingerprint.sketch == "0123456789abcdef" * 16
    assert artifact.fingerprint.checkpoint == "0c" * 32
    first = load_artifact(files[1])
    assert (first.fingerprint.sketch, first.fingerprint.checkpoint) == ("", "")
    assert artifact_bytes(replace(first, fingerprint=artifact.fingerprint)) == (
        artifact_bytes(artifact)
    )
    assert artifact.model == "organisation/model-1"
    counts = {"dense": 2, "pivot": 5, "share": 1, "sampled": 3, "vertical-slash": 1}
    assert {name: n for name, n in artifact.policy_counts().items() if n} == counts
    assert artifact.code.shape == (3, 4, 5)
    assert artifact.gamma[1].tolist() == pytest.approx([0.0112, 0.8100, 0.6397, 0.9743], abs=5e-5)
