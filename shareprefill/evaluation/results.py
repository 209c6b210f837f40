"""What an evaluation found: one cell for every task, length and policy."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from shareprefill.errors import DataError
from shareprefill.evaluation.config import DENSE, PERPLEXITY, EvalConfig
from shareprefill.evaluation.runner import Outcome
from shareprefill.evaluation.statistics import (
    Array,
    Estimate,
    bootstrap,
    mean,
    median,
    paired_difference,
    wilson,
    worst_heads,
)
from shareprefill.files import printable
from shareprefill.plain_tables import html_table, prompt_count, text_table

SCHEMA = 1


@dataclass(frozen=True)
class Bin:
    """Perplexity of the tokens in a range of positions.

    Attributes:
        start: First position.
        stop: Position behind the last one.
        score: Perplexity.
        difference: Relative change against dense attention; None for dense attention itself.
    """

    start: int
    stop: int
    score: Estimate
    difference: Estimate | None


@dataclass(frozen=True)
class Cell:
    """One task at one length under one policy.

    Attributes:
        task: As in `EvalConfig.tasks`.
        metric: What `score` is: a name of `scores.SCORES`, `mixed` for files of several benchmark
            subsets, or `perplexity`, the only one of which less is better.
        length: Tokens a prompt, at most.
        policy: Policy of all heads, or `auto`.
        settings: Options in which cells of one policy differ (`gamma`, `slack`, `k`, ...).
        prompts: Prompts.
        tokens: Tokens of a prompt, on average.
        score: Mean of the benchmark's score, 0 to 1; perplexity for `perplexity`.
        difference: Score minus dense attention's, prompt by prompt; for `perplexity` the relative
            change. None for dense attention itself.
        agreement: Share of prompts with the very text of dense attention.
        recall: Attention mass inside the patterns, mean over heads; None unless measured.
        recall_worst: The same of the worst 5 % of heads.
        density: Computed blocks over causal blocks.
        selection_work: Work of choosing the patterns, as a share of dense attention's.
        hidden_error: Relative error of the last hidden state of the prompt's last token.
        layer_errors: By layer, relative error of the attention output against dense attention on
            the same inputs; empty unless measured.
        ttft_s: Median seconds to the first token; None unless measured.
        speedup: Median of dense attention's time to first token over ours, prompt by prompt and in
            turns with it; None where nothing was sparse, or nothing was timed.
        heads: Heads by the policy they took, over all prompts.
        kl: KL divergence of the predictions from dense attention's, in nats a position, over all
            positions of the prompts; None unless measured.
        top1_agreement: Share of the positions whose most likely next token is dense attention's.
        bins: Perplexity by position, where there are tokens; empty for other tasks.
        answer_kl: With sparse decode steps, the KL divergence of the steps that follow dense
            attention's answer, prefill and all, in nats a step; None unless measured.
        answer_agreement: Share of these steps with dense attention's most likely next token.
        decode_density: Blocks that decode steps read over all; None of dense ones.
    """

    task: str
    metric: str
    length: int
    policy: str
    settings: dict[str, Any]
    prompts: int
    tokens: float
    score: Estimate
    difference: Estimate | None
    agreement: Estimate | None
    recall: Estimate | None
    recall_worst: Estimate | None
    density: Estimate
    selection_work: Estimate
    hidden_error: Estimate | None
    layer_errors: tuple[Estimate, ...]
    ttft_s: Estimate | None
    speedup: Estimate | None
    heads: dict[str, int]
    kl: Estimate | None = None
    top1_agreement: Estimate | None = None
    bins: tuple[Bin, ...] = ()
    answer_kl: Estimate | None = None
    answer_agreement: Estimate | None = None
    decode_density: Estimate | None = None

    @property
    def effective_density(self) -> float:
        """Density and selection work together: all work as a share of dense attention's."""
        return self.density.value + self.selection_work.value

    @property
    def label(self) -> str:
        """The policy and its settings in words."""
        return label(self.policy, self.settings)

    @property
    def line(self) -> str:
        """The line of a frontier that it is a point of."""
        return line(self.policy, self.settings)

    def to_dict(self) -> dict[str, Any]:
        """The fields and `effective_density`, JSON-ready."""
        return {**asdict(self), "effective_density": self.effective_density}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cell:
        """The inverse of `to_dict`."""
        # Files of older versions lack the newer fields.
        names = [field.name for field in fields(cls) if field.name in values]
        found = {name: _estimates(values[name]) for name in names}
        return cls(**{**found, "bins": tuple(Bin(**bin_) for bin_ in found["bins"])})


def _estimates(value: Any) -> Any:
    """A value of JSON with its estimates as such, and lists as tuples."""
    if isinstance(value, list):
        return tuple(map(_estimates, value))
    if not isinstance(value, dict):
        return value
    if value.keys() == {field.name for field in fields(Estimate)}:
        return Estimate(**value)
    return {name: _estimates(inner) for name, inner in value.items()}


def label(policy: str, settings: Mapping[str, Any]) -> str:
    """A policy and its settings in words, as `auto, gamma 0.9`."""
    return ", ".join([policy, *(f"{name} {value}" for name, value in settings.items())])


def is_baseline(policy: str, settings: Mapping[str, Any]) -> bool:
    """Whether it is dense attention, decode steps and all."""
    return policy == DENSE and not settings


def line(policy: str, settings: Mapping[str, Any]) -> str:
    """The line of a frontier that a policy with its settings is a point of.

    A policy is a line. Artifacts whose names end in a number are one for each name before it.

    >>> line("auto", {"artifact": "budget-20"}), line("smoothed", {"gamma": 0.9})
    ('auto, budget', 'smoothed')
    """
    numbered = re.fullmatch(r"(.+)-[0-9]+", str(settings.get("artifact", "")))
    return policy if numbered is None else f"{policy}, {numbered[1]}"


def make_cell(
    task: str,
    metric: str,
    length: int,
    policy: str,
    settings: dict[str, Any],
    outcomes: Sequence[Outcome],
    dense: Sequence[Outcome],
) -> Cell:
    """One cell.

    Args:
        task: Name of the task.
        metric: Name of its score.
        length: Tokens a prompt, at most.
        policy: As in `Cell`.
        settings: As in `Cell`.
        outcomes: Its outcomes, one for every prompt.
        dense: Dense attention's, of the same prompts.
    """
    is_dense = is_baseline(policy, settings)
    recalls = _recalls(outcomes)
    score, difference = _score(metric, outcomes, dense)
    return Cell(
        task=task,
        metric=metric,
        length=length,
        policy=policy,
        settings=settings,
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
        ttft_s=_of_all([o.ttft_s for o in outcomes], median),
        speedup=None if is_dense else _speedup(outcomes),
        heads=_heads(outcomes),
        kl=_of_all([o.kl for o in outcomes]),
        top1_agreement=_of_all([o.top1_agreement for o in outcomes]),
        bins=_bins(length, outcomes, dense, is_dense=is_dense),
        answer_kl=_of_some([o.answer_kl for o in outcomes]),
        answer_agreement=_of_some([o.answer_agreement for o in outcomes]),
        decode_density=_of_some([o.decode_density for o in outcomes]),
    )


def _recalls(outcomes: Sequence[Outcome]) -> Array | None:
    """Recall `[P, K]` by prompt and head; None where it was not measured."""
    heads = max(len(o.recalls) for o in outcomes)
    if heads == 0:
        return None
    # A prompt that is too short for patterns ran dense by itself, and has none.
    rows = [o.recalls or (1.0,) * heads for o in outcomes]
    return np.array(rows)


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


def _of_all(
    values: Sequence[float | None], statistic: Callable[[Array], Array] = mean
) -> Estimate | None:
    """A statistic over prompts; None unless all of them have a value."""
    measured = [value for value in values if value is not None]
    return bootstrap(measured, statistic) if len(measured) == len(values) else None


def _of_some(values: Sequence[float | None]) -> Estimate | None:
    """The mean over the prompts that have a value; None where none has."""
    measured = [value for value in values if value is not None]
    return bootstrap(measured) if measured else None


def _speedup(outcomes: Sequence[Outcome]) -> Estimate | None:
    if all(o.density == 1 for o in outcomes):
        return None
    times = [(o.dense_ttft_s, o.ttft_s) for o in outcomes]
    return _of_all([None if d is None or s is None else d / s for d, s in times], median)


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
        # A prompt that is shorter than the others has no token in the last ones.
        losses = [
            (ours, theirs)
            for one, other in zip(outcomes, dense, strict=True)
            if (ours := one.bins[number]) is not None and (theirs := other.bins[number]) is not None
        ]
        if not losses:
            continue
        score, change = _perplexity(*zip(*losses, strict=True))
        # The first position of a bin: the least one that `position * count // length` gives it.
        edges = [math.ceil(edge * length / count) for edge in (number, number + 1)]
        bins.append(Bin(edges[0], edges[1], score, None if is_dense else change))
    return tuple(bins)


@dataclass(frozen=True)
class Summary:
    """One policy over all tasks and lengths: plain means over the cells.

    Attributes:
        policy: Policy.
        settings: As in `Cell`.
        accuracy: Score of the tasks that ask; None if none does.
        difference: The same, minus dense attention's.
        perplexity_change: Relative change of perplexity; None without such a task.
        kl: KL divergence from dense attention, in nats a position; None unless measured.
        top1_agreement: Share of the positions with dense attention's most likely next token.
        recall: Attention mass inside the patterns; None unless measured.
        recall_worst: The same of the worst 5 % of heads.
        density: Computed blocks over causal blocks.
        selection_work: Share of dense attention's work.
        hidden_error: Relative error of the last hidden state.
        attention_error: Relative error of the attention output, mean over layers.
        ttft_s: Seconds to the first token; None unless measured.
        speedup: Dense attention's time over ours; None where nothing was sparse or timed.
        answer_kl: As in `Cell`.
        answer_agreement: As in `Cell`.
        decode_density: As in `Cell`.
    """

    policy: str
    settings: dict[str, Any]
    accuracy: float | None
    difference: float | None
    perplexity_change: float | None
    recall: float | None
    recall_worst: float | None
    density: float
    selection_work: float
    hidden_error: float | None
    attention_error: float | None
    ttft_s: float | None
    speedup: float | None
    kl: float | None = None
    top1_agreement: float | None = None
    answer_kl: float | None = None
    answer_agreement: float | None = None
    decode_density: float | None = None

    @property
    def effective_density(self) -> float:
        """Density and selection work together."""
        return self.density + self.selection_work

    @property
    def label(self) -> str:
        """The policy and its settings in words."""
        return label(self.policy, self.settings)

    @property
    def line(self) -> str:
        """The line of a frontier that it is a point of."""
        return line(self.policy, self.settings)


@dataclass(frozen=True)
class Evaluation:
    """All cells of an evaluation, dense attention's among them.

    Attributes:
        config: What was asked for.
        context: What it ran on: artifact and model digests, device, dtype, versions.
        cells: By task, length, and policy in the order of the configuration, dense first.
    """

    config: EvalConfig
    context: dict[str, Any]
    cells: tuple[Cell, ...]

    def cell(self, task: str, length: int, policy: str, **settings: Any) -> Cell:
        """The cell of a task, length and policy; settings that are not named do not count.

        Raises:
            KeyError: there is none.
        """
        for cell in self.cells:
            if (cell.task, cell.length, cell.policy) == (task, length, policy) and all(
                cell.settings.get(name) == value for name, value in settings.items()
            ):
                return cell
        raise KeyError(f"no cell of {task} at {length} tokens under {label(policy, settings)}")

    def summaries(self) -> list[Summary]:
        """One summary for every policy and setting, dense attention's first."""
        return summarize_cells(self.cells)

    def __repr__(self) -> str:
        return f"<Evaluation\n{self.summary()}>"

    def summary(self) -> str:
        """What was found of every policy over all tasks and lengths, in a line each."""
        return f"{self._title()}\n{text_table(*self._short_table())}"

    def _repr_html_(self) -> str:
        """The same, for notebooks."""
        return html_table(self._title(), *self._short_table())

    def _title(self) -> str:
        dense = (cell for cell in self.cells if is_baseline(cell.policy, cell.settings))
        prompts = sum(cell.prompts for cell in dense)
        return f"{self.context['model']} on {self.context['device']}, {prompt_count(prompts)}"

    def _short_table(self) -> tuple[list[str], list[list[str]]]:
        figures: dict[str, Callable[[Summary], float | None]] = {
            "accuracy": lambda found: found.accuracy,
            "perplexity": lambda found: found.perplexity_change,
            "KL": lambda found: found.kl,
            "recall": lambda found: found.recall,
            "density": lambda found: found.effective_density,
            "speedup": lambda found: found.speedup,
            "answer KL": lambda found: found.answer_kl,
            "decode": lambda found: found.decode_density,
        }
        every = self.summaries()
        # What no policy was measured by is left out.
        shown = {
            name: figure
            for name, figure in figures.items()
            if any(figure(found) is not None for found in every)
        }
        forms = {"perplexity": "+.2%", "KL": ".2g", "answer KL": ".2g"}
        rows = [
            [found.label]
            + [
                "-" if (value := figure(found)) is None else format(value, forms.get(name, ".3f"))
                for name, figure in shown.items()
            ]
            for found in every
        ]
        return ["policy", *shown], rows

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-ready; docs/evaluation.md describes the format."""
        return {
            "schema": SCHEMA,
            "config": self.config.to_dict(),
            "context": self.context,
            "summaries": [
                {**asdict(s), "effective_density": s.effective_density} for s in self.summaries()
            ],
            "cells": [cell.to_dict() for cell in self.cells],
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """The inverse of `to_dict`.

        Raises:
            DataError: it is no evaluation, or one of another version.
        """
        version = values.get("schema")
        if version != SCHEMA:
            raise DataError(
                f"an evaluation of schema {SCHEMA} is expected, got {printable(version)}: "
                "run sp eval again"
            )
        try:
            return cls(
                EvalConfig.from_dict(values["config"]),
                dict(values["context"]),
                tuple(Cell.from_dict(cell) for cell in values["cells"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"the evaluation is damaged ({error}): run sp eval again") from error


def load_evaluation(path: str | Path) -> Evaluation:
    """Reads the JSON of an evaluation.

    Raises:
        DataError: the file is missing, damaged, or of another version.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{printable(path)} cannot be read as an evaluation: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{printable(path)} is no evaluation: it must hold a JSON object")
    return Evaluation.from_dict(values)


def summarize_cells(cells: tuple[Cell, ...]) -> list[Summary]:
    """Summaries of cells, in the order in which policies and settings first appear."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.label, []).append(cell)
    ordered = sorted(
        groups.values(), key=lambda group: not is_baseline(group[0].policy, group[0].settings)
    )
    return [_summary(group) for group in ordered]


def _summary(cells: list[Cell]) -> Summary:
    asking = [cell for cell in cells if cell.metric != PERPLEXITY]
    reading = [cell for cell in cells if cell.metric == PERPLEXITY]
    errors = [error.value for cell in cells for error in cell.layer_errors]
    density, work, ttft = (
        _mean([getattr(cell, name) for cell in cells])
        for name in ("density", "selection_work", "ttft_s")
    )
    assert density is not None
    assert work is not None
    return Summary(
        policy=cells[0].policy,
        settings=cells[0].settings,
        accuracy=_mean([cell.score for cell in asking]),
        difference=_mean([cell.difference for cell in asking]),
        perplexity_change=_mean([cell.difference for cell in reading]),
        recall=_mean([cell.recall for cell in cells]),
        recall_worst=_mean([cell.recall_worst for cell in cells]),
        density=density,
        selection_work=work,
        hidden_error=_mean([cell.hidden_error for cell in cells]),
        attention_error=sum(errors) / len(errors) if errors else None,
        ttft_s=ttft,
        speedup=_mean([cell.speedup for cell in cells]),
        kl=_mean([cell.kl for cell in cells]),
        top1_agreement=_mean([cell.top1_agreement for cell in cells]),
        answer_kl=_mean([cell.answer_kl for cell in cells]),
        answer_agreement=_mean([cell.answer_agreement for cell in cells]),
        decode_density=_mean([cell.decode_density for cell in cells]),
    )


def _mean(estimates: list[Estimate | None]) -> float | None:
    values = [estimate.value for estimate in estimates if estimate is not None]
    return sum(values) / len(values) if values else None
