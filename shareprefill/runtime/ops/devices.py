"""Which GPU a launch goes to."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_ALREADY = nullcontext()


def device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes a tensor's GPU the current one for launches; nothing is done where it is already."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return _ALREADY
    return torch.cuda.device_of(tensor)
