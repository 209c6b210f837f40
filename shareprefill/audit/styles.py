"""Colour, shape and letter of clusters and policies: never colour alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shareprefill.artifact import Policy
from shareprefill.audit.heads import Heads
from shareprefill.report.drawing import MARKERS, MUTED, SERIES

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


def cells(values: Tensor, looks: dict[int, Look]) -> Tensor:
    """Colours of a grid of classes, uint8 `[..., 4]`; the shared grey is faint."""
    from matplotlib.colors import to_rgba

    found = torch.zeros(*values.shape, 4, dtype=torch.uint8, device="cpu")
    for value in values.unique().tolist():
        look = looks[value]
        alpha = FAINT if look.colour == MUTED else 1.0
        rgba = [round(255 * part) for part in to_rgba(look.colour, alpha)]
        found[values == value] = torch.tensor(rgba, dtype=torch.uint8, device="cpu")
    return found


def _luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2.2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
