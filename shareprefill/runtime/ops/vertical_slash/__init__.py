"""Vertical and slash profile of the last query rows, and the patterns that follow from it."""

from shareprefill.runtime.ops.vertical_slash.api import (
    vertical_slash_patterns,
    vertical_slash_profile,
)

__all__ = ["vertical_slash_patterns", "vertical_slash_profile"]
