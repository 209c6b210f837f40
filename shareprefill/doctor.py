"""`sp doctor`: versions, device, and what works here and what does not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from shareprefill.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shareprefill.runtime.crossover import Crossover
    from shareprefill.runtime.layers import LayerUse

WORKS, BROKEN, ABSENT, UNSUPPORTED = "works", "broken", "not here", "unsupported"

_LIBRARIES = ("torch", "transformers", "datasets", "scikit-learn", "scipy", "safetensors", "triton")


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis.

    Attributes:
        name: What was looked at.
        state: A version, `works`, `not here`, `broken`, `unsupported`, or the kind of a layer.
        detail: What follows from it.
    """

    name: str
    state: str
    detail: str

    @property
    def broken(self) -> bool:
        """Whether something is there that does not work."""
        return self.state in (BROKEN, UNSUPPORTED)


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


def diagnose_model(name: str, *, trust_remote_code: bool = False) -> list[Check]:
    """What a session does with each layer of a model.

    The weights are read only where the model's forward pass depends on their values.

    Args:
        name: A hub id, a local folder, a GGUF file, or the name of a built-in model.
        trust_remote_code: Runs Python code that the model's repository brings.

    Returns:
        One check for every run of like layers; a single one with the reason where the model is not
        supported.

    Raises:
        ModelError: the model cannot be found or loaded, or is no causal decoder.
    """
    try:
        uses = _layer_uses(name, trust_remote_code)
    except UnsupportedError as error:
        return [Check("model", UNSUPPORTED, str(error))]
    return [_layers_check(group) for group in _like_layers(uses)]


def _layer_uses(name: str, trust_remote_code: bool) -> tuple[LayerUse, ...]:
    from shareprefill.models import load_model
    from shareprefill.runtime.layers import layer_uses

    if (model := _weightless(name, trust_remote_code)) is not None:
        try:
            return layer_uses(model)
        # Torch's error for values that are not there: experts that are chosen token by token.
        except RuntimeError:
            del model
    return layer_uses(load_model(name, trust_remote_code=trust_remote_code))


def _weightless(name: str, trust_remote_code: bool) -> PreTrainedModel | None:
    """The model on the meta device; None where it cannot be built there."""
    import torch
    from transformers import AutoModelForCausalLM

    from shareprefill.models import load_config

    config = load_config(name, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            # Grouped products of experts want bfloat16 there.
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code
            )
    except (ValueError, ImportError, RuntimeError):
        return None
    return model.eval()


def _like_layers(uses: tuple[LayerUse, ...]) -> list[list[LayerUse]]:
    """Layers of one kind and reason, in the order of their first layer."""
    order = {(use.kind, use.reason): use.index for use in reversed(uses)}
    ranked = sorted(uses, key=lambda use: (order[use.kind, use.reason], use.index))
    return [list(group) for _, group in groupby(ranked, key=lambda use: (use.kind, use.reason))]


def _layers_check(group: list[LayerUse]) -> Check:
    word = "layer" if len(group) == 1 else "layers"
    return Check(f"{word} {_spans([use.index for use in group])}", group[0].kind, group[0].reason)


def _spans(numbers: list[int]) -> str:
    """`0-2, 5` of ascending numbers."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)


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
    """Every implementation of block-sparse attention, and what each operator takes by itself."""
    import torch

    from shareprefill.runtime.crossover import crossover, tuned
    from shareprefill.runtime.ops.dispatch import describe, page_in_place, unavailable

    device = "cuda" if torch.cuda.is_available() else "cpu"
    checks = [_compare("blockwise", "cpu")]
    if device == "cpu":
        why = "needs a CUDA GPU" if importlib.util.find_spec("triton") else "not installed"
        checks.append(Check("attention: triton", ABSENT, why))
    else:
        for name in ("triton", "hopper"):
            reason = unavailable(name, torch.device(device))
            absent = Check(f"attention: {name}", ABSENT, reason or "")
            checks.append(absent if reason else _compare(name, device))
    choices = describe(device)
    checks += [Check(c.operator, c.implementation, c.reason) for c in choices]
    (attention,) = (c for c in choices if c.operator == "block_sparse_attention")
    chosen = page_in_place(torch.device(device))
    checks += [_pages(attention.implementation, size, size == chosen) for size in (16, 128)]
    checks += _crossover(crossover(torch.device(device)))
    for backend, found in tuned(torch.device(device)).items():
        detail = f"shorter prompts run dense in vLLM; measured on {found.source}"
        checks.append(Check(f"crossover: {backend}", f"{found.tokens} tokens", detail))
    return checks


def _pages(implementation: str, size: int, is_chosen: bool = False) -> Check:
    """Whether attention reads keys and values in an engine's pages of so many tokens."""
    import torch

    from shareprefill.runtime.ops.dispatch import page_refusal
    from shareprefill.runtime.ops.pages import PagedTokens

    pool = torch.empty(2, 2, size, 128, dtype=torch.bfloat16, device="meta")
    table = torch.empty(2, dtype=torch.int32, device="meta")
    refusal = page_refusal(implementation, PagedTokens(pool, table, 2 * size))
    name = f"pages of {size} tokens"
    if refusal is None:
        chosen = ", and an engine takes these by itself" * is_chosen
        detail = f"{implementation} reads a vLLM cache of these where it is{chosen}"
        return Check(name, "in place", detail)
    return Check(name, "gathered", f"copied first out of a vLLM cache: {implementation} {refusal}")


def _crossover(found: Crossover) -> list[Check]:
    """From where on prefills, and up to which density heads, are sparse, and who says so."""
    measured = f"; measured on {found.source}"
    smaller = "" if found.width is None else ", longer ones too of smaller layers"
    if not found.is_measured:
        measured += ", not on this kind of device"
    return [
        Check(
            "crossover",
            f"{found.tokens} tokens",
            f"shorter prompts run dense by themselves{smaller}{measured}",
        ),
        Check(
            "crossover",
            f"density {found.density:g}",
            f"heads above it are computed densely{measured}",
        ),
    ]


def _compare(implementation: str, device: str) -> Check:
    import torch

    from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
    from shareprefill.runtime.ops.blocks import BlockLists, causal_blocks

    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.float16
    query, key, value = (
        torch.randn(heads, 300, 64, generator=generator, dtype=torch.float32, device="cpu").to(
            device, dtype
        )
        for heads in (4, 2, 2)
    )
    bitmap = causal_blocks(300, 0, 128, device=query.device)[None]
    lists = BlockLists.from_bitmap(
        bitmap, torch.zeros(4, dtype=torch.int32, device=query.device), 128
    )
    found = block_sparse_attention(query, key, value, lists, impl=implementation)
    expected = block_sparse_attention(query, key, value, lists, impl="reference")
    error = (found - expected).abs().max().item()
    name = f"attention: {implementation}"
    if error < 1e-2:
        return Check(name, WORKS, "equals the reference")
    return Check(name, BROKEN, f"differs from the reference by {error:.1e}; please report this")


def _built_in() -> Check:
    from shareprefill.models import BUILT_IN

    return Check("built-in models", WORKS, ", ".join(sorted(BUILT_IN)))
