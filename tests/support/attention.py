"""Block-sparse attention with the log-sum-exp of its rows."""

from __future__ import annotations

from typing import Any

import torch

from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention


def attend_with_lse(
    query: torch.Tensor, *inputs: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp; arguments as in `block_sparse_attention`."""
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    return block_sparse_attention(query, *inputs, lse=lse, **options), lse
