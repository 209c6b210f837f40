"""Launches that skip Triton's binding start the variant that Triton would have started."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shareprefill.runtime.ops import prepared
from shareprefill.runtime.ops.inputs import facts
from shareprefill.runtime.ops.pages import PagedTokens
from shareprefill.runtime.ops.prepared import Launch, Prepared

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs the triton package")


def test_facts_tell_apart_what_a_launch_depends_on() -> None:
    tensor = torch.zeros(8, 8)
    others = [tensor[:4], tensor.t(), tensor.double(), tensor.view(-1)[1:33].view(4, 8), None]
    found = [facts(tensor), *map(facts, others)]
    assert len(set(found)) == len(found)
    assert facts(tensor) == facts(torch.ones(8, 8))


def test_facts_of_pages_are_of_pool_and_table() -> None:
    pool, table = torch.zeros(6, 2, 16, 8), torch.tensor([3, 1, 2])
    tokens = PagedTokens(pool, table, 40)
    assert facts(tokens) == facts(PagedTokens(torch.ones(6, 2, 16, 8), table + 1, 40))
    for other in (
        PagedTokens(pool, table, 41),
        PagedTokens(pool, table.int(), 40),
        PagedTokens(pool.transpose(1, 2).contiguous().transpose(1, 2), table, 40),
    ):
        assert facts(other) != facts(tokens)


def test_few_kinds_of_calls_are_kept() -> None:
    calls = Prepared[int]()
    for kind in range(5000):
        assert calls.keep(kind, kind) == kind
    assert len(calls) < 5000
    assert calls[4999] == 4999


def _copies(device: torch.device, count: int, factor: float) -> Launch:
    from tests.support.copy_kernel import copy_kernel

    return Launch(copy_kernel, device, (4,), (count, factor), {"BLOCK": 64, "num_warps": 1})


class Kernel:
    """Stands for a compiled kernel: notes what Triton is asked for, and what starts without it."""

    arg_names = ("p_source", "k_desc", "p_table", "n_tokens", "stride", "BLOCK")
    params = ()

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.started: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def ask(*arguments: Any, **_options: Any) -> Any:
            self.asked.append(arguments)
            return SimpleNamespace(run=self.start, function=None, packed_metadata=None)

        return ask

    def start(self, *given: Any) -> None:
        self.started.append(given)


@needs_triton
def test_a_bound_launch_hands_on_numbers_and_none_as_decode_steps_give_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prepared, "are_kept", lambda _device: True)
    monkeypatch.setattr(prepared, "on_device", lambda _device: nullcontext())
    monkeypatch.setattr(prepared, "current_stream", lambda _device: 7)
    kernel, source, tile = Kernel(), torch.zeros(64), object()
    launch = Launch(kernel, source.device, (4,), (32,), {"BLOCK": 128})
    for n_tokens in (9002, 703, 1):
        launch(source, tile, None, n_tokens)
    assert kernel.asked == [(source, tile, None, 9002, 32)]
    address = source.data_ptr()
    grid, stream, unused = (4, 1, 1), (7,), (None,) * 5
    assert kernel.started == [
        (*grid, *stream, *unused, address, tile, None, n_tokens, 32, 128) for n_tokens in (703, 1)
    ]


@needs_triton
def test_a_launch_writes_what_its_kernel_does() -> None:
    source, target = torch.randn(200, device=DEVICE), torch.full((200,), torch.nan, device=DEVICE)
    _copies(source.device, 199, 2.0)(source, target)
    assert torch.equal(target[:199], 2 * source[:199])
    assert target[199].isnan()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_stay_right_as_addresses_change(dtype: torch.dtype) -> None:
    # A count of 1 is a constant of its own to Triton, and 192 a multiple of 16.
    for count in (192, 1, 199):
        launch = _copies(DEVICE, count, 1.0)
        for start in (0, 0, 1, 0, 3, 8, 0):
            store = torch.randn(256 + 8, device=DEVICE).to(dtype)
            source, target = store[start : start + 200], torch.full_like(store, torch.nan)
            launch(source, target)
            assert torch.equal(target[:count], source[:count])
            assert target[count:].isnan().all()


@pytest.mark.gpu
def test_a_launch_is_kept_for_parts_of_tensors_whose_kernel_does_not_mind() -> None:
    from tests.support.copy_kernel import copy_anywhere_kernel

    launch = Launch(copy_anywhere_kernel, DEVICE, (4,), (199, 2.0), {"BLOCK": 64, "num_warps": 1})
    source, store = torch.randn(200, device=DEVICE), torch.empty(256, device=DEVICE)
    kept = []
    for start in (3, 0, 5):
        target = store[start : start + 200].fill_(torch.nan)
        launch(source, target)
        assert torch.equal(target[:199], 2 * source[:199])
        kept.append(launch._bound)
    assert kept[0] is not None
    assert kept[0] is kept[1] is kept[2]


@needs_triton
def test_kernels_of_layers_do_not_mind_where_parts_of_tensors_start() -> None:
    """Patterns of a group, and the heads that it is asked for, lie between others."""
    code = """
from importlib import import_module
kernels = "shareprefill.runtime.ops."
for place, names in (
    ("block_selection.kernels.cover", "select vertical_slash"),
    ("block_selection.kernels.head_threshold", "head"),
    ("block_selection.kernels.head_threshold_large", "mark"),
    ("pooled_attention.triton_kernel", "pooled mass means"),
    ("vertical_slash.triton_kernel", "sums profiles"),
):
    for name in names.split():
        kernel = getattr(import_module(kernels + place), name + "_kernel")
        parts = {"p_out", "p_finite", "p_heads"} if "block_selection" in place else {"p_heads"}
        if name == "vertical_slash":
            parts.remove("p_finite")
        for parameter in kernel.params:
            if parameter.name in parts:
                assert parameter.do_not_specialize_on_alignment, (name, parameter.name)
"""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=clean)


@pytest.mark.gpu
def test_hooks_are_called_for_launches_that_are_bound() -> None:
    from triton import knobs

    source, target = torch.randn(200, device=DEVICE), torch.zeros(200, device=DEVICE)
    launch, seen = _copies(DEVICE, 200, 1.0), []
    launch(source, target)
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        launch(source, target)
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    assert len(seen) == 1
    launch(source, target)
    assert len(seen) == 1


@pytest.mark.gpu
def test_a_bound_launch_is_on_the_current_stream_and_in_a_graph() -> None:
    source, target = torch.randn(200, device=DEVICE), torch.zeros(200, device=DEVICE)
    launch = _copies(DEVICE, 200, 3.0)
    launch(source, target)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(source, target)
    source.normal_()
    target.fill_(torch.nan)
    graph.replay()
    assert torch.equal(target, 3 * source)
