"""Choice of blocks from block maps: smoothing, patterns, distances, coverage and block lists."""

from shareprefill.runtime.ops.block_selection.api import (
    SparseGuard,
    check_guard,
    check_heads,
    covered_mass,
    head_blocks,
    js_distances,
    list_blocks,
    select_blocks,
    smooth_maps,
    sparse_heads,
    vertical_slash_blocks,
)
from shareprefill.runtime.ops.block_selection.weights import LineWeights

__all__ = [
    "LineWeights",
    "SparseGuard",
    "check_guard",
    "check_heads",
    "covered_mass",
    "head_blocks",
    "js_distances",
    "list_blocks",
    "select_blocks",
    "smooth_maps",
    "sparse_heads",
    "vertical_slash_blocks",
]
