"""Inputs of block-sparse attention, and its output with the log-sum-exp of its rows."""

from __future__ import annotations

from typing import Any

import torch

from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
from shareprefill.runtime.ops.blocks import BlockLists, count_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Query heads, KV heads, query rows, keys, head dim and dtype that Hopper kernels are tested on.
HOPPER_SIZES = (
    (8, 2, 1, 1, 128, torch.bfloat16),
    (8, 2, 63, 63, 128, torch.bfloat16),
    (8, 8, 129, 700, 128, torch.bfloat16),
    (6, 2, 1111, 1300, 128, torch.bfloat16),
    (32, 8, 2000, 5000, 128, torch.bfloat16),
    (5, 1, 128, 128, 64, torch.float16),
    (6, 3, 777, 1001, 64, torch.float16),
    (4, 2, 300, 4321, 96, torch.bfloat16),
)


def random_inputs(
    heads: int, groups: int, n_q: int, n_k: int, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries `[heads, n_q, dim]`, keys and values `[groups, n_k, dim]`."""
    shapes = ((heads, n_q, dim), (groups, n_k, dim), (groups, n_k, dim))
    query, key, value = (torch.randn(shape, device=DEVICE, dtype=dtype) for shape in shapes)
    return query, key, value


def random_lists(heads: int, n_q: int, n_k: int, density: float, patterns: int = 3) -> BlockLists:
    """Lists with blocks past the diagonal, empty rows, shared patterns and left-out heads."""
    bitmap = torch.rand(patterns, count_blocks(n_q, 128), count_blocks(n_k, 128)) < density
    pattern = torch.randint(-1, patterns, (heads,))
    pattern[0] = 0
    return BlockLists.from_bitmap(bitmap.to(DEVICE), pattern.to(DEVICE), 128)


def attend_with_lse(
    query: torch.Tensor, *inputs: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp; arguments as in `block_sparse_attention`."""
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    return block_sparse_attention(query, *inputs, lse=lse, **options), lse
