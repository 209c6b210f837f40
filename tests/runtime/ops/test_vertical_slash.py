from __future__ import annotations

import pytest
import torch

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.vertical_slash import profile as torch_impl
from shareprefill.runtime.ops.vertical_slash import vertical_slash_profile

IMPLS = ["reference", "torch", pytest.param("triton", marks=pytest.mark.interpreter)]
# (H, G, Nq, Nk, D, block size)
SHAPES = [
    (2, 1, 1, 1, 8, 16),
    (2, 2, 63, 63, 16, 16),
    (4, 2, 129, 129, 16, 32),
    (6, 2, 9, 150, 16, 64),
    (2, 1, 40, 70, 8, 128),
    (2, 1, 150, 300, 8, 256),
]
FAST = [
    *((shape, "torch", torch.float32) for shape in SHAPES),
    (SHAPES[2], "torch", torch.bfloat16),
    *(
        pytest.param(shape, "triton", torch.float32, marks=pytest.mark.interpreter)
        for shape in SHAPES[1:]
    ),
    pytest.param(SHAPES[3], "triton", torch.float16, marks=pytest.mark.interpreter),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    heads, groups, n_q, n_k, dim, _ = shape
    sizes = [(heads, n_q, dim), (groups, n_k, dim)]
    return [torch.randn(size, device=device).to(dtype) for size in sizes]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_both_profiles_sum_to_one(shape: tuple[int, ...], impl: str) -> None:
    size = shape[-1]
    vertical, slash = vertical_slash_profile(
        *inputs(shape, torch.float32), block_size=size, impl=impl
    )
    n_k = -(-shape[3] // size)
    assert vertical.shape == (shape[0], n_k)
    assert slash.shape == (shape[0], n_k + 1)
    assert vertical.dtype == slash.dtype == torch.float32
    for profile in (vertical, slash):
        torch.testing.assert_close(profile.sum(-1), torch.ones(shape[0]))


@pytest.mark.parametrize("chosen", [None, [1, -1, 0, 1]], ids=["all", "some"])
@pytest.mark.parametrize(("shape", "impl", "dtype"), FAST, ids=str)
def test_fast_versions_equal_the_reference(
    shape: tuple[int, ...], chosen: list[int] | None, impl: str, dtype: torch.dtype
) -> None:
    query, key = inputs(shape, dtype)
    heads = None if chosen is None else torch.tensor(chosen)
    options = {"block_size": shape[-1], "scale": 0.4, "heads": heads}
    if chosen is None:
        options["softcap"] = 1.5
    wanted = vertical_slash_profile(query.double(), key.double(), **options, impl="reference")
    actual = vertical_slash_profile(query, key, **options, impl=impl)
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_single_offset_splits_between_two_diagonals(impl: str) -> None:
    # Row i looks back exactly 5 tokens: query and key are one-hot in position.
    n_tokens, size = 64, 16
    key = torch.eye(n_tokens)[None] * 100
    query = torch.zeros(1, n_tokens, n_tokens)
    query[0, 5:] = torch.eye(n_tokens)[: n_tokens - 5] * 100
    _, slash = vertical_slash_profile(query, key, block_size=size, impl=impl)
    torch.testing.assert_close(slash[0], torch.tensor([11 / 16, 5 / 16, 0, 0, 0]))


def test_chunks_of_heads_give_the_same_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (6, 3, 50, 50, 16, 16)
    query, key = inputs(shape, torch.float32)
    whole = vertical_slash_profile(query, key, block_size=16)
    monkeypatch.setitem(torch_impl.WEIGHT_BYTES, "cpu", 1)
    parts = vertical_slash_profile(query, key, block_size=16)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other)


def test_user_errors_say_what_came() -> None:
    query, key = inputs((2, 1, 20, 20, 8, 16), torch.float32)
    with pytest.raises(ConfigError, match="block_size must be at least 1"):
        vertical_slash_profile(query, key, block_size=0)
    with pytest.raises(ConfigError, match="heads must lie below 2, got 2"):
        vertical_slash_profile(query, key, block_size=16, heads=torch.tensor([0, 2]))
    with pytest.raises(ConfigError, match="impl must be one of auto, reference, torch"):
        vertical_slash_profile(query, key, block_size=16, impl="fast")
    with pytest.raises(ConfigError, match="softcap must be a positive number"):
        vertical_slash_profile(query, key, block_size=16, softcap=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("chosen", [None, [3, -1, 0, 5]], ids=["all", "some"])
def test_cuda_equals_float64(chosen: list[int] | None, dtype: torch.dtype) -> None:
    query, key = inputs((8, 2, 777, 4133, 128, 128), dtype, "cuda")
    heads = None if chosen is None else torch.tensor(chosen, device="cuda")
    options = {"block_size": 128, "heads": heads}
    wanted = vertical_slash_profile(query.double(), key.double(), **options, impl="torch")
    actual = vertical_slash_profile(query, key, **options)
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)
