"""The long run's own checks: they pass whole folders and see what a bad kill would leave."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shareprefill.artifact import save_artifact
from tests.support.tiny import tiny_artifact, tiny_llama

ROOT = Path(__file__).parents[2]
KILL = runpy.run_path(str(ROOT / "tools" / "kill_test.py"))


@pytest.fixture
def scenario(tmp_path: Path) -> Any:
    """A folder with an earlier artifact, and a command that writes another one."""
    artifact = tiny_artifact(tiny_llama())
    save_artifact(artifact, tmp_path / "clusters.st")
    before = KILL["contents"](tmp_path)
    return KILL["Scenario"](
        "cluster", ("cluster",), tmp_path, before=before, after={"clusters.st": b"next"}
    )


def test_a_whole_folder_passes(scenario: Any) -> None:
    assert KILL["check_killed"](scenario, scenario.start) == []


@pytest.mark.parametrize(
    ("spoil", "messages"),
    [
        (
            lambda folder: (folder / "clusters.st").write_bytes(b"half"),
            ["neither the earlier file nor the undisturbed", "the earlier artifact does not load"],
        ),
        (
            lambda folder: (folder / "clusters.st").unlink(),
            ["clusters.st was lost", "the earlier artifact does not load"],
        ),
        (
            lambda folder: (folder / "stray.txt").write_text(""),
            ["stray.txt is neither the earlier file nor the undisturbed"],
        ),
    ],
    ids=["half-written", "lost", "stray"],
)
def test_what_a_bad_kill_would_leave_is_seen(
    scenario: Any, spoil: Callable[[Path], Any], messages: list[str]
) -> None:
    spoil(scenario.start)
    found = KILL["check_killed"](scenario, scenario.start)
    assert len(found) == len(messages)
    for wrong, message in zip(found, messages, strict=True):
        assert message in wrong


def test_phases(scenario: Any) -> None:
    phase, before, after = KILL["_phase"], scenario.before, scenario.after
    assert phase(scenario, before, before) == "before the first write"
    assert phase(scenario, before, {**before, ".sp-1.tmp": b""}) == "inside a write"
    left = {**before, ".sp-1.tmp": b""}
    assert phase(scenario, left, {**left, "new": b""}) == "between writes"
    assert phase(scenario, left, {**after, ".sp-1.tmp": b""}) == "after the last write"
