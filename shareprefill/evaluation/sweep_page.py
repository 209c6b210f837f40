"""The sweep's HTML page: a table and four or six panels for every parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shareprefill.evaluation.page import add_table, number
from shareprefill.evaluation.sweeping import COSTS, GAINS, Curve, Sweep
from shareprefill.report.drawing import INK, MUTED, SERIES, figure_style, plain_label
from shareprefill.report.page import Page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from shareprefill.evaluation.results import Summary

_NAMES = {
    "recall": "recall",
    "accuracy": "accuracy",
    "perplexity_change": "perplexity, change",
    "effective_density": "effective density",
    "ttft_s": "time to first token, s",
}


def sweep_page(sweep: Sweep) -> str:
    """The page, as one self-contained HTML file."""
    context, config = sweep.context, sweep.config
    page = Page(
        f"Sweep of {context['model']}",
        f"policy {config.policy}, {config.samples} prompts of each task at {config.length} tokens, "
        f"{context['device']}, {context['dtype']}",
    )
    page.text(
        "One parameter is changed at a time. The knee is the point farthest above the chord from "
        "the cheapest to the dearest point that no other beats, both axes scaled to 0 to 1 "
        "(Satopää et al., 2011)."
    )
    for curve in sweep.curves:
        page.heading(curve.parameter)
        add_table(page, *curve_table(curve, sweep.dense))
        page.figure(
            _panels(curve, sweep.dense),
            f"What {curve.parameter} buys. A ring marks the knee; the dashed line is dense "
            "attention.",
        )
        add_table(page, *knee_table(curve))
    page.heading("How it was measured")
    page.table(("what", "value"), [(name, str(value)) for name, value in context.items()])
    return page.html()


def curve_table(curve: Curve, dense: Summary) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a curve's points, dense attention last."""
    columns = [curve.parameter, "accuracy", "perplexity", "recall", "worst 5 %", "density"]
    columns += ["selection", "effective", "error", "first token, s", "speedup"]
    named = [(str(v), p) for v, p in zip(curve.values, curve.points, strict=True)]
    rows = [
        [
            name,
            number(point.accuracy),
            number(point.perplexity_change, "+.2%"),
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


def knee_table(curve: Curve) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a curve's knees."""
    rows = [
        [" against ".join(_NAMES[part] for part in name.split(" against ")), _value(value)]
        for name, value in curve.knees.items()
    ]
    return ["knee of", curve.parameter], rows


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _panels(curve: Curve, dense: Summary) -> Figure:
    from matplotlib.figure import Figure

    gains = [gain for gain in GAINS if f"{gain} against {COSTS[0]}" in curve.knees]
    with figure_style():
        figure = Figure(figsize=(7.2, 2.7 * len(gains)), layout="constrained")
        axes = figure.subplots(len(gains), len(COSTS), squeeze=False).tolist()
        for row, gain in zip(axes, gains, strict=True):
            for panel, cost in zip(row, COSTS, strict=True):
                _panel(panel, curve, gain, cost)
                level = 0.0 if gain == "perplexity_change" else getattr(dense, gain)
                if level is not None:
                    panel.axhline(level, color=MUTED, linestyle="--", linewidth=1)
    return figure


def _panel(panel: Axes, curve: Curve, gain: str, cost: str) -> None:
    points = [(getattr(p, cost), getattr(p, gain)) for p in curve.points]
    panel.plot(*zip(*points, strict=True), color=SERIES[0], marker="o", markersize=5)
    for value, point in zip(curve.values, points, strict=True):
        label = plain_label(f"{value:g}")
        panel.annotate(label, point, (5, 4), textcoords="offset points", fontsize=8)
    found = curve.knees[f"{gain} against {cost}"]
    if found is not None:
        x, y = points[curve.values.index(found)]
        panel.plot([x], [y], "o", markersize=13, markerfacecolor="none", markeredgecolor=INK)
    panel.set_xlabel(_NAMES[cost])
    panel.set_ylabel(_NAMES[gain])
    panel.grid(visible=True)
