"""Blocks that a decode step reads, chosen by a sketch of the keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from shareprefill.errors import ConfigError, UnsupportedError
from shareprefill.runtime.ops.sketched_selection import (
    Basis,
    Moments,
    make_basis,
    select_blocks,
    sketch_keys,
)
from shareprefill.runtime.ops.sketched_selection.reference import block_mass, last_place, places_of
from shareprefill.runtime.ops.sketched_selection.sketch import coordinates

IMPLS = ["reference", pytest.param("triton", marks=pytest.mark.interpreter)]
# (B, H, G, N, D, r, block size, local)
SHAPES = [
    (1, 1, 1, 1, 8, 8, 16, 64),
    (2, 6, 2, 263, 16, 8, 16, 20),
    (1, 8, 2, 1029, 40, 16, 32, 64),
    (2, 3, 3, 300, 16, 16, 64, 1),
]


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"
) -> tuple[list[Any], dict[str, Any]]:
    """Random keys of unequal directions, their sketch, and what reading is worth."""
    batch, heads, groups, tokens, dim, rank, size, local = shape
    sizes = torch.linspace(3, 0.2, dim, device=device)
    query = (torch.randn(batch, heads, dim, device=device) * sizes).to(dtype)
    key = (torch.randn(batch, groups, tokens, dim, device=device) * sizes + 0.5).to(dtype)
    rows = torch.randn(batch, groups, 3 * dim, dim, device=device) * sizes
    lengths = torch.randint(1, tokens + 1, (batch,), device=device, dtype=torch.int32)
    lengths[-1] = tokens
    starts = (torch.rand(batch, device=device) * lengths).int()
    starts[0] = 0
    basis = make_basis(Moments.of(rows, key), rank)
    # The first of a sequence's codes is of its first key.
    words = torch.full((batch, groups, rank // 8, tokens + 5), -1, dtype=torch.int32, device=device)
    for row, start in enumerate(starts.tolist()):
        words[row, ..., : tokens - start] = sketch_keys(key, basis)[row, ..., start:]
    share = torch.rand(groups, heads // groups, device=device)
    share = (share / share.sum(1, keepdim=True)).flatten()
    worth = torch.rand(batch, groups, device=device) * 0.1
    places = torch.arange(tokens, device=device)
    hidden = (places >= lengths[:, None]) | (places < starts[:, None])
    key.masked_fill_(hidden[:, None, :, None], torch.nan)
    options = {"block_size": size, "local": local, "lengths": lengths, "starts": starts}
    return [query, key, words, basis, share, worth], options


def listed(blocks: torch.Tensor, counts: torch.Tensor) -> list[list[list[int]]]:
    return [
        [row[:count].tolist() for row, count in zip(rows, many, strict=True)]
        for rows, many in zip(blocks, counts.tolist(), strict=True)
    ]


def test_a_whole_sketch_of_many_levels_gives_the_logits() -> None:
    query, key = torch.randn(2, 50, 16), torch.randn(2, 400, 16) * torch.linspace(2, 0.1, 16)
    errors = []
    for rank in (8, 16):
        basis = make_basis(Moments.of(query, key), rank)
        words = sketch_keys(key, basis)
        assert words.shape == (2, rank // 8, 400)
        guessed = query @ basis.query.mT @ coordinates(words).mT + query @ basis.mean[..., None]
        errors.append((guessed - query @ key.mT).std() / (query @ key.mT).std())
    assert errors[1] < errors[0] < 0.4
    assert errors[1] < 0.12
    # Without rounding, all coordinates are exact.
    steps = (key - basis.mean[:, None]) @ basis.key.mT
    exact = query @ basis.query.mT @ steps.mT + query @ basis.mean[..., None]
    torch.testing.assert_close(exact, query @ key.mT, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_pays_is_read(impl: str) -> None:
    # One head, block j of four keys; block 3 has nearly all attention that is not newest.
    key = torch.zeros(1, 1, 128, 8)
    key[..., 48:64, 0] = 12.0
    query = torch.zeros(1, 1, 8)
    query[..., 0] = 1.0
    basis = make_basis(Moments.of(torch.eye(8)[None, None], key + torch.randn_like(key) * 1e-3), 8)
    words = sketch_keys(key, basis)
    tensors = (query, key, words, basis, torch.ones(1))
    options = {"block_size": 16, "local": 16, "scale": 1.0, "impl": impl}
    for worth, expected in ((0.0, list(range(8))), (1e-2, [0, 3, 7]), (20.0, [0, 7])):
        found = select_blocks(*tensors, torch.tensor([[worth]]), **options)
        assert listed(*found) == [[expected]]


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors, options = inputs(shape, dtype)
    expected = select_blocks(*tensors, **options, impl="reference")
    found = select_blocks(*tensors, **options, impl="triton")
    assert listed(*found) == listed(*expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_all_blocks_are_read_where_reading_costs_nothing(impl: str) -> None:
    check_free_reading(impl, (2, 4, 2, 535, 8, 8, 16, 20), "cpu")


def check_free_reading(impl: str, shape: tuple[int, ...], device: str) -> None:
    """A sketch that knows nothing, beside keys that have all attention, hides no block."""
    (query, key, words, basis, share, worth), options = inputs(shape, torch.float32, device)
    basis = Basis(*(torch.zeros_like(tensor) for tensor in vars(basis).values()))
    worth = torch.zeros_like(worth)
    worth[:, 1] = 1e-20
    blocks, counts = select_blocks(
        *(1e3 * query, 1e3 * key, words, basis, share, worth), **options, impl=impl
    )
    found, there = listed(blocks, counts), options["lengths"] - options["starts"]
    for rows, tokens in zip(found, there.tolist(), strict=True):
        assert rows[0] == list(range(-(-tokens // options["block_size"])))
    assert len(found[-1][1]) < len(found[-1][0])


@pytest.mark.interpreter
def test_chunks_of_a_list_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    from shareprefill.runtime.ops.sketched_selection import triton

    monkeypatch.setattr(triton, "_LEAST_CHUNK", 4)
    tensors, options = inputs((1, 4, 2, 535, 8, 8, 16, 20), torch.float32)
    tensors[5] /= 20
    expected = select_blocks(*tensors, **options, impl="reference")
    assert all(len(row) > 10 for row in listed(*expected)[0])
    assert listed(*select_blocks(*tensors, **options, impl="triton")) == listed(*expected)


def test_blocks_pay_by_the_threshold_that_they_reach() -> None:
    # One block in [1/2, 1), two in [1/8, 1/4) and ten of 2 ** -10, beside two that are known.
    mass = torch.tensor([0.5, 0.2, 0.15, *[2.0**-10] * 10])
    places = torch.cat((torch.zeros(2, dtype=torch.int32), places_of(mass)))
    assert places.tolist() == [0, 0, 2, 5, 6, *[20] * 10]
    # What is lost before and after, by the geometric mean of each threshold and the one before.
    sizes = {n: 2 ** (0.25 - n / 2) for n in (2, 5, 6, 20)}
    small = 10 * sizes[20]
    for place, half in ((20, small / 2), (6, small + sizes[6] / 2)):
        worth = half * 2 ** (-place / 2)
        assert last_place(places, torch.tensor(worth * 0.999)) >= place
        assert last_place(places, torch.tensor(worth * 1.001)) < place
    assert last_place(places, torch.tensor(1.0)) == 0
    assert last_place(places, torch.tensor(0.0)) == 63
    assert places_of(torch.tensor([1.0, 0.0, 2.0**-32])).tolist() == [1, 64, 64]


def test_the_newest_and_the_first_block_count_by_their_keys() -> None:
    (query, key, words, basis, share, _), options = inputs(SHAPES[1], torch.float32)
    place = -1, -1
    start = int(options["starts"][-1])
    key, words = key[:, :, start:], words[..., : key.shape[2] - start]
    own = share.view(2, 3)[1]
    given = (query[-1, 3:], key[place], words[place], basis.mean[place], basis.query[place], own)
    mass = block_mass(*given, 16, 20, 0.25)
    assert mass.sum() == pytest.approx(1)
    # Codes of blocks that are always read say nothing.
    changed = words[place].clone()
    changed[:, :16] = 0
    changed[:, -20:] = -1
    again = block_mass(*given[:2], changed, *given[3:], 16, 20, 0.25)
    torch.testing.assert_close(again, mass)


def test_user_errors_say_what_came() -> None:
    tensors, options = inputs((2, 4, 2, 50, 8, 8, 16, 20), torch.float32)
    query, key, words, basis, share, worth = tensors

    def refused(said: str, *changed: Any, **others: Any) -> None:
        given = list(tensors)
        given[: len(changed)] = changed
        with pytest.raises(ConfigError, match=said):
            select_blocks(*given, **{**options, **others})

    refused("query must be .batch", query[0])
    refused("that 2 KV heads divide", query[:, :3])
    refused("key must be float32", query, key.half())
    refused("words must be int32", query, key, words.long())
    refused("words must be of at least 50 keys, got 49", query, key, words[..., :49])
    refused("basis.query must be", query, key, words, replace(basis, query=basis.query[:, :, 1:]))
    refused(
        "basis.mean must be contig",
        query,
        key,
        words,
        replace(basis, mean=basis.mean.mT.contiguous().mT),
    )
    refused("share must be float32", query, key, words, basis, share[1:])
    refused("worth must be float32", query, key, words, basis, share, worth[1:])
    refused("starts must be int32", starts=options["starts"].long())
    refused("lengths must be int32", lengths=options["lengths"].long())
    refused("local and the keys must be", local=0)
    refused("scale must be a positive", scale=0.0)
    refused("impl must be one of auto, reference, triton", impl="fast")
    with pytest.raises(ConfigError, match="a multiple of 8 coordinates, at most 8, got 16"):
        make_basis(Moments.of(query, key), 16)


@pytest.mark.interpreter
def test_more_blocks_than_a_program_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from shareprefill.runtime.ops.sketched_selection import triton

    monkeypatch.setattr(triton, "MOST_BLOCKS", 3)
    tensors, options = inputs((1, 1, 1, 50, 8, 8, 16, 20), torch.float32)
    with pytest.raises(UnsupportedError, match="at most 3 blocks, got 4"):
        select_blocks(*tensors, **options, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        *(*SHAPES, (2, 32, 8, 9133, 128, 8, 32, 64), (1, 9, 3, 40777, 64, 16, 32, 64)),
        *((1, 5, 1, 300001, 32, 24, 16, 64), (1, 8, 8, 70000, 256, 40, 128, 200)),
    ],
    ids=str,
)
def test_cuda_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors, options = inputs(shape, dtype, "cuda")
    expected = listed(*select_blocks(*tensors, **options, impl="reference"))
    blocks, counts = select_blocks(*tensors, **options)
    for ours, theirs in zip(listed(blocks, counts), expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one == sorted(set(one))
            # A block whose share is a threshold's, to the last bit, may be on either side.
            assert len(set(one) ^ set(other)) <= max(1, len(other) // 500)


@pytest.mark.gpu
def test_cuda_reads_all_blocks_where_reading_costs_nothing() -> None:
    check_free_reading("triton", (3, 8, 2, 70001, 64, 24, 32, 64), "cuda")


@pytest.mark.gpu
def test_a_graph_of_a_choice_follows_lengths() -> None:
    tensors, options = inputs((2, 8, 2, 3000, 64, 8, 32, 64), torch.bfloat16, "cuda")
    select_blocks(*tensors, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = select_blocks(*tensors, **options)
    tensors[1].nan_to_num_()
    for length in (1500, 2000):
        options["lengths"].fill_(length)
        options["starts"][1] = length // 3
        for tensor in found:
            tensor.fill_(-9)
        graph.replay()
        expected = select_blocks(*tensors, **options, impl="reference")
        assert listed(*found) == listed(*expected)


@pytest.mark.gpu
def test_steps_that_grow_repeat_their_launches() -> None:
    tensors, options = inputs((2, 8, 2, 3000, 64, 24, 32, 64), torch.bfloat16, "cuda")
    query, key, *rest = tensors
    key.nan_to_num_()
    options |= {"lengths": None, "starts": None}
    for tokens in (1800, 1801, 1802, 2050, 3000):
        given = (query, key[:, :, :tokens], *rest)
        found = select_blocks(*given, **options)
        assert listed(*found) == listed(*select_blocks(*given, **options, impl="reference"))
