"""Weights of a module as plain tensors, however a quantisation library has packed them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def attention_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a module and its parts, with their names.

    Parameters as they are; where a library has packed them, the values that they stand for, by that
    library's own way: torch's dynamic quantisation, torchao, quanto, bitsandbytes. Buffers count
    where they hold what a part has instead of parameters (GPTQ, AWQ): raw, as they lie there.

    Args:
        module: An attention module.

    Yields:
        A name below the module, and a tensor on any device.
    """
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        for name, tensor in _own(part):
            yield prefix + name, tensor


def _own(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    # torch.ao's quantised layers keep weight and bias packed, behind methods of these names.
    weight: Any = getattr(part, "weight", None)
    if not isinstance(weight, Tensor) and callable(weight):
        packed: Any = weight()
        yield "weight", packed.dequantize()
        bias: Any = getattr(part, "bias", None)
        if callable(bias) and isinstance(values := bias(), Tensor):
            yield "bias", values.detach()
        return
    found = False
    for name, parameter in part.named_parameters(recurse=False):
        found = True
        yield name, _plain(part, parameter)
    has_parts = next(part.children(), None) is not None
    if found or has_parts:
        return
    for name, buffer in part.named_buffers(recurse=False):
        if name not in part._non_persistent_buffers_set:
            yield name, _plain(part, buffer)


def _plain(part: nn.Module, tensor: Tensor) -> Tensor:
    # bitsandbytes moves the state from the weight to the layer at the first forward pass.
    state = getattr(tensor, "quant_state", None) or getattr(part, "quant_state", None)
    if state is not None and not tensor.is_floating_point():
        from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

        return dequantize_4bit(tensor.detach(), state)
    values = tensor.detach()
    # Tensor parallelism leaves each process a part: all of them gather the whole.
    gather = getattr(values, "full_tensor", None)
    if gather is not None:
        values = gather()
    if values.is_quantized or _is_packed(values):
        values = values.dequantize()
    scales = getattr(tensor, "SCB", None)
    if values.dtype == torch.int8 and scales is not None:
        values = values * (scales.to(values.device) / 127)[:, None]
    return values


def _is_packed(values: Tensor) -> bool:
    """Whether a tensor is of a class (torchao's, quanto's) that brings its own unpacking."""
    kind = type(values)
    return kind not in (Tensor, nn.Parameter) and kind.dequantize is not Tensor.dequantize
