"""How many device operations a piece of code would start on a GPU, counted on a CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

from torch.utils._python_dispatch import TorchDispatchMode

# Where an operator chooses its implementation, and where it reads values on a CPU alone.
_CHOICES = ("pooled_attention", "block_selection", "vertical_slash")
_NO_LAUNCH = frozenset(
    (
        *("empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "view"),
        *("_unsafe_view", "slice", "select", "expand", "transpose", "t", "permute", "unsqueeze"),
        *("squeeze", "split", "unbind", "as_strided", "unfold", "lift_fresh"),
    )
)


class _Operations(TorchDispatchMode):
    """Counts what torch starts, while no kernel of ours is interpreted."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found, self.is_counting = found, True

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None):
        name = function._schema.name.removeprefix("aten::")
        if self.is_counting and name not in _NO_LAUNCH:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """Counts launches by name: our Triton kernels, in the interpreter, and torch's operations.

    What only a CPU does for its checks of values is left out.
    """
    from triton.runtime.interpreter import InterpretedFunction

    from shareprefill.runtime.ops.blocks import BlockLists

    found: Counter[str] = Counter()
    operations = _Operations(found)
    launch = InterpretedFunction.run

    def counted(kernel: Any, *args: Any, **options: Any) -> Any:
        found[kernel.fn.__name__] += 1
        operations.is_counting = False
        try:
            return launch(kernel, *args, **options)
        finally:
            operations.is_counting = True

    def nothing(*_args: Any, **_options: Any) -> None:
        pass

    ops = "shareprefill.runtime.ops"
    with ExitStack() as stack:
        stack.enter_context(patch.object(InterpretedFunction, "run", counted))
        stack.enter_context(patch.object(BlockLists, "validate", nothing))
        for name in (*_CHOICES, "block_sparse_attention"):
            calls = import_module(f"{ops}.{name}.api")._calls
            stack.enter_context(patch.dict(calls, clear=True))
        for name in _CHOICES:
            stack.enter_context(patch(f"{ops}.{name}.api.select_impl", lambda *_: "triton"))
        chosen = f"{ops}.block_sparse_attention.api.select_attention"
        stack.enter_context(patch(chosen, lambda *_: "triton"))
        for place in (
            "inputs.check_below",
            *(f"{name}.api.check_below" for name in _CHOICES),
        ):
            stack.enter_context(patch(f"{ops}.{place}", nothing))
        stack.enter_context(operations)
        yield found
