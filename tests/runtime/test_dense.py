from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from shareprefill.runtime import dense
from shareprefill.runtime.ops import hopper
from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention

CLOSE: Any = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize(("n_query", "n_key"), [(1, 40), (129, 300), (300, 301), (200, 777)])
def test_chunks_may_read_lists_of_all_causal_blocks(
    n_query: int, n_key: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = torch.randn(6, n_query, 16)
    key, value = torch.randn(2, n_key, 16), torch.randn(2, n_key, 24)
    usual = dense.causal_attention(query, key, value, scale=0.3)
    monkeypatch.setattr(dense, "_is_faster_in_blocks", lambda *_: True)
    monkeypatch.setattr(dense, "sdpa", None)
    found = dense.causal_attention(query, key, value, scale=0.3)
    torch.testing.assert_close(found, usual, **CLOSE)
    assert found.transpose(0, 1).is_contiguous()


def test_few_query_tiles_stay_with_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "has_fast_kernel", lambda *_: True)
    monkeypatch.setattr(dense, "multiprocessors", lambda _: 132)
    key = torch.empty(8, 4000, 16)
    for rows, faster in ((1, False), (128 * 4, False), (128 * 4 + 1, True)):
        query = torch.empty(32, rows, 16)
        assert dense._is_faster_in_blocks(query, key, key) is faster
    monkeypatch.setattr(dense, "has_fast_kernel", lambda *_: False)
    assert not dense._is_faster_in_blocks(torch.empty(32, 4000, 16), key, key)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize(("n_query", "n_key"), [(1000, 1001), (777, 3001), (1500, 4096)])
def test_chunks_on_a_gpu(
    n_query: int, n_key: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = torch.randn(24, n_query, dim, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 8, n_key, dim, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones(n_query, n_key, dtype=torch.bool, device="cuda").tril(n_key - n_query)
    exact = F.scaled_dot_product_attention(
        query.double()[None],
        key.double()[None],
        value.double()[None],
        attn_mask=mask,
        scale=0.1,
        enable_gqa=True,
    )[0]
    launches = []

    def attend(*arguments: Any, **options: Any) -> torch.Tensor:
        launches.append(options)
        options["out"].fill_(torch.nan)
        return block_sparse_attention(*arguments, **options)

    monkeypatch.setattr(dense, "block_sparse_attention", attend)
    for _ in range(2):
        found = dense.causal_attention(query, key, value, scale=0.1).double()
        assert (found - exact).norm() <= 4e-3 * exact.norm()
    in_blocks = hopper.unavailable(query.device) is None
    assert len(launches) == 2 * in_blocks
