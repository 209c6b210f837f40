"""What a selection policy is given, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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
