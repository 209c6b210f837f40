"""Negative log likelihood of every token of a text, from one prefill."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shareprefill.errors import UnsupportedError

# Logits of so many positions are in memory at once: 256 MB in float32 at 128K words.
_PIECE = 512


@dataclass(frozen=True)
class Reading:
    """One text, read.

    Attributes:
        losses: Negative log likelihood of every token but the first, in nats, float64 `[N - 1]`.
        hidden: Last hidden state of the last token, float32 `[hidden_size]`.
        ttft_s: Seconds of the prefill, to the logits of the last token.
    """

    losses: Tensor
    hidden: Tensor
    ttft_s: float


@torch.no_grad()
def read_text(model: Any, input_ids: Tensor) -> Reading:
    """Reads a text under whatever attention the model is set to.

    Args:
        model: A transformers decoder, in eval mode.
        input_ids: int64 `[N]`, N >= 2.

    Raises:
        UnsupportedError: the model makes its logits in a way that is not known here.
    """
    head = model.get_output_embeddings()
    ids = input_ids[None].to(model.get_input_embeddings().weight.device)
    caught: list[Tensor] = []

    def keep_last(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # The model is asked for all logits; only the last are made, the others in pieces below.
        caught.append(inputs[0])
        return (inputs[0][:, -1:],)

    handle = head.register_forward_pre_hook(keep_last)
    try:
        start = time.perf_counter()
        last = model(input_ids=ids, use_cache=False).logits
        int(last[0, -1].argmax())  # waits for the device
        seconds = time.perf_counter() - start
    finally:
        handle.remove()
    (states,) = caught
    assert states.shape[:2] == ids.shape
    _check(model, _logits(model, head, states[:, -1:]), last)
    targets = ids[0, 1:]
    losses = []
    for rows in torch.arange(len(targets), device=targets.device).split(_PIECE):
        logits = _logits(model, head, states[:, rows])[0].float()
        losses.append(nn.functional.cross_entropy(logits, targets[rows], reduction="none"))
    return Reading(torch.cat(losses).double().cpu(), states[0, -1].float().cpu(), seconds)


def _logits(model: Any, head: nn.Module, states: Tensor) -> Tensor:
    """The model's logits: the output layer, and what some families do to its result."""
    config = model.config.get_text_config(decoder=True)
    logits = head(states)
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None) is not None:  # Granite
        logits = logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _check(model: Any, ours: Tensor, own: Tensor) -> None:
    if ours.shape != own.shape or not torch.allclose(
        ours, own.to(ours.dtype), rtol=1e-2, atol=1e-2
    ):
        raise UnsupportedError(
            f"{type(model).__name__} changes its logits after the output layer in a way that is "
            "not known here, so its perplexity cannot be measured: leave the task perplexity out"
        )
