"""What is checked before and after every forward pass of a decoder that is in a session.

A file of its own, so that the checks have names by which copies of a model find them (pickles hold
hooks), and so that torch's compiler is imported with them, at the first session.
"""

from __future__ import annotations

import threading
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch

from shareprefill.errors import UnsupportedError
from shareprefill.runtime.attachment import IMPLEMENTATIONS, calls_made, is_attached

NO_WHOLE_GRAPH = (
    "a session reads values on the way, which no whole graph can hold: inside a session, compile "
    "the model without fullgraph=True"
)


class _Passes(threading.local):
    """Attention calls that a thread had made when it began a decoder's present pass."""

    def __init__(self) -> None:
        self.begun: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()


_passes = _Passes()


@torch.compiler.disable(reason=NO_WHOLE_GRAPH)
def begin_pass(decoder: torch.nn.Module, _inputs: Any) -> None:
    """Refuses a forward pass that would go past the session, dense and unnoticed."""
    _passes.begun[decoder] = calls_made()
    chosen = cast(Any, decoder).config._attn_implementation
    # Copies of a model have its hooks, and are of no session.
    if chosen not in IMPLEMENTATIONS and is_attached(decoder):
        raise UnsupportedError(
            f"the model was set to the attention implementation {chosen!r} inside a session, which "
            "would leave the session without effect (continuous batching does so): leave the "
            "session first, or use generate() instead of generate_batch()"
        )


@torch.compiler.disable(reason=NO_WHOLE_GRAPH)
def end_pass(decoder: torch.nn.Module, _inputs: Any, _output: Any) -> None:
    """Refuses a forward pass that went past the session, as no layer called our attention."""
    before = _passes.begun.pop(decoder, None)
    if before == calls_made() and is_attached(decoder):
        raise no_effect(decoder)


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
