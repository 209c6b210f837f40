"""Attention of decode steps over listed key blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from shareprefill.errors import ConfigError, UnsupportedError
from shareprefill.runtime.ops.block_sparse_decoding import block_sparse_decoding

IMPLS = ["reference", pytest.param("triton", marks=pytest.mark.interpreter)]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# (B, H, G, N, D, Dv, block size)
SHAPES = [
    (1, 1, 1, 1, 8, 8, 16),
    (2, 6, 2, 63, 16, 24, 16),
    (1, 8, 2, 129, 40, 40, 32),
    (3, 4, 4, 300, 16, 16, 128),
    (2, 20, 1, 150, 8, 8, 64),
]


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Random tensors, lists of random blocks, rubbish behind their ends, starts and lengths."""
    batch, heads, groups, tokens, dim, value_dim, size = shape
    sizes = (batch, heads, dim), (batch, groups, tokens, dim), (batch, groups, tokens, value_dim)
    query, key, value = (torch.randn(s, device=device).to(dtype) for s in sizes)
    n = -(-tokens // size)
    blocks = torch.rand(batch, groups, n, device=device).argsort(-1).int()
    counts = torch.randint(0, n + 1, (batch, groups), device=device, dtype=torch.int32)
    counts[0, 0], counts[-1, -1] = 0, n
    rubbish = torch.arange(n, device=device) >= counts[..., None]
    blocks = torch.where(rubbish, -7, blocks).int().contiguous()
    lengths = torch.randint(1, tokens + 1, (batch,), device=device, dtype=torch.int32)
    lengths[-1] = tokens
    starts = (torch.rand(batch, device=device) * lengths).int()
    starts[0] = 0
    # Keys and values that must not be read.
    places = torch.arange(tokens, device=device)
    hidden = (places >= lengths[:, None]) | (places < starts[:, None])
    for tensor in (key, value):
        tensor.masked_fill_(hidden[:, None, :, None], torch.nan)
    options = {"block_size": size, "lengths": lengths, "starts": starts}
    return [query, key, value, blocks, counts], options


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_equals_sdpa(shape: tuple[int, ...]) -> None:
    tensors, options = inputs(shape, torch.float64)
    query, key, value, blocks, counts = tensors
    repeats, tokens = query.shape[1] // key.shape[1], key.shape[2]
    entries = torch.arange(blocks.shape[2])
    taken = torch.zeros(*blocks.shape[:2], blocks.shape[2] + 1, dtype=torch.bool)
    places = blocks.long().masked_fill(entries >= counts[..., None], blocks.shape[2])
    taken.scatter_(2, places, True)
    read = taken[..., :-1].repeat_interleave(options["block_size"], -1)[..., :tokens]
    for row, start in enumerate(options["starts"].tolist()):
        read[row] = F.pad(read[row], (start, 0))[..., :tokens]
    read &= (torch.arange(tokens) < options["lengths"][:, None])[:, None]
    key, value, mask = (t.repeat_interleave(repeats, 1) for t in (key, value, read))
    expected = F.scaled_dot_product_attention(
        query[:, :, None], key.nan_to_num(), value.nan_to_num(), attn_mask=mask[:, :, None]
    )[:, :, 0]
    expected[~mask.any(-1)] = 0
    found = block_sparse_decoding(*tensors, **options, impl="reference")
    torch.testing.assert_close(found, expected)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors, options = inputs(shape, dtype)
    wide = [t.double() for t in tensors[:3]] + tensors[3:]
    expected = block_sparse_decoding(*wide, **options, impl="reference")
    found = block_sparse_decoding(*tensors, **options, impl="triton")
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_whole_list_is_dense_attention(impl: str) -> None:
    query, key, value = torch.randn(1, 4, 16), torch.randn(1, 2, 70, 16), torch.randn(1, 2, 70, 16)
    blocks = torch.arange(5, dtype=torch.int32).expand(1, 2, 5).contiguous()
    counts = torch.full((1, 2), 5, dtype=torch.int32)
    key, value = key.transpose(2, 3).contiguous().transpose(2, 3), value[:, :, :, :]
    out = torch.full((1, 4, 16), torch.nan)
    found = block_sparse_decoding(
        *(query, key, value, blocks, counts), block_size=16, scale=0.3, out=out, impl=impl
    )
    assert found is out
    expected = F.scaled_dot_product_attention(
        query[:, :, None], key, value, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(found, expected[:, :, 0], rtol=0, atol=2e-5)


def test_user_errors_say_what_came() -> None:
    tensors, options = inputs((2, 4, 2, 50, 8, 8, 16), torch.float32)
    query, key, value, blocks, counts = tensors

    def refused(said: str, *changed: Any, **others: Any) -> None:
        given = list(tensors)
        given[: len(changed)] = changed
        with pytest.raises(ConfigError, match=said):
            block_sparse_decoding(*given, **{**options, **others})

    refused("query must be", query[0])
    refused("key must have query's dtype", query, key.double())
    refused("floating-point", query.int(), key.int(), value.int())
    refused("key must be .2, KV heads", query, key[:1])
    refused("2 KV heads do not divide 3", query[:, :3])
    refused("value must be .2, 2, 50, Dv", query, key, value[:, :, :9])
    refused("blocks must be int32", query, key, value, blocks.long())
    refused("counts must be int32", query, key, value, blocks, counts[:1])
    refused("counts must lie in 0..4, got", query, key, value, blocks, counts + 5)
    refused(
        "blocks must lie in 0..3, got", query, key, value, blocks + 4, torch.full_like(counts, 4)
    )
    refused("lengths must lie in 0..50", lengths=options["lengths"] + 60)
    refused("starts must be int32", starts=options["starts"].long())
    refused("starts must lie in 0..lengths", starts=options["lengths"] + 1)
    refused("block_size must be at least 1", block_size=0)
    refused("scale must be a positive number", scale=-1.0)
    refused("out must be float32", out=query.double())
    refused("blocks must be contiguous", query, key, value, blocks.mT.contiguous().mT)
    refused("impl must be one of auto, reference, triton", impl="fast")


@pytest.mark.interpreter
def test_blocks_that_tiles_cannot_fill_are_refused() -> None:
    tensors, _ = inputs((1, 2, 1, 50, 8, 8, 10), torch.float32)
    with pytest.raises(UnsupportedError, match="power of two"):
        block_sparse_decoding(*tensors, block_size=10, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        *(*SHAPES, (2, 32, 8, 4133, 128, 128, 32), (1, 9, 3, 7777, 64, 64, 16)),
        *((4, 8, 8, 1025, 96, 64, 256), (1, 40, 8, 20011, 128, 128, 64)),
    ],
    ids=str,
)
def test_cuda_equals_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors, options = inputs(shape, dtype, "cuda")
    wide = [t.double() for t in tensors[:3]] + tensors[3:]
    expected = block_sparse_decoding(*wide, **options, impl="reference")
    out = torch.full(expected.shape, torch.nan, dtype=dtype, device="cuda")
    found = block_sparse_decoding(*tensors, **options, out=out)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.gpu
def test_a_graph_of_a_step_follows_lists_and_lengths() -> None:
    shape = (2, 8, 2, 3000, 64, 64, 32)
    tensors, options = inputs(shape, torch.bfloat16, "cuda")
    out = torch.full((2, 8, 64), torch.nan, dtype=torch.bfloat16, device="cuda")
    block_sparse_decoding(*tensors, **options, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        block_sparse_decoding(*tensors, **options, out=out)
    for _ in range(3):
        others, changed = inputs(shape, torch.bfloat16, "cuda")
        for mine, theirs in zip(tensors, others, strict=True):
            mine.copy_(theirs)
        for name in ("lengths", "starts"):
            options[name].copy_(changed[name])
        out.fill_(torch.nan)
        graph.replay()
        expected = block_sparse_decoding(*tensors, **options, impl="reference")
        torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
def test_steps_that_grow_repeat_their_launches() -> None:
    tensors, options = inputs((2, 8, 2, 3000, 64, 64, 32), torch.bfloat16, "cuda")
    query, key, value, _, counts = tensors
    key.nan_to_num_()
    value.nan_to_num_()
    # Of the shortest.
    blocks = torch.rand(2, 2, 84, device="cuda").argsort(-1).int()
    counts.clamp_(max=84)
    options |= {"lengths": None, "starts": None}
    for tokens in (2700, 2701, 2702, 2999, 3000):
        there = (key[:, :, :tokens], value[:, :, :tokens])
        given = (query, *there, blocks, counts)
        out = torch.full((2, 8, 64), torch.nan, dtype=torch.bfloat16, device="cuda")
        block_sparse_decoding(*given, **options, out=out)
        expected = block_sparse_decoding(*given, **options, impl="reference")
        torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE[torch.bfloat16])
