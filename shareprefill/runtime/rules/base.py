"""What a rule is asked, and what it answers: which pattern each head of a layer reads, and why."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from shareprefill.runtime.geometry import Geometry
from shareprefill.runtime.ops.pages import Tokens
from shareprefill.runtime.plan import RuntimePlan
from shareprefill.runtime.policies.base import LayerInputs


@dataclass(frozen=True, eq=False)
class PolicyTaken:
    """The policy that each head took, raw: it follows from the pattern that the head read.

    Attributes:
        by_head: Policy of a head that reads no pattern, and of every pivot, int64 `[H]`.
        by_pattern: Policy of the other heads that read a pattern, int64 `[P + 1]`; the last one
            is for the pattern of every causal block.
        is_finite: For some patterns, by the first one's number: where it is False, the pattern
            rests on NaN or Inf and is of every causal block, bool `[S]`.
    """

    by_head: Tensor
    by_pattern: Tensor
    is_finite: tuple[tuple[int, Tensor], ...] = ()


@dataclass(frozen=True, eq=False)
class Overhead:
    """What one step of the selection cost.

    Attributes:
        heads: Heads that it was made for, int64 `[S]`; -1 for none.
        share: For each, its work as a share of the operations of the head's dense attention.
    """

    heads: Tensor
    share: float


@dataclass(frozen=True, eq=False)
class Coverage:
    """What the check before sharing found.

    Attributes:
        heads: The sharing heads, int64 `[S]`.
        mass: Attention mass of their sampled rows inside their pivots' patterns, float32 `[S]`.
        pivot_is_finite: Whether those patterns may be shared, bool `[S]`.
    """

    heads: Tensor
    mass: Tensor
    pivot_is_finite: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerSelection:
    """The P patterns of one layer, and which one each of its heads reads.

    Policies, steps, check and distances are for records. They are raw, as small as a few numbers a
    head, so that a layer launches nothing for them.

    Attributes:
        own: The layer's last patterns, bool `[O, n_q, n_k]`.
        head_to_pattern: int64 `[H]`; P: every causal block; -1: none, the head's output is there.
        output: `[H, Nq, Dv]`, which holds the output of the heads that read no pattern.
        policy_taken: The policies.
        flags: The number of a pattern, and flags of it and those that follow, bool `[S, n_q]`: a
            head reads every causal block in place of a pattern whose flags are not all set. None
            for none.
        overhead: The steps of the selection.
        coverage: The check before sharing; None without one.
        distances: JS distance of every candidate for sharing to its pivot, float32 `[H]`, NaN for
            other heads; None for a rule that compares by mass.
        shared: Patterns of the forward pass, bool `[N, n_q, n_k]`, some of which are the layer's
            first; None for none.
        source: Their numbers, int64 `[P - O]`.
    """

    own: Tensor
    head_to_pattern: Tensor
    output: Tensor
    policy_taken: PolicyTaken
    flags: tuple[int, Tensor] | None = None
    shared: Tensor | None = None
    source: Tensor | None = None
    overhead: tuple[Overhead, ...] = ()
    coverage: Coverage | None = None
    distances: Tensor | None = None

    @property
    def patterns(self) -> Tensor:
        """The layer's patterns, bool `[P, n_q, n_k]`, brought together."""
        if self.shared is None or self.source is None:
            return self.own
        return torch.cat([self.shared[self.source], self.own])


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One layer's part of the plan as tensors on its device, as far as all rules need it.

    Attributes:
        n_heads: Query heads.
        dense: Heads that are dense by plan, int64 `[S]`.
        is_dense: Whether all heads are.
        reads_patterns: Whether any head may read a pattern.
    """

    n_heads: int
    dense: Tensor
    is_dense: bool
    reads_patterns: bool


class Exchange(Protocol):
    """Brings together what the processes of a tensor-parallel group have found."""

    def sum(self, tensor: Tensor) -> None:
        """Adds the tensors of all processes, in place in each."""
        ...


class Pivots(Protocol):
    """What the pivots of one sequence gave to heads of later layers."""

    def to(self, device: torch.device) -> Self:
        """The same on another device: with a device map, layers are on several."""
        ...


L = TypeVar("L", bound=LayerPlan)
V = TypeVar("V", bound=Pivots)


class LayerRule(ABC, Generic[L, V]):
    """Decides what the heads of a layer read.

    Args:
        plan: What every head of the model is to do.
        heads: The query heads of every layer that this process holds.
        exchange: Of the other processes' heads; None where this one holds all of them.
    """

    def __init__(self, plan: RuntimePlan, heads: range, exchange: Exchange | None = None) -> None:
        self.plan, self.heads, self.exchange = plan, heads, exchange

    @abstractmethod
    def make_layer(self, index: int, device: torch.device) -> L:
        """Makes a layer's plan as tensors on a device; every prefill reads them."""

    @abstractmethod
    def new_pivots(self, geometry: Geometry) -> V:
        """Room for the pivots of one sequence."""

    def memory(self, layer: L, pivots: V) -> tuple[Tensor, ...] | None:
        """The tensors of a sequence's pivots, where the selections of a layer launch alike.

        None where they may differ by more than sizes: by state, by other processes.
        """
        return None

    @abstractmethod
    def select(self, layer: L, pivots: V, inputs: LayerInputs, value: Tokens) -> LayerSelection:
        """Chooses the patterns of one layer for one sequence; nothing waits for the device.

        Args:
            layer: The layer's plan.
            pivots: Of the earlier layers; this layer's are added.
            inputs: Queries and keys.
            value: `[G, Nk, Dv]`.
        """


def integers(values: Iterable[int], device: torch.device) -> Tensor:
    """Numbers as int64 `[n]`."""
    return torch.tensor([*values], dtype=torch.int64, device=device)


def numbers(values: Iterable[float], device: torch.device) -> Tensor:
    """Numbers as float32 `[n]`."""
    return torch.tensor([*values], dtype=torch.float32, device=device)
