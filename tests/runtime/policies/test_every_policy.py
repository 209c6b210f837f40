"""What holds for every selection policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shareprefill.runtime.geometry import Geometry
from shareprefill.runtime.policies import SELECTION_POLICIES, make_policy
from shareprefill.runtime.policies.base import LayerInputs
from shareprefill.testing import BLOCK, CHECKS, check_waits_for_nothing
from shareprefill.testing import layer_inputs as layer

NAMES = sorted(SELECTION_POLICIES)
ON_A_CPU = [check for check in CHECKS if check is not check_waits_for_nothing]
# A chunk's rows choose as they would in the whole prompt.
ROW_LOCAL = ["antidiagonal", "flash", "oracle", "pooled", "sampled", "streaming"]


def patterns(name: str, inputs: LayerInputs, heads: list[int], gamma: float = 0.8) -> torch.Tensor:
    chosen = make_policy(name).select(inputs, torch.tensor(heads), torch.full((len(heads),), gamma))
    assert 0 <= chosen.work <= 0.5
    return chosen.pattern & inputs.geometry.causal


@pytest.mark.parametrize("check", ON_A_CPU, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_every_policy_passes_the_public_checks(name: str, check: Any) -> None:
    check(make_policy(name), torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_the_public_check_finds_that_no_policy_waits_for_a_gpu(name: str) -> None:
    check_waits_for_nothing(make_policy(name), torch.device("cuda"))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "streaming"])
def test_more_mass_takes_more_blocks(name: str) -> None:
    inputs = layer()
    counts = [int(patterns(name, inputs, [0, 1, 2, 3], g).sum()) for g in (0.3, 0.99)]
    assert counts[0] < counts[1]


@pytest.mark.parametrize("name", ROW_LOCAL)
def test_a_chunk_chooses_like_the_rows_of_the_whole(name: str) -> None:
    inputs = layer(96, 96)
    geometry = Geometry(
        48, 96, torch.device("cpu"), block_size=BLOCK, sink_blocks=1, local_blocks=2
    )
    chunk = LayerInputs(inputs.query[:, 48:], inputs.key, 0.25, geometry)
    whole = patterns(name, inputs, [0, 1, 2, 3])
    assert torch.equal(patterns(name, chunk, [0, 1, 2, 3]), whole[:, 3:])


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("dense", "streaming", "decompose")])
def test_a_tight_soft_cap_evens_the_logits_out(name: str) -> None:
    inputs = layer()
    capped = LayerInputs(inputs.query, inputs.key, 0.25, inputs.geometry, softcap=0.05)
    every = [0, 1, 2, 3]
    assert patterns(name, capped, every).sum() > patterns(name, inputs, every).sum()


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
