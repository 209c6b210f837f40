"""Attention of chosen query rows together with its exact block means."""

from shareprefill.runtime.ops.pooled_attention.api import pooled_attention, table_height, two_maps
from shareprefill.runtime.ops.pooled_attention.rows import row_table, sample_rows

__all__ = ["pooled_attention", "row_table", "sample_rows", "table_height", "two_maps"]
