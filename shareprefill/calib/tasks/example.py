"""A prompt with its answer, and the drafts that prompts of any size are rendered from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Example:
    """One prompt and what a right completion holds.

    Attributes:
        task: Name of the task.
        prompt: Text that ends where the answer begins.
        answer: Canonical text that directly continues the prompt; empty for `text`.
        answers: Every string that a right completion must hold, in order; empty for `text`.
    """

    task: str
    prompt: str
    answer: str
    answers: tuple[str, ...]


class Draft(Protocol):
    """The random choices of one example, made before its size is known."""

    smallest: int
    """Fewest items (pairs, words, sentences, numbers, functions) of a sound prompt."""

    def render(self, size: int) -> Example:
        """Builds the example with `size` items; a larger size keeps the items of a smaller."""
        ...
