"""To FlashAttention-4 and back: on a CPU with a stand-in for its kernel, on a GPU with it."""

from __future__ import annotations

import pytest
import torch

from shareprefill.errors import UnsupportedError
from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention, fa4
from shareprefill.runtime.ops.blocks import BlockLists, causal_blocks, count_blocks


def stand_in(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: torch.Tensor,
    tiles: torch.Tensor,
    nothing: torch.Tensor,
    block_size: tuple[int, int],
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    """What FlashAttention-4 does with lists of masked tiles, causal from the lower right corner."""
    heads, n_q, _ = query.shape
    n_k = key.shape[1]
    assert counts.shape == (1, heads, count_blocks(n_q, block_size[0]))
    assert nothing.tolist() == [0] * counts.shape[2]
    assert tiles.shape == (*counts.shape, count_blocks(n_k, block_size[1]))
    for head in range(heads):
        group = head // (heads // len(key))
        seen = torch.zeros(n_q, n_k, dtype=torch.bool)
        for row, count in enumerate(counts[0, head].tolist()):
            start = row * block_size[0]
            for tile in tiles[0, head, row, :count].tolist():
                assert 0 <= tile * block_size[1] < n_k
                first = tile * block_size[1]
                seen[start : start + block_size[0], first : first + block_size[1]] = True
        seen &= torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q)
        logits = query[head].double() @ key[group].double().T * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        total = logits.masked_fill(~seen, -torch.inf).logsumexp(-1)
        if sinks is not None:
            total = torch.logaddexp(total, sinks[head].double())
        weights = torch.where(seen, (logits - total[:, None]).exp(), 0.0)
        out[head] = (weights @ value[group].double()).to(out.dtype)
        if lse is not None:
            lse[head] = total.float()


def random_call(
    size: int, n_q: int, n_k: int, dim: int, pattern: list[int], device: str, dtype: torch.dtype
) -> tuple[list[torch.Tensor], BlockLists]:
    """Four query heads on two KV heads; most lists hold blocks past the diagonal."""
    shapes = [(4, n_q, dim), (2, n_k, dim), (2, n_k, dim)]
    tensors = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    counts = (max(pattern) + 1, count_blocks(n_q, size), count_blocks(n_k, size))
    bitmap = torch.rand(counts, device=device) < 0.5
    bitmap[0, 0] = False
    return tensors, BlockLists.from_bitmap(bitmap, torch.tensor(pattern, device=device), size)


@pytest.mark.interpreter
@pytest.mark.parametrize(("softcap", "has_sinks"), [(None, False), (2.0, True)], ids=str)
@pytest.mark.parametrize(
    ("size", "n_q", "n_k", "dim", "launches"),
    [
        (128, 300, 300, 16, 1),
        (128, 300, 405, 16, 3),  # query blocks cross two key blocks
        (256, 520, 777, 136, 2),  # four tiles a block, the last ones past the last row
    ],
)
def test_lists_and_left_out_heads_survive_the_way(
    size: int,
    n_q: int,
    n_k: int,
    dim: int,
    launches: int,
    softcap: float | None,
    has_sinks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors, lists = random_call(size, n_q, n_k, dim, [1, -1, 0, 1], "cpu", torch.float32)
    calls = []

    def count(*arguments: object) -> None:
        calls.append(arguments)
        stand_in(*arguments)

    monkeypatch.setattr(fa4, "_forward", count)
    tile = 128 if dim <= 128 else 64
    row_bytes = 4 * (count_blocks(n_k, tile) * 4 + size * dim * 4)
    monkeypatch.setattr(fa4, "WORK_BYTES", row_bytes * -(-lists.n_q // launches))
    sinks = torch.randn(4) if has_sinks else None
    out = torch.full((4, n_q, dim), torch.nan)
    out[1] = 7.0
    lse = torch.full((4, n_q), -torch.inf)
    fa4.attend(*tensors, lists, 0.3, out, lse, softcap, sinks)
    wanted = torch.full((4, n_q, dim), 7.0)
    _, wanted_lse = block_sparse_attention(
        *tensors,
        lists,
        scale=0.3,
        softcap=softcap,
        sinks=sinks,
        out=wanted,
        return_lse=True,
        impl="reference",
    )
    assert len(calls) == launches
    torch.testing.assert_close(out, wanted, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse, wanted_lse, atol=2e-5, rtol=2e-5)


@pytest.mark.interpreter
def test_an_output_that_its_kernel_cannot_write_goes_over_a_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fa4, "_forward", stand_in)
    tensors, lists = random_call(128, 130, 130, 8, [0, 0, 0, 0], "cpu", torch.float32)
    out = torch.full((4, 130, 9), torch.nan)[:, :, :8]
    fa4.attend(*tensors, lists, 0.3, out, None)
    wanted = block_sparse_attention(*tensors, lists, scale=0.3, impl="reference")
    torch.testing.assert_close(out, wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("version", "capability", "reason"),
    [
        (None, (9, 0), "is not installed; get shareprefill"),
        ("4.0.0b1", (9, 0), "found 4.0.0b1"),
        (fa4.VERSION, (10, 0), "needs compute capability 9, got 10.0"),
        (fa4.VERSION, (9, 0), None),
    ],
)
def test_why_it_does_not_run_on_a_device(
    version: str | None,
    capability: tuple[int, int],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fa4, "_installed_version", lambda: version)
    monkeypatch.setattr(fa4, "_is_whole", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    found = fa4.unavailable(torch.device("cuda"))
    assert found is None if reason is None else reason in str(found)
    assert "needs a CUDA GPU" in str(fa4.unavailable(torch.device("cpu")))


def test_half_an_installation_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fa4, "_installed_version", lambda: fa4.VERSION)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(fa4.importlib.util, "find_spec", lambda _: None)
    fa4._is_whole.cache_clear()
    assert "nvidia-cutlass-dsl, which cannot" in str(fa4.unavailable(torch.device("cuda")))
    fa4._is_whole.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "dim", "size", "reason"),
    [
        (torch.bfloat16, 128, 128, None),
        (torch.float16, 256, 256, None),
        (torch.float32, 128, 128, "computes float16 and bfloat16"),
        (torch.bfloat16, 100, 128, "multiple of 8"),
        (torch.bfloat16, 192, 128, "multiple of 8 up to 128"),
        (torch.bfloat16, 128, 64, "block_size of 128 or 256"),
    ],
)
def test_which_calls_it_takes(
    dtype: torch.dtype,
    dim: int,
    size: int,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors, lists = random_call(size, 40, 40, dim, [0, 0, 0, 0], "cpu", dtype)
    monkeypatch.setattr(fa4, "unavailable", lambda _: None)
    found = fa4.supports(*tensors, lists.block_size)
    assert found is None if reason is None else reason in str(found)


def test_an_explicit_request_is_refused_with_the_reason() -> None:
    tensors, lists = random_call(128, 40, 40, 16, [0, 0, 0, 0], "cpu", torch.float32)
    with pytest.raises(UnsupportedError, match="impl='fa4' needs a CUDA GPU"):
        block_sparse_attention(*tensors, lists, impl="fa4")


def skip_without_it() -> None:
    refusal = fa4.unavailable(torch.device("cuda"))
    if refusal is not None:
        pytest.skip(refusal)


# Its kernel compiles for seconds: few combinations.
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("size", "n_q", "n_k", "dim", "dtype", "softcap", "has_sinks"),
    [
        (128, 1000, 1000, 128, torch.bfloat16, None, False),
        (128, 1, 129, 128, torch.bfloat16, None, False),
        (128, 777, 4133, 128, torch.float16, None, True),
        (128, 777, 4133, 128, torch.bfloat16, 20.0, True),
        (128, 1000, 1001, 64, torch.bfloat16, 20.0, False),
        (256, 1000, 1300, 96, torch.bfloat16, None, False),
        (128, 1000, 1300, 256, torch.float16, None, False),
    ],
    ids=str,
)
def test_its_kernel_equals_the_reference(
    size: int,
    n_q: int,
    n_k: int,
    dim: int,
    dtype: torch.dtype,
    softcap: float | None,
    has_sinks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    skip_without_it()
    tensors, lists = random_call(size, n_q, n_k, dim, [1, -1, 0, 1], "cuda", dtype)
    row_bytes = 4 * (count_blocks(n_k, 64) * 4 + size * dim * 2)
    monkeypatch.setattr(fa4, "WORK_BYTES", 5 * row_bytes)
    sinks = torch.randn(4, device="cuda") if has_sinks else None
    options = {"softcap": softcap, "sinks": sinks, "return_lse": True}
    out = torch.full((4, n_q, dim), torch.nan, dtype=dtype, device="cuda")
    out[1] = 7.0
    wanted = torch.full_like(out, 7.0, dtype=torch.float32)
    exact = [tensor.float() for tensor in tensors]
    _, wanted_lse = block_sparse_attention(*exact, lists, out=wanted, impl="reference", **options)
    _, lse = block_sparse_attention(*tensors, lists, out=out, impl="fa4", **options)
    limit = 4e-3 if dtype == torch.float16 else 3e-2
    torch.testing.assert_close(out.float(), wanted, atol=limit, rtol=limit)
    torch.testing.assert_close(lse, wanted_lse, atol=5e-3, rtol=1e-3)


@pytest.mark.gpu
def test_it_waits_for_nothing_and_fits_a_graph() -> None:
    skip_without_it()
    tensors, lists = random_call(128, 2000, 2000, 128, [0, 1, -1, 2], "cuda", torch.bfloat16)
    out = torch.zeros(4, 2000, 128, dtype=torch.bfloat16, device="cuda")
    wanted = torch.zeros_like(out)
    block_sparse_attention(*tensors, lists, out=wanted, impl="fa4")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        block_sparse_attention(*tensors, lists, out=out, impl="fa4")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        block_sparse_attention(*tensors, lists, out=out, impl="fa4")
    out.zero_()
    graph.replay()
    assert torch.equal(out, wanted)


@pytest.mark.gpu
def test_full_lists_equal_dense_attention() -> None:
    skip_without_it()
    tensors, _ = random_call(128, 1500, 1500, 128, [0], "cuda", torch.bfloat16)
    bitmap = causal_blocks(1500, 0, 128, device="cuda")[None]
    lists = BlockLists.from_bitmap(bitmap, torch.zeros(4, device="cuda"), 128)
    exact = [tensor.double() for tensor in tensors]
    query, key, value = exact[0], *(tensor.repeat_interleave(2, 0) for tensor in exact[1:])
    logits = (query @ key.mT / 128**0.5).masked_fill(
        torch.ones(1500, 1500, dtype=torch.bool, device="cuda").triu(1), -torch.inf
    )
    wanted = torch.softmax(logits, -1) @ value
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(tensor[None] for tensor in tensors), is_causal=True, enable_gqa=True
    )[0]
    found = block_sparse_attention(*tensors, lists, impl="fa4")
    errors = [float((x.double() - wanted).norm() / wanted.norm()) for x in (found, dense)]
    assert errors[0] <= 1.2 * errors[1], errors
