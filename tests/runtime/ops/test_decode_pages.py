"""Decode steps over keys and values in pages do what they do over the same ones as tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from shareprefill.errors import ConfigError, UnsupportedError
from shareprefill.runtime.ops.block_sparse_decoding import block_sparse_decoding
from shareprefill.runtime.ops.pages import PagedBatch
from shareprefill.runtime.ops.sketched_selection import (
    Basis,
    Moments,
    make_basis,
    select_blocks,
    sketch_keys,
    write_codes,
)
from tests.support.pages import LAYOUTS, in_batch_pages

IMPLS = ["reference", pytest.param("triton", marks=pytest.mark.interpreter)]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# (B, H, G, N, D, Dv, rank, block size, page size)
SHAPES = [
    (3, 3, 1, 163, 16, 24, 8, 16, 32),
    (1, 4, 2, 329, 40, 40, 24, 32, 16),
    (1, 2, 2, 300, 16, 16, 16, 64, 128),
]
ON_GPU = [
    *((*SHAPES, (3, 32, 8, 9133, 128, 128, 24, 32, 16), (2, 32, 8, 20011, 128, 128, 24, 32, 128))),
    *((2, 9, 3, 7777, 64, 64, 24, 32, 64), (1, 8, 8, 3003, 256, 256, 16, 32, 2048)),
]


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", layout: str = "joined"
) -> dict[str, Any]:
    """Random sequences, as tensors and in pages, with one basis for all and codes of it."""
    batch, heads, groups, tokens, dim, value_dim, rank, block, size = shape
    sizes = torch.linspace(3, 0.2, dim, device=device)
    query = (torch.randn(batch, heads, dim, device=device) * sizes).to(dtype)
    key = (torch.randn(batch, groups, tokens, dim, device=device) * sizes + 0.5).to(dtype)
    value = torch.randn(batch, groups, tokens, value_dim, device=device).to(dtype)
    lengths = torch.randint(1, tokens + 1, (batch,), device=device, dtype=torch.int32)
    lengths[-1] = tokens
    if batch > 2:
        lengths[0] = 0
    rows = torch.randn(groups, 3 * dim, dim, device=device) * sizes
    basis = make_basis(Moments.of(rows, key[-1]), rank)
    keys, values = in_batch_pages(key, value, lengths.tolist(), size, layout)
    words = torch.full(
        (len(keys.pool), groups, rank // 8, size), -1, dtype=torch.int32, device=device
    )
    share = torch.rand(groups, heads // groups, device=device)
    return {
        "query": query,
        "tensors": (key, value),
        "pages": (keys, values),
        "basis": Basis(basis.mean, basis.query.contiguous(), basis.key.contiguous()),
        "words": words,
        "share": (share / share.sum(1, keepdim=True)).flatten(),
        "worth": torch.rand(batch, groups, device=device) * 0.1,
        "options": {"block_size": block, "lengths": lengths},
    }


def slots_of(pages: PagedBatch, lengths: list[int]) -> torch.Tensor:
    """Of all tokens, in any order, and of none, int64."""
    found = [torch.full((3,), -1, dtype=torch.int64, device=pages.device)]
    for table, length in zip(pages.tables.long(), lengths, strict=True):
        place = torch.arange(length, device=pages.device)
        found.append(table[place // pages.page_size] * pages.page_size + place % pages.page_size)
    slots = torch.cat(found)
    return slots[torch.randperm(len(slots), device=slots.device)]


def listed(blocks: torch.Tensor, counts: torch.Tensor) -> list[list[int]]:
    pairs = zip(blocks.flatten(0, 1).tolist(), counts.flatten().tolist(), strict=True)
    return [row[:count] for row, count in pairs]


def chosen(given: dict[str, Any], impl: str, counts: torch.Tensor | None = None) -> Any:
    keys, basis = given["pages"][0], given["basis"]
    bases = Basis(basis.mean[None], basis.query[None], basis.key[None])
    return select_blocks(
        *(given["query"], keys, given["words"], bases, given["share"], given["worth"]),
        **given["options"],
        counts=counts,
        impl=impl,
    )


def check_step(given: dict[str, Any], impl: str, dtype: torch.dtype) -> None:
    """Codes, lists and outputs by an implementation, against the reference on tensors."""
    keys, values = given["pages"]
    key, value = given["tensors"]
    basis, lengths = given["basis"], given["options"]["lengths"]
    slots = slots_of(keys, lengths.tolist())
    write_codes(keys.pool, slots, basis, given["words"], impl=impl)
    expected = sketch_keys(key, basis)  # [B, G, r / 8, N]
    found = replace(keys, pool=given["words"].mT).gathered().mT
    for row, length in enumerate(lengths.tolist()):
        # A coordinate between two codes may have either.
        assert (
            found[row, ..., :length] != expected[row, ..., :length]
        ).double().mean() < 0.002 or (length == 0)
    bases = Basis(*(t.expand(len(key), *t.shape).contiguous() for t in vars(basis).values()))
    wanted = select_blocks(
        *(given["query"], key, found.contiguous(), bases, given["share"], given["worth"]),
        **given["options"],
        impl="reference",
    )
    counts = torch.full_like(wanted[1], -7)
    blocks, same = chosen(given, impl, counts)
    assert same is counts
    for ours, theirs in zip(listed(blocks, counts), listed(*wanted), strict=True):
        assert len(set(ours) ^ set(theirs)) <= len(theirs) // 500 + (key.device.type == "cuda")
    out = torch.full((*given["query"].shape[:2], value.shape[3]), torch.nan, dtype=dtype).to(key)
    found = block_sparse_decoding(
        *(given["query"], keys, values, blocks, counts), **given["options"], out=out, impl=impl
    )
    expected = block_sparse_decoding(
        *(given["query"].double(), key.double(), value.double(), blocks, counts),
        **given["options"],
        impl="reference",
    )
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype])
    assert not found[lengths == 0].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_reads_pages_of_any_size(layout: str) -> None:
    for size in (1, 20, 128):
        given = inputs((3, 4, 2, 263, 16, 8, 8, 16, size), torch.float32, layout=layout)
        check_step(given, "reference", torch.float32)


def test_the_reference_reads_pages_in_any_strides() -> None:
    given = inputs(SHAPES[0], torch.float32)
    keys, values = given["pages"]
    # As a CPU's instruction set lays them out: the tokens of a page side by side.
    pool = keys.pool.mT.contiguous().mT
    given["pages"] = replace(keys, pool=pool), values
    check_step(given, "reference", torch.float32)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("shape", "dtype"), [*((shape, torch.float32) for shape in SHAPES), (SHAPES[0], torch.float16)]
)
def test_triton_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layout = "split, tokens first" if dtype == torch.float32 else "joined"
    check_step(inputs(shape, dtype, layout=layout), "triton", dtype)


def test_user_errors_say_what_came() -> None:
    given = inputs((3, 6, 2, 263, 16, 24, 8, 16, 32), torch.float32)
    keys, values = given["pages"]
    key, _ = given["tensors"]
    query, words, basis = given["query"], given["words"], given["basis"]
    with pytest.raises(ConfigError, match="11 pages of 32 tokens do not hold 400 tokens"):
        replace(keys, n_tokens=400)
    with pytest.raises(ConfigError, match="with int32 tables"):
        replace(keys, tables=keys.tables.long())
    lists = torch.zeros(3, 2, 17, dtype=torch.int32), torch.ones(3, 2, dtype=torch.int32)
    for other in (key, replace(values, tables=values.tables.clone())):
        with pytest.raises(ConfigError, match="both lie in pages"):
            block_sparse_decoding(query, keys, other, *lists, **given["options"])
    slots = slots_of(keys, given["options"]["lengths"].tolist())
    with pytest.raises(ConfigError, match="slots must lie below"):
        write_codes(keys.pool, slots + 10**6, basis, words)
    with pytest.raises(ConfigError, match="words must be int32"):
        write_codes(keys.pool, slots, basis, words[1:])
    given["options"]["starts"] = torch.zeros_like(given["options"]["lengths"])
    with pytest.raises(ConfigError, match="leave starts out"):
        chosen(given, "reference")


@pytest.mark.interpreter
def test_pages_that_kernels_do_not_read_are_refused() -> None:
    given = inputs((2, 4, 2, 263, 16, 8, 8, 16, 24), torch.float32)
    keys, values = given["pages"]
    with pytest.raises(UnsupportedError, match="power of two of at least 16 tokens.* got 24"):
        chosen(given, "triton")
    slots = slots_of(keys, given["options"]["lengths"].tolist())
    with pytest.raises(UnsupportedError, match="power of two"):
        write_codes(keys.pool, slots, given["basis"], given["words"], impl="triton")
    lists = torch.zeros(2, 2, 17, dtype=torch.int32), torch.ones(2, 2, dtype=torch.int32)
    with pytest.raises(UnsupportedError, match="power of two"):
        block_sparse_decoding(
            given["query"], keys, values, *lists, **given["options"], impl="triton"
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ON_GPU, ids=str)
def test_cuda_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layout = "joined" if dtype == torch.float32 else "split, tokens first"
    check_step(inputs(shape, dtype, "cuda", layout), "triton", dtype)


@pytest.mark.gpu
def test_a_graph_of_a_step_follows_pages_and_lengths() -> None:
    shape = (3, 8, 2, 3000, 64, 64, 24, 32, 16)
    given = inputs(shape, torch.bfloat16, "cuda")
    keys, values = given["pages"]
    lengths = given["options"]["lengths"]
    slots = slots_of(keys, [3000] * 3)
    out = torch.full((3, 8, 64), torch.nan, dtype=torch.bfloat16, device="cuda")

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        write_codes(keys.pool, slots, given["basis"], given["words"])
        found = chosen(given, "auto")
        block_sparse_decoding(given["query"], keys, values, *found, **given["options"], out=out)
        return found

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(3):
        other = inputs(shape, torch.bfloat16, "cuda")
        for mine, theirs in zip(given["pages"], other["pages"], strict=True):
            mine.pool.copy_(theirs.pool)
            mine.tables.copy_(theirs.tables)
        lengths.copy_(other["options"]["lengths"])
        given["query"].copy_(other["query"])
        given["words"].fill_(-1)
        some = slots_of(keys, lengths.tolist())
        slots.fill_(-1)
        slots[: len(some)] = some
        out.fill_(torch.nan)
        graph.replay()
        lists = listed(*found)
        for ours, theirs in zip(lists, listed(*chosen(given, "reference")), strict=True):
            assert len(set(ours) ^ set(theirs)) <= 1 + len(theirs) // 500
        expected = block_sparse_decoding(
            *(given["query"], keys, values, *found), **given["options"], impl="reference"
        )
        torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE[torch.bfloat16])
