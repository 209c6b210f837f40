"""The maps of one cluster in a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shareprefill.audit.material import Heads
from shareprefill.audit.thumbnails import MEMBERS_SHOWN, ClusterMaps
from shareprefill.autoencoder.dataset import resample_maps
from shareprefill.report.drawing import RULE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 11.0, 1.56
_PIXELS = 128


def draw_maps(heads: Heads, maps: ClusterMaps) -> Figure:
    """The maps that stand for a cluster; roots of the attention mass, 0 to 1."""
    from matplotlib.figure import Figure

    picked = maps.picked
    role = "pivot" if picked.is_pivot else "centre"
    name = heads.name(picked.head)
    tiles = [
        (f"{role} {name}\nmean", maps.head),
        (f"{role} {name}\ndecoded code", maps.decoded),
        ("cluster\nconsensus", maps.consensus),
        (f"{role} {name}\nunseen prompt", maps.unseen),
        ("its recon-\nstruction", maps.reconstruction),
    ]
    tiles += [
        (f"member {heads.name(index)}\nmean", map_)
        for index, map_ in zip(picked.members, maps.members, strict=True)
    ]
    figure = Figure(figsize=(_WIDTH, _HEIGHT))
    columns = 5 + MEMBERS_SHOWN
    axes_row = figure.subplots(1, columns, squeeze=False)[0]
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.02, top=0.76, wspace=0.09)
    for axes, (title, map_) in zip(axes_row, tiles, strict=False):
        axes.imshow(_roots(map_).numpy(), vmin=0, vmax=1, interpolation="none", aspect="equal")
        axes.set_title(title, fontsize=8.5, fontweight="normal", loc="left", pad=3)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set(visible=True, color=RULE)
    for axes in axes_row[len(tiles) :]:
        axes.remove()
    return figure


def _roots(map_: Tensor) -> Tensor:
    """Square roots, as the autoencoder sees them; what lies in the future is left blank."""
    if len(map_) > _PIXELS:
        map_ = resample_maps(map_, _PIXELS)
    future = torch.ones_like(map_, dtype=torch.bool).triu(1) & (map_ < 1e-6)
    return map_.clamp_min(0).sqrt().masked_fill(future, float("nan"))
