"""What was measured of each prompt, kept one a line, so that a killed evaluation goes on."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shareprefill.errors import DataError

OUTCOMES = "outcomes.jsonl"


@dataclass(frozen=True)
class Outcome:
    """What was measured of one prompt under one variant.

    Attributes:
        score: The benchmark's score; for perplexity the mean negative log likelihood, in nats.
        text: The completion; empty for perplexity.
        tokens: Tokens of the prompt.
        ttft_s: Seconds to the first token, median of its repetitions.
        dense_ttft_s: The same of dense attention, in turns with it.
        density: Computed blocks over causal blocks.
        selection_work: Share of dense attention's work.
        heads: Heads by policy taken.
        recalls: By layer and head, in order; empty unless measured.
        layer_errors: Relative errors of the attention outputs; empty unless measured.
        hidden_error: Relative error of the last hidden state.
        kl: Mean KL divergence from dense attention's predictions over all positions, in nats; None
            unless measured.
        top1_agreement: Share of the positions whose most likely next token is dense attention's.
        bins: Mean negative log likelihood by position; empty for questions.
    """

    score: float
    text: str
    tokens: int
    ttft_s: float
    dense_ttft_s: float
    density: float = 1.0
    selection_work: float = 0.0
    heads: dict[str, int] | None = None
    recalls: tuple[float, ...] = ()
    layer_errors: tuple[float, ...] = ()
    hidden_error: float = 0.0
    kl: float | None = None
    top1_agreement: float | None = None
    bins: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Outcome:
        """The inverse of `to_dict`."""
        lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        return cls(**{**values, **lists})


class OutcomeCache:
    """Outcomes by a key that names all that they depend on.

    Args:
        folder: Where the outcomes are kept; None: in memory. The caller holds the folder's lock.
        fresh: Forget what is there.

    Raises:
        DataError: the file cannot be read or written.
    """

    def __init__(self, folder: Path | None, *, fresh: bool = False) -> None:
        self._found: dict[str, Outcome] = {}
        self._path = None if folder is None else folder / OUTCOMES
        if self._path is not None:
            if fresh:
                self._path.unlink(missing_ok=True)
            elif self._path.exists():
                self._read(self._path)

    def get(self, facts: dict[str, Any]) -> Outcome | None:
        """The outcome of these facts, if it is there."""
        return self._found.get(key_of(facts))

    def add(self, facts: dict[str, Any], outcome: Outcome) -> None:
        """Keeps an outcome; it is on the disk when this returns.

        Raises:
            DataError: the file cannot be written.
        """
        key = key_of(facts)
        self._found[key] = outcome
        if self._path is None:
            return
        line = json.dumps({"key": key, **facts, "outcome": outcome.to_dict()}, allow_nan=False)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(f"cannot write {self._path}: {error.strerror}") from error

    def _read(self, path: Path) -> None:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        # A killed run may have left part of a line, and a later one must not go on within it.
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                values = json.loads(line)
                self._found[values["key"]] = Outcome.from_dict(values["outcome"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"line {number} of {path} is damaged ({error}): use --fresh to start anew"
                ) from error


def key_of(facts: dict[str, Any]) -> str:
    """The name of an outcome: the same for equal facts."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
