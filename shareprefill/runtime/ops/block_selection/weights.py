"""What the lines through a block count in its smoothed mass."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from typing import Self

from shareprefill.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LineWeights:
    """Weights of a block's own mass and of means over the lines of a map that it lies on.

    Attributes:
        itself: of the block.
        vertical1: of the blocks one row before and after on the same key block.
        diagonal1: of those one row before and after on the same block diagonal.
        vertical2: of those two rows before and after on the same key block.
        diagonal2: of those two rows before and after on the same block diagonal.
        column: of all causal blocks of its key block.
        diagonal: of all causal blocks of its block diagonal.

    Raises:
        ConfigError: a weight is negative or not finite.
    """

    itself: float
    vertical1: float = 0.0
    diagonal1: float = 0.0
    vertical2: float = 0.0
    diagonal2: float = 0.0
    column: float = 0.0
    diagonal: float = 0.0

    def __post_init__(self) -> None:
        if not all(0.0 <= weight < math.inf for weight in astuple(self)):
            raise ConfigError(f"weights must be finite and at least 0, got {self}")

    @classmethod
    def of(cls, weights: Iterable[float]) -> Self:
        """Weights in the order of the fields."""
        names = (field.name for field in fields(cls))
        return cls(**dict(zip(names, weights, strict=True)))
