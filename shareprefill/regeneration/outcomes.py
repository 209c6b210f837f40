"""What came of each model of a regeneration, as JSON, as a table's rows and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from shareprefill.errors import DataError
from shareprefill.files import printable
from shareprefill.regeneration.comparing import Change

SCHEMA = 1
Status = Literal["equal", "unchanged", "drifted", "missing", "failed", "updated"]
_FAILURES = ("drifted", "missing", "failed")
_COLUMNS = ("accuracy", "density", "recall")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one model.

    Attributes:
        name: Of the job.
        status: `equal` (the same bytes), `unchanged` (within the tolerances), `drifted`, `missing`
            (no usable artifact is committed), `failed`, or `updated` (written).
        artifact: The committed artifact.
        lines: Why it is not equal: drifted figures, settings, or the error.
        changes: All figures of both.
        moved: Heads whose policy, pivot or cluster changed.
        heads: Heads in all; 0 where nothing was compared.
        seconds: Wall time.
    """

    name: str
    status: Status
    artifact: str
    lines: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    moved: int = 0
    heads: int = 0
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether somebody must look at it."""
        return self.status in _FAILURES

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-ready."""
        values = {**asdict(self), "lines": list(self.lines)}
        values["changes"] = [{**asdict(c), "drifted": c.drifted} for c in self.changes]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Outcome:
        """The inverse of `to_dict`."""
        found = {field.name: values[field.name] for field in fields(cls)}
        found["lines"] = tuple(found["lines"])
        found["changes"] = tuple(
            Change(**{name: value for name, value in change.items() if name != "drifted"})
            for change in found["changes"]
        )
        return cls(**found)

    def cells(self) -> tuple[str, ...]:
        """The row of a table, in the order of `HEADINGS`."""
        changes = {change.name: change for change in self.changes}
        figures = (
            f"{changes[name].before:.3f} -> {changes[name].after:.3f}" if name in changes else "-"
            for name in _COLUMNS
        )
        moved = f"{self.moved} of {self.heads}" if self.heads else "-"
        return (self.name, self.status, *figures, moved, f"{self.seconds:.0f}")


HEADINGS = ("model", "status", *_COLUMNS, "heads moved", "seconds")


def to_json(outcomes: Sequence[Outcome]) -> str:
    """All outcomes, and whether none of them failed."""
    values = {
        "schema": SCHEMA,
        "ok": not any(outcome.failed for outcome in outcomes),
        "models": [outcome.to_dict() for outcome in outcomes],
    }
    return json.dumps(values, indent=1, allow_nan=False)


def to_markdown(outcomes: Sequence[Outcome]) -> str:
    """A table of all outcomes, and below it what is to say of each, for a job's summary."""
    lines = [_row(HEADINGS), _row(["---"] * len(HEADINGS))]
    lines += [_row(outcome.cells()) for outcome in outcomes]
    for outcome in outcomes:
        if outcome.lines:
            # Indented text is shown as it is: an error's text may hold anything.
            lines += ["", f"**{outcome.name}**: {outcome.status}", ""]
            lines += [f"    {printable(line, 1000)}" for line in outcome.lines]
    return "\n".join(lines) + "\n"


def load_outcome(path: Path) -> Outcome:
    """Reads what a worker wrote.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        return Outcome.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{printable(path)} cannot be read: {printable(error)}") from error


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
