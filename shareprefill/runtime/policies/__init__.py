"""How a head's blocks are chosen: one policy a file, all behind one interface (`base`).

A policy `some-name` is the class `SomeName` of `some_name.py`, and stands in the list of
`shareprefill.config`. Attention sinks take the same share of all masses of a row: they change no
choice, and no policy looks at them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shareprefill.config import SELECTION_POLICIES

if TYPE_CHECKING:
    from shareprefill.runtime.policies.base import SelectionPolicy

__all__ = ["SELECTION_POLICIES", "make_policy"]


def make_policy(name: str, **parameters: Any) -> SelectionPolicy:
    """Makes a policy.

    Args:
        name: One of `SELECTION_POLICIES`.
        parameters: Of the policy.
    """
    module = import_module(f"{__name__}.{name.replace('-', '_')}")
    return getattr(module, name.title().replace("-", ""))(**parameters)
