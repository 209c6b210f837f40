"""Block-sparse attention for CPUs: one dense call per (pattern, query block)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention

from shareprefill.runtime.ops.blocks import BlockLists
from shareprefill.runtime.ops.inputs import padded_tokens

# Logits of one step with a log-sum-exp: heads of one pattern are taken together while they fit.
LOGIT_BYTES = 32 * 2**20


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: BlockLists,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Fill `out` (and `lse`); arguments as in `block_sparse_attention`.

    Computes in float32 (float64 for float64 inputs): half-precision matmuls are slower on CPUs.
    Memory: one row of selected keys and a mask for it. SDPA on gathered keys beats matmuls and a
    softmax of our own on two threads, but keeps its log-sum-exp and knows no soft-cap: with `lse`,
    `softcap` or `sinks` we compute the softmax ourselves.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    heads_per_group = query.shape[0] // key.shape[0]
    members: dict[tuple[int, int], list[int]] = {}
    for head, pattern in enumerate(lists.head_to_list.tolist()):
        if pattern >= 0:
            members.setdefault((head // heads_per_group, pattern), []).append(head)
    rows = _causal_rows(lists, query.shape[1], key.shape[1])
    widest = max((len(row) for row in rows), default=0)
    step = _Step(query, key, value, lists.block_size, widest, scale, dtype, softcap, sinks)
    for (group, pattern), heads in sorted(members.items()):
        step.load_group(group)
        for i_block in range(lists.n_q):
            step.attend_block(heads, i_block, rows[pattern * lists.n_q + i_block], out, lse)


def _causal_rows(lists: BlockLists, n_q_tokens: int, n_k_tokens: int) -> list[list[int]]:
    """Listed blocks of every (pattern, query block) that its last row can see."""
    offsets, indices = lists.offsets.tolist(), lists.indices.tolist()
    rows = []
    for row, (start, end) in enumerate(pairwise(offsets)):
        last_row = min((row % lists.n_q + 1) * lists.block_size, n_q_tokens) - 1
        last_block = (n_k_tokens - n_q_tokens + last_row) // lists.block_size
        rows.append(indices[start : bisect_right(indices, last_block, start, end)])
    return rows


class _Step:
    """Buffers and the loaded KV group of one call."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        block_size: int,
        widest: int,
        scale: float,
        dtype: torch.dtype,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> None:
        self.query, self.key, self.value = query, key, value
        self.block_size, self.scale, self.dtype = block_size, scale, dtype
        self.softcap, self.sinks = softcap, None if sinks is None else sinks.to(dtype)
        self.q_offset = key.shape[1] - query.shape[1]
        self.group = -1
        self.key_buffer = key.new_empty((widest, block_size * key.shape[2]), dtype=dtype)
        self.value_buffer = key.new_empty((widest, block_size * value.shape[2]), dtype=dtype)
        self.tokens = widest * block_size
        # Additive mask of one query block: its last columns are refilled for each, as only the
        # last two of the causal blocks can cross the diagonal.
        self.mask = key.new_zeros((block_size, self.tokens), dtype=dtype)
        self.logit_buffer = key.new_empty(0, dtype=dtype)
        self.tokens_in_block = torch.arange(block_size, device=key.device)

    def load_group(self, group: int) -> None:
        """Make keys and values of a KV head contiguous whole blocks, `[n_k, B * D]`."""
        if group == self.group:
            return
        self.group = group
        size = self.block_size
        keys = padded_tokens(self.key[group], size, self.dtype)
        values = padded_tokens(self.value[group], size, self.dtype)
        self.keys = keys.view(-1, size * keys.shape[1])
        self.values = values.view(-1, size * values.shape[1])

    def attend_block(
        self,
        heads: list[int],
        i_block: int,
        blocks: list[int],
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """Attention of one query block of heads that share a KV head and a pattern."""
        start = i_block * self.block_size
        end = min(start + self.block_size, self.query.shape[1])
        # Keys ascend, so rows that see none are the block's first rows.
        first_key = blocks[0] * self.block_size if blocks else self.q_offset + end
        begin = max(start, first_key - self.q_offset)
        if begin > start:
            out[heads, start:begin] = 0.0
            if lse is not None and self.sinks is not None:
                lse[heads, start:begin] = self.sinks[heads, None].float()
        if not blocks:
            return
        keys = self._gather(self.keys, blocks, self.key_buffer).view(-1, self.key.shape[2])
        values = self._gather(self.values, blocks, self.value_buffer).view(-1, self.value.shape[2])
        hidden = self._hidden(begin, end, blocks)
        if lse is None and self.softcap is None and self.sinks is None:
            # A slice spares the copy that an index list makes.
            chosen = slice(heads[0], heads[0] + 1) if len(heads) == 1 else heads
            queries = self.query[chosen, begin:end].to(self.dtype)
            result = scaled_dot_product_attention(
                queries[None],
                keys.expand(1, len(heads), -1, -1),
                values.expand(1, len(heads), -1, -1),
                attn_mask=self._additive(hidden, len(keys)),
                scale=self.scale,
            )
            out[chosen, begin:end] = result[0].to(out.dtype)
            return
        self._attend_logits(heads, begin, end, keys, values, hidden, out, lse)

    def _attend_logits(
        self,
        heads: list[int],
        begin: int,
        end: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        hidden: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """The same with a softmax of our own, for what a dense call does not give."""
        at_once = max(1, LOGIT_BYTES // ((end - begin) * len(keys) * self.dtype.itemsize))
        for first in range(0, len(heads), at_once):
            some = heads[first : first + at_once]
            queries = self.query[some, begin:end].to(self.dtype).mul_(self.scale)
            queries = queries.view(-1, self.key.shape[2])
            if self.logit_buffer.numel() == 0:
                widest = max(self.block_size * self.tokens, LOGIT_BYTES // self.dtype.itemsize)
                self.logit_buffer = keys.new_empty(widest)
            logits = self.logit_buffer[: len(queries) * len(keys)].view(len(queries), len(keys))
            torch.mm(queries, keys.T, out=logits)
            if self.softcap is not None:
                logits.div_(self.softcap).tanh_().mul_(self.softcap)
            by_head = logits.view(len(some), end - begin, len(keys))
            by_head[:, :, len(keys) - hidden.shape[1] :].masked_fill_(hidden, -torch.inf)
            total = torch.logsumexp(by_head, -1)
            if self.sinks is not None:
                total = torch.logaddexp(total, self.sinks[some, None])
            if lse is not None:
                lse[some, begin:end] = total.float()
            weights = logits.sub_(total.view(-1, 1)).exp_()
            result = torch.mm(weights, values).view(len(some), end - begin, -1)
            out[some, begin:end] = result.to(out.dtype)

    def _additive(self, hidden: torch.Tensor, n_tokens: int) -> torch.Tensor | None:
        """Mask `[rows, n_tokens]` for the dense call; None where nothing is hidden."""
        if hidden.shape[1] == 0:
            return None
        mask = self.mask[: hidden.shape[0], self.tokens - n_tokens :]
        mask[:, -2 * self.block_size :] = 0.0
        mask[:, -hidden.shape[1] :].masked_fill_(hidden, -torch.inf)
        return mask

    def _gather(
        self, source: torch.Tensor, blocks: list[int], buffer: torch.Tensor
    ) -> torch.Tensor:
        if blocks[-1] - blocks[0] + 1 == len(blocks):
            return source[blocks[0] : blocks[-1] + 1]
        index = torch.tensor(blocks, device=source.device)
        return torch.index_select(source, 0, index, out=buffer[: len(blocks)])

    def _hidden(self, begin: int, end: int, blocks: list[int]) -> torch.Tensor:
        """Keys past the diagonal, bool `[rows, tokens of the last listed blocks]`.

        Listed blocks up to the first row's position need no mask and are left out.
        """
        size = self.block_size
        masked = blocks[bisect_left(blocks, (self.q_offset + begin + 1) // size) :]
        first_keys = torch.tensor(masked, dtype=torch.int64, device=self.key.device) * size
        columns = (first_keys[:, None] + self.tokens_in_block).flatten()
        positions = torch.arange(begin, end, device=self.key.device) + self.q_offset
        return columns[None, :] > positions[:, None]
