"""Prompts as token ids: the one place where text is tokenised to be continued."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shareprefill.errors import DataError

# Texts of which nearly every tokenizer leaves a token.
_PROBES = ("a", "1", ".", "the")


def encode(tokenizer: Any, text: str) -> Tensor:
    """Token ids of a text that is to be continued, int64 `[N]`.

    What the tokenizer adds before the text (BOS) is kept. What it adds after the text (EOS, SEP) is
    dropped: a model that reads the end of a text there does not continue it. Special tokens that
    the text itself spells are kept.

    Args:
        tokenizer: The model's tokenizer.
        text: Taken as it is (no chat template).

    Returns:
        The ids; none where the text leaves no token.
    """
    ids = tokenizer(text).input_ids
    before, after = _added(tokenizer)
    if after or len(ids) <= before:
        bare = len(tokenizer(text, add_special_tokens=False).input_ids)
        if bare == 0:
            return torch.empty(0, dtype=torch.int64, device="cpu")
        # A tokenizer may leave its EOS out where the text spells one.
        if len(ids) - bare >= before + len(after) and ids[len(ids) - len(after) :] == after:
            ids = ids[: len(ids) - len(after)]
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def encode_some(tokenizer: Any, text: str) -> Tensor:
    """The same as `encode`, for a text that must leave a token.

    Raises:
        DataError: the text is empty, or the tokenizer leaves no token of it.
    """
    if not text.strip():
        raise DataError("the prompt is empty: write some text into it")
    ids = encode(tokenizer, text)
    if len(ids) == 0:
        raise DataError(
            "the model's tokenizer leaves no token of the prompt: write text that it knows"
        )
    return ids


def _added(tokenizer: Any) -> tuple[int, list[int]]:
    """How many tokens a tokenizer adds before a text, and which ones after it."""
    for probe in _PROBES:
        ids = tokenizer(probe).input_ids
        bare = tokenizer(probe, add_special_tokens=False).input_ids
        for before in range(len(ids) - len(bare) + 1):
            if bare and ids[before : before + len(bare)] == bare:
                return before, ids[before + len(bare) :]
    return 0, []
