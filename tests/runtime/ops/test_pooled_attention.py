from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shareprefill.errors import ConfigError, UnsupportedError
from shareprefill.runtime.ops.hopper import launch
from shareprefill.runtime.ops.pooled_attention import blockwise, pooled_attention, sample_rows

# The mass of a key block that a row does not see is zero, and its logarithm -inf.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")

# Largest absolute error of outputs and of map entries, against float64 of the same inputs.
TOLERANCE = {
    torch.float64: (1e-12, 1e-7),
    torch.float32: (2e-5, 1e-6),
    torch.float16: (4e-3, 1e-4),
    torch.bfloat16: (3e-2, 1e-4),
}
IMPLS = ["reference", "blockwise", pytest.param("triton", marks=pytest.mark.interpreter)]
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
FAST = [
    *((shape, "blockwise", dtype) for shape in SHAPES for dtype in list(TOLERANCE)[:2]),
    *((shape, "blockwise", torch.bfloat16) for shape in SHAPES[2:4]),
    *(
        pytest.param(SHAPES[place], "triton", torch.float32, marks=pytest.mark.interpreter)
        for place in (0, 2, 4, 5, 6)
    ),
    pytest.param(SHAPES[3], "triton", torch.float16, marks=pytest.mark.interpreter),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    heads, groups, n_q, n_k, dim, value_dim, _ = shape
    sizes = [(heads, n_q, dim), (groups, n_k, dim), (groups, n_k, value_dim)]
    return [torch.randn(size, device=device).to(dtype) for size in sizes]


def doubles(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.double() for tensor in tensors]


def random_rows(n_q: int) -> torch.Tensor:
    return torch.randint(n_q, (4, 3))


@pytest.mark.parametrize(
    ("tokens", "size", "r", "wanted"),
    [
        (10, 4, 4, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 8, 8, 9]]),
        (10, 4, 3, [[0, 1, 3], [4, 5, 7], [8, 8, 9]]),
        (6, 4, 1, [[3], [5]]),
    ],
)
def test_sampled_rows_are_evenly_spaced_and_end_each_block(
    tokens: int, size: int, r: int, wanted: list[list[int]]
) -> None:
    assert sample_rows(tokens, size, r).tolist() == wanted


@pytest.mark.parametrize("r", [0, 17])
def test_sampling_refuses_impossible_numbers(r: int) -> None:
    with pytest.raises(ConfigError, match=r"1 <= r <= block_size \(16\)"):
        sample_rows(40, 16, r)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_output_equals_sdpa(shape: tuple[int, ...]) -> None:
    heads, groups, n_q, n_k, _, _, size = shape
    query, key, value = inputs(shape, torch.float64)
    out, _ = pooled_attention(query, key, value, block_size=size, impl="reference")
    mask = torch.arange(n_k)[None, :] <= torch.arange(n_k - n_q, n_k)[:, None]
    key, value = (tensor.repeat_interleave(heads // groups, 0) for tensor in (key, value))
    wanted = F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=mask)
    assert out is not None
    torch.testing.assert_close(out, wanted[0])


def test_reference_map_is_the_block_mean_of_attention() -> None:
    query, key, _ = inputs((1, 1, 6, 6, 8, 8, 4), torch.float64)
    _, maps = pooled_attention(query, key, block_size=4, impl="reference")
    weights = torch.zeros(6, 6, dtype=torch.float64)
    for i in range(6):
        weights[i, : i + 1] = torch.softmax(query[0, i] @ key[0, : i + 1].T / 8**0.5, -1)
    wanted = [
        [weights[:4, :4].sum() / 4, 0.0],
        [weights[4:, :4].sum() / 2, weights[4:, 4:].sum() / 2],
    ]
    torch.testing.assert_close(maps[0], torch.tensor(wanted).float())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES[1:5:3], ids=str)
def test_map_rows_sum_to_one(shape: tuple[int, ...], impl: str) -> None:
    query, key, _ = inputs(shape, torch.float32)
    for rows in (None, random_rows(shape[2])):
        _, maps = pooled_attention(query, key, rows=rows, block_size=shape[-1], impl=impl)
        assert maps.dtype == torch.float32
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:2]))


@pytest.mark.parametrize(("shape", "impl", "dtype"), FAST, ids=str)
def test_all_rows_equal_the_reference(
    shape: tuple[int, ...], impl: str, dtype: torch.dtype
) -> None:
    tensors = inputs(shape, dtype)
    options = {"block_size": shape[-1], "scale": 0.3}
    wanted_out, wanted_maps = pooled_attention(*doubles(tensors), **options, impl="reference")
    out, maps = pooled_attention(*tensors, **options, impl=impl)
    assert out is not None
    assert wanted_out is not None
    assert out.dtype == dtype
    out_limit, map_limit = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), wanted_out, atol=out_limit, rtol=out_limit)
    torch.testing.assert_close(maps, wanted_maps, atol=map_limit, rtol=map_limit)
    nothing, alone = pooled_attention(*tensors[:2], **options, impl=impl)
    assert nothing is None
    torch.testing.assert_close(alone, wanted_maps, atol=map_limit, rtol=map_limit)


@pytest.mark.parametrize(("shape", "impl", "dtype"), FAST, ids=str)
@pytest.mark.parametrize("per_block", [None, 5])
def test_sampled_rows_equal_the_reference(
    shape: tuple[int, ...], per_block: int | None, impl: str, dtype: torch.dtype
) -> None:
    tensors = inputs(shape, dtype)[:2]
    rows = sample_rows(shape[2], shape[-1], per_block) if per_block else random_rows(shape[2])
    options = {"rows": rows, "block_size": shape[-1], "scale": 0.3}
    _, wanted = pooled_attention(*doubles(tensors), **options, impl="reference")
    _, maps = pooled_attention(*tensors, **options, impl=impl)
    limit = TOLERANCE[dtype][1]
    torch.testing.assert_close(maps, wanted, atol=limit, rtol=limit)


@pytest.mark.interpreter
@pytest.mark.parametrize(("dim", "value_dim", "size"), [(16, 24, 128), (72, 8, 64)])
def test_triton_splits_blocks_into_tiles_and_pads_head_dims(
    dim: int, value_dim: int, size: int
) -> None:
    tensors = inputs((2, 1, 140, 151, dim, value_dim, size), torch.float32)
    out_limit, map_limit = TOLERANCE[torch.float32]
    wanted_out, wanted = pooled_attention(*doubles(tensors), block_size=size, impl="reference")
    out, maps = pooled_attention(*tensors, block_size=size, impl="triton")
    torch.testing.assert_close(out.double(), wanted_out, atol=out_limit, rtol=out_limit)
    torch.testing.assert_close(maps, wanted, atol=map_limit, rtol=map_limit)
    rows = sample_rows(140, size, size)
    _, maps = pooled_attention(*tensors[:2], rows=rows, block_size=size, impl="triton")
    _, wanted = pooled_attention(
        *doubles(tensors[:2]), rows=rows, block_size=size, impl="reference"
    )
    torch.testing.assert_close(maps, wanted, atol=map_limit, rtol=map_limit)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_row_sampled_is_the_whole_map(impl: str) -> None:
    query, key, _ = inputs((2, 1, 64, 80, 16, 16, 16), torch.float32)
    _, whole = pooled_attention(query, key, block_size=16, impl=impl)
    _, sampled = pooled_attention(
        query, key, rows=sample_rows(64, 16, 16), block_size=16, impl=impl
    )
    torch.testing.assert_close(sampled, whole)


@pytest.mark.parametrize("impl", IMPLS)
def test_heads_are_computed_in_the_given_order(impl: str) -> None:
    tensors = inputs((6, 2, 45, 61, 16, 16, 16), torch.float32)
    heads = torch.tensor([4, 0, 5, 1])
    out, maps = pooled_attention(*tensors, block_size=16, impl=impl)
    some_out, some_maps = pooled_attention(*tensors, heads=heads, block_size=16, impl=impl)
    assert out is not None
    assert some_out is not None
    torch.testing.assert_close(some_out, out[heads])
    torch.testing.assert_close(some_maps, maps[heads])
    rows = random_rows(45)
    _, all_sampled = pooled_attention(*tensors[:2], rows=rows, block_size=16, impl=impl)
    _, sampled = pooled_attention(*tensors[:2], rows=rows, heads=heads, block_size=16, impl=impl)
    torch.testing.assert_close(sampled, all_sampled[heads])


@pytest.mark.parametrize("impl", IMPLS)
def test_skipped_heads_are_zeros(impl: str) -> None:
    tensors = inputs((6, 2, 45, 61, 16, 16, 16), torch.float32)
    heads, wanted = torch.tensor([-1, 4, -7, 0]), torch.tensor([4, 0])
    out, maps = pooled_attention(*tensors, heads=heads, block_size=16, impl=impl)
    some_out, some_maps = pooled_attention(*tensors, heads=wanted, block_size=16, impl=impl)
    assert out is not None
    assert some_out is not None
    torch.testing.assert_close(out[[1, 3]], some_out)
    torch.testing.assert_close(maps[[1, 3]], some_maps)
    rows = random_rows(45)
    _, sampled = pooled_attention(*tensors[:2], rows=rows, heads=heads, block_size=16, impl=impl)
    _, alone = pooled_attention(*tensors[:2], heads=heads, block_size=16, impl=impl)
    torch.testing.assert_close(alone, maps)
    assert (sampled[[1, 3]].sum(-1) > 0.99).all()
    for zeros in (out, maps, sampled):
        assert not zeros[[0, 2]].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("heads", [None, [3, -1, 0]], ids=["all", "some"])
def test_softcap_and_sinks(heads: list[int] | None, impl: str) -> None:
    query, key, value = inputs((4, 2, 45, 61, 16, 24, 16), torch.float64)
    sinks = torch.tensor([-torch.inf, 0.0, 2.0, 30.0])
    logits = query @ key.repeat_interleave(2, 0).mT * 0.5
    logits = 1.5 * torch.tanh(logits / 1.5)
    hidden = torch.arange(61)[None, :] > torch.arange(16, 61)[:, None]
    logits.masked_fill_(hidden, -torch.inf)
    with_sink = torch.cat([logits, sinks.double()[:, None, None].expand(4, 45, 1)], -1)
    wanted = torch.softmax(with_sink, -1)[..., :-1] @ value.repeat_interleave(2, 0)
    mass = torch.softmax(logits, -1)
    mass = torch.nn.functional.pad(mass, (0, 3)).unflatten(2, (4, 16)).sum(-1)
    wanted_maps = torch.stack([rows.mean(1) for rows in mass.split(16, 1)], 1)
    if heads is not None:
        kept = torch.tensor(heads)
        wanted, wanted_maps = (
            torch.where((kept >= 0)[:, None, None], tensor[kept.clamp(min=0)], 0.0)
            for tensor in (wanted, wanted_maps)
        )
    dtype = torch.float64 if impl == "reference" else torch.float32
    out, maps = pooled_attention(
        *(tensor.to(dtype) for tensor in (query, key, value)),
        block_size=16,
        scale=0.5,
        softcap=1.5,
        sinks=sinks,
        heads=None if heads is None else torch.tensor(heads),
        impl=impl,
    )
    assert out is not None
    torch.testing.assert_close(out.double(), wanted, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(maps, wanted_maps.float(), atol=2e-6, rtol=1e-5)


@pytest.mark.interpreter
def test_triton_splits_keys_and_rows_over_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    from shareprefill.runtime.ops.pooled_attention import triton
    from shareprefill.runtime.ops.pooled_attention.launches import Division

    query, key, _ = inputs((2, 1, 100, 111, 16, 16, 16), torch.float32)
    monkeypatch.setattr(triton, "DIVISION", Division(programs=1, least=2, most=2))
    monkeypatch.setattr(triton, "SPLITS", 2)
    triton._mass_settings.cache_clear()
    monkeypatch.setattr(triton, "WAVE_BYTES", 1)
    for rows in (None, sample_rows(100, 16, 5)):
        options = {"rows": rows, "block_size": 16}
        _, wanted = pooled_attention(query.double(), key.double(), **options, impl="reference")
        _, maps = pooled_attention(query, key, **options, impl="triton")
        torch.testing.assert_close(maps, wanted, atol=1e-6, rtol=1e-5)
    triton._mass_settings.cache_clear()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_heads_give_empty_results(impl: str) -> None:
    tensors = inputs((2, 1, 20, 20, 16, 16, 16), torch.float32)
    none = torch.zeros(0, dtype=torch.int64)
    out, maps = pooled_attention(*tensors, heads=none, block_size=16, impl=impl)
    assert out is not None
    assert out.shape == (0, 20, 16)
    assert maps.shape == (0, 2, 2)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_views_are_read(impl: str) -> None:
    tensors = inputs((4, 2, 45, 61, 16, 16, 16), torch.float32)
    wanted_out, wanted = pooled_attention(*tensors, block_size=16, impl="reference")
    views = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in tensors]
    views[1] = tensors[1].mT.contiguous().mT  # last stride is not 1
    out, maps = pooled_attention(*views, block_size=16, impl=impl)
    torch.testing.assert_close(out, wanted_out, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(maps, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_far_logits_stay_finite(impl: str) -> None:
    # Logits near +-1000 with the maximum moving late: sums must be rescaled, not overflow.
    query, key, _ = inputs((1, 1, 90, 90, 16, 16, 16), torch.float32)
    options = {"block_size": 16, "scale": 60.0}
    _, wanted = pooled_attention(query.double(), key.double(), **options, impl="reference")
    _, maps = pooled_attention(query, key, **options, impl=impl)
    torch.testing.assert_close(maps, wanted, atol=1e-3, rtol=1e-3)


def test_small_budgets_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs((4, 2, 70, 90, 16, 16, 16), torch.float32)
    rows = sample_rows(70, 16, 5)
    whole = pooled_attention(*tensors, block_size=16)
    sampled = pooled_attention(*tensors[:2], rows=rows, block_size=16)[1]
    monkeypatch.setattr(blockwise, "LOGIT_BYTES", 2 * 7 * 96 * 4)
    monkeypatch.setattr(blockwise, "SAMPLED_ROWS", 9)
    parts = pooled_attention(*tensors, block_size=16)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(pooled_attention(*tensors[:2], rows=rows, block_size=16)[1], sampled)


def test_user_errors_say_what_came() -> None:
    query, key, value = inputs((2, 1, 20, 30, 16, 16, 16), torch.float32)
    rows = sample_rows(20, 16, 2)
    cases = [
        ((query, key, value), {"rows": rows}, "value needs rows=None"),
        ((query, key), {"rows": rows.int()}, "rows must be int64"),
        ((query, key), {"rows": rows + 10}, r"rows must lie in 0..19, got 17..29"),
        ((query, key), {"rows": rows[:0]}, "must not be empty"),
        ((query, key), {"heads": torch.tensor([2])}, "heads must lie below 2, got 2"),
        ((query, key), {"softcap": -1.0}, "softcap must be a positive number"),
        ((query, key), {"sinks": torch.zeros(3)}, "sinks must be one floating-point logit"),
        ((query, key), {"heads": torch.tensor([[1]])}, r"heads must be int64 \[S\]"),
        ((query, key), {"impl": "torch"}, "impl must be one of"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ConfigError, match=message):
            pooled_attention(*arguments, block_size=16, **options)


def test_the_hopper_kernel_says_what_it_lacks() -> None:
    tensors = inputs((2, 1, 20, 30, 16, 16, 16), torch.float32)
    with pytest.raises(UnsupportedError, match="impl='hopper' needs a Hopper GPU"):
        pooled_attention(*tensors, block_size=16, impl="hopper")


@pytest.mark.gpu
def test_a_graph_can_be_captured_and_skipped_heads_cost_no_wait() -> None:
    tensors = inputs((8, 2, 1000, 1100, 128, 128, 128), torch.bfloat16, "cuda")
    heads = torch.tensor([3, 0, 5], device="cuda")
    rows = sample_rows(1000, 128, 8, "cuda")

    def pool() -> tuple[torch.Tensor, ...]:
        out, maps = pooled_attention(*tensors, heads=heads, block_size=128)
        assert out is not None
        return out, maps, pooled_attention(*tensors[:2], heads=heads, rows=rows, block_size=128)[1]

    pool()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = pool()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    heads.copy_(torch.tensor([7, -1, 1]))
    graph.replay()
    for one, other in zip(captured, pool(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert not one[1].any()


needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or launch.unavailable(torch.device("cuda")) is not None,
    reason="the kernel needs a Hopper GPU",
)


@pytest.mark.gpu
@needs_hopper
def test_hopper_results_do_not_depend_on_who_draws_a_tile() -> None:
    query, key, value = inputs((8, 2, 5000, 5100, 128, 128, 128), torch.bfloat16, "cuda")
    wanted_out, wanted = pooled_attention(query, key, value, block_size=128, impl="hopper")
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    for place in range(12):
        with torch.cuda.stream(streams[place % 3]):
            results.append(pooled_attention(query, key, value, block_size=128, impl="hopper"))
    torch.cuda.synchronize()
    for out, maps in results:
        assert torch.equal(maps, wanted)
        assert out is not None
        assert wanted_out is not None
        assert torch.equal(out, wanted_out)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("n_q", [1, 64, 128, 129, 1921])
@pytest.mark.parametrize("past", [0, 1, 127, 3000])
def test_hopper_maps_where_tiles_end(n_q: int, past: int) -> None:
    tensors = inputs((6, 2, n_q, n_q + past, 128, 128, 128), torch.bfloat16, "cuda")
    exact = [tensor.float() for tensor in tensors]
    wanted_out, wanted = pooled_attention(*exact, block_size=128, impl="reference")
    out, maps = pooled_attention(*tensors, block_size=128, impl="hopper")
    out_limit, map_limit = TOLERANCE[torch.bfloat16]
    assert out is not None
    torch.testing.assert_close(out.float(), wanted_out, atol=out_limit, rtol=out_limit)
    torch.testing.assert_close(maps, wanted, atol=map_limit, rtol=2e-3)
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]), atol=1e-4, rtol=0)


@pytest.mark.gpu
@needs_hopper
def test_a_new_size_compiles_no_hopper_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    compiled = []
    pooled_attention(
        *inputs((4, 2, 256, 256, 128, 128, 128), torch.bfloat16, "cuda"),
        block_size=128,
        impl="hopper",
    )
    hook = "jit_post_compile_hook"
    monkeypatch.setattr(triton.knobs.runtime, hook, lambda **call: compiled.append(call))
    for heads, groups, n_q, n_k in ((4, 2, 1, 1), (7, 7, 255, 1111), (16, 2, 640, 641)):
        tensors = inputs((heads, groups, n_q, n_k, 128, 128, 128), torch.bfloat16, "cuda")
        pooled_attention(*tensors, block_size=128, impl="hopper")
    assert not compiled


GPU_SHAPES = [
    (8, 2, n_q, n_k, dim, dim, size)
    for n_q, n_k in [(1000, 1000), (4133, 4133), (777, 4133)]
    for dim in (64, 96, 128, 256)
    for size in (64, 128)
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_compiled_kernels_equal_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = inputs(shape, dtype, "cuda")
    size = shape[-1]
    exact = [tensor.float() for tensor in tensors]
    heads = torch.tensor([7, -1, 0, 1], device="cuda")
    out_limit, map_limit = TOLERANCE[dtype]
    options = {"heads": heads, "sinks": torch.randn(8, device="cuda"), "block_size": size}
    wanted_out, wanted = pooled_attention(*exact, **options, impl="reference")
    out, maps = pooled_attention(*tensors, **options)
    assert out is not None
    torch.testing.assert_close(out.float(), wanted_out, atol=out_limit, rtol=out_limit)
    torch.testing.assert_close(maps, wanted, atol=map_limit, rtol=2e-3)
    plain_out, plain = pooled_attention(*tensors, **options, impl="triton")
    torch.testing.assert_close(plain_out.float(), wanted_out, atol=out_limit, rtol=out_limit)
    torch.testing.assert_close(plain, wanted, atol=map_limit, rtol=2e-3)
    _, maps = pooled_attention(*tensors[:2], block_size=size, heads=heads)
    torch.testing.assert_close(maps, wanted, atol=map_limit, rtol=2e-3)
    rows = sample_rows(shape[2], size, 8, "cuda")
    _, wanted = pooled_attention(*exact[:2], rows=rows, block_size=size, impl="reference")
    _, maps = pooled_attention(*tensors[:2], rows=rows, block_size=size)
    torch.testing.assert_close(maps, wanted, atol=map_limit, rtol=2e-3)
