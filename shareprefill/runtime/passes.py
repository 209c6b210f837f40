"""What is checked and noted before and after every forward pass of a decoder that is in a session.

A file of its own, so that the checks have names by which copies of a model find them (pickles hold
hooks), and so that torch's compiler is imported with them, at the first session.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from shareprefill.errors import UnsupportedError
from shareprefill.runtime.attachment import (
    IMPLEMENTATIONS,
    attachment_of,
    calls_made,
    follows_caches,
    is_attached,
)

NO_WHOLE_GRAPH = (
    "a session reads values on the way, which no whole graph can hold: inside a session, compile "
    "the model without fullgraph=True"
)


class Conversation:
    """A cache as passes filled it: what was learnt of its tokens holds while it lives.

    It ends where the cache's tensors are exchanged or written to between two passes: beams were
    put in another order, rows or tokens cut out, or a pass outside of a session with sparse decode
    steps was made.
    """

    def __init__(self) -> None:
        self._keys: Callable[[], Tensor | None] = lambda: None
        self._version: int | None = None

    def note(self, cache: Any) -> None:
        """Remembers the cache as it is after a pass."""
        layer, before = _last_layer(cache), self._keys()
        keys = None if layer is None else layer.keys
        self._keys = (lambda: None) if keys is None else weakref.ref(keys)
        self._version = None if keys is None else _version(keys)
        is_kept = keys is before or getattr(layer, "is_compileable", False)
        if keys is not None and self._version is None and is_kept:
            # Written in place, and uncounted: what others write would not be noticed.
            self._keys = lambda: None

    def holds(self, cache: Any) -> bool:
        """Whether the cache is as the last pass left it."""
        layer = _last_layer(cache)
        keys = None if layer is None else layer.keys
        return keys is self._keys() and (keys is None or _version(keys) == self._version)


def _last_layer(cache: Any) -> Any:
    """The last layer that has keys; None where none has."""
    for layer in reversed(cache.layers):
        if isinstance(getattr(layer, "keys", None), Tensor):
            return layer
    return None


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written to; inference tensors do not count."""
    return None if tensor.is_inference() else tensor._version


class _Passes(threading.local):
    """What a thread noted at the beginning of a decoder's present pass.

    Attributes:
        begun: Attention calls that it had made.
        conversations: Of the pass's cache, and that cache if it was given; not there for caches of
            a kind that is not known.
    """

    def __init__(self) -> None:
        self.begun: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()
        self.conversations: WeakKeyDictionary[torch.nn.Module, tuple[Conversation, Any]] = (
            WeakKeyDictionary()
        )


_passes = _Passes()
_conversations: WeakKeyDictionary[Any, Conversation] = WeakKeyDictionary()


@torch.compiler.disable(reason=NO_WHOLE_GRAPH)
def begin_pass(decoder: torch.nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Refuses a forward pass that would go past the session, dense and unnoticed."""
    _passes.begun[decoder] = calls_made()
    # One of a pass that raised is of no other.
    _passes.conversations.pop(decoder, None)
    if follows_caches(decoder):
        _note_conversation(decoder, inputs, options)
    chosen = cast(Any, decoder).config._attn_implementation
    # Copies of a model have its hooks, and are of no session.
    if chosen not in IMPLEMENTATIONS and is_attached(decoder):
        raise UnsupportedError(
            f"the model was set to the attention implementation {chosen!r} inside a session, which "
            "would leave the session without effect (continuous batching does so): leave the "
            "session first, or use generate() instead of generate_batch()"
        )
    _refuse_weights(decoder, options)


def _refuse_weights(decoder: torch.nn.Module, options: dict[str, Any]) -> None:
    """Refuses a pass that is to return attention weights: transformers would return none."""
    wanted = options.get("output_attentions")
    if wanted is None:
        wanted = getattr(cast(Any, decoder).config, "output_attentions", False)
    attachment = attachment_of(decoder)
    if wanted and attachment is not None and not attachment.own:
        raise UnsupportedError(
            "output_attentions asks for attention weights, which a session does not compute: ask "
            "inside `with session.dense():`, or outside the session, of a model with "
            "attn_implementation='eager'; or set output_attentions=False"
        )


@torch.compiler.disable(reason=NO_WHOLE_GRAPH)
def end_pass(decoder: torch.nn.Module, _inputs: Any, output: Any) -> None:
    """Refuses a forward pass that went past the session, as no layer called our attention."""
    before = _passes.begun.pop(decoder, None)
    if before == calls_made() and is_attached(decoder):
        raise no_effect(decoder)
    conversation, cache = _passes.conversations.pop(decoder, (None, None))
    if cache is None and hasattr(output, "__dict__"):
        cache = _cache_in(vars(output))
    if conversation is not None and cache is not None:
        conversation.note(cache)
        _conversations[cache] = conversation


def _note_conversation(
    decoder: torch.nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
) -> None:
    if len(inputs) > 1:
        bound = inspect.signature(decoder.forward).bind_partial(*inputs, **options)
        options = bound.arguments
    given = options.get("past_key_values", options.get("cache"))
    cache = _cache_in(options)
    if cache is None:
        # The pass makes one, or has one of a kind that is not known.
        known = None if given is not None else Conversation()
    else:
        known = _conversations.get(cache)
        if known is None or not known.holds(cache):
            known = _conversations[cache] = Conversation()
    if known is not None:
        _passes.conversations[decoder] = known, cache


def _cache_in(named: Mapping[str, Any]) -> Any:
    """The cache among a pass's arguments or results; None where it has no layers to look at.

    Transformers 5.24 has renamed its `past_key_values`.
    """
    for name in ("past_key_values", "cache"):
        if isinstance(getattr(named.get(name), "layers", None), list):
            return named[name]
    return None


def conversation_of(decoder: torch.nn.Module) -> Conversation | None:
    """That of the pass that this thread is in; None outside of a pass that is watched."""
    conversation, _ = _passes.conversations.get(decoder, (None, None))
    return conversation


def is_watched(decoder: torch.nn.Module) -> bool:
    """Whether this thread is in a pass of the decoder that is checked at its end."""
    return decoder in _passes.begun


def no_effect(decoder: torch.nn.Module) -> UnsupportedError:
    """Says that no layer has called a session's attention."""
    return UnsupportedError(
        f"no layer of {type(decoder).__name__} called the session's attention in this forward "
        "pass: its layers compute attention by themselves, or have none, so that a session has "
        "no effect; run the model without a session"
    )
