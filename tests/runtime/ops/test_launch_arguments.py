"""Launches give kernels what they take, in order. No kernel runs: Hopper's are among them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from shareprefill.runtime.ops.block_selection import LineWeights, SparseGuard
from shareprefill.runtime.ops.blocks import BlockLists, causal_blocks, causal_lists
from shareprefill.runtime.ops.hopper import launch
from shareprefill.runtime.ops.pages import PagedTokens, Tokens
from shareprefill.runtime.ops.pooled_attention.launches import Attended
from shareprefill.runtime.ops.prepared import Launch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs the triton package")
TOKENS = 384


def launcher(name: str) -> Any:
    """A module that needs triton."""
    return import_module(f"shareprefill.runtime.ops.{name}")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The kernels that were launched, whose arguments are checked then."""
    names: set[str] = set()

    def check(self: Launch, *tensors: Any) -> None:
        parameters = self.kernel.arg_names
        constants = {name for name in parameters if name.isupper()}
        assert constants == {name for name in self.options if name.isupper()}
        assert len(tensors) + len(self.numbers) + len(constants) == len(parameters)
        for place, name in enumerate(parameters[: len(tensors) + len(self.numbers)]):
            assert (name.startswith("p_") or name.endswith("_desc")) == (place < len(tensors))
            # Of the tensors descriptors are no tensors.
            assert name.endswith("_desc") == (
                place < len(tensors) and not isinstance(tensors[place], torch.Tensor)
            )
        names.add(self.kernel.fn.__name__)

    monkeypatch.setattr(Launch, "__call__", check)
    for module in (launch, launcher("pooled_attention.hopper")):
        monkeypatch.setattr(module, "draw_counter", lambda _device: torch.zeros(1))
    return names


def inputs(*, in_pages: bool) -> tuple[torch.Tensor, Tokens, Tokens]:
    query, key = (torch.zeros(heads, TOKENS, 64, dtype=torch.float16) for heads in (4, 2))
    if not in_pages:
        return query, key, key.clone()
    pool, table = torch.zeros(6, 2, 128, 64, dtype=torch.float16), torch.tensor([2, 0, 4])
    return query, PagedTokens(pool, table, TOKENS), PagedTokens(pool.clone(), table, TOKENS)


@pytest.mark.parametrize("in_pages", [False, True])
@pytest.mark.parametrize("has_all", [False, True])
def test_attention_and_its_maps(in_pages: bool, has_all: bool, started: set[str]) -> None:
    query, key, value = inputs(in_pages=in_pages)
    heads, rows = torch.tensor([0, 1, -1]), torch.zeros((3, 2), dtype=torch.int64)
    sinks, lse = (torch.zeros(4), torch.zeros(4, TOKENS)) if has_all else (None, None)
    bitmap = causal_blocks(TOKENS, 0, 128)[None]
    lists = BlockLists.from_bitmap(bitmap, torch.zeros(4, dtype=torch.int64), 128)
    out, cap = torch.empty_like(query), 30.0 if has_all else None
    flags = (has_all, has_all, has_all)
    for name in ("triton", "hopper"):
        module = launcher(f"block_sparse_attention.{name}")
        attend = module.prepare(query, key, value, lists, out, flags, 0.1, cap)
        attend(query, key, value, lists, out, lse, sinks)
    for name, softcap in (("triton", cap), ("hopper", None)):
        module = launcher(f"pooled_attention.{name}")
        some = Attended(query, key, rows, heads if has_all else None, 128, 0.1, softcap)
        module.prepare(some, None, None)(query, key, None, some.rows, some.heads, sinks=None)
        every = Attended(query, key, None, heads if has_all else None, 128, 0.1, softcap)
        module.prepare(every, value, sinks)(query, key, value, None, every.heads, sinks=sinks)
    profiles = launcher("vertical_slash.triton")
    profile = profiles.prepare(query, key, 128, 0.1, heads, cap)
    profile(query, key, heads)
    places = (torch.ones(3), bitmap, torch.ones(3, dtype=torch.bool))
    profile(query, key, heads, *places)
    guard = SparseGuard(n_heads=3, delta=0.3, first=0, otherwise=3, place=3)
    guarded = profiles.prepare(query, key, 128, 0.1, heads, cap, (1, 1), guard, 6)
    guarded(query, key, heads, *places, heads, heads)
    assert started == {
        *("block_sparse_kernel", "block_sparse_hopper_kernel", "means_kernel", "mass_kernel"),
        *("pooled_kernel", "pooled_hopper_kernel", "mass_hopper_kernel"),
        *("sums_kernel", "profiles_kernel", "pattern_kernel"),
    }


def test_attention_in_fp8(started: set[str]) -> None:
    query, key, value = inputs(in_pages=False)
    lists = causal_lists(TOKENS, 0, 128, 4, query.device)
    attend = launcher("fp8_attention.hopper").attend
    attend(query, key, value, lists, 0.1, torch.empty_like(query))
    assert started == {"peaks_kernel", "round_kernel", "fp8_attention_kernel"}


def test_selection(started: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    selection = launcher("block_selection.triton")
    maps, gamma, index = torch.zeros(3, 3, 3), torch.ones(3), torch.tensor([0, 1, 2])
    sizes, places = (TOKENS, TOKENS, 128), (None, None)
    weights, patterns = LineWeights(itself=1.0, column=1.0), maps > 0
    selection.select_blocks(maps, gamma, *sizes, 0, 0)(maps, gamma, *places)
    selection.head_blocks(maps, gamma, None, None, *sizes, 0, 0)(maps, gamma, None, *places)
    smoothed = selection.head_blocks(maps, gamma, index, weights, *sizes, 0, 0)
    smoothed(maps, gamma, index, *places)
    monkeypatch.setattr(selection, "LARGE_MAP", 1)
    monkeypatch.setattr(selection, "SMALL_MAP", 0)
    large = selection.head_blocks(maps, gamma, index, weights, *sizes, 0, 0)
    large(maps, gamma, index, *places)
    lines = (maps[0], torch.zeros(3, 4), gamma)
    selection.vertical_slash_blocks(*lines, *sizes, 0, 0)(*lines, *places)
    selection.js_distances(maps, maps, index)(maps, maps, index)
    selection.covered_mass(maps, patterns, index)(maps, patterns, index)
    check = (maps, patterns, index, index, gamma, gamma > 0, index, index, index)
    selection.check_heads(*check)(*check)
    selection.sparse_heads(maps[0], index, 3, 0.3, 0, 0, 0)(maps[0], index)
    lists = (patterns, index, patterns, index, gamma[:, None] > 0)
    selection.list_blocks(*lists, *sizes, 4, 0)(*lists)
    assert len(started) == 15
