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
from shareprefill.runtime.masks import FactMask, MaskFacts, bool_mask, lost_facts, mask_facts
from shareprefill.runtime.own_attention import is_causal, own_attention, own_reason, rows_at_once

IMPLEMENTATION = "shareprefill"

# Rows of a masked dense attention computed at once: bounds the mask at this many rows of all keys.
_DENSE_ROWS = 1024


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
        own: Why only the model's own function can compute this call (soft-capping, sinks); None
            where plain attention does.
    """

    module: torch.nn.Module
    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: FactMask | Tensor | None
    scale: float
    options: dict[str, Any]
    own: str | None = None

    @property
    def is_shareable(self) -> bool:
        """Whether sparse patterns may be laid over it: plain attention, causal, over all keys."""
        return self.own is None and self.facts is not None and self.facts.window is None

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

    What is no plain attention (soft-capping, sinks) runs with the model's own function.

    Args:
        call: The layer's inputs.

    Returns:
        `[B, H, Lq, Dv]`. Rows that are padding are zero where facts tell them apart.
    """
    if call.own is not None:
        return _own_dense(call)
    facts = call.facts
    if facts is None:
        return _sdpa(call.query, call.key, call.value, call.mask, call.mask is None, call.scale)
    sequences = call.sequences()
    whole = call.query.shape[2] == call.key.shape[2] and facts.padding is None
    if whole and facts.window is None:
        return _sdpa(call.query, call.key, call.value, None, True, call.scale)
    if sequences is None:
        rows, keys = slice(0, call.query.shape[2]), slice(0, call.key.shape[2])
        mask = bool_mask(facts, call.query.shape[0], rows, keys, call.query.device)
        return _sdpa(call.query, call.key, call.value, mask, False, call.scale)
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


def _own_dense(call: AttentionCall) -> Tensor:
    """The model's own function, in pieces of query rows on the keys that they may read."""
    n_query, n_key = call.query.shape[2], call.key.shape[2]
    step = rows_at_once(call.module, call.query, call.key, call.options)
    pieces = []
    for start in range(0, n_query, step):
        rows = slice(start, min(start + step, n_query))
        keys = slice(0, n_key)
        if call.facts is not None and step < n_query:
            keys = _readable_keys(call.facts, rows, n_key)
        pieces.append(
            own_attention(
                call.module,
                call.query[:, :, rows],
                call.key[:, :, keys],
                call.value[:, :, keys],
                _own_mask(call, rows, keys),
                call.scale,
                call.options,
            )
        )
    return torch.cat(pieces, dim=2)


def _readable_keys(facts: MaskFacts, rows: slice, n_key: int) -> slice:
    """The keys that some of the rows may read."""
    last = min(n_key, rows.stop + facts.q_offset - facts.kv_offset)
    if facts.window is None:
        return slice(0, last)
    return slice(max(0, rows.start + facts.q_offset - facts.kv_offset - facts.window + 1), last)


def _own_mask(call: AttentionCall, rows: slice, keys: slice) -> Tensor | None:
    if call.facts is not None:
        return bool_mask(call.facts, call.query.shape[0], rows, keys, call.query.device)
    if call.mask is not None:
        return call.mask[:, :, rows, keys]
    if call.query.shape[2] == 1 or not is_causal(call.module, call.options):
        return None
    # As SDPA's `is_causal` has it: aligned at the first key.
    causal = MaskFacts(0, 0, None, None)
    return bool_mask(causal, call.query.shape[0], rows, keys, call.query.device)


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
    AttentionMaskInterface.register(IMPLEMENTATION, mask_facts)


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
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        raise UnsupportedError(
            "the sparse prefill has no backward pass: wrap the call in torch.no_grad()"
        )
    if lost_facts(attention_mask):
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
        own=own_reason(module, options),
    )
    return stack[-1](call).transpose(1, 2).contiguous(), None
