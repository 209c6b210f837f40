"""Weights of a module as plain tensors, however they are packed, and sketches to compare them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Numbers that a layer's weights are folded into; more would tell smaller distances apart.
SKETCH_SIZE = 64
# A prime, so that signs and buckets meet anew all along a matrix, whatever its width.
_SIGNS = 65_521
_PIECE = 16 * _SIGNS
# A sketch of norm 1 has entries of about 1/8: five times that fill an int8.
_SCALE = 200
_PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def base_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a module and its parts, with their names, without adapters.

    Parameters as they are; where a library has packed them, the values that they stand for, by that
    library's own way: torch's dynamic quantisation, torchao, quanto, bitsandbytes. Buffers count
    where they hold what a part has instead of parameters (GPTQ, AWQ): raw, as they lie there.
    Adapters of PEFT are left out, and what they adapt has the name that it has without them.

    Yields:
        A name below the module, and a tensor on any device.
    """
    base = getattr(module, "base_layer", None)
    if isinstance(base, nn.Module) and has_adapters(module):
        yield from base_weights(base)
        return
    yield from _own(module)
    for path, part in module.named_children():
        for name, tensor in base_weights(part):
            yield f"{path}.{name}", tensor


def all_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The same with adapters, and with the buffers that are saved beside parameters.

    Yields:
        A name below the module, and a tensor on any device.
    """
    for path, part in module.named_modules(remove_duplicate=False):
        found = dict(_own(part))
        for name, buffer in part.named_buffers(recurse=False):
            if name not in found and name not in part._non_persistent_buffers_set:
                found[name] = buffer.detach()
        for name, tensor in found.items():
            yield f"{path}.{name}" if path else name, tensor


def adapter_settings(module: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """What PEFT's layers hold beside weights: scales, the active adapters, those that are merged.

    Yields:
        A layer's name below the module, and its plain values by their names.
    """
    of_torch = vars(nn.Module()).keys()
    for path, part in module.named_modules():
        if hasattr(part, "adapter_layer_names"):
            own = {name: value for name, value in vars(part).items() if name not in of_torch}
            yield path, {name: value for name, value in own.items() if _is_plain(value)}


def _is_plain(value: object) -> bool:
    parts = [value]
    if isinstance(value, dict):
        parts = [*value.values()]
    elif isinstance(value, list | tuple):
        parts = [*value]
    return all(isinstance(part, str | int | float | None) for part in parts)


def has_adapters(module: nn.Module) -> bool:
    """Whether a module is a layer that PEFT has put adapters around."""
    return hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names")


def sketch(matrices: Iterable[Tensor]) -> str:
    """A few numbers whose distances are those of the matrices: a random projection (count sketch).

    The matrices, one behind the other, are multiplied by fixed signs, folded to `SKETCH_SIZE` sums
    in float64, and divided by their norm. The distance of two sketches estimates the distance of
    the matrices, each divided by its norm (Charikar, Chen, Farach-Colton 2002).

    Args:
        matrices: Of one layer, any shapes and devices.

    Returns:
        int8 numbers in hexadecimal; all zero where the norm is zero or not finite. Empty where a
        matrix holds no plain numbers, but codes that only some library can read.
    """
    folded = torch.zeros(SKETCH_SIZE, dtype=torch.float64, device="cpu")
    square, start = 0.0, 0
    for matrix in matrices:
        if matrix.dtype not in _PLAIN_DTYPES:
            return ""
        for piece in matrix.reshape(-1).split(_PIECE):
            values = piece.to(torch.float64)
            square += values.square().sum().item()
            first = start % _SIGNS
            values = values * _signs(values.device)[first : first + len(values)]
            before = start % SKETCH_SIZE
            padding = (before, -(before + len(values)) % SKETCH_SIZE)
            folded += F.pad(values, padding).view(-1, SKETCH_SIZE).sum(0).cpu()
            start += len(values)
    scale = _SCALE / square**0.5 if 0 < square < float("inf") else 0.0
    numbers = (folded.nan_to_num() * scale).round().clamp(-127, 127).to(torch.int8)
    return bytes(numbers.view(torch.uint8).tolist()).hex()


def sketch_distances(one: str, other: str) -> Tensor | None:
    """Estimated distance of the weights that two sketches are of, each divided by its norm.

    Args:
        one: Sketches of a model's layers, one behind the other.
        other: Of the other model's.

    Returns:
        float64 `[layers]`, 0 for equal sketches, about 1.4 for unrelated weights. None where a
        sketch is missing, or the layers' numbers differ.
    """
    if not one or len(one) != len(other):
        return None
    first, second = (
        torch.frombuffer(bytearray.fromhex(text), dtype=torch.int8).double()
        for text in (one, other)
    )
    return (first - second).view(-1, SKETCH_SIZE).norm(dim=1) / _SCALE


@cache
def _signs(device: torch.device) -> Tensor:
    """+1 and -1, with a period of `_SIGNS`, float64 `[_PIECE + _SIGNS]`."""
    data = hashlib.shake_256(b"shareprefill sketch").digest(_SIGNS // 8 + 1)
    numbers = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    places = torch.arange(8, dtype=torch.uint8, device="cpu")
    bits = (numbers[:, None] >> places) & 1
    signs = 1 - 2 * bits.reshape(-1)[:_SIGNS].double()
    return signs.repeat(_PIECE // _SIGNS + 1).to(device)


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
