from __future__ import annotations

import math

import pytest
import torch

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.block_selection import (
    LineWeights,
    covered_mass,
    head_blocks,
    js_distances,
    list_blocks,
    select_blocks,
    smooth_maps,
    vertical_slash_blocks,
)
from shareprefill.runtime.ops.blocks import BlockLists, causal_blocks, count_causal_blocks
from tests.support.maps import geometry, random_maps

IMPLS = ["reference", pytest.param("triton", marks=pytest.mark.interpreter)]
# (n_query, n_key, block size)
SHAPES = [(1, 1, 16), (64, 64, 16), (100, 120, 32), (50, 113, 16), (7, 700, 128), (40, 5000, 16)]


def smallest_cover(row: list[float], gamma: float) -> set[int]:
    """By the definition: take the largest block, the leftmost of equals, until gamma is reached."""
    taken: set[int] = set()
    for place in sorted(range(len(row)), key=lambda place: -row[place]):
        if math.fsum(row[other] for other in taken) >= gamma - 1e-6 or row[place] == 0:
            break
        taken.add(place)
    return taken


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
@pytest.mark.parametrize("levels", [0, 64])
def test_selected_blocks_are_the_smallest_cover(
    shape: tuple[int, int, int], levels: int, impl: str
) -> None:
    maps = random_maps(2, shape, levels)
    gamma = torch.tensor([0.9, 0.25])
    chosen = select_blocks(maps, gamma, **geometry(shape), impl=impl)
    assert chosen.dtype == torch.bool
    for one, pattern, limit in zip(maps, chosen, gamma.tolist(), strict=True):
        for row, taken in zip(one.tolist(), pattern.tolist(), strict=True):
            assert {place for place, is_in in enumerate(taken) if is_in} == smallest_cover(
                row, limit
            )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("gamma", "taken"), [(0.5, [0]), (0.75, [0, 1]), (1.0, [0, 1, 2])])
def test_a_sum_that_is_gamma_is_enough(gamma: float, taken: list[int], impl: str) -> None:
    masses, limit = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([gamma])
    sizes = {"n_query": 16, "n_key": 48, "block_size": 16, "impl": impl}
    chosen = select_blocks(masses[None, None], limit, **sizes)
    assert chosen[0, 0].nonzero()[:, 0].tolist() == taken
    diagonal = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    lines = vertical_slash_blocks(masses[None], diagonal, limit, **sizes)
    first_alone = vertical_slash_blocks(torch.eye(3)[:1], diagonal, limit, **sizes)
    assert lines[0, 0].tolist() == (first_alone | chosen)[0, 0].tolist()


@pytest.mark.parametrize("impl", IMPLS)
def test_sink_and_local_blocks_are_always_read(impl: str) -> None:
    shape = (50, 113, 16)
    nothing = torch.zeros(1, 4, 8)
    options = {"sink_blocks": 1, "local_blocks": 2, "impl": impl}
    chosen = select_blocks(nothing, torch.tensor([0.9]), **geometry(shape), **options)
    # The first rows of the query blocks lie in key blocks 3, 4, 5 and 6, their last rows in
    # 4, 5, 6 and 7.
    wanted = [
        [1, 0, 1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 1, 1, 0, 0],
        [1, 0, 0, 0, 1, 1, 1, 0],
        [1, 0, 0, 0, 0, 1, 1, 1],
    ]
    assert chosen[0].int().tolist() == wanted
    profiles = torch.zeros(1, 8), torch.zeros(1, 9)
    same = vertical_slash_blocks(*profiles, torch.tensor([0.9]), **geometry(shape), **options)
    assert torch.equal(same, chosen)


@pytest.mark.parametrize("impl", IMPLS)
def test_mass_that_is_not_causal_is_ignored(impl: str) -> None:
    maps = torch.tensor([[[0.5, 0.9], [0.5, 0.25]]])
    chosen = select_blocks(
        maps, torch.tensor([0.4]), n_query=32, n_key=32, block_size=16, impl=impl
    )
    assert chosen.int().tolist() == [[[1, 0], [1, 0]]]


@pytest.mark.parametrize("impl", IMPLS)
def test_patterns_are_written_where_they_are_wanted(impl: str) -> None:
    shape = (50, 113, 16)
    maps, profiles = random_maps(2, shape), (torch.rand(2, 8), torch.rand(2, 9))
    gamma, options = torch.tensor([0.9, 0.4]), geometry(shape) | {"impl": impl}
    room = torch.ones(6, 4, 8, dtype=torch.bool)
    assert select_blocks(maps, gamma, **options, out=room[1:3]).data_ptr() == room[1].data_ptr()
    vertical_slash_blocks(*profiles, gamma, **options, out=room[3:5])
    assert torch.equal(room[1:3], select_blocks(maps, gamma, **options))
    assert torch.equal(room[3:5], vertical_slash_blocks(*profiles, gamma, **options))
    assert room[0].all()
    assert room[5].all()


def assert_covers_and_no_more(
    maps: torch.Tensor, gamma: torch.Tensor, chosen: torch.Tensor
) -> None:
    """In float64; sums of float32 values in another order differ by rounding."""
    values, order = maps.double().sort(dim=-1, descending=True, stable=True)
    before = torch.empty_like(values).scatter_(-1, order, values.cumsum(-1) - values)
    limit, rounding = gamma[:, None, None].double() - 1e-6, 2e-6
    assert not (~chosen & (before < limit - rounding) & (maps > 0)).any()
    assert not (chosen & (before > limit + rounding)).any()
    assert not (chosen & (maps == 0)).any()


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_selects_what_the_reference_selects(shape: tuple[int, int, int]) -> None:
    maps = random_maps(2, shape, 1024)
    gamma = torch.tensor([0.5, 1.0])
    options = geometry(shape) | {"sink_blocks": 1, "local_blocks": 1}
    wanted = select_blocks(maps, gamma, **options, impl="reference")
    assert torch.equal(select_blocks(maps, gamma, **options, impl="triton"), wanted)


@pytest.mark.interpreter
def test_triton_covers_gamma_in_long_rows() -> None:
    shape, gamma = (20, 5000, 16), torch.tensor([0.95, 1.0])
    maps = random_maps(2, shape)
    chosen = select_blocks(maps, gamma, **geometry(shape), impl="triton")
    assert_covers_and_no_more(maps, gamma, chosen)


@pytest.mark.parametrize("impl", IMPLS)
def test_vertical_and_slash_blocks_by_their_definition(impl: str) -> None:
    n_query, n_key, size = shape = (50, 113, 16)
    vertical, slash = torch.rand(3, 8) ** 6, torch.rand(3, 9) ** 6
    vertical, slash = (profile / profile.sum(-1, keepdim=True) for profile in (vertical, slash))
    gamma = torch.tensor([0.9, 0.5, 0.3])
    chosen = vertical_slash_blocks(vertical, slash, gamma, **geometry(shape), impl=impl)
    for head in range(3):
        columns = smallest_cover(vertical[head].tolist(), float(gamma[head]))
        distances = smallest_cover(slash[head].tolist(), float(gamma[head]))
        for row in range(4):
            start = row * size + n_key - n_query
            ends = start // size, (min(start + size, n_key) - 1) // size
            wanted = [
                block <= ends[1]
                and (block in columns or any(end - block in distances for end in ends))
                for block in range(8)
            ]
            assert chosen[head, row].tolist() == wanted


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_vertical_slash_blocks_equal_the_reference(shape: tuple[int, int, int]) -> None:
    n_k = -(-shape[1] // shape[2])
    profiles = torch.rand(3, n_k).softmax(-1), torch.rand(3, n_k + 1).softmax(-1)
    options = geometry(shape) | {"sink_blocks": 1, "local_blocks": 1}
    both = [
        vertical_slash_blocks(*profiles, torch.tensor([0.9, 0.5, 0.1]), **options, impl=impl)
        for impl in ("reference", "triton")
    ]
    assert torch.equal(*both)


@pytest.mark.parametrize("impl", IMPLS)
def test_distances_of_equal_and_of_disjoint_maps(impl: str) -> None:
    maps = torch.rand(2, 19, 300).softmax(-1)
    far = torch.zeros(2, 19, 300)
    far[:, :, 7] = 1.0
    other = torch.zeros(1, 19, 300)
    other[:, :, 6] = 1.0
    pivots = torch.cat([maps, other])
    index = torch.tensor([1, 0, 2, -1])
    maps = torch.stack([maps[1], maps[0], far[0], far[1]])
    distances = js_distances(maps, pivots, index, impl=impl)
    # Rounding of the sum, 1e-7, has a root of 3e-4.
    limit = math.sqrt(math.log(2))
    wanted = torch.tensor([0.0, 0.0, limit, math.inf])
    torch.testing.assert_close(distances, wanted, atol=1e-3, rtol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_no_number_is_near_nothing_and_covers_nothing(impl: str) -> None:
    maps = torch.rand(3, 5, 7).softmax(-1)
    maps[1, 2, 3] = torch.nan
    index = torch.tensor([0, 1, 1])
    distances = js_distances(maps, maps, index, impl=impl)
    assert distances.isnan().tolist() == [False, True, True]
    assert not (distances[1:] < 1).any()
    nothing = torch.zeros(2, 5, 7, dtype=torch.bool)
    covered = covered_mass(maps, nothing, index, impl=impl)
    assert covered.isnan().tolist() == [False, True, False]


@pytest.mark.interpreter
def test_long_maps_are_measured_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from shareprefill.runtime.ops.block_selection import triton

    shape = (300, 300, 4)
    maps, pivots = random_maps(2, shape), random_maps(2, shape)
    patterns, index = pivots > 0.01, torch.tensor([1, 0])
    wanted = [js_distances(maps, pivots, index), covered_mass(maps, patterns, index)]
    monkeypatch.setattr(triton, "MEASURE_ENTRIES", 40 * 75)
    actual = [
        js_distances(maps, pivots, index, impl="triton"),
        covered_mass(maps, patterns, index, impl="triton"),
    ]
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    # All blocks of rows whose sums are rounded upwards.
    full = torch.full((1, 75, 75), 1 / 75) * (1 + 1e-6)
    assert covered_mass(full, full > 0, index[1:], impl="triton").tolist() == [1.0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_distances_and_coverage_equal_float64(shape: tuple[int, int, int], impl: str) -> None:
    maps, pivots = random_maps(3, shape), random_maps(2, shape)
    index = torch.tensor([1, 0, 1])
    p, q = maps.double(), pivots[index].double()
    middle = (p + q) / 2
    kl = [torch.xlogy(x, x / middle.clamp(min=1e-300)).sum(-1) for x in (p, q)]
    wanted = ((kl[0] + kl[1]) / 2).clamp(min=0).sqrt().mean(-1).float()
    actual = js_distances(maps, pivots, index, impl=impl)
    torch.testing.assert_close(actual, wanted, atol=1e-3 if shape[1] == 1 else 1e-5, rtol=1e-5)

    patterns = torch.rand(2, *maps.shape[1:]) < 0.4
    index = torch.tensor([1, -1, 0])
    wanted = torch.stack(
        [(maps[0] * patterns[1]).sum(-1), maps[1].sum(-1), (maps[2] * patterns[0]).sum(-1)]
    )
    actual = covered_mass(maps, patterns, index, impl=impl)
    torch.testing.assert_close(actual, wanted.mean(-1), atol=1e-6, rtol=1e-6)


def lists_by_hand(lists: BlockLists, head: int, n_q: int) -> list[list[int]]:
    pattern, offsets = int(lists.head_to_list[head]), lists.offsets.tolist()
    rows = range(pattern * n_q, (pattern + 1) * n_q)
    return [lists.indices[offsets[row] : offsets[row + 1]].tolist() for row in rows]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("max_density", [None, 0.5])
def test_lists_hold_every_causal_block(
    shape: tuple[int, int, int], max_density: float | None, impl: str
) -> None:
    n_query, n_key, size = shape
    causal = causal_blocks(n_query, n_key - n_query, size)
    n_q, n_k = causal.shape
    share = torch.tensor([0.2, 0.9, 0.4, 0.3])
    bitmap = torch.rand(4, n_q, n_k) < share[:, None, None]
    pattern = torch.tensor([3, -1, 1, 0, 3, 1, 0] + ([] if max_density is None else [4]))
    lists = list_blocks(
        bitmap, pattern, size, n_query=n_query, n_key=n_key, max_density=max_density, impl=impl
    )
    lists.validate()
    assert (lists.n_q, lists.n_k, lists.block_size) == (n_q, n_k, size)
    assert lists.n_patterns == (4 if max_density is None else 5)
    most = None if max_density is None else int(max_density * int(causal.sum()))
    counts = lists.head_counts()
    for head, number in enumerate(pattern.tolist()):
        if number < 0:
            assert lists.head_to_list[head] == -1
            assert counts[head] == 0
            continue
        blocks = causal if number == 4 else bitmap[number] & causal
        if most is not None and int(blocks.sum()) > most:
            assert lists.head_to_list[head] == 4
            blocks = causal
        wanted = [row.nonzero()[:, 0].tolist() for row in blocks]
        assert lists_by_hand(lists, head, n_q) == wanted
        assert counts[head] == blocks.sum()
    assert not lists.to_bitmap()[2].any()  # no head points there


@pytest.mark.parametrize("impl", IMPLS)
def test_a_pattern_over_the_bound_becomes_the_dense_list(impl: str) -> None:
    bitmap = torch.zeros(2, 3, 3, dtype=torch.bool)
    bitmap[0] = True
    bitmap[1, :, 0] = True
    options = {"n_query": 40, "n_key": 40, "max_density": 0.5, "impl": impl}
    lists = list_blocks(bitmap, torch.tensor([1, 0]), 16, **options)
    assert lists.head_to_list.tolist() == [1, 2]
    counted = lists.totals()
    assert counted.head_counts().tolist() == [3, 6]
    assert counted.indices.untyped_storage().nbytes() == 0
    assert lists_by_hand(lists, 0, 3) == [[0], [0], [0]]
    assert lists_by_hand(lists, 1, 3) == [[0], [0, 1], [0, 1, 2]]
    # Without a head that needs it, the dense list is empty.
    lists = list_blocks(bitmap, torch.tensor([1, -1]), 16, **options)
    assert lists.offsets.tolist() == [0, 0, 0, 0, 1, 2, 3, 3, 3, 3]


@pytest.mark.parametrize("impl", IMPLS)
def test_lists_without_patterns_or_heads(impl: str) -> None:
    options = {"n_query": 40, "n_key": 40, "impl": impl}
    none = torch.zeros(0, 3, 3, dtype=torch.bool)
    lists = list_blocks(none, torch.tensor([-1, -1]), 16, **options)
    lists.validate()
    assert lists.head_to_list.tolist() == [-1, -1]
    assert lists.head_counts().tolist() == [0, 0]
    dense = list_blocks(none, torch.tensor([-1, 0]), 16, max_density=0.5, **options)
    dense.validate()
    assert lists_by_hand(dense, 1, 3) == [[0], [0, 1], [0, 1, 2]]
    headless = list_blocks(
        torch.ones(2, 3, 3, dtype=torch.bool), torch.zeros(0, dtype=torch.int64), 16, **options
    )
    headless.validate()
    assert not headless.to_bitmap().any()


@pytest.mark.interpreter
def test_room_is_made_for_the_bound_and_no_more() -> None:
    bitmap = torch.rand(3, 8, 8) < 0.2
    options = {"n_query": 128, "n_key": 128, "impl": "triton"}
    most = count_causal_blocks(128, 0, 16)
    pattern = torch.tensor([0, 1])
    assert len(list_blocks(bitmap, pattern, 16, **options).indices) == 2 * most
    bounded = list_blocks(bitmap, pattern, 16, max_density=0.25, **options)
    assert len(bounded.indices) == 2 * (most // 4) + most


def test_user_errors_say_what_came() -> None:
    maps, gamma = torch.rand(2, 3, 3), torch.tensor([0.9, 0.9])
    index = torch.tensor([0, 1])
    sizes = {"n_query": 40, "n_key": 40, "block_size": 16}
    lists = {"n_query": 40, "n_key": 40}
    bitmap = maps > 0.5
    cases = [
        (lambda: select_blocks(maps.double(), gamma, **sizes), r"maps must be float32 \[S"),
        (lambda: select_blocks(maps, gamma[:1], **sizes), r"gamma must be float32 \[2\]"),
        (
            lambda: select_blocks(maps, gamma, **sizes | {"n_key": 60}),
            r"maps must be float32 \[S, 3, 4\]",
        ),
        (lambda: select_blocks(maps, gamma, **sizes | {"n_query": 41}), "1 <= n_query <= n_key"),
        (lambda: select_blocks(maps, gamma, **sizes, sink_blocks=-1), "at least 0, got -1, 0"),
        (lambda: select_blocks(maps, gamma, **sizes, impl="fast"), "impl must be one of"),
        (lambda: select_blocks(maps, gamma, **sizes, out=maps), r"out must be bool \[2, 3, 3\]"),
        (
            lambda: select_blocks(maps, gamma, **sizes, out=bitmap.mT),
            "out must be contiguous",
        ),
        (
            lambda: vertical_slash_blocks(
                maps[0], torch.rand(3, 4), torch.rand(3), **sizes, out=bitmap
            ),
            r"out must be bool \[3, 3, 3\]",
        ),
        (
            lambda: vertical_slash_blocks(maps[0], maps[0], gamma, **sizes),
            r"slash must be float32 \[3, 4\]",
        ),
        (lambda: js_distances(maps, maps[:, :2], index), r"pivots must be float32 \[P, 3, 3\]"),
        (lambda: js_distances(maps, maps, index + 1), "index must lie below 2, got 2"),
        (lambda: js_distances(maps, maps, index.int()), r"index must be int64 \[2\]"),
        (lambda: covered_mass(maps, maps, index), r"patterns must be bool \[P"),
        (lambda: list_blocks(bitmap, gamma, 16, **lists), r"head_to_list must be integers \[H\]"),
        (lambda: list_blocks(bitmap, index, 16, **lists, max_density=0.0), r"lie in \(0, 1\]"),
        (
            lambda: list_blocks(bitmap, index + 1, 16, **lists),
            "head_to_list must lie below 2, got 2",
        ),
        (
            lambda: list_blocks(
                torch.zeros(1, 1, 1, dtype=torch.bool).expand(99, 9999, 9999),
                torch.arange(99),
                16,
                n_query=16 * 9999,
                n_key=16 * 9999,
            ),
            "offsets hold 2147483647",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            call()


GPU_SHAPES = [(8229, 8229, 128), (777, 131_072, 128), (40_000, 40_000, 32)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_compiled_selection_covers_gamma_and_no_more(shape: tuple[int, int, int]) -> None:
    maps = random_maps(3, shape, device="cuda")
    gamma = torch.tensor([0.95, 0.5, 1.0], device="cuda")
    chosen = select_blocks(maps, gamma, **geometry(shape))
    assert_covers_and_no_more(maps, gamma, chosen)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_compiled_versions_equal_the_reference(shape: tuple[int, int, int]) -> None:
    maps, pivots = (random_maps(n, shape, 1024, device="cuda") for n in (4, 2))
    index = torch.tensor([1, 0, -1, 1], device="cuda")
    gamma = torch.tensor([0.9, 0.5, 0.3, 0.05], device="cuda")
    options = geometry(shape) | {"sink_blocks": 1, "local_blocks": 2}
    profiles = [torch.rand(4, maps.shape[2] + more, device="cuda") ** 9 for more in (0, 1)]
    results = []
    for impl in ("reference", "triton"):
        chosen = select_blocks(maps, gamma, **options, impl=impl)
        lines = vertical_slash_blocks(*profiles, gamma * 50, **options, impl=impl)
        heads = torch.tensor([0, 3, -1, 1, 3, 4], device="cuda")
        sizes = {"n_query": shape[0], "n_key": shape[1], "max_density": 0.3, "impl": impl}
        lists = list_blocks(chosen, heads, shape[2], **sizes)
        lists.validate()
        measures = [
            js_distances(maps, pivots, index, impl=impl),
            covered_mass(maps, chosen, index, impl=impl),
        ]
        results.append((chosen, lines, lists.to_bitmap(), lists.head_to_list, measures))
    wanted, actual = results
    assert torch.equal(actual[0], wanted[0])
    differing = (actual[1] != wanted[1]).float().mean()
    assert float(differing) < 1e-3  # the profiles' sums are rounded
    assert torch.equal(actual[2], wanted[2])
    assert torch.equal(actual[3], wanted[3])
    for one, other in zip(actual[4], wanted[4], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("has_index", [False, True])
def test_long_prompts_compile_nothing_anew(
    has_index: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    def choose(n_tokens: int, n_patterns: int) -> None:
        shape = (n_tokens, n_tokens, 128)
        maps = torch.rand(n_patterns, n_tokens // 128, n_tokens // 128, device="cuda")
        gamma = torch.full((n_patterns,), 0.5, device="cuda")
        index = torch.arange(n_patterns, device="cuda") if has_index else None
        head_blocks(maps, gamma, index, **geometry(shape))

    choose(2048, 2)
    compiled = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **call: compiled.append(call)
    )
    for n_tokens, n_patterns in ((4096, 1), (65536, 1), (65536 + 128, 3), (131072, 2)):
        choose(n_tokens, n_patterns)
    assert not compiled


@pytest.mark.gpu
def test_a_graph_of_all_functions_can_be_captured() -> None:
    shape = (4000, 4100, 128)
    maps = random_maps(4, shape, device="cuda")
    gamma = torch.full((4,), 0.8, device="cuda")
    index = torch.tensor([1, 0, -1, 1], device="cuda")

    def choose() -> list[torch.Tensor]:
        chosen = select_blocks(maps, gamma, **geometry(shape))
        sizes = {"n_query": shape[0], "n_key": shape[1], "max_density": 0.5}
        lists = list_blocks(chosen, index, shape[2], **sizes)
        profiles = maps[:, -1].contiguous(), torch.nn.functional.pad(maps[:, -1], (0, 1))
        smoothed = smooth_maps(
            maps, LineWeights(itself=1, diagonal1=1, diagonal=1), **geometry(shape)
        )
        return [
            chosen,
            smoothed,
            *head_blocks(smoothed, gamma, index, **geometry(shape), local_blocks=1),
            vertical_slash_blocks(*profiles, gamma, **geometry(shape)),
            js_distances(maps, maps, index),
            covered_mass(maps, chosen, index),
            *(lists.offsets, lists.indices[: 4 * 32], lists.head_to_list),
        ]

    torch.cuda.set_sync_debug_mode("error")
    try:
        choose()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = choose()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    maps.copy_(random_maps(4, shape, device="cuda"))
    graph.replay()
    for one, other in zip(captured, choose(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
