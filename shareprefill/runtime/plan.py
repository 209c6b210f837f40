"""What each head of a layer is to do: the artifact's choices with a session's options over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from shareprefill.artifact import Artifact, Policy, Rows, Thresholds
from shareprefill.config import (
    FP8_ERROR,
    LOCAL_BLOCKS,
    SINK_BLOCKS,
    CalibrateConfig,
    ClusterConfig,
    RuntimeConfig,
)
from shareprefill.errors import ArtifactError, ConfigError
from shareprefill.models import warn_once
from shareprefill.policy_names import is_planned, require_no_plan
from shareprefill.runtime.geometry import Geometry
from shareprefill.runtime.policies import make_policy
from shareprefill.runtime.policies.base import SelectionPolicy
from shareprefill.runtime.policies.smoothed import FewRows, line_weights
from shareprefill.runtime.policies.streaming import Streaming

T = TypeVar("T")

# Policies that an artifact names, and that every head can follow by itself.
_OF_ARTIFACTS = {
    policy.label: policy
    for policy in (Policy.DENSE, Policy.SAMPLED, Policy.VERTICAL_SLASH, Policy.SMOOTHED)
}
# The number of a policy that no artifact names.
_FURTHER = len(Policy)
# Options that only heads of these policies read, in a plan; the others are for all but dense ones.
_READ_BY_HEADS = {
    "slack": (Policy.SHARE,),
    "check_rows": (Policy.SHARE,),
    "pivot_rows": (Policy.PIVOT,),
    "delta": (Policy.VERTICAL_SLASH,),
    # Where it is not highly sparse, a head that is vertical-slash is sampled.
    "sample_rows": (Policy.SAMPLED, Policy.VERTICAL_SLASH),
}


@dataclass(frozen=True)
class HeadPlan:
    """What one head is to do.

    Attributes:
        head: Global id, layer * H + index in the layer.
        policy: What it does: a `Policy`, or the number of a further one in the plan's `labels`.
        pivot: Global id of the head whose pattern it shares; -1 for none.
        fallback: What it does when its check before sharing fails; otherwise its policy.
        gamma: Attention mass its pattern covers.
        fallback_gamma: Attention mass the fallback's pattern covers.
        coverage_slack: How much less than gamma of its sampled rows' attention may lie in its
            pivot's pattern for it to share.
        cluster: Cluster id; -1 for none.
        is_fp8: Whether its sparse attention has operands of e4m3.
    """

    head: int
    policy: int
    pivot: int
    fallback: int
    gamma: float
    fallback_gamma: float
    coverage_slack: float
    cluster: int
    is_fp8: bool = False

    @property
    def min_coverage(self) -> float:
        """Share of its sampled rows' attention from which on it shares its pivot's pattern."""
        return self.gamma - self.coverage_slack


@dataclass(frozen=True)
class RuntimePlan:
    """What all heads are to do, and the thresholds and row counts that hold for all of them.

    Attributes:
        layers: `layers[l][h]`.
        labels: Names of the policies, by their numbers in the heads' plans.
        selectors: What chooses the blocks of the policies that no artifact names, by number.
        estimator: The artifact's weights of estimates from few rows; None for none.
        online: Whether pivots are found at run time by the paper's rule (policy `shareprefill`).
        slash_needs_sparsity: Whether a vertical-slash pattern is left to highly sparse heads
            (delta).
        block_size: Tokens a block.
        tau: Policy `shareprefill`: JS distance to the pivot under which a head shares.
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
    estimator: Mapping[str, Sequence[float]] | None
    online: bool
    slash_needs_sparsity: bool
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

    def on_layers(self, layers: range) -> RuntimePlan:
        """The plan of a process that computes some of the layers (pipeline parallelism).

        Pivots stay in their process: a head whose pivot is in another one does what it would do
        alone.

        Args:
            layers: The process's layers.
        """
        here = {head.head for layer in layers for head in self.layers[layer]}

        def alone(head: HeadPlan) -> HeadPlan:
            if head.policy != Policy.SHARE or head.pivot in here:
                return head
            return replace(head, policy=head.fallback, gamma=head.fallback_gamma, pivot=-1)

        return replace(self, layers=tuple(tuple(map(alone, layer)) for layer in self.layers))


def make_plan(artifact: Artifact, config: RuntimeConfig) -> RuntimePlan:
    """Lays a session's options over an artifact.

    Args:
        artifact: The model's artifact.
        config: Options; None takes the artifact's value.

    Returns:
        What every head is to do.

    Raises:
        ConfigError: a row count is above the block size, or no head reads an option.
        ArtifactError: FP8 is asked for, and the artifact does not say how far heads are off in it.
    """
    require_read(artifact, config)
    forced, labels, selectors = _policy_of_all(config.policy, artifact.estimator)
    layers, heads = artifact.policy.shape
    in_fp8 = _in_fp8(artifact, config)
    columns = {
        name: getattr(artifact, name).reshape(-1).tolist()
        for name in ("policy", "pivot", "fallback", "gamma", "fallback_gamma", "slack", "cluster")
    }

    def head_plan(head: int) -> HeadPlan:
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
            coverage_slack=_chosen(config.slack, columns["slack"][head]),
            cluster=columns["cluster"][head],
            is_fp8=in_fp8[head],
        )

    return _plan(
        config,
        tuple(
            tuple(head_plan(layer * heads + head) for head in range(heads))
            for layer in range(layers)
        ),
        labels,
        selectors,
        estimator=artifact.estimator,
        block_size=artifact.block_size,
        thresholds=artifact.thresholds,
        rows=artifact.rows,
    )


def default_geometry(n_tokens: int, block_size: int, device: torch.device) -> Geometry:
    """Of a whole prompt, with the blocks that are always read where no others are asked for."""
    return Geometry(
        n_tokens,
        n_tokens,
        device,
        block_size=block_size,
        sink_blocks=SINK_BLOCKS,
        local_blocks=LOCAL_BLOCKS,
    )


def unread(artifact: Artifact, config: RuntimeConfig) -> dict[str, str]:
    """The given options that no head of an artifact reads -> the heads that would, in words."""
    given = [name for name in config.given() if name not in ("precision", "fp8_error")]
    if config.policy == "shareprefill":
        # The first head of a cluster may be a pivot, and only later ones have a distance to it.
        sizes = [0, *artifact.cluster[artifact.cluster >= 0].bincount().tolist()]
        needs = {"delta": (1, "in a cluster"), "tau": (2, "in a cluster of several")}
        return {n: who for n, (least, who) in needs.items() if n in given and max(sizes) < least}
    if config.policy != "auto":
        return {}
    planned = {*artifact.policy.flatten().tolist(), *artifact.fallback.flatten().tolist()}
    found = {}
    for name in given:
        heads = _READ_BY_HEADS.get(name, [*Policy][1:])
        if planned.isdisjoint(heads):
            found[name] = " or ".join(policy.label for policy in heads)
    return found


def what_is_read(artifact: Artifact, config: RuntimeConfig) -> RuntimeConfig:
    """The options without those that no head of an artifact reads."""
    return replace(config, **dict.fromkeys(unread(artifact, config)))


def require_read(artifact: Artifact, config: RuntimeConfig) -> None:
    """Refuses an option that no head of an artifact reads.

    Raises:
        ConfigError: names the option, the policy, and the heads that would read it.
    """
    for name, who in unread(artifact, config).items():
        raise ConfigError(
            f"{name} = {getattr(config, name)!r} does nothing to policy {config.policy!r} with "
            f"this artifact, none of whose heads is {who}: leave it out, or name another artifact"
        )


def _in_fp8(artifact: Artifact, config: RuntimeConfig) -> list[bool]:
    """Whether each head is computed in FP8: where its measured error is within the bound.

    Errors of layers that were not captured are NaN, which no bound lets through.
    """
    if config.precision != "fp8":
        return [False] * artifact.heads
    if artifact.fp8_error is None:
        raise ArtifactError(
            "precision = 'fp8' needs an artifact that says how far each head is off in it, which "
            "this one does not: make it anew (sp calibrate, sp cluster), or leave precision out. "
            "Models with soft-capped logits or attention sinks have no FP8 attention"
        )
    bound = FP8_ERROR if config.fp8_error is None else config.fp8_error
    return (artifact.fp8_error <= bound).flatten().tolist()


def plan_without_artifact(layers: int, heads: int, config: RuntimeConfig) -> RuntimePlan:
    """The plan of a policy that treats all heads alike, for a model that was not calibrated.

    The log is told once what a calibration would add.

    Args:
        layers: Layers of the model.
        heads: Query heads of every layer.
        config: Options; None takes what a calibration has by default.

    Raises:
        ConfigError: the policy, or FP8, needs an artifact, or a row count is above the block size.
    """
    require_no_plan(config.policy)
    if config.precision == "fp8":
        raise ConfigError(
            "precision = 'fp8' needs an artifact, which says how far each head is off in it: make "
            "one (sp calibrate, sp cluster), or leave it out"
        )
    defaults, captured = ClusterConfig(), CalibrateConfig(model="none")
    thresholds = Thresholds(gamma=defaults.gamma, tau=defaults.tau, delta=defaults.delta)
    forced, labels, selectors = _policy_of_all(config.policy)
    assert forced is not None
    gamma = _chosen(config.gamma, thresholds.gamma)
    if forced != Policy.DENSE:
        warn_once(
            "no artifact: all heads follow one policy, at one gamma. A calibration plans every "
            "head by what is measured of it: sp calibrate, then sp cluster"
        )
    if forced == Policy.SMOOTHED or any(isinstance(s, FewRows) for s in selectors.values()):
        warn_once(
            f"policy {config.policy!r} estimates attention with weights that are not fitted to "
            "this model; a calibration fits them"
        )

    def head_plan(head: int) -> HeadPlan:
        return HeadPlan(
            head=head,
            policy=forced,
            pivot=-1,
            fallback=forced,
            gamma=gamma,
            fallback_gamma=gamma,
            coverage_slack=0.0,
            cluster=-1,
        )

    return _plan(
        config,
        tuple(
            tuple(head_plan(layer * heads + head) for head in range(heads))
            for layer in range(layers)
        ),
        labels,
        selectors,
        estimator=None,
        block_size=captured.block_size,
        thresholds=thresholds,
        rows=Rows(pivot=0, sample=captured.rows[-1], check=captured.rows[0]),
    )


def _policy_of_all(
    policy: str, estimator: Mapping[str, Sequence[float]] | None = None
) -> tuple[int | None, tuple[str, ...], dict[int, SelectionPolicy]]:
    """The number of a policy for every head (None: heads have their own), labels, selectors."""
    labels = tuple(known.label for known in Policy)
    forced: int | None = _OF_ARTIFACTS.get(policy)
    if forced is not None or is_planned(policy):
        return forced, labels, {}
    selector = make_policy(policy)
    if isinstance(selector, FewRows):
        selector = replace(selector, weights=line_weights(estimator, selector.rows))
    return _FURTHER, (*labels, policy), {_FURTHER: selector}


def _plan(
    config: RuntimeConfig,
    layers: tuple[tuple[HeadPlan, ...], ...],
    labels: tuple[str, ...],
    selectors: dict[int, SelectionPolicy],
    *,
    estimator: Mapping[str, Sequence[float]] | None,
    block_size: int,
    thresholds: Thresholds,
    rows: Rows,
) -> RuntimePlan:
    online = config.policy == "shareprefill"
    sink_blocks = _chosen(config.sink_blocks, SINK_BLOCKS)
    local_blocks = _chosen(config.local_blocks, LOCAL_BLOCKS)
    for selector in selectors.values():
        if isinstance(selector, Streaming):
            # Its parameters say all that it reads.
            sink_blocks, local_blocks = selector.sink_blocks, selector.local_blocks
    plan = RuntimePlan(
        layers=layers,
        labels=labels,
        selectors=selectors,
        estimator=estimator,
        online=online,
        slash_needs_sparsity=config.policy == "auto",
        block_size=block_size,
        tau=_chosen(config.tau, thresholds.tau),
        delta=_chosen(config.delta, thresholds.delta),
        # The paper takes a pivot's pattern from all of its rows.
        pivot_rows=_chosen(config.pivot_rows, 0 if online else rows.pivot),
        sample_rows=_chosen(config.sample_rows, rows.sample),
        check_rows=_chosen(config.check_rows, rows.check),
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        max_density=config.max_density,
        refuse_nonfinite=config.nonfinite == "error",
    )
    for name in ("pivot_rows", "sample_rows", "check_rows"):
        count = getattr(plan, name)
        if count > block_size:
            raise ConfigError(f"{name} = {count} is not allowed: a block has {block_size} rows")
    return plan


def _chosen(option: T | None, default: T) -> T:
    return default if option is None else option
