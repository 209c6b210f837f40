"""What came of each model of a regeneration: figures against tolerances, settings, a verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from shareprefill.files import printable
from shareprefill.regeneration.jobs import Tolerances

if TYPE_CHECKING:
    from shareprefill.clustering.comparison import Comparison, Setting

SCHEMA = 1
OUTCOME = "outcome.json"
Status = Literal["equal", "unchanged", "drifted", "missing", "failed", "updated"]
_FAILURES = ("drifted", "missing", "failed")
_COLUMNS = ("accuracy", "density", "recall")
HEADINGS = ("model", "status", *_COLUMNS, "heads moved", "seconds")
# Columns that a narrow terminal goes without, the least important first.
LESS_IMPORTANT = ("seconds", "recall", "density", "heads moved", "accuracy")
# What an artifact is made with. `summary` and `rows` are outcomes, the model's name and the device
# say where it was made.
_SETTINGS = ("block_size", "configuration.", "model_type", "thresholds.", "weights")
_PLACES = ("configuration.calibrate.device", "configuration.calibrate.model")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What an evaluation measured of one artifact, under its own policies; None: not measured."""

    accuracy: float | None
    density: float | None
    recall: float | None


@dataclass(frozen=True, kw_only=True)
class Change:
    """A figure of both artifacts.

    Attributes:
        name: Of the figure.
        before: Of the committed artifact.
        after: Of the regenerated one.
        tolerance: How far they may be apart; None: any.
    """

    name: str
    before: float
    after: float
    tolerance: float | None

    @property
    def drifted(self) -> bool:
        """Whether they are farther apart than is tolerated."""
        # A hair of rounding: 0.32 - 0.3 is more than 0.02.
        return self.tolerance is not None and abs(self.after - self.before) > self.tolerance + 1e-12

    def describe(self) -> str:
        """One line."""
        allowed = "" if self.tolerance is None else f", tolerance {self.tolerance:g}"
        change = self.after - self.before
        return f"{self.name} {self.before:.4f} -> {self.after:.4f} ({change:+.4f}{allowed})"


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

    def cells(self) -> tuple[str, ...]:
        """The row of a table, in the order of `HEADINGS`."""
        changes = {change.name: change for change in self.changes}
        figures = (
            f"{changes[name].before:.3f} -> {changes[name].after:.3f}" if name in changes else "-"
            for name in _COLUMNS
        )
        moved = f"{self.moved} of {self.heads}" if self.heads else "-"
        return (self.name, self.status, *figures, moved, f"{self.seconds:.0f}")


def changes_of(
    comparison: Comparison, before: Figures, after: Figures, tolerances: Tolerances
) -> list[Change]:
    """All figures that both artifacts have, with their tolerances.

    Args:
        comparison: Of the committed artifact with the regenerated one.
        before: What was measured of the committed one.
        after: What was measured of the regenerated one, on the same prompts.
        tolerances: How far they may be apart.
    """
    rows = (
        ("accuracy", before.accuracy, after.accuracy, tolerances.accuracy),
        ("density", before.density, after.density, tolerances.density),
        ("recall", before.recall, after.recall, tolerances.recall),
        ("expected density", *comparison.density, tolerances.density),
        ("expected recall", *comparison.recall, tolerances.recall),
        ("clusters (adjusted Rand index)", 1.0, comparison.rand_index, tolerances.clusters),
    )
    return [
        Change(name=name, before=old, after=new, tolerance=tolerance)
        for name, old, new, tolerance in rows
        if old is not None and new is not None
    ]


def changed_settings(comparison: Comparison) -> list[str]:
    """The settings that both artifacts have and that differ, a line each.

    Another model's weights, a threshold or an option of a stage: such an artifact is not what the
    file of models says, however near its figures are.
    """
    return [
        f"setting {printable(setting.name)} {_text(setting.before)} -> {_text(setting.after)}"
        for setting in comparison.settings
        if _counts(setting)
    ]


def _counts(setting: Setting) -> bool:
    from shareprefill.clustering.comparison import ABSENT

    return (
        setting.name.startswith(_SETTINGS)
        and setting.name not in _PLACES
        # A version that has more options than the one before is no drift by itself.
        and setting.before is not ABSENT
        and setting.after is not ABSENT
    )


def _text(value: Any) -> str:
    return printable(json.dumps(value), 80)


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


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
