"""Why a head did what it did, in words."""

from __future__ import annotations

import math

from shareprefill.artifact import Policy
from shareprefill.runtime.report import LayerReport

_DENSE, _PIVOT, _SHARE = Policy.DENSE.label, Policy.PIVOT.label, Policy.SHARE.label
_SLASH, _SAMPLED = Policy.VERTICAL_SLASH.label, Policy.SAMPLED.label


def reason(layer: LayerReport, place: int, max_density: float, delta: float) -> str:
    """Why a head took its policy.

    Args:
        layer: What the heads of its layer did.
        place: The head's position among those of the report.
        max_density: Density above which heads are computed densely.
        delta: JS distance to uniform above which a head is highly sparse.
    """
    planned, taken = layer.planned[place], layer.policies[place]
    if layer.tau is not None:
        return _by_the_papers_rule(layer, place, layer.tau, delta)
    if taken == planned:
        return _as_planned(layer, place)
    if planned == _SHARE and taken != _DENSE:
        return _not_shared(layer, place)
    if taken == _DENSE:
        missed = planned == _SHARE and not _passed(layer, place)
        first = _not_shared(layer, place) + "; " if missed else ""
        return (
            f"{first}its pattern was denser than {max_density:.2g} of the causal blocks, or rests "
            "on NaN or Inf"
        )
    if (planned, taken) == (_SLASH, _SAMPLED):
        return f"not highly sparse: no farther than {delta:.2g} from uniform (JS distance)"
    return "what was planned did not apply to this prompt"


def _passed(layer: LayerReport, place: int) -> bool:
    return layer.covered[place] >= layer.min_coverage[place]


def _as_planned(layer: LayerReport, place: int) -> str:
    planned = layer.planned[place]
    if planned == _PIVOT:
        return "as planned: it gives its pattern to others"
    if planned == _SHARE:
        return (
            f"check passed: {layer.covered[place]:.3f} of its sampled attention lies in the "
            f"pivot's pattern, {layer.min_coverage[place]:.3f} is enough"
        )
    return "as planned: all blocks" if planned == _DENSE else "as planned"


def _not_shared(layer: LayerReport, place: int) -> str:
    covered = layer.covered[place]
    if math.isnan(covered):
        return "check failed: its pivot's pattern rests on NaN or Inf"
    return (
        f"check failed: {covered:.3f} of its sampled attention lies in the pivot's pattern, "
        f"{layer.min_coverage[place]:.3f} are needed"
    )


def _by_the_papers_rule(layer: LayerReport, place: int, tau: float, delta: float) -> str:
    taken, distance = layer.policies[place], layer.distance[place]
    if taken == _PIVOT:
        return "the first head of its cluster that is not highly sparse: it gives its pattern"
    if math.isnan(distance):
        return f"highly sparse (JS distance to uniform above {delta:.2g}), or in no cluster"
    relation = "below" if distance < tau else "not below"
    return f"JS distance to its pivot {distance:.3f}, {relation} tau = {tau:.2g}"
