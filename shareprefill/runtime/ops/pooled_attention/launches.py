"""What the launches of pooled attention share: what is computed, and how programs divide it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.ops.pages import Tokens
from shareprefill.runtime.ops.triton_tiles import logit_factors, multiprocessors

# Programs of a launch for each one that runs at a time: work ends evenly.
PROGRAMS_PER_SLOT = 16


@dataclass(frozen=True)
class Attended:
    """What is computed of which rows, by tensors of one of the calls that are alike.

    Arguments as in `pooled_attention`.
    """

    query: torch.Tensor
    key: Tokens
    rows: torch.Tensor | None
    heads: torch.Tensor | None
    block_size: int
    scale: float
    softcap: float | None

    @property
    def shared(self) -> int:
        """Query heads of a KV head."""
        return self.query.shape[0] // self.key.shape[0]

    @property
    def n_slots(self) -> int:
        """Heads to compute."""
        return self.query.shape[0] if self.heads is None else len(self.heads)

    @property
    def n_members(self) -> int:
        """Rows of a map."""
        if self.rows is None:
            return count_blocks(self.query.shape[1], self.block_size)
        return len(self.rows)

    @property
    def n_k(self) -> int:
        """Key blocks."""
        return count_blocks(self.key.shape[1], self.block_size)

    def logit_factors(self) -> tuple[float, float]:
        """Factor of the products and of the capped logits, in units of log2."""
        return logit_factors(self.scale, self.softcap)


@dataclass(frozen=True)
class Division:
    """How programs without an output share the keys of a tile of rows.

    Attributes:
        programs: That fit on a multiprocessor.
        least: Key runs of one: enough to make up for the start of a program.
        most: Few enough that all multiprocessors are busy to the end.
    """

    programs: int
    least: int
    most: int

    def units(self, work: int, device: torch.device) -> int:
        """Key runs of a program, for `work` runs of which the causal half is computed."""
        slots = self.programs * multiprocessors(device)
        return max(self.least, min(self.most, work // (2 * slots * PROGRAMS_PER_SLOT)))


@dataclass(frozen=True)
class Masses:
    """What launches of masses have in common; names as in `mass_kernel`.

    Attributes:
        sizes: From `n_members` to `n_k_tokens`.
        n_programs: Of the launch.
        constants: Compile-time arguments of `mass_kernel`.
    """

    sizes: tuple[int, ...]
    n_programs: int
    constants: dict[str, Any]
