"""Sketches of keys: a few coordinates of each, in four bits.

A logit is nearly the product of a few coordinates of query and key, in a basis that the prompt's
own queries and keys choose: the one that keeps the mean square of its logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from shareprefill.errors import ConfigError

# Coordinates in an int32.
CODES = 8
# Standard deviations of a coordinate that its codes reach, on both sides.
REACH = 2.7
_STEP = 2 * REACH / 15
# So many give the coordinates' errors of a whole decomposition within 1 %.
_ITERATIONS = 16


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


@dataclass(frozen=True, eq=False)
class Moments:
    """All of queries and keys that their coordinates are chosen by.

    Attributes:
        query: Mean product of a query with itself, float64 `[..., D, D]`.
        mean: Mean key, float64 `[..., D]`.
        key: Covariance of the keys, float64 `[..., D, D]`.
    """

    query: Tensor
    mean: Tensor
    key: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor) -> Self:
        """Those of a prompt.

        Args:
            query: Its last queries of all heads of a KV head, `[..., rows, D]`.
            key: Its keys, `[..., N, D]`.
        """
        query, key = query.float(), key.float()
        mean = key.mean(-2)
        centred = key - mean[..., None, :]
        of_query = (query.mT @ query).double() / query.shape[-2]
        return cls(of_query, mean.double(), (centred.mT @ centred).double() / key.shape[-2])

    def with_another(self, other: Moments, number: int) -> Moments:
        """Means over several prompts: over these and one more, which is the `number`-th."""
        away = other.mean - self.mean
        between = away[..., None] * away[..., None, :] * ((number - 1) / number**2)
        return Moments(
            self.query + (other.query - self.query) / number,
            self.mean + away / number,
            self.key + (other.key - self.key) / number + between,
        )


def make_basis(moments: Moments, rank: int) -> Basis:
    """The coordinates that keep the mean square of the logits of queries on keys.

    Args:
        moments: Of queries and keys.
        rank: r, a multiple of 8.

    Raises:
        ConfigError: the rank is none that fits.
    """
    dim = moments.mean.shape[-1]
    if rank < 1 or rank % CODES or rank > dim:
        raise ConfigError(
            f"a sketch has a multiple of {CODES} coordinates, at most {dim}, got {rank}"
        )
    root, _ = torch.linalg.cholesky_ex(_ridged(moments.query, 1e-6))  # [..., D, D], lower
    weighted = root.mT @ moments.key @ root
    axes = _leading_axes(weighted, rank)  # [..., D, r]
    variance = (axes * (weighted @ axes)).sum(-2)
    step = variance.clamp(min=1e-12).sqrt()[..., None] * _STEP
    of_query = torch.linalg.solve_triangular(root.mT, axes, upper=True).mT
    return Basis(moments.mean.float(), (of_query * step).float(), ((root @ axes).mT / step).float())


def _leading_axes(matrix: Tensor, rank: int) -> Tensor:
    """Nearly the first eigenvectors of symmetric matrices `[..., D, D]`, `[..., D, r]`.

    By orthogonal iteration, since the device is waited for in a whole decomposition, which takes
    milliseconds a matrix, too.
    """
    places = torch.arange(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    numbers = places[:rank] * (math.pi / len(places))
    axes = torch.cos((places[:, None] + 0.5) * numbers).expand(*matrix.shape[:-1], rank)
    for _ in range(_ITERATIONS):
        axes = matrix @ axes
        factor, _ = torch.linalg.cholesky_ex(_ridged(axes.mT @ axes, 1e-14))
        axes = torch.linalg.solve_triangular(factor, axes.mT, upper=False).mT
    return axes


def _ridged(matrix: Tensor, share: float) -> Tensor:
    """Symmetric matrices with a share of their mean variance more on the diagonal."""
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return matrix + (share * mean + 1e-12) * eye


def sketch_keys(key: Tensor, basis: Basis) -> Tensor:
    """Codes of keys, eight in an int32, `[..., r / 8, N]`; lower bits are earlier coordinates.

    Args:
        key: `[..., N, D]`.
        basis: Of the prompt that they belong to.
    """
    steps = (key.float() - basis.mean[..., None, :]) @ basis.key.mT  # [..., N, r]
    codes = (steps + 8).floor().clamp(0, 15).int().unflatten(-1, (-1, CODES))
    words = codes[..., 0]
    for place in range(1, CODES):
        words = words | (codes[..., place] << (4 * place))
    return words.mT.contiguous()


def coordinates(words: Tensor) -> Tensor:
    """What the codes `[..., r / 8, N]` stand for, in steps, float32 `[..., N, r]`."""
    places = torch.arange(0, 4 * CODES, 4, device=words.device, dtype=torch.int32)
    return (((words.mT[..., None] >> places) & 15).float() - 7.5).flatten(-2)


def query_coordinates(query: Tensor, basis: Tensor) -> Tensor:
    """Coordinates of queries, rounded to signed bytes of a factor of each, float32 `[..., R, r]`.

    Their errors are a tenth of those of the keys' codes.

    Args:
        query: `[..., R, D]`.
        basis: `Basis.query`, `[..., r, D]`.
    """
    parts = query.float() @ basis.mT
    top = parts.abs().amax(-1, keepdim=True)
    rounded = (parts * torch.where(top > 0, 127 / top, 0) + 0.5).floor()
    return rounded * (top / 127)
