"""Cells from outcomes: means over prompts, with intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from shareprefill.evaluation.measurement import Outcome, Variant
from shareprefill.evaluation.results import PERPLEXITY, Bin, Cell
from shareprefill.evaluation.statistics import (
    Estimate,
    bootstrap,
    median,
    paired_difference,
    wilson,
    worst_heads,
)


def make_cell(
    task: str,
    metric: str,
    length: int,
    variant: Variant,
    outcomes: Sequence[Outcome],
    dense: Sequence[Outcome],
) -> Cell:
    """One cell.

    Args:
        task: Name of the task.
        metric: Name of its score.
        length: Tokens a prompt, at most.
        variant: What was measured.
        outcomes: Its outcomes, one for every prompt.
        dense: Dense attention's, of the same prompts.
    """
    is_dense = variant.artifact is None
    recalls = _recalls(outcomes)
    score, difference = _score(metric, outcomes, dense)
    return Cell(
        task=task,
        metric=metric,
        length=length,
        policy=variant.policy,
        settings=variant.settings,
        prompts=len(outcomes),
        tokens=sum(o.tokens for o in outcomes) / len(outcomes),
        score=score,
        difference=None if is_dense else difference,
        agreement=None if is_dense or metric == PERPLEXITY else _agreement(outcomes, dense),
        recall=None if recalls is None else bootstrap(recalls.mean(1)),
        recall_worst=None if recalls is None else bootstrap(recalls, worst_heads),
        density=bootstrap([o.density for o in outcomes]),
        selection_work=bootstrap([o.selection_work for o in outcomes]),
        hidden_error=None if is_dense else bootstrap([o.hidden_error for o in outcomes]),
        layer_errors=tuple(
            bootstrap(errors) for errors in zip(*(o.layer_errors for o in outcomes), strict=True)
        ),
        ttft_s=bootstrap([o.ttft_s for o in outcomes], median),
        speedup=None if is_dense else _speedup(outcomes),
        heads=_heads(outcomes),
        bins=_bins(length, outcomes, dense, is_dense=is_dense),
    )


def _recalls(outcomes: Sequence[Outcome]) -> torch.Tensor | None:
    """Recall `[P, K]` by prompt and head; None where it was not measured."""
    heads = max(len(o.recalls) for o in outcomes)
    if heads == 0:
        return None
    # A prompt that is too short for patterns ran dense by itself, and has none.
    rows = [o.recalls or (1.0,) * heads for o in outcomes]
    return torch.tensor(rows, dtype=torch.float64)


def _score(
    metric: str, outcomes: Sequence[Outcome], dense: Sequence[Outcome]
) -> tuple[Estimate, Estimate]:
    ours, theirs = [o.score for o in outcomes], [o.score for o in dense]
    if metric == PERPLEXITY:
        return _perplexity(ours, theirs)
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    if set(ours) | set(theirs) <= {0.0, 1.0}:
        return wilson(sum(ours), len(ours)), paired_difference(ours, theirs)
    return bootstrap(ours), bootstrap(differences)


def _perplexity(ours: Sequence[float], dense: Sequence[float]) -> tuple[Estimate, Estimate]:
    """exp of the mean loss, and its relative change: the losses' intervals, through exp."""
    score, change = bootstrap(ours), bootstrap([a - b for a, b in zip(ours, dense, strict=True)])
    return _through(score, math.exp), _through(change, math.expm1)


def _through(estimate: Estimate, function: Callable[[float], float]) -> Estimate:
    ends = (estimate.low, estimate.high)
    return Estimate(function(estimate.value), *(e if e is None else function(e) for e in ends))


def _agreement(outcomes: Sequence[Outcome], dense: Sequence[Outcome]) -> Estimate:
    same = sum(one.text == other.text for one, other in zip(outcomes, dense, strict=True))
    return wilson(same, len(outcomes))


def _speedup(outcomes: Sequence[Outcome]) -> Estimate:
    return bootstrap([o.dense_ttft_s / o.ttft_s for o in outcomes], median)


def _heads(outcomes: Sequence[Outcome]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for outcome in outcomes:
        counts.update(outcome.heads or {})
    return dict(sorted(counts.items()))


def _bins(
    length: int, outcomes: Sequence[Outcome], dense: Sequence[Outcome], *, is_dense: bool
) -> tuple[Bin, ...]:
    count = len(outcomes[0].bins)
    bins = []
    for number in range(count):
        score, change = _perplexity(
            [o.bins[number] for o in outcomes], [o.bins[number] for o in dense]
        )
        # The first position of a bin: the least one that `position * count // length` gives it.
        edges = [math.ceil(edge * length / count) for edge in (number, number + 1)]
        bins.append(Bin(edges[0], edges[1], score, None if is_dense else change))
    return tuple(bins)
