"""What every policy would have covered and cost on the held-out prompts, head by head.

Costs are shares of the time of a head's dense causal attention: the blocks of its pattern, and the
work of choosing it (logits are half of attention's products, so r of B rows are r / 2B of them),
each times how much longer it takes than the same products in a dense kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from shareprefill.artifact import Policy
from shareprefill.calib.capture import FULL, SLASH, VERTICAL, rows_key
from shareprefill.calib.store import MapStore
from shareprefill.config import RuntimeConfig
from shareprefill.runtime.ops.blocks import causal_blocks
from shareprefill.runtime.patterns import (
    always_blocks,
    cumulative_pattern,
    distance_to_uniform,
    recall,
    vertical_slash_pattern,
)
from shareprefill.runtime.pivots import pivot_estimate, pivot_patterns
from shareprefill.runtime.policies.smoothed import Smoothed

# Attention mass that a pattern may be asked to cover: the choices for every head.
GAMMAS = (
    *(0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.84, 0.87, 0.9),
    *(0.92, 0.935, 0.95, 0.96, 0.97, 0.98, 0.99),
)

# Time of a block in a block-sparse kernel over its time in a dense one: 1.2 to 1.3 for
# FlashAttention-4 on an H100 at 32K tokens, 1.5 for the blockwise implementation on a CPU.
SPARSE_OVERHEAD = 1.3
# The same for selection, whose products are few for the softmax that comes with them: 8 rows a
# block take 2.6 times their share on an H100 at 32K tokens, 2 rows and a profile 2.5 and 3 times
# on a CPU at 8K.
SELECTION_OVERHEAD = 2.5


D = TypeVar("D", float, Tensor)


def predicted_cost(density: D, work: float) -> D:
    """Time of blocks and of choosing them, as a share of dense attention's."""
    return SPARSE_OVERHEAD * density + SELECTION_OVERHEAD * work


@dataclass(frozen=True)
class Measured:
    """One selector on the held-out prompts: means over prompts.

    Attributes:
        recall: float64 `[gammas, K]`.
        lowest: The recall on the prompt where a head's is lowest, float64 `[gammas, K]`.
        density: float64 `[gammas, K]`, blocks computed over causal blocks.
        work: Selection work.
    """

    recall: Tensor
    lowest: Tensor
    density: Tensor
    work: float

    @property
    def cost(self) -> Tensor:
        """Predicted cost, float64 `[gammas, K]`."""
        return predicted_cost(self.density, self.work)


@dataclass(frozen=True)
class _Prompt:
    full: Tensor
    pivot: Tensor
    check: Tensor
    always: Tensor
    causal: Tensor


class Evidence:
    """Measures the policies on held-out prompts.

    Args:
        store: A complete calibration.
        prompts: Numbers of the held-out prompts.
        pivot_rows: Query rows a block of a pivot's map; 0 for all of them.
    """

    def __init__(self, store: MapStore, prompts: Sequence[int], pivot_rows: int) -> None:
        self.block_size = store.config.block_size
        self.check_rows, *_, self.sample_rows = store.config.rows
        self.pivot_rows = pivot_rows
        self._prompts: list[_Prompt] = []
        sampled, slashes, densities, spreads = [], [], [], []
        smoothed_rows = Smoothed().rows
        has_smoothed = smoothed_rows in store.config.rows
        smoothed = []
        works = []
        pairs: Tensor | None = None
        lowest: Tensor | None = None
        runtime = RuntimeConfig()
        for number in prompts:
            maps = {name: t.float() for name, t in store.load(number).items()}
            tokens = store.prompts[number].tokens
            full = maps[FULL].flatten(0, 1)
            causal = causal_blocks(tokens, 0, self.block_size)
            always = always_blocks(
                tokens,
                tokens,
                self.block_size,
                sink=runtime.sink_blocks,
                local=runtime.local_blocks,
                device=full.device,
            )
            pivot_name = rows_key(pivot_rows) if pivot_rows else FULL
            prompt = _Prompt(
                full=full,
                pivot=pivot_estimate(maps[pivot_name].flatten(0, 1), causal, pivot_rows),
                check=maps[rows_key(self.check_rows)].flatten(0, 1),
                always=always,
                causal=causal,
            )
            self._prompts.append(prompt)
            vertical, slash = maps[VERTICAL].flatten(0, 1), maps[SLASH].flatten(0, 1)
            sample = maps[rows_key(self.sample_rows)].flatten(0, 1)
            sampled.append(self._table(prompt, lambda g, s=sample: cumulative_pattern(s, g)))
            if has_smoothed:
                few = maps[rows_key(smoothed_rows)].flatten(0, 1)
                smoothed.append(self._smoothed(prompt, few, smoothed_rows))
            slashes.append(
                self._table(
                    prompt,
                    lambda g, v=vertical, s=slash, n=tokens: vertical_slash_pattern(
                        v, s, torch.full((len(v),), g), n, n, self.block_size
                    ),
                )
            )
            # The last rows read all keys, twice as many as a row does on average.
            works.append(min(self.block_size, tokens) / tokens)
            spreads.append(distance_to_uniform(vertical[:, None, :], causal[-1:]))
            covered, density = self._pairs(prompt)
            densities.append(density)
            pairs = covered if pairs is None else pairs + covered
            lowest = covered if lowest is None else torch.minimum(lowest, covered)
        assert pairs is not None
        assert lowest is not None
        half = 2 * self.block_size
        self.sampled = _mean(sampled, self.sample_rows / half)
        self.vertical_slash = _mean(slashes, sum(works) / len(works))
        # What a head may do alone, with whatever the runtime supports and the capture holds.
        self.alone = {Policy.SAMPLED: self.sampled, Policy.VERTICAL_SLASH: self.vertical_slash}
        if has_smoothed:
            self.alone[Policy.SMOOTHED] = _mean(smoothed, smoothed_rows / half)
        # [gammas, K, K]: recall of head h under the pattern of pivot p; mean, and lowest.
        self.pairs, self.lowest_pairs = pairs / len(self._prompts), lowest
        self.pivots = Measured(
            self.pairs.diagonal(dim1=1, dim2=2),
            self.lowest_pairs.diagonal(dim1=1, dim2=2),
            torch.stack(densities).mean(0),
            pivot_rows / half,
        )
        # Distance of the last block's distribution to uniform, the least over prompts.
        self.spread = torch.stack(spreads).min(0).values
        self.check_work = self.check_rows / half

    @property
    def heads(self) -> int:
        """K, all captured heads."""
        return len(self.spread)

    def least_covered(self, head: int, pivot: int, gamma: float) -> float:
        """Mass of a head's check inside a pivot's pattern, on the prompt where it is least."""
        return min(
            recall(prompt.check[head], self._patterns(prompt, prompt.pivot[pivot, None], gamma)[0])
            for prompt in self._prompts
        ).item()

    def _smoothed(self, prompt: _Prompt, few: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        # A head that smooths its own map takes the pattern that a pivot would give.
        estimate = pivot_estimate(few, prompt.causal, rows)
        return self._table(prompt, lambda g: self._patterns(prompt, estimate, g))

    def _table(self, prompt: _Prompt, pattern_for) -> tuple[Tensor, Tensor]:
        recalls, densities = [], []
        for gamma in GAMMAS:
            pattern = (pattern_for(gamma) | prompt.always) & prompt.causal
            recalls.append(recall(prompt.full, pattern).double())
            densities.append(pattern.sum((-1, -2)) / prompt.causal.sum())
        return torch.stack(recalls), torch.stack(densities).double()

    def _pairs(self, prompt: _Prompt) -> tuple[Tensor, Tensor]:
        """Recall of every head under every head's pattern as a pivot, and these patterns' density.

        Returns:
            float64 `[gammas, K, K]` and `[gammas, K]`.
        """
        inside = prompt.full.flatten(1)
        rows = prompt.full.shape[1]
        recalls, densities = [], []
        for gamma in GAMMAS:
            pattern = self._patterns(prompt, prompt.pivot, gamma).flatten(1)
            recalls.append((inside @ pattern.float().T).double().div(rows).clamp(max=1))
            densities.append(pattern.sum(-1) / prompt.causal.sum())
        return torch.stack(recalls), torch.stack(densities).double()

    def _patterns(self, prompt: _Prompt, estimate: Tensor, gamma: float) -> Tensor:
        gammas = torch.full((len(estimate),), gamma)
        return pivot_patterns(estimate, gammas, prompt.always, prompt.causal)


def _mean(tables: list[tuple[Tensor, Tensor]], work: float) -> Measured:
    recalls, densities = (torch.stack([t[side] for t in tables]) for side in (0, 1))
    return Measured(recalls.mean(0), recalls.min(0).values, densities.mean(0), work)
