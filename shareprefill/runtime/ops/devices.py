"""Which GPU a launch goes to, and who may read what is kept."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_ALREADY = nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one for launches; nothing is done where it is already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _ALREADY
    return torch.cuda.device(device)


def stream_of_tables(device: torch.device) -> int | None:
    """The stream whose launches may read what is made now and kept; 0 on a CPU.

    Those of another one could read it before it is made. None while a CUDA graph is captured, which
    has tables and counters of its own: what it makes is there only when it is replayed.
    """
    if device.type != "cuda":
        return 0
    return None if torch.cuda.is_current_stream_capturing() else current_stream(device)


def current_stream(device: torch.device) -> int:
    """The stream of a GPU that launches go to."""
    index = torch.cuda.current_device() if device.index is None else device.index
    # As Triton asks: an object for each launch, as torch.cuda has it, takes longer.
    return torch._C._cuda_getCurrentRawStream(index)
