"""Keys or values that lie in an engine's pages, and what kernels need to find them.

An operator takes those of one sequence in place of a tensor `[G, N, D]`. An implementation that
finds tokens through the table of pages reads them where they are; for the others they are gathered
once. Operators of decode steps take those of several sequences in place of `[B, G, N, D]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch

from shareprefill.errors import ConfigError, UnsupportedError
from shareprefill.runtime.ops.blocks import count_blocks

# Tokens of the smallest page that kernels of decode steps, and those for Hopper, read in place.
LEAST_PAGE = 16


class _Pages:
    """What lies in pages `[pages, G, page size, D]`."""

    pool: torch.Tensor

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.pool.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Of the tokens."""
        return self.pool.dtype

    @property
    def device(self) -> torch.device:
        """Of the tokens."""
        return self.pool.device


@dataclass(frozen=True, eq=False)
class PagedTokens(_Pages):
    """Keys or values of one sequence, as `[G, N, D]`.

    Attributes:
        pool: `[pages, G, page size, D]` in any strides: pages of many sequences. Whatever is of
            another sequence, or behind this one's last token, may hold anything.
        table: int32 or int64 `[pages of the sequence]` or more, in the order of its tokens. On CUDA
            its numbers are not checked.
        n_tokens: Tokens N.
    """

    pool: torch.Tensor
    table: torch.Tensor
    n_tokens: int

    def __post_init__(self) -> None:
        """Checks shapes.

        Raises:
            ConfigError: they do not belong together.
        """
        if self.pool.ndim != 4 or self.table.ndim != 1:
            raise ConfigError(
                "pages must be [pages, KV heads, page size, head_dim], with a table [pages of the "
                f"sequence], got {tuple(self.pool.shape)} and {tuple(self.table.shape)}"
            )
        if self.table.dtype not in (torch.int32, torch.int64):
            raise ConfigError(f"a table of pages must be int32 or int64, got {self.table.dtype}")
        if self.table.device != self.pool.device:
            raise ConfigError(
                f"pages are on {self.pool.device}, their table is on {self.table.device}"
            )
        if not 1 <= self.n_tokens <= len(self.table) * self.page_size:
            raise ConfigError(
                f"{len(self.table)} pages of {self.page_size} tokens do not hold "
                f"{self.n_tokens} tokens"
            )

    def __len__(self) -> int:
        """KV heads."""
        return self.pool.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(G, N, D)`."""
        return self.pool.shape[1], self.n_tokens, self.pool.shape[3]

    @property
    def ndim(self) -> int:
        """Dims of the tokens."""
        return 3

    def stride(self, dim: int) -> int:
        """Steps between heads, between tokens of a page, and between numbers of a token."""
        return self.pool.stride(dim + 1 if dim >= 0 else dim)

    def element_size(self) -> int:
        """Bytes of a number."""
        return self.pool.element_size()

    @cached_property
    def gathered(self) -> torch.Tensor:
        """The tokens in one tensor `[G, N, D]`; copied at the first call."""
        pages = self.table[: count_blocks(self.n_tokens, self.page_size)].long()
        pool, (groups, _, dim) = self.pool, self.shape
        # In the order of a page: another one takes three times as long.
        if pool.stride(1) < pool.stride(2):
            rows = pool.new_empty((len(pages), self.page_size, groups, dim))
            torch.index_select(pool.transpose(1, 2), 0, pages, out=rows)
            rows = rows.view(-1, groups, dim).transpose(0, 1)
        else:
            rows = pool.new_empty((groups, len(pages), self.page_size, dim))
            torch.index_select(pool.transpose(0, 1), 1, pages, out=rows)
            rows = rows.view(groups, -1, dim)
        return rows[:, : self.n_tokens]

    def shares_pages(self, other: PagedTokens) -> bool:
        """Whether tokens of the other one are found through the same table."""
        table, theirs = self.table, other.table
        return self.page_size == other.page_size and (
            table is theirs
            or (
                (table.data_ptr(), table.stride(), table.dtype)
                == (theirs.data_ptr(), theirs.stride(), theirs.dtype)
            )
        )


Tokens: TypeAlias = torch.Tensor | PagedTokens


@dataclass(frozen=True, eq=False)
class PagedBatch(_Pages):
    """Keys, values or codes of several sequences, as `[B, G, N, D]`.

    Attributes:
        pool: `[pages, G, page size, D]` in any strides: pages of these sequences and others.
        tables: int32 `[B, pages of a sequence]`, last dim contiguous, in the order of its tokens.
            Those behind a sequence's last token may be any. On CUDA numbers are not checked.
        n_tokens: N: what the longest sequence may have.
    """

    pool: torch.Tensor
    tables: torch.Tensor
    n_tokens: int

    def __post_init__(self) -> None:
        """Checks shapes.

        Raises:
            ConfigError: they do not belong together.
        """
        pool, tables = self.pool, self.tables
        if (
            pool.ndim != 4
            or tables.ndim != 2
            or tables.dtype != torch.int32
            or tables.device != pool.device
            or tables.stride(1) != 1
        ):
            raise ConfigError(
                "pages must be [pages, KV heads, page size, dims], with int32 tables [sequences, "
                f"pages of a sequence] of contiguous rows there, got {tuple(pool.shape)} on "
                f"{pool.device} and {tables.dtype} {tuple(tables.shape)} in {tables.stride()} on "
                f"{tables.device}"
            )
        if not 1 <= self.n_tokens <= tables.shape[1] * self.page_size:
            raise ConfigError(
                f"{tables.shape[1]} pages of {self.page_size} tokens do not hold "
                f"{self.n_tokens} tokens"
            )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(B, G, N, D)`."""
        return len(self.tables), self.pool.shape[1], self.n_tokens, self.pool.shape[3]

    @property
    def ndim(self) -> int:
        """Dims of the tokens."""
        return 4

    def gathered(self) -> torch.Tensor:
        """The tokens in one new tensor `[B, G, N, D]`, anything behind a sequence's last one."""
        pages = self.tables[:, : count_blocks(self.n_tokens, self.page_size)].long()
        rows = self.pool[pages.clamp(0, len(self.pool) - 1)]  # [B, m, G, page size, D]
        return rows.transpose(1, 2).flatten(2, 3)[:, :, : self.n_tokens]

    def lies_with(self, other: PagedBatch) -> bool:
        """Whether tokens of the other one are found through the same tables."""
        mine, theirs = self.tables, other.tables
        return (self.page_size, self.n_tokens) == (other.page_size, other.n_tokens) and (
            (mine.data_ptr(), mine.stride(), mine.shape)
            == (theirs.data_ptr(), theirs.stride(), theirs.shape)
        )


Cached: TypeAlias = torch.Tensor | PagedBatch


def lie_together(tensors: Sequence[Cached]) -> bool:
    """Whether all are tensors, or all lie in pages that the same tables name."""
    first, *others = tensors
    if isinstance(first, PagedBatch):
        return all(isinstance(t, PagedBatch) and first.lies_with(t) for t in others)
    return not any(isinstance(t, PagedBatch) for t in others)


def batch_gathered(cached: Cached) -> torch.Tensor:
    """The tokens in one tensor `[B, G, N, D]`."""
    return cached.gathered() if isinstance(cached, PagedBatch) else cached


def kernel_pages(cached: Cached) -> tuple[torch.Tensor, torch.Tensor, int, tuple[int, ...]]:
    """How the Triton kernels find tokens of several sequences.

    Returns:
        The tensor that a pointer starts at; the tables, for a tensor any one, which kernels do not
        touch; the tokens of a page, 0 for a tensor, which is one page for each sequence; and the
        steps between rows of the tables, pages, heads and tokens.

    Raises:
        UnsupportedError: the kernels do not read such pages.
    """
    if not isinstance(cached, PagedBatch):
        return cached, cached, 0, (0, *cached.stride()[:3])
    pool = cached.pool
    check_kernel_pages(pool)
    return pool, cached.tables, cached.page_size, (cached.tables.stride(0), *pool.stride()[:3])


def check_kernel_pages(pool: torch.Tensor) -> None:
    """Refuses pages that the Triton kernels of decode steps do not read where they are.

    Args:
        pool: `[pages, G, page size, D]`.

    Raises:
        UnsupportedError: says which they read.
    """
    size = pool.shape[2]
    if size < LEAST_PAGE or size & (size - 1) or pool.stride(3) != 1:
        raise UnsupportedError(
            "the Triton kernels of decode steps read pages of a power of two of at least "
            f"{LEAST_PAGE} tokens, whose numbers lie side by side, got {size} tokens in strides "
            f"{pool.stride()}: use another page size, or impl='reference'"
        )


def gathered(tokens: Tokens) -> torch.Tensor:
    """The tokens in one tensor `[G, N, D]`."""
    return tokens.gathered if isinstance(tokens, PagedTokens) else tokens


def page_tokens(tokens: Tokens) -> int:
    """Tokens of a page; 0 for a tensor."""
    return tokens.page_size if isinstance(tokens, PagedTokens) else 0


def memory(tokens: Tokens) -> torch.Tensor:
    """The tensor that a kernel's pointer starts at."""
    return tokens.pool if isinstance(tokens, PagedTokens) else tokens


def page_stride(tokens: Tokens) -> int:
    """Steps between pages; 0 for a tensor."""
    return tokens.pool.stride(0) if isinstance(tokens, PagedTokens) else 0


def page_table(tokens: Tokens) -> torch.Tensor:
    """The contiguous table of pages; for a tensor any tensor, which kernels do not touch."""
    return tokens.table.contiguous() if isinstance(tokens, PagedTokens) else tokens
