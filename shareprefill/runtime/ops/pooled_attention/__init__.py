"""Attention of chosen query rows together with its exact block means."""

from shareprefill.runtime.ops.pooled_attention.api import pooled_attention
from shareprefill.runtime.ops.pooled_attention.rows import sample_rows

__all__ = ["pooled_attention", "sample_rows"]
