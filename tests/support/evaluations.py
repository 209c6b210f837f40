"""Made-up evaluations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from shareprefill.evaluation.config import EvalConfig, SweepConfig
from shareprefill.evaluation.results import Bin, Cell, Evaluation, summarize_cells
from shareprefill.evaluation.statistics import Estimate
from shareprefill.evaluation.sweep import Curve, Sweep


def made_cell(**changes: Any) -> Cell:
    """A cell of `auto` on retr_kv, with some of its fields changed."""
    fields: dict[str, Any] = {
        "task": "retr_kv",
        "metric": "exact_match",
        "length": 512,
        "policy": "auto",
        "settings": {},
        "prompts": 4,
        "tokens": 500.5,
        "score": Estimate(0.75, 0.3, 0.95),
        "difference": Estimate(-0.25, -0.6, 0.2),
        "agreement": Estimate(0.5, 0.15, 0.85),
        "recall": Estimate(0.95, 0.94, 0.96),
        "recall_worst": Estimate(0.9, 0.88, 0.92),
        "density": Estimate(0.3, 0.25, 0.35),
        "selection_work": Estimate(0.02, 0.01, 0.03),
        "hidden_error": Estimate(0.05, 0.04, 0.06),
        "layer_errors": (Estimate(0.1, 0.05, 0.2), Estimate(0.2)),
        "ttft_s": Estimate(1.5, 1.4, 1.6),
        "speedup": Estimate(1.2, 1.1, 1.3),
        "heads": {"sampled": 12},
        "bins": (),
    }
    return Cell(**{**fields, **changes})


def dense_cell(**changes: Any) -> Cell:
    """The cell of dense attention beside `made_cell`."""
    nothing = dict.fromkeys(
        ("difference", "agreement", "recall", "recall_worst", "hidden_error", "speedup")
    )
    return made_cell(
        **{
            **nothing,
            "policy": "dense",
            "layer_errors": (),
            "heads": {},
            "score": Estimate(1.0, 0.5, 1.0),
            "density": Estimate(1.0),
            "selection_work": Estimate(0.0),
            **changes,
        }
    )


def perplexity_cells(**changes: Any) -> list[Cell]:
    """Cells of perplexity: dense attention's, and one of `auto`."""
    bins = (
        Bin(0, 256, Estimate(9.0), Estimate(0.01)),
        Bin(256, 512, Estimate(8.0), Estimate(0.02)),
    )
    plain = tuple(Bin(b.start, b.stop, b.score, None) for b in bins)
    own = {"task": "perplexity", "metric": "perplexity", "score": Estimate(8.5, 8.0, 9.0)}
    return [
        dense_cell(**own, bins=plain),
        made_cell(**own, bins=bins, difference=Estimate(0.015), agreement=None, **changes),
    ]


def made_evaluation(cells: Iterable[Cell]) -> Evaluation:
    """An evaluation of these cells."""
    cells = tuple(cells)
    config = EvalConfig(
        artifact="clusters.st",
        tasks=tuple(dict.fromkeys(cell.task for cell in cells)),
        lengths=tuple(dict.fromkeys(cell.length for cell in cells)),
    )
    return Evaluation(config, {"model": "tiny", "device": "CPU", "dtype": "float32"}, cells)


def made_sweep(recalls: dict[float, float], knee: float) -> Sweep:
    """A sweep of slack with these recalls by value, and a knee of recall against both costs."""
    cells = [dense_cell()]
    for value, recall in recalls.items():
        cells.append(made_cell(settings={"slack": value}, recall=Estimate(recall)))
    dense, *points = summarize_cells(tuple(cells))
    knees = {
        f"{gain} against {cost}": knee if gain == "recall" else None
        for gain in ("recall", "accuracy")
        for cost in ("effective_density", "ttft_s")
    }
    curve = Curve("slack", tuple(recalls), tuple(points), knees)
    config = SweepConfig(artifact="a.st", slacks=tuple(recalls))
    context = {"model": "tiny", "device": "CPU", "dtype": "float32"}
    return Sweep(config, context, dense, (curve,), tuple(cells))
