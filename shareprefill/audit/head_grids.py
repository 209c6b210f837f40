"""Grids of an artifact's heads: by cluster, by policy, by recall and by density."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from shareprefill.artifact import Policy
from shareprefill.audit.figures import FAINT, Look, cluster_looks, policy_looks
from shareprefill.audit.heads import Heads
from shareprefill.report.drawing import MUTED
from shareprefill.report.grids import Cell, Grid, value_colour, value_legend


def class_grids(heads: Heads) -> list[Grid]:
    """Clusters, by number, and policies, by letter."""
    return [
        _classes(heads, "cluster of each head", heads.cluster, cluster_looks(heads), letters=False),
        _classes(heads, "policy of each head", heads.policy, policy_looks(), letters=True),
    ]


def value_grids(heads: Heads) -> list[Grid]:
    """Recall and density."""
    least = min(0.9, float(heads.recall.min()))
    return [
        _values(heads, "recall", heads.recall, least),
        _values(heads, "density", heads.density, 0.0),
    ]


def _classes(
    heads: Heads, title: str, classes: Tensor, looks: dict[int, Look], *, letters: bool
) -> Grid:
    def cell(index: int) -> Cell:
        look = looks[int(classes[index])]
        faint = look.colour == MUTED
        ink = "var(--ink)" if faint else look.ink
        return Cell(look.colour, _words(heads, index), look.letter, ink, FAINT if faint else 1.0)

    shown = {look.label: look for value, look in looks.items() if bool((classes == value).any())}
    return Grid(
        title,
        *_rows(heads, cell),
        legend=[
            (
                look.colour,
                FAINT if look.colour == MUTED else 1.0,
                f"{look.letter}  {name}" if letters else name,
            )
            for name, look in shown.items()
        ],
        label=f"Grid of layers by heads, coloured by the {title}",
    )


def _values(heads: Heads, title: str, values: Tensor, least: float) -> Grid:
    def cell(index: int) -> Cell:
        return Cell(value_colour(float(values[index]), least, 1.0), _words(heads, index))

    return Grid(
        title,
        *_rows(heads, cell),
        legend=value_legend(least, 1.0),
        label=f"Grid of layers by heads, coloured by {title}",
    )


def _rows(heads: Heads, cell: Callable[[int], Cell]) -> tuple[tuple[int, ...], list[list[Cell]]]:
    width = heads.width
    rows = range(len(heads.layers))
    return heads.layers, [[cell(row * width + column) for column in range(width)] for row in rows]


def _words(heads: Heads, index: int) -> str:
    pivot, cluster = int(heads.pivot[index]), int(heads.cluster[index])
    lines = [
        f"head {heads.name(index)}: {Policy(int(heads.policy[index])).label}",
        "no cluster" if cluster < 0 else f"cluster {cluster}",
        f"recall {float(heads.recall[index]):.3f}",
        f"density {float(heads.density[index]):.3f}",
    ]
    if pivot >= 0 and pivot != int(heads.ids[index]):
        lines.insert(1, f"reads the pattern of head {heads.place(pivot)}")
    return "\n".join(lines)
