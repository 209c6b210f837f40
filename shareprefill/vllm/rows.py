"""Which rows of an engine's step are computed sparsely, and how the others fall into runs.

A step holds the tokens of several requests one after the other. Nothing here knows vLLM: the host's
own copies of offsets and lengths come in, slices go out, and no device is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Prefill:
    """A row that is computed sparsely: the last tokens of one request.

    Attributes:
        row: Index among the step's requests.
        tokens: The row's place among the step's tokens.
        n_key: Keys of the request so far, these tokens' own among them.
    """

    row: int
    tokens: slice
    n_key: int

    @property
    def n_query(self) -> int:
        """Query rows."""
        return self.tokens.stop - self.tokens.start

    @property
    def is_whole(self) -> bool:
        """Whether the row's own keys are all there are: nothing lies in the cache alone."""
        return self.n_query == self.n_key


@dataclass(frozen=True)
class Run:
    """Rows that follow each other, for the inner backend in one call.

    Attributes:
        rows: Among the step's requests.
        tokens: Among the step's tokens.
    """

    rows: slice
    tokens: slice


@dataclass(frozen=True)
class Division:
    """A step, divided.

    Attributes:
        prefills: Rows of several tokens that are computed sparsely, ascending.
        decodes: Rows of one token that are, by their indices among the step's requests, ascending.
        rest: The other rows, ascending.
    """

    prefills: tuple[Prefill, ...]
    decodes: tuple[int, ...]
    rest: tuple[Run, ...]


def divide(
    starts: Sequence[int], lengths: Sequence[int], is_sparse: Callable[[int, int, int], bool]
) -> Division:
    """Divides a step's rows.

    Args:
        starts: First token of every row, and the end: one more than there are rows.
        lengths: Keys of every row.
        is_sparse: Whether a row (its index, query rows, keys) is computed sparsely.

    Returns:
        Every token of the step is in one prefill, one decode or one run.
    """
    sparse = [
        Prefill(row, slice(starts[row], starts[row + 1]), length)
        for row, length in enumerate(lengths)
        if is_sparse(row, starts[row + 1] - starts[row], length)
    ]
    if not sparse:
        return Division((), (), (Run(slice(0, len(lengths)), slice(starts[0], starts[-1])),))
    edges = [-1, *(found.row for found in sparse), len(lengths)]
    return Division(
        tuple(found for found in sparse if found.n_query > 1),
        tuple(found.row for found in sparse if found.n_query == 1),
        tuple(_runs(edges, starts)),
    )


def _runs(edges: Sequence[int], starts: Sequence[int]) -> Iterator[Run]:
    """The rows between neighbouring edges, where they hold tokens."""
    for before, after in pairwise(edges):
        first = before + 1
        if starts[after] > starts[first]:
            yield Run(slice(first, after), slice(starts[first], starts[after]))
