"""What layers did: raw on the device as they run, brought to the host and read later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from shareprefill.artifact import Policy
from shareprefill.runtime.ops.blocks import BlockLists
from shareprefill.runtime.rules.base import Coverage, Overhead, PolicyTaken

T = TypeVar("T")
Maker = Callable[[Any], Any]

SKETCH_SIDE = 64


@dataclass(frozen=True, eq=False)
class Sketch:
    """The maps of one layer's heads, and what was read of them, small enough to keep and to show.

    Attributes:
        queries: Query rows, in tokens: the last ones of the sequence, or of a chunk of it.
        keys: Keys, in tokens.
        maps: Exact block maps, float16 `[H, n_q, n_k]`, averaged to at most `SKETCH_SIDE` a side.
        read: The share of every cell that was read, float16 of the same shape.
    """

    queries: int
    keys: int
    maps: Tensor
    read: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerRecord:
    """What one layer did with one sequence (or one chunk of it).

    Nothing is worked out before it is asked for: the layer itself launches nothing for it.

    Attributes:
        layer: Layer index.
        causal: Causal blocks of one head.
        policy_taken: See `LayerSelection`, as the next three.
        overhead: The steps of the selection.
        coverage: The check before sharing.
        candidate_distances: With the paper's rule.
        totals: Listed blocks by pattern, and the pattern that each head read; None where all
            outputs were there without.
        recall: Attention mass inside every head's pattern, float32 `[H]`, where asked for.
        sketch: Maps and patterns, where asked for.
    """

    layer: int
    causal: int
    policy_taken: PolicyTaken
    overhead: tuple[Overhead, ...]
    coverage: Coverage | None
    candidate_distances: Tensor | None
    totals: BlockLists | None
    recall: Tensor | None = None
    sketch: Sketch | None = None

    @property
    def policies(self) -> Tensor:
        """Number of the policy that every head took, int64 `[H]`.

        A `Policy`, or one of the plan's further ones.
        """
        by_head = self.policy_taken.by_head
        if self.totals is None:
            return by_head
        by_pattern = self.policy_taken.by_pattern.clone()
        for first, is_finite in self.policy_taken.is_finite:
            is_dense = ~is_finite
            by_pattern[first : first + len(is_finite)].masked_fill_(is_dense, int(Policy.DENSE))
        read = self.totals.head_to_list
        # Pivots are pivots, whatever they read.
        is_known = (read < 0) | (by_head == int(Policy.PIVOT))
        return torch.where(is_known, by_head, by_pattern[read.clamp(min=0)])

    @property
    def blocks(self) -> Tensor:
        """Blocks computed by every head, int64 `[H]`."""
        if self.totals is None:
            return torch.full_like(self.policy_taken.by_head, self.causal)
        counts = self.totals.head_counts().long()
        return torch.where(self.totals.head_to_list < 0, self.causal, counts)

    @property
    def covered(self) -> Tensor:
        """Attention mass of every sharing head's sampled rows inside its pivot's pattern.

        float32 `[H]`; NaN for other heads, and where a pivot's pattern rests on NaN or Inf.
        """
        covered, found = self._full(torch.nan), self.coverage
        if found is not None:
            covered[found.heads] = torch.where(found.pivot_is_finite, found.mass, torch.nan)
        return covered

    @property
    def distances(self) -> Tensor:
        """With the paper's rule, JS distance of every candidate to its pivot, float32 `[H]`.

        NaN for other heads.
        """
        found = self.candidate_distances
        return self._full(torch.nan) if found is None else found

    @property
    def work(self) -> Tensor:
        """Selection work of every head, float32 `[H]`, of its dense attention's operations."""
        work = self._full(0.0)
        for step in self.overhead:
            share = (step.heads >= 0).to(work.dtype) * step.share
            work.index_add_(0, step.heads.clamp(min=0), share)
        return work

    def _full(self, value: float) -> Tensor:
        return torch.full_like(self.policy_taken.by_head, value, dtype=torch.float32)


def on_host(records: Sequence[LayerRecord]) -> list[LayerRecord]:
    """Records brought to the host, in one copy for each kind of tensor.

    Args:
        records: Of any layers and devices.
    """
    # What layers have of their plans is in many records, and copied once.
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        return found.setdefault(id(tensor), tensor)

    for record in records:
        map_tensors(record, keep)
    moved = dict(zip(found, _moved([*found.values()]), strict=True))
    return [map_tensors(record, lambda tensor: moved[id(tensor)]) for record in records]


def map_tensors(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """A value with every tensor in it changed, in dataclasses and tuples too."""
    found: Any = value
    if isinstance(value, Tensor):
        found = change(value)
    elif isinstance(value, tuple):
        found = tuple(map_tensors(part, change) for part in value)
    elif is_dataclass(value):
        changed = {f.name: map_tensors(getattr(value, f.name), change) for f in fields(value)}
        found = replace(cast(Any, value), **changed)
    return found


def maker(value: Any, of_tensor: Callable[[Tensor], Maker | None]) -> Maker | None:
    """What makes values that are like one but for some tensors in it; `map_tensors` takes longer.

    Args:
        value: As in `map_tensors`. Its other tensors are kept.
        of_tensor: What makes tensors in place of one, from what the maker is given; None where it
            stays.

    Returns:
        None where all of them stay.
    """
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, tuple):
        makers = [maker(part, of_tensor) for part in value]
        if not any(makers):
            return None
        parts = [(None if make else part, make) for part, make in zip(value, makers, strict=True)]
        return lambda source: tuple(make(source) if make else part for part, make in parts)
    if not is_dataclass(value):
        return None
    stay, made = dict[str, Any](), dict[str, Maker]()
    for field in fields(value):
        part = getattr(value, field.name)
        make = maker(part, of_tensor)
        if make is None:
            stay[field.name] = part
        else:
            made[field.name] = make
    kind = type(value)

    def make_alike(source: Any) -> Any:
        # Past the checks: the parts are as those that were checked.
        found = object.__new__(kind)
        found.__dict__.update(stay)
        for name, make in made.items():
            found.__dict__[name] = make(source)
        return found

    return make_alike if made else None


def _moved(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of any dtypes and devices on the host; those that are alike go in one copy."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        alike.setdefault((tensor.device, tensor.dtype), []).append(place)
    moved = [*tensors]
    for places in alike.values():
        some = [tensors[place].flatten() for place in places]
        parts = torch.cat(some).cpu().split([len(part) for part in some])
        for place, part in zip(places, parts, strict=True):
            moved[place] = part.view(tensors[place].shape)
    return moved
