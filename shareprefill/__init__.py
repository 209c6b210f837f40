"""Shared sparse attention patterns for the prefill of long prompts.

Importing the package has no effects and loads neither torch nor transformers:
`share_prefill` is resolved on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shareprefill.runtime.session import share_prefill as share_prefill

__version__ = "0.1.0"
__all__ = ["__version__", "share_prefill"]


def __getattr__(name: str) -> Any:
    if name == "share_prefill":
        from shareprefill.runtime.session import share_prefill

        return share_prefill
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
