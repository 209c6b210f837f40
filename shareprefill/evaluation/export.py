"""An evaluation for a document: one frontier plot, and its tables as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from shareprefill.evaluation.config import DENSE
from shareprefill.evaluation.frontier import ORACLE, TARGET_RECALL
from shareprefill.evaluation.page import (
    cell_table,
    interval,
    nearest_labels,
    number,
    reached_table,
    summary_table,
)
from shareprefill.evaluation.results import Cell, Evaluation, Summary, summarize_cells
from shareprefill.files import printable
from shareprefill.report.drawing import INK, MARKERS, MUTED, SERIES, figure_style, plain_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL = (4.4, 3.9)  # inches
_LEGEND = 1.7


def frontier_figure(evaluation: Evaluation) -> Figure:
    """Recall against effective density, one panel a length: means over tasks.

    One line a policy, one point a gamma. The oracle, a bound, is at its density alone.

    Args:
        evaluation: With recall.
    """
    from matplotlib.figure import Figure

    lengths = evaluation.config.lengths
    policies = list(dict.fromkeys(c.policy for c in evaluation.cells if c.policy != DENSE))
    # The oracle comes first and has a look of its own: colours go to the others.
    others = [policy for policy in policies if policy != ORACLE]
    policies.sort(key=lambda policy: policy != ORACLE)
    with figure_style():
        size = (_PANEL[0] * len(lengths) + _LEGEND, _PANEL[1])
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, len(lengths), squeeze=False)[0]
        for panel, length in zip(panels, lengths, strict=True):
            cells = tuple(cell for cell in evaluation.cells if cell.length == length)
            summaries = summarize_cells(cells)
            for policy in policies:
                points = [s for s in summaries if s.policy == policy]
                number = None if policy == ORACLE else others.index(policy)
                _line(panel, points, policy, number)
            panel.axhline(TARGET_RECALL, color=MUTED, linestyle=":", linewidth=1)
            panel.set_title(f"{length} tokens")
            panel.set_xlabel("effective density")
            panel.set_ylabel("recall")
            panel.grid(visible=True)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper")
    return figure


def _line(panel: Axes, points: Sequence[Summary], policy: str, number: int | None) -> None:
    drawn = sorted(
        (p.density if policy == ORACLE else p.effective_density, p.recall)
        for p in points
        if p.recall is not None
    )
    if number is None:
        look: dict[str, Any] = {"color": INK, "marker": ".", "linestyle": "--"}
    else:
        turn = number // len(SERIES)
        look = {
            "color": SERIES[number % len(SERIES)],
            "marker": MARKERS[(number + turn) % len(MARKERS)],
            "linestyle": "-" if turn == 0 else "-.",
        }
    x, y = [p[0] for p in drawn], [p[1] for p in drawn]
    panel.plot(x, y, label=plain_label(policy), markersize=5, **look)


def markdown(evaluation: Evaluation) -> str:
    """The tables: policies, at equal recall, errors by layer, perplexity by position, all cells."""
    context, config = evaluation.context, evaluation.config
    parts = [
        f"{context['model']}: {config.samples} prompts of each task and length, "
        f"{context['device']}, {context['dtype']}. With 95 % intervals over prompts.\n",
        _section("Policies, over all tasks and lengths", *summary_table(evaluation)),
    ]
    columns, rows = reached_table(evaluation)
    if rows:
        parts.append(_section(f"At a mean recall of {TARGET_RECALL}", columns, rows))
    columns, rows = _layer_table(evaluation)
    if rows:
        title = "Attention error by layer, mean over tasks and lengths"
        parts.append(_section(title, columns, rows))
    readings = [cell for cell in evaluation.cells if cell.bins and cell.policy != DENSE]
    for task, length in dict.fromkeys((cell.task, cell.length) for cell in readings):
        chosen = [cell for cell in readings if (cell.task, cell.length) == (task, length)]
        title = f"{task} at {length} tokens against dense attention, by position"
        parts.append(_section(title, *_position_table(chosen)))
    parts.append(_section("All figures", *cell_table(evaluation.cells)))
    return "\n".join(parts)


def _layer_table(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """One row a layer; of several gammas, the one whose recall is nearest to the target."""
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


def _position_table(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
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


def _section(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"### {title}", ""]
    for cells in (columns, ["---"] * len(columns), *rows):
        # Names of files come from strangers: a bar would break the row.
        escaped = (escape(printable(cell, 80), quote=False).replace("|", r"\|") for cell in cells)
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines) + "\n"
