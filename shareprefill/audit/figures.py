"""The figures of an audit, all but the maps: build them inside `figure_style()`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shareprefill.audit.embedding import Plane
from shareprefill.audit.looks import Look, cluster_looks, policy_looks
from shareprefill.audit.material import Heads
from shareprefill.audit.noise import UNSTABLE, Noise
from shareprefill.audit.separation import NAMES, Separation
from shareprefill.report.drawing import INK, MUTED, PAPER, RULE, SERIES

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 11.0
# Points from which a scatter is drawn as one picture instead of thousands of shapes.
_RASTER = 1500
_DPI = 200


def draw_planes(heads: Heads, plane: Plane) -> Figure:
    """t-SNE and principal components of the codes, by cluster; pivots ringed."""
    from matplotlib.figure import Figure

    views = [("PCA of codes", plane.pca)]
    if plane.tsne is not None:
        views.insert(0, (f"t-SNE of codes, perplexity {plane.perplexity:.0f}", plane.tsne))
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained", dpi=_DPI)
    looks = cluster_looks(heads)
    for axes, (title, places) in zip(
        figure.subplots(1, len(views), squeeze=False)[0], views, strict=True
    ):
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
    if plane.tsne is None or len(views) > 1:
        shares = plane.explained
        figure.axes[-1].set_xlabel(f"first component, {shares[0]:.0%} of the variance")
        figure.axes[-1].set_ylabel(f"second component, {shares[1]:.0%}")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    _legend(figure, handles, labels, columns=4)
    return figure


def draw_distances(separation: Separation) -> Figure:
    """Histograms of the distances within and across clusters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
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
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def draw_policies(heads: Heads, target: float | None) -> Figure:
    """Recall and density of every head, by policy, and one against the other."""
    from matplotlib.figure import Figure

    looks = {code: look for code, look in policy_looks().items() if (heads.policy == code).any()}
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained", dpi=_DPI)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    for axes, values, title in (
        (left, heads.recall, "recall"),
        (middle, heads.density, "density"),
    ):
        _strips(axes, values, heads.policy, looks)
        axes.set_title(f"{title} of each head")
        axes.grid(axis="y")
    _scatter(right, torch.stack([heads.density, heads.recall], 1), heads.policy, looks)
    right.set_title("recall against density")
    right.set_xlabel("density: blocks computed / causal blocks")
    right.set_ylabel("recall: attention mass inside")
    right.set_xlim(-0.02, 1.02)
    right.grid()
    if target is not None:
        for axes in (left, right):
            axes.axhline(target, color=INK, linestyle=":", linewidth=1.2)
        right.text(
            1.0,
            target,
            f"target {target:g} ",
            ha="right",
            va="bottom",
            fontsize=9,
        )
    handles, labels = right.get_legend_handles_labels()
    _legend(figure, handles, labels, columns=len(labels))
    return figure


def draw_spread(heads: Heads, noise: Noise) -> Figure:
    """The spread of codes over prompts, sorted, and layer by layer."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained", dpi=_DPI)
    left, right = figure.subplots(1, 2)
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
    right.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=2)
    return figure


def _legend(figure: Figure, handles: list[Artist], labels: list[str], columns: int) -> None:
    """Below the axes, its marks large enough to tell shapes whatever the points' size."""
    from matplotlib.collections import PathCollection

    legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([48.0])


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
