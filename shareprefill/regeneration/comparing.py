"""What a regenerated artifact changed: figures against tolerances, and settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shareprefill.files import printable
from shareprefill.regeneration.jobs import Tolerances

if TYPE_CHECKING:
    from shareprefill.clustering.comparison import Comparison, Setting

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
