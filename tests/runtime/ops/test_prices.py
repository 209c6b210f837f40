from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.block_selection import LineWeights, priced_blocks, smooth_maps
from shareprefill.runtime.ops.blocks import always_blocks, causal_blocks
from tests.support.maps import Shape, geometry, random_maps

SHAPES = [(1, 1, 16), (100, 120, 32), (50, 113, 16), (7, 700, 128)]
# More columns, and more rows, than a tile has.
WIDE, HIGH = (20, 5000, 16), (1040, 1040, 16)
GPU_SHAPES = [(8229, 8229, 128), (777, 131_072, 128), (40_000, 40_000, 32), (131_072, 131_072, 128)]
WEIGHTS = LineWeights(itself=0.5, vertical1=0.3, diagonal2=0.1, column=0.05, diagonal=0.05)
READS = {"sink_blocks": 1, "local_blocks": 2}
# What a step of a mass's last bit, and sums in another order, may change of a block's worth.
STEP = 2.0**-12


@pytest.fixture(
    params=[
        "reference",
        *(pytest.param(n, marks=pytest.mark.interpreter) for n in ("triton", "triton, strips")),
    ]
)
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The `impl` of `priced_blocks`, whose kernel may divide small maps, too, into strips."""
    if request.param == "triton, strips":
        divide(monkeypatch, is_small=False)
    return request.param.split(",")[0]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """New tensors hold NaN, and the largest number where they are of integers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def divide(monkeypatch: pytest.MonkeyPatch, *, is_small: bool) -> None:
    from shareprefill.runtime.ops.block_selection import triton

    monkeypatch.setattr(triton, "SMALL_MAP", 2**40 if is_small else 0)


def worths(maps: torch.Tensor, always: torch.Tensor, near: float = 0.0) -> torch.Tensor:
    """What every block is worth, entry by entry of its row, float64 `[S, n_q, n_k]`.

    Blocks that are larger by a share of `near` count as no larger.
    """
    maps = maps.double()
    shares = maps / maps.sum(-1, keepdim=True).clamp_min(1e-300)
    shares = shares.masked_fill(always, 0)
    found = torch.zeros_like(shares)
    for j in range(maps.shape[-1]):
        own = shares[..., j, None]
        found[..., j] = (own * shares.masked_fill(shares > own * (1 + near), 0)).sum(-1)
    return found


def assert_worthy(
    maps: torch.Tensor, price: torch.Tensor, chosen: torch.Tensor, shape: Shape, **reads: int
) -> None:
    """All that is worth clearly more, and nothing that is worth clearly less."""
    n_query, n_key, size = shape
    offset = n_key - n_query
    always = always_blocks(n_query, offset, size, **reads, device=maps.device)
    limit = price.double()[:, None, None]
    assert chosen[worths(maps, always) > limit * (1 + STEP)].all()
    # Of blocks that are near in mass none is larger than the others.
    assert not (chosen & ~always)[worths(maps, always, STEP) < limit * (1 - STEP)].any()
    causal = causal_blocks(n_query, offset, size, device=maps.device)
    assert (chosen & always == always & causal).all()
    assert not (chosen & ~causal).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_are_worth_their_price(shape: Shape, impl: str) -> None:
    maps = random_maps(4, shape)
    price = torch.tensor([1e-2, 1e-3, 1e-4, 1e-6])
    for reads in ({"sink_blocks": 0, "local_blocks": 0}, READS):
        chosen, is_finite = priced_blocks(maps, price, **geometry(shape), **reads, impl=impl)
        assert_worthy(maps, price, chosen, shape, **reads)
        assert is_finite.all()


def test_a_query_block_that_lacks_more_reads_smaller_blocks(impl: str) -> None:
    """Each of the first row's small blocks has as much mass as the second's, which lacks less."""
    rows = [[0.5, 0.1, 0.1, 0.1, 0.1, 0.1], [0.9, 0.1, 0.0, 0.0, 0.0, 0.0]]
    maps = torch.tensor([rows])
    sizes = {"n_query": 2, "n_key": 6, "block_size": 1, "impl": impl}
    # All is causal to the second row, and all but the last to the first.
    chosen, _ = priced_blocks(maps, torch.tensor([0.02]), **sizes)
    assert chosen[0].int().tolist() == [[1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]]
    # Without what is always read, a row lacks less.
    chosen, _ = priced_blocks(maps, torch.tensor([0.3]), **sizes)
    assert chosen[0, 0].int().tolist() == [1, 0, 0, 0, 0, 0]
    chosen, _ = priced_blocks(maps, torch.tensor([0.06]), **sizes, sink_blocks=1)
    assert chosen[0].int().tolist() == [[1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]


def test_a_price_of_nothing_takes_all_that_has_mass(impl: str) -> None:
    shape = (100, 120, 32)
    maps = random_maps(2, shape, 64)
    chosen, _ = priced_blocks(maps, torch.zeros(2), **geometry(shape), impl=impl)
    assert torch.equal(chosen, maps > 0)


def test_masses_of_any_scale_and_equal_ones(impl: str) -> None:
    maps = torch.tensor([[[0.5, 0.25, 0.125, 0.125]]])
    sizes = {"n_query": 1, "n_key": 4, "block_size": 1, "impl": impl}
    index = torch.zeros(4, dtype=torch.int64)
    for scale in (1.0, 1e-30, 1e30):
        found, _ = priced_blocks(maps * scale, torch.tensor([0.4, 0.12, 0.03, 0.6]), index, **sizes)
        assert found.sum((1, 2)).tolist() == [1, 2, 4, 0]


def test_only_what_is_always_read_of_maps_without_mass(impl: str) -> None:
    shape, index = (50, 113, 16), torch.tensor([0, -1])
    always = always_blocks(50, 63, 16, **READS)
    for maps in (torch.zeros(1, 4, 8), torch.zeros(0, 4, 8)):
        some = index if len(maps) else index[1:]
        prices = torch.full(some.shape, 1e-3)
        chosen, is_finite = priced_blocks(
            maps, prices, some, **geometry(shape), **READS, impl=impl, weights=WEIGHTS
        )
        assert (chosen == always & causal_blocks(50, 63, 16)).all()
        assert is_finite.all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "smoothed"])
def test_a_map_that_is_no_number_takes_every_causal_block(
    bad: float, weights: LineWeights | None, impl: str
) -> None:
    shape = (50, 113, 16)
    maps = random_maps(3, shape)
    whole = maps.clone()
    maps[1, 2, 3] = bad
    # Outside the causal blocks nothing is looked at.
    maps[2, 0, 7] = bad
    price, options = torch.tensor([1e-2, 1e-3, 1e-3]), {"weights": weights, **geometry(shape)}
    chosen, is_finite = priced_blocks(maps, price, **options, impl=impl)
    assert is_finite.tolist() == [True, False, True]
    assert torch.equal(chosen[1], causal_blocks(50, 63, 16))
    for place in (0, 2):
        wanted, _ = priced_blocks(whole[place, None], price[place, None], **options)
        assert torch.equal(chosen[place], wanted[0])


def check_against_the_reference(shape: Shape, device: str, weights: LineWeights | None) -> None:
    """Several patterns of a map, one of none, one that is no number; places that hold anything."""
    maps = random_maps(3, shape, 1024, device=device)
    maps[2, -1, 0] = torch.nan
    price = torch.tensor([3e-2, 1.1e-3, 2.3e-4, 1.7e-5, 1e-3, 1e-3], device=device)
    index = torch.tensor([1, 1, 0, 1, -1, 2], device=device)
    options: dict[str, Any] = {**geometry(shape), **READS}
    room = torch.ones((7, *maps.shape[1:]), dtype=torch.bool, device=device)
    places = {"out": room[1:], "finite": torch.zeros(7, dtype=torch.bool, device=device)[1:]}
    chosen, finite = priced_blocks(
        maps, price, index, weights=weights, **options, **places, impl="triton"
    )
    assert chosen is places["out"]
    assert finite is places["finite"]
    wanted, is_finite = priced_blocks(
        maps, price, index, weights=weights, **options, impl="reference"
    )
    assert torch.equal(finite, is_finite)
    assert is_finite.tolist() == [True] * 5 + [False]
    if weights is None:
        # The kernel's divisions are not rounded as torch's are: few blocks are near the price.
        assert (chosen != wanted).float().mean() < 1e-4
    whole = maps[:2] if weights is None else smooth_maps(maps[:2], weights, **geometry(shape))
    assert_worthy(whole[index[:4]], price[:4], chosen[:4], shape, **READS)
    assert torch.equal(chosen[4:], wanted[4:])


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("shape", "is_small", "weights"),
    [
        (SHAPES[2], True, None),
        (WIDE, False, WEIGHTS),
        (HIGH, True, WEIGHTS),
    ],
    ids=str,
)
def test_triton_takes_what_the_reference_takes(
    shape: Shape, is_small: bool, weights: LineWeights | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    divide(monkeypatch, is_small=is_small)
    check_against_the_reference(shape, "cpu", weights)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "smoothed"])
def test_compiled_prices_equal_the_reference(shape: Shape, weights: LineWeights | None) -> None:
    check_against_the_reference(shape, "cuda", weights)


def test_user_errors_say_what_came() -> None:
    maps, price = torch.rand(2, 3, 3), torch.tensor([0.1, 0.1])
    sizes = {"n_query": 40, "n_key": 40, "block_size": 16}
    for call, message in (
        (lambda: priced_blocks(maps.double(), price, **sizes), r"maps must be float32 \[S"),
        (lambda: priced_blocks(maps, price[:1], **sizes), r"price must be float32 \[2\]"),
        (lambda: priced_blocks(maps, price, **sizes, out=maps), "out must be bool .2, 3, 3."),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
