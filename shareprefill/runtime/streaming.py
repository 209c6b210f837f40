"""The text of tokens as they come, at a cost that does not grow with their number."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from typing import Any

# Tokens that are decoded again before new ones: what a token becomes may depend on those before it
# (spaces at the beginning of a text, parts of words).
_CONTEXT = 8
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_UNFINISHED = "\ufffd"


class TextStream:
    """Tells the text of a growing list of tokens piece by piece.

    All pieces together are `decode` of all tokens. A piece is told once no later token changes it:
    the bytes of an unfinished character are held back, and so is a run of byte tokens
    (SentencePiece's), which one wrong byte turns into replacement characters from its beginning on.

    Args:
        tokenizer: Decodes the tokens; special ones are left out.
        on_text: Called with each piece; None tells nobody.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._tokens: list[int] = []
        self._told: list[str] = []
        self._context = 0  # where decoding begins
        self._done = 0  # tokens whose text was told
        self._retry = 0  # number of tokens from which on it is worth to decode again

    def add(self, token: int) -> None:
        """Takes the next token."""
        self._tokens.append(token)
        if self._on_text is None or token in self._silent or len(self._tokens) < self._retry:
            return
        before = self.decode(self._tokens[self._context : self._done])
        text = self.decode(self._tokens[self._context :])
        if text.endswith(_UNFINISHED) or not text.startswith(before):
            # Four bytes make a character. Where more do not, they are no text: look less often.
            held = len(self._tokens) - self._done
            self._retry = len(self._tokens) + (1 if held < _CONTEXT else held)
            return
        self._tell(text[len(before) :])
        self._done = len(self._tokens)
        self._context = max(self._context, self._first_of_context())

    def finish(self) -> str:
        """Tells what is left, and returns the text of all tokens."""
        whole, told = self.decode(self._tokens), "".join(self._told)
        # Where a tokenizer's decoder changes what stands far behind, the text is told again.
        self._tell(whole[len(told) :] if whole.startswith(told) else "\n" + whole)
        return whole

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, as it is: "cleaning up" spaces would change what is quoted."""
        return self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _first_of_context(self) -> int:
        """The last tokens with a text of their own, and what is between and behind them."""
        start, left = self._done, _CONTEXT
        while start > self._context and left:
            start -= 1
            left -= self._tokens[start] not in self._silent
        return start

    @cached_property
    def _silent(self) -> set[int]:
        """Tokens that settle nothing: special ones, and single bytes."""
        vocabulary = self._tokenizer.get_vocab().items()
        single_bytes = {number for token, number in vocabulary if _BYTE.fullmatch(token)}
        return single_bytes | set(self._tokenizer.all_special_ids)

    def _tell(self, piece: str) -> None:
        if self._on_text is not None and piece:
            self._on_text(piece)
            self._told.append(piece)
