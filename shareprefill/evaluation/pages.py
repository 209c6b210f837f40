"""The HTML pages of an evaluation and of a sweep, and their figures.

Figures are built inside `figure_style()`; the frontier, which is a file of its own too, sees to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from shareprefill.evaluation.config import DENSE, PERPLEXITY
from shareprefill.evaluation.frontier import ORACLE, TARGET_RECALL, cost, nearest_labels
from shareprefill.evaluation.results import (
    Cell,
    Evaluation,
    Summary,
    summarize_cells,
)
from shareprefill.evaluation.statistics import Estimate
from shareprefill.evaluation.sweep import COSTS, GAINS, Curve, Sweep
from shareprefill.evaluation.tables import (
    NAMES,
    Table,
    cell_table,
    curve_table,
    density_table,
    knee_table,
    reached_table,
    summary_table,
)
from shareprefill.plain_tables import prompt_count
from shareprefill.report.drawing import (
    INK,
    MARKERS,
    MUTED,
    SERIES,
    figure_style,
    legend_figure,
    plain_label,
)
from shareprefill.report.marks import EVALUATION, SWEEP, mark_of
from shareprefill.report.page import Page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ALONE, _PANEL = (4.2, 3.0), (4.4, 3.9)  # inches
# A policy whose perplexity rises by less than this is called close to dense attention.
_CLOSE = 0.01
_LEGEND = 1.7
# Of a curve's knees, the one that the verdict of a sweep tells.
_KNEE = "recall against effective_density"
# What a frontier shows of a summary, one row of panels each; dense attention is at the level.
_FRONTIERS: tuple[tuple[str, str, float], ...] = (
    ("recall", "recall", TARGET_RECALL),
    ("kl", "KL from dense, nats", 0.0),
    ("perplexity_change", "perplexity against dense", 0.0),
)


def evaluation_page(evaluation: Evaluation) -> str:
    """The page of an evaluation, as one self-contained HTML file."""
    context, config = evaluation.context, evaluation.config
    page = Page(
        f"Evaluation of {context['model']}",
        f"{prompt_count(config.samples)} of each task and length, {context['device']}, "
        f"{context['dtype']}",
        mark_of(EVALUATION, context["model"]),
    )
    _add_verdict(page, evaluation)
    page.heading("Policies")
    page.text(
        "Means over all tasks and lengths. Effective density is the share of causal blocks that "
        "are computed, with the work of choosing them added as a share of dense attention's. KL is "
        "the divergence of the predictions from dense attention's, in nats a position; top 1 is "
        "the share of positions with the same most likely next token."
    )
    _add_table(page, summary_table(evaluation))
    with figure_style():
        _add_frontiers(page, evaluation)
        _add_layer_errors(page, evaluation)
        _add_positions(page, evaluation)
    page.heading("All figures")
    page.text(
        "With 95 % intervals over prompts: Wilson's, and Newcombe's for paired differences, where "
        "all scores are 0 or 1; percentile bootstrap otherwise."
    )
    _add_table(page, cell_table(evaluation.cells))
    page.heading("How it was measured")
    page.table(("what", "value"), [(name, str(value)) for name, value in context.items()])
    return page.html()


def _add_knees(page: Page, sweep: Sweep) -> None:
    """Of every parameter the value at which more density stops paying, and what it gives."""
    sentences = []
    for curve in sweep.curves:
        knee = curve.knees.get(_KNEE)
        if knee is None:
            sentences.append(f"{curve.parameter}: no value stands out.")
            continue
        point = curve.points[curve.values.index(knee)]
        words = (
            f"{curve.parameter} {knee:g}: {point.effective_density:.1%} of dense attention's work"
        )
        if point.recall is not None:
            words += f", {point.recall:.1%} of the attention"
        if point.perplexity_change is not None:
            words += f", perplexity {point.perplexity_change:+.2%}"
        sentences.append(f"{words}. Beyond it, more work buys less recall.")
    is_good = any(curve.knees.get(_KNEE) is not None for curve in sweep.curves)
    page.verdict(" ".join(sentences), is_good=is_good)


def _add_verdict(page: Page, evaluation: Evaluation) -> None:
    """The policy that the artifact plans, or else the first, in a sentence or two.

    Of several gammas, the one whose recall is nearest to the target.
    """
    nearest = nearest_labels(evaluation)
    summaries = summarize_cells(evaluation.cells)
    found = [s for s in summaries if s.policy not in (DENSE, ORACLE) and s.label in nearest]
    # Of sparse steps alone, whose prefills are dense, where there is nothing else.
    found = found or [s for s in summaries if s.decode_density is not None]
    if not found:
        page.verdict("Dense attention alone was run: there is nothing to compare.", is_good=False)
        return
    best = next((summary for summary in found if summary.policy == "auto"), found[0])
    parts = [f"{best.effective_density:.1%} of dense attention's work"]
    if best.recall is not None:
        parts.append(f"{best.recall:.1%} of the attention")
    if best.perplexity_change is not None:
        parts.append(f"perplexity {best.perplexity_change:+.2%}")
    if best.difference is not None:
        parts.append(f"score {100 * best.difference:+.1f} points")
    if best.kl is not None:
        parts.append(f"KL {best.kl:.2g} nats a position")
    if best.decode_density is not None:
        parts.append(f"decode steps read {best.decode_density:.1%} of the blocks")
    if best.answer_kl is not None:
        parts.append(f"KL of the answer {best.answer_kl:.2g} nats a token")
    is_sparse = best.density < 1
    speed = "Times were not measured" if is_sparse else "No prefill was sparse"
    if best.speedup is not None:
        speed = f"The first token came {best.speedup:.2f} times as fast as with dense attention"
    lost, is_slow = best.perplexity_change, best.speedup is not None and best.speedup < 1
    doubtful = lost is None or lost > _CLOSE or not is_sparse or is_slow
    page.verdict(f"{best.label}: {', '.join(parts)}. {speed}.", is_good=not doubtful)


def _add_table(page: Page, table: Table, caption: str = "") -> None:
    """A table of texts, those that are a dash left empty; nothing where it has no rows."""
    columns, rows = table
    if rows:
        cells = [[None if cell == "-" else cell for cell in row] for row in rows]
        page.table(columns, cells, caption)


def _add_frontiers(page: Page, evaluation: Evaluation) -> None:
    page.heading("Frontier")
    for length in evaluation.config.lengths:
        cells = [cell for cell in evaluation.cells if cell.length == length]
        if any(cell.recall is not None for cell in cells):
            page.panels(
                task_panels(cells, "recall", lambda cell: cell.recall),
                f"Recall against effective density at {length} tokens; one line a policy, one "
                "point a gamma, with 95 % intervals. The oracle, a bound, is at its density alone.",
                f"Recall against effective density at {length} tokens",
            )
        if any(cell.kl is not None for cell in cells):
            page.panels(
                task_panels(cells, "KL", lambda cell: cell.kl),
                "KL divergence from dense attention, in nats a position, against effective "
                f"density at {length} tokens: less is better.",
                f"KL divergence against effective density at {length} tokens",
            )
        page.panels(
            task_panels(cells, "score", lambda cell: cell.score),
            f"Score (perplexity: less is better) against effective density at {length} tokens; "
            "the dashed line is dense attention.",
            f"Score against effective density at {length} tokens",
        )
    recall = f"At a mean recall of {TARGET_RECALL}, between the gammas"
    _add_table(page, reached_table(evaluation), recall)
    _add_table(page, density_table(evaluation), "At equal effective density, between the gammas")


def _add_layer_errors(page: Page, evaluation: Evaluation) -> None:
    if not any(cell.layer_errors for cell in evaluation.cells):
        return
    page.heading("Attention error by layer")
    page.figure(
        layer_errors(evaluation),
        "Relative error of every layer's attention output against dense attention on the same "
        "queries, keys and values; mean over tasks and lengths. Of several gammas, the one whose "
        f"recall is nearest to {TARGET_RECALL}.",
    )


def _add_positions(page: Page, evaluation: Evaluation) -> None:
    cells = [cell for cell in evaluation.cells if cell.bins and cell.policy != DENSE]
    if not cells:
        return
    page.heading("Perplexity by position")
    labels = nearest_labels(evaluation)
    for task, length in dict.fromkeys((cell.task, cell.length) for cell in cells):
        chosen = [
            cell
            for cell in cells
            if (cell.task, cell.length) == (task, length) and cell.label in labels
        ]
        page.figure(
            perplexity_by_position(chosen),
            f"{task} at {length} tokens: relative change of perplexity.",
        )


def sweep_page(sweep: Sweep) -> str:
    """The page of a sweep, as one self-contained HTML file."""
    context, config = sweep.context, sweep.config
    page = Page(
        f"Sweep of {context['model']}",
        f"policy {config.policy}, {prompt_count(config.samples)} of each task at {config.length} "
        f"tokens, {context['device']}, {context['dtype']}",
        mark_of(SWEEP, context["model"]),
    )
    _add_knees(page, sweep)
    page.text(
        "One parameter is changed at a time. The knee is the point farthest above the chord from "
        "the cheapest to the dearest point that no other beats, both axes scaled to 0 to 1 "
        "(Satopää et al., 2011)."
    )
    for curve in sweep.curves:
        page.heading(curve.parameter)
        _add_table(page, curve_table(curve, sweep.dense))
        with figure_style():
            page.panels(
                sweep_panels(curve, sweep.dense),
                f"What {curve.parameter} buys. A ring marks the knee; the dashed line is dense "
                "attention.",
                f"What {curve.parameter} buys",
            )
        _add_table(page, knee_table(curve))
    page.heading("How it was measured")
    page.table(("what", "value"), [(name, str(value)) for name, value in context.items()])
    return page.html()


def frontier_figure(evaluation: Evaluation) -> Figure:
    """Recall, KL and perplexity against effective density: means over tasks.

    One column of panels a length, one row a figure that was measured; one line a policy, one point
    a gamma. The oracle, a bound, is at its density alone.

    Args:
        evaluation: With recall.
    """
    from matplotlib.figure import Figure

    lengths = evaluation.config.lengths
    policies = list(dict.fromkeys(c.line for c in evaluation.cells if c.policy != DENSE))
    # The oracle comes first and has a look of its own: colours go to the others.
    others = [policy for policy in policies if policy != ORACLE]
    policies.sort(key=lambda policy: policy != ORACLE)
    by_length = [
        summarize_cells(tuple(c for c in evaluation.cells if c.length == n)) for n in lengths
    ]
    shown = [
        frontier
        for frontier in _FRONTIERS
        if any(getattr(s, frontier[0]) is not None for summaries in by_length for s in summaries)
    ]
    with figure_style():
        size = (_PANEL[0] * len(lengths) + _LEGEND, _PANEL[1] * len(shown))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(shown), len(lengths), squeeze=False)
        for row, (name, label, level) in zip(axes, shown, strict=True):
            for panel, length, summaries in zip(row, lengths, by_length, strict=True):
                for policy in policies:
                    points = [s for s in summaries if s.line == policy]
                    number = None if policy == ORACLE else others.index(policy)
                    _frontier(panel, points, name, policy, number)
                _scale(panel, name, level)
                panel.set_title(f"{length} tokens")
                panel.set_xlabel("effective density")
                panel.set_ylabel(label)
                panel.grid(visible=True)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper")
    return figure


def _frontier(
    panel: Axes, points: Sequence[Summary], name: str, policy: str, number: int | None
) -> None:
    drawn = sorted((cost(p), value) for p in points if (value := getattr(p, name)) is not None)
    if number is None:
        look: dict[str, Any] = {"color": INK, "marker": ".", "linestyle": "--"}
    else:
        look = {**_look(number), "linestyle": "-" if number < len(SERIES) else "-."}
    x, y = [p[0] for p in drawn], [p[1] for p in drawn]
    panel.plot(x, y, label=plain_label(policy), markersize=5, **look)


def _scale(panel: Axes, name: str, level: float) -> None:
    """Divergences span several powers of ten; the others have a level to be compared with."""
    if name == "kl":
        _logarithmic(panel)
        return
    panel.axhline(level, color=MUTED, linestyle=":", linewidth=1)
    if name == "perplexity_change":
        from matplotlib.ticker import PercentFormatter

        panel.yaxis.set_major_formatter(PercentFormatter(1.0))


def _logarithmic(panel: Axes) -> None:
    if any(np.any(np.asarray(line.get_ydata()) > 0) for line in panel.get_lines()):
        panel.set_yscale("log")


def task_panels(
    cells: list[Cell], name: str, read: Callable[[Cell], Estimate | None]
) -> list[Figure]:
    """A figure a task: what every policy gives against effective density; and the legend.

    Args:
        cells: Of one length, dense attention's among them.
        name: What is shown; `score` is called perplexity where it is one, `KL` is logarithmic.
        read: Gives it.
    """
    policies = list(dict.fromkeys(cell.line for cell in cells if cell.policy != DENSE))
    figures = []
    for task in dict.fromkeys(cell.task for cell in cells):
        figure, panel = _one_panel()
        for number, policy in enumerate(policies):
            chosen = [c for c in cells if (c.task, c.line) == (task, policy)]
            _with_intervals(panel, chosen, read, policy, number)
        dense = next(c for c in cells if (c.task, c.policy) == (task, DENSE))
        level = read(dense)
        if level is not None:
            panel.axhline(level.value, color=MUTED, linestyle="--", linewidth=1)
        if name == "KL":
            _logarithmic(panel)
        panel.set_title(plain_label(task, 34))
        panel.set_xlabel("effective density")
        is_perplexity = dense.metric == PERPLEXITY and name == "score"
        panel.set_ylabel("perplexity" if is_perplexity else name)
        panel.grid(visible=True)
        figures.append(figure)
    return [*figures, legend_figure(*figures[0].axes[0].get_legend_handles_labels())]


def _one_panel() -> tuple[Figure, Axes]:
    """A figure of one panel, to stand beside others."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_ALONE, layout="constrained")
    return figure, figure.subplots()


def _with_intervals(
    panel: Axes,
    cells: list[Cell],
    read: Callable[[Cell], Estimate | None],
    label: str,
    number: int,
) -> None:
    points = sorted(
        (cost(cell), estimate.value, estimate.low, estimate.high)
        for cell in cells
        if (estimate := read(cell)) is not None
    )
    if not points:
        return
    x, y = [p[0] for p in points], [p[1] for p in points]
    below = [0.0 if p[2] is None else max(0.0, p[1] - p[2]) for p in points]
    above = [0.0 if p[3] is None else max(0.0, p[3] - p[1]) for p in points]
    look = _look(number)
    panel.errorbar(
        x, y, yerr=[below, above], label=plain_label(label), markersize=5, elinewidth=0.8, **look
    )


def _look(number: int) -> dict[str, Any]:
    return {
        "color": SERIES[number % len(SERIES)],
        "marker": MARKERS[(number + number // len(SERIES)) % len(MARKERS)],
    }


def layer_errors(evaluation: Evaluation) -> Figure:
    """Relative error of every layer's output: one line a policy, mean over tasks and lengths."""
    from matplotlib.figure import Figure

    cells = [cell for cell in evaluation.cells if cell.layer_errors]
    figure = Figure(figsize=(5.4, 3.9), layout="constrained")
    panel = figure.subplots()
    for number, label in enumerate(nearest_labels(evaluation)):
        rows = [cell.layer_errors for cell in cells if cell.label == label]
        means = [sum(e.value for e in layer) / len(rows) for layer in zip(*rows, strict=True)]
        places = range(len(means))
        panel.plot(places, means, label=plain_label(label), markersize=4, **_look(number))
    panel.set_xlabel("layer")
    panel.set_ylabel("relative error of the output")
    panel.set_ylim(bottom=0)
    panel.grid(visible=True)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def perplexity_by_position(cells: Sequence[Cell]) -> Figure:
    """Change of perplexity by position: one line a cell, all of one task and length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.9), layout="constrained")
    panel = figure.subplots()
    panel.axhline(0, color=INK, linewidth=0.8)
    for number, cell in enumerate(cells):
        panel.plot(
            [(b.start + b.stop) / 2 for b in cell.bins],
            [100 * b.difference.value for b in cell.bins if b.difference is not None],
            label=plain_label(cell.label),
            markersize=4,
            **_look(number),
        )
    panel.set_xlabel("position in the prompt, tokens")
    panel.set_ylabel("perplexity against dense, %")
    panel.grid(visible=True)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def sweep_panels(curve: Curve, dense: Summary) -> list[Figure]:
    """What a parameter buys: a figure a gain and cost, with the knees ringed."""
    gains = [gain for gain in GAINS if f"{gain} against {COSTS[0]}" in curve.knees]
    figures = []
    for gain in gains:
        for cost_name in COSTS:
            figure, panel = _one_panel()
            _sweep_panel(panel, curve, gain, cost_name)
            level = 0.0 if gain in ("perplexity_change", "kl") else getattr(dense, gain)
            if level is not None:
                panel.axhline(level, color=MUTED, linestyle="--", linewidth=1)
            figures.append(figure)
    return figures


def _sweep_panel(panel: Axes, curve: Curve, gain: str, cost_name: str) -> None:
    points = [(getattr(p, cost_name), getattr(p, gain)) for p in curve.points]
    panel.plot(*zip(*points, strict=True), color=SERIES[0], marker="o", markersize=5)
    for value, point in zip(curve.values, points, strict=True):
        label = plain_label(f"{value:g}")
        panel.annotate(label, point, (5, 4), textcoords="offset points", fontsize=8)
    found = curve.knees[f"{gain} against {cost_name}"]
    if found is not None:
        x, y = points[curve.values.index(found)]
        panel.plot([x], [y], "o", markersize=13, markerfacecolor="none", markeredgecolor=INK)
    panel.set_xlabel(NAMES[cost_name])
    panel.set_ylabel(NAMES[gain])
    panel.grid(visible=True)
