"""Which implementation a call takes, with GPUs that the tests make up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from shareprefill.errors import UnsupportedError
from shareprefill.runtime.ops import dispatch
from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
from shareprefill.runtime.ops.blocks import BlockLists, causal_blocks
from shareprefill.runtime.ops.dispatch import (
    describe,
    has_fast_kernel,
    page_in_place,
    select_attention,
)
from shareprefill.runtime.ops.prepared import Prepared

CUDA = torch.device("cuda")


# What the choice looks at of a tensor on a GPU.
ON_A_GPU = cast("torch.Tensor", SimpleNamespace(device=CUDA, shape=(2, 8192, 64)))


def use(monkeypatch: pytest.MonkeyPatch, generation: int, refusals: dict[str, str | None]) -> None:
    """A GPU of a generation, and what implementations say of it and of every call."""
    monkeypatch.setattr(dispatch, "_fast", Prepared())
    monkeypatch.setattr(dispatch, "facts", id)
    monkeypatch.setattr(dispatch, "_generation", lambda _: generation)
    for name in ("_refusal", "unavailable"):
        monkeypatch.setattr(dispatch, name, lambda impl, *_: refusals.get(impl))


def choose() -> str:
    return select_attention("auto", ON_A_GPU, ON_A_GPU, ON_A_GPU, 128)


def test_the_fastest_that_takes_a_call_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, 9, {"hopper": None})
    assert choose() == "hopper"
    use(monkeypatch, 9, {"hopper": "not here"})
    assert choose() == "triton"
    use(monkeypatch, 8, {"hopper": None})
    assert choose() == "triton"


def test_what_is_as_fast_as_dense_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    for generation, refusals, fast in (
        (9, {"hopper": None}, True),
        (9, {"hopper": "not here"}, False),
        (8, {"hopper": None}, False),
    ):
        use(monkeypatch, generation, refusals)
        assert has_fast_kernel(ON_A_GPU, ON_A_GPU, ON_A_GPU, 128) is fast
    key = torch.zeros(2, 8192, 64)
    assert not has_fast_kernel(key, key, key, 128)


def test_pages_that_the_fastest_kernel_reads_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for generation, refusals, tokens in (
        (9, {"hopper": None}, 128),
        (9, {"hopper": "not here"}, 1),
        (8, {"hopper": None}, 1),
    ):
        use(monkeypatch, generation, refusals)
        assert page_in_place(CUDA) == tokens
    assert page_in_place(torch.device("cpu")) == 1


def test_explicit_requests_are_refused_with_the_reason() -> None:
    tensor = torch.randn(2, 40, 64)
    bitmap = causal_blocks(40, 0, 16)[None]
    lists = BlockLists.from_bitmap(bitmap, torch.zeros(2), 16)
    with pytest.raises(UnsupportedError, match="impl='hopper' needs a Hopper GPU"):
        block_sparse_attention(tensor, tensor, tensor, lists, impl="hopper")


def test_a_cpu_is_described_without_a_gpu() -> None:
    found = {choice.operator: choice for choice in describe("cpu")}
    assert found["block_sparse_attention"].implementation == "blockwise"
    assert found["pooled_attention"].implementation == "blockwise"
    assert found["block_selection"].implementation == "reference"
    assert all(choice.reason for choice in found.values())


def test_every_operator_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    operators = {path.parent.name for path in Path(dispatch.__file__).parent.glob("*/api.py")}
    assert len(operators) >= 7
    assert {choice.operator for choice in describe("cpu")} == operators
    for generation in (8, 9):
        use(monkeypatch, generation, {"hopper": None})
        assert {choice.operator for choice in describe("cuda")} == operators


def test_fp8_is_described_by_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, refusal, implementation in (
        ("cuda", None, "hopper"),
        ("cuda", "needs another GPU", "none"),
        ("cpu", "needs another GPU", "none"),
    ):
        use(monkeypatch, 9, {"hopper": refusal})
        found = {choice.operator: choice for choice in describe(device)}["fp8_attention"]
        assert found.implementation == implementation
        assert (refusal or "precision='fp8'") in found.reason


def test_a_description_names_what_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, 9, {"hopper": "not here"})
    attention = describe("cuda")[0]
    assert attention.implementation == "triton"
    assert attention.reason.endswith("hopper would be faster, but not here")
    use(monkeypatch, 9, {"hopper": None})
    attention = describe("cuda")[0]
    assert attention.implementation == "hopper"
    assert "would be faster" not in attention.reason
    pooled = next(c for c in describe("cuda") if c.operator == "pooled_attention")
    assert pooled.implementation == "hopper"
    use(monkeypatch, 8, {"hopper": "needs a Hopper GPU"})
    attention = describe("cuda")[0]
    assert attention.implementation == "triton"
    assert "nothing was measured" in attention.reason
    pooled = next(c for c in describe("cuda") if c.operator == "pooled_attention")
    assert pooled == ("pooled_attention", "triton", pooled.reason)
    assert "needs a Hopper GPU" in pooled.reason


@pytest.mark.gpu
def test_the_description_is_what_happens() -> None:
    key = torch.empty((1, 8192, 128), dtype=torch.bfloat16, device="cuda")
    assert select_attention("auto", key, key, key, 128) == describe("cuda")[0].implementation
