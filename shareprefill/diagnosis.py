"""`sp doctor`: versions, device, and what works here and what does not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass

WORKS, BROKEN, ABSENT = "works", "broken", "not here"

_LIBRARIES = ("torch", "transformers", "datasets", "scikit-learn", "scipy", "safetensors", "triton")


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis.

    Attributes:
        name: What was looked at.
        state: A version, `works`, `not here`, or `broken`.
        detail: What follows from it.
    """

    name: str
    state: str
    detail: str

    @property
    def broken(self) -> bool:
        """Whether something is there that does not work."""
        return self.state == BROKEN


def diagnose() -> list[Check]:
    """Looks at the versions and the device, and runs each attention implementation once."""
    checks = [
        Check("shareprefill", _version("shareprefill"), f"Python {platform.python_version()}")
    ]
    checks += [Check(name, _version(name), "") for name in _LIBRARIES]
    checks.append(_device())
    checks += _implementations()
    checks.append(_built_in())
    return checks


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def _device() -> Check:
    import torch

    if not torch.cuda.is_available():
        detail = (
            f"{torch.get_num_threads()} CPU threads: sparse prefill by blocks in torch, float32"
        )
        return Check("GPU", ABSENT, detail)
    name = torch.cuda.get_device_name()
    major, minor = torch.cuda.get_device_capability()
    return Check("GPU", WORKS, f"{name}, compute capability {major}.{minor}")


def _implementations() -> list[Check]:
    """Every implementation of block-sparse attention, compared with the reference."""
    import torch

    from shareprefill.runtime.crossover import crossover_tokens

    cuda = torch.cuda.is_available()
    least = crossover_tokens("cuda" if cuda else "cpu")
    checks = [_compare("blockwise", "cpu", "the choice on a CPU")]
    if not cuda:
        why = "needs a CUDA GPU" if importlib.util.find_spec("triton") else "not installed"
        checks.append(Check("attention: triton", ABSENT, why))
    else:
        checks.append(_compare("triton", "cuda", "the choice on this GPU"))
    checks.append(Check("crossover", f"{least} tokens", "shorter prompts run dense by themselves"))
    return checks


def _compare(implementation: str, device: str, detail: str) -> Check:
    import torch

    from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
    from shareprefill.runtime.ops.blocks import BlockLists, causal_blocks

    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(heads, 200, 64, generator=generator).to(device) for heads in (4, 2, 2)
    )
    bitmap = causal_blocks(200, 0, 64, device=query.device)[None]
    lists = BlockLists.from_bitmap(bitmap, torch.zeros(4, device=query.device).int(), 64)
    found = block_sparse_attention(query, key, value, lists, impl=implementation)
    expected = block_sparse_attention(query, key, value, lists, impl="reference")
    error = (found - expected).abs().max().item()
    name = f"attention: {implementation}"
    if error < 1e-2:
        return Check(name, WORKS, detail)
    return Check(name, BROKEN, f"differs from the reference by {error:.1e}; please report this")


def _built_in() -> Check:
    from shareprefill.models import BUILT_IN

    return Check("built-in models", WORKS, ", ".join(sorted(BUILT_IN)))
