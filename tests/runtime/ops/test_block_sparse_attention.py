from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from _pytest.mark import ParameterSet

from shareprefill.errors import ConfigError, UnsupportedError
from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
from shareprefill.runtime.ops.blocks import BlockLists, causal_blocks, count_blocks
from tests.support.attention import attend_with_lse

# Largest absolute error on standard normal values, against float64 of the same inputs.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
# (H, G, Nq, Nk, D, Dv, block size)
SHAPES = [
    (2, 1, 1, 1, 16, 16, 16),
    (2, 2, 63, 63, 32, 32, 16),
    (4, 2, 129, 129, 32, 16, 32),
    (4, 1, 50, 113, 16, 16, 16),
    (4, 2, 85, 125, 16, 16, 16),  # every query block crosses two key blocks
    (3, 3, 1, 129, 16, 16, 32),
    (6, 2, 37, 300, 64, 64, 64),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    heads, groups, n_q, n_k, dim, value_dim, _ = shape
    sizes = [(heads, n_q, dim), (groups, n_k, dim), (groups, n_k, value_dim)]
    return [torch.randn(size, device=device).to(dtype) for size in sizes]


def lists_for(
    shape: tuple[int, ...], density: float, pattern: list[int], device: str = "cpu"
) -> BlockLists:
    _, _, n_q, n_k, _, _, size = shape
    counts = (max(pattern) + 1, count_blocks(n_q, size), count_blocks(n_k, size))
    bitmap = torch.rand(counts, device=device) < density
    return BlockLists.from_bitmap(bitmap, torch.tensor(pattern, device=device), size)


def shared_patterns(heads: int) -> list[int]:
    """Neighbours share a pattern, and so do the first and the last head."""
    pattern = [head // 2 for head in range(heads)]
    pattern[-1] = 0
    return pattern


def expected(
    tensors: list[torch.Tensor],
    lists: BlockLists,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    exact = [tensor.double() for tensor in tensors]
    sinks = None if sinks is None else sinks.double()
    out = torch.zeros(
        (*tensors[0].shape[:2], tensors[2].shape[2]), dtype=torch.float64, device=lists.device
    )
    return attend_with_lse(
        *exact,
        lists,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        out=out,
        impl="reference",
    )


def assert_close(actual: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), wanted.double(), atol=limit, rtol=limit)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_with_dense_lists_equals_sdpa(shape: tuple[int, ...]) -> None:
    heads, groups, n_q, n_k, _, _, size = shape
    query, key, value = inputs(shape, torch.float64)
    bitmap = causal_blocks(n_q, n_k - n_q, size)[None]
    lists = BlockLists.from_bitmap(bitmap, torch.zeros(heads), size)
    actual, lse = attend_with_lse(query, key, value, lists, impl="reference")
    mask = torch.arange(n_k)[None, :] <= torch.arange(n_k - n_q, n_k)[:, None]
    key, value = (tensor.repeat_interleave(heads // groups, 0) for tensor in (key, value))
    wanted = F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=mask)
    torch.testing.assert_close(actual, wanted[0])
    logits = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_reference_reads_listed_blocks_only() -> None:
    query, key, value = inputs((1, 1, 48, 48, 8, 8, 16), torch.float64)
    bitmap = torch.zeros(1, 3, 3, dtype=torch.bool)
    bitmap[0, 2, 1] = True
    bitmap[0, 1, 2] = True  # past the diagonal
    lists = BlockLists.from_bitmap(bitmap, torch.zeros(1), 16)
    out, lse = attend_with_lse(query, key, value, lists, impl="reference")
    weights = torch.softmax(query[0, 32:] @ key[0, 16:32].T / 8**0.5, -1)
    torch.testing.assert_close(out[0, 32:], weights @ value[0, 16:32])
    assert not out[0, :32].any()
    assert torch.isneginf(lse[0, :32]).all()


def fast_versions(*densities: float) -> list[ParameterSet]:
    """Every fast version with a dtype and a density; the interpreter is slow and gets few."""
    cases = [
        pytest.param(impl, dtype, density)
        for impl, dtype in [
            ("blockwise", torch.float64),
            ("blockwise", torch.float32),
            ("blockwise", torch.bfloat16),
        ]
        for density in densities
    ]
    interpreted = [(torch.float32, density) for density in densities] + [(torch.float16, 0.4)]
    return cases + [
        pytest.param("triton", dtype, density, marks=pytest.mark.interpreter)
        for dtype, density in interpreted
    ]


@pytest.mark.parametrize(("impl", "dtype", "density"), fast_versions(0.0, 0.4, 1.0))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fast_versions_equal_the_reference(
    shape: tuple[int, ...], density: float, impl: str, dtype: torch.dtype
) -> None:
    tensors = inputs(shape, dtype)
    lists = lists_for(shape, density, shared_patterns(shape[0]))
    wanted, wanted_lse = expected(tensors, lists, scale=0.3)
    out = torch.full(wanted.shape, torch.nan, dtype=dtype)
    actual, lse = attend_with_lse(*tensors, lists, scale=0.3, out=out, impl=impl)
    assert actual is out
    assert lse.dtype == torch.float32
    assert_close(actual, wanted, dtype)
    assert_close(lse, wanted_lse, torch.float32)
    if impl == "blockwise" or dtype == torch.float16:
        out.fill_(torch.nan)
        alone = block_sparse_attention(*tensors, lists, scale=0.3, out=out, impl=impl)
        assert_close(alone, wanted, dtype)


@pytest.mark.parametrize("shape", SHAPES[3:5], ids=str)
def test_softcap_and_sinks_are_those_of_the_models(shape: tuple[int, ...]) -> None:
    """Gemma 2's soft-cap and gpt-oss's sinks, by transformers' own eager functions."""
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.gpt_oss import modeling_gpt_oss

    heads, groups, n_q, n_k, _, _, size = shape
    query, key, value = inputs(shape, torch.float64)
    query *= 4.0
    sinks = torch.randn(heads, dtype=torch.float64)
    bitmap = causal_blocks(n_q, n_k - n_q, size)[None]
    lists = BlockLists.from_bitmap(bitmap, torch.zeros(heads), size)
    module = SimpleNamespace(num_key_value_groups=heads // groups, sinks=sinks, training=False)
    positions = torch.arange(n_k - n_q, n_k)
    mask = torch.zeros(n_q, n_k, dtype=torch.float64)
    mask.masked_fill_(torch.arange(n_k)[None, :] > positions[:, None], -torch.inf)
    arguments = (module, query[None], key[None], value[None], mask)
    capped, _ = modeling_gemma2.eager_attention_forward(*arguments, scaling=0.4, softcap=3.0)
    sunk, _ = modeling_gpt_oss.eager_attention_forward(*arguments, scaling=0.4)
    found = {
        name: block_sparse_attention(
            query, key, value, lists, scale=0.4, impl="reference", **options
        )
        for name, options in (("capped", {"softcap": 3.0}), ("sunk", {"sinks": sinks}))
    }
    # Gemma's softmax is float32 whatever comes in.
    torch.testing.assert_close(found["capped"], capped[0].transpose(0, 1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found["sunk"], sunk[0].transpose(0, 1))


@pytest.mark.parametrize(("impl", "dtype", "density"), fast_versions(0.0, 0.4))
@pytest.mark.parametrize(
    ("softcap", "has_sinks"), [(2.0, False), (None, True), (0.5, True)], ids=str
)
def test_fast_versions_cap_and_sink_like_the_reference(
    density: float, softcap: float | None, has_sinks: bool, impl: str, dtype: torch.dtype
) -> None:
    shape = (4, 2, 37, 61, 16, 16, 16)
    tensors = inputs(shape, dtype)
    lists = lists_for(shape, density, [0, -1, 1, 1])
    sinks = torch.randn(4) if has_sinks else None
    options = {"scale": 0.7, "softcap": softcap, "sinks": sinks}
    wanted, wanted_lse = expected(tensors, lists, **options)
    out = torch.full(wanted.shape, torch.nan, dtype=dtype)
    out[1] = 0.0
    _, lse = attend_with_lse(*tensors, lists, out=out, impl=impl, **options)
    assert_close(out, wanted, dtype)
    assert_close(lse, wanted_lse, torch.float32)
    assert torch.isneginf(lse[1]).all()
    if impl == "blockwise":
        out.fill_(torch.nan)
        out[1] = 0.0
        alone = block_sparse_attention(*tensors, lists, out=out, impl=impl, **options)
        assert_close(alone, wanted, dtype)


def test_rows_without_keys_leave_their_mass_to_the_sink() -> None:
    shape = (2, 1, 32, 32, 16, 16, 16)
    tensors = inputs(shape, torch.float32)
    lists = lists_for(shape, 0.0, [0, 0])
    sinks = torch.tensor([0.5, -30.0])
    for impl in ("reference", "blockwise"):
        out, lse = attend_with_lse(*tensors, lists, sinks=sinks, impl=impl)
        assert not out.any()
        assert torch.equal(lse, sinks[:, None].expand(2, 32))


@pytest.mark.parametrize(
    "impl",
    ["reference", "blockwise", pytest.param("triton", marks=pytest.mark.interpreter)],
)
def test_left_out_heads_keep_their_rows(impl: str) -> None:
    shape = (4, 2, 70, 70, 16, 16, 16)
    tensors = inputs(shape, torch.float32)
    lists = lists_for(shape, 0.5, [-1, 0, 1, -1])
    wanted, _ = expected(tensors, lists)
    out = torch.full(wanted.shape, torch.nan)
    out[0] = 7.0
    _, lse = attend_with_lse(*tensors, lists, out=out, impl=impl)
    assert (out[0] == 7.0).all()
    assert out[3].isnan().all()
    assert_close(out[1:3], wanted[1:3], torch.float32)
    assert torch.isneginf(lse[[0, 3]]).all()


@pytest.mark.parametrize(
    "impl",
    ["reference", "blockwise", pytest.param("triton", marks=pytest.mark.interpreter)],
)
def test_strided_views_are_read_and_written_in_place(impl: str) -> None:
    shape = (4, 2, 45, 61, 16, 16, 16)
    tensors = inputs(shape, torch.float32)
    lists = lists_for(shape, 0.5, [0, 0, 1, 1])
    wanted, _ = expected(tensors, lists)
    views = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in tensors]
    views[1] = tensors[1].mT.contiguous().mT  # last stride is not 1
    out = torch.full((45, 4, 16), torch.nan).transpose(0, 1)
    block_sparse_attention(*views, lists, out=out, impl=impl)
    assert_close(out, wanted, torch.float32)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("dim", "value_dim", "size"), [(96, 40, 32), (8, 96, 16), (64, 64, 128), (32, 32, 256)]
)
def test_triton_pads_odd_head_dims_and_tiles_all_block_sizes(
    dim: int, value_dim: int, size: int
) -> None:
    shape = (2, 1, 150, 171, dim, value_dim, size)
    tensors = inputs(shape, torch.float32)
    lists = lists_for(shape, 0.7, [0, 1])
    wanted, wanted_lse = expected(tensors, lists)
    out = torch.full(wanted.shape, torch.nan)
    _, lse = attend_with_lse(*tensors, lists, out=out, impl="triton")
    assert_close(out, wanted, torch.float32)
    assert_close(lse, wanted_lse, torch.float32)


def test_blockwise_takes_heads_in_parts_when_logits_are_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from shareprefill.runtime.ops.block_sparse_attention import blockwise

    shape = (6, 1, 40, 40, 16, 16, 16)
    tensors = inputs(shape, torch.float32)
    lists = lists_for(shape, 0.8, [0] * 6)
    monkeypatch.setattr(blockwise, "LOGIT_BYTES", 2 * 4 * 16 * 48)
    out, lse = attend_with_lse(*tensors, lists, impl="blockwise")
    wanted, wanted_lse = expected(tensors, lists)
    assert_close(out, wanted, torch.float32)
    assert_close(lse, wanted_lse, torch.float32)


def test_auto_on_a_cpu_is_blockwise() -> None:
    shape = (2, 1, 40, 40, 16, 16, 16)
    tensors = inputs(shape, torch.float32)
    lists = lists_for(shape, 0.8, [0, 0])
    assert torch.equal(
        block_sparse_attention(*tensors, lists),
        block_sparse_attention(*tensors, lists, impl="blockwise"),
    )


def test_explicit_triton_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (1, 1, 16, 16, 16, 16, 16)
    tensors = inputs(shape, torch.float32)
    lists = lists_for(shape, 1.0, [0])
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UnsupportedError, match="needs"):
        block_sparse_attention(*tensors, lists, impl="triton")


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("dtype", "message"), [(torch.bfloat16, "bfloat16 products"), (torch.float64, "float64")]
)
def test_triton_refuses_what_it_would_get_wrong(dtype: torch.dtype, message: str) -> None:
    shape = (1, 1, 16, 16, 16, 16, 16)
    with pytest.raises(UnsupportedError, match=message):
        block_sparse_attention(*inputs(shape, dtype), lists_for(shape, 1.0, [0]), impl="triton")


def test_user_errors_say_what_came() -> None:
    shape = (4, 2, 20, 30, 16, 16, 16)
    query, key, value = inputs(shape, torch.float32)
    lists = lists_for(shape, 1.0, [0, 0, 0, 0])
    cases = [
        ((query[None], key, value, lists), {}, "loop over the batch"),
        ((query[:3], key, value, lists), {}, "2 KV heads do not divide 3"),
        ((query, key[:, :10], value, lists), {}, "Nq <= Nk"),
        ((query, key, value[:, :5], lists), {}, "value must be"),
        ((query, key.half(), value, lists), {}, "key must have query's dtype"),
        ((query[..., :8], key, value, lists), {}, "head_dim 8, key 16"),
        ((query[:, :5], key, value, lists), {}, "make 1 x 2"),
        ((query[:2], key, value, lists), {}, "for each of 2 query heads"),
        ((query, key, value, lists), {"out": query[:, :2]}, "out must be"),
        ((query, key, value, lists), {"impl": "cuda"}, "impl must be one of"),
        ((query, key, value, lists), {"softcap": 0.0}, "softcap must be a positive number"),
        ((query, key, value, lists), {"sinks": torch.zeros(2)}, "each of 4 query heads"),
        ((query, key, value, lists), {"sinks": torch.zeros(4).long()}, "floating-point logit"),
        ((query, key, value, lists_for(shape, 1.0, [0, -1, 0, 0])), {}, "give `out`"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ConfigError, match=message):
            block_sparse_attention(*arguments, **options)


GPU_SHAPES = [
    (8, 2, n_q, n_k, dim, dim, size)
    for n_q, n_k in [(1000, 1000), (4133, 4133), (777, 4133)]
    for dim in (64, 96, 128, 256)
    for size in (64, 128)
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_compiled_kernel_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = inputs(shape, dtype, "cuda")
    lists = lists_for(shape, 0.3, [0, 0, 1, 1, 2, -1, 0, 3], "cuda")
    out = torch.full((8, shape[2], shape[5]), torch.nan, dtype=dtype, device="cuda")
    wanted = torch.full_like(out, torch.nan, dtype=torch.float32)
    exact = [tensor.float() for tensor in tensors]
    _, wanted_lse = attend_with_lse(*exact, lists, out=wanted, impl="reference")
    _, lse = attend_with_lse(*tensors, lists, out=out, impl="triton")
    torch.testing.assert_close(
        out.float(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True
    )
    torch.testing.assert_close(lse, wanted_lse, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [16, 32, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiled_kernel_takes_other_block_sizes(size: int, dtype: torch.dtype) -> None:
    shape = (4, 2, 500, 811, 64, 64, size)
    tensors = inputs(shape, dtype, "cuda")
    lists = lists_for(shape, 0.4, [0, 1, 1, 0], "cuda")
    wanted, _ = expected(tensors, lists)
    assert_close(block_sparse_attention(*tensors, lists, impl="triton"), wanted, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_compiled_kernel_caps_and_sinks(dim: int, dtype: torch.dtype) -> None:
    shape = (4, 2, 777, 1133, dim, dim, 128)
    tensors = inputs(shape, dtype, "cuda")
    lists = lists_for(shape, 0.4, [0, 1, 1, 0], "cuda")
    options = {"softcap": 5.0, "sinks": torch.randn(4, device="cuda")}
    wanted, wanted_lse = expected(tensors, lists, **options)
    out, lse = attend_with_lse(*tensors, lists, impl="triton", **options)
    assert_close(out, wanted, dtype)
    torch.testing.assert_close(lse.double(), wanted_lse.double(), atol=1e-3, rtol=1e-3)
