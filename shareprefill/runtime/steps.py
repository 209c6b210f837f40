"""The decode steps of a session: which are sparse, what their sequences' states are, what they did.

A step that cannot be sparse is computed densely, and counted with the reason.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from shareprefill.runtime.decoding import (
    BLOCK,
    LEAST_COORDINATES,
    DecodeRecord,
    DecodeState,
    SparseDecoding,
)
from shareprefill.runtime.interface import AttentionCall, dense_attention
from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.ops.sketched_selection import MOST_BLOCKS
from shareprefill.runtime.passes import Conversation, conversation_of
from shareprefill.runtime.report import DecodingReport

# Why a step was dense.
NO_PROMPT = "no prompt was read in this session, or its cache was changed since"
OTHER_MASK = "its mask is not that of the prompt and what follows"
NOT_CAUSAL = "a mask that is not plainly causal"
PADDED_INSIDE = "padding inside a sequence or behind it"
TOO_SHORT = "fewer tokens than min_tokens"
TOO_LONG = f"more than {MOST_BLOCKS * BLOCK} tokens"
SMALL_HEADS = f"heads of fewer than {LEAST_COORDINATES} dims"
# Records that are summed up at once.
_MANY = 4096


@dataclass(eq=False)
class _Known:
    """What is known of a cache's sequences.

    Attributes:
        state: Of the core.
        tokens: In the cache, padding among them.
        why_dense: Layers that are dense, and the reason.
    """

    state: DecodeState
    tokens: int = 0
    why_dense: dict[int, str] = field(default_factory=dict)


class _Spans(threading.local):
    """The mask that a thread's step has in its layers, and where the mask's rows begin and end."""

    mask: Tensor | None = None
    layer: int = 0
    found: tuple[tuple[int, ...], int] | None = None

    def of(self, mask: Tensor, layer: int) -> tuple[tuple[int, ...], int] | None:
        """First keys of the rows and the end of all; None if keys inside are hidden."""
        last, is_next = self.mask, layer > self.layer
        self.layer = layer
        # The next step may have other values in the same memory.
        if (
            last is None
            or not is_next
            or (mask.data_ptr(), mask.shape) != (last.data_ptr(), last.shape)
        ):
            self.found = _span(mask)
            # Kept: the memory is not another mask's as long as this one is there.
            self.mask = mask
        return self.found


def _span(mask: Tensor) -> tuple[tuple[int, ...], int] | None:
    if mask.shape[1] != 1:
        return None
    seen = mask[:, 0, 0]
    if mask.dtype != torch.bool:
        # To be added: 0 where a key may be read.
        seen = seen == 0
    firsts, lasts = seen.int().argmax(-1), seen.shape[1] - seen.flip(-1).int().argmax(-1)
    rows = torch.stack((firsts, lasts, seen.sum(-1)), -1).tolist()
    ends = {last for _, last, _ in rows}
    is_whole = all(last - first == count for first, last, count in rows)
    return (
        (tuple(first for first, _, _ in rows), ends.pop()) if is_whole and len(ends) == 1 else None
    )


class DecodeSteps:
    """Computes a model's decode steps sparsely where it can.

    Args:
        decoder: The model's decoder.
        decoding: The core's part.
        least_tokens: Of a sequence that is decoded sparsely, by device.
    """

    def __init__(
        self,
        decoder: nn.Module,
        decoding: SparseDecoding,
        least_tokens: Callable[[torch.device], int],
    ) -> None:
        self.decoder, self.decoding, self.least_tokens = decoder, decoding, least_tokens
        self._known: WeakKeyDictionary[Conversation, _Known] = WeakKeyDictionary()
        self._spans = _Spans()
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forgets what the report counts."""
        with self._lock:
            # Sparse steps by layer, dense ones by layer and reason.
            self._steps: Counter[int] = Counter()
            self._dense: Counter[tuple[int, str]] = Counter()
            self._counts: list[Tensor] = []
            self._read = self._blocks = 0

    def read_prompt(self, call: AttentionCall) -> None:
        """Keeps what decode steps need of a prompt, or of one chunk of it."""
        conversation = conversation_of(self.decoder)
        if conversation is None:
            return
        known = self._known.get(conversation)
        starts, why = _prompt_of(call)
        if known is None or (why is None and known.state.starts != starts):
            # Layers before, that said why they are dense, do not know the first keys.
            reasons = {} if known is None else known.why_dense
            known = _Known(self.decoding.begin(starts), why_dense=reasons)
            self._known[conversation] = known
        if why is not None:
            known.why_dense[call.layer] = why
            known.state.forget(call.layer)
            return
        known.why_dense.pop(call.layer, None)
        facts = call.facts
        assert facts is not None
        known.tokens = facts.q_offset - facts.kv_offset + call.query.shape[2]
        # The few rows of a guess that is verified are no prompt.
        if call.query.shape[2] >= BLOCK or not self.decoding.knows(call.layer, known.state):
            self.decoding.read_prompt(call.layer, known.state, call.query)

    def attend(self, call: AttentionCall, *, again: bool) -> Tensor:
        """Attention of one token of every sequence, `[B, H, 1, Dv]`.

        Args:
            call: Of one query row.
            again: It is a second call of its layer and step, and not counted.
        """
        conversation = conversation_of(self.decoder)
        known = None if conversation is None else self._known.get(conversation)
        starts, tokens = self._sequences(call)
        why = self._why_dense(call, known, starts, tokens)
        if known is None or why is not None:
            if not again:
                self._book_dense(call, why or NO_PROMPT)
            return dense_attention(call)
        known.tokens = tokens
        out, record = self.decoding.attend(
            call.layer,
            known.state,
            call.query[:, :, 0],
            call.key[:, :, :tokens],
            call.value[:, :, :tokens],
            scale=call.scale,
        )
        if not again:
            self._book(call, record)
        return out[:, :, None]

    def _book(self, call: AttentionCall, record: DecodeRecord) -> None:
        with self._lock:
            self._steps[call.layer] += len(call.query)
            self._counts.append(record.counts)
            self._blocks += record.blocks
            if len(self._counts) > _MANY:
                # Waits for the device once in many steps.
                self._sum_up()

    def _sequences(self, call: AttentionCall) -> tuple[tuple[int, ...] | None, int]:
        """First keys of a step's sequences, None where keys inside are hidden; and their end."""
        if call.mask is None:
            return (0,) * len(call.key), call.key.shape[2]
        found = self._spans.of(call.mask, call.layer)
        if found is None:
            return None, 0
        starts, tokens = found
        return (starts * len(call.key) if len(starts) == 1 else starts), tokens

    def _why_dense(
        self, call: AttentionCall, known: _Known | None, starts: tuple[int, ...] | None, tokens: int
    ) -> str | None:
        if call.needs_family is not None:
            return call.needs_family
        if known is None:
            return NO_PROMPT
        why = known.why_dense.get(call.layer)
        if why is not None:
            return why
        if not self.decoding.knows(call.layer, known.state):
            return NO_PROMPT
        if starts is None or starts != known.state.starts or tokens < known.tokens:
            return OTHER_MASK
        if tokens - min(starts) < self.least_tokens(call.key.device):
            return TOO_SHORT
        return TOO_LONG if count_blocks(tokens, BLOCK) > MOST_BLOCKS else None

    def _book_dense(self, call: AttentionCall, why: str) -> None:
        batch, groups, tokens, _ = call.key.shape
        with self._lock:
            self._dense[call.layer, why] += batch
            blocks = batch * groups * count_blocks(tokens, BLOCK)
            self._read += blocks
            self._blocks += blocks

    def _sum_up(self) -> None:
        devices = {counts.device for counts in self._counts}
        for device in devices:
            mine = [counts.flatten() for counts in self._counts if counts.device == device]
            self._read += int(torch.cat(mine).sum())
        self._counts = []

    def report(self) -> DecodingReport:
        """What was done since the beginning or the last reset."""
        with self._lock:
            self._sum_up()
            layers = self._steps.keys() | {layer for layer, _ in self._dense}
            dense: dict[str, int] = {}
            for why in dict.fromkeys(why for _, why in self._dense):
                mine = {layer: n for (layer, w), n in self._dense.items() if w == why}
                of = f", {len(mine)} of {len(layers)} layers" if len(mine) < len(layers) else ""
                dense[why + of] = max(mine.values())
            return DecodingReport(
                steps=max(self._steps.values(), default=0),
                dense_steps=dense,
                density=self._read / self._blocks if self._blocks else None,
            )


def _prompt_of(call: AttentionCall) -> tuple[tuple[int, ...], str | None]:
    """First keys of a prompt's sequences, and why steps behind it are dense; None if they are not.

    Where they are, the first keys may be anything.
    """
    nowhere = (0,) * len(call.query)
    facts = call.facts
    if call.needs_family is not None:
        return nowhere, call.needs_family
    if facts is None or facts.packed is not None:
        return nowhere, NOT_CAUSAL
    if facts.window is not None:
        return nowhere, f"sliding window of {facts.window}"
    if call.query.shape[3] < LEAST_COORDINATES:
        return nowhere, SMALL_HEADS
    sequences = call.sequences()
    rows = call.query.shape[2]
    if sequences is None or len(sequences) != len(call.query):
        return nowhere, PADDED_INSIDE
    if any(sequence.query.stop != rows for sequence in sequences):
        return nowhere, PADDED_INSIDE
    return tuple(sequence.key.start for sequence in sequences), None
