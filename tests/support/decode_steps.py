"""Decode steps' choices and outputs, each checked against the reference on what it was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch

from shareprefill.runtime.ops.block_sparse_decoding import block_sparse_decoding
from shareprefill.runtime.ops.sketched_selection import select_blocks

# Of outputs, against float64.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1.6e-2}
# Errors of float32 sums are a tenth of this noise of queries, or less.
NOISE, DRAWS = 1e-5, 16


class WatchedSteps:
    """Notes every choice and every output of a module's decode steps.

    While a step runs, its tensors are only held, so that launches may overlap as they do without
    this; `keep` copies them behind the step, before others write there.

    Args:
        monkeypatch: Puts both operators of the module back.
        module: Calls `select_blocks` and `block_sparse_decoding`.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
        self._new: list[tuple[Any, ...]] = []
        self.chosen: list[tuple[Any, ...]] = []
        self.computed: list[tuple[Any, ...]] = []
        for name in ("select_blocks", "block_sparse_decoding"):
            monkeypatch.setattr(module, name, self._watched(getattr(module, name)))

    def _watched(self, operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            found = operator(*given, **options)
            # Where results are to be written is none of what is given.
            options = {name: v for name, v in options.items() if name not in ("counts", "out")}
            self._new.append((given, options, found))
            return found

        return call

    def keep(self) -> None:
        """Copies what the steps since the last call were given and gave."""
        for call in mapped(self._new, torch.Tensor.clone):
            (self.chosen if isinstance(call[2], tuple) else self.computed).append(call)
        self._new = []

    def check(self, device: str) -> int:
        """Compares each list and each output with those of the reference on a device.

        A list may be another one only where the reference gives that one, too, to queries that
        differ by `NOISE`: a share may be a threshold to the last bit.

        Returns:
            Lists that were compared.
        """
        assert self.chosen
        assert len(self.chosen) == len(self.computed)
        lists = others = 0
        for call in mapped(self.chosen, lambda tensor: tensor.to(device)):
            (query, *rest), options, found = call
            ours = listed(*found)
            accepted = [{row} for row in _reference(query, rest, options)]
            lists += len(ours)
            unequal = sum(row not in known for row, known in zip(ours, accepted, strict=True))
            if not unequal:
                continue
            others += unequal
            for _ in range(DRAWS):
                noise = 1 + NOISE * torch.randn(query.shape, device=query.device)
                for known, row in zip(
                    accepted, _reference(query * noise, rest, options), strict=True
                ):
                    known.add(row)
            for row, known in zip(ours, accepted, strict=True):
                assert row in known
        assert others <= 1 + lists // 50
        for given, options, found in mapped(self.computed, lambda tensor: tensor.to(device)):
            exact = mapped(given, lambda t: t.double() if t.is_floating_point() else t)
            expected = block_sparse_decoding(*exact, **options, impl="reference")
            torch.testing.assert_close(
                found.double(), expected, rtol=0, atol=TOLERANCE[found.dtype]
            )
        return lists


def _reference(query: torch.Tensor, rest: Any, options: Any) -> list[tuple[int, ...]]:
    # In float32, where noise is not rounded away.
    given = mapped((query, *rest), lambda t: t.float() if t.is_floating_point() else t)
    return listed(*select_blocks(*given, **options, impl="reference"))


def listed(blocks: torch.Tensor, counts: torch.Tensor) -> list[tuple[int, ...]]:
    """The lists of all sequences and KV heads."""
    pairs = zip(blocks.flatten(0, 1).tolist(), counts.flatten().tolist(), strict=True)
    return [tuple(row[:count]) for row, count in pairs]


def mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same with every tensor in it changed; what was one tensor is one again."""
    known: dict[int, torch.Tensor] = {}

    def visit(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in known:
                known[id(value)] = change(value)
            return known[id(value)]
        if isinstance(value, (list, tuple)):
            return type(value)(visit(item) for item in value)
        if isinstance(value, dict):
            return {name: visit(item) for name, item in value.items()}
        if is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in fields(value)]
            return replace(value, **{name: visit(getattr(value, name)) for name in names})
        return value

    return visit(value)
