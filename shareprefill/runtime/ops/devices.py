"""Which GPU a launch goes to."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_ALREADY = nullcontext()


def device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes a tensor's GPU the current one for launches; nothing is done where it is already."""
    return on_device(tensor.device)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one for launches; nothing is done where it is already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _ALREADY
    return torch.cuda.device(device)
