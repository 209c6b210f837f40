"""What an evaluation found: one cell for every task, length and policy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from shareprefill.errors import DataError
from shareprefill.evaluation.config import DENSE, EvalConfig
from shareprefill.evaluation.statistics import Estimate
from shareprefill.files import printable

SCHEMA = 1
PERPLEXITY = "perplexity"


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
        ttft_s: Median seconds to the first token.
        speedup: Median of dense attention's time to first token over ours, in the same process.
        heads: Heads by the policy they took, over all prompts.
        bins: Perplexity by position; empty for other tasks.
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
    ttft_s: Estimate
    speedup: Estimate | None
    heads: dict[str, int]
    bins: tuple[Bin, ...] = ()

    @property
    def effective_density(self) -> float:
        """Density and selection work together: all work as a share of dense attention's."""
        return self.density.value + self.selection_work.value

    @property
    def label(self) -> str:
        """The policy and its settings in words."""
        return label(self.policy, self.settings)

    def to_dict(self) -> dict[str, Any]:
        """The fields and `effective_density`, JSON-ready."""
        return {**asdict(self), "effective_density": self.effective_density}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cell:
        """The inverse of `to_dict`."""
        found = {field.name: values[field.name] for field in fields(cls)}
        for name in _ESTIMATES:
            found[name] = _estimate(found[name])
        found["layer_errors"] = tuple(Estimate.from_dict(e) for e in found["layer_errors"])
        found["bins"] = tuple(
            Bin(b["start"], b["stop"], Estimate.from_dict(b["score"]), _estimate(b["difference"]))
            for b in found["bins"]
        )
        return cls(**found)


_ESTIMATES = (
    *("score", "difference", "agreement", "recall", "recall_worst", "density"),
    *("selection_work", "hidden_error", "ttft_s", "speedup"),
)


def _estimate(values: Mapping[str, Any] | None) -> Estimate | None:
    return None if values is None else Estimate(**values)


def label(policy: str, settings: Mapping[str, Any]) -> str:
    """A policy and its settings in words, as `share, gamma 0.9`."""
    return ", ".join([policy, *(f"{name} {value}" for name, value in settings.items())])


@dataclass(frozen=True)
class Summary:
    """One policy over all tasks and lengths: plain means over the cells.

    Attributes:
        policy: Policy.
        settings: As in `Cell`.
        accuracy: Score of the tasks that ask; None if none does.
        difference: The same, minus dense attention's.
        perplexity_change: Relative change of perplexity; None without such a task.
        recall: Attention mass inside the patterns; None unless measured.
        recall_worst: The same of the worst 5 % of heads.
        density: Computed blocks over causal blocks.
        selection_work: Share of dense attention's work.
        hidden_error: Relative error of the last hidden state.
        attention_error: Relative error of the attention output, mean over layers.
        ttft_s: Seconds to the first token.
        speedup: Dense attention's time over ours.
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
    ttft_s: float
    speedup: float | None

    @property
    def effective_density(self) -> float:
        """Density and selection work together."""
        return self.density + self.selection_work

    @property
    def label(self) -> str:
        """The policy and its settings in words."""
        return label(self.policy, self.settings)


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
    except (OSError, ValueError) as error:
        raise DataError(f"{printable(path)} cannot be read as an evaluation: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{printable(path)} is no evaluation: it must hold a JSON object")
    return Evaluation.from_dict(values)


def summarize_cells(cells: tuple[Cell, ...]) -> list[Summary]:
    """Summaries of cells, in the order in which policies and settings first appear."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.label, []).append(cell)
    ordered = sorted(groups.values(), key=lambda group: group[0].policy != DENSE)
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
    assert ttft is not None
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
    )


def _mean(estimates: list[Estimate | None]) -> float | None:
    values = [estimate.value for estimate in estimates if estimate is not None]
    return sum(values) / len(values) if values else None
