from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from shareprefill.regeneration.outcomes import Change, Outcome, to_json, to_markdown

DRIFTED = Outcome(
    name="a",
    status="drifted",
    artifact="a.st",
    lines=("recall 0.9500 -> 0.9000 (-0.0500, tolerance 0.01)",),
    changes=(Change(name="recall", before=0.95, after=0.9, tolerance=0.01),),
    moved=3,
    heads=12,
    seconds=4.4,
)
EQUAL = Outcome(name="b", status="equal", artifact="b.st", heads=12)


def test_json_has_all_fields() -> None:
    values = json.loads(to_json([DRIFTED, EQUAL]))
    assert values["ok"] is False
    assert values["models"][0]["changes"][0]["drifted"] is True
    change = {**asdict(DRIFTED.changes[0]), "drifted": True}
    fields = {**asdict(DRIFTED), "lines": [*DRIFTED.lines], "changes": [change]}
    assert values["models"][0] == fields
    assert json.loads(to_json([EQUAL]))["ok"] is True


@pytest.mark.parametrize(
    ("status", "failed"),
    [
        ("equal", False),
        ("unchanged", False),
        ("updated", False),
        ("drifted", True),
        ("missing", True),
        ("failed", True),
    ],
)
def test_which_outcomes_fail(status: str, failed: bool) -> None:
    assert Outcome(name="a", status=status, artifact="a.st").failed is failed  # type: ignore[arg-type]


def test_markdown() -> None:
    hostile = Outcome(
        name="c", status="failed", artifact="c.st", lines=("no\n# heading <b> | `x` \x1b[2J",)
    )
    lines = to_markdown([DRIFTED, EQUAL, hostile]).splitlines()
    assert lines[2] == "| a | drifted | - | - | 0.950 -> 0.900 | 3 of 12 | 4 |"
    assert lines[3] == "| b | equal | - | - | - | 0 of 12 | 0 |"
    assert "    recall 0.9500 -> 0.9000 (-0.0500, tolerance 0.01)" in lines
    assert lines[-1] == r"    no\n# heading <b> | `x` \x1b[2J"
    assert lines[-2] == ""
