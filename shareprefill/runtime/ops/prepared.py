"""What calls alike have in common, made once."""

from __future__ import annotations

from typing import Any, TypeVar

V = TypeVar("V")

# Kinds of calls that an operator keeps. A model has a few at every length.
_MOST = 4096


class Prepared(dict[Any, V]):
    """What was prepared for calls, by all that it depends on (`inputs.facts`, and options)."""

    def keep(self, key: Any, value: V) -> V:
        """Keeps and returns what was prepared for one kind of calls."""
        if len(self) >= _MOST:
            self.clear()
        self[key] = value
        return value
