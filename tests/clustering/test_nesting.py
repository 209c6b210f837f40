from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shareprefill.clustering.measurements import GAMMAS
from shareprefill.clustering.nesting import nested_head_blocks, nested_lines, nested_row_blocks
from shareprefill.runtime.geometry import Geometry
from shareprefill.runtime.ops.block_selection import (
    head_blocks,
    select_blocks,
    vertical_slash_blocks,
)
from tests.support.maps import random_maps

LENGTHS = [33, 64, 1000, 1024]
GAMMAS_AND_ALL = (*GAMMAS, 1.0)


def geometry_of(tokens: int, always: bool = True) -> Geometry:
    return Geometry(
        tokens,
        tokens,
        torch.device("cpu"),
        block_size=32,
        sink_blocks=int(always),
        local_blocks=2 * int(always),
    )


def agree(since: Tensor, pattern: Callable[[Tensor], Tensor]) -> None:
    assert since.dtype == torch.uint8
    for number, gamma in enumerate(GAMMAS_AND_ALL):
        expected = pattern(torch.full((len(since),), gamma))
        assert torch.equal(since <= number, expected), gamma


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("always", [True, False])
def test_blocks_above_one_threshold(tokens: int, always: bool) -> None:
    geometry = geometry_of(tokens, always)
    # Sums that are exact in any order, and equal masses among them.
    maps = random_maps(6, (tokens, tokens, 32), levels=1024)
    maps[0] = 0.0
    maps[1, -1, 0] = torch.nan
    maps[2, -1, 0] = 1e9  # all others are below the span of thresholds
    since = nested_head_blocks(maps, GAMMAS_AND_ALL, geometry)
    agree(since, lambda gamma: head_blocks(maps, gamma, **geometry.reads)[0])


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("always", [True, False])
def test_blocks_of_rows(tokens: int, always: bool) -> None:
    geometry = geometry_of(tokens, always)
    maps = random_maps(6, (tokens, tokens, 32))
    maps[0] = 0.0
    maps[1, -1, 0] = torch.nan
    since = nested_row_blocks(maps, GAMMAS_AND_ALL, geometry)
    agree(since, lambda gamma: select_blocks(maps, gamma, **geometry.reads))


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("always", [True, False])
def test_lines(tokens: int, always: bool) -> None:
    geometry = geometry_of(tokens, always)
    n = geometry.shape[1]
    vertical, slash = torch.rand(6, n) ** 6, torch.rand(6, n + 1) ** 6
    vertical, slash = (t / t.sum(-1, keepdim=True) for t in (vertical, slash))
    vertical[0], slash[0] = 0.0, 0.0
    vertical[1, 0] = torch.nan
    since = nested_lines(vertical, slash, GAMMAS_AND_ALL, geometry)
    agree(since, lambda gamma: vertical_slash_blocks(vertical, slash, gamma, **geometry.reads))
