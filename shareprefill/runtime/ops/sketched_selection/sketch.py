"""Sketches of keys: a few coordinates of each, in four bits.

A logit is nearly the product of a few coordinates of query and key, in a basis that the prompt's
own queries and keys choose: the one that keeps the mean square of its logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shareprefill.errors import ConfigError

# Coordinates in an int32.
CODES = 8
# Standard deviations of a coordinate that its codes reach, on both sides.
REACH = 2.7
_STEP = 2 * REACH / 15


@dataclass(frozen=True, eq=False)
class Basis:
    """Coordinates of queries and keys, r of them, the ones that matter most first.

    Attributes:
        mean: Mean key, float32 `[..., D]`.
        query: Of queries, in steps of the keys' codes, float32 `[..., r, D]`; a row for each.
        key: Of keys less their mean, in such steps, float32 `[..., r, D]`.
    """

    mean: Tensor
    query: Tensor
    key: Tensor


def make_basis(query: Tensor, key: Tensor, rank: int) -> Basis:
    """The coordinates that keep the mean square of the logits of queries on keys.

    Args:
        query: The prompt's last queries of all heads of a KV head, `[..., rows, D]`.
        key: The prompt's keys, `[..., N, D]`.
        rank: r, a multiple of 8.

    Raises:
        ConfigError: the rank is none that fits.
    """
    if rank < 1 or rank % CODES or rank > key.shape[-1]:
        raise ConfigError(
            f"a sketch has a multiple of {CODES} coordinates, at most {key.shape[-1]}, got {rank}"
        )
    query, key = query.float(), key.float()
    mean = key.mean(-2)
    centred = key - mean[..., None, :]
    of_query = (query.mT @ query).double() / query.shape[-2]
    of_key = (centred.mT @ centred).double() / key.shape[-2]
    values, vectors = torch.linalg.eigh(of_query)
    root = values.clamp(min=1e-6 * values.amax(-1, keepdim=True)).clamp(min=1e-12).sqrt()
    half = (vectors * root[..., None, :]) @ vectors.mT
    inverse = (vectors / root[..., None, :]) @ vectors.mT
    variance, axes = torch.linalg.eigh(half @ of_key @ half)
    axes = axes.flip(-1)[..., :rank].mT  # [..., r, D]
    step = variance.flip(-1)[..., :rank].clamp(min=1e-12).sqrt()[..., None] * _STEP
    return Basis(mean, ((axes @ inverse) * step).float(), ((axes @ half) / step).float())


def sketch_keys(key: Tensor, basis: Basis) -> Tensor:
    """Codes of keys, eight in an int32, `[..., N, r / 8]`; lower bits are earlier coordinates.

    Args:
        key: `[..., N, D]`.
        basis: Of the prompt that they belong to.
    """
    steps = (key.float() - basis.mean[..., None, :]) @ basis.key.mT  # [..., N, r]
    codes = (steps + 8).floor().clamp(0, 15).int().unflatten(-1, (-1, CODES))
    words = codes[..., 0]
    for place in range(1, CODES):
        words = words | (codes[..., place] << (4 * place))
    return words.contiguous()


def coordinates(words: Tensor) -> Tensor:
    """What the codes stand for, in steps, float32 `[..., N, r]`."""
    places = torch.arange(0, 4 * CODES, 4, device=words.device, dtype=torch.int32)
    return (((words[..., None] >> places) & 15).float() - 7.5).flatten(-2)
