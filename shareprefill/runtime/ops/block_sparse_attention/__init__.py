"""Causal attention over listed key blocks."""

from shareprefill.runtime.ops.block_sparse_attention.api import block_sparse_attention

__all__ = ["block_sparse_attention"]
