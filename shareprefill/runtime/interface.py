"""The seam to transformers: one registered attention function, and a handler per model.

`attached(model, handler)` switches a model to our attention implementation and gives every
attention call of that model to the handler; on leaving, the model has its own implementation back.
Nothing of transformers is replaced: the function and the mask function are registered under our
own name through its public interfaces, at the first use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from shareprefill.errors import UnsupportedError
from shareprefill.models import text_decoder
from shareprefill.runtime.attachment import (
    ADDED_MASKS,
    IMPLEMENTATION,
    IMPLEMENTATIONS,
    Attachment,
    Note,
    attachment_of,
    count_call,
    use_of,
)
from shareprefill.runtime.attachment import is_attached as has_attachment
from shareprefill.runtime.dense import causal_attention, sdpa, whole_attention
from shareprefill.runtime.family_attention import (
    LogitExtras,
    family_attention,
    implementation,
    is_causal,
    known_extras,
    needs_family,
    rows_at_once,
)
from shareprefill.runtime.masks import (
    FactMask,
    MaskFacts,
    Sequence,
    allowed_mask,
    bool_mask,
    mask_facts,
)


# Not frozen: that would take a microsecond more to make, at every layer of every decode step.
@dataclass(slots=True, eq=False)
class AttentionCall:
    """One call of a layer's attention, as transformers makes it; it is not to be changed.

    Attributes:
        module: The attention module.
        layer: Its layer index.
        query: `[B, H, Lq, D]`, after RoPE and any query norm.
        key: `[B, G, Lk, D]`, after the cache update, not repeated.
        value: `[B, G, Lk, Dv]`.
        mask: Facts, a bool mask `[B, 1, Lq, Lk]`, or None for plain causal attention.
        scale: The model's own factor on the logits.
        options: The keyword arguments that were left.
        needs_family: What makes this more than plain attention (soft-capping, sinks), so that the
            family's own function computes it where it is dense; None where it is plain.
        extras: The same, in terms that our operators know too; None where they do not.
        autocast: Type that the model's own function computes in, by autocast; None without it.
    """

    module: torch.nn.Module
    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: FactMask | Tensor | None
    scale: float
    options: dict[str, Any]
    needs_family: str | None = None
    extras: LogitExtras | None = None
    autocast: torch.dtype | None = None

    @property
    def is_shareable(self) -> bool:
        """Whether sparse patterns may be laid over it: causal, over all keys, nothing unknown."""
        known = self.needs_family is None or self.extras is not None
        return known and self.facts is not None and self.facts.window is None

    @property
    def softcap(self) -> float | None:
        """c of a soft-cap of the logits that our operators know too."""
        return None if self.extras is None else self.extras.softcap

    @property
    def sinks(self) -> Tensor | None:
        """Attention sinks `[H]` that our operators know too."""
        return None if self.extras is None else self.extras.sinks

    def of(self, sequence: Sequence) -> AttentionCall:
        """The same call for one of its sequences, as a batch of one row without padding."""
        row = slice(sequence.row, sequence.row + 1)
        query = self.query[row, :, sequence.query]
        key, value = self.key[row, :, sequence.key], self.value[row, :, sequence.key]
        n_query, n_key = query.shape[2], key.shape[2]
        window = None if self.facts is None else self.facts.window
        facts = MaskFacts(n_key - n_query, 0, None, window)
        mask = FactMask.make((1, 1, n_query, n_key), query.device, facts)
        return replace(self, query=query, key=key, value=value, mask=mask)

    def tensors(self, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """Query `[H, Nq, D]`, key `[G, Nk, D]` and value `[G, Nk, Dv]` of one of its sequences."""
        row, keys = sequence.row, sequence.key
        query = self.query[row, :, sequence.query]
        return query, self.key[row, :, keys], self.value[row, :, keys]

    @property
    def facts(self) -> MaskFacts | None:
        """The mask's facts; None where the mask is not plainly causal."""
        return self.mask.facts if isinstance(self.mask, FactMask) else None

    def sequences(self) -> list[Sequence] | None:
        """The batch as padding-free sequences; None if some padding lies inside a sequence.

        A sequence whose query rows are all padding is left out.
        """
        facts = self.facts
        return None if facts is None else facts.sequences(self.query.shape[0], self.query.shape[2])


class Handler(Protocol):
    """Computes the attention of one layer."""

    def __call__(self, call: AttentionCall, /) -> Tensor:
        """Returns the output `[B, H, Lq, Dv]`."""
        ...


class HasGradients:
    """Base of handlers whose results have gradients: others are refused a model in training."""


def dense_attention(call: AttentionCall) -> Tensor:
    """The layer's own attention, exactly as its mask says.

    It runs through SDPA, or where that is faster through lists of all causal blocks, whose results
    differ in their last bits. What is no plain attention (soft-capping, sinks) runs with the
    model's own function.

    Args:
        call: The layer's inputs.

    Returns:
        `[B, H, Lq, Dv]`. Rows that are padding are zero where facts tell them apart.
    """
    if call.needs_family is not None:
        return _family_dense(call)
    facts = call.facts
    if facts is None:
        return sdpa(call.query, call.key, call.value, call.mask, call.mask is None, call.scale)
    whole = call.query.shape[2] == call.key.shape[2] and facts.padding is None
    if whole and facts.window is None and facts.packed is None:
        return whole_attention(call.query, call.key, call.value, call.scale)
    sequences = call.sequences()
    if sequences is None:
        rows, keys = slice(0, call.query.shape[2]), slice(0, call.key.shape[2])
        mask = bool_mask(facts, call.query.shape[0], rows, keys, call.query.device)
        return sdpa(call.query, call.key, call.value, mask, False, call.scale)
    return by_sequence(
        call,
        sequences,
        lambda sequence: causal_attention(
            *call.tensors(sequence), scale=call.scale, window=facts.window
        ),
    )


def by_sequence(
    call: AttentionCall, sequences: list[Sequence], attend: Callable[[Sequence], Tensor]
) -> Tensor:
    """Puts a batch together from its sequences.

    Args:
        call: The layer's inputs.
        sequences: All sequences of the batch.
        attend: Gives the output of one, `[H, Nq, Dv]`.

    Returns:
        `[B, H, Lq, Dv]`, zero in rows that are padding.
    """
    rows = call.query.shape[2]
    if len(call.query) == len(sequences) == 1 and sequences[0].query == slice(0, rows):
        # Nothing to put together: most prefills are one sequence.
        return attend(sequences[0])[None]
    out = call.query.new_zeros((*call.query.shape[:3], call.value.shape[-1]))
    for sequence in sequences:
        out[sequence.row, :, sequence.query] = attend(sequence)
    return out


def _family_dense(call: AttentionCall) -> Tensor:
    """The model's own function, in pieces of query rows on the keys that they may read."""
    n_query, n_key = call.query.shape[2], call.key.shape[2]
    step = rows_at_once(call.module, call.query, call.key, call.options)
    pieces = []
    for start in range(0, n_query, step):
        rows = slice(start, min(start + step, n_query))
        keys = slice(0, n_key)
        if call.facts is not None and step < n_query:
            keys = _readable_keys(call.facts, rows, n_key)
        with _autocast_of(call):
            pieces.append(
                family_attention(
                    call.module,
                    call.query[:, :, rows],
                    call.key[:, :, keys],
                    call.value[:, :, keys],
                    _family_mask(call, rows, keys),
                    call.scale,
                    call.options,
                )
            )
    return torch.cat(pieces, dim=2)


def _autocast_of(call: AttentionCall) -> AbstractContextManager[Any]:
    """What the model's own function is called under: it may mix types, as autocast allows."""
    if call.autocast is None:
        return nullcontext()
    return torch.autocast(call.query.device.type, dtype=call.autocast)


def _readable_keys(facts: MaskFacts, rows: slice, n_key: int) -> slice:
    """The keys that some of the rows may read."""
    last = min(n_key, rows.stop + facts.q_offset - facts.kv_offset)
    if facts.window is None:
        return slice(0, last)
    return slice(max(0, rows.start + facts.q_offset - facts.kv_offset - facts.window + 1), last)


def _family_mask(call: AttentionCall, rows: slice, keys: slice) -> Tensor | None:
    if call.facts is not None:
        # Rows of padding, too, get what they get without us: some models read them later on.
        return allowed_mask(call.facts, call.query.shape[0], rows, keys, call.query.device)
    if call.mask is not None:
        return call.mask[:, :, rows, keys]
    if call.query.shape[2] == 1 or not is_causal(call.module, call.options):
        return None
    # As SDPA's `is_causal` has it: aligned at the first key.
    causal = MaskFacts(0, 0, None, None)
    return bool_mask(causal, call.query.shape[0], rows, keys, call.query.device)


def attach(model: torch.nn.Module, handler: Handler, *, follows_caches: bool = False) -> Attachment:
    """Gives every attention call of `model` to `handler` until that is detached.

    Several may be attached, and detached in any order; `attachment` says which one runs.

    Args:
        model: A transformers decoder.
        handler: Computes a layer's attention.
        follows_caches: Whether it asks what is known of a pass's cache (`passes.conversation_of`).

    Returns:
        What is to be detached.

    Raises:
        UnsupportedError: the model's family does not go through transformers' attention interface.
    """
    return _attach(model, Attachment(handler, follows_caches=follows_caches))


@contextmanager
def attached(model: torch.nn.Module, handler: Handler) -> Iterator[None]:
    """Gives every attention call of `model` to `handler` until the context is left."""
    attachment = attach(model, handler)
    try:
        yield
    finally:
        attachment.detach()


@contextmanager
def computing_itself(model: torch.nn.Module, note: Note) -> Iterator[None]:
    """Lets a model with a handler compute as it would without one, in this thread or task alone.

    Args:
        model: A transformers decoder.
        note: Told of every call.
    """
    attachment = _attach(model, Attachment(None, note))
    try:
        yield
    finally:
        attachment.detach()


def is_attached(model: torch.nn.Module) -> bool:
    """Whether a handler computes the model's attention at present."""
    return has_attachment(text_decoder(model))


def _attach(model: torch.nn.Module, attachment: Attachment) -> Attachment:
    _register()
    decoder = text_decoder(model)
    # Not at the top: importing it imports torch's compiler, which takes long.
    from shareprefill.runtime.passes import begin_pass, end_pass

    attachment.attach(decoder, lambda: _switch(model, decoder), begin_pass, end_pass)
    return attachment


def _switch(model: torch.nn.Module, decoder: Any) -> None:
    current = decoder.config._attn_implementation
    if current not in IMPLEMENTATIONS:
        decoder.set_attn_implementation(
            ADDED_MASKS if current in (None, "eager") else IMPLEMENTATION
        )
    if decoder.config._attn_implementation not in IMPLEMENTATIONS:
        raise UnsupportedError(
            f"{type(model).__name__} computes attention by itself instead of through transformers' "
            "attention interface, so its prefill cannot be made sparse; use a model family that "
            "supports AttentionInterface (see docs/models.md)"
        )


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    # Values choose the blocks, which no graph can hold: compiled models call both as they are.
    for name in IMPLEMENTATIONS:
        additive = name == ADDED_MASKS
        AttentionInterface.register(name, _opaque(partial(_attention, additive=additive)))
        AttentionMaskInterface.register(name, _opaque(partial(_mask, additive=additive)))


def _opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that torch.compile leaves alone."""
    from shareprefill.runtime.passes import NO_WHOLE_GRAPH

    return torch.compiler.disable(
        lambda *args, **options: function(*args, **options), reason=NO_WHOLE_GRAPH
    )


def _mask(*args: Any, additive: bool, config: Any = None, **options: Any) -> Tensor | None:
    """A mask as facts, or the model's own where it computes by itself."""
    attachment, replaced = use_of(config)
    if attachment is None or not attachment.own:
        _note_pass(attachment)
        return mask_facts(*args, config=config, additive=additive, **options)
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    if replaced not in ALL_MASK_ATTENTION_FUNCTIONS:
        return options.get("attention_mask")
    return ALL_MASK_ATTENTION_FUNCTIONS[replaced](*args, config=config, **options)


def _note_pass(attachment: Attachment | None) -> None:
    """Notes a pass that goes past the decoder's hooks: its `forward` was called directly."""
    from shareprefill.runtime.passes import is_watched

    modules = [] if attachment is None else attachment.modules
    if attachment is not None and modules and not is_watched(modules[0]):
        attachment.unwatched = True


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    additive: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    count_call()
    attachment = attachment_of(module)
    if attachment is None:
        raise UnsupportedError(
            f"a layer of {type(module).__name__} is set to the attention implementation "
            f"{IMPLEMENTATION!r} outside a session: call it inside `with share_prefill(...)`; or, "
            "if it shares its configuration with another model that is in a session, give it a "
            "copy of its own: copy.deepcopy(config)"
        )
    attachment.joined = True
    if attachment.handler is None:
        assert attachment.note is not None
        attachment.note(cast(int, module.layer_idx), query.shape[2])
        own = implementation(module, attachment.replaced)
        return own(module, query, key, value, attention_mask, **options)
    _refuse_gradients(attachment.handler, query, key, value)
    if attention_mask is None:
        attention_mask = _implied_mask(module, query, key, additive, options)
    device = query.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        call = _call_of(module, query, key, value, attention_mask, **options)
        return attachment.handler(call).transpose(1, 2).contiguous(), None
    # As SDPA does: it computes in autocast's type, and what is inside it is not cast again.
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        query, key, value = (_cast(tensor, dtype) for tensor in (query, key, value))
        call = _call_of(module, query, key, value, attention_mask, **options)
        call.autocast = dtype
        if call.facts is None and call.mask is not None and call.mask.is_floating_point():
            call.mask = _cast(call.mask, dtype)
        return attachment.handler(call).transpose(1, 2).contiguous(), None


def _implied_mask(
    module: torch.nn.Module, query: Tensor, key: Tensor, additive: bool, options: dict[str, Any]
) -> Tensor | None:
    """What a layer without a mask means: nothing is hidden in eager attention, in SDPA the future.

    SDPA's `is_causal` is aligned at the first key.
    """
    rows, keys = query.shape[2], key.shape[2]
    if rows == 1 or not is_causal(module, options):
        return None
    if additive:
        return torch.ones(1, 1, rows, keys, dtype=torch.bool, device=query.device)
    return _causal_mask(rows, keys, query.device) if rows <= keys else None


@lru_cache(maxsize=8)
def _causal_mask(rows: int, keys: int, device: torch.device) -> FactMask:
    """A causal mask that layers, and passes of as many rows, have in common: none writes to it."""
    return FactMask.make((1, 1, rows, keys), device, MaskFacts(0, 0, None, None))


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as autocast gives it to SDPA: float64 stays what it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _refuse_gradients(handler: Handler, *tensors: Tensor) -> None:
    if isinstance(handler, HasGradients):
        return
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise UnsupportedError(
            "the sparse prefill has no backward pass: wrap the call in torch.no_grad()"
        )


def _call_of(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> AttentionCall:
    """What transformers calls an attention function with, checked."""
    if dropout:
        raise UnsupportedError("attention dropout is not supported: call model.eval() first")
    if isinstance(attention_mask, FactMask):
        attention_mask = attention_mask.of_call(query.shape[0], query.shape[2], key.shape[2])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    reason = needs_family(module, options)
    extras = known_extras(module, query, key, value, scale, options) if reason else None
    return AttentionCall(
        module=module,
        layer=cast(int, module.layer_idx),
        query=query,
        key=key,
        value=value,
        mask=_packed_mask(attention_mask, query, options),
        scale=scale,
        options=options,
        needs_family=reason,
        extras=extras,
    )


def _packed_mask(
    mask: Tensor | None, query: Tensor, options: dict[str, Any]
) -> FactMask | Tensor | None:
    """A call's mask, with the packed sequences that varlen arguments name."""
    bounds = options.get("cu_seq_lens_q")
    if bounds is None or query.shape[2] == 1:
        return mask
    if not isinstance(mask, FactMask) or query.shape[0] != 1:
        raise UnsupportedError(
            "cu_seq_lens_q is understood for one row under a causal mask: leave it out, and let "
            "position_ids begin at 0 with every sequence (use_cache=False)"
        )
    facts = mask.facts.divided(bounds, options.get("cu_seq_lens_k"), query.shape[2])
    return FactMask.make((1, 1, query.shape[2], mask.shape[3]), mask.device, facts)
