"""The HTML pages of an evaluation and of a sweep."""

from __future__ import annotations

from shareprefill.evaluation.config import DENSE
from shareprefill.evaluation.figures import (
    layer_errors,
    perplexity_by_position,
    sweep_panels,
    task_panels,
)
from shareprefill.evaluation.frontier import TARGET_RECALL, nearest_labels
from shareprefill.evaluation.results import Evaluation
from shareprefill.evaluation.sweep import Sweep
from shareprefill.evaluation.tables import (
    Table,
    cell_table,
    curve_table,
    density_table,
    knee_table,
    reached_table,
    summary_table,
)
from shareprefill.report.drawing import figure_style
from shareprefill.report.page import Page


def evaluation_page(evaluation: Evaluation) -> str:
    """The page of an evaluation, as one self-contained HTML file."""
    context, config = evaluation.context, evaluation.config
    page = Page(
        f"Evaluation of {context['model']}",
        f"{config.samples} prompts of each task and length, {context['device']}, "
        f"{context['dtype']}",
    )
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
            page.figure(
                task_panels(cells, "recall", lambda cell: cell.recall),
                f"Recall against effective density at {length} tokens; one line a policy, one "
                "point a gamma, with 95 % intervals. The oracle, a bound, is at its density alone.",
            )
        if any(cell.kl is not None for cell in cells):
            page.figure(
                task_panels(cells, "KL", lambda cell: cell.kl),
                "KL divergence from dense attention, in nats a position, against effective "
                f"density at {length} tokens: less is better.",
            )
        page.figure(
            task_panels(cells, "score", lambda cell: cell.score),
            f"Score (perplexity: less is better) against effective density at {length} tokens; "
            "the dashed line is dense attention.",
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
        _add_table(page, curve_table(curve, sweep.dense))
        with figure_style():
            page.figure(
                sweep_panels(curve, sweep.dense),
                f"What {curve.parameter} buys. A ring marks the knee; the dashed line is dense "
                "attention.",
            )
        _add_table(page, knee_table(curve))
    page.heading("How it was measured")
    page.table(("what", "value"), [(name, str(value)) for name, value in context.items()])
    return page.html()
