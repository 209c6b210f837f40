"""What calls alike have in common, made once: their checks and choices, and bound launches."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import torch

from shareprefill.runtime.ops.devices import current_stream, on_device

V = TypeVar("V")

# Kinds of calls that an operator keeps. A model has a few at every length.
_MOST = 4096
# Versions of Triton whose variants of kernels were started on a GPU by themselves.
_TRIED = ("3.6.",)


class Prepared(dict[Any, V]):
    """What was prepared for calls, by all that it depends on (`inputs.facts`, and options)."""

    def keep(self, key: Any, value: V) -> V:
        """Keeps and returns what was prepared for one kind of calls."""
        if len(self) >= _MOST:
            self.clear()
        self[key] = value
        return value


class _Notes(threading.local):
    """What the launches of a thread are noted in; None: nowhere."""

    log: list[tuple[Launch, tuple[Any, ...]]] | None = None


_notes = _Notes()


@contextmanager
def noted_launches() -> Iterator[list[tuple[Launch, tuple[Any, ...]]]]:
    """Notes the launches of this thread with what they are given, in order."""
    log: list[tuple[Launch, tuple[Any, ...]]] = []
    _notes.log = log
    try:
        yield log
    finally:
        _notes.log = None


class Launch:
    """Launches of a Triton kernel that differ in their tensors' addresses alone.

    Triton looks for the variant of a kernel at every launch, which takes the host longer than all
    the rest of it. A variant fits tensors of the same dtypes whose addresses are multiples of 16 or
    are not, and the same numbers. So the one of the first launch is kept if all its addresses are
    multiples of 16, as those of torch's allocator are. Where parts of tensors come, kernels should
    be compiled alike for all addresses (`do_not_specialize_on_alignment`): those are not looked at.
    A launch with any other address goes through Triton. So does every launch where hooks are set
    (profilers), where kernels are interpreted, and with a version of Triton whose variants were not
    started this way on a GPU.

    Args:
        kernel: The kernel; its parameters are tensors, numbers and constants, in this order.
        device: Of the tensors.
        grid: Programs, in up to three dimensions.
        numbers: Its numbers.
        options: Its constants, and options of the launch.
    """

    def __init__(
        self,
        kernel: Any,
        device: torch.device,
        grid: tuple[int, ...],
        numbers: tuple[float, ...],
        options: dict[str, Any],
    ) -> None:
        self.kernel, self.device, self.grid = kernel, device, grid
        self.numbers, self.options = numbers, options
        # The interpreter's kernels know no such thing, and nothing of theirs is kept.
        parameters = getattr(kernel, "params", ())
        names = (p.name for p in parameters if p.do_not_specialize_on_alignment)
        self._free = {kernel.arg_names.index(name) for name in names}
        self._keeps = are_kept(device)
        self._bound: _Bound | None = None

    def __call__(self, *tensors: Any) -> None:
        """Starts the kernel.

        Args:
            tensors: Of the same dtypes at every call; bool ones are bytes to the kernel. Or TMA
                descriptors that differ in address alone, None, and numbers that the kernel does not
                specialise on.
        """
        if _notes.log is not None:
            _notes.log.append((self, tensors))
        addresses, bits = [], 0
        for place, tensor in enumerate(tensors):
            find = getattr(tensor, "data_ptr", None)
            if find is None:  # A descriptor is of an address that is a multiple of 16.
                addresses.append(tensor)
            else:
                address = find()
                addresses.append(address)
                if place not in self._free:
                    bits |= address
        bound = self._bound
        if bound is None or bits % 16 or bound.is_watched():
            variant = self._start(tensors)
            if self._keeps and not bits % 16:
                self._bound = _Bound(self, variant, len(tensors))
        else:
            with on_device(self.device):
                bound.start(current_stream(self.device), addresses)

    @property
    def is_kept(self) -> bool:
        """Whether `repeat` may start the kernel."""
        return self._bound is not None and not self._bound.is_watched()

    def repeat(self, stream: int, addresses: list[Any]) -> None:
        """Starts the kernel on a stream of the current device, by addresses of tensors alike."""
        assert self._bound is not None
        self._bound.start(stream, addresses)

    def _start(self, tensors: tuple[Any, ...]) -> Any:
        """Lets Triton start the kernel; gives the variant that it took."""
        as_bytes = [
            tensor.view(torch.uint8) if getattr(tensor, "dtype", None) == torch.bool else tensor
            for tensor in tensors
        ]
        with on_device(self.device):
            return self.kernel[self.grid](*as_bytes, *self.numbers, **self.options)


class _Bound:
    """A variant of a kernel with all that its launches have in common."""

    def __init__(self, launch: Launch, variant: Any, n_tensors: int) -> None:
        from triton import knobs

        names = launch.kernel.arg_names[n_tensors + len(launch.numbers) :]
        constants = [launch.options[name] for name in names]
        x, y, z = (*launch.grid, 1, 1)[:3]
        self._run, self._grid = variant.run, (x, y, z)
        # Neither metadata for hooks nor hooks.
        self._kernel = (variant.function, variant.packed_metadata, None, None, None)
        self._rest = (*launch.numbers, *constants)
        self._hooks = knobs.runtime

    def is_watched(self) -> bool:
        """Whether launches are to call hooks."""
        hooks = (self._hooks.launch_enter_hook, self._hooks.launch_exit_hook)
        return any(hook is not None and hook.calls for hook in hooks)

    def start(self, stream: int, addresses: list[Any]) -> None:
        """Starts the kernel on a stream of the current device."""
        self._run(*self._grid, stream, *self._kernel, *addresses, *self._rest)


def are_kept(device: torch.device) -> bool:
    """Whether launches on a device keep the variant of a kernel that Triton took."""
    return device.type == "cuda" and (triton_version() or "").startswith(_TRIED)


@cache
def triton_version() -> str | None:
    """The version of Triton; None where it is not installed."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return None
