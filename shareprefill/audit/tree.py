"""The dendrogram: the tree's last merges, and where the clusters were cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from shareprefill.audit.looks import cluster_looks
from shareprefill.audit.material import Heads
from shareprefill.audit.separation import NAMES, Tree
from shareprefill.report.drawing import INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 11.0
# Leaves that can still be told apart; of larger trees only the last merges are drawn.
LEAVES = 130
_LEAVES_OF_LARGE = 64
_ONE_ROW, _ROW_POINTS = 80, 27


def draw_tree(heads: Heads, tree: Tree) -> Figure:
    """The merges of all heads, or the last ones, with the cut as a dashed line."""
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from scipy.cluster.hierarchy import dendrogram

    shown = min(heads.count, LEAVES if heads.count <= LEAVES else _LEAVES_OF_LARGE)
    truncation = {} if shown == heads.count else {"truncate_mode": "lastp", "p": shown}
    layout = dendrogram(tree.merges.numpy(), no_plot=True, **truncation)
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    axes = figure.subplots()
    # SciPy's leaves stand at 5, 15, 25, ...
    lines = [
        [((x - 5) / 10, y) for x, y in zip(xs, ys, strict=True)]
        for xs, ys in zip(layout["icoord"], layout["dcoord"], strict=True)
    ]
    axes.add_collection(LineCollection(lines, colors=MUTED, linewidths=1.0))
    top = max(float(tree.merges[-1, 2]), 1e-9)
    axes.set_ylim(-0.05 * top, 1.06 * top)
    axes.set_xlim(-0.8, shown - 0.2)
    axes.set_ylabel(NAMES[tree.measure])
    axes.spines["bottom"].set_visible(False)
    _leaves(axes, heads, tree.merges, layout["leaves"], top)
    if tree.cut_height is not None:
        label = f"cut: {len(heads.sizes())} clusters"
        axes.axhline(tree.cut_height, color=INK, linestyle="--", linewidth=1.3, label=label)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _leaves(axes: Axes, heads: Heads, merges: Tensor, leaves: list[int], top: float) -> None:
    """A mark a leaf, by cluster, and its name: a head, or a number of heads."""
    members = _members(merges, heads.count, leaves)
    looks = cluster_looks(heads)
    marks: dict[str, list[int]] = {}
    for place, inside in enumerate(members):
        clusters = {int(heads.cluster[index]) for index in inside}
        label = looks[clusters.pop()].label if len(clusters) == 1 else "several clusters"
        marks.setdefault(label, []).append(place)
    by_label = {look.label: look for look in looks.values()}
    for label, places in sorted(marks.items(), key=lambda item: min(item[1])):
        look = by_label.get(label)
        marker, colour = ("+", INK) if look is None else (look.marker, look.colour)
        axes.scatter(
            places,
            [-0.022 * top] * len(places),
            marker=marker,
            color=colour,
            s=24,
            label=label,
            clip_on=False,
        )
    names = [
        heads.name(inside[0]) if len(inside) == 1 else f"({len(inside)})" for inside in members
    ]
    axes.set_xticks([])
    for place, name in enumerate(names):
        # Every other name a row lower, where two beside each other would touch.
        lower = place % 2 * _ROW_POINTS if len(names) > _ONE_ROW else 0
        axes.annotate(
            name,
            (place, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -2 - lower),
            textcoords="offset points",
            rotation=90,
            ha="center",
            va="top",
            fontsize=7.5,
        )


def _members(merges: Tensor, heads: int, nodes: list[int]) -> list[list[int]]:
    """The heads below each node of the tree."""
    pairs = merges[:, :2].long().tolist()
    found = []
    for node in nodes:
        inside, open_nodes = [], [node]
        while open_nodes:
            current = open_nodes.pop()
            if current < heads:
                inside.append(current)
            else:
                open_nodes += pairs[current - heads]
        found.append(inside)
    return found
