"""What holds for every selection policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shareprefill.runtime.geometry import Geometry
from shareprefill.runtime.policies import SELECTION_POLICIES, make_policy
from shareprefill.runtime.policies.base import LayerInputs
from tests.support.allocation import LargestTensor

BLOCK = 16
NAMES = sorted(SELECTION_POLICIES)
# A chunk's rows choose as they would in the whole prompt.
ROW_LOCAL = ["antidiagonal", "flash", "oracle", "pooled", "sampled", "streaming"]


def layer(
    n_query: int = 101, n_key: int = 101, *, heads: int = 4, block: int = BLOCK, **options: Any
) -> LayerInputs:
    """Inputs with structure: a few keys attract every query, and near keys more than far ones."""
    query, key = torch.randn(heads, n_query, 16), torch.randn(2, n_key, 16)
    query[..., 0] += 4
    key[:, 20:24, 0] += 4
    geometry = Geometry(
        n_query, n_key, torch.device("cpu"), block_size=block, sink_blocks=1, local_blocks=2
    )
    return LayerInputs(query, key, 0.25, geometry, **options)


def patterns(name: str, inputs: LayerInputs, heads: list[int], gamma: float = 0.8) -> torch.Tensor:
    chosen = make_policy(name).select(inputs, torch.tensor(heads), torch.full((len(heads),), gamma))
    assert 0 <= chosen.work <= 0.5
    return chosen.pattern & inputs.geometry.causal


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n_query", "n_key"), [(101, 101), (64, 64), (30, 101), (16, 16), (1, 70)])
def test_patterns_are_bitmaps_of_blocks(name: str, n_query: int, n_key: int) -> None:
    inputs = layer(n_query, n_key)
    found = make_policy(name).select(inputs, torch.arange(4), torch.full((4,), 0.8))
    assert found.pattern.shape == (4, -(-n_query // BLOCK), -(-n_key // BLOCK))
    assert found.pattern.dtype == torch.bool
    whole = (found.pattern | inputs.geometry.always) & inputs.geometry.causal
    assert whole.any(-1).all()


@pytest.mark.parametrize("name", NAMES)
def test_more_mass_takes_no_fewer_blocks(name: str) -> None:
    inputs = layer()
    counts = [int(patterns(name, inputs, [0, 1, 2, 3], g).sum()) for g in (0.3, 0.6, 0.9, 0.99)]
    assert counts == sorted(counts)
    if name != "streaming":
        assert counts[0] < counts[-1]


@pytest.mark.parametrize("name", NAMES)
def test_heads_are_chosen_for_one_by_one(name: str) -> None:
    inputs = layer()
    gamma = torch.tensor([0.5, 0.7, 0.8, 0.9])
    policy = make_policy(name)
    whole = policy.select(inputs, torch.arange(4), gamma).pattern
    order = torch.tensor([2, 0, 3])
    some = policy.select(inputs, order, gamma[order]).pattern
    assert torch.equal(some, whole[order])


@pytest.mark.parametrize("name", NAMES)
def test_a_head_that_needs_no_pattern_disturbs_no_other(name: str) -> None:
    inputs = layer()
    gamma = torch.full((3,), 0.8)
    found = make_policy(name).select(inputs, torch.tensor([-1, 3, -1]), gamma).pattern
    assert torch.equal(found[1:2] & inputs.geometry.causal, patterns(name, inputs, [3]))


@pytest.mark.parametrize("name", ROW_LOCAL)
def test_a_chunk_chooses_like_the_rows_of_the_whole(name: str) -> None:
    inputs = layer(96, 96)
    geometry = Geometry(
        48, 96, torch.device("cpu"), block_size=BLOCK, sink_blocks=1, local_blocks=2
    )
    chunk = LayerInputs(inputs.query[:, 48:], inputs.key, 0.25, geometry)
    whole = patterns(name, inputs, [0, 1, 2, 3])
    assert torch.equal(patterns(name, chunk, [0, 1, 2, 3]), whole[:, 3:])


@pytest.mark.parametrize("name", NAMES)
def test_heads_of_a_group_share_their_keys(name: str) -> None:
    inputs = layer()
    expanded = LayerInputs(inputs.query, inputs.key.repeat_interleave(2, 0), 0.25, inputs.geometry)
    every = [0, 1, 2, 3]
    assert torch.equal(patterns(name, inputs, every), patterns(name, expanded, every))


@pytest.mark.parametrize("name", NAMES)
def test_a_soft_cap_beyond_all_logits_changes_nothing(name: str) -> None:
    inputs = layer()
    capped = LayerInputs(inputs.query, inputs.key, 0.25, inputs.geometry, softcap=1e4)
    every = [0, 1, 2, 3]
    assert torch.equal(patterns(name, inputs, every), patterns(name, capped, every))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("dense", "streaming", "decompose")])
def test_a_tight_soft_cap_evens_the_logits_out(name: str) -> None:
    inputs = layer()
    capped = LayerInputs(inputs.query, inputs.key, 0.25, inputs.geometry, softcap=0.05)
    every = [0, 1, 2, 3]
    assert patterns(name, capped, every).sum() > patterns(name, inputs, every).sum()


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_inputs(name: str) -> None:
    inputs = layer()
    half = LayerInputs(inputs.query.half(), inputs.key.half(), 0.25, inputs.geometry)
    every = [0, 1, 2, 3]
    differ = patterns(name, half, every) ^ patterns(name, inputs, every)
    assert differ.float().mean() < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_of_all_pairs_of_tokens_is_made(name: str) -> None:
    n = 2048
    inputs = layer(n, n, heads=2, block=64)
    with LargestTensor() as largest:
        make_policy(name).select(inputs, torch.arange(2), torch.full((2,), 0.9))
    assert largest.elements < n * n // 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_query", [500, 192])
def test_a_gpu_chooses_alike_and_is_not_waited_for(name: str, n_query: int) -> None:
    inputs = layer(n_query, 500, block=64)
    device = torch.device("cuda")
    geometry = Geometry(n_query, 500, device, block_size=64, sink_blocks=1, local_blocks=2)
    there = LayerInputs(inputs.query.to(device), inputs.key.to(device), 0.25, geometry)
    heads, gamma = torch.tensor([3, 0, 2]), torch.tensor([0.5, 0.7, 0.9])
    policy = make_policy(name)
    arguments = (there, heads.to(device), gamma.to(device))
    policy.select(*arguments)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = policy.select(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = policy.select(inputs, heads, gamma)
    differ = (found.pattern.cpu() ^ expected.pattern) & inputs.geometry.causal
    assert differ.float().mean() < 0.02
    assert found.work == expected.work
