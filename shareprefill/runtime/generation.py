"""Greedy generation with timings: a prompt's prefill, then one token after the other.

A prefill whose activations would not fit into memory runs in chunks by itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shareprefill.errors import ConfigError, DataError, not_finite
from shareprefill.models import geometry, max_length, position_table
from shareprefill.runtime.interface import attached, dense_attention, is_attached
from shareprefill.runtime.streaming import TextStream
from shareprefill.tokens import Messages, encode_chat, encode_some

# Tokens that a chunk is a multiple of.
_CHUNK = 2048


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
        tokens: The tokens generated.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    decode_tokens_per_s: float | None
    hidden: Tensor
    tokens: tuple[int, ...]


def encode_prompt(model: Any, tokenizer: Any, prompt: str | Messages) -> Tensor:
    """Token ids of a prompt, int64 `[N]`: of a text as it is, of messages by the chat template.

    Raises:
        DataError: the prompt is empty, or no token is left of it.
        ConfigError: it is longer than the model's maximum.
    """
    if isinstance(prompt, str):
        ids = encode_some(tokenizer, prompt)
    else:
        if not any(each["content"].strip() for each in prompt if each["role"] != "system"):
            raise DataError("the conversation is empty: write some text into a message")
        ids = encode_chat(tokenizer, prompt)
    longest = max_length(model)
    if longest is not None and len(ids) > longest:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens, beyond the model's maximum of {longest}; shorten it"
        )
    return ids


def check_positions(model: Any, tokens: int, new_tokens: int) -> None:
    """Checks, before a prefill is paid for, that a model has a position for every token.

    A model with a table of positions (learned ones, or sinusoids made beforehand) ends where its
    table ends; with rotary positions it goes on beyond its maximum.

    Args:
        model: A transformers decoder.
        tokens: Of the prompt.
        new_tokens: To be generated at most; the last one is never read.

    Raises:
        ConfigError: the table is too short, or no new token is asked for.
        DataError: the prompt has no tokens.
    """
    if tokens == 0:
        raise DataError("the prompt has no tokens: write some text into it")
    if new_tokens < 1:
        raise ConfigError(f"max_new_tokens = {new_tokens} is not allowed: it must be at least 1")
    needed = tokens + new_tokens - 1
    table = position_table(model)
    if table is not None and needed > table:
        shorter = [f"shorten the prompt to {table - new_tokens + 1}"] if new_tokens <= table else []
        if tokens <= table:
            shorter.append(f"lower --max-new-tokens (max_new_tokens) to {table - tokens + 1}")
        raise ConfigError(
            f"{tokens} tokens of prompt and {new_tokens} new ones need {needed} positions, and the "
            f"model has a table of {table}: {' or '.join(shorter) or 'shorten both'}"
        )


def warm_up(model: Any, input_ids: Tensor) -> None:
    """Runs a few tokens, so that one-time start-up work is in nobody's timing."""
    with torch.no_grad():
        model(input_ids=input_ids[None, :16].to(_device(model)), use_cache=False, logits_to_keep=1)


@torch.no_grad()
def prefill(model: Any, input_ids: Tensor, chunk: int | None = None) -> Any:
    """Runs a prompt through a model, and keeps the logits of its last token alone.

    Args:
        model: A transformers decoder, in eval mode.
        input_ids: int64 `[N]`.
        chunk: Tokens at a time; 0 for all at once, None for as many as memory allows: what is
            estimated to fit, and half of it, and so on, where it does not.

    Returns:
        The model's output for the last piece; its cache holds the whole prompt.

    Raises:
        ConfigError: the GPU's memory does not suffice, even for the smallest chunks where they may
            be chosen.
    """
    ids = input_ids[None].to(_device(model))
    tokens = len(input_ids)
    size = chunk_tokens(model, tokens) if chunk is None else chunk
    while True:
        try:
            return _prefill_in_pieces(model, ids, size)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition(". ")[0]
        size = -(-min(size or tokens, tokens) // 2)
        if chunk is not None or size < _CHUNK // 2:
            raise ConfigError(
                f"the GPU's memory does not suffice for a prompt of {tokens} tokens ({reason}): "
                "shorten it, "
                + ("lower --prefill-chunk, " if chunk is not None else "")
                + "or use a larger or a further GPU"
            )
        torch.cuda.empty_cache()


def _prefill_in_pieces(model: Any, ids: Tensor, chunk: int) -> Any:
    if not 0 < chunk < ids.shape[1]:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1)
    cache, step = {}, None
    with ExitStack() as stack:
        if not is_attached(model):
            # The model's own function would make a mask of all keys for every row of a piece.
            stack.enter_context(attached(model, dense_attention))
        for piece in ids.split(chunk, dim=1):
            del step
            step = model(input_ids=piece, **cache, use_cache=True, logits_to_keep=1)
            cache = cache_of(step)
    return step


def cache_of(step: Any) -> dict[str, Any]:
    """A forward pass's cache, by the keyword that the next pass takes it under.

    Args:
        step: The model's output; transformers 5.24 has renamed its `past_key_values`.
    """
    name = "cache" if hasattr(step, "cache") else "past_key_values"
    return {name: getattr(step, name)}


def chunk_tokens(model: Any, tokens: int) -> int:
    """Tokens of a prompt that one forward pass may take beside the cache of all of them.

    What a pass needs is estimated from the configuration: the feed-forward layer's activations, a
    few copies of the hidden state and of the queries, and the block maps of the selection.

    Args:
        model: A transformers decoder.
        tokens: Tokens of the prompt.

    Returns:
        A multiple of 2048, or 0 where all tokens fit at once.

    Raises:
        ConfigError: not even the cache of the prompt fits.
    """
    device = _device(model)
    if device.type != "cuda":
        return 0
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    cache, a_token = _bytes_of(model, tokens)
    left = 0.85 * free - cache
    if left > tokens * a_token:
        return 0
    chunk = int(left / a_token) // _CHUNK * _CHUNK
    if chunk < _CHUNK:
        raise ConfigError(
            f"{tokens} tokens need {cache / 2**30:.1f} GiB for keys and values and at least "
            f"{_CHUNK * a_token / 2**30:.1f} GiB for a chunk, {free / 2**30:.1f} GiB are free on "
            f"{device}: shorten the prompt, or use a larger or a further GPU"
        )
    # As many chunks, but of one size.
    pieces = -(-tokens // chunk)
    return -(-tokens // (pieces * _CHUNK)) * _CHUNK


def _bytes_of(model: Any, tokens: int) -> tuple[int, int]:
    """Bytes of a prompt's keys and values, and those that each token of a forward pass takes."""
    config = model.config.get_text_config(decoder=True)
    sizes = geometry(model)
    element = model.get_input_embeddings().weight.element_size()
    keys = 2 * sizes.kv_heads * sizes.head_dim
    # The longest key tensor is copied as it grows.
    cache = (sizes.layers + 1) * keys * element * tokens
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    inner *= getattr(config, "num_experts_per_tok", None) or 1
    heads = sizes.heads * sizes.head_dim
    activations = (3 * inner + 6 * config.hidden_size + 4 * heads + 2 * keys) * element
    # Of every head and pair of blocks of 128 tokens, at the most: a smoothed map in the making is
    # five float32, beside patterns and their list.
    maps = 24 * sizes.heads * tokens // 128**2
    return cache, activations + maps


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    prefill_chunk: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continues a prompt greedily, under whatever attention the model is set to.

    Args:
        model: A transformers decoder, in eval mode.
        tokenizer: Its tokenizer.
        input_ids: int64 `[N]`.
        max_new_tokens: Tokens at most; the end-of-text token ends it earlier.
        prefill_chunk: Tokens of the prompt at a time; 0 for all at once, None for as many as memory
            allows.
        on_text: Called with each new piece of text as it is certain.

    Returns:
        The text and the timings.

    Raises:
        ConfigError: prompt and new tokens need more positions than the model has, or no new token
            is asked for.
        DataError: the prompt has no tokens.
        ModelError: predictions are NaN.
    """
    check_positions(model, len(input_ids), max_new_tokens)
    device = _device(model)
    stops = _stop_tokens(model)
    with _last_hidden(model) as hidden:
        start = time.perf_counter()
        step = prefill(model, input_ids, prefill_chunk)
        token = _first_choice(step.logits[0, -1])
        first = time.perf_counter()
    tokens = [token]
    text = TextStream(tokenizer, on_text)
    if token not in stops:
        text.add(token)
    while token not in stops and len(tokens) < max_new_tokens:
        step = model(
            input_ids=torch.tensor([[token]], device=device),
            **cache_of(step),
            use_cache=True,
        )
        token = _first_choice(step.logits[0, -1])
        tokens.append(token)
        if token not in stops:
            text.add(token)
    seconds = time.perf_counter() - first
    return Generation(
        text=text.finish(),
        prompt_tokens=len(input_ids),
        new_tokens=len(tokens),
        ttft_s=first - start,
        decode_tokens_per_s=(len(tokens) - 1) / seconds if len(tokens) > 1 else None,
        hidden=hidden[-1],
        tokens=tuple(tokens),
    )


def _first_choice(logits: Tensor) -> int:
    """The most likely token, of logits `[vocabulary]`."""
    token = int(logits.argmax())
    # Where there is a NaN, `argmax` takes it.
    if math.isnan(logits[token].item()):
        raise not_finite("there is no answer")
    return token


@torch.no_grad()
def follow(model: Any, input_ids: Tensor, tokens: Tensor, prefill_chunk: int | None = None) -> None:
    """Runs a prompt, and behind it given tokens one after the other, whatever the model predicts.

    Args:
        model: A transformers decoder, in eval mode.
        input_ids: int64 `[N]`.
        tokens: int64 `[T]`.
        prefill_chunk: As in `generate`.
    """
    step = prefill(model, input_ids, prefill_chunk)
    for token in tokens.to(_device(model)):
        step = model(input_ids=token[None, None], **cache_of(step), use_cache=True)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, in float64."""
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm()).item()


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
