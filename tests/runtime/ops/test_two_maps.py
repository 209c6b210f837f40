"""Maps of two groups of heads in the launches of one: each as if it were alone."""

from __future__ import annotations

import pytest
import torch

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.hopper import launch
from shareprefill.runtime.ops.pooled_attention import (
    pooled_attention,
    row_table,
    sample_rows,
    table_height,
    two_maps,
)
from shareprefill.runtime.ops.pooled_attention import triton as launcher

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")

# (H, G, Nq, Nk, D, block, rows of each group)
CASES = [
    (4, 2, 20, 36, 16, 16, (2, 8)),
    (4, 1, 40, 40, 32, 32, (3, 1)),
]
LARGE = [
    (8, 2, 1111, 1300, 128, 128, (4, 1)),
    (8, 2, 8192, 8192, 128, 128, (2, 8)),
    (8, 8, 3000, 9000, 64, 128, (3, 8)),
    (4, 2, 100, 200, 96, 128, (1, 5)),
]


def check(
    case: tuple[int, int, int, int, int, int, tuple[int, int]],
    dtype: torch.dtype,
    impl: str,
    device: str,
) -> None:
    n_heads, n_groups, n_q, n_k, dim, block, widths = case
    query = torch.randn(n_heads, n_q, dim, device=device).to(dtype)
    key = torch.randn(n_groups, n_k, dim, device=device).to(dtype)
    # One head is left out in each group, and what is no number stays with its heads.
    heads = torch.tensor([2, -1, 0, n_heads - 1, -1, 1, 2], device=device)
    key[-1, n_k // 4, 0] = torch.nan
    rows = [sample_rows(n_q, block, r, device) for r in widths]
    # As for a check, of some query blocks alone.
    rows[1] = rows[1][::2].contiguous()
    height = table_height(query, impl)
    assert height is not None
    table = row_table(rows, (3, 4), height)
    options = {"block_size": block, "scale": dim**-0.5}
    found = two_maps(query, key, (rows[0], rows[1]), table, heads, 3, **options, impl=impl)
    for maps, some, mine in zip(found, rows, (heads[:3], heads[3:]), strict=True):
        alone = {"rows": some, "heads": mine, **options}
        _, same = pooled_attention(query, key, **alone, impl=impl)
        torch.testing.assert_close(maps, same, rtol=0, atol=1e-6, equal_nan=True)
        _, exact = pooled_attention(query.double(), key.double(), **alone, impl="reference")
        torch.testing.assert_close(maps, exact.float(), rtol=0, atol=1e-4, equal_nan=True)
        is_clean = mine // (n_heads // n_groups) != n_groups - 1
        assert not maps[is_clean].isnan().any()
        assert maps[mine < 0].eq(0).all()
    assert any(maps.isnan().any() for maps in found)


@pytest.mark.interpreter
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_groups_are_as_each_alone(
    case: tuple[int, int, int, int, int, int, tuple[int, int]],
) -> None:
    check(case, torch.float32, "triton", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "hopper"])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_two_groups_on_a_gpu(
    case: tuple[int, int, int, int, int, int, tuple[int, int]],
    impl: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refusal = launch.unavailable(torch.device("cuda"))
    if impl == "hopper" and refusal is not None:
        pytest.skip(f"the Hopper kernel {refusal}")
    make = torch.Tensor.new_empty

    def poisoned(tensor: torch.Tensor, *sizes: object, **options: object) -> torch.Tensor:
        made = make(tensor, *sizes, **options)  # type: ignore[arg-type]
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    check(case, torch.bfloat16, impl, "cuda")


@pytest.mark.interpreter
def test_groups_go_one_by_one_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "WAVE_BYTES", 1)
    check(CASES[0], torch.float32, "triton", "cpu")


def test_on_a_cpu_no_table_is_taken() -> None:
    query, key = torch.randn(4, 20, 16), torch.randn(2, 20, 16)
    assert table_height(query) is None
    rows, heads = sample_rows(20, 16, 2), torch.tensor([3, 0, 1])
    found = two_maps(query, key, (rows, rows), None, heads, 1, block_size=16)
    _, wanted = pooled_attention(query, key, rows=rows, heads=heads, block_size=16)
    assert torch.equal(torch.cat(found), wanted)


@pytest.mark.interpreter
def test_a_group_without_heads_is_refused() -> None:
    query, key = torch.randn(4, 20, 16), torch.randn(2, 20, 16)
    rows = sample_rows(20, 16, 2)
    table = row_table((rows, rows), (1, 1), table_height(query, "triton") or 0)
    heads = torch.tensor([3, 0])
    with pytest.raises(ConfigError, match="each group needs a head, got 2 and 0"):
        two_maps(query, key, (rows, rows), table, heads, 2, block_size=16, impl="triton")


def test_rows_of_a_map_row_stand_together_in_tiles_of_one_head() -> None:
    table = row_table([torch.tensor([[1, 2, 3]]), torch.tensor([[4], [5]])], (1, 2), 4)
    high = 1 << 32
    assert table.tolist() == [
        [1, 2, 3, -1],
        [4 + high, 5 + high, -1, -1],
        [4 + 2 * high, 5 + 2 * high, -1, -1],
    ]
