"""Which implementation of an operator a call takes, and why."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from shareprefill.errors import ConfigError, UnsupportedError
from shareprefill.runtime.ops.inputs import facts
from shareprefill.runtime.ops.pages import PagedTokens, Tokens, gathered
from shareprefill.runtime.ops.prepared import Prepared

R = TypeVar("R")
# Whether calls have a fast kernel, by all that it depends on.
_fast = Prepared[bool]()

ATTENTION = ("reference", "blockwise", "triton", "hopper")

# Faster than Triton's, by the first number of the compute capability, the fastest first. From one
# run of benchmarks/bench_kernels.py on an H100 (docs/performance.md); a GPU without an entry was
# not measured and gets Triton's.
_FASTER: dict[int, tuple[str, ...]] = {9: ("hopper",)}
_NAMES = {
    "hopper": "our Hopper kernel",
    "triton": "our Triton kernel",
}


class Choice(NamedTuple):
    """What `impl="auto"` means for an operator on a device.

    Attributes:
        operator: the name of the operator's folder.
        implementation: the `impl` that "auto" stands for; "none" where the operator is refused.
        reason: why it and not another, in words.
    """

    operator: str
    implementation: str
    reason: str


def select_attention(
    impl: str,
    query: torch.Tensor,
    key: Tokens,
    value: Tokens,
    block_size: int,
) -> str:
    """Resolve `impl` of block-sparse attention; an explicit request is served or refused.

    Raises:
        ConfigError: `impl` is unknown.
        UnsupportedError: the requested implementation does not take the call.
    """
    if impl == "auto":
        for name in _faster(query.device):
            if _refusal(name, query, key, value, block_size) is None:
                return name
        return "triton" if query.device.type == "cuda" else "blockwise"
    if impl not in ATTENTION:
        raise ConfigError(f"impl must be one of {', '.join(('auto', *ATTENTION))}, got {impl!r}")
    if impl == "triton":
        _require_triton(query)
    refusal = _refusal(impl, query, key, value, block_size)
    if refusal is not None:
        raise UnsupportedError(f"impl={impl!r} {refusal}; or use impl='auto'")
    return impl


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
        _require_triton(tensor)
    return impl


def has_fast_kernel(query: torch.Tensor, key: Tokens, value: Tokens, block_size: int) -> bool:
    """Whether "auto" takes a kernel about as fast as the best dense one, block for block."""
    call = (facts(query), facts(key), facts(value), block_size)
    known = _fast.get(call)
    if known is None:
        names = _faster(query.device)
        refusals = (_refusal(name, query, key, value, block_size) for name in names)
        known = _fast.keep(call, any(refusal is None for refusal in refusals))
    return known


def page_refusal(impl: str, tokens: PagedTokens) -> str | None:
    """Why an implementation does not read tokens in their pages; None where it does."""
    if impl == "hopper":
        from shareprefill.runtime.ops.hopper import launch

        return launch.page_refusal(tokens)
    if impl != "triton":
        return "reads no pages"
    size = tokens.page_size
    if size & (size - 1) or tokens.pool.stride(-1) != 1:
        return f"reads pages of a power of two of tokens, got {size} in {tokens.pool.stride()}"
    return None


def page_in_place(device: torch.device) -> int:
    """Tokens of which a page has a multiple where a device's fastest kernel reads it at full speed.

    On Hopper a key block: smaller pages are read in place, too, but in parts, which takes longer.
    1 where the Triton kernel is the fastest: it reads all usual sizes.
    """
    from shareprefill.runtime.ops.hopper import launch

    is_hopper = "hopper" in _faster(device) and unavailable("hopper", device) is None
    return launch.BLOCK if is_hopper else 1


def within_reach(impl: str, *tokens: Tokens) -> tuple[Tokens, ...]:
    """Keys and values as an implementation reads them: gathered, if it does not read their pages.

    An implementation takes all pages by that, so "auto" does not look at them.
    """
    refusals = (page_refusal(impl, t) for t in tokens if isinstance(t, PagedTokens))
    if any(refusal is not None for refusal in refusals):
        return tuple(gathered(t) for t in tokens)
    return tokens


def on_gathered(run: Callable[..., R]) -> Callable[..., R]:
    """A function that takes tokens in pages, by gathering them, in place of one that takes none."""

    def call(*given: Any, **named: Any) -> R:
        return run(*(gathered(t) if isinstance(t, PagedTokens) else t for t in given), **named)

    return call


def _require_triton(tensor: torch.Tensor) -> None:
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
    if not on_gpu and not _interpreter_requested():
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


def _interpreter_requested() -> bool:
    """Whether Triton's CPU interpreter was switched on before the kernels were imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def _refusal(
    name: str, query: torch.Tensor, key: Tokens, value: Tokens, block_size: int
) -> str | None:
    """Why an implementation does not take a call; the rest take whatever their door lets in."""
    from shareprefill.runtime.ops.block_sparse_attention import hopper

    return hopper.supports(query, key, value, block_size) if name == "hopper" else None


def describe(device: torch.device | str) -> list[Choice]:
    """What `impl="auto"` takes on a device, for bfloat16, a head_dim of 128 and blocks of 128.

    Nothing is compiled or run for it, and no kernel is imported.
    """
    device = torch.device(device)
    if device.type != "cuda":
        reason = "one dense call for each query block; the other kernels need a GPU"
        choices = [Choice("block_sparse_attention", "blockwise", reason)]
        others = {
            "pooled_attention": "blockwise",
            "block_selection": "reference",
            "vertical_slash": "torch",
            "block_sparse_decoding": "reference",
            "sketched_selection": "reference",
        }
        choices += [
            Choice(operator, name, "the version for this device")
            for operator, name in others.items()
        ]
        return [*choices, _describe_fp8(device)]
    choices = [_describe_attention(device), _describe_pooled(device)]
    choices += [
        Choice(operator, "triton", "the version for every GPU")
        for operator in (
            *("block_selection", "vertical_slash"),
            *("block_sparse_decoding", "sketched_selection"),
        )
    ]
    return [*choices, _describe_fp8(device)]


def _describe_attention(device: torch.device) -> Choice:
    names = _faster(device)
    refusals = {name: unavailable(name, device) for name in names}
    chosen = next((name for name in names if refusals[name] is None), "triton")
    why = f"{_NAMES[chosen]}, of those that run here the fastest on this GPU generation"
    if not names:
        why = f"{_NAMES[chosen]}; nothing was measured on this GPU generation"
    before = names[: names.index(chosen)] if chosen in names else names
    missed = [f"{name} would be faster, but {refusals[name]}" for name in before]
    return Choice("block_sparse_attention", chosen, "; ".join([why, *missed]))


def _describe_pooled(device: torch.device) -> Choice:
    missing = unavailable("hopper", device)
    if missing is None:
        return Choice("pooled_attention", "hopper", "our Hopper kernels; triton with a soft-cap")
    return Choice("pooled_attention", "triton", f"hopper would be faster, but {missing}")


def _describe_fp8(device: torch.device) -> Choice:
    missing = unavailable("hopper", device)
    if missing is None:
        return Choice("fp8_attention", "hopper", "our Hopper kernel, with precision='fp8'")
    return Choice("fp8_attention", "none", f"precision='fp8' {missing}")


def unavailable(name: str, device: torch.device) -> str | None:
    """Why an implementation of block-sparse attention cannot run on a device; None if it can."""
    from shareprefill.runtime.ops.hopper import launch

    return launch.unavailable(device) if name == "hopper" else None


def _faster(device: torch.device) -> tuple[str, ...]:
    return _FASTER.get(_generation(device), ()) if device.type == "cuda" else ()


def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]
