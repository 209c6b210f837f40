"""Checks that the operators share, made once at their door."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.pages import Cached, PagedBatch, PagedTokens, Tokens

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def facts(tokens: Tokens | None) -> Hashable:
    """All of a tensor that checks and launches depend on, but for its values; hashable."""
    if tokens is None:
        return None
    if isinstance(tokens, PagedTokens):
        return facts(tokens.pool), facts(tokens.table), tokens.n_tokens
    start = tokens.data_ptr() % 16
    return tokens.shape, tokens.stride(), tokens.dtype, tokens.device, start


def check_attention_inputs(
    query: torch.Tensor,
    key: Tokens,
    value: Tokens | None = None,
    *,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None = None,
) -> float:
    """Refuse inputs of attention that do not belong together.

    Args:
        query: `[H, Nq, D]`.
        key: `[G, Nk, D]`, or in pages; G divides H and Nk >= Nq >= 1.
        value: `[G, Nk, Dv]` or None; where keys are in pages, in those of the same table.
        scale: a positive number, or None for `1 / sqrt(D)`.
        softcap: a positive number, or None.
        sinks: floating-point `[H]` on query's device, or None.

    Returns:
        The scale.

    Raises:
        ConfigError: says what was expected and what came.
    """
    _check_shapes(query, key, value)
    n_heads, _, head_dim = query.shape
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ConfigError(f"softcap must be a positive number, or None for no bound, got {softcap}")
    if sinks is not None and (
        sinks.shape != (n_heads,)
        or not sinks.dtype.is_floating_point
        or sinks.device != query.device
    ):
        raise ConfigError(
            f"sinks must be one floating-point logit for each of {n_heads} query heads on "
            f"{query.device}, got {sinks.dtype} of shape {tuple(sinks.shape)} on {sinks.device}"
        )
    return logit_scale(scale, head_dim)


def logit_scale(scale: float | None, head_dim: int) -> float:
    """The factor of the logits, `1 / sqrt(D)` where none is given.

    Raises:
        ConfigError: it is not a positive number.
    """
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if not 0.0 < scale < math.inf:
        raise ConfigError(f"scale must be a positive number, got {scale}")
    return float(scale)


def check_same_kind(query: torch.Tensor, tensors: Mapping[str, Tokens | Cached]) -> None:
    """Checks that tensors have the dtype and device of a floating-point query.

    Raises:
        ConfigError: one has not.
    """
    for name, tensor in tensors.items():
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ConfigError(
                f"{name} must have query's dtype and device ({query.dtype}, {query.device}), "
                f"got {tensor.dtype}, {tensor.device}"
            )
    if query.dtype not in FLOAT_DTYPES:
        raise ConfigError(f"query must be a floating-point tensor, got {query.dtype}")


def _check_shapes(query: torch.Tensor, key: Tokens, value: Tokens | None) -> None:
    tensors: dict[str, Tokens] = {"query": query, "key": key} | (
        {} if value is None else {"value": value}
    )
    for name, tensor in tensors.items():
        if tensor.ndim != 3:
            raise ConfigError(
                f"{name} must be [heads, tokens, head_dim] of one sequence, "
                f"got shape {tuple(tensor.shape)}; loop over the batch"
            )
    check_same_kind(query, tensors)
    n_heads, n_q_tokens, head_dim = query.shape
    n_groups, n_k_tokens, key_dim = key.shape
    if head_dim != key_dim or head_dim < 1:
        raise ConfigError(f"query has head_dim {head_dim}, key {key_dim}; they must be equal")
    if n_groups < 1 or n_heads < 1 or n_heads % n_groups:
        raise ConfigError(f"{n_groups} KV heads do not divide {n_heads} query heads")
    if not 1 <= n_q_tokens <= n_k_tokens:
        raise ConfigError(
            f"need 1 <= Nq <= Nk (the queries are the last tokens), "
            f"got Nq = {n_q_tokens}, Nk = {n_k_tokens}"
        )
    if value is not None and (value.shape[:2] != key.shape[:2] or value.shape[2] < 1):
        raise ConfigError(
            f"value must be [{n_groups}, {n_k_tokens}, Dv] like key, got {tuple(value.shape)}"
        )
    if value is not None and not lie_alike(key, value):
        raise ConfigError(
            "key and value must both be tensors, or both lie in pages of one size that one table "
            f"names, got {type(key).__name__} and {type(value).__name__}"
        )


def lie_alike(key: Tokens, value: Tokens) -> bool:
    """Whether keys and values are both tensors, or both lie in pages that one table names."""
    if isinstance(key, PagedTokens) and isinstance(value, PagedTokens):
        return key.shares_pages(value)
    return not isinstance(key, PagedTokens) and not isinstance(value, PagedTokens)


def check_tensor(
    name: str,
    tensor: Cached,
    dtype: torch.dtype,
    shape: Sequence[int | str],
    device: torch.device,
) -> None:
    """Refuse a tensor of another dtype, shape or device.

    Args:
        name: the argument's.
        tensor: what came.
        dtype: wanted.
        shape: wanted sizes; a letter stands for any.
        device: wanted.

    Raises:
        ConfigError: says what was expected and what came.
    """
    wanted = len(shape) == tensor.ndim and all(
        isinstance(want, str) or want == size
        for want, size in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype != dtype or tensor.device != device or not wanted:
        raise ConfigError(
            f"{name} must be {str(dtype).removeprefix('torch.')} "
            f"[{', '.join(map(str, shape))}] on {device}, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        )


def check_below(name: str, numbers: torch.Tensor, end: int, *, start: int | None = None) -> None:
    """Refuse numbers from `end` on, or below `start`; on a CPU alone: a GPU would be waited for."""
    if numbers.device.type != "cpu" or not numbers.numel():
        return
    low, high = int(numbers.min()), int(numbers.max())
    if start is not None and not start <= low <= high < end:
        raise ConfigError(f"{name} must lie in {start}..{end - 1}, got {low}..{high}")
    if high >= end:
        raise ConfigError(f"{name} must lie below {end}, got {high}")


def check_block_size(block_size: int) -> None:
    """Refuse a block size below one token."""
    if block_size < 1:
        raise ConfigError(f"block_size must be at least 1 token, got {block_size}")


T = TypeVar("T", torch.Tensor, Tokens, Cached)


def unit_last_stride(tokens: T) -> T:
    """Pages as they are; a tensor too if its last dim is contiguous, else a contiguous copy."""
    if isinstance(tokens, (PagedTokens, PagedBatch)) or tokens.stride(-1) == 1:
        return tokens
    return tokens.contiguous()


def padded_tokens(tokens: torch.Tensor, block_size: int, dtype: torch.dtype) -> torch.Tensor:
    """`[N, D]` as contiguous `[n * block_size, D]` of `dtype`, zeros after the last token."""
    missing = -len(tokens) % block_size
    if not missing:
        return tokens.to(dtype).contiguous()
    return torch.nn.functional.pad(tokens.to(dtype), (0, 0, 0, missing))
