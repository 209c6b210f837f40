"""Logits as slash + vertical + horizontal, fitted in linear time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.block_selection import head_blocks
from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.policies.base import LayerInputs, MapEstimator
from shareprefill.runtime.policies.logits import kv_heads, pieces, real_heads

# Rounds of backfitting: the fit changes by less than 1 % of its spread after this many.
_ROUNDS = 6


@dataclass(frozen=True)
class Decompose(MapEstimator[Tensor]):
    """Fits logit(i, j) ~ h_i + v_j + s_(i-j) over all causal pairs, and keeps the blocks of mass.

    The fit is least squares. All it needs of the logits are their sums over every row, column and
    diagonal: a row's sum is its query times a running sum of keys, a column's its key times a sum
    of the later queries, a diagonal's a correlation of queries and keys (by FFT). All are of
    rotated queries and keys, so rotary positions need no knowledge of them. This is our reading of
    a published abstract; the soft-cap is left out, as capped logits have no such sums.

    Attributes:
        max_error: Keep so much mass that no output row is off by more than this share of the
            largest value's norm, if the fit is right: dropping a mass m moves a row by at most 2m.
        time_budget: Keep this share of the causal blocks instead.
    """

    max_error: float | None = None
    time_budget: float | None = None

    def __post_init__(self) -> None:
        if self.max_error is not None and self.time_budget is not None:
            raise ConfigError("give max_error or time_budget, not both: each sets the threshold")
        for name in ("max_error", "time_budget"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"{name} = {value!r} must be above 0 and at most 1")

    def estimate(self, inputs: LayerInputs, heads: Tensor) -> Tensor:
        """Maps of the fitted logits."""
        return _fitted_maps(inputs, real_heads(heads))

    def choose(self, inputs: LayerInputs, estimate: Tensor, gamma: Tensor) -> Tensor:
        """Blocks above one threshold a head: from the error, the budget, or else from gamma."""
        if self.time_budget is not None:
            return densest_blocks(estimate, inputs.geometry.causal, self.time_budget)
        if self.max_error is not None:
            gamma = torch.full_like(gamma, 1 - self.max_error / 2)
        return head_blocks(estimate, gamma, **inputs.geometry.sizes)[0]

    def work(self, inputs: LayerInputs) -> float:
        """Two real FFTs of a channel and running sums, over 4 operations a pair and channel."""
        n_query, n_key, size = inputs.query.shape[1], inputs.keys.shape[1], _fft_size(inputs)
        pairs = n_query * (n_key - (n_query - 1) / 2)
        return min(0.5, (5 * size * math.log2(size) + 8 * n_key) / (4 * pairs))


def densest_blocks(maps: Tensor, causal: Tensor, density: float) -> Tensor:
    """The blocks of most mass, as many as a share of the causal blocks: `[S, n_q, n_k]` bool.

    Args:
        maps: Block maps `[S, n_q, n_k]`.
        causal: Causal blocks, bool `[n_q, n_k]`.
        density: Share of the causal blocks, in (0, 1].
    """
    flat = torch.where(causal, maps.float(), -1.0).flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(
        1, order, torch.arange(flat.shape[1], device=maps.device).expand_as(order)
    )
    return (place < causal.sum() * density).view_as(maps) & causal


def _fft_size(inputs: LayerInputs) -> int:
    return 1 << (inputs.query.shape[1] + inputs.keys.shape[1] - 1).bit_length()


def _fitted_maps(inputs: LayerInputs, heads: Tensor) -> Tensor:
    """Block maps of the fitted logits, float32 `[S, n_q, n_k]`.

    One softmax a query block: vertical and slash masses of a block are taken as independent.
    """
    block = inputs.geometry.block_size
    n_query, n_key = inputs.query.shape[1], inputs.keys.shape[1]
    n_q, n_k = count_blocks(n_query, block), count_blocks(n_key, block)
    offset = n_key - n_query
    row = torch.arange(n_q, device=heads.device)[:, None]
    distance = row - torch.arange(n_k, device=heads.device)[None, :]
    maps = torch.empty((len(heads), n_q, n_k), device=heads.device, dtype=torch.float32)
    for some in pieces(len(heads), 24 * inputs.query.shape[2] * _fft_size(inputs), heads.device):
        queries = inputs.query[heads[some]].float() * inputs.scale
        keys = inputs.key[kv_heads(inputs, heads[some])].float()
        vertical, slash = fit_lines(queries, keys)
        lines = pad(vertical, (0, -n_key % block), value=-torch.inf)
        lines = lines.unflatten(1, (n_k, block)).logsumexp(-1)
        # Offsets of a pair of blocks at distance f run over f - B + 1 .. f + B - 1.
        first = offset - (n_k - 1) * block
        near = _near_offsets(slash, first, n_q + n_k - 1, block)
        logits = lines[:, None, :] + near[:, distance + (n_k - 1)]
        logits = logits.masked_fill_(~inputs.geometry.causal, -torch.inf)
        maps[some] = torch.softmax(logits, -1)
    return maps


def _near_offsets(slash: Tensor, first: int, count: int, block: int) -> Tensor:
    """Log of the mean mass of pairs of blocks at distances `first + t * block`, t < count."""
    top = slash.amax(-1, keepdim=True)
    mass = torch.exp(slash - top)
    low = -(first - block + 1)
    high = first + (count - 1) * block + block - mass.shape[1]
    windows = pad(mass, (low, max(0, high))).unfold(1, 2 * block - 1, block)[:, :count]
    steps = torch.arange(1 - block, block, device=slash.device)
    weights = (block - steps.abs()).float() / block**2
    return (windows @ weights).clamp(min=torch.finfo(torch.float32).tiny).log() + top


def fit_lines(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares vertical and slash parts of the logits of all causal pairs.

    Args:
        queries: float32 `[S, Nq, D]`, scaled; row i stands at `Nk - Nq + i`.
        keys: float32 `[S, Nk, D]`.

    Returns:
        `v` by key and `s` by offset, float32 `[S, Nk]` both.
    """
    n_query, n_key = queries.shape[1], keys.shape[1]
    offset = n_key - n_query
    index = torch.arange(n_key, device=keys.device)
    first = index.clamp(min=offset)  # first position that sees key j, or has offset j
    counts = (n_key - first).float()
    # Tokens last: sums along the last dimension are made by many threads on a GPU, others by one.
    query, key = queries.mT.contiguous(), keys.mT.contiguous()
    by_row = (query * key.cumsum(-1)[..., offset:]).sum(1)
    later = pad(query.flip(-1).cumsum(-1).flip(-1), (offset, 0))
    by_key = (key * later[..., first]).sum(1)
    by_offset = _diagonal_sums(query, key)
    vertical = by_key / counts
    slash = torch.zeros_like(vertical)
    row_counts = torch.arange(offset + 1, n_key + 1, device=keys.device)
    for _ in range(_ROUNDS):
        rows = (by_row - (vertical + slash).cumsum(1)[:, offset:]) / row_counts
        from_first = pad(rows.flip(1).cumsum(1).flip(1), (offset, 0))[:, first]
        slash = (by_offset - from_first - _crossed(vertical, first)) / counts
        vertical = (by_key - from_first - _crossed(slash, first)) / counts
    return vertical, slash


def _crossed(line: Tensor, first: Tensor) -> Tensor:
    """Sum over positions p >= first[j] of line[p - j]: of keys along a diagonal, or of offsets."""
    n = line.shape[1]
    sums = pad(line.cumsum(1), (1, 0))
    index = torch.arange(n, device=line.device)
    return sums[:, n - index] - sums[:, first - index]


def _diagonal_sums(query: Tensor, key: Tensor) -> Tensor:
    """Sum of the logits at every offset, `[S, Nk]`: a correlation, by FFT; both `[S, D, N]`."""
    n_query, n_key = query.shape[-1], key.shape[-1]
    size = 1 << (n_query + n_key - 1).bit_length()
    spectrum = torch.fft.rfft(query, n=size)
    spectrum *= torch.fft.rfft(key, n=size).conj()
    sums = torch.fft.irfft(spectrum.sum(1), n=size)
    # Entry t holds the pairs of indices i - j = t, which have the offset t + Nk - Nq.
    shift = torch.arange(n_key, device=key.device) - (n_key - n_query)
    return sums[:, shift % size]
