"""Which policy needs least: at equal recall, at equal density, and the points that none beats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

from shareprefill.evaluation.config import DENSE, PERPLEXITY
from shareprefill.evaluation.results import Cell, Evaluation, Summary

TARGET_RECALL = 0.95
TARGET_DENSITIES = (0.25, 0.35)
ORACLE = "oracle"
P = TypeVar("P")


@dataclass(frozen=True)
class Reached:
    """A policy at the target recall, interpolated between its gammas.

    Attributes:
        task: Task.
        length: Tokens a prompt.
        policy: Policy, or its line of artifacts (`results.line`).
        density: Computed blocks over causal blocks.
        selection_work: Share of dense attention's work.
        recall_worst: Attention mass inside the patterns of the worst 5 % of heads.
        attention_error: Relative error of the attention output, mean over layers.
        to_oracle: Density and selection work over the oracle's density alone; None for the oracle
            itself, and without it.
    """

    task: str
    length: int
    policy: str
    density: float
    selection_work: float
    recall_worst: float
    attention_error: float
    to_oracle: float | None

    @property
    def effective_density(self) -> float:
        """Density and selection work together."""
        return self.density + self.selection_work

    def to_dict(self) -> dict[str, Any]:
        """The fields and `effective_density`, JSON-ready."""
        return {**asdict(self), "effective_density": self.effective_density}


def reached(evaluation: Evaluation, target: float = TARGET_RECALL) -> list[Reached]:
    """Every policy at a mean recall, where its gammas lie on both sides of it.

    Args:
        evaluation: With recall, and several gammas.
        target: Mean recall over heads and prompts.

    Returns:
        By task and length, in the order of the policies.
    """
    # What was measured has errors of layers beside recall.
    cells = [cell for cell in evaluation.cells if cell.recall is not None and cell.layer_errors]
    found = []
    for task, length, policy, point, oracle in _points(cells, partial(_at, target=target)):
        density, work, worst, error = point
        ratio = None if oracle is None else (density + work) / oracle[0]
        found.append(Reached(task, length, policy, density, work, worst, error, ratio))
    return found


def _points(
    cells: Iterable[Cell], at: Callable[[list[Cell]], P | None]
) -> Iterator[tuple[str, int, str, P, P | None]]:
    """Points of the lines that reach them, by task and length, in the order of the policies.

    Yields:
        Task, length, line, its point, and the oracle's: None for the oracle itself, and without it.
    """
    groups: dict[tuple[str, int], dict[str, list[Cell]]] = {}
    for cell in cells:
        lines = groups.setdefault((cell.task, cell.length), {})
        lines.setdefault(cell.line, []).append(cell)
    for (task, length), lines in groups.items():
        points = {line: at(of_line) for line, of_line in lines.items()}
        for line, point in points.items():
            if point is not None:
                yield task, length, line, point, None if line == ORACLE else points.get(ORACLE)


def _at(cells: list[Cell], target: float) -> tuple[float, float, float, float] | None:
    """Density, selection work, worst heads' recall and error where the mean recall is `target`."""
    ordered = sorted((cell.recall.value, *_figures(cell)) for cell in cells if cell.recall)
    for low, high in pairwise(ordered):
        if low[0] <= target <= high[0]:
            share = (target - low[0]) / (high[0] - low[0]) if high[0] > low[0] else 1.0
            a, b, c, d = (x + share * (y - x) for x, y in zip(low[1:], high[1:], strict=True))
            return a, b, c, d
    return None


def _figures(cell: Cell) -> tuple[float, float, float, float]:
    assert cell.recall_worst is not None
    errors = [error.value for error in cell.layer_errors]
    return (
        cell.density.value,
        cell.selection_work.value,
        cell.recall_worst.value,
        sum(errors) / len(errors),
    )


@dataclass(frozen=True)
class AtDensity:
    """A policy at an effective density, interpolated between its gammas.

    Attributes:
        task: Task.
        length: Tokens a prompt.
        policy: Policy, or its line of artifacts (`results.line`).
        effective_density: Density and selection work together; the oracle's density alone.
        kl: KL divergence from dense attention, in nats a position; None unless measured.
        kl_to_oracle: The same over the oracle's; None for the oracle itself, and without it.
        perplexity_change: Relative change against dense attention; None for other tasks.
        top1_agreement: Share of positions with dense attention's most likely next token.
        recall: Attention mass inside the patterns; None unless measured.
    """

    task: str
    length: int
    policy: str
    effective_density: float
    kl: float | None
    kl_to_oracle: float | None
    perplexity_change: float | None
    top1_agreement: float | None
    recall: float | None


def at_density(evaluation: Evaluation, density: float) -> list[AtDensity]:
    """Every policy at an effective density, where its gammas lie on both sides of it.

    Args:
        evaluation: With several gammas.
        density: Effective density, 0 to 1.

    Returns:
        By task and length, in the order of the policies.
    """
    cells = [cell for cell in evaluation.cells if cell.policy != DENSE]
    found = []
    for task, length, policy, point, oracle in _points(
        cells, partial(_fidelity_at, density=density)
    ):
        kl, change, agreement, recall = point
        bound = None if oracle is None else oracle[0]
        ratio = kl / bound if kl is not None and bound else None
        figures = (density, kl, ratio, change, agreement, recall)
        found.append(AtDensity(task, length, policy, *figures))
    return found


def _fidelity_at(cells: list[Cell], density: float) -> tuple[float | None, ...] | None:
    """KL, change of perplexity, agreement and recall at an effective density."""
    ordered = sorted(cells, key=cost)
    for low, high in pairwise(ordered):
        left, right = cost(low), cost(high)
        if left <= density <= right:
            share = (density - left) / (right - left) if right > left else 1.0
            return tuple(
                None if one is None or other is None else one + share * (other - one)
                for one, other in zip(_fidelity(low), _fidelity(high), strict=True)
            )
    return None


def _fidelity(cell: Cell) -> tuple[float | None, ...]:
    change = cell.difference if cell.metric == PERPLEXITY else None
    estimates = (cell.kl, change, cell.top1_agreement, cell.recall)
    return tuple(None if estimate is None else estimate.value for estimate in estimates)


def cost(point: Cell | Summary) -> float:
    """Effective density; the oracle's density alone.

    The oracle's own work buys nothing but the knowledge of how few blocks would do.
    """
    if point.policy != ORACLE:
        return point.effective_density
    return point.density if isinstance(point, Summary) else point.density.value


def nearest_labels(evaluation: Evaluation) -> list[str]:
    """One label a line: of its settings, the one whose recall is nearest to the target."""
    nearest: dict[str, tuple[float, str]] = {}
    for summary in evaluation.summaries():
        if summary.policy != DENSE:
            distance = abs((summary.recall or 0.0) - TARGET_RECALL)
            best = nearest.get(summary.line)
            if best is None or distance < best[0]:
                nearest[summary.line] = (distance, summary.label)
    return [label for _, label in nearest.values()]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, gain) points that no other point beats, by ascending cost.

    >>> pareto([(0.3, 0.9), (0.2, 0.8), (0.25, 0.7)])
    [1, 0]
    """
    best = float("-inf")
    kept = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[index][1] > best:
            best = points[index][1]
            kept.append(index)
    return kept


def knee(points: Sequence[tuple[float, float]]) -> int | None:
    """Index of the (cost, gain) point beyond which more cost buys little gain.

    Both axes of the points that no other beats are scaled to 0 to 1; the knee is the point with
    the largest distance above the chord from the first to the last one. The rule is Kneedle's
    (Satopää et al., ICDCS Workshops 2011), for few points and without smoothing.

    Returns:
        None where no point lies above the chord, or fewer than three are left.

    >>> knee([(0.1, 0.5), (0.2, 0.9), (0.9, 1.0)])
    1
    """
    kept = pareto(points)
    if len(kept) < 3:
        return None
    (left, bottom), (right, top) = points[kept[0]], points[kept[-1]]
    heights = [
        (points[i][1] - bottom) / (top - bottom) - (points[i][0] - left) / (right - left)
        for i in kept
    ]
    place = max(range(len(kept)), key=lambda i: heights[i])
    # Rounding may lift a point of a straight line by a few units in the last place.
    return kept[place] if heights[place] > 1e-9 else None
