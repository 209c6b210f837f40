"""Examples of a requested token length, sized by counting tokens of the whole prompt."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from shareprefill.calib.tasks.example import Draft, Example
from shareprefill.calib.tasks.haystack import TextDraft
from shareprefill.calib.tasks.needles import (
    MultiKeyNeedleDraft,
    MultiQueryNeedleDraft,
    MultiValueNeedleDraft,
    SingleNeedleDraft,
)
from shareprefill.calib.tasks.reasoning import (
    CodeRunDraft,
    MathFindDraft,
    VariableTrackingDraft,
)
from shareprefill.calib.tasks.retrieval import (
    KeyValueDraft,
    NeedleDraft,
    NumberDraft,
    PasskeyDraft,
)
from shareprefill.errors import ConfigError, DataError
from shareprefill.tokens import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DRAFTS: dict[str, Callable[[random.Random, int], Draft]] = {
    "retr_kv": KeyValueDraft,
    "retr_passkey": PasskeyDraft,
    "retr_number": NumberDraft,
    "math_find": MathFindDraft,
    "code_run": CodeRunDraft,
    "variable_tracking": VariableTrackingDraft,
    "needle": NeedleDraft,
    "niah_single": SingleNeedleDraft,
    "niah_multikey": MultiKeyNeedleDraft,
    "niah_multivalue": MultiValueNeedleDraft,
    "niah_multiquery": MultiQueryNeedleDraft,
    "text": TextDraft,
}

NIAH_TASKS: tuple[str, ...] = tuple(name for name in _DRAFTS if name.startswith("niah_"))
"""RULER's needle family, which is for evaluation: no data set `mixture` holds them."""

TASKS: tuple[str, ...] = tuple(name for name in _DRAFTS if name not in (*NIAH_TASKS, "text"))
"""The tasks of the data set `mixture` that have an answer; `generate` also knows `text`."""

_PROBE = 16
"""Items added to the smallest prompt to learn how many tokens an item takes."""


def generate(task: str, tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> Example:
    """Generates the example of a task that fills `length` tokens best without exceeding them.

    The same arguments give the same example in every process.

    Args:
        task: One of `TASKS` or `NIAH_TASKS`, or `text`.
        tokenizer: Tokenizer of the model; the special tokens it adds by itself are counted.
        length: Most tokens of the prompt, as `tokens.encode` counts them.
        seed: Picks the example.

    Raises:
        ConfigError: The task is unknown.
        DataError: `length` tokens cannot hold the smallest prompt of the task.
    """
    if task not in _DRAFTS:
        raise ConfigError(f"task must be one of {', '.join(_DRAFTS)}; got {task!r}")
    draft = _DRAFTS[task](random.Random(f"{task}-{seed}"), length)

    def count(size: int) -> int:
        return len(encode(tokenizer, draft.render(size).prompt))

    smallest = count(draft.smallest)
    if smallest > length:
        raise DataError(
            f"a {task} prompt needs at least {smallest} tokens under this tokenizer (seed {seed}); "
            f"got length {length}: ask for a longer prompt"
        )
    return draft.render(_largest_size(count, draft.smallest, smallest, length))


def _largest_size(count: Callable[[int], int], low: int, low_tokens: int, length: int) -> int:
    """Largest size whose prompt has at most `length` tokens, given that size `low` fits."""
    high, high_tokens = low + _PROBE, count(low + _PROBE)
    while high_tokens <= length:
        # One word more may merge two tokens into one, so a small step may show no growth.
        slope = max(high_tokens - low_tokens, 1) / (high - low)
        low, low_tokens = high, high_tokens
        # A little beyond the estimate, so that it usually is an upper bound.
        high = low + 1 + int(1.02 * (length - low_tokens) / slope)
        high_tokens = count(high)
    interpolate = True
    while high - low > 1:
        share = (length - low_tokens) / (high_tokens - low_tokens) if interpolate else 0.5
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        tokens = count(middle)
        if tokens <= length:
            low, low_tokens = middle, tokens
        else:
            high, high_tokens = middle, tokens
        interpolate = not interpolate
    return low
