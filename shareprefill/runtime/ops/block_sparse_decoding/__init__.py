"""Attention of decode steps over listed key blocks."""

from shareprefill.runtime.ops.block_sparse_decoding.api import block_sparse_decoding

__all__ = ["block_sparse_decoding"]
