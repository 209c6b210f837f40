"""Keys and values in pages give what the same ones give as tensors, whatever else pages hold."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from shareprefill.config import RuntimeConfig
from shareprefill.errors import ConfigError
from shareprefill.runtime.core import SparsePrefill
from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
from shareprefill.runtime.ops.blocks import BlockLists, count_blocks
from shareprefill.runtime.ops.dispatch import page_refusal
from shareprefill.runtime.ops.hopper import launch
from shareprefill.runtime.ops.pages import PagedTokens
from shareprefill.runtime.ops.pooled_attention import pooled_attention, sample_rows
from shareprefill.runtime.ops.vertical_slash import vertical_slash_profile
from shareprefill.runtime.plan import plan_without_artifact
from tests.support.pages import LAYOUTS, empty_pools

# The mass of a key block that a row does not see is zero, and its logarithm -inf.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REFUSAL = launch.unavailable(torch.device(DEVICE))
needs_hopper = pytest.mark.skipif(REFUSAL is not None, reason=f"the Hopper kernel {REFUSAL}")
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 1e-5}


def in_pages(
    key: torch.Tensor, value: torch.Tensor, size: int, layout: str = "joined"
) -> tuple[PagedTokens, PagedTokens]:
    """The same in pages in a random order; pages of others, and the last one's rest, hold NaN."""
    groups, tokens, dim = key.shape
    needed = count_blocks(tokens, size)
    order = torch.randperm(needed + 5, device=key.device)
    table = order[: needed + 2].int()
    options = {"dtype": key.dtype, "device": key.device}
    pools = empty_pools(layout, len(order), size, groups, dim, **options)
    if value.shape[2] != dim:
        pools = (
            pools[0],
            empty_pools(layout, len(order), size, groups, value.shape[2], **options)[1],
        )
    place = torch.arange(tokens, device=key.device)
    for pool, source in zip(pools, (key, value), strict=True):
        pool[table[place // size].long(), :, place % size] = source.transpose(0, 1)
    keys, values = (PagedTokens(pool, table, tokens) for pool in pools)
    return keys, values


def random_inputs(
    heads: int, groups: int, n_q: int, n_k: int, dim: int, value_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shapes = ((heads, n_q, dim), (groups, n_k, dim), (groups, n_k, value_dim))
    query, key, value = (torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)
    return query, key, value


def random_lists(heads: int, n_q: int, n_k: int, block: int, density: float) -> BlockLists:
    """Lists with blocks past the diagonal, empty rows, and rows whose last block is listed."""
    bitmap = torch.rand(3, count_blocks(n_q, block), count_blocks(n_k, block)) < density
    bitmap[0, :, -1] = True
    pattern = torch.arange(heads) % 3
    return BlockLists.from_bitmap(bitmap.to(DEVICE), pattern.to(DEVICE), block)


def results(inputs: tuple[Any, Any, Any], lists: BlockLists, impl: str) -> dict[str, torch.Tensor]:
    """What every operator makes of the inputs, in poisoned outputs where it takes one."""
    query, key, value = inputs
    heads, n_q, _ = query.shape
    block = lists.block_size
    out = torch.full((heads, n_q, value.shape[2]), torch.nan, dtype=query.dtype, device=DEVICE)
    lse = torch.full((heads, n_q), torch.nan, device=DEVICE)
    sinks = torch.linspace(-3, 3, heads, device=DEVICE)
    capped = torch.full_like(out, torch.nan)
    block_sparse_attention(query, key, value, lists, out=out, lse=lse, impl=impl)
    block_sparse_attention(
        query, key, value, lists, softcap=4.0, sinks=sinks, out=capped, impl=impl
    )
    found = {"sparse": out, "lse": lse, "capped": capped}
    chosen = torch.arange(heads, device=DEVICE).flip(0)
    chosen[1::3] = -1
    options: dict[str, Any] = {"block_size": block, "impl": impl}
    found["dense"], found["map"] = pooled_attention(query, key, value, **options)  # pyright: ignore
    some, found["some maps"] = pooled_attention(
        query, key, value, heads=chosen, sinks=sinks, **options
    )
    assert some is not None
    found["some"] = some
    rows = sample_rows(n_q, block, 3, device=DEVICE)
    found["sampled"] = pooled_attention(query, key, rows=rows, **options)[1]
    found["some sampled"] = pooled_attention(query, key, rows=rows, heads=chosen, **options)[1]
    return found


def capped_results(
    inputs: tuple[Any, Any, Any], block: int, impl: str, profile_impl: str
) -> dict[str, torch.Tensor]:
    """What only some implementations have: capped maps, and profiles."""
    query, key, value = inputs
    out, maps = pooled_attention(query, key, value, block_size=block, softcap=4.0, impl=impl)
    assert out is not None
    found = {"capped dense": out, "capped map": maps}
    for name, options in (("", {}), ("capped ", {"softcap": 4.0})):
        profiles = vertical_slash_profile(
            query, key, block_size=block, impl=profile_impl, **options
        )
        found[name + "vertical"], found[name + "slash"] = profiles
    return found


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
@pytest.mark.parametrize(
    ("n_q", "n_k", "size", "layout"),
    [
        (37, 101, 16, LAYOUTS[0]),
        (70, 70, 64, LAYOUTS[1]),
        (5, 129, 8, LAYOUTS[2]),
        (33, 67, 48, LAYOUTS[3]),
    ],
)
def test_pages_give_what_tensors_give(
    n_q: int, n_k: int, size: int, layout: str, impl: str
) -> None:
    query, key, value = random_inputs(4, 2, n_q, n_k, 16, 24, torch.float32)
    lists = random_lists(4, n_q, n_k, 32, 0.5)
    profile_impl = "torch" if impl == "blockwise" else impl
    found, expected = (
        results(inputs, lists, impl) | capped_results(inputs, 32, impl, profile_impl)
        for inputs in ((query, *in_pages(key, value, size, layout)), (query, key, value))
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6, msg=name)


def attend(query: Any, key: Any, value: Any, **options: Any) -> tuple[torch.Tensor, ...]:
    """Block-sparse attention in a poisoned output, and its log-sum-exp."""
    lists = random_lists(len(query), query.shape[1], key.shape[1], 32, 1.0)
    out = query.new_full((*query.shape[:2], value.shape[2]), torch.nan)
    lse = torch.full(query.shape[:2], torch.nan)
    block_sparse_attention(query, key, value, lists, out=out, lse=lse, softcap=4.0, **options)
    return out, lse


OPERATORS: dict[str, Any] = {
    "sparse": attend,
    "pooled": lambda q, k, v, **o: pooled_attention(q, k, v, block_size=32, **o),
    "map": lambda q, k, _, **o: pooled_attention(q, k, block_size=32, **o)[1:],
    "profile": lambda q, k, _, **o: vertical_slash_profile(q, k, block_size=32, **o),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("operator", list(OPERATORS))
@pytest.mark.parametrize("size", [8, 32, 64])
def test_triton_s_kernels_find_pages(size: int, operator: str) -> None:
    """Of fewer, of as many and of more tokens than their tiles."""
    query, key, value = random_inputs(2, 1, 9, 75, 16, 24, torch.float32)
    pages = in_pages(key, value, size, LAYOUTS[size % 3])
    expected = OPERATORS[operator](query, key, value, impl="triton")
    found = OPERATORS[operator](query, *pages, impl="triton")
    assert "gathered" not in vars(pages[0])
    for own, wanted in zip(found, expected, strict=True):
        assert torch.equal(own, wanted)


@pytest.mark.parametrize("policy", ["pooled", "antidiagonal", "vertical-slash", "flex", "dense"])
def test_a_layer_in_pages_does_what_it_does_on_tensors(policy: str) -> None:
    of_patterns = {} if policy == "dense" else {"max_density": 1.0}
    config = RuntimeConfig(policy=policy, min_tokens=0, **of_patterns)
    plan = plan_without_artifact(1, 4, config)
    prefill = SparsePrefill(plan)
    query, key, value = random_inputs(4, 2, 300, 700, 16, 16, torch.float32)
    geometry = plan.geometry(300, 700, query.device)
    pages = in_pages(key, value, 16)
    wanted, record = prefill.attend(0, prefill.begin(geometry), query, key, value, scale=0.25)
    found, paged = prefill.attend(0, prefill.begin(geometry), query, *pages, scale=0.25)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert torch.equal(paged.blocks, record.blocks)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [16, 128, 272])
def test_a_page_is_where_a_descriptor_of_the_pool_has_it(layout: str, size: int) -> None:
    pools = empty_pools(layout, 5, size, 3, 128, dtype=torch.float16)
    for pool in pools:
        tokens = PagedTokens(pool, torch.arange(5, dtype=torch.int32), 4 * size + 3)
        assert launch.page_refusal(tokens) is None
        step, strides = launch.page_step(tokens), [pool.stride(1), pool.stride(2), 1]
        for page in range(5):
            for head in range(3):
                slot = page * step + head
                assert slot * strides[0] == page * pool.stride(0) + head * pool.stride(1)
        if find_spec("triton") is not None:
            descriptor = launch.describe_tiles(tokens, 128)
            assert descriptor.block_shape == ([1, 128, 128] if size == 128 else [1, 16, 64])
            assert descriptor.shape == [4 * step + 3, size, 128]
            assert descriptor.strides == strides
            assert descriptor.base is pool


def paged(size: int, groups: int = 2, dim: int = 64, **options: Any) -> PagedTokens:
    pool = torch.zeros(4, groups, size, dim, dtype=torch.float16, **options)
    return PagedTokens(pool, torch.arange(4, dtype=torch.int32), 3 * size)


def test_which_pages_are_read_where_they_are() -> None:
    for size in (16, 48, 64, 128, 272, 384):
        assert page_refusal("hopper", paged(size)) is None
    for size in (8, 40):
        assert f"a multiple of 16 tokens, got {size}" in (page_refusal("hopper", paged(size)) or "")
    for size in (1, 16, 64, 512):
        assert page_refusal("triton", paged(size)) is None
    assert "power of two of tokens, got 48" in (page_refusal("triton", paged(48)) or "")
    for impl in ("reference", "blockwise", "torch"):
        assert page_refusal(impl, paged(128)) == "reads no pages"


def test_pages_that_the_copy_engine_cannot_read_are_named() -> None:
    table = torch.arange(2, dtype=torch.int32)
    base = torch.zeros(200_000, dtype=torch.float16)
    sizes = (2, 2, 128, 64)
    for strides, reason in (
        ((16384, 8192, 65, 1), "multiples of 16 bytes"),
        ((16384, 8192, 64, 2), "multiples of 16 bytes"),
        ((16392, 8200, 64, 1), "divide the step between pages"),
    ):
        tokens = PagedTokens(base.as_strided(sizes, strides), table, 200)
        assert reason in (launch.page_refusal(tokens) or "")
    # A single head's stride does not matter.
    tokens = PagedTokens(base.as_strided((2, 1, 128, 64), (8192, 5, 64, 1)), table, 200)
    assert launch.page_refusal(tokens) is None
    assert launch.page_step(tokens) == 1


def test_what_does_not_belong_together_is_refused() -> None:
    pool, table = torch.zeros(4, 2, 16, 8), torch.arange(3, dtype=torch.int32)
    with pytest.raises(ConfigError, match="3 pages of 16 tokens do not hold 49 tokens"):
        PagedTokens(pool, table, 49)
    with pytest.raises(ConfigError, match=r"got \(2, 16, 8\) and \(3,\)"):
        PagedTokens(pool[0], table, 40)
    with pytest.raises(ConfigError, match="int32 or int64, got torch.float32"):
        PagedTokens(pool, table.float(), 40)
    query, key = torch.zeros(4, 40, 8), PagedTokens(pool, table, 40)
    for value in (
        torch.zeros(2, 40, 8),
        PagedTokens(pool, table.clone(), 40),
        PagedTokens(torch.zeros(4, 2, 32, 8), table, 40),
    ):
        with pytest.raises(ConfigError, match="both lie in pages of one size that one table"):
            pooled_attention(query, key, value, block_size=16)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Where both are infinite nothing counts; a NaN is an infinite error."""
    wanted = wanted.double()
    same = (found == wanted) & wanted.isinf()
    difference = (found.double() - wanted).masked_fill(same, 0.0).norm()
    error = difference / wanted.masked_fill(same, 0.0).norm().clamp(min=1e-12)
    return torch.inf if error.isnan() else error.item()


def check_on_gpu(
    sizes: tuple[int, int, int, int, int], page: int, layout: str, dtype: torch.dtype, impl: str
) -> None:
    """All operators on pages against the reference on float64 tensors."""
    heads, _, n_q, n_k, dim = sizes
    query, key, value = random_inputs(*sizes, dim, dtype)
    lists = random_lists(heads, n_q, n_k, 128, 0.4)
    pages = (query, *in_pages(key, value, page, layout))
    assert page_refusal(impl, pages[1]) is None
    doubles = (query.double(), key.double(), value.double())
    expected = results(doubles, lists, "reference")
    found = results(pages, lists, impl)
    if impl == "triton":
        expected |= capped_results(doubles, 128, "reference", "torch")
        found |= capped_results(pages, 128, "triton", "triton")
    assert "gathered" not in vars(pages[1])
    for name, wanted in expected.items():
        assert relative_error(found[name], wanted) <= TOLERANCE[dtype], name


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("sizes", "page", "dtype"),
    [
        ((8, 2, 1, 1, 128), 128, torch.bfloat16),
        ((8, 2, 63, 129, 128), 128, torch.bfloat16),
        ((8, 1, 300, 1000, 128), 128, torch.bfloat16),
        ((6, 3, 777, 2049, 64), 128, torch.float16),
        ((6, 2, 1111, 1300, 128), 256, torch.bfloat16),
        ((4, 4, 130, 640, 96), 384, torch.bfloat16),
        ((32, 8, 2000, 5001, 128), 128, torch.bfloat16),
        ((8, 2, 1, 1, 128), 16, torch.bfloat16),
        ((8, 2, 63, 129, 128), 16, torch.bfloat16),
        ((8, 1, 300, 1009, 128), 16, torch.bfloat16),
        ((6, 3, 777, 2049, 64), 32, torch.float16),
        ((6, 2, 1111, 1328, 128), 64, torch.bfloat16),
        ((4, 4, 130, 600, 96), 16, torch.float16),
        ((8, 2, 1111, 1328, 128), 48, torch.bfloat16),
        ((6, 2, 300, 2209, 64), 272, torch.float16),
        ((32, 8, 2000, 5001, 128), 16, torch.bfloat16),
    ],
)
def test_hopper_kernels_read_pages(
    sizes: tuple[int, int, int, int, int], page: int, dtype: torch.dtype, layout: str
) -> None:
    check_on_gpu(sizes, page, layout, dtype, "hopper")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sizes", "page", "dtype", "layout"),
    [
        ((8, 2, 1, 1, 128), 16, torch.bfloat16, LAYOUTS[0]),
        ((8, 2, 63, 129, 128), 16, torch.bfloat16, LAYOUTS[1]),
        ((6, 3, 777, 2049, 64), 32, torch.float16, LAYOUTS[2]),
        ((6, 2, 300, 1300, 80), 64, torch.bfloat16, LAYOUTS[3]),
        ((8, 2, 1111, 1300, 128), 128, torch.bfloat16, LAYOUTS[0]),
        ((4, 2, 200, 1001, 256), 256, torch.bfloat16, LAYOUTS[1]),
        ((4, 1, 100, 701, 32), 1, torch.float32, LAYOUTS[2]),
    ],
)
def test_triton_kernels_read_pages(
    sizes: tuple[int, int, int, int, int], page: int, dtype: torch.dtype, layout: str
) -> None:
    check_on_gpu(sizes, page, layout, dtype, "triton")


@pytest.mark.gpu
@needs_hopper
def test_pages_of_another_size_are_gathered_for_the_hopper_kernels() -> None:
    query, key, value = random_inputs(8, 2, 300, 1000, 128, 128, torch.bfloat16)
    lists = random_lists(8, 300, 1000, 128, 0.5)
    pages = in_pages(key, value, 40)
    found = block_sparse_attention(query, *pages, lists, impl="hopper")
    assert "gathered" in vars(pages[0])
    assert torch.equal(found, block_sparse_attention(query, key, value, lists, impl="hopper"))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("size", [16, 128])
def test_a_new_size_of_a_pool_compiles_nothing(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    import triton

    def run(heads: int, groups: int, n_q: int, n_k: int) -> None:
        query, key, value = random_inputs(heads, groups, n_q, n_k, 128, 128, torch.bfloat16)
        pages = in_pages(key, value, size, LAYOUTS[n_q % 2])
        lists = random_lists(heads, n_q, n_k, 128, 0.5)
        rows = sample_rows(n_q, 128, 3, device=DEVICE)
        block_sparse_attention(query, *pages, lists, impl="hopper")
        pooled_attention(query, *pages, block_size=128, impl="hopper")
        pooled_attention(query, pages[0], rows=rows, block_size=128, impl="hopper")

    run(4, 2, 256, 256)
    compiled = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **call: compiled.append(call)
    )
    for heads, groups, n_q, n_k in ((4, 2, 130, 130), (14, 7, 255, 1111), (16, 8, 640, 641)):
        run(heads, groups, n_q, n_k)
    assert not compiled
