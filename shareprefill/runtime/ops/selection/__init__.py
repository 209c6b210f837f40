"""Choice of blocks from block maps: patterns, distances, coverage and block lists."""

from shareprefill.runtime.ops.selection.api import (
    covered_mass,
    js_distances,
    list_blocks,
    select_blocks,
    vertical_slash_blocks,
)

__all__ = [
    "covered_mass",
    "js_distances",
    "list_blocks",
    "select_blocks",
    "vertical_slash_blocks",
]
