"""What a selection policy is given, and what it returns."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, Protocol, TypeVar

from torch import Tensor

from shareprefill.runtime.geometry import Geometry


@dataclass(frozen=True)
class LayerInputs:
    """One layer's attention inputs for one sequence (or one chunk of it).

    Attributes:
        query: `[H, Nq, D]`, after RoPE and any query norm.
        key: `[G, Nk, D]`; query row i is at position Nk - Nq + i; query head h reads KV head
            h // (H / G).
        scale: The model's own factor on the logits.
        geometry: Block size, the causal blocks, and the rows that stand for a block.
        softcap: The model's soft-cap c of the logits, c * tanh(logit / c); None for none.
        sinks: The model's attention sinks, one logit a head, `[H]`; None for none.
    """

    query: Tensor
    key: Tensor
    scale: float
    geometry: Geometry
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the logits go into the softmax as they are, and nothing beside them."""
        return self.softcap is None and self.sinks is None

    def empty_output(self, value: Tensor) -> Tensor:
        """Room for the output, `[H, Nq, Dv]`.

        Tokens come first in memory, as the model reads it: its transposition is no copy then.
        """
        heads, n_query, _ = self.query.shape
        return self.query.new_empty((n_query, heads, value.shape[-1])).transpose(0, 1)


@dataclass(frozen=True)
class Selection:
    """What a policy chose for some heads.

    Attributes:
        pattern: bool `[S, n_q, n_k]`, the chosen blocks. The blocks that are always read are added
            by the caller, and what is not causal is taken out.
        work: Work of the choice for one head, as a share of the operations of its dense attention
            (r of B rows' logits are r / 2B of them).
    """

    pattern: Tensor
    work: float


class SelectionPolicy(Protocol):
    """Chooses the blocks of heads that it treats alike."""

    def select(self, inputs: LayerInputs, heads: Tensor, gamma: Tensor) -> Selection:
        """Chooses.

        Nothing here waits for the device: no values of tensors are read by the host.

        Args:
            inputs: The layer's inputs.
            heads: int64 `[S]`, query heads, on the inputs' device. The pattern of a negative entry
                is not needed: it may hold anything.
            gamma: float32 `[S]`, attention mass to cover (a policy with another kind of threshold
                says what it makes of it).

        Returns:
            The chosen blocks, and the work of choosing them.
        """
        ...


T = TypeVar("T")


class MapEstimator(ABC, Generic[T]):
    """A selection policy in two steps, so that one estimate serves many thresholds."""

    @abstractmethod
    def estimate(self, inputs: LayerInputs, heads: Tensor) -> T:
        """What the choice is made from, for heads int64 `[S]`; negative ones may give anything."""

    @abstractmethod
    def choose(self, inputs: LayerInputs, estimate: T, gamma: Tensor) -> Tensor:
        """The blocks at thresholds float32 `[S]`, bool `[S, n_q, n_k]`."""

    @abstractmethod
    def work(self, inputs: LayerInputs) -> float:
        """Work of the estimate for one head, as a share of its dense attention's operations."""

    def select(self, inputs: LayerInputs, heads: Tensor, gamma: Tensor) -> Selection:
        """Estimates, then chooses."""
        pattern = self.choose(inputs, self.estimate(inputs, heads), gamma)
        return Selection(pattern, self.work(inputs))


class InPlacePolicy(MapEstimator[T]):
    """A policy whose operator writes whole patterns, with what is always read, to their place.

    Attributes:
        fills_nonfinite: Whether a pattern that rests on NaN or Inf is written as every causal
            block; otherwise it must not be read.
    """

    fills_nonfinite: ClassVar[bool] = False

    @abstractmethod
    def write(self, inputs: LayerInputs, estimate: T, gamma: Tensor, out: Tensor) -> Tensor:
        """Chooses, into a place among other patterns.

        Args:
            inputs: The layer's inputs.
            estimate: What the choice is made from.
            gamma: float32 `[S]`.
            out: bool `[S, n_q, n_k]`, contiguous: where the patterns are written.

        Returns:
            bool `[S]`: False where the estimate holds NaN or Inf.
        """


def are_finite(masses: Tensor) -> Tensor:
    """Whether masses `[S, n]`, none negative, hold numbers only, bool `[S]`."""
    return masses.sum(-1) < math.inf
