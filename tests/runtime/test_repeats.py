"""Layers that are launched again: the same as computed anew, whatever the addresses."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from shareprefill.runtime import core, repeats
from shareprefill.runtime.core import SparsePrefill
from shareprefill.runtime.ops.pages import PagedTokens
from shareprefill.runtime.ops.prepared import Launch
from shareprefill.runtime.records import LayerRecord
from shareprefill.runtime.repeats import Repeats
from tests.runtime.test_launches import plan_of
from tests.support.launches import counted_launches
from tests.support.plans import D, M, P, R, S, V

PLANS = {
    "pivots": (P, S, S, S, S, M, M, D),
    "all": (P, S, S, S, V, V, R, M),
    "smoothed": (M,) * 8,
    "sampled": (R,) * 8,
    "vertical-slash": (V,) * 8,
}
N_CALLS = 5


def run(
    prefill: SparsePrefill, tensors: tuple[Tensor, ...], **options: Any
) -> tuple[Tensor, LayerRecord]:
    query, key, value = tensors
    geometry = prefill.plan.geometry(query.shape[1], key.shape[1], query.device)
    return prefill.attend(0, prefill.begin(geometry), query, key, value, **options)


def same(found: tuple[Tensor, LayerRecord], wanted: tuple[Tensor, LayerRecord]) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=0, equal_nan=True)
    assert found[0].stride() == wanted[0].stride()
    for name in ("policies", "blocks", "covered", "work"):
        left, right = (getattr(record, name) for _, record in (found, wanted))
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def addressed(launch: Launch, _stream: int, addresses: list[int]) -> None:
    """A launch by addresses, in the interpreter, which takes tensors."""
    tensors = []
    for address, dtype in zip(addresses, launch.dtypes, strict=True):  # type: ignore[attr-defined]
        place = (ctypes.c_char * 16).from_address(address) if address else bytearray(16)
        tensors.append(torch.frombuffer(place, dtype=torch.uint8, count=16).view(dtype))
    launch._start(tuple(tensors))


@pytest.mark.interpreter
def test_a_repeated_layer_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from shareprefill.runtime.ops.block_selection import triton as launcher

    plan = plan_of((P, S, R), fallback=R, guarded=False)
    start = Launch.__call__

    def noting(launch: Any, *tensors: Tensor) -> None:
        launch.dtypes = [tensor.dtype for tensor in tensors]
        # What the interpreter does in place of a kernel is no launch of torch's.
        with _disable_current_modes():
            start(launch, *tensors)

    monkeypatch.setattr(Launch, "__call__", noting)
    monkeypatch.setattr(Launch, "repeat", addressed)
    monkeypatch.setattr(Launch, "is_kept", True)
    for name in ("ROWS", "CHUNK"):
        # Larger tiles take the interpreter seconds.
        monkeypatch.setitem(launcher.HEAD_OPTIONS, name, 16)
    monkeypatch.setattr(repeats, "current_stream", lambda _device: 0)
    monkeypatch.setattr(core, "are_kept", lambda _device: True)
    prefill, options = SparsePrefill(plan), {"scale": 0.25, "softcap": 30.0}
    geometry = plan.geometry(20, 20, torch.device("cpu"))
    inputs = [tuple(torch.randn(heads, 20, 16) for heads in (3, 1, 1)) for _ in range(3)]
    with counted_launches(), patch.object(prefill, "choose", wraps=prefill.choose) as choose:
        with patch.object(core, "stream_of_tables", lambda _device: 0):
            *_, found = [
                prefill.attend(0, prefill.begin(geometry), *tensors, **options)
                for tensors in inputs
            ]
        # The first call makes tables, and the second one is noted.
        assert choose.call_count == 2
        monkeypatch.setattr(core, "are_kept", lambda _device: False)
        same(found, run(SparsePrefill(plan), inputs[-1], **options))


def test_what_torch_launches_is_not_repeated() -> None:
    calls, given = [], torch.ones(3)

    def compute() -> tuple[Tensor, None]:
        calls.append(1)
        return torch.empty(3).copy_(given), None

    known = Repeats[None]()
    for _ in range(6):
        assert torch.equal(known.run("kind", [given], compute)[0], given)
    assert len(calls) == 6


def test_tensors_at_one_address_are_not_told_apart() -> None:
    given = torch.ones(3)
    with pytest.raises(repeats._NotRepeatableError):
        repeats._Places([given, given], [], torch.empty(3), None)


def test_descriptors_of_what_a_call_makes_are_not_repeated() -> None:
    given, made, output = torch.ones(3), torch.ones(3), torch.empty(3)
    places = repeats._Places([given], [made, output], output, None)
    launches: Any = [(SimpleNamespace(is_kept=True), (SimpleNamespace(base=made),))]
    with pytest.raises(repeats._NotRepeatableError):
        repeats._Repeat(places, launches, output, None)


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("in_pages", [False, True])
@pytest.mark.parametrize("n_tokens", [2048, 1111])
@pytest.mark.parametrize("name", PLANS)
def test_on_a_gpu(name: str, n_tokens: int, in_pages: bool) -> None:
    plan = plan_of(PLANS[name], fallback=M, guarded=name == "pivots", block_size=128)
    prefill, sizes = SparsePrefill(plan), (n_tokens, n_tokens)
    geometry, entered, kept = plan.geometry(*sizes, torch.device("cuda", 0)), [], []
    for number in range(N_CALLS):
        query, key, value = (
            torch.randn(n_tokens, heads, 128, device="cuda", dtype=torch.bfloat16).transpose(0, 1)
            for heads in (8, 2, 2)
        )
        query[..., 0] += 3
        key[:, 64:70, 0] += 6
        if number == N_CALLS - 1:
            key[0, 17] = torch.nan
        tokens: Any = (key, value)
        if in_pages:
            pages = -(-n_tokens // 128)
            table = torch.randperm(2 * pages, device="cuda")[:pages].int()
            tokens = []
            for tensor in (key, value):
                pool = torch.full((2 * pages, 128, 2, 128), torch.nan, device="cuda").bfloat16()
                rows = torch.zeros(pages * 128, 2, 128, device="cuda", dtype=torch.bfloat16)
                rows[:n_tokens] = tensor.transpose(0, 1)
                pool[table.long()] = rows.view(pages, 128, 2, 128)
                tokens.append(PagedTokens(pool.transpose(1, 2), table, n_tokens))
        wanted = run(SparsePrefill(plan), (query, *tokens), scale=0.1)
        state = prefill.begin(geometry)
        with patch.object(prefill, "choose", wraps=prefill.choose) as choose:
            kept.append((prefill.attend(0, state, query, *tokens, scale=0.1), wanted))
        entered.append(choose.called)
    assert entered == [True, True, *[False] * (N_CALLS - 2)]
    # What earlier calls gave is not written over by later ones.
    for found, wanted in kept:
        assert found[0].isfinite().all() or found is kept[-1][0]
        same(found, wanted)
