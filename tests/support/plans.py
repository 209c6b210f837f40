"""Plans of one layer, and letters for the policies in them."""

from __future__ import annotations

from typing import Any

from shareprefill.artifact import Policy
from shareprefill.runtime.plan import HeadPlan, RuntimePlan

D, P, S, R, V, M = (
    Policy.DENSE,
    Policy.PIVOT,
    Policy.SHARE,
    Policy.SAMPLED,
    Policy.VERTICAL_SLASH,
    Policy.SMOOTHED,
)


def layer_plan(heads: tuple[HeadPlan, ...], block_size: int, **changes: Any) -> RuntimePlan:
    """A plan of one layer; `changes` are other fields of it."""
    fields: dict[str, Any] = {
        "layers": (heads,),
        "labels": tuple(policy.label for policy in Policy),
        "selectors": {},
        "estimator": {},
        "online": False,
        "slash_needs_sparsity": True,
        "block_size": block_size,
        "tau": 0.3,
        "delta": 0.4,
        "pivot_rows": 4,
        "sample_rows": 8,
        "check_rows": 1,
        "sink_blocks": 1,
        "local_blocks": 2,
        "max_density": 0.9,
        "refuse_nonfinite": False,
    }
    return RuntimePlan(**{**fields, **changes})
