"""Checks that all attention operators share, made once at their door."""

from __future__ import annotations

import importlib.util
import math
import os

import torch

from shareprefill.errors import ConfigError, UnsupportedError

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_attention_inputs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None = None
) -> None:
    """Refuse shapes, dtypes and devices that do not belong together.

    Args:
        query: `[H, Nq, D]`.
        key: `[G, Nk, D]`; G divides H and Nk >= Nq >= 1.
        value: `[G, Nk, Dv]` or None.

    Raises:
        ConfigError: says what was expected and what came.
    """
    tensors = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, tensor in tensors.items():
        if tensor.ndim != 3:
            raise ConfigError(
                f"{name} must be [heads, tokens, head_dim] of one sequence, "
                f"got shape {tuple(tensor.shape)}; loop over the batch"
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ConfigError(
                f"{name} must have query's dtype and device ({query.dtype}, {query.device}), "
                f"got {tensor.dtype}, {tensor.device}"
            )
    if query.dtype not in FLOAT_DTYPES:
        raise ConfigError(f"query must be a floating-point tensor, got {query.dtype}")
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


def check_heads(heads: torch.Tensor, n_heads: int, device: torch.device) -> None:
    """Refuse a head subset that is not int64 `[S]` on `device`; on a CPU its range is read too.

    A negative entry stands for a head that is skipped.
    """
    if heads.dtype != torch.int64 or heads.ndim != 1 or heads.device != device:
        raise ConfigError(
            f"heads must be int64 [S] on {device}, "
            f"got {heads.dtype} of shape {tuple(heads.shape)} on {heads.device}"
        )
    if heads.device.type == "cpu" and len(heads):
        highest = int(heads.max())
        if highest >= n_heads:
            raise ConfigError(f"heads must lie below {n_heads}, got {highest}")


def check_block_size(block_size: int) -> None:
    """Refuse a block size below one token."""
    if block_size < 1:
        raise ConfigError(f"block_size must be at least 1 token, got {block_size}")


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """The given softmax scale, or 1 / sqrt(head_dim).

    Raises:
        ConfigError: the scale is not a positive number.
    """
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if not 0.0 < scale < math.inf:
        raise ConfigError(f"scale must be a positive number, got {scale}")
    return float(scale)


def check_softcap(softcap: float | None) -> None:
    """Refuse a bound of the logits that is not a positive number.

    Raises:
        ConfigError: says what came.
    """
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ConfigError(f"softcap must be a positive number, or None for no bound, got {softcap}")


def check_sinks(sinks: torch.Tensor | None, query: torch.Tensor) -> None:
    """Refuse sinks that are not a floating-point `[H]` on query's device.

    Raises:
        ConfigError: says what was expected and what came.
    """
    if sinks is None:
        return
    wanted = (query.shape[0],)
    if sinks.shape != wanted or not sinks.dtype.is_floating_point or sinks.device != query.device:
        raise ConfigError(
            f"sinks must be one floating-point logit for each of {query.shape[0]} query heads on "
            f"{query.device}, got {sinks.dtype} of shape {tuple(sinks.shape)} on {sinks.device}"
        )


def unit_last_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last dim is contiguous, otherwise a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def padded_tokens(tokens: torch.Tensor, block_size: int, dtype: torch.dtype) -> torch.Tensor:
    """`[N, D]` as contiguous `[n * block_size, D]` of `dtype`, zeros after the last token."""
    missing = -len(tokens) % block_size
    if not missing:
        return tokens.to(dtype).contiguous()
    return torch.nn.functional.pad(tokens.to(dtype), (0, 0, 0, missing))


def interpreter_requested() -> bool:
    """Whether Triton's CPU interpreter was switched on before the kernels were imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def select_impl(impl: str, known: tuple[str, ...], tensor: torch.Tensor, cpu_impl: str) -> str:
    """Resolve `impl` for `tensor`; an explicit request is served or refused, never changed.

    Args:
        impl: "auto" or one of `known`.
        known: implementations of the operator.
        tensor: decides by device and dtype.
        cpu_impl: what "auto" means where Triton does not run.

    Raises:
        ConfigError: `impl` is unknown.
        UnsupportedError: Triton was asked for where it cannot run.
    """
    if impl not in ("auto", *known):
        raise ConfigError(f"impl must be one of {', '.join(('auto', *known))}, got {impl!r}")
    on_gpu = tensor.device.type == "cuda"
    if impl == "auto":
        return "triton" if on_gpu and "triton" in known else cpu_impl
    if impl == "triton":
        require_triton(tensor)
    return impl


def require_triton(tensor: torch.Tensor) -> None:
    """Refuse `impl="triton"` where it cannot compute `tensor`.

    Raises:
        UnsupportedError: Triton is not installed, or does not take the device or the dtype.
    """
    on_gpu = tensor.device.type == "cuda"
    if importlib.util.find_spec("triton") is None:
        raise UnsupportedError(
            "impl='triton' needs the triton package; install shareprefill[triton], "
            "or use impl='auto'"
        )
    if not on_gpu and not interpreter_requested():
        raise UnsupportedError(
            f"impl='triton' needs a CUDA tensor, got one on {tensor.device}; use impl='auto', "
            "or set TRITON_INTERPRET=1 before the start to test kernels on the CPU"
        )
    if tensor.dtype == torch.float64:
        raise UnsupportedError(
            "impl='triton' computes float16, bfloat16 and float32, got torch.float64; "
            "use impl='reference'"
        )
    # Triton's interpreter multiplies bf16 bit patterns as if they were integers.
    if not on_gpu and tensor.dtype == torch.bfloat16:
        raise UnsupportedError(
            "Triton's interpreter computes bfloat16 products wrongly; "
            "test kernels on the CPU in float16 or float32"
        )
