from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from shareprefill.runtime import dense
from shareprefill.runtime.generation import cache_of
from shareprefill.runtime.interface import AttentionCall, attached, dense_attention
from shareprefill.runtime.masks import FactMask, MaskFacts
from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
from shareprefill.runtime.ops.hopper import launch
from tests.support.tiny import tiny_llama, token_ids

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


def sizes(heads: int, n_query: int, n_key: int, dim: int) -> tuple[torch.Tensor, ...]:
    """Query, key and value without numbers."""
    query = torch.empty(2, heads, n_query, dim, device="meta")
    key = torch.empty(2, heads // 4, n_key, dim, device="meta")
    return query, key, key


@pytest.mark.parametrize(("rows", "faster"), [(1, False), (128 * 4, False), (128 * 4 + 1, True)])
def test_few_query_tiles_stay_with_sdpa(
    rows: int, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "multiprocessors", lambda _: 132)
    for fast in (True, False):
        monkeypatch.setattr(dense, "has_fast_kernel", lambda *_, fast=fast: fast)
        assert dense._is_faster_in_blocks(*sizes(32, rows, 4000, 16)) is (fast and faster)


@pytest.mark.parametrize(
    ("heads", "tokens", "dim", "faster"),
    [
        (32, 1, 128, False),
        (32, 1023, 128, False),
        (32, 1024, 128, True),
        (64, 1023, 128, False),
        # As much work as 32 heads of 2048 tokens, D=128.
        (32, 2816, 64, False),
        (32, 2817, 64, True),
        (8, 4096, 128, False),
        (8, 4097, 128, True),
    ],
)
def test_short_prompts_stay_with_sdpa(
    heads: int, tokens: int, dim: int, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "multiprocessors", lambda _: 1)
    for fast in (True, False):
        monkeypatch.setattr(dense, "has_fast_kernel", lambda *_, fast=fast: fast)
        assert dense._is_faster_in_blocks(*sizes(heads, tokens, tokens, dim)) is (fast and faster)


@pytest.mark.parametrize(
    ("tokens", "capability", "can_be", "taken"),
    [
        (1, 9, True, False),
        (2, 9, True, True),
        (1920, 9, True, True),
        (1921, 9, True, False),
        (1920, 8, True, False),
        (1920, 10, True, False),
        (1920, 9, False, False),
    ],
)
def test_short_prompts_wait_for_no_plan(
    tokens: int, capability: int, can_be: bool, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "device_capability", lambda _: (capability, 0))
    monkeypatch.setattr(dense, "can_use_flash_attention", lambda _: can_be)
    assert dense._is_plan_longer(*sizes(32, tokens, tokens, 128)) is taken
    query, key, value = sizes(32, tokens, tokens, 128)
    assert not dense._is_plan_longer(query, key, value[..., :64])


def test_the_kernel_is_asked_about_one_sequence_in_blocks_of_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(dense, "has_fast_kernel", lambda *call: bool(asked.append(call)))
    dense._is_faster_in_blocks(*sizes(32, 5000, 5000, 128))
    ((query, key, value, block_size),) = asked
    assert query.shape == (32, 5000, 128)
    assert key.shape == value.shape == (8, 5000, 128)
    assert block_size == 128


def in_blocks_from(tokens: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """As if a fast kernel took whole sequences of so many tokens; the queries that it got."""
    launches: list[tuple[int, ...]] = []

    def attend(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        launches.append(tuple(query.shape))
        options["out"].fill_(torch.nan)
        return block_sparse_attention(query, *arguments, **options)

    monkeypatch.setattr(dense, "has_fast_kernel", lambda *_: True)
    monkeypatch.setattr(dense, "_WIDE_TOKENS", tokens)
    monkeypatch.setattr(dense, "_WHOLE_WORK", 0)
    monkeypatch.setattr(dense, "block_sparse_attention", attend)
    return launches


@pytest.mark.parametrize("tokens", [128, 137, 300])
def test_whole_sequences_may_read_lists_of_all_causal_blocks(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = torch.randn(2, tokens, 6, 16).transpose(1, 2)
    key, value = torch.randn(2, 2, tokens, 16), torch.randn(2, 2, tokens, 24)
    usual = dense.whole_attention(query, key, value, 0.3)
    launches = in_blocks_from(128, monkeypatch)
    monkeypatch.setattr(dense, "sdpa", None)
    found = dense.whole_attention(query, key, value, 0.3)
    assert launches == [(6, tokens, 16)] * 2
    torch.testing.assert_close(found, usual, **CLOSE)
    # Tokens first, as the model reads it.
    assert found.transpose(1, 2).is_contiguous()
    alone = dense.causal_attention(query[1], key[1], value[1], scale=0.3)
    assert len(launches) == 3
    torch.testing.assert_close(alone, usual[1], **CLOSE)


@torch.no_grad()
def test_models_take_lists_for_long_prompts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, real = tiny_llama(), token_ids(2, 150), torch.ones(2, 150, dtype=torch.bool)
    padding = real.clone()
    padding[0, :13], padding[1, :40] = False, False
    cases = (
        (ids[:, :1], real[:, :1], []),
        (ids[:, :127], real[:, :127], []),
        (ids, real, [150, 150]),
        (ids, padding, [137]),
    )
    expected = [model(input_ids=prompt, attention_mask=mask).logits for prompt, mask, _ in cases]
    launches = in_blocks_from(128, monkeypatch)
    with attached(model, dense_attention):
        for (prompt, mask, lengths), own in zip(cases, expected, strict=True):
            launches.clear()
            found = model(input_ids=prompt, attention_mask=mask).logits
            assert launches == [(4, length, 16) for length in lengths] * 3
            torch.testing.assert_close(found[mask], own[mask], **CLOSE)
        step = model(input_ids=ids, use_cache=True)
        launches.clear()
        model(input_ids=ids[:, :1], **cache_of(step))
    assert not launches


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
    in_blocks = launch.unavailable(query.device) is None
    assert len(launches) == 2 * in_blocks


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "dim"), [(1029, 128), (4129, 128), (4737, 96), (5793, 64), (1000, 128)]
)
def test_whole_prompts_on_a_gpu(
    tokens: int, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As exact as SDPA, in lists where they are faster."""
    query, key, value = (
        torch.randn(2, tokens, heads, dim, device="cuda", dtype=dtype).transpose(1, 2)
        for heads in (32, 8, 8)
    )
    mask = FactMask.make((2, 1, tokens, tokens), query.device, MaskFacts(0, 0, None, None))
    call = AttentionCall(torch.nn.Identity(), 0, query, key, value, mask, dim**-0.5, {})
    launches = []

    def attend(*arguments: Any, **options: Any) -> torch.Tensor:
        launches.append(options)
        options["out"].fill_(torch.nan)
        return block_sparse_attention(*arguments, **options)

    theirs = dense.sdpa(query, key, value, None, True, dim**-0.5)
    monkeypatch.setattr(dense, "block_sparse_attention", attend)
    for _ in range(2):
        launches.clear()
        found = dense_attention(call)
        in_blocks = tokens >= 1024 and launch.unavailable(query.device) is None
        assert len(launches) == 2 * in_blocks
        assert found.transpose(1, 2).is_contiguous() or not in_blocks
        for row in range(2):
            # A KV head at a time: in float64 SDPA makes all logits.
            for group in range(8):
                heads = slice(4 * group, 4 * group + 4)
                exact = F.scaled_dot_product_attention(
                    query[row, heads].double(),
                    key[row, group].double().expand(4, -1, -1),
                    value[row, group].double().expand(4, -1, -1),
                    is_causal=True,
                )
                error = (found[row, heads] - exact).norm()
                assert error <= 1.2 * (theirs[row, heads] - exact).norm()


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "groups", "dim"), [(9, 3, 64), (32, 8, 128), (4, 4, 256)])
@pytest.mark.parametrize("tokens", [2, 129, 1000, 2047])
def test_short_prompts_on_a_gpu(
    tokens: int, heads: int, groups: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As exact as SDPA, without it on Hopper GPUs, where each length would wait for a plan."""
    query, key, value = (
        torch.randn(2, tokens, n, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for n in (heads, groups, groups)
    )
    theirs = dense.sdpa(query, key, value, None, True, 0.1)
    if torch.cuda.get_device_capability()[0] == 9:
        monkeypatch.setattr(dense, "sdpa", None)
    found = dense.whole_attention(query, key, value, 0.1)
    exact = F.scaled_dot_product_attention(
        *(tensor.double() for tensor in (query, key, value)),
        is_causal=True,
        scale=0.1,
        enable_gqa=True,
    )
    assert (found - exact).norm() <= 1.2 * (theirs - exact).norm()
    # Tokens first, as the model reads it.
    assert found.transpose(1, 2).is_contiguous()
