"""Policies that estimate something once, and choose blocks from it at any threshold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from torch import Tensor

from shareprefill.runtime.policies.base import LayerInputs, Selection

T = TypeVar("T")


class Estimating(ABC, Generic[T]):
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


class Placing(ABC):
    """A policy whose patterns are whole: with what is always read, and safe from NaN and Inf."""

    @abstractmethod
    def place(self, inputs: LayerInputs, heads: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
        """Chooses, into its place among other patterns.

        Args:
            inputs: The layer's inputs.
            heads: int64 `[S]`; negative ones need none.
            gamma: float32 `[S]`.
            out: bool `[S, n_q, n_k]`, contiguous: where the patterns are written.

        Returns:
            bool `[S]`: where it is False, the pattern rests on NaN or Inf, and is of every causal
            block.
        """

    @abstractmethod
    def work(self, inputs: LayerInputs) -> float:
        """Work of the choice for one head, as a share of its dense attention's operations."""
