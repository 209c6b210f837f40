"""What every policy would have covered and cost on the held-out prompts, head by head.

Costs are shares of the time of a head's dense causal attention: the blocks of its pattern, and the
work of choosing it (logits are half of attention's products, so r of B rows are r / 2B of them),
each times how much longer it takes than the same products in a dense kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from shareprefill.artifact import Policy
from shareprefill.calib.capture import FULL, SLASH, VERTICAL, map_names, rows_key
from shareprefill.calib.store import MapStore, PromptRecord
from shareprefill.clustering.nesting import (
    nested_head_blocks,
    nested_lines,
    nested_row_blocks,
)
from shareprefill.runtime.geometry import Geometry, checked_blocks
from shareprefill.runtime.ops.block_selection import (
    LineWeights,
    covered_mass,
    js_distances,
    smooth_maps,
)
from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.plan import default_geometry
from shareprefill.runtime.policies.smoothed import Smoothed, line_weights

# Attention mass that a pattern may be asked to cover: the choices for every head.
GAMMAS = (
    *(0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.84, 0.87, 0.9),
    *(0.92, 0.935, 0.95, 0.96, 0.97, 0.98, 0.99),
)

# Heads whose maps are chosen from at a time: few enough for a processor's cache.
_HEADS = 64
# Pivots, and query blocks, of whose pairs with all heads the products are in memory at a time.
_PIVOTS, _PAIR_ROWS = 128, 8

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


class HeldOutMeasurements:
    """Measures the policies on held-out prompts, with the choices of blocks that prefills make.

    Args:
        store: A complete calibration.
        prompts: Numbers of the held-out prompts.
        pivot_rows: Query rows a block of a pivot's map; 0 for all of them.
        estimator: Weights of estimates by sampled rows, as an artifact has them.
        effect: Of every head on every prompt, float64 `[P, K]` (see `effects`); None where it is
            not known.

    Attributes:
        numbers: Of the prompts.
        alone: What a head may do alone, with whatever the runtime supports and the capture holds.
        pairs: Recall of head h under the pattern of pivot p, float64 `[gammas, K, K]`, the mean.
            Heads of layers before the pivot's cannot share it: of these 0 may stand here.
        worst_pairs: The same on the prompt where it is lowest.
        pair_harm: Predicted KL divergence, in nats a position, that head h's lost mass causes under
            the pattern of pivot p, float64 `[gammas, K, K]`, infinite where 0 stands in `pairs`;
            None where no effects are known.
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
        curves: dict[Policy, list[_Curve]] = {}
        distances, self._prompts = [], list[_Prompt]()
        for number in prompts:
            maps = store.load(number, *map_names(store.config))
            maps = {name: tensor.flatten(0, 1) for name, tensor in maps.items()}
            prompt = self._prompt(store.prompts[number], maps)
            self._prompts.append(prompt)
            for policy, (choose, work) in self._policies(maps, prompt.geometry).items():
                curves.setdefault(policy, []).append(prompt.measure(choose, work))
            distances.append(_distance_to_uniform(maps[VERTICAL].float(), prompt.geometry))
        self.alone = {policy: _over_prompts(found, effect) for policy, found in curves.items()}
        self.distance_to_uniform = torch.stack(distances).min(0).values
        self.check_work = self._check_work(
            [store.prompts[number].tokens for number in prompts], store.config.block_size
        )
        self._measure_pivots(pivot_rows)

    def _measure_pivots(self, rows: int) -> None:
        """Measures every head under every head's pattern as a pivot of so many rows a block."""
        self.pivot_rows = rows
        sums = _PairSums(self.heads, with_harm=self.effect is not None)
        densities, prompts = list[Tensor](), list[_Prompt]()
        effects = [None] * len(self.numbers) if self.effect is None else [*self.effect]
        for number, prompt, effect in zip(self.numbers, self._prompts, effects, strict=True):
            if rows:
                name = rows_key(rows)
                maps = self._store.load(number, name)[name].flatten(0, 1)
                choose = self._smoothed(maps, prompt.geometry, rows)
            else:
                choose = _by_threshold(prompt.full.transpose(0, 1), prompt.geometry)
            since = torch.cat([choose(heads) for heads in _parts(self.heads, _HEADS)])
            densities.append(_densities(since, prompt.geometry))
            layer_heads = self._store.fingerprint.geometry.heads
            for pairs in prompt.pairs(since, layer_heads, effect):
                sums.add(*pairs, is_first=not prompts)
            prompts.append(replace(prompt, pivots=since[:, prompt.geometry.checked]))
        self._prompts = prompts
        self.pairs, self.worst_pairs = sums.recall.div_(len(prompts)), sums.worst
        harm = self.pair_harm = None if sums.harm is None else sums.harm.div_(len(prompts))
        self.pivots = PolicyCurve(
            recall=self.pairs.diagonal(dim1=1, dim2=2),
            worst_recall=self.worst_pairs.diagonal(dim1=1, dim2=2),
            density=torch.stack(densities).mean(0),
            work=rows / (2 * self._store.config.block_size),
            harm=None if harm is None else harm.diagonal(dim1=1, dim2=2),
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
        """Mass of a head's check inside a pivot's pattern, on the prompt where it is least.

        Args:
            head: Whose check it is.
            pivot: Whose pattern.
            gamma: One of `GAMMAS`.
        """
        first = torch.zeros(1, dtype=torch.int64, device="cpu")
        number = GAMMAS.index(gamma)
        masses = [
            covered_mass(prompt.check[head, None], prompt.pivots[pivot, None] <= number, first)
            for prompt in self._prompts
        ]
        return min(masses).item()

    def _check_work(self, tokens: Sequence[int], block_size: int) -> float:
        """Work of the check before sharing: the mean over prompts of these lengths."""
        shares = []
        for n in tokens:
            blocks = len(checked_blocks(count_blocks(n, block_size), torch.device("cpu")))
            shares.append(self.check_rows * blocks / (2 * n))
        return sum(shares) / len(shares)

    def _prompt(self, record: PromptRecord, maps: dict[str, Tensor]) -> _Prompt:
        geometry = default_geometry(record.tokens, record.map_block, torch.device("cpu"))
        # The rows that the check looks at, here and in a prefill.
        check = maps[rows_key(self.check_rows)][:, geometry.checked].float()
        full = maps[FULL].transpose(0, 1).contiguous()
        nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
        return _Prompt(geometry, full, check, pivots=nothing)

    def _policies(
        self, maps: dict[str, Tensor], geometry: Geometry
    ) -> dict[Policy, tuple[_Choose, float]]:
        """For each policy of a head alone its patterns, and its selection work."""
        half = 2 * self._store.config.block_size
        sample, vertical, slash = maps[rows_key(self.sample_rows)], maps[VERTICAL], maps[SLASH]
        # The last rows read all keys, twice as many as a row does on average.
        lines = min(self._store.config.block_size, geometry.n_query) / geometry.n_query
        found: dict[Policy, tuple[_Choose, float]] = {
            Policy.SAMPLED: (
                lambda heads: nested_row_blocks(sample[heads].float(), GAMMAS, geometry),
                self.sample_rows / half,
            ),
            Policy.VERTICAL_SLASH: (
                lambda heads: nested_lines(
                    vertical[heads].float(), slash[heads].float(), GAMMAS, geometry
                ),
                lines,
            ),
        }
        rows = Smoothed.rows
        if rows_key(rows) in maps:
            estimate = self._smoothed(maps[rows_key(rows)], geometry, rows)
            found[Policy.SMOOTHED] = (estimate, rows / half)
        return found

    def _smoothed(self, maps: Tensor, geometry: Geometry, rows: int) -> _Choose:
        """The patterns of heads that sample `rows` rows a block, from maps `[K, n_q, n_k]`."""
        weights = line_weights(self.estimator, rows)
        return _by_threshold(maps, geometry, weights)


# Patterns of some heads at all gammas, as `nesting` gives them.
_Choose = Callable[[slice], Tensor]
# Number of a gamma, heads, pivots.
_Place = tuple[int, slice, slice]


def _by_threshold(maps: Tensor, geometry: Geometry, weights: LineWeights | None = None) -> _Choose:
    """The blocks above one threshold a map, of maps `[K, n_q, n_k]` that are smoothed first."""

    def choose(heads: slice) -> Tensor:
        seen = maps[heads].float()
        if weights is not None:
            seen = smooth_maps(seen, weights, **geometry.sizes)
        return nested_head_blocks(seen, GAMMAS, geometry)

    return choose


def _parts(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _densities(since: Tensor, geometry: Geometry) -> Tensor:
    """Blocks of patterns over causal blocks, float64 `[gammas, S]`."""
    kinds = len(GAMMAS) + 1
    place = torch.arange(len(since), device="cpu")[:, None, None] * kinds + since
    counts = torch.bincount(place.flatten(), minlength=len(since) * kinds)
    read = counts.view(len(since), kinds)[:, :-1].cumsum(1).T
    return (read / geometry.causal_count).double()


@dataclass(frozen=True)
class _Curve:
    """Recall, density, and the mean square over query blocks of what is lost, of one prompt.

    All are float64 `[gammas, K]`; and selection work.
    """

    recall: Tensor
    density: Tensor
    lost: Tensor
    work: float


class _PairSums:
    """Of every head under every pivot's pattern, over prompts, float64 `[gammas, K, K]`.

    Args:
        heads: K.
        with_harm: Whether anybody asks for `harm`.

    Attributes:
        recall: The sum; 0 for pairs that nothing is added to.
        worst: The least; likewise.
        harm: The sum of what lost mass does to the predictions; infinite for such pairs.
    """

    def __init__(self, heads: int, *, with_harm: bool) -> None:
        self.recall = torch.zeros(len(GAMMAS), heads, heads, dtype=torch.float64, device="cpu")
        self.worst = torch.zeros_like(self.recall)
        self.harm = torch.full_like(self.recall, torch.inf) if with_harm else None

    def add(self, place: _Place, recall: Tensor, harm: Tensor | None, *, is_first: bool) -> None:
        """Adds some heads under some pivots' patterns at one gamma, of one prompt.

        Args:
            place: Number of the gamma, the heads, the pivots.
            recall: Of these, float64 `[heads, pivots]`.
            harm: Likewise.
            is_first: Whether these pairs were not added to before.
        """
        if is_first:
            self.recall[place] = self.worst[place] = recall
        else:
            self.recall[place] += recall
            self.worst[place] = torch.minimum(self.worst[place], recall)
        if self.harm is not None:
            assert harm is not None
            self.harm[place] = harm if is_first else self.harm[place] + harm


@dataclass(frozen=True)
class _Prompt:
    """One prompt.

    Attributes:
        geometry: Of its maps.
        full: Exact maps by query block, float16 `[n_q, K, n_k]`.
        check: Maps of the check's rows, float32 `[K, m, n_k]`, m query blocks.
        pivots: The pivots' patterns there, as `nesting` has them.
    """

    geometry: Geometry
    full: Tensor
    check: Tensor
    pivots: Tensor

    def measure(self, choose: _Choose, work: float) -> _Curve:
        """Every head under patterns of its own."""
        recalls, densities, losses = [], [], []
        for heads in _parts(self.full.shape[1], _HEADS):
            since = choose(heads)
            full = self.full[:, heads].transpose(0, 1).double()
            by_gamma = full.new_zeros((*since.shape[:2], len(GAMMAS) + 1))
            by_gamma.scatter_add_(2, since.long(), full)
            # What the gammas add, from the last: all that lower ones lose.
            lost = by_gamma.flip(2).cumsum(2).flip(2)[..., 1:]  # [S, n_q, gammas]
            covered = full.sum(2, keepdim=True) - lost
            recalls.append(covered.mean(1).clamp_(max=1).T)
            losses.append(lost.square().mean(1).T)
            densities.append(_densities(since, self.geometry))
        return _Curve(torch.cat(recalls, 1), torch.cat(densities, 1), torch.cat(losses, 1), work)

    def pairs(
        self, since: Tensor, layer_heads: int, effect: Tensor | None
    ) -> Iterator[tuple[_Place, Tensor, Tensor | None]]:
        """Every head under every pivot's pattern, but for heads of layers before the pivot's.

        Args:
            since: The pivots' patterns, as `nesting` has them.
            layer_heads: Heads of a layer.
            effect: Of every head on this prompt, float64 `[K]`; None where harm is not asked for.

        Yields:
            What `_PairSums.add` takes, of every pair of heads and every gamma once.
        """
        n_q, heads, _ = self.full.shape
        full = self.full.float()
        held = full.sum(2).double().sum(0)[:, None]  # [K, 1]
        since = since.permute(1, 2, 0).contiguous()  # [n_q, n_k, K]
        for pivots in _parts(heads, _PIVOTS):
            later = slice(pivots.start // layer_heads * layer_heads, heads)
            shape = (_PAIR_ROWS, heads - later.start, pivots.stop - pivots.start)
            products = torch.empty(shape, dtype=torch.float32, device="cpu")
            for number in range(len(GAMMAS)):
                lost = torch.zeros(shape[1:], dtype=torch.float64, device="cpu")
                squares = None if effect is None else torch.zeros_like(lost)
                for rows in _parts(n_q, _PAIR_ROWS):
                    # Behind the diagonal there is nothing.
                    seen = slice(0, rows.stop)
                    unread = (since[rows, seen, pivots] > number).float()
                    outside = products[: rows.stop - rows.start]
                    torch.bmm(full[rows, later, seen], unread, out=outside)
                    lost += outside.sum(0)
                    if squares is not None:
                        squares += outside.square_().sum(0)
                recall = (held[later] - lost).div_(n_q).clamp_(max=1)
                harm = None
                if squares is not None and effect is not None:
                    # Whoever's pattern a head reads, the effect is its own.
                    harm = squares.mul_(effect[later, None] / n_q)
                yield (number, later, pivots), recall, harm


def _distance_to_uniform(vertical: Tensor, geometry: Geometry) -> Tensor:
    first = torch.zeros(len(vertical), dtype=torch.int64, device="cpu")
    return js_distances(vertical[:, None], geometry.uniform, first)


def _over_prompts(curves: Sequence[_Curve], effect: Tensor | None) -> PolicyCurve:
    recall = torch.stack([curve.recall for curve in curves])
    harm = None
    if effect is not None:
        harms = [curve.lost * own for curve, own in zip(curves, effect, strict=True)]
        harm = torch.stack(harms).mean(0)
    return PolicyCurve(
        harm=harm,
        recall=recall.mean(0),
        worst_recall=recall.min(0).values,
        density=torch.stack([curve.density for curve in curves]).mean(0),
        work=sum(curve.work for curve in curves) / len(curves),
    )
