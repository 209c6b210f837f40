"""What a selection policy is given, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from shareprefill.errors import ConfigError
from shareprefill.runtime.geometry import Geometry
from shareprefill.runtime.ops.pages import Tokens, gathered


@dataclass(frozen=True)
class LayerInputs:
    """One layer's attention inputs for one sequence (or one chunk of it).

    Attributes:
        query: `[H, Nq, D]`, after RoPE and any query norm.
        keys: `[G, Nk, D]`, or in an engine's pages, which the operators take as well; query row i
            is at position Nk - Nq + i; query head h reads KV head h // (H / G).
        scale: The model's own factor on the logits.
        geometry: Block size, the causal blocks, and the rows that stand for a block.
        softcap: The model's soft-cap c of the logits, c * tanh(logit / c); None for none.
        sinks: The model's attention sinks, one logit a head, `[H]`; None for none.
    """

    query: Tensor
    keys: Tokens
    scale: float
    geometry: Geometry
    softcap: float | None = None
    sinks: Tensor | None = None

    @cached_property
    def key(self) -> Tensor:
        """`keys` as a tensor `[G, Nk, D]`: gathered out of pages at the first call."""
        return gathered(self.keys)


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


class BlockPolicy(ABC):
    """A selection policy in one function of a layer: the short way to add one.

    ::

        @dataclass(frozen=True)
        class Strided(BlockPolicy):
            stride: int = 4

            def blocks(self, layer: LayerInputs, gamma: Tensor) -> Tensor:
                n_q, n_k = layer.geometry.shape
                chosen = torch.arange(n_k, device=layer.query.device) % self.stride == 0
                return chosen.expand(len(layer.query), n_q, n_k)

            def work(self, inputs: LayerInputs) -> float:
                return 0.0
    """

    @abstractmethod
    def blocks(self, layer: LayerInputs, gamma: Tensor) -> Tensor:
        """The blocks that every head reads, bool `[H, n_q, n_k]` on the layer's device.

        The blocks that are always read (the diagonal is one) need not be among them, and those that
        are not causal are not read. What one head reads may not depend on other heads: they may be
        in another process.

        Args:
            layer: Queries, keys and the grid of blocks.
            gamma: float32 `[H]`, attention mass to cover, in (0, 1].
        """

    @abstractmethod
    def work(self, inputs: LayerInputs) -> float:
        """Work of the choice for one head, as in `Selection`; 0 where no logit is formed."""

    def select(self, inputs: LayerInputs, heads: Tensor, gamma: Tensor) -> Selection:
        """Chooses for all heads, and gives those that are asked for."""
        n_heads = len(inputs.query)
        # Entries without need of a pattern write behind the last head.
        place = torch.where(heads < 0, n_heads, heads)
        every = gamma.new_ones(n_heads + 1).index_put_((place,), gamma)[:-1]
        found = self.blocks(inputs, every)
        check_pattern(self, found, (n_heads, *inputs.geometry.shape), inputs.query.device)
        return Selection(found[heads.clamp(min=0)], self.work(inputs))


def check_pattern(
    policy: object, pattern: object, shape: tuple[int, ...], device: torch.device
) -> None:
    """Refuses what is no pattern; its values are not looked at.

    Raises:
        ConfigError: says what the policy gave, and what it must give.
    """
    if isinstance(pattern, Tensor):
        wanted = (shape, torch.bool, device)
        found = (tuple(pattern.shape), pattern.dtype, pattern.device)
        if found == wanted:
            return
        given = f"{list(found[0])}, {found[1]} on {found[2]}"
    else:
        given = f"a {type(pattern).__name__}"
    raise ConfigError(
        f"policy {type(policy).__name__} chose {given}; it must be a tensor "
        f"{list(shape)} (heads, query blocks, key blocks), torch.bool on {device}"
    )


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
    def write(self, inputs: LayerInputs, heads: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
        """Estimates and chooses, into a place among other patterns.

        Args:
            inputs: The layer's inputs.
            heads: int64 `[S]`; the pattern of a negative one may be anything.
            gamma: float32 `[S]`.
            out: bool `[S, n_q, n_k]`, contiguous: where the patterns are written.

        Returns:
            bool `[S]`, or `[S, n_q]` row by row: False where the estimate holds NaN or Inf.
        """
