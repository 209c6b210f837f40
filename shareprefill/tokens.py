"""Prompts as token ids: the one place where text is tokenised to be continued."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shareprefill.errors import DataError
from shareprefill.files import printable

Messages = list[dict[str, Any]]
"""A conversation: objects with the texts `role` and `content`, and what else templates read."""

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


def without_end(tokenizer: Any, text: str, ids: list[int]) -> list[int]:
    """Token ids that somebody else has made of a text, without what the tokenizer adds after it.

    Args:
        tokenizer: What made them, with special tokens or without.
        text: Of which they are.
        ids: All of them, or the last ones.
    """
    whole, kept = tokenizer(text).input_ids, encode(tokenizer, text)
    added = len(whole) - len(kept) if len(kept) else 0
    # An end that the text spells stays: ids without special tokens have no other.
    if not added or ids[-added:] != whole[-added:] or ids != whole[-len(ids) :]:
        return ids
    return ids[: len(ids) - added]


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


def conversation(values: Mapping[str, Any], place: str) -> Messages:
    """The conversation of an object with the field `messages`.

    Args:
        values: The object.
        place: Where it stands, for messages.

    Raises:
        DataError: it has tools, which would be left out, or `messages` is no conversation.
    """
    if values.get("tools"):
        raise DataError(
            f"{place} has tools, which are not handed to the chat template: write the prompt as "
            "the template does, into the field text"
        )
    return as_messages(values["messages"], place)


def as_messages(values: Any, place: str) -> Messages:
    """A conversation as it stands in a file, checked.

    Args:
        values: Messages with the fields `role` and `content`, which is a text, or a list of parts
            of the type `text`; beside `tool_calls` there may be none. Other fields are kept, as
            chat templates read them.
        place: Where it stands, for messages.

    Raises:
        DataError: it is no such thing.
    """
    if not isinstance(values, list) or not values:
        raise DataError(f"{place}: messages must be a list of objects with role and content")
    found = []
    for number, each in enumerate(values):
        role, content = (
            (each.get("role"), each.get("content")) if isinstance(each, Mapping) else (None, None)
        )
        if content is None and isinstance(each, Mapping) and each.get("tool_calls"):
            content = ""
        if isinstance(content, list) and all(
            isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
        ):
            content = "".join(part["text"] for part in content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(
                f"{place}: message {number} must be an object with the texts role and content"
            )
        others = {name: value for name, value in each.items() if value is not None}
        found.append({**others, "role": role, "content": content})
    return found


def encode_chat(tokenizer: Any, messages: Messages) -> Tensor:
    """Token ids of a conversation by the model's chat template, int64 `[N]`.

    Where the last message is not the assistant's, its turn is begun.

    Raises:
        DataError: the tokenizer has no chat template, or that refuses the conversation.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the model's tokenizer has no chat template: name an instruction-tuned model, or give "
            "plain text"
        )
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=messages[-1]["role"] != "assistant"
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(
            f"the model's chat template refuses the messages: {printable(error)}"
        ) from error
    # The template writes the special tokens, BOS among them.
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def encode_either(tokenizer: Any, prompt: str | Messages) -> Tensor:
    """`encode` of a text, `encode_chat` of a conversation."""
    if isinstance(prompt, str):
        return encode(tokenizer, prompt)
    return encode_chat(tokenizer, prompt)


def _added(tokenizer: Any) -> tuple[int, list[int]]:
    """How many tokens a tokenizer adds before a text, and which ones after it."""
    for probe in _PROBES:
        ids = tokenizer(probe).input_ids
        bare = tokenizer(probe, add_special_tokens=False).input_ids
        for before in range(len(ids) - len(bare) + 1):
            if bare and ids[before : before + len(bare)] == bare:
                return before, ids[before + len(bare) :]
    return 0, []
