"""The evaluation's HTML page: tables, the frontier, errors by layer and by position."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from shareprefill.evaluation.config import DENSE
from shareprefill.evaluation.frontier import ORACLE, TARGET_RECALL, reached
from shareprefill.evaluation.results import PERPLEXITY, Cell, Evaluation
from shareprefill.evaluation.statistics import Estimate
from shareprefill.report.drawing import INK, MARKERS, MUTED, SERIES, figure_style, plain_label
from shareprefill.report.page import Page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
_PANEL = (3.3, 2.7)  # inches


def evaluation_page(evaluation: Evaluation) -> str:
    """The page, as one self-contained HTML file."""
    context, config = evaluation.context, evaluation.config
    page = Page(
        f"Evaluation of {context['model']}",
        f"{config.samples} prompts of each task and length, {context['device']}, "
        f"{context['dtype']}",
    )
    page.heading("Policies")
    page.text(
        "Means over all tasks and lengths. Effective density is the share of causal blocks that "
        "are computed, with the work of choosing them added as a share of dense attention's."
    )
    add_table(page, *summary_table(evaluation))
    _add_frontiers(page, evaluation)
    _add_layer_errors(page, evaluation)
    _add_positions(page, evaluation)
    page.heading("All figures")
    page.text(
        "With 95 % intervals over prompts: Wilson's, and Newcombe's for paired differences, where "
        "all scores are 0 or 1; percentile bootstrap otherwise."
    )
    add_table(page, *cell_table(evaluation.cells))
    page.heading("How it was measured")
    page.table(("what", "value"), [(name, str(value)) for name, value in context.items()])
    return page.html()


def add_table(page: Page, columns: list[str], rows: list[list[str]], caption: str = "") -> None:
    """A table of texts, those that are a dash left empty."""
    cells = [[None if cell == "-" else cell for cell in row] for row in rows]
    page.table(columns, cells, caption)


def summary_table(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the summaries."""
    columns = ["policy", "accuracy", "against dense", "perplexity", "recall", "worst 5 %"]
    columns += ["density", "selection", "effective", "error", "speedup"]
    rows = [
        [
            summary.label,
            number(summary.accuracy),
            number(summary.difference, "+.3f"),
            number(summary.perplexity_change, "+.2%"),
            number(summary.recall),
            number(summary.recall_worst),
            number(summary.density),
            number(summary.selection_work),
            number(summary.effective_density),
            number(summary.attention_error),
            number(summary.speedup, ".2f"),
        ]
        for summary in evaluation.summaries()
    ]
    return columns, rows


def cell_table(cells: Iterable[Cell]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of all cells."""
    columns = ["task", "tokens", "policy", "score", "against dense", "recall", "worst 5 %"]
    columns += ["density", "selection", "hidden error", "first token, s", "speedup"]
    rows = [
        [
            cell.task,
            str(cell.length),
            cell.label,
            interval(cell.score),
            interval(cell.difference, "+.3f"),
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
    return columns, rows


def short_table(cells: Iterable[Cell]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of all cells, as many as a terminal holds."""
    columns = ["task", "tokens", "policy", "score", "against dense", "recall", "worst 5 %"]
    columns += ["effective"]
    rows = [
        [
            cell.task,
            str(cell.length),
            cell.label,
            interval(cell.score),
            interval(cell.difference, "+.3f"),
            number(None if cell.recall is None else cell.recall.value),
            number(None if cell.recall_worst is None else cell.recall_worst.value),
            number(cell.effective_density),
        ]
        for cell in cells
    ]
    return columns, rows


def interval(estimate: Estimate | None, form: str = ".3f") -> str:
    """An estimate with its interval, as `0.950 [0.920, 0.970]`."""
    if estimate is None:
        return "-"
    text = format(estimate.value, form)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{format(estimate.low, form)}, {format(estimate.high, form)}]"


def reached_table(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the policies at the target recall; no rows without several gammas."""
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


def number(value: float | None, form: str = ".3f") -> str:
    """A figure, or a dash."""
    return "-" if value is None else format(value, form)


def _add_frontiers(page: Page, evaluation: Evaluation) -> None:
    page.heading("Frontier")
    for length in evaluation.config.lengths:
        cells = [cell for cell in evaluation.cells if cell.length == length]
        if any(cell.recall is not None for cell in cells):
            page.figure(
                _panels(cells, "recall", lambda cell: cell.recall),
                f"Recall against effective density at {length} tokens; one line a policy, one "
                "point a gamma, with 95 % intervals. The oracle, a bound, is at its density alone.",
            )
        page.figure(
            _panels(cells, "score", lambda cell: cell.score),
            f"Score (perplexity: less is better) against effective density at {length} tokens; "
            "the dashed line is dense attention.",
        )
    columns, rows = reached_table(evaluation)
    if rows:
        add_table(page, columns, rows, f"At a mean recall of {TARGET_RECALL}, between the gammas")


def _panels(cells: list[Cell], name: str, read: Callable[[Cell], Estimate | None]) -> Figure:
    """One panel a task: a figure of every policy against effective density."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(cell.task for cell in cells))
    policies = list(dict.fromkeys(cell.policy for cell in cells if cell.policy != DENSE))
    columns = min(_COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    with figure_style():
        size = (max(_PANEL[0] * columns, 5.0), _PANEL[1] * rows + 0.8)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
        for panel, task in zip(axes, tasks, strict=False):
            for number, policy in enumerate(policies):
                chosen = [c for c in cells if (c.task, c.policy) == (task, policy)]
                _line(panel, chosen, read, policy, number)
            dense = next(c for c in cells if (c.task, c.policy) == (task, DENSE))
            level = read(dense)
            if level is not None:
                panel.axhline(level.value, color=MUTED, linestyle="--", linewidth=1)
            panel.set_title(plain_label(task, 34))
            panel.set_xlabel("effective density")
            panel.set_ylabel(
                "perplexity" if dense.metric == PERPLEXITY and name == "score" else name
            )
            panel.grid(visible=True)
        for panel in axes[len(tasks) :]:
            panel.set_axis_off()
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=max(3, 2 * columns))
    return figure


def _line(
    panel: Axes,
    cells: list[Cell],
    read: Callable[[Cell], Estimate | None],
    label: str,
    number: int,
) -> None:
    # The oracle's own work buys nothing but the knowledge of how few blocks would do.
    points = sorted(
        (
            cell.density.value if cell.policy == ORACLE else cell.effective_density,
            estimate.value,
            estimate.low,
            estimate.high,
        )
        for cell in cells
        if (estimate := read(cell)) is not None
    )
    if not points:
        return
    x, y = [p[0] for p in points], [p[1] for p in points]
    below = [0.0 if p[2] is None else max(0.0, p[1] - p[2]) for p in points]
    above = [0.0 if p[3] is None else max(0.0, p[3] - p[1]) for p in points]
    panel.errorbar(
        x,
        y,
        yerr=[below, above],
        label=plain_label(label),
        color=SERIES[number % len(SERIES)],
        marker=MARKERS[(number + number // len(SERIES)) % len(MARKERS)],
        markersize=5,
        elinewidth=0.8,
    )


def nearest_labels(evaluation: Evaluation) -> list[str]:
    """One label a policy: of its settings, the one whose recall is nearest to the target."""
    nearest: dict[str, tuple[float, str]] = {}
    for summary in evaluation.summaries():
        if summary.policy != DENSE:
            distance = abs((summary.recall or 0.0) - TARGET_RECALL)
            best = nearest.get(summary.policy)
            if best is None or distance < best[0]:
                nearest[summary.policy] = (distance, summary.label)
    return [label for _, label in nearest.values()]


def _add_layer_errors(page: Page, evaluation: Evaluation) -> None:
    cells = [cell for cell in evaluation.cells if cell.layer_errors]
    if not cells:
        return
    from matplotlib.figure import Figure

    labels = nearest_labels(evaluation)
    with figure_style():
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        panel = figure.subplots()
        for number, label in enumerate(labels):
            rows = [cell.layer_errors for cell in cells if cell.label == label]
            means = [sum(e.value for e in layer) / len(rows) for layer in zip(*rows, strict=True)]
            panel.plot(
                range(len(means)),
                means,
                label=plain_label(label),
                color=SERIES[number % len(SERIES)],
                marker=MARKERS[(number + number // len(SERIES)) % len(MARKERS)],
                markersize=4,
            )
        panel.set_xlabel("layer")
        panel.set_ylabel("relative error of the output")
        panel.set_ylim(bottom=0)
        panel.grid(visible=True)
        figure.legend(loc="outside right upper")
    page.heading("Attention error by layer")
    page.figure(
        figure,
        "Relative error of every layer's attention output against dense attention on the same "
        "queries, keys and values; mean over tasks and lengths. Of several gammas, the one whose "
        f"recall is nearest to {TARGET_RECALL}.",
    )


def _add_positions(page: Page, evaluation: Evaluation) -> None:
    cells = [cell for cell in evaluation.cells if cell.bins and cell.policy != DENSE]
    if not cells:
        return
    from matplotlib.figure import Figure

    page.heading("Perplexity by position")
    labels = nearest_labels(evaluation)
    for task, length in dict.fromkeys((cell.task, cell.length) for cell in cells):
        with figure_style():
            figure = Figure(figsize=(7.2, 3.4), layout="constrained")
            panel = figure.subplots()
            panel.axhline(0, color=INK, linewidth=0.8)
            chosen = [
                cell
                for cell in cells
                if (cell.task, cell.length) == (task, length) and cell.label in labels
            ]
            for number, cell in enumerate(chosen):
                panel.plot(
                    [(b.start + b.stop) / 2 for b in cell.bins],
                    [100 * b.difference.value for b in cell.bins if b.difference is not None],
                    label=plain_label(cell.label),
                    color=SERIES[number % len(SERIES)],
                    marker=MARKERS[(number + number // len(SERIES)) % len(MARKERS)],
                    markersize=4,
                )
            panel.set_xlabel("position in the prompt, tokens")
            panel.set_ylabel("perplexity against dense, %")
            panel.grid(visible=True)
            figure.legend(loc="outside right upper")
        page.figure(figure, f"{task} at {length} tokens: relative change of perplexity.")
