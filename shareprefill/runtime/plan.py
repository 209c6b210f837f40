"""What each head of a layer is to do: the artifact's choices with a session's options over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from shareprefill.artifact import Artifact, Policy
from shareprefill.config import RuntimeConfig
from shareprefill.runtime.geometry import Geometry
from shareprefill.runtime.policies import POLICIES
from shareprefill.runtime.policies.base import SelectionPolicy

T = TypeVar("T")

_UNIFORM = {
    "dense": Policy.DENSE,
    "sampled": Policy.SAMPLED,
    "vertical-slash": Policy.VERTICAL_SLASH,
    "smoothed": Policy.SMOOTHED,
}
# The number of a policy that no artifact names.
_FURTHER = len(Policy)


@dataclass(frozen=True)
class HeadPlan:
    """One head's orders.

    Attributes:
        head: Global id, layer * H + index in the layer.
        policy: What it does: a `Policy`, or the number of a further one in the plan's `labels`.
        pivot: Global id of the head whose pattern it shares; -1 for none.
        fallback: What it does when its check before sharing fails; otherwise its policy.
        gamma: Attention mass its pattern covers.
        fallback_gamma: Attention mass the fallback's pattern covers.
        slack: How much less than gamma of its sampled rows' attention may lie in its pivot's
            pattern for it to share.
        cluster: Cluster id; -1 for none.
    """

    head: int
    policy: int
    pivot: int
    fallback: int
    gamma: float
    fallback_gamma: float
    slack: float
    cluster: int

    @property
    def floor(self) -> float:
        """Share of its sampled rows' attention from which on it shares its pivot's pattern."""
        return self.gamma - self.slack


@dataclass(frozen=True)
class RuntimePlan:
    """All heads' orders, and the thresholds and row counts that hold for all of them.

    Attributes:
        layers: `layers[l][h]`.
        labels: Names of the policies, by their numbers in the heads' plans.
        selectors: What chooses the blocks of the policies that the layer pass has no rule for, by
            number.
        online: Whether pivots are found at run time by the paper's rule (policy `share`).
        guarded: Whether a vertical-slash pattern is left to highly sparse heads (delta).
        block_size: Tokens a block.
        tau: Policy `share`: JS distance to the pivot under which a head shares.
        delta: JS distance to uniform above which a head is highly sparse.
        pivot_rows: Rows a block of a pivot's map, 0 for all.
        sample_rows: Rows a block of the row-sampled estimate.
        check_rows: Rows a block of the check before sharing.
        sink_blocks: Leading key blocks always read.
        local_blocks: Trailing causal key blocks always read.
        max_density: Density above which a head is computed densely; None: the device's crossover.
        refuse_nonfinite: Whether NaN or Inf in a layer's inputs is an error.
    """

    layers: tuple[tuple[HeadPlan, ...], ...]
    labels: tuple[str, ...]
    selectors: Mapping[int, SelectionPolicy]
    online: bool
    guarded: bool
    block_size: int
    tau: float
    delta: float
    pivot_rows: int
    sample_rows: int
    check_rows: int
    sink_blocks: int
    local_blocks: int
    max_density: float | None
    refuse_nonfinite: bool

    def geometry(self, n_query: int, n_key: int, device: torch.device) -> Geometry:
        """The blocks of `n_query` queries at the end of `n_key` keys, as this plan cuts them."""
        return Geometry(
            n_query,
            n_key,
            device,
            block_size=self.block_size,
            sink_blocks=self.sink_blocks,
            local_blocks=self.local_blocks,
        )


def make_plan(artifact: Artifact, config: RuntimeConfig) -> RuntimePlan:
    """Lays a session's options over an artifact.

    Args:
        artifact: The model's artifact.
        config: Options; None takes the artifact's value.

    Returns:
        The orders of every head.
    """
    online = config.policy == "share"
    forced: int | None = _UNIFORM.get(config.policy)
    labels = tuple(policy.label for policy in Policy)
    selectors: dict[int, SelectionPolicy] = {int(Policy.SMOOTHED): POLICIES["smoothed"]()}
    if forced is None and config.policy not in ("auto", "share"):
        forced, labels = _FURTHER, (*labels, config.policy)
        selectors[_FURTHER] = POLICIES[config.policy]()
    layers, heads = artifact.policy.shape
    columns = {
        name: getattr(artifact, name).reshape(-1).tolist()
        for name in ("policy", "pivot", "fallback", "gamma", "fallback_gamma", "slack", "cluster")
    }

    def order(head: int) -> HeadPlan:
        gamma, fallback_gamma = columns["gamma"][head], columns["fallback_gamma"][head]
        if config.policy != "auto":
            # One rule for all heads: what was chosen head by head for another does not apply.
            gamma = fallback_gamma = artifact.thresholds.gamma
        policy: int = columns["policy"][head] if forced is None else forced
        return HeadPlan(
            head=head,
            policy=policy,
            pivot=columns["pivot"][head] if forced is None else -1,
            fallback=columns["fallback"][head] if forced is None else forced,
            gamma=_chosen(config.gamma, gamma),
            fallback_gamma=_chosen(config.gamma, fallback_gamma),
            slack=_chosen(config.slack, columns["slack"][head]),
            cluster=columns["cluster"][head],
        )

    thresholds, rows = artifact.thresholds, artifact.rows
    return RuntimePlan(
        layers=tuple(
            tuple(order(layer * heads + head) for head in range(heads)) for layer in range(layers)
        ),
        labels=labels,
        selectors=selectors,
        online=online,
        guarded=config.policy == "auto",
        block_size=artifact.block_size,
        tau=_chosen(config.tau, thresholds.tau),
        delta=_chosen(config.delta, thresholds.delta),
        # The paper takes a pivot's pattern from all of its rows.
        pivot_rows=_chosen(config.pivot_rows, 0 if online else rows.pivot),
        sample_rows=_chosen(config.sample_rows, rows.sample),
        check_rows=_chosen(config.check_rows, rows.check),
        sink_blocks=config.sink_blocks,
        local_blocks=config.local_blocks,
        max_density=config.max_density,
        refuse_nonfinite=config.nonfinite == "error",
    )


def _chosen(option: T | None, default: T) -> T:
    return default if option is None else option
