"""What every policy would have covered and cost on the held-out prompts, head by head.

Costs are shares of the time of a head's dense causal attention: the blocks of its pattern, and the
work of choosing it (logits are half of attention's products, so r of B rows are r / 2B of them),
each times how much longer it takes than the same products in a dense kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from shareprefill.artifact import Policy
from shareprefill.calib.capture import FULL, SLASH, VERTICAL, map_names, rows_key
from shareprefill.calib.store import MapStore
from shareprefill.config import RuntimeConfig
from shareprefill.runtime.geometry import Geometry, checked_blocks
from shareprefill.runtime.ops.block_selection import (
    covered_mass,
    head_blocks,
    js_distances,
    select_blocks,
    smooth_maps,
    vertical_slash_blocks,
)
from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.policies.smoothed import Smoothed, line_weights

# Attention mass that a pattern may be asked to cover: the choices for every head.
GAMMAS = (
    *(0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.84, 0.87, 0.9),
    *(0.92, 0.935, 0.95, 0.96, 0.97, 0.98, 0.99),
)

# Query blocks of all pairs of heads that are in memory at once.
_PAIR_ROWS = 8

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


def time_in_blocks(density: D, work: float) -> D:
    """The same time as a density of blocks alone."""
    return predicted_cost(density, work) / SPARSE_OVERHEAD


@dataclass(frozen=True)
class PolicyCurve:
    """One selector on the held-out prompts, at every gamma: means over prompts.

    Attributes:
        recall: float64 `[gammas, K]`.
        worst_recall: The recall on the prompt where a head's is lowest, float64 `[gammas, K]`.
        density: float64 `[gammas, K]`, blocks computed over causal blocks.
        work: Selection work.
        harm: What the lost mass does to the predictions, float64 `[gammas, K]`; None where no
            effects are known.
    """

    recall: Tensor
    worst_recall: Tensor
    density: Tensor
    work: float
    harm: Tensor | None = None

    @property
    def cost(self) -> Tensor:
        """Predicted cost, float64 `[gammas, K]`."""
        return predicted_cost(self.density, self.work)


class HeldOutMeasurements:
    """Measures the policies on held-out prompts, with the operators that prefills use.

    Args:
        store: A complete calibration.
        prompts: Numbers of the held-out prompts.
        pivot_rows: Query rows a block of a pivot's map; 0 for all of them.
        estimator: Weights of estimates by sampled rows, as an artifact has them.
        effect: Of every head, float64 `[K]` (see `effects`); None where it is not known.

    Attributes:
        numbers: Of the prompts.
        alone: What a head may do alone, with whatever the runtime supports and the capture holds.
        pairs: Recall of head h under the pattern of pivot p, float64 `[gammas, K, K]`, the mean.
        worst_pairs: The same on the prompt where it is lowest.
        pair_harm: Predicted KL divergence, in nats a position, that head h's lost mass causes under
            the pattern of pivot p, float64 `[gammas, K, K]`; None where no effects are known.
        pivots: Every head under its own pattern as a pivot.
        check_work: Selection work of a sharing head.
        distance_to_uniform: Of the last block's distribution, the least over prompts `[K]`: the
            paper's measure for "highly sparse" (arXiv 2505.19578, section 3).
    """

    def __init__(
        self,
        store: MapStore,
        prompts: Sequence[int],
        pivot_rows: int,
        *,
        estimator: Mapping[str, Sequence[float]],
        effect: Tensor | None = None,
    ) -> None:
        self.estimator, self.effect = estimator, effect
        self.check_rows, *_, self.sample_rows = store.config.rows
        self._store, self.numbers = store, list(prompts)
        self._prompts: list[_Prompt] = []
        curves: dict[Policy, list[_Curve]] = {}
        distances = []
        block_size = store.config.block_size
        for number in prompts:
            record, names = store.prompts[number], map_names(store.config)
            maps = {n: t.float().flatten(0, 1) for n, t in store.load(number, *names).items()}
            prompt = self._prompt(maps, record.tokens, record.map_block)
            self._prompts.append(prompt)
            policies = self._policies(maps, prompt.geometry, block_size)
            for policy, (choose, work) in policies.items():
                curves.setdefault(policy, []).append(prompt.measure(choose, work))
            distances.append(_distance_to_uniform(maps[VERTICAL], prompt.geometry))
        self.alone = {policy: _over_prompts(found, effect) for policy, found in curves.items()}
        self.distance_to_uniform = torch.stack(distances).min(0).values
        self.check_work = self._check_work(
            [store.prompts[number].tokens for number in prompts], block_size
        )
        self._measure_pivots(pivot_rows)

    def _measure_pivots(self, rows: int) -> None:
        """Measures every head under every head's pattern as a pivot of so many rows a block."""
        self.pivot_rows = rows
        pairs, prompts = [], []
        for number, prompt in zip(self.numbers, self._prompts, strict=True):
            if rows:
                name = rows_key(rows)
                maps = {name: self._store.load(number, name)[name].float().flatten(0, 1)}
                pivot = self._smoothed(maps, prompt.geometry, rows)
            else:
                pivot = prompt.full
            prompts.append(replace(prompt, pivot=pivot))
            pairs.append(prompts[-1].measure_pairs(rows / (2 * self._store.config.block_size)))
        self._prompts = prompts
        recalls = _over_prompts(pairs, self.effect)
        self.pairs, self.worst_pairs = recalls.recall, recalls.worst_recall
        self.pair_harm = recalls.harm
        self.pivots = replace(
            recalls,
            recall=self.pairs.diagonal(dim1=1, dim2=2),
            worst_recall=self.worst_pairs.diagonal(dim1=1, dim2=2),
            harm=None if recalls.harm is None else recalls.harm.diagonal(dim1=1, dim2=2),
        )

    @property
    def heads(self) -> int:
        """K, all captured heads."""
        return len(self.distance_to_uniform)

    def with_pivots(self, rows: int) -> HeldOutMeasurements:
        """The same measurements with pivots that sample so many rows a block, 0 for all."""
        other = copy(self)
        other._measure_pivots(rows)
        return other

    def least_covered(self, head: int, pivot: int, gamma: float) -> float:
        """Mass of a head's check inside a pivot's pattern, on the prompt where it is least."""
        first = torch.zeros(1, dtype=torch.int64, device="cpu")
        masses = []
        for prompt in self._prompts:
            pattern = prompt.patterns(prompt.pivot[pivot, None], gamma)
            # The rows that the check looks at, here and in a prefill.
            rows = prompt.geometry.checked
            masses.append(covered_mass(prompt.check[head, None, rows], pattern[:, rows], first))
        return min(masses).item()

    def _check_work(self, tokens: Sequence[int], block_size: int) -> float:
        """Work of the check before sharing: the mean over prompts of these lengths."""
        shares = []
        for n in tokens:
            blocks = len(checked_blocks(count_blocks(n, block_size), torch.device("cpu")))
            shares.append(self.check_rows * blocks / (2 * n))
        return sum(shares) / len(shares)

    def _prompt(self, maps: dict[str, Tensor], tokens: int, block_size: int) -> _Prompt:
        runtime = RuntimeConfig()
        geometry = Geometry(
            tokens,
            tokens,
            torch.device("cpu"),
            block_size=block_size,
            sink_blocks=runtime.sink_blocks,
            local_blocks=runtime.local_blocks,
        )
        full = maps[FULL]
        return _Prompt(geometry, full, full, maps[rows_key(self.check_rows)])

    def _policies(
        self, maps: dict[str, Tensor], geometry: Geometry, block_size: int
    ) -> dict[Policy, tuple[_Choose, float]]:
        """For each policy of a head alone its pattern at a gamma, and its selection work."""
        half, reads = 2 * block_size, geometry.reads
        sample, vertical, slash = maps[rows_key(self.sample_rows)], maps[VERTICAL], maps[SLASH]
        # The last rows read all keys, twice as many as a row does on average.
        lines = min(block_size, geometry.n_query) / geometry.n_query
        found: dict[Policy, tuple[_Choose, float]] = {
            Policy.SAMPLED: (
                lambda gamma: select_blocks(sample, gamma, **reads),
                self.sample_rows / half,
            ),
            Policy.VERTICAL_SLASH: (
                lambda gamma: vertical_slash_blocks(vertical, slash, gamma, **reads),
                lines,
            ),
        }
        rows = Smoothed.rows
        if rows_key(rows) in maps:
            estimate = self._smoothed(maps, geometry, rows)
            found[Policy.SMOOTHED] = (
                lambda gamma: head_blocks(estimate, gamma, **reads)[0],
                rows / half,
            )
        return found

    def _smoothed(self, maps: dict[str, Tensor], geometry: Geometry, rows: int) -> Tensor:
        """What a head that samples `rows` rows a block chooses from, `[K, n_q, n_k]`."""
        weights = line_weights(self.estimator, rows)
        return smooth_maps(maps[rows_key(rows)], weights, **geometry.sizes)


# Patterns `[K, n_q, n_k]` of all heads at gammas float32 `[K]`.
_Choose = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Curve:
    """Recall, density, and the mean square over query blocks of what is lost, of one prompt.

    All are float64 `[gammas, ...]`; and selection work.
    """

    recall: Tensor
    density: Tensor
    lost: Tensor
    work: float


@dataclass(frozen=True)
class _Prompt:
    """The maps of one prompt, float32 `[K, n_q, n_k]`: exact, of pivots, and of the check."""

    geometry: Geometry
    full: Tensor
    pivot: Tensor
    check: Tensor

    def patterns(self, maps: Tensor, gamma: float) -> Tensor:
        """What pivots of these maps give other heads at a gamma, bool `[S, n_q, n_k]`."""
        return head_blocks(
            maps,
            torch.full((len(maps),), gamma, dtype=torch.float32, device="cpu"),
            **self.geometry.reads,
        )[0]

    def measure(self, choose: _Choose, work: float) -> _Curve:
        """Every head under a pattern of its own."""
        every = torch.arange(len(self.full), device="cpu")
        recalls, densities, losses = [], [], []
        for gamma in GAMMAS:
            pattern = choose(torch.full((len(every),), gamma, dtype=torch.float32, device="cpu"))
            recalls.append(covered_mass(self.full, pattern, every).double())
            densities.append(self._density(pattern))
            losses.append((self.full * ~pattern).sum(-1).square().mean(-1).double())
        return _Curve(torch.stack(recalls), torch.stack(densities), torch.stack(losses), work)

    def measure_pairs(self, work: float) -> _Curve:
        """Every head under every head's pattern as a pivot: recall `[gammas, K, K]`."""
        n_q = self.geometry.shape[0]
        by_row = self.full.transpose(0, 1).contiguous()  # [n_q, K, n_k]
        held = by_row.sum(-1, keepdim=True)  # [n_q, K, 1]
        recalls, densities, losses = [], [], []
        for gamma in GAMMAS:
            pattern = self.patterns(self.pivot, gamma)
            covered = torch.zeros(len(pattern), len(pattern), dtype=torch.float64, device="cpu")
            lost = torch.zeros_like(covered)
            # `covered_mass` of all pairs, as products, row by row.
            for start in range(0, n_q, _PAIR_ROWS):
                rows = slice(start, min(start + _PAIR_ROWS, n_q))
                # Behind the diagonal there is nothing.
                seen = slice(0, rows.stop)
                read = pattern[:, rows, seen].permute(1, 2, 0).float()
                inside = by_row[rows, :, seen] @ read  # [rows, K, K]: head, pivot
                covered += inside.sum(0)
                lost += (held[rows] - inside).clamp_(min=0).square_().sum(0)
            recalls.append(covered.div_(n_q).clamp_(max=1))
            losses.append(lost.div_(n_q))
            densities.append(self._density(pattern))
        return _Curve(torch.stack(recalls), torch.stack(densities), torch.stack(losses), work)

    def _density(self, pattern: Tensor) -> Tensor:
        return (pattern.sum((1, 2)) / self.geometry.causal_count).double()


def _distance_to_uniform(vertical: Tensor, geometry: Geometry) -> Tensor:
    first = torch.zeros(len(vertical), dtype=torch.int64, device="cpu")
    return js_distances(vertical[:, None], geometry.uniform, first)


def _over_prompts(curves: Sequence[_Curve], effect: Tensor | None) -> PolicyCurve:
    recall = torch.stack([curve.recall for curve in curves])
    harm = None
    if effect is not None:
        lost = torch.stack([curve.lost for curve in curves]).mean(0)
        harm = lost * effect.view(-1, *[1] * (lost.ndim - 2))
    return PolicyCurve(
        harm=harm,
        recall=recall.mean(0),
        worst_recall=recall.min(0).values,
        density=torch.stack([curve.density for curve in curves]).mean(0),
        work=sum(curve.work for curve in curves) / len(curves),
    )
