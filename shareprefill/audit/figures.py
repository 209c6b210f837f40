"""The figures of an audit, and how they tell clusters and policies apart: never by colour alone.

Figures are built inside `figure_style()`. Those of maps and grids have files of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shareprefill.artifact import Policy
from shareprefill.audit.codes import UNSTABLE, Noise, Plane
from shareprefill.audit.heads import Heads
from shareprefill.audit.separation import NAMES, Separation, Tree
from shareprefill.report.drawing import INK, MARKERS, MUTED, PAPER, RULE, SERIES, legend_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


WIDTH = 11.0
# Points from which a scatter is drawn as one picture instead of thousands of shapes.
_RASTER = 1500
_DPI = 200
# Leaves that can still be told apart; of larger trees only the last merges are drawn.
LEAVES = 130
_LEAVES_OF_LARGE = 64
_ONE_ROW, _ROW_POINTS = 80, 27
# Clusters with a look of their own; the smaller ones share one.
CLUSTERS = 10
# Opacity of the shared grey in cells.
FAINT = 0.28
# Grey for dense; the others in the order of the codes.
_POLICY_SERIES = (7, 1, 0, 2, 3, 4, 5, 6)
_DARK, _LIGHT = "#0b0c0d", "#ffffff"


@dataclass(frozen=True)
class Look:
    """How a class of heads is drawn.

    Attributes:
        colour: Hexadecimal.
        marker: Matplotlib's name of a shape.
        label: In legends.
        letter: In the cells of a grid.
    """

    colour: str
    marker: str
    label: str
    letter: str

    @property
    def ink(self) -> str:
        """Black or white, whichever is read better on the colour."""
        return _LIGHT if _luminance(self.colour) < 0.22 else _DARK


def policy_looks() -> dict[int, Look]:
    """The look of every policy."""
    used: set[str] = set()
    looks = {}
    for policy in Policy:
        letters = policy.label.replace("-", "").upper()
        letter = next((char for char in letters if char not in used), str(int(policy)))
        used.add(letter)
        number = _POLICY_SERIES[int(policy) % len(SERIES)]
        looks[int(policy)] = Look(SERIES[number], MARKERS[number], policy.label, letter)
    return looks


def cluster_looks(heads: Heads) -> dict[int, Look]:
    """The look of every cluster, and of -1; the largest ones have one of their own."""
    looks = {-1: Look(MUTED, "x", "no cluster", "–")}
    for rank, (cluster, size) in enumerate(heads.sizes().items()):
        if rank < CLUSTERS and size > 1:
            # The second time round, a colour meets another shape.
            number = rank % len(SERIES)
            shape = (number + 3 * (rank // len(SERIES))) % len(MARKERS)
            label = f"cluster {cluster} ({size} heads)"
            looks[cluster] = Look(SERIES[number], MARKERS[shape], label, str(cluster))
        else:
            looks[cluster] = Look(MUTED, "x", "other clusters", str(cluster))
    return looks


def draw_planes(heads: Heads, plane: Plane) -> list[Figure]:
    """t-SNE and principal components of the codes, by cluster, pivots ringed; and the legend."""
    views = [("PCA of codes", plane.pca)]
    if plane.tsne is not None:
        views.insert(0, (f"t-SNE of codes, perplexity {plane.perplexity:.0f}", plane.tsne))
    looks = cluster_looks(heads)
    figures = []
    for title, places in views:
        figure, axes = _panel(4.1)
        _scatter(axes, places, heads.cluster, looks)
        is_pivot = heads.ids == heads.pivot
        axes.scatter(
            *places[is_pivot].T.numpy(),
            s=2.6 * _dot(heads.count),
            facecolors="none",
            edgecolors=INK,
            linewidths=1.3,
            label="pivot",
            zorder=3,
        )
        axes.set_title(title)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set(visible=True, color=RULE)
        figures.append(figure)
    shares, last = plane.explained, figures[-1].axes[0]
    last.set_xlabel(f"first component, {shares[0]:.0%} of the variance")
    last.set_ylabel(f"second component, {shares[1]:.0%}")
    return [*figures, legend_figure(*last.get_legend_handles_labels())]


def _panel(height: float) -> tuple[Figure, Axes]:
    """A figure of one panel, to stand beside others."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, height), layout="constrained", dpi=_DPI)
    return figure, figure.subplots()


def draw_distances(separation: Separation) -> Figure:
    """Histograms of the distances within and across clusters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.subplots()
    edges = torch.tensor(separation.edges, device="cpu")
    for name, spread, colour, line, hatch in (
        ("across clusters", separation.across, SERIES[1], "--", "//"),
        ("within clusters", separation.within, SERIES[0], "-", None),
    ):
        if not spread.pairs:
            continue
        shares = torch.tensor(spread.counts, device="cpu") / spread.pairs
        label = f"{name}: {spread.pairs:,} pairs, median {spread.quantiles[2]:.2f}"
        axes.stairs(shares, edges, fill=True, color=colour, alpha=0.25, hatch=hatch)
        axes.stairs(shares, edges, color=colour, linestyle=line, linewidth=1.8, label=label)
        axes.axvline(spread.quantiles[2], color=colour, linestyle=line, linewidth=1)
    axes.set_xlabel(NAMES[separation.measure])
    axes.set_ylabel("share of the pairs")
    axes.set_xlim(float(edges[0]), float(edges[-1]))
    axes.grid(axis="y")
    figure.legend(loc="outside upper left")
    return figure


def draw_policies(heads: Heads, target: float | None) -> list[Figure]:
    """Recall and density of every head by policy, one against the other, and the legend."""
    looks = {code: look for code, look in policy_looks().items() if (heads.policy == code).any()}
    figures = []
    for values, title in ((heads.recall, "recall"), (heads.density, "density")):
        figure, axes = _panel(3.8)
        _strips(axes, values, heads.policy, looks)
        axes.set_title(f"{title} of each head")
        axes.grid(axis="y")
        figures.append(figure)
    figure, axes = _panel(3.8)
    _scatter(axes, torch.stack([heads.density, heads.recall], 1), heads.policy, looks)
    axes.set_title("recall against density")
    axes.set_xlabel("density: blocks computed / causal blocks")
    axes.set_ylabel("recall: attention mass inside")
    axes.set_xlim(-0.02, 1.02)
    axes.grid()
    if target is not None:
        for other in (figures[0].axes[0], axes):
            other.axhline(target, color=INK, linestyle=":", linewidth=1.2)
        axes.text(1.0, target, f"target {target:g} ", ha="right", va="bottom", fontsize=9)
    return [*figures, figure, legend_figure(*axes.get_legend_handles_labels())]


def draw_spread(heads: Heads, noise: Noise) -> list[Figure]:
    """The spread of codes over prompts, sorted, and layer by layer."""
    from matplotlib.ticker import MaxNLocator

    (first, left), (second, right) = _panel(3.4), _panel(3.4)
    ordered = noise.spread.sort().values
    left.plot(
        torch.linspace(0, 100, len(ordered), dtype=torch.float32, device="cpu"),
        ordered,
        color=SERIES[0],
    )
    left.set_xlabel("heads, from stable to unstable, percent")
    left.set_title("spread of each head, sorted")
    rows = heads.grid(noise.spread)
    layers = torch.tensor(heads.layers, device="cpu")
    jitter = _jitter(rows.numel()).view_as(rows)
    right.scatter(
        (layers[:, None] + jitter).flatten(),
        rows.flatten(),
        s=0.45 * _dot(heads.count),
        color=SERIES[0],
        alpha=0.7,
        linewidths=0,
        rasterized=heads.count > _RASTER,
        label="heads",
    )
    medians = rows.median(1).values
    right.plot(layers, medians, color=SERIES[1], marker="s", markersize=4, label="median of layer")
    right.set_xlabel("layer")
    right.set_title("by layer")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (left, right):
        axes.axhline(UNSTABLE, color=INK, linestyle=":", linewidth=1.2)
        axes.set_ylim(0, max(1.08, 1.08 * float(ordered[-1])))
        axes.grid(axis="y")
    left.set_ylabel("spread over prompts / spread of heads")
    left.text(0, UNSTABLE, " unstable above", va="bottom", fontsize=9)
    right.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    return [first, second]


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
    _tree_leaves(axes, heads, tree.merges, layout["leaves"], top)
    if tree.cut_height is not None:
        label = f"cut: {len(heads.sizes())} clusters"
        axes.axhline(tree.cut_height, color=INK, linestyle="--", linewidth=1.3, label=label)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _tree_leaves(axes: Axes, heads: Heads, merges: Tensor, leaves: list[int], top: float) -> None:
    """A mark a leaf, by cluster, and its name: a head, or a number of heads."""
    members = _heads_below(merges, heads.count, leaves)
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


def _heads_below(merges: Tensor, heads: int, nodes: list[int]) -> list[list[int]]:
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


def _scatter(axes: Axes, places: Tensor, classes: Tensor, looks: dict[int, Look]) -> None:
    """Points by class, one legend entry a label; the shared grey below the rest."""
    groups: dict[str, list[int]] = {}
    for value in classes.unique().tolist():
        groups.setdefault(looks[value].label, []).append(value)
    order = [look.label for look in looks.values() if look.colour != MUTED]
    order += [look.label for look in looks.values() if look.colour == MUTED]
    for label in dict.fromkeys(order):
        values = groups.get(label)
        if values is None:
            continue
        look = looks[values[0]]
        chosen = torch.isin(classes, torch.tensor(values, device="cpu"))
        outline = {} if look.marker == "x" else {"edgecolors": PAPER, "linewidths": 0.5}
        axes.scatter(
            *places[chosen].T.numpy(),
            s=_dot(len(classes), look.marker),
            color=look.colour,
            label=label,
            marker=look.marker,
            alpha=0.5 if look.colour == MUTED else 0.88,
            rasterized=len(classes) > _RASTER,
            zorder=1 if look.colour == MUTED else 2,
            **outline,
        )


def _strips(axes: Axes, values: Tensor, classes: Tensor, looks: dict[int, Look]) -> None:
    """A column of points a class, with its median."""
    for column, (code, look) in enumerate(looks.items()):
        chosen = values[classes == code]
        axes.scatter(
            column + 0.85 * _jitter(len(chosen)),
            chosen,
            s=0.6 * _dot(len(values), look.marker),
            color=look.colour,
            marker=look.marker,
            alpha=0.75,
            linewidths=0,
            rasterized=len(values) > _RASTER,
        )
        axes.hlines(float(chosen.quantile(0.5)), column - 0.42, column + 0.42, color=INK, zorder=3)
    names = [look.label.replace("-", "-\n") for look in looks.values()]
    axes.set_xticks(range(len(looks)), names)
    axes.set_xlim(-0.6, len(looks) - 0.4)


def _dot(count: int, marker: str = "o") -> float:
    """Area of a point in square points; a star fills less of its own."""
    area = min(55.0, max(14.0, 20_000.0 / count))
    return area * (1.9 if marker == "*" else 1.0)


def _jitter(count: int) -> Tensor:
    """Places in -0.4 to 0.4 that look random and are not: multiples of the golden ratio."""
    return (torch.arange(count, device="cpu") * 0.618034 % 1.0 - 0.5) * 0.8


def _luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2.2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
