"""The seam to transformers: one registered attention function, and a handler per model.

`attached(model, handler)` switches a model to our attention implementation and gives every
attention call of that model to the handler; on leaving, the model has its own implementation back.
Nothing of transformers is replaced: the function and the mask function are registered under our
own name through its public interfaces, at the first use.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from shareprefill.errors import UnsupportedError

IMPLEMENTATION = "shareprefill"

# Rows of a masked dense attention computed at once: bounds the mask at this many rows of all keys.
_DENSE_ROWS = 1024


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


@dataclass(frozen=True)
class AttentionCall:
    """One call of a layer's attention, as transformers makes it.

    Attributes:
        module: The attention module.
        layer: Its layer index.
        query: `[B, H, Lq, D]`, after RoPE and any query norm.
        key: `[B, G, Lk, D]`, after the cache update, not repeated.
        value: `[B, G, Lk, Dv]`.
        mask: Facts, a bool mask `[B, 1, Lq, Lk]`, or None for plain causal attention.
        scale: The model's own factor on the logits.
        options: The keyword arguments that were left.
    """

    module: torch.nn.Module
    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: FactMask | Tensor | None
    scale: float
    options: dict[str, Any]

    @property
    def facts(self) -> MaskFacts | None:
        """The mask's facts; None where the mask is not plainly causal."""
        return self.mask.facts if isinstance(self.mask, FactMask) else None

    def sequences(self) -> list[Sequence] | None:
        """The batch as padding-free sequences; None if some padding lies inside a sequence.

        A sequence whose query rows are all padding is left out.
        """
        facts = self.facts
        if facts is None:
            return None
        batch, _, n_query, _ = self.query.shape
        end = facts.q_offset + n_query
        if facts.padding is None:
            return [
                Sequence(row, slice(0, n_query), slice(0, end - facts.kv_offset))
                for row in range(batch)
            ]
        seen = facts.padding[:, :end].bool()
        lengths = seen.sum(-1).tolist()
        firsts = seen.int().argmax(-1).tolist()
        found = []
        for row, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
            last = first + length
            if not bool(seen[row, first:last].all()):
                return None
            if length == 0 or last <= facts.q_offset:
                continue
            query = slice(max(first - facts.q_offset, 0), last - facts.q_offset)
            key = slice(max(first - facts.kv_offset, 0), last - facts.kv_offset)
            found.append(Sequence(row, query, key))
        return found


class Handler(Protocol):
    """Computes the attention of one layer."""

    def __call__(self, call: AttentionCall) -> Tensor:
        """Returns the output `[B, H, Lq, Dv]`."""
        ...


def dense_attention(call: AttentionCall) -> Tensor:
    """The layer's own attention, exactly as its mask says, through SDPA.

    Args:
        call: The layer's inputs.

    Returns:
        `[B, H, Lq, Dv]`. Rows that are padding are zero where facts tell them apart.
    """
    facts = call.facts
    if facts is None:
        return _sdpa(call.query, call.key, call.value, call.mask, call.mask is None, call.scale)
    sequences = call.sequences()
    whole = call.query.shape[2] == call.key.shape[2] and facts.padding is None
    if whole and facts.window is None:
        return _sdpa(call.query, call.key, call.value, None, True, call.scale)
    if sequences is None:
        return _sdpa(call.query, call.key, call.value, _bool_mask(call, facts), False, call.scale)
    shape = (*call.query.shape[:3], call.value.shape[-1])
    out = call.query.new_zeros(shape)
    for sequence in sequences:
        out[sequence.row, :, sequence.query] = causal_attention(
            call.query[sequence.row, :, sequence.query],
            call.key[sequence.row, :, sequence.key],
            call.value[sequence.row, :, sequence.key],
            scale=call.scale,
            window=facts.window,
        )
    return out


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None = None
) -> Tensor:
    """Dense causal attention of one sequence whose last query row is its last key.

    Args:
        query: `[H, Nq, D]`.
        key: `[G, Nk, D]`, Nk >= Nq.
        value: `[G, Nk, Dv]`.
        scale: Factor on the logits.
        window: Keys that a query sees, itself among them; None for all.

    Returns:
        `[H, Nq, Dv]`.
    """
    n_query, n_key = query.shape[1], key.shape[1]
    if n_query == n_key and window is None:
        return _sdpa(query[None], key[None], value[None], None, True, scale)[0]
    pieces = []
    for start in range(0, n_query, _DENSE_ROWS):
        rows = torch.arange(start, min(start + _DENSE_ROWS, n_query), device=query.device)
        positions = rows + (n_key - n_query)
        low = 0 if window is None else max(0, start + n_key - n_query - window + 1)
        high = int(n_key - n_query + start + len(rows))
        columns = torch.arange(low, high, device=query.device)
        mask = columns[None, :] <= positions[:, None]
        if window is not None:
            mask &= columns[None, :] > positions[:, None] - window
        piece = query[None, :, start : start + len(rows)]
        pieces.append(
            _sdpa(piece, key[None, :, low:high], value[None, :, low:high], mask, False, scale)[0]
        )
    return torch.cat(pieces, dim=1)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    causal = causal and query.shape[2] > 1
    if query.shape[1] == key.shape[1]:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scale
        )
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
    )


def _bool_mask(call: AttentionCall, facts: MaskFacts) -> Tensor:
    device = call.query.device
    queries = torch.arange(call.query.shape[2], device=device)[:, None] + facts.q_offset
    keys = torch.arange(call.key.shape[2], device=device)[None, :] + facts.kv_offset
    mask = keys <= queries
    if facts.window is not None:
        mask &= keys > queries - facts.window
    mask = mask[None, None].expand(call.query.shape[0], 1, -1, -1)
    if facts.padding is None:
        return mask
    present = torch.zeros(call.query.shape[0], call.key.shape[2], dtype=torch.bool, device=device)
    padding = facts.padding[:, facts.kv_offset : facts.kv_offset + call.key.shape[2]].bool()
    present[:, : padding.shape[1]] = padding
    # A row with nothing to read would be NaN; such rows are padding, so what they read is free.
    mask = mask & present[:, None, None, :]
    return mask | ~mask.any(-1, keepdim=True)


_handlers: WeakKeyDictionary[torch.nn.Module, list[Handler]] = WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def attached(model: torch.nn.Module, handler: Handler) -> Iterator[None]:
    """Gives every attention call of `model` to `handler` until the context is left.

    May be nested, on one model or several; the innermost handler of a model is the one that runs.

    Args:
        model: A transformers decoder.
        handler: Computes a layer's attention.

    Raises:
        UnsupportedError: the model's family does not go through transformers' attention interface.
    """
    modules = [m for m in model.modules() if getattr(m, "layer_idx", None) is not None]
    previous = _implementations(model)
    with _lock:
        _register()
        for module in modules:
            _handlers.setdefault(module, []).append(handler)
    try:
        _switch(model)
        yield
    finally:
        with _lock:
            for module in modules:
                stack = _handlers[module]
                # The same handler may stand in the list twice: take the innermost one away.
                del stack[len(stack) - 1 - stack[::-1].index(handler)]
                if not stack:
                    del _handlers[module]
        cast(Any, model).set_attn_implementation(previous)


def _implementations(model: torch.nn.Module) -> str | dict[str, str]:
    """What to hand back to `set_attn_implementation` later: sub-configurations may differ."""
    config = cast(Any, model).config
    own = config._attn_implementation or "eager"
    parts = {
        name: getattr(config, name)._attn_implementation or "eager"
        for name in config.sub_configs
        if getattr(config, name, None) is not None
    }
    return {"": own, **parts} if parts else own


def _switch(model: torch.nn.Module) -> None:
    config = cast(Any, model).config
    cast(Any, model).set_attn_implementation(IMPLEMENTATION)
    if config._attn_implementation != IMPLEMENTATION:
        raise UnsupportedError(
            f"{type(model).__name__} computes attention by itself instead of through transformers' "
            "attention interface, so its prefill cannot be made sparse; use a model family that "
            "supports AttentionInterface (see docs/models.md)"
        )


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    stack = _handlers.get(module)
    if not stack:
        raise UnsupportedError(
            f"a layer of {type(module).__name__} is set to the attention implementation "
            f"{IMPLEMENTATION!r} outside a session; call it inside `with share_prefill(...)`"
        )
    if dropout:
        raise UnsupportedError("attention dropout is not supported: call model.eval() first")
    for name, what in (("softcap", "logit soft-capping"), ("s_aux", "attention sinks")):
        if options.get(name) is not None:
            raise UnsupportedError(
                f"{type(module).__name__} uses {what}, which this version cannot compute; run the "
                "model without a session"
            )
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        raise UnsupportedError(
            "the sparse prefill has no backward pass: wrap the call in torch.no_grad()"
        )
    if _lost_facts(attention_mask):
        raise UnsupportedError(
            f"{type(module).__name__} rearranges the attention mask before it uses it; run the "
            "model without a session"
        )
    call = AttentionCall(
        module=module,
        layer=cast(int, module.layer_idx),
        query=query,
        key=key,
        value=value,
        mask=cast("FactMask | Tensor | None", attention_mask),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        options=options,
    )
    return stack[-1](call).transpose(1, 2).contiguous(), None


def _lost_facts(mask: Tensor | None) -> bool:
    """Whether this is a piece of a `FactMask` that is no `FactMask` any more (all one element)."""
    if mask is None or isinstance(mask, FactMask) or mask.ndim != 4:
        return False
    return mask.dtype == torch.bool and mask.shape[2] > 1 and mask.stride()[2:] == (0, 0)


def _mask(
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
    if attention_mask is not None and not bool(attention_mask.all()):
        padding = attention_mask
    facts = MaskFacts(q_offset, int(kv_offset), padding, local_size)
    return FactMask.make((batch_size, 1, q_length, kv_length), device, facts)
