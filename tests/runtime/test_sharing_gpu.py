"""The layer pass on a GPU: as on the CPU, without waiting for the device, in a CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from shareprefill.artifact import Policy
from shareprefill.runtime import core
from shareprefill.runtime.core import SparsePrefill
from shareprefill.runtime.ops.dispatch import has_fast_kernel
from shareprefill.runtime.ops.hopper import launch
from shareprefill.runtime.plan import HeadPlan, RuntimePlan
from tests.support.plans import D, M, P, R, S, V, layer_plan

pytestmark = pytest.mark.gpu

HEADS, GROUPS, DIM, BLOCK = 8, 2, 64, 64
PLANS = {
    "mixed": (P, S, S, S, R, V, M, D),
    "pivot of all rows": (P, S, S, S, S, S, M, V),
    "sampled": (R,) * HEADS,
    "smoothed": (M,) * HEADS,
    "vertical-slash": (V,) * HEADS,
    "shareprefill": (D,) * HEADS,
}
IN_FP8 = {"some heads in FP8": PLANS["mixed"], "all heads in FP8": PLANS["mixed"]}
REFUSAL = launch.unavailable(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
needs_hopper = pytest.mark.skipif(REFUSAL is not None, reason=f"FP8 attention {REFUSAL}")
ON_GPU = [*PLANS, *(pytest.param(name, marks=needs_hopper) for name in IN_FP8)]


def plan_of(name: str) -> RuntimePlan:
    heads = tuple(
        HeadPlan(
            head=head,
            policy=policy,
            pivot=0 if policy in (P, S) else -1,
            fallback=(V, R, M)[head % 3] if policy is S else policy,
            gamma=0.7,
            fallback_gamma=0.7,
            # Far from what is covered, on either side of it: every other head's check fails.
            coverage_slack=0.5 if head % 2 else -0.5,
            cluster=head % 3 - 1,
            is_fp8=name == "all heads in FP8" or (name in IN_FP8 and head % 2 == 1),
        )
        for head, policy in enumerate({**PLANS, **IN_FP8}[name])
    )
    rows, block = 0 if "all rows" in name else 4, 128 if name in IN_FP8 else BLOCK
    return layer_plan(heads, block, online=name == "shareprefill", pivot_rows=rows)


def tensors(n_query: int, n_key: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Queries that a few key blocks attract, in some heads more than in others."""
    query = torch.randn(HEADS, n_query, DIM, device="cuda")
    key, value = (torch.randn(GROUPS, n_key, DIM, device="cuda") for _ in range(2))
    query[..., 0] += torch.tensor([4.0, 4, 4, 0, 6, 8, 1, 3], device="cuda")[:, None]
    key[:, BLOCK : BLOCK + 8, 0] += 6
    return query.to(dtype), key.to(dtype), value.to(dtype)


def run(prefill: SparsePrefill, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
    geometry = prefill.plan.geometry(query.shape[1], key.shape[1], query.device)
    state = prefill.begin(geometry)
    return prefill.attend(0, state, query, key, value, scale=DIM**-0.5)


@contextmanager
def never_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sizes", [(1000, 1000), (512, 512), (300, 1111)])
@pytest.mark.parametrize("name", PLANS)
def test_equal_to_the_cpu(name: str, sizes: tuple[int, int]) -> None:
    plan = plan_of(name)
    inputs = tensors(*sizes, torch.float32)
    out, record = run(SparsePrefill(plan), *inputs)
    expected, wanted = run(SparsePrefill(plan), *(t.cpu() for t in inputs))
    assert record.policies.tolist() == wanted.policies.tolist()
    # Rounding may move a block of equal mass in or out of a pattern.
    torch.testing.assert_close(record.blocks.cpu(), wanted.blocks, rtol=0.02, atol=2)
    for found, known in ((record.covered, wanted.covered), (record.distances, wanted.distances)):
        torch.testing.assert_close(found.cpu(), known, rtol=1e-3, atol=5e-3, equal_nan=True)
    torch.testing.assert_close(record.work.cpu(), wanted.work)
    error = (out.cpu() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.quantile(0.95) < 1e-2


@pytest.mark.parametrize("name", ON_GPU)
def test_nothing_waits_for_the_device(name: str) -> None:
    plan = plan_of(name)
    prefill = SparsePrefill(plan)
    run(prefill, *tensors(900, 900, torch.bfloat16))
    inputs = tensors(1300, 1300, torch.bfloat16)
    with never_waiting():
        out, _ = run(prefill, *inputs)
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ON_GPU)
def test_a_layer_in_a_cuda_graph(name: str) -> None:
    plan = plan_of(name)
    prefill = SparsePrefill(plan)
    inputs = tensors(1000, 1000, torch.bfloat16)
    run(prefill, *inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, record = run(prefill, *inputs)
    for _ in range(2):
        fresh = tensors(1000, 1000, torch.bfloat16)
        for old, new in zip(inputs, fresh, strict=True):
            old.copy_(new)
        out.fill_(math.nan)
        graph.replay()
        expected, wanted = run(prefill, *fresh)
        assert torch.equal(record.policies, wanted.policies)
        torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)


def test_dense_heads_are_computed_with_the_others() -> None:
    """On Hopper GPUs by the block-sparse kernel, which takes blocks of 128; elsewhere by SDPA."""
    plan = replace(plan_of("mixed"), block_size=128)
    query, key, value = tensors(1000, 1000, torch.bfloat16)
    out, record = run(SparsePrefill(plan), query, key, value)
    head = PLANS["mixed"].index(D)
    assert record.policies[head] == D
    assert record.blocks[head] == record.causal
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[None, head:], key[None, 1:], value[None, 1:], is_causal=True, scale=DIM**-0.5
    )
    torch.testing.assert_close(out[head], expected[0, 0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["mixed", "shareprefill"])
def test_numbers_that_are_none_stay_with_their_head(name: str) -> None:
    """KV head 0 serves the heads 0 to 3, the pivot among them."""
    plan = plan_of(name)
    query, key, value = tensors(1000, 1000, torch.bfloat16)
    key[0, 130] = math.nan
    out, record = run(SparsePrefill(plan), query, key, value)
    assert out[4:].isfinite().all()
    assert record.blocks[:4].eq(record.causal).all()
    assert int(Policy.SHARE) not in record.policies[:4].tolist()


def test_dense_heads_are_in_the_others_launch_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(plan_of("mixed"), block_size=128)
    inputs = tensors(1000, 1400, torch.bfloat16)
    if not has_fast_kernel(inputs[0], inputs[1], inputs[2], 128):
        pytest.skip("neither the Hopper kernel nor FlashAttention-4 runs here")
    out, record = run(SparsePrefill(plan), *inputs)
    monkeypatch.setattr(core, "has_fast_kernel", lambda *_: False)
    gathered, wanted = run(SparsePrefill(plan), *inputs)
    assert torch.equal(record.blocks, wanted.blocks)
    torch.testing.assert_close(out, gathered, rtol=2e-2, atol=2e-2)
    query, key, value = (tensor.float() for tensor in inputs)
    mask = torch.ones(1000, 1400, dtype=torch.bool, device="cuda").tril(400)
    exact = F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, scale=DIM**-0.5, enable_gqa=True
    )[0]
    head = PLANS["mixed"].index(D)
    assert (out[head].float() - exact[head]).norm() <= 4e-3 * exact[head].norm()
    monkeypatch.undo()
    monkeypatch.setattr(core, "_dense", None)
    again, _ = run(SparsePrefill(plan), *inputs)
    torch.testing.assert_close(again, out, rtol=2e-2, atol=2e-2)
