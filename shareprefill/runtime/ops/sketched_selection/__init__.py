"""Blocks that a decode step reads, chosen by a sketch of the keys."""

from shareprefill.runtime.ops.sketched_selection.api import select_blocks, write_codes
from shareprefill.runtime.ops.sketched_selection.reference import MOST_BLOCKS
from shareprefill.runtime.ops.sketched_selection.sketch import (
    Basis,
    Moments,
    make_basis,
    sketch_keys,
)

__all__ = [
    "MOST_BLOCKS",
    "Basis",
    "Moments",
    "make_basis",
    "select_blocks",
    "sketch_keys",
    "write_codes",
]
