"""Which key blocks each query block attends to, as lists that several heads may share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.devices import stream_of_tables


def count_blocks(n_tokens: int, block_size: int) -> int:
    """Number of blocks of `block_size` tokens that cover `n_tokens` tokens."""
    return -(-n_tokens // block_size)


def causal_blocks(
    n_q_tokens: int,
    q_offset: int,
    block_size: int,
    *,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Blocks in which at least one query row may see at least one key.

    Query row i stands at absolute position `q_offset + i`; there are `q_offset + n_q_tokens`
    keys. Query blocks start at row 0, key blocks at key 0.

    Args:
        n_q_tokens: query rows.
        q_offset: keys before the first query row; any number, not only multiples of the block.
        block_size: tokens in a block.
        device: device of the result.

    Returns:
        bool `[n_q, n_k]`.
    """
    n_q = count_blocks(n_q_tokens, block_size)
    n_k = count_blocks(q_offset + n_q_tokens, block_size)
    last_rows = torch.arange(1, n_q + 1, device=device) * block_size
    last_positions = last_rows.clamp_(max=n_q_tokens) + (q_offset - 1)
    first_keys = torch.arange(n_k, device=device) * block_size
    return first_keys[None, :] <= last_positions[:, None]


def count_causal_blocks(n_q_tokens: int, q_offset: int, block_size: int) -> int:
    """Number of set entries of `causal_blocks`, counted without making it.

    >>> count_causal_blocks(100, 20, 32), int(causal_blocks(100, 20, 32).sum())
    (13, 13)
    """
    n_q = count_blocks(n_q_tokens, block_size)
    n_k = count_blocks(q_offset + n_q_tokens, block_size)
    # Row I before the last sees key blocks 0 .. I + first; the last row of blocks sees all.
    first = (block_size - 1 + q_offset) // block_size
    return (n_q - 1) * (first + 1) + (n_q - 1) * (n_q - 2) // 2 + n_k


def block_diagonals(
    n_q_tokens: int,
    q_offset: int,
    block_size: int,
    *,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key blocks that the first and the last row of every query block lie in.

    Args:
        n_q_tokens: query rows.
        q_offset: keys before the first query row.
        block_size: tokens in a block.
        device: device of the result.

    Returns:
        Two tensors int64 `[n_q]`.
    """
    starts = torch.arange(0, n_q_tokens, block_size, device=device)
    ends = (starts + block_size).clamp_(max=n_q_tokens) - 1
    return (starts + q_offset) // block_size, (ends + q_offset) // block_size


def always_blocks(
    n_q_tokens: int,
    q_offset: int,
    block_size: int,
    *,
    sink_blocks: int,
    local_blocks: int,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """The causal blocks that every pattern reads.

    Args:
        n_q_tokens: query rows.
        q_offset: keys before the first query row.
        block_size: tokens in a block.
        sink_blocks: leading key blocks.
        local_blocks: trailing causal key blocks of every query block: the one of its first row,
            `local_blocks - 1` before it, and those after it; 0: none of these.
        device: device of the result.

    Returns:
        bool `[n_q, n_k]`.
    """
    causal = causal_blocks(n_q_tokens, q_offset, block_size, device=device)
    first, _ = block_diagonals(n_q_tokens, q_offset, block_size, device=device)
    columns = torch.arange(causal.shape[1], device=device)
    near = columns[None, :] > (first - local_blocks)[:, None]
    return ((near & (local_blocks > 0)) | (columns < sink_blocks)[None, :]) & causal


@dataclass(frozen=True, eq=False)
class BlockLists:
    """Key blocks per (pattern, query block) in CSR form, and the pattern of each query head.

    Attributes:
        offsets: int32 `[P * n_q + 1]`; row `p * n_q + I` of the lists is
            `indices[offsets[row] : offsets[row + 1]]`.
        indices: int32 `[nnz]`, key blocks, ascending and unique in each row. It may be longer than
            `offsets[-1]`; what follows is unused.
        head_to_list: int32 `[H]`, the pattern whose lists each query head reads; -1: the
            head is not computed.
        n_q: query blocks.
        n_k: key blocks.
        block_size: tokens in a block, of queries and of keys.
        starts: every `n_q`-th offset, int32 `[P + 1]`, where they were copied with the lists; None:
            they are still to be.
    """

    offsets: torch.Tensor
    indices: torch.Tensor
    head_to_list: torch.Tensor
    n_q: int
    n_k: int
    block_size: int
    starts: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("offsets", "indices", "head_to_list"):
            tensor = getattr(self, name)
            if tensor.dtype != torch.int32 or tensor.ndim != 1:
                raise ConfigError(
                    f"BlockLists.{name} must be a one-dimensional int32 tensor, "
                    f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
            if tensor.device != self.offsets.device:
                raise ConfigError(
                    f"BlockLists.{name} is on {tensor.device}, offsets on {self.offsets.device}; "
                    "move them to one device"
                )
        if self.n_q < 1 or self.n_k < 1 or self.block_size < 1:
            raise ConfigError(
                "BlockLists needs n_q, n_k and block_size of at least 1, "
                f"got {self.n_q}, {self.n_k} and {self.block_size}"
            )
        if len(self.offsets) < 1 or (len(self.offsets) - 1) % self.n_q:
            raise ConfigError(
                f"BlockLists.offsets must hold P * n_q + 1 numbers (n_q = {self.n_q}), "
                f"got {len(self.offsets)}"
            )

    @property
    def n_patterns(self) -> int:
        """Number of patterns P."""
        return (len(self.offsets) - 1) // self.n_q

    @property
    def device(self) -> torch.device:
        """Device of the lists."""
        return self.offsets.device

    @classmethod
    def from_bitmap(
        cls,
        bitmap: torch.Tensor,
        head_to_list: torch.Tensor,
        block_size: int,
        *,
        capacity: int | None = None,
    ) -> BlockLists:
        """Lists of the set entries of a bitmap.

        Args:
            bitmap: bool `[P, n_q, n_k]`.
            head_to_list: integer `[H]`, index into P or -1, on the bitmap's device.
            block_size: tokens in a block.
            capacity: upper bound of the number of set entries. With it a CUDA bitmap is listed
                without waiting for the device; a bound that is too small loses blocks. None counts
                the entries first.

        Raises:
            ConfigError: the bitmap is not bool `[P, n_q, n_k]`.
        """
        if bitmap.dtype != torch.bool or bitmap.ndim != 3:
            raise ConfigError(
                "bitmap must be bool [P, n_q, n_k], "
                f"got {bitmap.dtype} of shape {tuple(bitmap.shape)}"
            )
        n_patterns, n_q, n_k = bitmap.shape
        ends = bitmap.sum(-1, dtype=torch.int32).flatten().cumsum(0, dtype=torch.int32)
        offsets = torch.zeros(n_patterns * n_q + 1, dtype=torch.int32, device=bitmap.device)
        offsets[1:] = ends
        if capacity is None:
            indices = bitmap.nonzero()[:, 2].to(torch.int32)
        else:
            slots = bitmap.flatten().cumsum(0).sub_(1)
            slots = torch.where(bitmap.flatten(), slots, capacity).clamp_(max=capacity)
            columns = torch.arange(n_k, dtype=torch.int32, device=bitmap.device)
            indices = torch.zeros(capacity + 1, dtype=torch.int32, device=bitmap.device)
            indices.scatter_(0, slots, columns.expand(n_patterns, n_q, n_k).flatten())
            offsets.clamp_(max=capacity)
            indices = indices[:capacity]
        return cls(offsets, indices, head_to_list.to(torch.int32), n_q, n_k, block_size)

    def to_bitmap(self) -> torch.Tensor:
        """The lists as bool `[P, n_q, n_k]`."""
        counts = self.offsets.diff().long()
        rows = torch.repeat_interleave(torch.arange(len(counts), device=self.device), counts)
        bitmap = torch.zeros(len(counts), self.n_k, dtype=torch.bool, device=self.device)
        bitmap[rows, self.indices[: len(rows)].long()] = True
        return bitmap.view(self.n_patterns, self.n_q, self.n_k)

    def head_counts(self) -> torch.Tensor:
        """Listed blocks of each head's pattern, int32 `[H]`; 0 for heads that are not computed."""
        # A head at -1 ends where the first one starts.
        ends = self.offsets[(self.head_to_list + 1) * self.n_q]
        return ends - self.offsets[self.head_to_list.clamp(min=0) * self.n_q]

    def totals(self) -> BlockLists:
        """Counts of whole patterns, each one's as of one row, without the lists: `[P + 1]` numbers.

        They are copied, so that the lists themselves need not be kept.
        """
        starts = self.offsets[:: self.n_q].clone() if self.starts is None else self.starts
        return replace(self, offsets=starts, indices=self.indices.new_empty(0), n_q=1, starts=None)

    def validate(self) -> None:
        """Check the values, which on a CUDA device waits for it.

        Raises:
            ConfigError: offsets fall or leave the indices, a row is not ascending, or an index or
                a head points is out of range.
        """
        counts = self.offsets.diff()
        if int(self.offsets[0]) != 0 or bool((counts < 0).any()):
            raise ConfigError("BlockLists.offsets must start at 0 and never fall")
        nnz = int(self.offsets[-1])
        if nnz > len(self.indices):
            raise ConfigError(
                f"BlockLists.offsets list {nnz} blocks, indices hold {len(self.indices)}"
            )
        listed = self.indices[:nnz].long()
        if nnz and not 0 <= int(listed.min()) <= int(listed.max()) < self.n_k:
            raise ConfigError(
                f"BlockLists.indices must lie in 0..{self.n_k - 1}, "
                f"got {int(listed.min())}..{int(listed.max())}"
            )
        rows = torch.repeat_interleave(torch.arange(len(counts), device=self.device), counts.long())
        if bool(((rows * self.n_k + listed).diff() <= 0).any()):
            raise ConfigError("BlockLists.indices must be ascending and unique in each row")
        if len(self.head_to_list) and not (
            int(self.head_to_list.min()) >= -1 and int(self.head_to_list.max()) < self.n_patterns
        ):
            raise ConfigError(
                f"BlockLists.head_to_list must lie in -1..{self.n_patterns - 1}, "
                f"got {int(self.head_to_list.min())}..{int(self.head_to_list.max())}"
            )


def causal_lists(
    n_q_tokens: int, q_offset: int, block_size: int, n_heads: int, device: torch.device
) -> BlockLists:
    """Lists of all causal blocks, one pattern that every head points at.

    The last few are kept, so that layers share them. Making them does not wait for the device.

    Args:
        n_q_tokens: query rows.
        q_offset: keys before the first query row.
        block_size: tokens in a block.
        n_heads: query heads.
        device: device of the lists.

    Returns:
        The lists. They are not to be changed.
    """
    sizes, stream = (n_q_tokens, q_offset, block_size, n_heads, device), stream_of_tables(device)
    if stream is None:
        return _make_causal_lists(*sizes)
    return _kept_causal_lists(*sizes, stream)


def _make_causal_lists(
    n_q_tokens: int, q_offset: int, block_size: int, n_heads: int, device: torch.device
) -> BlockLists:
    counts = block_diagonals(n_q_tokens, q_offset, block_size, device=device)[1] + 1
    offsets = torch.zeros(len(counts) + 1, dtype=torch.int32, device=device)
    offsets[1:] = counts.cumsum(0)
    total = count_causal_blocks(n_q_tokens, q_offset, block_size)
    places = torch.arange(total, dtype=torch.int32, device=device)
    # Its size is given, or the host would wait for it.
    indices = places - torch.repeat_interleave(offsets[:-1], counts, output_size=total)
    head_to_list = torch.zeros(n_heads, dtype=torch.int32, device=device)
    n_k = count_blocks(q_offset + n_q_tokens, block_size)
    return BlockLists(offsets, indices, head_to_list, len(counts), n_k, block_size)


@lru_cache(maxsize=4)
def _kept_causal_lists(
    n_q_tokens: int,
    q_offset: int,
    block_size: int,
    n_heads: int,
    device: torch.device,
    stream: int,
) -> BlockLists:
    return _make_causal_lists(n_q_tokens, q_offset, block_size, n_heads, device)
