"""What tests of operators need: no call of one test is known to the next."""

from __future__ import annotations

from importlib import import_module

import pytest

OPERATORS = ("block_selection", "block_sparse_attention", "pooled_attention", "vertical_slash")


@pytest.fixture(autouse=True)
def unprepared() -> None:
    """Calls are prepared anew, by the constants that a test has set."""
    for name in OPERATORS:
        import_module(f"shareprefill.runtime.ops.{name}.api")._calls.clear()
