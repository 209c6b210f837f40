from __future__ import annotations

import json
from pathlib import Path

import pytest

from shareprefill.errors import DataError
from shareprefill.regeneration.outcomes import Change, Outcome, load_outcome, to_json, to_markdown

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


def test_json_goes_there_and_back(tmp_path: Path) -> None:
    values = json.loads(to_json([DRIFTED, EQUAL]))
    assert values["ok"] is False
    assert values["models"][0]["changes"][0]["drifted"] is True
    assert Outcome.from_dict(values["models"][0]) == DRIFTED
    assert json.loads(to_json([EQUAL]))["ok"] is True
    (tmp_path / "outcome.json").write_text(json.dumps(DRIFTED.to_dict()))
    assert load_outcome(tmp_path / "outcome.json") == DRIFTED
    for text in ("", "[]", "{}", '{"name": 3}'):
        (tmp_path / "outcome.json").write_text(text)
        with pytest.raises(DataError, match="cannot be read"):
            load_outcome(tmp_path / "outcome.json")


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
