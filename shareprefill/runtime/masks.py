"""Causal masks as facts, in O(1) memory, and as tensors where one is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from inspect import getclosurevars
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from shareprefill.errors import ConfigError


@dataclass(frozen=True)
class Sequence:
    """One sequence of a batch, its padding cut off: plain causal attention, aligned at the end.

    Attributes:
        row: Index in the batch.
        query: Slice of the query rows that are no padding.
        key: Slice of the keys that are no padding and not after the last query row.
    """

    row: int
    query: slice
    key: slice

    @property
    def place(self) -> tuple[int, int]:
        """Tells a sequence from the others of its batch: its row, and where it starts there."""
        return self.row, self.query.start

    @property
    def lengths(self) -> tuple[int, int]:
        """Query rows and keys."""
        return self.query.stop - self.query.start, self.key.stop - self.key.start


@dataclass(frozen=True, eq=False)
class MaskFacts:
    """What a causal mask says, without its `[B, 1, Lq, Lk]` tensor.

    Key k may be read by query q of row b if `k + kv_offset <= q + q_offset`, and
    `k + kv_offset > q + q_offset - window` where there is a window, and `padding[b, k + kv_offset]`
    where there is padding, and `packed[b, k] == packed[b, q]` where sequences are packed.

    One object serves all layers of a forward pass, so its sequences are read from the device once.

    Attributes:
        q_offset: Absolute position of the first query row.
        kv_offset: Absolute position of the first key.
        padding: bool or int `[B, positions]`, true where a token is none; None for no padding.
        window: Keys that a query sees, itself among them; None for all.
        packed: int `[B, Lq]`, the number of each token's sequence in its row, ascending; only
            where queries and keys are the same tokens. None for one sequence a row.
    """

    q_offset: int
    kv_offset: int
    padding: Tensor | None
    window: int | None
    packed: Tensor | None = None
    _found: dict[tuple[int, int], list[Sequence] | None] = field(
        default_factory=dict, init=False, repr=False
    )
    _divided: list[tuple[Tensor, MaskFacts]] = field(default_factory=list, init=False, repr=False)

    def sequences(self, batch: int, n_query: int) -> list[Sequence] | None:
        """The batch as padding-free sequences; None if some padding lies inside a sequence.

        A sequence whose query rows are all padding is left out.

        Args:
            batch: Rows of the batch.
            n_query: Query rows, padding among them.
        """
        key = (batch, n_query)
        if key not in self._found:
            self._found[key] = self._find(batch, n_query)
        return self._found[key]

    def divided(self, cu_seq_lens: Tensor, keys: Tensor | None, n_query: int) -> MaskFacts:
        """The facts of one row that holds packed sequences, as varlen attention names them.

        Args:
            cu_seq_lens: int `[S + 1]`, the first token of each sequence, and the end.
            keys: The same of the keys, where it is given.
            n_query: Query rows of the call.

        Raises:
            ConfigError: it does not divide this row, or not as its positions do.
        """
        for known, facts in self._divided:
            if known is cu_seq_lens:
                return facts
        if keys is not None and not torch.equal(keys, cu_seq_lens):
            raise ConfigError(
                "cu_seq_lens_k differs from cu_seq_lens_q: a packed prefill holds whole sequences"
            )
        facts = self._divide(cu_seq_lens.tolist(), n_query)
        self._divided.append((cu_seq_lens, facts))
        return facts

    def _find(self, batch: int, n_query: int) -> list[Sequence] | None:
        end = self.q_offset + n_query
        if self.packed is not None:
            return _runs(self.packed)
        if self.padding is None:
            return [
                Sequence(row, slice(0, n_query), slice(0, end - self.kv_offset))
                for row in range(batch)
            ]
        seen = self.padding[:, :end].bool()
        lengths, firsts = seen.sum(-1), seen.int().argmax(-1)
        places = torch.arange(end, device=seen.device)
        inside = (places >= firsts[:, None]) & (places < (firsts + lengths)[:, None])
        whole = (inside <= seen).all(-1)
        found = []
        facts = torch.stack([firsts, lengths, whole], -1).tolist()
        for row, (first, length, has_no_hole) in enumerate(facts):
            last = first + length
            if not has_no_hole:
                return None
            if length == 0 or last <= self.q_offset:
                continue
            query = slice(max(first - self.q_offset, 0), last - self.q_offset)
            key = slice(max(first - self.kv_offset, 0), last - self.kv_offset)
            found.append(Sequence(row, query, key))
        return found

    def _divide(self, bounds: list[int], n_query: int) -> MaskFacts:
        lengths = [stop - start for start, stop in pairwise(bounds)]
        if not lengths or bounds[0] != 0 or bounds[-1] != n_query or min(lengths) < 0:
            raise ConfigError(
                f"cu_seq_lens_q = {bounds} is not allowed: it must ascend from 0 to the number of "
                f"tokens ({n_query})"
            )
        if self.q_offset or self.kv_offset or self.padding is not None:
            raise ConfigError(
                "packed sequences (cu_seq_lens_q) go without padding and without earlier chunks: "
                "leave attention_mask and past_key_values out"
            )
        packed = torch.repeat_interleave(torch.tensor(lengths))[None]
        if self.packed is not None and _runs(self.packed) != _runs(packed):
            raise ConfigError(
                "cu_seq_lens_q and position_ids divide the tokens in different ways: let "
                "position_ids begin at 0 with every sequence"
            )
        return replace(self, packed=packed)


def _runs(packed: Tensor) -> list[Sequence]:
    """Sequences of `[B, N]` sequence numbers."""
    found = []
    for row, numbers in enumerate(packed):
        lengths = torch.unique_consecutive(numbers, return_counts=True)[1].tolist()
        start = 0
        for length in lengths:
            place = slice(start, start + length)
            found.append(Sequence(row, place, place))
            start += length
    return found


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
    if facts.packed is not None:
        packed = facts.packed.to(device)
        mask = mask & (packed[:, None, rows, None] == packed[:, None, None, keys])
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
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """Facts for plainly causal masks; transformers' own mask for a decode step and all others."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    function = mask_function or causal_mask_function
    # `local_size` is a window, except in models with chunked attention.
    chunked = local_size is not None and getattr(config, "attention_chunk_size", None) is not None
    packed = None
    if not allow_is_causal_skip and not chunked and attention_mask is None:
        packed = _packed_sequences(function)
    # Without the permission to skip, something was laid over the causal mask.
    other = not allow_is_causal_skip and packed is None
    # A static cache knows its offset on the device; where a graph is traced, it stays there.
    traced = isinstance(q_offset, Tensor) and torch.compiler.is_compiling()
    if q_length == 1 or chunked or other or traced:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=cast(int, q_offset),
            kv_offset=kv_offset,
            mask_function=function,
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
    facts = MaskFacts(int(q_offset), int(kv_offset), padding, local_size, packed)
    return FactMask.make((batch_size, 1, q_length, kv_length), device, facts)


def _packed_sequences(mask_function: Callable[..., Any]) -> Tensor | None:
    """Sequence numbers `[B, N]`, if a mask function says causal (or window) and packed alone.

    Transformers hands a mask over as a function composed of known ones. They are told apart by
    their code, and what they hold is read from their closures; whatever is not known is not taken
    for packed sequences, and its mask is then made by transformers.
    """
    found: list[Tensor] = []
    return found[0] if _is_packed_causal(mask_function, found) and len(found) == 1 else None


def _is_packed_causal(function: Callable[..., Any], found: list[Tensor]) -> bool:
    """Whether only known functions are in it; the numbers of packed sequences go to `found`."""
    from transformers import masking_utils as known

    causal = known.causal_mask_function
    if function is causal:
        return True
    code = getattr(function, "__code__", None)
    if code is None:
        return False
    held = getclosurevars(function).nonlocals
    if code is known.and_masks(causal).__code__:
        return all(_is_packed_causal(part, found) for part in held["mask_functions"])
    if code is known.packed_sequence_mask_function(torch.empty(0)).__code__:
        found.append(held["packed_sequence_mask"])
        return True
    # Newer versions count rows from the start of each sequence, which is the same where a sequence
    # is one run of positions.
    remap = getattr(known, "remap_positions_for_packed_sequence", None)
    if remap is not None and code is remap(causal, torch.empty(0)).__code__:
        return _is_packed_causal(held["mask_function"], found)
    # The window itself is named in `local_size` too.
    return code is known.sliding_window_overlay(1).__code__
