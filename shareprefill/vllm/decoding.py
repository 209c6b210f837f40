"""Decode steps of one process of an engine: which rows are sparse, on plain tensors.

Nothing here knows vLLM: another engine's adapter would call the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shareprefill.runtime.decoding import BLOCK
from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.ops.pages import PagedTokens, Tokens
from shareprefill.runtime.ops.sketched_selection import MOST_BLOCKS
from shareprefill.runtime.paged_decoding import PagedDecoding
from shareprefill.runtime.rules.base import Exchange
from shareprefill.vllm.options import OFF
from shareprefill.vllm.pages import all_pages

# Tokens of a request that is decoded sparsely, at most.
MOST_TOKENS = MOST_BLOCKS * BLOCK
# Tokens of the prompt that compiles the kernels.
_WARM_TOKENS = 256
# Why a step is dense, as counters name it.
BY_REQUEST, BY_LENGTH, NO_PROMPT = "request", "length", "no long prompt was read yet"


@dataclass(frozen=True, eq=False)
class DecodeStep:
    """The rows of a step that are decoded sparsely, as the layers of a group of caches need them.

    Attributes:
        place: Of the rows' tokens among the step's: a slice, or numbers, int64 `[rows]`.
        lengths: Tokens of the rows' requests, int32 `[rows]`; 0 for a row that others compute, and
            that zeros are written for.
        table: Their pages, int32 `[rows, m]`.
        most_tokens: At least the largest of `lengths`.
    """

    place: slice | Tensor
    lengths: Tensor
    table: Tensor
    most_tokens: int


def decode_step(
    rows: Sequence[int],
    starts: Sequence[int],
    most: Sequence[int],
    lengths: Tensor,
    table: Tensor,
) -> DecodeStep:
    """The rows of a step that are decoded sparsely; waits for no device.

    Args:
        rows: Their indices among the step's rows, ascending.
        starts: First token of every row of the step, on the host.
        most: Tokens of every row's request or more, on the host.
        lengths: Tokens of every row's request, int32 `[R]`.
        table: Their pages, int32 `[R, m]`.
    """
    first, last = rows[0], rows[-1]
    most_tokens = max(most[row] for row in rows)
    if last - first + 1 == len(rows):
        mine = slice(first, last + 1)
        place = slice(starts[first], starts[last] + 1)
        lengths, table = lengths[mine], table[mine]
        if first:
            # Kernels are compiled for addresses that are multiples of 16.
            lengths, table = lengths.clone(), table.clone()
        return DecodeStep(place, lengths, table, most_tokens)
    places = [[starts[row] for row in rows], list(rows)]
    numbers = torch.tensor(places, dtype=torch.int64, device="cpu")
    place, numbers = numbers.to(lengths.device, non_blocking=True)
    return DecodeStep(place, lengths[numbers], table[numbers], most_tokens)


def uniform_step(
    rows: Sequence[int], n_rows: int, most: Sequence[int], lengths: Tensor, table: Tensor
) -> DecodeStep:
    """The rows of a step in which every row has one token, so that a CUDA graph may hold it.

    A row stands where it does in the step: what is told of it in `begin_step` holds in the graph.

    Args:
        rows: Those that are decoded sparsely, ascending.
        n_rows: Rows that have a token; those behind them are padding.
        most: See `decode_step`.
        lengths: See `decode_step`.
        table: See `decode_step`.
    """
    lengths = lengths[:n_rows]
    if len(rows) < n_rows:
        is_sparse = torch.zeros(n_rows, dtype=torch.bool, device="cpu")
        is_sparse[list(rows)] = True
        lengths = lengths * is_sparse.to(lengths.device, non_blocking=True)
    most_tokens = max((most[row] for row in rows), default=1)
    return DecodeStep(slice(0, n_rows), lengths, table[:n_rows], most_tokens)


class ServingDecoding:
    """Sparse decode steps of one model in one process of an engine.

    Args:
        make: Makes the core's part; takes `PagedDecoding`'s arguments in place of its own.
        exchange: Of the other processes' heads; None where this one holds all of them.
        least_tokens: Of a request that is decoded sparsely.
        max_rows: Requests of a step at most.
        max_keys: Tokens of a request at most.
        room: Bytes of the engine's cache and the sketches of its keys at most.
        count: Is told of decode steps: `sparse` or `dense`, why they are dense, and how many.

    Raises:
        UnsupportedError: the core refuses the device, or the heads.
    """

    def __init__(
        self,
        make: Callable[..., PagedDecoding],
        exchange: Exchange | None,
        *,
        least_tokens: int,
        max_rows: int,
        max_keys: int,
        room: int,
        count: Callable[[str, str, int], None] = lambda *_: None,
    ) -> None:
        self._make, self._exchange = make, exchange
        self._core: PagedDecoding | None = None
        self.least_tokens, self.max_rows = least_tokens, max_rows
        self.max_keys, self.room = max_keys, room
        # Here, so that what the core refuses stops the engine's start.
        self._token_bytes = self._any_core().bytes_per_token
        self._count, self._dense, self._steps = count, Counter[str](), 0

    def use(self, layers: Sequence[int]) -> None:
        """Says which layers decode sparsely, before the first step.

        Args:
            layers: Of those that this process holds, those of plain attention, ascending.
        """
        if self._core is None:
            self._core = self._make(layers=layers, max_rows=self.max_rows, exchange=self._exchange)

    @property
    def core(self) -> PagedDecoding:
        """The core's part."""
        assert self._core is not None, "which layers decode sparsely is said before the first step"
        return self._core

    def is_sparse(self, n_key: int, switch: str | None) -> bool:
        """Whether a row of one token is decoded sparsely."""
        return self._reason(n_key, switch) is None

    def book(self, n_key: int, switch: str | None) -> None:
        """Counts a row of one token of a step that is computed, once for all of its layers."""
        reason = self._reason(n_key, switch)
        if reason is None:
            self._steps += 1
            self._count("sparse", "decode", 1)
        else:
            self._dense[reason] += 1
            self._count("dense", reason, 1)

    def begin_step(self, step: DecodeStep) -> None:
        """Begins a step, before its first layer.

        Args:
            step: Its sparse rows.
        """
        self.core.begin_step(step.lengths)

    def graph_step(self, lengths: Tensor, table: Tensor) -> DecodeStep:
        """The rows of all steps that a CUDA graph of one is replayed for.

        Before a replay `begin_step` says of each row whether it is sparse; the others read every
        block. No row has more than `MOST_TOKENS`.

        Args:
            lengths: Tokens of the rows' requests, int32 `[rows]`, where the graph finds them.
            table: Their pages, int32 `[rows, m]`, where it finds them.
        """
        assert self.max_keys <= MOST_TOKENS, "longer rows would be read in part"
        return DecodeStep(slice(0, len(lengths)), lengths, table, self.max_keys)

    def write(self, layer: int, keys: Tensor, slots: Tensor) -> None:
        """Sketches the keys of a step's tokens, which are in the cache by now.

        Args:
            layer: Layer index in the model.
            keys: The layer's keys in pages, `[pages, G, page size, D]`.
            slots: Places of the tokens in them, int64 `[T]`; negative where there is no token.
        """
        self.core.write(layer, keys, slots)

    def read_prompt(self, layer: int, query: Tensor, key: Tokens, keys: Tensor) -> None:
        """Learns what decode steps look for from the rows of a long prompt, or of a chunk of it.

        Args:
            layer: Layer index in the model.
            query: `[H, Nq, D]`.
            key: Of the request so far, `[G, Nk, D]`.
            keys: The layer's keys in pages, `[pages, G, page size, D]`.
        """
        self.core.learn(layer, query, key, keys)

    def attend(
        self,
        layer: int,
        step: DecodeStep,
        query: Tensor,
        pages: tuple[Tensor, Tensor],
        output: Tensor,
        *,
        scale: float,
    ) -> None:
        """Attention of one layer's heads on the step's sparse rows, in place.

        Args:
            layer: Layer index in the model.
            step: The rows.
            query: `[T, H, D]` of all tokens of the step.
            pages: The layer's keys and values, `[pages, G, page size, D]` each.
            output: `[T, H, D]`, contiguous.
            scale: The model's factor on the logits.
        """
        mine = query[step.place]
        is_run = isinstance(step.place, slice)
        out = self.core.attend(
            *(layer, mine, *pages, step.table, step.lengths),
            most_tokens=step.most_tokens,
            scale=scale,
            out=output[step.place] if is_run else None,
        )
        if not is_run:
            output[step.place] = out

    def sketch_bytes(self, n_groups: int, head_dim: int, itemsize: int) -> int:
        """What the sketches of the largest cache take that has room beside them.

        Args:
            n_groups: KV heads of this process.
            head_dim: Of keys and values.
            itemsize: Bytes of a number of theirs.
        """
        share = self._token_bytes / (2 * n_groups * head_dim * itemsize)
        return int(self.room * share / (1 + share))

    def warm(self, query: Tensor, n_groups: int, page_size: int, *, scale: float) -> None:
        """Compiles the kernels that steps of any length and number of rows need; counts nothing.

        A core that is thrown away runs on random numbers, by itself in every process.

        Args:
            query: `[T, H, D]`, whose sizes, dtype and device are taken.
            n_groups: KV heads of this process.
            page_size: Tokens of a page of the cache.
            scale: The model's factor on the logits.
        """
        core, layer = self._any_core(), 0
        device, (_, n_heads, dim) = query.device, query.shape
        n_pages = count_blocks(_WARM_TOKENS, page_size)
        shape = (n_pages, 2, page_size, n_groups, dim)
        keys, values = all_pages(torch.randn(shape, dtype=query.dtype, device=device))
        slots = torch.arange(n_pages * page_size, dtype=torch.int64, device=device)
        prompt = torch.randn(n_heads, _WARM_TOKENS, dim, dtype=query.dtype, device=device)
        core.learn(layer, prompt, PagedTokens(keys, slots[:n_pages], _WARM_TOKENS), keys)
        # The same pages again and again, so that few are needed.
        places = torch.arange(count_blocks(self.max_keys, page_size), device=device)
        table = (places % n_pages).to(torch.int32)
        for rows, tokens in self._warm_sizes():
            lengths = torch.full((rows,), tokens, dtype=torch.int32, device=device)
            core.write(layer, keys, slots[:rows])
            core.begin_step(lengths)
            core.attend(
                *(layer, torch.randn(rows, n_heads, dim, dtype=query.dtype, device=device)),
                *(keys, values, table.repeat(rows, 1), lengths),
                most_tokens=tokens,
                scale=scale,
            )

    def _any_core(self) -> PagedDecoding:
        """A core of one layer that tells no other process."""
        return self._make(layers=range(1), max_rows=self.max_rows, effect=None)

    def _warm_sizes(self) -> Iterator[tuple[int, int]]:
        """Rows and tokens: kernels differ where either doubles."""
        most = min(self.max_keys, MOST_TOKENS)
        tokens = max(self.least_tokens, 1)
        while tokens < most:
            yield 1, tokens
            tokens *= 2
        rows = 1
        while rows <= self.max_rows:
            yield rows, most
            rows *= 2

    def report(self) -> dict[str, Any]:
        """What was done since the start; waits for the device.

        Returns:
            JSON-ready: `steps` that were sparse (a token of one request through the model),
            `dense_steps` by the reason, and `density`: key blocks that sparse steps read over those
            that there were, without the newest step; None where there is no other.
        """
        measured, density = self.core.report()
        return {
            "steps": self._steps,
            "dense_steps": dict(self._dense),
            "density": density if measured else None,
        }

    def reset(self) -> None:
        """Forgets what the report says."""
        self.core.reset()
        self._dense.clear()
        self._steps = 0

    def _reason(self, n_key: int, switch: str | None) -> str | None:
        """Why a row of one token is decoded densely; None where it is not."""
        if switch == OFF:
            return BY_REQUEST
        if not self.least_tokens <= n_key <= MOST_TOKENS:
            return BY_LENGTH
        return None if self.core.ready else NO_PROMPT
