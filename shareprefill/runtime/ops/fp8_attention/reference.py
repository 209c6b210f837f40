"""Block-sparse attention with operands of e4m3 in torch, rounded where the Hopper kernel rounds."""

from __future__ import annotations

import torch

from shareprefill.runtime.ops.block_sparse_attention.reference import listed_mask
from shareprefill.runtime.ops.blocks import BlockLists

BLOCK = 128  # keys whose weights are rounded at one time
E4M3_MAX = 448.0
# Weights are at most 2^8, within e4m3's range of 2^-9 to 448.
LARGEST_WEIGHT = 256.0
# Tokens that a centre is the mean of, at least, where there are as many.
CENTRE_TOKENS = 64
# Operands that are all zero have a scale, too.
TINY = 1e-30


def centres(key: torch.Tensor) -> torch.Tensor:
    """What is taken from keys `[G, N, D]`: about their mean, float32 `[G, D]`.

    A vector that is taken from all keys changes no softmax. Without their mean, channels that are
    far from zero in all keys take no digits from the others; that of some keys does as well.
    """
    step = max(1, key.shape[1] // CENTRE_TOKENS)
    return key[:, step // 2 :: step].mean(1, dtype=torch.float32)


def scales(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What keys and values `[G, N, D]` are divided by before they are rounded, float32 `[G, 2]`.

    As e4m3 has an exponent of its own and spans 18 octaves, one scale for all of a KV head's tokens
    is as good as one for each block. NaN or Inf in a head makes it NaN or Inf.
    """
    peaks = [torch.linalg.vector_norm(t, torch.inf, (1, 2)).float() for t in (key, value)]
    scale = (torch.stack(peaks, 1) / E4M3_MAX).clamp(min=TINY)
    # A key less a mean of keys is at most twice as large as the largest.
    scale[:, 0] *= 2.0
    return scale


def rounded_keys_and_values(
    key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys less their mean, and values, both rounded to e4m3: float32 `[G, N, D]`."""
    k_scale, v_scale = scales(key, value)[..., None, None].unbind(1)
    centred = key.float() - centres(key)[:, None]
    return _rounded(centred, k_scale), _rounded(value.float(), v_scale)


def rounded_queries(query: torch.Tensor) -> torch.Tensor:
    """Queries `[..., D]` rounded to e4m3 row by row, float32."""
    query = query.float()
    return _rounded(query, query.abs().amax(-1, keepdim=True).clamp(min=TINY) / E4M3_MAX)


def rounded_weights(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of logits `[..., Nq, Nk]`, in e4m3, and the sums of those unrounded `[..., Nq]`.

    Blocks are visited from the last to the first, and a weight is rounded relative to the largest
    so far, as the kernel knows no other.
    """
    missing = -logits.shape[-1] % BLOCK
    blocks = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
    blocks = blocks.unflatten(-1, (-1, BLOCK))
    so_far = blocks.amax(-1).flip(-1).cummax(-1).values.flip(-1)  # [..., Nq, n_k]
    pivots = so_far.masked_fill(so_far == -torch.inf, 0.0)
    weights = torch.exp(blocks - pivots[..., None])
    factors = torch.exp(so_far - pivots[..., :1])[..., None]
    rounded = _rounded(weights, 1.0 / LARGEST_WEIGHT) * factors
    sums = (weights * factors).sum((-2, -1))
    return rounded.flatten(-2)[..., : logits.shape[-1]], sums


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: BlockLists,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Fill `out` head by head; arguments as in `fp8_attention`.

    Products and sums are of float64: what is left is the rounding of the operands.
    """
    keys, values = rounded_keys_and_values(key, value)
    queries = rounded_queries(query).double() * scale
    heads_per_group = len(query) // len(key)
    for head, pattern in enumerate(lists.head_to_list.tolist()):
        if pattern < 0:
            continue
        group = head // heads_per_group
        mask = listed_mask(lists, pattern, query.shape[1], key.shape[1])
        logits = (queries[head] @ keys[group].double().T).masked_fill(~mask, -torch.inf)
        weights, sums = rounded_weights(logits)
        mean = weights @ values[group].double() / sums[:, None]
        # A row without keys gives zeros.
        out[head] = mean.masked_fill((sums == 0.0)[:, None], 0.0).to(out.dtype)


def _rounded(numbers: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    return (numbers / scale).to(torch.float8_e4m3fn).to(numbers.dtype) * scale
