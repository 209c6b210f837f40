"""What layers chose, and the records that a session keeps of it: raw on the device, read later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shareprefill.artifact import Policy
from shareprefill.runtime.ops.blocks import BlockLists
from shareprefill.runtime.orders import LayerOrders, Orders


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a layer's heads were found to do; every tensor is as small as a few numbers a head.

    Attributes:
        codes: Policy of the heads that read no candidate, int64 `[H]`; None: the planned one.
        asked: `if_passed` or `if_failed` of the layer's orders, head by head, int64 `[H + T]`, with
            -1 for the heads of `sampled` that took a vertical-slash pattern; None with policy
            `share`.
        works: Work of the choice for one head that was asked, as a share of its dense attention's
            operations: of every head, the pivots, the sharing ones, and each group of `own`.
        covered: Mass of the sharing heads' sampled rows inside their pivots' patterns, float32
            `[S]`; None where none may share.
        shareable: Whether those patterns may be shared, bool `[S]`.
        sound: For groups of `own` by their first slot, where False is a pattern of every causal
            block for want of numbers, bool `[S]`.
        distances: With policy `share`, JS distance of every candidate to its pivot, float32 `[H]`,
            NaN for other heads.
    """

    codes: Tensor | None = None
    asked: Tensor | None = None
    works: tuple[float, ...] = (0.0,)
    covered: Tensor | None = None
    shareable: Tensor | None = None
    sound: tuple[tuple[int, Tensor], ...] = ()
    distances: Tensor | None = None


@dataclass(frozen=True)
class Choice:
    """The patterns of a layer.

    Attributes:
        bitmap: Candidates, bool `[P, n_q, n_k]`.
        pattern: Which of them each head reads, int64 `[H]`; P: every causal block; -1: none, its
            output is there.
        decision: How that came.
    """

    bitmap: Tensor
    pattern: Tensor
    decision: Decision


@dataclass(frozen=True)
class LayerRecord:
    """What one layer did with one sequence (or one chunk of it).

    Nothing is worked out before it is asked for: the layer itself launches nothing for it.

    Attributes:
        layer: Layer index.
        causal: Causal blocks of one head.
        orders: What its heads were to do.
        decision: What they were found to do.
        totals: Listed blocks by candidate, and the candidate that each head read; None where all
            outputs were there without.
        recall: Attention mass inside every head's pattern, float32 `[H]`, where asked for.
    """

    layer: int
    causal: int
    orders: LayerOrders
    decision: Decision
    totals: BlockLists | None
    recall: Tensor | None = None

    @property
    def policies(self) -> Tensor:
        """Number of the policy that every head took, int64 `[H]`.

        A `Policy`, or one of the plan's further ones.
        """
        codes = self.orders.codes if self.decision.codes is None else self.decision.codes
        if self.totals is None:
            return codes
        labels = self.orders.labels.clone()
        for first, sound in self.decision.sound:
            labels[first : first + len(sound)].masked_fill_(~sound, int(Policy.DENSE))
        read = self.totals.head_to_list
        # Pivots are pivots, whatever they read.
        is_known = (read < 0) | (codes == int(Policy.PIVOT))
        return torch.where(is_known, codes, labels[read.clamp(min=0)])

    @property
    def blocks(self) -> Tensor:
        """Blocks computed by every head, int64 `[H]`."""
        if self.totals is None:
            return torch.full_like(self.orders.codes, self.causal)
        counts = self.totals.head_counts().long()
        return torch.where(self.totals.head_to_list < 0, self.causal, counts)

    @property
    def covered(self) -> Tensor:
        """Attention mass of every sharing head's sampled rows inside its pivot's pattern.

        float32 `[H]`; NaN for other heads, and where a pivot's pattern rests on NaN or Inf.
        """
        covered = self._nothing_found()
        found, shareable = self.decision.covered, self.decision.shareable
        if found is not None and shareable is not None:
            covered[self.orders.shares.index] = torch.where(shareable, found, torch.nan)
        return covered

    @property
    def distances(self) -> Tensor:
        """With policy `share`, JS distance of every candidate to its pivot, float32 `[H]`.

        NaN for other heads.
        """
        found = self.decision.distances
        return self._nothing_found() if found is None else found

    @property
    def work(self) -> Tensor:
        """Selection work of every head, float32 `[H]`, of its dense attention's operations."""
        every, *others = self.decision.works
        orders, asked = self.orders, self.decision.asked
        work = torch.full_like(orders.codes, every, dtype=torch.float32)
        if asked is not None:
            groups = (
                orders.pivots.index,
                orders.shares.index,
                *(asked[g.asked] for g in orders.own),
            )
            for heads, share in zip(groups, others, strict=True):
                work.index_add_(0, heads.clamp(min=0), (heads >= 0).to(work.dtype) * share)
        return work

    def _nothing_found(self) -> Tensor:
        return torch.full_like(self.orders.codes, torch.nan, dtype=torch.float32)

    def changed(self, change: Callable[[Tensor], Tensor]) -> LayerRecord:
        """The record with every tensor of its own changed, always in the same order."""

        def maybe(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        old, totals = self.decision, self.totals
        decision = replace(
            old,
            codes=maybe(old.codes),
            asked=maybe(old.asked),
            covered=maybe(old.covered),
            shareable=maybe(old.shareable),
            sound=tuple((first, change(sound)) for first, sound in old.sound),
            distances=maybe(old.distances),
        )
        if totals is not None:
            offsets, heads = change(totals.offsets), change(totals.head_to_list)
            empty = offsets.new_empty(0)
            totals = replace(totals, offsets=offsets, head_to_list=heads, indices=empty)
        return replace(self, decision=decision, totals=totals, recall=maybe(self.recall))


def on_host(records: Sequence[LayerRecord], orders: Orders) -> list[LayerRecord]:
    """Records brought to the host, in one copy for each kind of tensor.

    Args:
        records: Of any layers and devices.
        orders: What they were made by.
    """
    tensors: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    for record in records:
        record.changed(keep)
    moved = iter(_moved(tensors))
    host = torch.device("cpu")
    return [
        replace(record.changed(lambda _: next(moved)), orders=orders.of(record.layer, host))
        for record in records
    ]


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
            moved[place] = part
    return moved
