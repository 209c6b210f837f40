"""What heads read: decided by checks, read from two bitmaps, and by rows that are numbers."""

from __future__ import annotations

import pytest
import torch

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.block_selection import (
    LineWeights,
    SparseGuard,
    check_heads,
    covered_mass,
    head_blocks,
    list_blocks,
    select_blocks,
    smooth_maps,
    sparse_heads,
    vertical_slash_blocks,
)
from tests.support.maps import Shape, geometry, random_maps

SHAPES = [(64, 64, 16), (100, 120, 32), (50, 113, 16), (40, 3000, 16)]
# Kernels in the interpreter, and compiled ones.
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interpreter),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def checks(device: str, n_checks: int, n_entries: int) -> dict[str, torch.Tensor]:
    """Checks of one in three query blocks, one of a map that is no number."""
    maps = random_maps(n_checks, (160, 160, 16), device=device)
    rows = torch.tensor([0, 3, 6, 9], device=device)
    some = maps[:, rows].contiguous()
    some[3, 1, 0] = torch.nan
    least = torch.rand(n_checks, device=device)
    pattern, check_of = (
        torch.randint(below, (count,), device=device)
        for below, count in ((5, n_checks), (n_checks, n_entries))
    )
    numbers = [torch.randint(-1, 90, (n_entries,), device=device) for _ in range(2)]
    return {
        "maps": some,
        "patterns": random_maps(5, (160, 160, 16), device=device) > 0.05,
        "pattern_of_head": pattern,
        "rows": rows,
        "least": least,
        "is_finite": torch.rand(5, device=device) < 0.7,
        "check_of": check_of,
        "on_pass": numbers[0],
        "on_fail": numbers[1],
    }


@pytest.mark.parametrize("device", DEVICES)
def test_checks_decide_as_the_reference(device: str) -> None:
    given = checks(device, 37, 300)
    decided, mass, found = check_heads(**given, impl="triton")
    wanted, exact, wanted_found = check_heads(**given, impl="reference")
    torch.testing.assert_close(mass, exact, equal_nan=True)
    assert torch.equal(found, wanted_found)
    # Rounding decides none of them.
    assert not ((exact - given["least"]).abs() < 1e-5).any()
    assert torch.equal(decided, wanted)


def test_the_mass_of_a_check_is_that_of_the_rows_alone() -> None:
    given = checks("cpu", 9, 20)
    rows = given["rows"]
    _, mass, found = check_heads(**given)
    patterns = given["patterns"][:, rows].contiguous()
    wanted = covered_mass(given["maps"], patterns, given["pattern_of_head"])
    assert torch.equal(mass.nan_to_num(-1), wanted.nan_to_num(-1))
    assert torch.equal(found, given["is_finite"][given["pattern_of_head"]])


def test_a_check_passes_from_the_least_mass_on() -> None:
    maps = torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]], [[torch.nan, 0.5]]])
    zeros, entries = torch.tensor([0, 0, 0]), [torch.tensor(n) for n in ([7, 8, 9], [-1, -2, -3])]
    sides = torch.tensor([[[True, False]], [[True, False]]])
    rest = (torch.full((3,), 0.5), torch.tensor([True, False]), torch.tensor([0, 1, 2]), *entries)
    decided, mass, _ = check_heads(maps, sides, zeros, zeros[:1], *rest)
    assert decided.tolist() == [7, -2, -3]
    assert mass[:2].tolist() == [0.5, 0.25]
    decided, _, found = check_heads(maps, sides, zeros + 1, zeros[:1], *rest)
    assert decided.tolist() == [-1, -2, -3]
    assert found.tolist() == [False] * 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_small", [False, True])
@pytest.mark.parametrize("line", [0.0, 0.2])
def test_blocks_of_smoothed_maps_are_chosen_in_one_step(
    shape: Shape, is_small: bool, line: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact sums, so exactly the same."""
    from shareprefill.runtime.ops.block_selection import triton

    monkeypatch.setattr(triton, "SMALL_MAP", 2**40 if is_small else 0)
    maps = random_maps(3, shape, 1024, device=device)
    weights = LineWeights(itself=0.5, vertical1=0.25, diagonal2=0.25, column=line, diagonal=line)
    gamma = torch.tensor([0.5, 0.95, 1.0, 0.7], device=device)
    index = torch.tensor([1, 1, 0, -1], device=device)
    options = geometry(shape) | {"sink_blocks": 1, "local_blocks": 2}
    smoothed = smooth_maps(maps, weights, **geometry(shape), impl="triton")
    wanted, _ = head_blocks(smoothed, gamma, index, **options, impl="triton")
    chosen, finite = torch.ones_like(wanted), torch.zeros(4, dtype=torch.bool, device=device)
    places = {"out": chosen, "finite": finite}
    head_blocks(maps, gamma, index, weights=weights, **options, **places, impl="triton")
    assert torch.equal(chosen, wanted)
    assert finite.all()
    exact, _ = head_blocks(maps, gamma, index, weights=weights, **options, impl="reference")
    assert (chosen != exact).float().mean() < 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_flags", [1, 600])
@pytest.mark.parametrize("max_density", [0.3, 1.0])
def test_heads_of_unset_flags_read_every_causal_block(
    max_density: float, n_flags: int, device: str
) -> None:
    shape = (100, 120, 16)
    bitmap = random_maps(6, shape, device=device) > 0.2
    bitmap[1] = True
    # Of the patterns 2 to 5; nobody reads the last one.
    finite = torch.ones(4, n_flags, dtype=torch.bool, device=device)
    finite[1, -1] = finite[3, 0] = False
    heads = torch.tensor([0, 4, 1, -1, 3, 2, 3], device=device)
    options = geometry(shape) | {"max_density": max_density}
    redirected = torch.where(heads == 3, len(bitmap), heads)
    for flags, read in ((finite, redirected), (torch.ones_like(finite), heads)):
        wanted = list_blocks(bitmap, read, **options)
        for impl in ("reference", "triton"):
            found = list_blocks(bitmap, heads, **options, finite=flags, first=2, impl=impl)
            found.validate()
            assert torch.equal(found.head_to_list, wanted.head_to_list)
            assert torch.equal(found.to_bitmap(), wanted.to_bitmap())
            assert torch.equal(found.totals().offsets, wanted.offsets[:: wanted.n_q])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_k", [1, 37, 700])
def test_sparse_heads_are_those_of_the_reference(n_k: int, device: str) -> None:
    vertical = torch.rand(5, n_k, device=device) ** torch.tensor([[1], [4], [9], [30], [1]]).to(
        device
    )
    vertical /= vertical.sum(1, keepdim=True)
    # A head that was not asked for, and one whose attention is no number.
    vertical[0], vertical[4, 0] = 0, torch.nan
    # Patterns 3 to 7 are read by five heads, and of the entries asked for the five from 14 on.
    read = torch.tensor([5, 0, 3, 20, 7, -1, 4, 6, 2, 8, 9], device=device)
    requested = torch.cat([read, torch.randint(0, 11, (150,), device=device)])
    guard = SparseGuard(n_heads=11, delta=0.3, first=3, otherwise=40, place=14)
    wanted = sparse_heads(vertical, requested, guard, impl="reference")
    found = sparse_heads(vertical, requested, guard, impl="triton")
    assert torch.equal(found, wanted)
    moved, asked = wanted[:11], wanted[14:19]
    assert torch.equal(moved[4:5], torch.tensor([44], device=device))
    assert torch.equal(asked[4:], requested[18:19])
    assert int(asked[0]) == -1
    rest = [entry for entry in range(11, 161) if not 14 <= entry < 19]
    assert torch.equal(wanted[rest], requested[rest])
    if n_k > 1:
        assert (int(asked[3]), int(moved[7])) == (-1, 6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("max_density", [None, 0.4])
def test_lists_of_two_bitmaps_are_those_of_one(
    shape: Shape, max_density: float | None, device: str
) -> None:
    shared, own = (random_maps(n, shape, device=device) > 0.02 for n in (4, 3))
    source = torch.tensor([2, 0], device=device)
    heads = torch.tensor([0, 4, 1, -1, 3, 0, 4], device=device)
    options = geometry(shape) | {"max_density": max_density}
    whole = torch.cat([shared[source], own])
    wanted = list_blocks(whole, heads, **options, impl="reference")
    for impl in ("reference", "triton"):
        options["impl"] = impl
        found = list_blocks(own, heads, **options, shared=shared, source=source)
        found.validate()
        assert torch.equal(found.to_bitmap(), wanted.to_bitmap())
        assert torch.equal(found.head_to_list, wanted.head_to_list)
        totals = found.totals()
        assert torch.equal(totals.offsets, wanted.offsets[:: wanted.n_q])
        assert torch.equal(totals.head_counts(), wanted.head_counts())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_short", [True, False])
@pytest.mark.parametrize("max_density", [None, 0.3])
def test_lists_of_many_rows_are_those_of_the_reference(
    max_density: float | None, is_short: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shareprefill.runtime.ops.block_selection import triton as launcher

    # Rows of several programs: of one tile each, and of more, at a length that is borne.
    monkeypatch.setattr(launcher, "SHORT_LISTS", 256 if is_short else 1)
    monkeypatch.setattr(launcher, "LIST_TILES", 2)
    shape = (600, 635, 16)
    bitmap = random_maps(5, shape, device=device) > 0.01
    bitmap[1], bitmap[3] = True, False
    heads = torch.tensor([0, 4, 1, -1, 3, 0, 2], device=device)
    options = geometry(shape) | {"max_density": max_density}
    wanted = list_blocks(bitmap, heads, **options, impl="reference")
    found = list_blocks(bitmap, heads, **options, impl="triton")
    found.validate()
    assert torch.equal(found.offsets, wanted.offsets)
    count = int(wanted.offsets[-1])
    assert torch.equal(found.indices[:count], wanted.indices[:count])
    assert torch.equal(found.head_to_list, wanted.head_to_list)
    assert torch.equal(found.totals().offsets, wanted.offsets[:: wanted.n_q])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_no_number_is_told(shape: Shape, device: str) -> None:
    maps, options = random_maps(4, shape, 1024, device=device), geometry(shape)
    maps[1, -1, 0], maps[3, 0, 0] = torch.nan, torch.inf
    gamma = torch.full((4,), 0.9, device=device)
    profiles = [torch.rand(4, maps.shape[2] + more, device=device) for more in (0, 1)]
    profiles[0][2, 0] = torch.nan
    found = []
    for impl in ("reference", "triton"):
        rows = torch.rand(maps.shape[:2], device=device) < 0.5
        heads = torch.rand(4, device=device) < 0.5
        chosen = select_blocks(maps, gamma, finite=rows, **options, impl=impl)
        lines = vertical_slash_blocks(*profiles, gamma, finite=heads, **options, impl=impl)
        found.append((rows, heads, lines[2], chosen[[1, 3], [-1, 0]]))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    rows, heads, lines, chosen = found[0]
    assert rows.all(1).tolist() == [True, False, True, False]
    assert heads.tolist() == [True, True, False, True]
    every = select_blocks(torch.ones_like(maps[:1]), gamma[:1] * 1e9, **options)[0]
    assert torch.equal(lines, every)
    assert torch.equal(chosen, every[[-1, 0]])


def test_two_bitmaps_that_do_not_belong_together_are_refused() -> None:
    own, heads = torch.zeros(1, 2, 2, dtype=torch.bool), torch.tensor([0])
    source, sizes = torch.tensor([3]), {"n_query": 8, "n_key": 8, "block_size": 4}
    with pytest.raises(ConfigError, match="give shared and source, or neither"):
        list_blocks(own, heads, **sizes, source=source)
    with pytest.raises(ConfigError, match="source must lie below 1, got 3"):
        list_blocks(own, heads, **sizes, shared=own, source=source)
    with pytest.raises(ConfigError, match=r"shared must be bool \[N, 2, 2\]"):
        list_blocks(own, heads, **sizes, shared=own.int(), source=source)
    flags = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ConfigError, match="finite is of 2 patterns from 0 on, there are 1"):
        list_blocks(own, heads, **sizes, finite=flags, max_density=0.5)
    with pytest.raises(ConfigError, match="finite needs max_density"):
        list_blocks(own, heads, **sizes, finite=flags[:1])
    guard = SparseGuard(n_heads=1, delta=0.3, first=0, otherwise=1, place=3)
    with pytest.raises(ConfigError, match="place must lie between 1 heads and the last 2 of 4"):
        sparse_heads(torch.ones(2, 2), torch.zeros(4, dtype=torch.int64), guard)
