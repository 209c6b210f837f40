from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.block_selection import LineWeights, head_blocks, smooth_maps
from shareprefill.runtime.ops.block_selection.reference import smooth_along_lines
from shareprefill.runtime.ops.blocks import causal_blocks
from tests.support.maps import Shape, geometry, random_maps

IMPLS = ["reference", pytest.param("triton", marks=pytest.mark.interpreter)]
SHAPES = [(1, 1, 16), (64, 64, 16), (100, 120, 32), (50, 113, 16), (7, 700, 128), (40, 5000, 16)]
LONG = (1160, 1200, 16)  # more rows and columns than a tile has
GPU_SHAPES = [(8229, 8229, 128), (777, 131_072, 128), (40_000, 40_000, 32), (131_072, 131_072, 128)]
TRITON, STRIPS = "triton", "triton, strip by strip"
WEIGHTS = LineWeights(
    itself=0.2,
    vertical1=0.15,
    diagonal1=0.05,
    vertical2=0.04,
    diagonal2=0.03,
    column=0.1,
    diagonal=0.4,
)
# Blocks whose masses differ by less may be equal to a threshold: a step of its last bit.
STEP = 2.0**-13


@pytest.fixture(
    params=[
        "reference",
        *(pytest.param(n, marks=pytest.mark.interpreter) for n in (TRITON, STRIPS)),
    ]
)
def search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The `impl` of `head_blocks`, whose Triton kernels for large maps search small ones, too."""
    if request.param != STRIPS:
        return request.param
    from shareprefill.runtime.ops.block_selection import triton

    monkeypatch.setattr(triton, "LARGE_MAP", 1)
    return TRITON


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New tensors hold NaN, and the largest number where they are of integers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def least_taken(values: torch.Tensor, share: float) -> float:
    """The last of the values, largest first, that reach a share of their sum, in float64."""
    ranked = values.double().flatten().sort(descending=True).values
    before = int((ranked.cumsum(0) < share * float(ranked.sum())).sum())
    return float(ranked[min(before, len(ranked) - 1)])


def assert_is_a_threshold(maps: torch.Tensor, gamma: list[float], chosen: torch.Tensor) -> None:
    """The smallest cover, and what is as large as its least but for the threshold's precision."""
    for one, limit, taken in zip(maps, gamma, chosen, strict=True):
        if limit >= 1:
            assert torch.equal(taken, one > 0)
            continue
        # Sums of float32 values in another order differ by rounding.
        assert taken[one > least_taken(one, limit * (1 - 3e-6)) * (1 + STEP)].all()
        assert not taken[one < least_taken(one, limit * (1 + 1e-6)) * (1 - STEP)].any()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [*SHAPES, LONG], ids=str)
def test_blocks_are_the_smallest_cover_of_a_map(shape: Shape, search: str) -> None:
    maps = random_maps(4, shape)
    gamma = [0.9, 0.3, 0.999, 1.0]
    chosen, is_finite = head_blocks(maps, torch.tensor(gamma), **geometry(shape), impl=search)
    assert_is_a_threshold(maps, gamma, chosen)
    assert is_finite.all()


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [*SHAPES, LONG], ids=str)
@pytest.mark.parametrize("is_large", [False, True])
def test_triton_takes_what_the_reference_takes(
    shape: Shape, is_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact sums, so exactly the same; several patterns of a map, and none of another."""
    from shareprefill.runtime.ops.block_selection import triton

    monkeypatch.setattr(triton, "LARGE_MAP", 1 if is_large else 2**40)
    maps = random_maps(3, shape, 1024)
    maps[2] = 0.0
    gamma = torch.tensor([0.5, 0.95, 0.95, 1.0, 0.5, 0.7])
    index = torch.tensor([1, 1, 0, 1, -1, 2])
    options = geometry(shape) | {"sink_blocks": 1, "local_blocks": 2}
    wanted, _ = head_blocks(maps, gamma, index, **options, impl="reference")
    chosen = torch.ones_like(wanted)
    found, is_finite = head_blocks(maps, gamma, index, **options, impl="triton", out=chosen)
    assert found is chosen
    assert torch.equal(chosen, wanted)
    assert is_finite.all()


def test_only_what_is_always_read_of_maps_without_mass(search: str) -> None:
    shape = (50, 113, 16)
    index = torch.tensor([0, -1])
    options = geometry(shape) | {"sink_blocks": 1, "local_blocks": 2, "impl": search}
    for maps in (torch.zeros(1, 4, 8), torch.zeros(0, 4, 8)):
        some = index if len(maps) else index[1:]
        chosen, is_finite = head_blocks(maps, torch.full(some.shape, 0.9), some, **options)
        # The first rows of the query blocks lie in key blocks 3, 4, 5 and 6, their last rows in
        # 4, 5, 6 and 7.
        wanted = [
            [1, 0, 1, 1, 1, 0, 0, 0],
            [1, 0, 0, 1, 1, 1, 0, 0],
            [1, 0, 0, 0, 1, 1, 1, 0],
            [1, 0, 0, 0, 0, 1, 1, 1],
        ]
        for one in chosen:
            assert one.int().tolist() == wanted
        assert is_finite.all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_a_map_that_is_no_number_takes_every_causal_block(bad: float, search: str) -> None:
    shape = (50, 113, 16)
    maps = random_maps(3, shape)
    whole = maps.clone()
    maps[1, 2, 3] = bad
    causal = causal_blocks(50, 63, 16)
    # Outside the causal blocks nothing is looked at.
    maps[2, 0, 7] = bad
    gamma = torch.tensor([0.5, 0.9, 0.8])
    chosen, is_finite = head_blocks(maps, gamma, **geometry(shape), impl=search)
    assert is_finite.tolist() == [True, False, True]
    assert torch.equal(chosen[1], causal)
    for place in (0, 2):
        alone = whole[place : place + 1]
        wanted, _ = head_blocks(alone, gamma[place : place + 1], **geometry(shape))
        assert torch.equal(chosen[place], wanted[0])


def test_masses_of_any_scale(search: str) -> None:
    """Equal blocks go together, and what is 2^40 below the largest is not told apart."""
    maps = torch.tensor([[[0.5, 0.0, 0.0], [0.5, 0.25, 0.0], [0.25, 0.25, 1e-30]]])
    sizes = {"n_query": 12, "n_key": 12, "block_size": 4, "impl": search}
    for scale in (1.0, 1e-30, 1e30):
        for gamma, count in ((0.1, 2), (0.6, 5), (0.999, 5), (1.0, 6)):
            found, _ = head_blocks(maps * scale, torch.tensor([gamma]), **sizes)
            # The least mass is below float32's numbers at the smallest scale.
            assert int(found.sum()) == min(count, int((maps * scale > 0).sum()))


def test_a_threshold_has_fourteen_bits_after_the_point(search: str) -> None:
    """Of masses half a step apart, two at a time are taken, and no more than are needed."""
    maps = (1 + torch.arange(64) * 2.0**-15).view(1, 1, 64)
    needed = torch.arange(1, 64)
    gamma = maps.flatten().flip(0).cumsum(0)[needed - 1] / maps.sum()
    index = torch.zeros(63, dtype=torch.int64)
    sizes = {"n_query": 1, "n_key": 64, "block_size": 1, "impl": search}
    chosen, _ = head_blocks(maps, gamma, index, **sizes)
    assert torch.equal(chosen.sum((1, 2)), (needed + 1) // 2 * 2)
    assert torch.equal(chosen.flatten(1), torch.arange(64) >= 64 - chosen.sum(-1))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [*SHAPES[:5], (49, 112, 16), (33, 112, 16)], ids=str)
def test_smoothed_masses_entry_by_entry(shape: Shape, impl: str) -> None:
    causal = causal_blocks(shape[0], shape[1] - shape[0], shape[2])
    n_q, n_k = causal.shape
    maps = torch.rand(2, n_q, n_k)  # what is not causal has mass, too, and is left out of account
    found = smooth_maps(maps, WEIGHTS, **geometry(shape), impl=impl)
    seen = set(map(tuple, causal.nonzero().tolist()))
    for number, one in enumerate(maps.double().tolist()):

        def mean(places: list[tuple[int, int]], own: float, one=one) -> float:
            masses = [one[i][j] for i, j in places if (i, j) in seen]
            return sum(masses) / len(masses) if masses else own

        for i in range(n_q):
            for j in range(n_k):
                own = one[i][j]
                neighbours = [
                    [(i - d, j - s * d), (i + d, j + s * d)] for d in (1, 2) for s in (0, 1)
                ]
                column = [(row, j) for row in range(n_q)]
                diagonal = [(row, j - i + row) for row in range(n_q)]
                terms = [own, *(mean(places, own) for places in neighbours)]
                terms += [mean(column, own), mean(diagonal, own)]
                weights = (0.2, 0.15, 0.05, 0.04, 0.03, 0.1, 0.4)
                total = sum(w * t for w, t in zip(weights, terms, strict=True))
                wanted = total if (i, j) in seen else 0.0
                assert abs(float(found[number, i, j]) - wanted) < 1e-5


def test_no_maps_are_smoothed_to_none() -> None:
    maps, sizes = torch.zeros(0, 4, 8), {"n_query": 50, "n_key": 113, "block_size": 16}
    assert smooth_maps(maps, WEIGHTS, **sizes, impl="reference").shape == (0, 4, 8)


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "weights", [WEIGHTS, LineWeights(itself=1.0), LineWeights(itself=0, column=2)]
)
@pytest.mark.parametrize("shape", [SHAPES[5], LONG], ids=str)
def test_triton_smooths_as_the_reference_does(shape: Shape, weights: LineWeights) -> None:
    maps = random_maps(2, shape)
    wanted = smooth_maps(maps, weights, **geometry(shape), impl="reference")
    actual = smooth_maps(maps, weights, **geometry(shape), impl="triton")
    torch.testing.assert_close(actual, wanted, atol=1e-6, rtol=1e-5)


def test_smoothing_along_lines_knows_other_causal_blocks() -> None:
    """Every entry causal: the corner's diagonal is the corner, its column's mean is its own."""
    maps = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    weights = LineWeights(itself=0.0, column=1.0, diagonal=10.0)
    found = smooth_along_lines(maps, weights, torch.ones(2, 2, dtype=torch.bool))
    assert found.tolist() == [[[27.0, 23.0], [32.0, 28.0]]]


def test_user_errors_say_what_came() -> None:
    maps, gamma = torch.rand(2, 3, 3), torch.tensor([0.9, 0.9])
    index = torch.tensor([0, 1])
    sizes = {"n_query": 40, "n_key": 40, "block_size": 16}
    cases = [
        (lambda: head_blocks(maps.double(), gamma, **sizes), r"maps must be float32 \[S"),
        (lambda: head_blocks(maps, gamma[:1], **sizes), r"gamma must be float32 \[2\]"),
        (lambda: head_blocks(maps, gamma, index[:1], **sizes), r"float32 \[1\]"),
        (lambda: head_blocks(maps, gamma, index.int(), **sizes), r"index must be int64"),
        (lambda: head_blocks(maps, gamma, index + 1, **sizes), "index must lie below 2, got 2"),
        (lambda: head_blocks(maps, gamma, **sizes, local_blocks=-1), "at least 0, got 0, -1"),
        (lambda: head_blocks(maps, gamma, **sizes, out=maps), "out must be bool .2, 3, 3."),
        (
            lambda: head_blocks(maps, gamma, **sizes | {"n_key": 60}),
            r"maps must be float32 .S, 3, 4",
        ),
        (lambda: smooth_maps(maps[0], WEIGHTS, **sizes), r"maps must be float32 \[S"),
        (
            lambda: smooth_maps(maps, WEIGHTS, **sizes | {"n_key": 60}),
            r"maps must be float32 .S, 3, 4",
        ),
        (lambda: smooth_maps(maps, WEIGHTS, **sizes, impl="fast"), "impl must be one of"),
        (lambda: LineWeights(itself=1.0, column=-0.1), "finite and at least 0, got LineWeights"),
        (lambda: LineWeights(itself=torch.inf), "finite and at least 0"),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_compiled_thresholds_and_smoothed_maps(shape: Shape) -> None:
    maps, gamma = random_maps(3, shape, device="cuda"), [0.95, 0.5, 1.0]
    limits = torch.tensor(gamma, device="cuda")
    chosen, is_finite = head_blocks(maps, limits, **geometry(shape))
    assert_is_a_threshold(maps, gamma, chosen)
    assert is_finite.all()
    again, _ = head_blocks(maps, limits, **geometry(shape))
    assert torch.equal(again, chosen)
    wanted = smooth_maps(maps, WEIGHTS, **geometry(shape), impl="reference")
    actual = smooth_maps(maps, WEIGHTS, **geometry(shape))
    torch.testing.assert_close(actual, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_compiled_thresholds_equal_the_reference(shape: Shape) -> None:
    maps = random_maps(3, shape, 64, device="cuda")
    maps[2, 0, 0] = torch.nan
    gamma = torch.tensor([0.9, 0.2, 0.9, 0.5, 1.0], device="cuda")
    index = torch.tensor([1, 0, 2, -1, 1], device="cuda")
    options = geometry(shape) | {"sink_blocks": 1, "local_blocks": 2}
    wanted = head_blocks(maps, gamma, index, **options, impl="reference")
    actual = head_blocks(maps, gamma, index, **options, impl="triton")
    # Sums of so few levels are exact in any order.
    assert torch.equal(actual[0], wanted[0])
    assert torch.equal(actual[1], wanted[1])
