"""The ratios that the project is measured by, and whether they are reached."""

from __future__ import annotations

from dataclasses import dataclass

LENGTHS = (8192, 32768, 131072)


@dataclass(frozen=True)
class Goal:
    """A bound of a ratio at each of some lengths.

    Attributes:
        limits: Tokens -> bound.
        at_least: Whether the ratio must be at least that; otherwise at most.
    """

    limits: dict[int, float]
    at_least: bool = False

    def at(self, tokens: int) -> str | None:
        """The bound in words; None where there is none at this length."""
        limit = self.limits.get(tokens)
        return None if limit is None else f"{'>=' if self.at_least else '<='} {limit:g}"

    def verdict(self, tokens: int, *ratios: float) -> str | None:
        """Whether all of the ratios are within the bound; None where there is none."""
        limit = self.limits.get(tokens)
        if limit is None or not ratios:
            return None
        within = min(ratios) >= limit if self.at_least else max(ratios) <= limit
        return "met" if within else "missed"


def _by_length(*limits: float, at_least: bool = False) -> Goal:
    return Goal(dict(zip(LENGTHS, limits, strict=True)), at_least)


OWN_TO_FA4 = _by_length(0.95, 0.95, 0.95)
OWN_TO_FLEX = _by_length(0.80, 0.80, 0.80)
POOLED_ALL = _by_length(1.15, 1.10, 1.08)
POOLED_ROWS = _by_length(0.12, 0.06, 0.045)
FP8_TO_OWN = {
    density: Goal({32768: most, 131072: most})
    for density, most in ((0.25, 0.65), (0.10, 0.70), (0.05, 0.75))
}
CHOICE = _by_length(0.30, 0.05, 0.015)
LAYER = _by_length(0.40, 0.60, 0.82, at_least=True)
NEVER_SLOWER = Goal({1024: 0.98, 2048: 0.98, 4096: 0.98}, at_least=True)


@dataclass(frozen=True)
class Comparison:
    """One ratio of two times.

    Attributes:
        tokens: Length.
        what: Both sides, in words.
        kernel: What was fastest on the one side; None where nothing was timed.
        against: The same of the other side.
        ratio: Of the medians; None where a side is missing.
        device_ratio: Of the device's times alone, where it differs.
        goal: The bound, in words.
        verdict: `met` or `missed` by both ratios; None without a goal or a ratio.
    """

    tokens: int
    what: str
    kernel: str | None
    against: str | None
    ratio: float | None
    device_ratio: float | None
    goal: str | None
    verdict: str | None

    def cell(self) -> str:
        """The ratio and the verdict for a table; `missing` without a ratio."""
        if self.ratio is None:
            return "missing"
        text = f"{self.ratio:.3f}"
        if self.device_ratio is not None:
            text += f" (device {self.device_ratio:.3f})"
        return text if self.verdict is None else f"{text} {self.verdict}"


def compare(
    tokens: int,
    what: str,
    one: tuple[str, float, float | None] | None,
    other: tuple[str, float, float | None] | None,
    goal: Goal | None = None,
) -> Comparison:
    """The ratio of two timed calls.

    Args:
        tokens: Length.
        what: Both sides, in words.
        one: Name, median and device time of the one side; None where it is missing.
        other: The same of the other side.
        goal: What the ratio is to be.
    """
    ratio = device_ratio = None
    if one is not None and other is not None:
        ratio = one[1] / other[1]
        if one[2] is not None and other[2] is not None:
            device_ratio = one[2] / other[2]
    known = [value for value in (ratio, device_ratio) if value is not None]
    return Comparison(
        tokens,
        what,
        None if one is None else one[0],
        None if other is None else other[0],
        ratio,
        device_ratio,
        None if goal is None else goal.at(tokens),
        None if goal is None else goal.verdict(tokens, *known),
    )


def comparison_table(found: list[Comparison]) -> list[str]:
    """Lines of Markdown: a row for each comparison, a column for each length."""
    lengths = sorted({row.tokens for row in found})
    lines = [
        "| " + " | ".join(["time / time", "goal", *map(str, lengths)]) + " |",
        "|" + " --- |" * (len(lengths) + 2),
    ]
    for what in dict.fromkeys(row.what for row in found):
        rows = {row.tokens: row for row in found if row.what == what}
        goals = [rows[n].goal for n in lengths if n in rows and rows[n].goal is not None]
        goal = " / ".join(dict.fromkeys(g for g in goals if g is not None))
        cells = [rows[n].cell() if n in rows else "" for n in lengths]
        lines.append("| " + " | ".join([what, goal, *cells]) + " |")
    return lines
