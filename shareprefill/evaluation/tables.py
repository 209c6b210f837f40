"""Evaluations and sweeps as tables of texts: for a terminal, a page, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from shareprefill.evaluation.config import DENSE
from shareprefill.evaluation.frontier import (
    TARGET_DENSITIES,
    TARGET_RECALL,
    at_density,
    nearest_labels,
    reached,
)
from shareprefill.evaluation.results import Cell, Evaluation, Summary
from shareprefill.evaluation.statistics import Estimate
from shareprefill.evaluation.sweep import Curve
from shareprefill.files import printable
from shareprefill.plain_tables import prompt_count

Table = tuple[list[str], list[list[str]]]
"""Columns and rows."""
LESS_IMPORTANT = (
    *("error", "selection", "worst 5 %", "top 1", "density", "to oracle", "first token, s"),
    *("perplexity", "against dense", "KL", "recall", "answer top 1"),
)
"""Columns that a narrow terminal goes without, the least important first."""
NAMES = {
    "recall": "recall",
    "accuracy": "accuracy",
    "perplexity_change": "perplexity, change",
    "kl": "KL, nats",
    "effective_density": "effective density",
    "ttft_s": "time to first token, s",
}
"""What figures of a summary are called."""


def number(value: float | None, form: str = ".3f") -> str:
    """A figure, or a dash."""
    return "-" if value is None else format(value, form)


def divergence(value: float | None) -> str:
    """A KL divergence in two significant digits, or a dash: it spans several powers of ten."""
    return number(value, ".2g")


def interval(estimate: Estimate | None, form: str = ".3f") -> str:
    """An estimate with its interval, as `0.950 [0.920, 0.970]`."""
    if estimate is None:
        return "-"
    text = format(estimate.value, form)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{format(estimate.low, form)}, {format(estimate.high, form)}]"


def _with_steps(
    columns: list[str], rows: list[list[str]], found: Sequence[Cell] | Sequence[Summary]
) -> Table:
    """A table with what was measured of decode steps, where any were sparse.

    Args:
        columns: Of the table.
        rows: Of the table, one for each of what was found.
        found: Cells or summaries.
    """
    if all(row.decode_density is None for row in found):
        return columns, rows
    forms = {"answer_kl": ".2g", "answer_agreement": ".3f", "decode_density": ".3f"}
    steps = []
    for row in found:
        values = [getattr(row, name) for name in forms]
        known = [v.value if isinstance(v, Estimate) else v for v in values]
        steps.append([number(*pair) for pair in zip(known, forms.values(), strict=True)])
    columns = [*columns, "answer KL", "answer top 1", "decode"]
    return columns, [[*row, *more] for row, more in zip(rows, steps, strict=True)]


def summary_table(evaluation: Evaluation) -> Table:
    """The policies, over all tasks and lengths."""
    summaries = evaluation.summaries()
    columns = ["policy", "accuracy", "against dense", "perplexity", "KL", "top 1", "recall"]
    columns += ["worst 5 %", "density", "selection", "effective", "error", "speedup"]
    rows = [
        [
            summary.label,
            number(summary.accuracy),
            number(summary.difference, "+.3f"),
            number(summary.perplexity_change, "+.2%"),
            divergence(summary.kl),
            number(summary.top1_agreement),
            number(summary.recall),
            number(summary.recall_worst),
            number(summary.density),
            number(summary.selection_work),
            number(summary.effective_density),
            number(summary.attention_error),
            number(summary.speedup, ".2f"),
        ]
        for summary in summaries
    ]
    return _with_steps(columns, rows, summaries)


def cell_table(cells: Sequence[Cell]) -> Table:
    """All cells, with their intervals."""
    columns = ["task", "tokens", "policy", "score", "against dense", "KL", "top 1", "recall"]
    columns += ["worst 5 %", "density", "selection", "hidden error", "first token, s", "speedup"]
    rows = [
        [
            *_names(cell),
            interval(cell.kl, ".2g"),
            interval(cell.top1_agreement),
            interval(cell.recall),
            interval(cell.recall_worst),
            interval(cell.density),
            interval(cell.selection_work),
            interval(cell.hidden_error),
            interval(cell.ttft_s),
            interval(cell.speedup, ".2f"),
        ]
        for cell in cells
    ]
    return _with_steps(columns, rows, cells)


def short_table(cells: Sequence[Cell]) -> Table:
    """All cells, as many columns as a terminal holds."""
    columns = ["task", "tokens", "policy", "score", "against dense", "KL", "top 1", "recall"]
    columns += ["effective"]
    rows = [
        [
            *_names(cell),
            interval(cell.kl, ".2g"),
            number(None if cell.top1_agreement is None else cell.top1_agreement.value),
            number(None if cell.recall is None else cell.recall.value),
            number(cell.effective_density),
        ]
        for cell in cells
    ]
    return _with_steps(columns, rows, cells)


def _names(cell: Cell) -> list[str]:
    score, difference = interval(cell.score), interval(cell.difference, "+.3f")
    return [cell.task, str(cell.length), cell.label, score, difference]


def reached_table(evaluation: Evaluation) -> Table:
    """The policies at the target recall; no rows without several gammas."""
    columns = ["task", "tokens", "policy", "effective", "density", "selection", "worst 5 %"]
    columns += ["error", "to oracle"]
    rows = [
        [
            point.task,
            str(point.length),
            point.policy,
            number(point.effective_density),
            number(point.density),
            number(point.selection_work),
            number(point.recall_worst),
            number(point.attention_error),
            number(point.to_oracle, ".2f"),
        ]
        for point in reached(evaluation)
    ]
    return columns, rows


def density_table(evaluation: Evaluation) -> Table:
    """The policies at equal effective densities; no rows without several gammas."""
    columns = ["task", "tokens", "policy", "effective", "KL", "to oracle", "perplexity", "top 1"]
    columns += ["recall"]
    rows = [
        [
            point.task,
            str(point.length),
            point.policy,
            number(point.effective_density, ".2f"),
            divergence(point.kl),
            number(point.kl_to_oracle, ".2f"),
            number(point.perplexity_change, "+.2%"),
            number(point.top1_agreement),
            number(point.recall),
        ]
        for density in TARGET_DENSITIES
        for point in at_density(evaluation, density)
    ]
    return columns, rows


def layer_table(evaluation: Evaluation) -> Table:
    """Errors by layer; of several gammas, the one whose recall is nearest to the target."""
    labels, means = nearest_labels(evaluation), []
    for label in labels:
        cells = [c.layer_errors for c in evaluation.cells if c.label == label and c.layer_errors]
        means.append(
            [sum(e.value for e in layer) / len(cells) for layer in zip(*cells, strict=True)]
        )
    rows = [
        [str(layer), *map(number, errors)] for layer, errors in enumerate(zip(*means, strict=True))
    ]
    return ["layer", *labels], rows


def position_table(cells: Sequence[Cell]) -> Table:
    """The change of perplexity by position, for cells of one task and length."""
    columns = ["policy", "all", *(f"{b.start} – {b.stop - 1}" for b in cells[0].bins)]
    rows = [
        [
            cell.label,
            interval(cell.difference, "+.2%"),
            *(interval(b.difference, "+.2%") for b in cell.bins),
        ]
        for cell in cells
    ]
    return columns, rows


def curve_table(curve: Curve, dense: Summary) -> Table:
    """The points of a sweep's curve, dense attention last."""
    columns = [curve.parameter, "accuracy", "perplexity", "KL", "recall", "worst 5 %", "density"]
    columns += ["selection", "effective", "error", "first token, s", "speedup"]
    named = [(str(v), p) for v, p in zip(curve.values, curve.points, strict=True)]
    rows = [
        [
            name,
            number(point.accuracy),
            number(point.perplexity_change, "+.2%"),
            divergence(point.kl),
            number(point.recall),
            number(point.recall_worst),
            number(point.density),
            number(point.selection_work),
            number(point.effective_density),
            number(point.attention_error),
            number(point.ttft_s),
            number(point.speedup, ".2f"),
        ]
        for name, point in [*named, ("dense", dense)]
    ]
    return columns, rows


def knee_table(curve: Curve) -> Table:
    """The knees of a sweep's curve."""
    rows = [
        [" against ".join(NAMES[part] for part in name.split(" against ")), number(value, "g")]
        for name, value in curve.knees.items()
    ]
    return ["knee of", curve.parameter], rows


def markdown(evaluation: Evaluation) -> str:
    """All tables of an evaluation, for a document."""
    context, config = evaluation.context, evaluation.config
    parts = [
        f"{context['model']}: {prompt_count(config.samples)} of each task and length, "
        f"{context['device']}, {context['dtype']}. With 95 % intervals over prompts.\n",
        _section("Policies, over all tasks and lengths", summary_table(evaluation)),
        _section(f"At a mean recall of {TARGET_RECALL}", reached_table(evaluation)),
        _section("At equal effective density", density_table(evaluation)),
        _section("Attention error by layer, mean over tasks and lengths", layer_table(evaluation)),
    ]
    readings = [cell for cell in evaluation.cells if cell.bins and cell.policy != DENSE]
    for task, length in dict.fromkeys((cell.task, cell.length) for cell in readings):
        chosen = [cell for cell in readings if (cell.task, cell.length) == (task, length)]
        title = f"{task} at {length} tokens against dense attention, by position"
        parts.append(_section(title, position_table(chosen)))
    parts.append(_section("All figures", cell_table(evaluation.cells)))
    return "\n".join(part for part in parts if part)


def _section(title: str, table: Table) -> str:
    """A heading and a table; nothing for a table without rows."""
    columns, rows = table
    if not rows:
        return ""
    lines = [f"### {title}", ""]
    for cells in (columns, ["---"] * len(columns), *rows):
        # Names of files come from strangers: a bar would break the row.
        escaped = (escape(printable(cell, 80), quote=False).replace("|", r"\|") for cell in cells)
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines) + "\n"
