"""What a call launches, noted once and launched again by further calls that are alike.

All decisions of a layer are made on the device. So calls of the same sizes launch the same kernels
with the same numbers, and only addresses differ: of the tensors that a call is given, and of those
that it makes. The second call of a kind is noted: its launches, and where each of their addresses
comes from. Further calls make room, in one piece for all that they drop, and launch.

What torch launches is not noted. So a call in which it does so is not repeated, and neither is one
whose launches have to go through Triton (`Launch.is_kept`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shareprefill.runtime.ops.devices import current_stream, on_device
from shareprefill.runtime.ops.prepared import Launch, Prepared, noted_launches
from shareprefill.runtime.records import Maker, maker, map_tensors

R = TypeVar("R")

# Calls that make more are not repeated. All that they make is there at one time, and the device is
# busy with them for longer than the host anyway.
MOST_BYTES = 2**27
# Where a call turns out not to be one that is repeated, tables of its sizes may have been made in
# it. So many calls are noted before this is taken for granted.
_TRIES = 3
_ALIGNMENT = 256
_MAKE = frozenset(("empty", "empty_like", "empty_strided", "new_empty"))
# What gives another view of a tensor, and launches nothing.
_VIEW = frozenset(
    (
        *("detach", "alias", "view", "_unsafe_view", "slice", "select", "expand", "transpose"),
        *("t", "permute", "unsqueeze", "squeeze", "split", "unbind", "as_strided"),
    )
)


class Repeats(Generic[R]):
    """Calls of a function that gives an output and a result with tensors in it, by their kind."""

    def __init__(self) -> None:
        self._known = Prepared[int | _Repeat[R]]()

    def run(
        self, kind: Hashable, given: Sequence[Tensor], compute: Callable[[], tuple[Tensor, R]]
    ) -> tuple[Tensor, R]:
        """Computes, by the launches of an earlier call if there was one.

        Args:
            kind: All that launches depend on but addresses.
            given: The tensors whose addresses differ from call to call, all of different ones.
                What is none of them, and not made in the call, is where it is for good.
            compute: Computes.
        """
        known = self._known.get(kind, 0)
        if not isinstance(known, int):
            found = known(given)
            return compute() if found is None else found
        if not 0 < known <= _TRIES:
            self._known.setdefault(kind, 1)
            return compute()
        found, repeat = _note(given, compute)
        self._known.keep(kind, repeat or known + 1)
        return found


class _Made(TorchDispatchMode):
    """The tensors that are made, and whether torch launches anything."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []
        self.launches = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name in _MAKE:
            self.tensors.append(found)
        elif name not in _VIEW:
            self.launches = True
        return found


class _NotRepeatableError(Exception):
    """A call depends on more than its kind and addresses of what it is given."""


def _note(
    given: Sequence[Tensor], compute: Callable[[], tuple[Tensor, R]]
) -> tuple[tuple[Tensor, R], _Repeat[R] | None]:
    """Computes; and what repeats it, None where nothing does."""
    with noted_launches() as launches, _Made() as made:
        output, result = compute()
    if not made.launches:
        with suppress(_NotRepeatableError):
            places = _Places(given, made.tensors, output, result)
            return (output, result), _Repeat(places, launches, output, result)
    return (output, result), None


class _Places:
    """Where the addresses of a call come from: a number of a base, and steps from it in bytes.

    Bases are 0, whose steps are addresses that never change; what is given; the output; what is
    kept with the result; and the rest of what is made.

    Raises:
        _NotRepeatableError: addresses cannot be told apart, or too much is made.
    """

    def __init__(
        self, given: Sequence[Tensor], made: Sequence[Tensor], output: Tensor, result: Any
    ) -> None:
        self.given = {t.data_ptr(): number for number, t in enumerate(given, 1) if t.numel()}
        if len(self.given) < sum(t.numel() > 0 for t in given):
            raise _NotRepeatableError
        self.starts = dict(enumerate(map(_start, given), 1))
        starts = [_start(t) for t in given if t.numel()]
        # What is not the only one in its storage is found as a whole: steps between tensors of one
        # storage are those of this call alone.
        self.parts = {start: starts.count(start) == 1 for start in starts}
        self.constants: list[Tensor] = []
        kept: set[int] = set()

        def keep(tensor: Tensor) -> Tensor:
            kept.add(_start(tensor))
            return tensor

        map_tensors(result, keep)
        sizes = {_start(t): t.untyped_storage().nbytes() for t in made if _start(t)}
        self.n_given, self.sizes = len(given), [0, 0]
        self.made: dict[int, tuple[int, int]] = {}
        for start, size in sizes.items():
            if start == _start(output):
                self.made[start] = (self.n_given + 1, 0)
                continue
            group = 0 if start in kept else 1
            self.made[start] = (self.n_given + 2 + group, self.sizes[group])
            self.sizes[group] += -(-size // _ALIGNMENT) * _ALIGNMENT
        is_whole = output.data_ptr() == _start(output) and _start(output) not in kept
        if self.sizes[1] > MOST_BYTES or _start(output) not in self.made or not is_whole:
            raise _NotRepeatableError

    def of(self, tensor: Tensor) -> tuple[int, int]:
        """Where a tensor's address comes from."""
        address, start = tensor.data_ptr(), _start(tensor)
        if not address:
            return 0, 0
        if start in self.made:
            base, offset = self.made[start]
            return base, offset + address - start
        if address in self.given:
            return self.given[address], 0
        if start in self.parts:
            if not self.parts[start]:
                raise _NotRepeatableError
            whole, number = next((w, n) for w, n in self.given.items() if self.starts[n] == start)
            return number, address - whole
        self.constants.append(tensor)
        return 0, address


def _start(tensor: Tensor) -> int:
    """The address at which a tensor's storage starts."""
    return tensor.untyped_storage().data_ptr()


@dataclass(frozen=True)
class _Step:
    """A launch, where its addresses come from, and which descriptors stand at which places."""

    launch: Launch
    sources: tuple[tuple[int, int], ...]
    descriptors: tuple[tuple[int, int], ...]


class _Repeat(Generic[R]):
    """Launches of a call, for other addresses."""

    def __init__(
        self,
        places: _Places,
        launches: Sequence[tuple[Launch, tuple[Any, ...]]],
        output: Tensor,
        result: R,
    ) -> None:
        self._device, self._sizes = output.device, places.sizes
        self._output = (output.shape, output.stride(), output.dtype)
        # Descriptors by the base that they are of and all else that they are.
        self._descriptors: list[tuple[int, Any]] = []
        self._steps = [self._step(places, *launch) for launch in launches]
        self._dtypes: set[torch.dtype] = set()
        make_result = maker(result, lambda tensor: self._of_kept(places, tensor))
        self._make_result = (lambda _: result) if make_result is None else make_result
        # Launches that start without Triton's search once do so for every address of this kind.
        if any(not step.launch.is_kept for step in self._steps):
            raise _NotRepeatableError
        self._constants = places.constants

    def _step(self, places: _Places, launch: Launch, arguments: tuple[Any, ...]) -> _Step:
        sources: list[tuple[int, int]] = []
        descriptors: list[tuple[int, int]] = []
        for place, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                sources.append(places.of(argument))
                continue
            base, steps = places.of(argument.base)
            if not 0 < base <= places.n_given or steps:
                raise _NotRepeatableError
            descriptors.append((place, self._number_of(base, argument)))
            sources.append((0, 0))
        return _Step(launch, tuple(sources), tuple(descriptors))

    def _number_of(self, base: int, descriptor: Any) -> int:
        fields = {**vars(descriptor), "base": None}
        for number, (known, other) in enumerate(self._descriptors):
            if known == base and {**vars(other), "base": None} == fields:
                return number
        self._descriptors.append((base, _described(descriptor, None)))
        return len(self._descriptors) - 1

    def _of_kept(self, places: _Places, tensor: Tensor) -> Maker | None:
        """What gives a tensor of a result, of views of what is kept by dtype; None where it stays.

        It holds no tensor, whose memory would be in use for good.
        """
        if _start(tensor) in places.parts:
            raise _NotRepeatableError
        if tensor.data_ptr() and _start(tensor) not in places.made:
            return None
        place = places.of(tensor)[1] // tensor.element_size()
        dtype, shape, stride = tensor.dtype, tensor.shape, tensor.stride()
        self._dtypes.add(dtype)
        return lambda views: views[dtype].as_strided(shape, stride, place)

    def __call__(self, given: Sequence[Tensor]) -> tuple[Tensor, R] | None:
        """Launches; None where launches have to go through Triton, as hooks are set."""
        if self._steps and not self._steps[0].launch.is_kept:
            return None
        shape, stride, dtype = self._output
        output = torch.empty_strided(shape, stride, dtype=dtype, device=self._device)
        kept, dropped = (
            torch.empty(size, dtype=torch.uint8, device=self._device) for size in self._sizes
        )
        tensors = (*given, output, kept, dropped)
        bases = [0, *(tensor.data_ptr() for tensor in tensors)]
        made = [_described(other, given[base - 1]) for base, other in self._descriptors]
        with on_device(self._device):
            stream = current_stream(self._device)
            for step in self._steps:
                arguments: list[Any] = [bases[base] + steps for base, steps in step.sources]
                for place, number in step.descriptors:
                    arguments[place] = made[number]
                step.launch.repeat(stream, arguments)
        return output, self._make_result({dtype: kept.view(dtype) for dtype in self._dtypes})


def _described(descriptor: Any, base: Tensor | None) -> Any:
    """A TMA descriptor of another tensor alike."""
    found = object.__new__(type(descriptor))
    found.__dict__.update(vars(descriptor), base=base)
    return found
