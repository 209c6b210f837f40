"""Causal masks as facts, in O(1) memory, and as tensors where one is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskFacts:
    """What a causal mask says, without its `[B, 1, Lq, Lk]` tensor.

    Key k may be read by query q of sequence b if `k + kv_offset <= q + q_offset`, and
    `k + kv_offset > q + q_offset - window` where there is a window, and `padding[b, k + kv_offset]`
    where there is padding.
    """

    q_offset: int
    kv_offset: int
    padding: Tensor | None
    window: int | None


class FactMask(torch.Tensor):
    """A mask that carries its facts: a one-element tensor expanded to the mask's shape.

    Models hand it through untouched, cut it to the keys' length, or move it to a layer's device;
    all of that returns the mask itself. What else is done to it loses the facts, and the attention
    function refuses such a mask.
    """

    facts: MaskFacts
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def make(
        shape: tuple[int, int, int, int], device: torch.device | str, facts: MaskFacts
    ) -> FactMask:
        base = torch.ones((), dtype=torch.bool, device=device).expand(shape)
        mask = cast(FactMask, base.as_subclass(FactMask))
        mask.facts = facts
        return mask

    def _itself(self, *_args: Any, **_kwargs: Any) -> FactMask:
        return self

    contiguous = to = clone = _itself  # pyright: ignore[reportAssignmentType]

    def __getitem__(self, index: Any) -> Tensor:
        whole = isinstance(index, tuple) and all(isinstance(i, slice) for i in index)
        return self if whole and index[0] == slice(None) else super().__getitem__(index)


def bool_mask(
    facts: MaskFacts, batch: int, rows: slice, keys: slice, device: torch.device
) -> Tensor:
    """`[B, 1, rows, keys]` of the slices, True where a key may be read."""
    queries = torch.arange(rows.start, rows.stop, device=device)[:, None] + facts.q_offset
    columns = torch.arange(keys.start, keys.stop, device=device)[None, :] + facts.kv_offset
    mask = columns <= queries
    if facts.window is not None:
        mask &= columns > queries - facts.window
    mask = mask[None, None].expand(batch, 1, -1, -1)
    if facts.padding is None:
        return mask
    present = torch.zeros(batch, keys.stop - keys.start, dtype=torch.bool, device=device)
    padding = facts.padding[:, facts.kv_offset + keys.start : facts.kv_offset + keys.stop].bool()
    present[:, : padding.shape[1]] = padding
    # A row with nothing to read would be NaN; such rows are padding, so what they read is free.
    mask = mask & present[:, None, None, :]
    return mask | ~mask.any(-1, keepdim=True)


def lost_facts(mask: Tensor | None) -> bool:
    """Whether this is a piece of a `FactMask` that is no `FactMask` any more (all one element)."""
    if mask is None or isinstance(mask, FactMask) or mask.ndim != 4:
        return False
    return mask.dtype == torch.bool and mask.shape[2] > 1 and mask.stride()[2:] == (0, 0)


def mask_facts(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """Facts for plainly causal masks; transformers' own mask for a decode step and all others."""
    from transformers.masking_utils import sdpa_mask

    # `local_size` is a window, except in models with chunked attention.
    chunked = local_size is not None and getattr(config, "attention_chunk_size", None) is not None
    # Without the permission to skip, something was laid over the causal mask (packed sequences).
    if q_length == 1 or chunked or not allow_is_causal_skip or isinstance(q_offset, Tensor):
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=cast(int, q_offset),
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            device=device,
            **others,
        )
    padding = None
    # A mask on the meta device has no values to look at.
    if attention_mask is not None and (attention_mask.is_meta or not bool(attention_mask.all())):
        padding = attention_mask
    facts = MaskFacts(q_offset, int(kv_offset), padding, local_size)
    return FactMask.make((batch_size, 1, q_length, kv_length), device, facts)
