"""Block patterns from block maps and profiles, and the distances between block distributions.

A pattern says which key blocks a query block reads: bool `[..., n_q, n_k]`. Query block I holds the
query rows I*B and on; query row i has the absolute key position `q_offset + i`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shareprefill.runtime.ops.blocks import causal_blocks


def cumulative_pattern(maps: Tensor, gamma: float | Tensor) -> Tensor:
    """The smallest set of blocks of every row whose mass reaches `gamma`.

    Args:
        maps: Block distributions `[..., n_k]`; a row that sums to less than `gamma` keeps every
            block that holds any mass.
        gamma: Mass to cover, in (0, 1]; a tensor broadcasts against `maps[..., 0]`.

    Returns:
        bool, of the shape of `maps`. Of equal blocks the one with the lower column comes first.

    >>> cumulative_pattern(torch.tensor([[0.5, 0.1, 0.4]]), 0.8)
    tensor([[ True, False,  True]])
    """
    return select_mass(mass_before(maps), gamma)


def mass_before(maps: Tensor) -> Tensor:
    """Mass of the blocks of a row that come before each block, largest first.

    Args:
        maps: Block distributions `[..., n_k]`.

    Returns:
        float32, of the shape of `maps`; infinite for blocks without mass.

    >>> mass_before(torch.tensor([[0.5, 0.0, 0.25]]))
    tensor([[0.0000,    inf, 0.5000]])
    """
    values, order = maps.float().sort(dim=-1, descending=True, stable=True)
    before = torch.where(values > 0, values.cumsum(-1) - values, torch.inf)
    return torch.empty_like(before).scatter_(-1, order, before)


def select_mass(before: Tensor, gamma: float | Tensor) -> Tensor:
    """`cumulative_pattern` of maps that `mass_before` has ranked."""
    if isinstance(gamma, Tensor):
        gamma = gamma[..., None]
    # A sum of float32 values that should reach gamma exactly may miss it by rounding.
    return before < gamma - 1e-6


def always_blocks(
    n_query: int, n_key: int, block_size: int, *, sink: int, local: int, device: torch.device
) -> Tensor:
    """The blocks that every pattern reads: the first `sink` and the last `local` causal ones.

    Args:
        n_query: Query rows, in tokens.
        n_key: Keys, in tokens; query row i has the position `n_key - n_query + i`.
        block_size: Tokens a block.
        sink: Leading key blocks.
        local: Trailing causal key blocks of every query row, the diagonal one among them.
        device: Where the pattern is made.

    Returns:
        bool `[n_q, n_k]`, causal.
    """
    first, last = _diagonals(n_query, n_key, block_size, device)
    columns = torch.arange(-(-n_key // block_size), device=device)
    near = columns[None, :] > (first - local)[:, None]
    return (near | (columns < sink)[None, :]) & (columns[None, :] <= last[:, None])


def vertical_slash_pattern(
    vertical: Tensor, slash: Tensor, gamma: Tensor, n_query: int, n_key: int, block_size: int
) -> Tensor:
    """Vertical and slash blocks that each cover `gamma` of the last query block's attention.

    MInference's and FlexPrefill's pattern in blocks: key blocks that all queries read, and block
    diagonals at chosen distances.

    Args:
        vertical: Mass by key block `[S, n_k]`, float32.
        slash: Mass by block distance to the diagonal `[S, n_k + 1]`, float32.
        gamma: Mass to cover `[S]`.
        n_query: Query rows, in tokens.
        n_key: Keys, in tokens.
        block_size: Tokens a block.

    Returns:
        bool `[S, n_q, n_k]`, causal.
    """
    first, last = _diagonals(n_query, n_key, block_size, vertical.device)
    columns = torch.arange(vertical.shape[-1], device=vertical.device)
    chosen = cumulative_pattern(slash, gamma)
    pattern = cumulative_pattern(vertical, gamma)[:, None, :].repeat(1, len(first), 1)
    for diagonal in (first, last):
        distance = diagonal[:, None] - columns[None, :]
        pattern |= chosen[:, distance.clamp(min=0)] & (distance >= 0)
    return pattern & causal_blocks(n_query, n_key - n_query, block_size, device=vertical.device)


def js_distance(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence, natural logarithm: 0 to sqrt(ln 2).

    Safe at zeros (xlogy) and for equal inputs (rounding below zero is clamped), so never NaN for
    finite distributions: `NaN < tau` is False, which would refuse the best matches.

    Args:
        p: Distributions `[..., n]`; they broadcast against `q`.
        q: Distributions `[..., n]`.

    Returns:
        float32 `[...]`.
    """
    p, q = p.float(), q.float()
    middle = (p + q) / 2
    divergence = torch.xlogy(p, p) + torch.xlogy(q, q) - 2 * torch.xlogy(middle, middle)
    return (divergence.sum(-1) / 2).clamp(min=0).sqrt()


def distance_to_uniform(maps: Tensor, causal: Tensor) -> Tensor:
    """Mean JS distance of block distributions to the uniform one over their causal blocks.

    Args:
        maps: `[..., n_q, n_k]`.
        causal: bool `[n_q, n_k]`.

    Returns:
        float32 `[...]`: how sparse a head is; the paper's measure for "highly sparse" (section 3).
    """
    uniform = causal / causal.sum(-1, keepdim=True)
    return js_distance(maps, uniform).mean(-1)


def recall(maps: Tensor, pattern: Tensor) -> Tensor:
    """Attention mass inside a pattern, mean over query blocks.

    Args:
        maps: Exact block maps `[..., n_q, n_k]`.
        pattern: bool `[..., n_q, n_k]`.

    Returns:
        float32 `[...]`, in [0, 1].
    """
    return (maps * pattern).sum(-1).mean(-1).clamp(max=1)


def _diagonals(
    n_query: int, n_key: int, block_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Key blocks that the first and the last row of every query block lie in, int64 `[n_q]`."""
    offset = n_key - n_query
    starts = torch.arange(0, n_query, block_size, device=device)
    ends = (starts + block_size).clamp(max=n_query) - 1
    return (starts + offset) // block_size, (ends + offset) // block_size
