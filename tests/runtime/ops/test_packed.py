"""Block-sparse attention of sequences of different lengths in one call."""

from __future__ import annotations

import pytest
import torch

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.block_sparse_attention import (
    block_sparse_attention,
    packed_block_sparse_attention,
)
from shareprefill.runtime.ops.blocks import BlockLists, count_blocks

HEADS, GROUPS = 4, 2
# Queries and keys of the sequences.
LENGTHS = [(1, 1), (37, 61), (50, 50), (1, 40)]


def random_batch(
    lengths: list[tuple[int, int]],
    size: int,
    dim: int,
    dtype: torch.dtype,
    device: str = "cpu",
    pattern: tuple[int, ...] = (1, 0, 0, 2),
) -> tuple[list[torch.Tensor], list[BlockLists], list[torch.Tensor]]:
    """Tensors, lists and ends; the second sequence has one pattern, with no blocks."""
    totals = [sum(length[side] for length in lengths) for side in (0, 1, 1)]
    tensors = [
        torch.randn(heads, total, dim, device=device).to(dtype)
        for heads, total in zip((HEADS, GROUPS, GROUPS), totals, strict=True)
    ]
    lists = []
    for place, (n_q, n_k) in enumerate(lengths):
        patterns = 1 if place == 1 else 3
        counts = (patterns, count_blocks(n_q, size), count_blocks(n_k, size))
        bitmap = torch.rand(counts, device=device) < (0.0 if place == 1 else 0.6)
        chosen = [min(number, patterns - 1) for number in pattern]
        lists.append(
            BlockLists.from_bitmap(bitmap, torch.tensor(chosen, device=device), size, capacity=400)
        )
    ends = [
        torch.tensor([0, *torch.tensor(side).cumsum(0)], dtype=torch.int32, device=device)
        for side in zip(*lengths, strict=True)
    ]
    return tensors, lists, ends


def one_by_one(
    tensors: list[torch.Tensor],
    lists: list[BlockLists],
    ends: list[torch.Tensor],
    out: torch.Tensor,
    **options: object,
) -> torch.Tensor:
    """Fill `out` sequence by sequence in at least float64's precision of the inputs."""
    query, key, value = (tensor.double() for tensor in tensors)
    starts = zip(ends[0].tolist(), ends[1].tolist(), strict=True)
    all_lse = torch.zeros(query.shape[:2], device=out.device)
    begin = next(starts)
    for end, each in zip(starts, lists, strict=True):
        queries, keys = slice(begin[0], end[0]), slice(begin[1], end[1])
        _, all_lse[:, queries] = block_sparse_attention(
            query[:, queries],
            key[:, keys],
            value[:, keys],
            each,
            out=out[:, queries],
            return_lse=True,
            impl="reference",
            **options,
        )
        begin = end
    return all_lse


@pytest.mark.parametrize(
    ("impl", "dtype", "limit"),
    [
        ("reference", torch.float64, 1e-12),
        ("blockwise", torch.float32, 2e-5),
        pytest.param("triton", torch.float32, 2e-5, marks=pytest.mark.interpreter),
        pytest.param("triton", torch.float16, 4e-3, marks=pytest.mark.interpreter),
    ],
)
@pytest.mark.parametrize("bounded", [False, True], ids=["plain", "softcap and sinks"])
def test_a_batch_equals_its_sequences(
    bounded: bool, impl: str, dtype: torch.dtype, limit: float
) -> None:
    tensors, lists, ends = random_batch(LENGTHS, 16, 16, dtype, pattern=(1, -1, 0, 2))
    options: dict[str, object] = {"scale": 0.4}
    if bounded:
        options |= {"softcap": 1.5, "sinks": torch.randn(HEADS)}
    out = torch.full(tensors[0].shape, torch.nan, dtype=dtype)
    out[1] = 7.0
    wanted = torch.full(tensors[0].shape, 7.0, dtype=torch.float64)
    wanted_lse = one_by_one(tensors, lists, ends, wanted, **options)
    found, lse = packed_block_sparse_attention(
        *tensors, lists, *ends, out=out, return_lse=True, impl=impl, **options
    )
    assert found is out
    torch.testing.assert_close(out.double(), wanted, atol=limit, rtol=limit)
    torch.testing.assert_close(lse, wanted_lse, atol=2e-5, rtol=2e-5)


def test_user_errors_say_what_came() -> None:
    tensors, lists, ends = random_batch(LENGTHS, 16, 16, torch.float32)
    other = random_batch(LENGTHS, 32, 16, torch.float32)[1]
    left_out = random_batch(LENGTHS, 16, 16, torch.float32, pattern=(-1, 0, 0, 0))[1]
    late, short = ends[0] + 1, ends[0].clone()
    short[1] = 0
    cases = [
        ((*tensors, [], *ends), "at least one sequence"),
        ((*tensors, [lists[0], *other[1:]], *ends), "16 for sequence 0 and 32 for sequence 1"),
        ((*tensors, lists[:3], *ends), r"cu_seqlens_q must be int32 \[4\]"),
        ((*tensors, lists, ends[0].long(), ends[1]), "cu_seqlens_q must be int32"),
        ((*tensors, lists, late, ends[1]), "cu_seqlens_q must run from 0 to 89, got 1 to 90"),
        ((*tensors, lists, short, ends[1]), "sequence 0 needs 1 <= queries <= keys, got 0"),
        ((*tensors, [*lists[1:], lists[0]], *ends), "lists of sequence 0 are for 3 x 4 blocks"),
        ((*tensors, left_out, *ends), "give `out`"),
    ]
    for arguments, message in cases:
        with pytest.raises(ConfigError, match=message):
            packed_block_sparse_attention(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_kernel_takes_a_batch_without_waiting(dtype: torch.dtype) -> None:
    lengths = [(1000, 1000), (777, 1333), (1, 1), (129, 4000)]
    tensors, lists, ends = random_batch(lengths, 128, 128, dtype, "cuda", (1, -1, 0, 2))
    options = {"softcap": 20.0, "sinks": torch.randn(HEADS, device="cuda")}
    out = torch.full_like(tensors[0], torch.nan)
    out[1] = 7.0
    wanted = torch.full_like(out, 7.0, dtype=torch.float64)
    one_by_one(tensors, lists, ends, wanted, **options)
    packed_block_sparse_attention(*tensors, lists, *ends, out=out, **options)
    limit = 4e-3 if dtype == torch.float16 else 3e-2
    torch.testing.assert_close(out.double(), wanted, atol=limit, rtol=limit)
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed_block_sparse_attention(*tensors, lists, *ends, out=out, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
