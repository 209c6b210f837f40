"""Greedy generation with timings: a prompt's prefill, then one token after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shareprefill.errors import ConfigError, DataError
from shareprefill.models import max_length


@dataclass(frozen=True)
class Generation:
    """A prompt's continuation.

    Attributes:
        text: The generated text, special tokens left out.
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens generated, the end-of-text token among them.
        ttft_s: Seconds from the start of the prefill to the first token.
        decode_tokens_per_s: Tokens a second after the first one; None if there was only one.
        hidden: Last hidden state of the prompt's last token, float32 `[hidden_size]`.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    decode_tokens_per_s: float | None
    hidden: Tensor


def encode_prompt(model: Any, tokenizer: Any, prompt: str) -> Tensor:
    """Token ids of a prompt, int64 `[N]`.

    Raises:
        DataError: the prompt is empty.
        ConfigError: it is longer than the model's maximum.
    """
    if not prompt.strip():
        raise DataError("the prompt is empty: write some text into it")
    ids = torch.tensor(tokenizer(prompt).input_ids, dtype=torch.int64)
    longest = max_length(model)
    if longest is not None and len(ids) > longest:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens, beyond the model's maximum of {longest}; shorten it"
        )
    return ids


def warm_up(model: Any, input_ids: Tensor) -> None:
    """Runs a few tokens, so that one-time start-up work is in nobody's timing."""
    with torch.no_grad():
        model(input_ids=input_ids[None, :16].to(_device(model)), use_cache=False, logits_to_keep=1)


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continues a prompt greedily, under whatever attention the model is set to.

    Args:
        model: A transformers decoder, in eval mode.
        tokenizer: Its tokenizer.
        input_ids: int64 `[N]`.
        max_new_tokens: Tokens at most; the end-of-text token ends it earlier.
        on_text: Called with each new piece of text as it is certain.

    Returns:
        The text and the timings.
    """
    device = _device(model)
    stops = _stop_tokens(model)
    ids = input_ids[None].to(device)
    with _last_hidden(model) as hidden:
        start = time.perf_counter()
        step = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        token = int(step.logits[0, -1].argmax())
        first = time.perf_counter()
    tokens = [token]
    text = _Text(tokenizer, on_text)
    text.add(tokens, stops)
    while token not in stops and len(tokens) < max_new_tokens:
        step = model(
            input_ids=torch.tensor([[token]], device=device),
            past_key_values=step.past_key_values,
            use_cache=True,
        )
        token = int(step.logits[0, -1].argmax())
        tokens.append(token)
        text.add(tokens, stops)
    seconds = time.perf_counter() - first
    return Generation(
        text=text.finish(),
        prompt_tokens=len(input_ids),
        new_tokens=len(tokens),
        ttft_s=first - start,
        decode_tokens_per_s=(len(tokens) - 1) / seconds if len(tokens) > 1 else None,
        hidden=hidden[0],
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, in float64."""
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm()).item()


class _Text:
    """The text of a growing list of tokens; a piece is certain once no later token changes it."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.text, self.told = "", 0

    def add(self, tokens: list[int], stops: set[int]) -> None:
        kept = tokens[:-1] if tokens[-1] in stops else tokens
        self.text = self.tokenizer.decode(kept, skip_special_tokens=True)
        # An unfinished character decodes to the replacement character until its last byte is there.
        if not self.text.endswith("\ufffd"):
            self._tell()

    def finish(self) -> str:
        self._tell()
        return self.text

    def _tell(self) -> None:
        if self.on_text is not None and len(self.text) > self.told:
            self.on_text(self.text[self.told :])
        self.told = len(self.text)


@contextmanager
def _last_hidden(model: Any) -> Iterator[list[Tensor]]:
    """Catches what the output layer reads: the last hidden state of the last token."""
    caught: list[Tensor] = []

    def hook(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append(inputs[0][0, -1].float().cpu())

    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield caught
    finally:
        handle.remove()


def _stop_tokens(model: Any) -> set[int]:
    configured = model.generation_config.eos_token_id
    if configured is None:
        return set()
    return {configured} if isinstance(configured, int) else set(configured)


def _device(model: Any) -> torch.device:
    return model.get_input_embeddings().weight.device
