"""How far a model's predictions are from those under dense attention, at every position.

The states that the output layer reads are kept from a prefill; logits are made from them piece by
piece, so that those of all positions are never in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from shareprefill.errors import UnsupportedError, not_finite

# Logits that are made at once: 128 MiB in float32, 256 positions of a vocabulary of 128K.
_LOGITS = 2**25
# Tokens whose probabilities are added up at a time, where one is drawn.
_RUN = 256


@dataclass(frozen=True, eq=False)
class Fidelity:
    """Predictions under sparse attention against those under dense attention, by position.

    Attributes:
        kl: KL divergence KL(dense || sparse) of the next token's distributions, in nats, at least
            0, float64 `[N]`.
        agrees: Whether both have the same most likely next token, bool `[N]`.
    """

    kl: Tensor
    agrees: Tensor

    @property
    def mean_kl(self) -> float:
        """Mean KL divergence over all positions, in nats."""
        return self.kl.mean().item()

    @property
    def top1_agreement(self) -> float:
        """Share of the positions that have the same most likely next token, 0 to 1."""
        return self.agrees.double().mean().item()


@contextmanager
def final_states(model: Any) -> Iterator[Callable[[], Tensor]]:
    """Keeps what the output layer reads at every position of the calls within the block.

    The model still makes the logits of a call's last position alone, whatever the call asks for,
    so a prefill takes as long as with `logits_to_keep=1`. The pieces of a chunked prefill are
    joined; tokens that are generated within the block count too.

    Args:
        model: A transformers decoder, in eval mode.

    Yields:
        Gives the states of all positions so far, `[N, hidden_size]` in the model's dtype and on
        its device. It raises `UnsupportedError` where the model changes its logits after the output
        layer in a way that is not known here.
    """
    head = model.get_output_embeddings()
    pieces: list[Tensor] = []
    lasts: list[Tensor] = []

    def ask_for_all(_module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return inputs, {**options, "logits_to_keep": 0}

    def keep_all(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pieces.append(inputs[0])
        return (inputs[0][:, -1:],)

    def keep_last(_module: nn.Module, _inputs: Any, output: Any) -> None:
        lasts.append(output.logits[0, -1:])

    def joined() -> Tensor:
        if len(pieces) > 1:
            pieces[:] = [torch.cat(pieces, dim=1)]
        states = pieces[0][0]
        _check(model, states[-1:], lasts[-1])
        return states

    handles = (
        model.register_forward_pre_hook(ask_for_all, with_kwargs=True),
        head.register_forward_pre_hook(keep_all),
        model.register_forward_hook(keep_last),
    )
    try:
        yield joined
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def compare_predictions(model: Any, dense: Tensor, sparse: Tensor) -> Fidelity:
    """Compares the predictions that follow from two prefills of one prompt.

    Args:
        model: The decoder that made the states.
        dense: Its final states under dense attention, `[N, hidden_size]`, on any device.
        sparse: The same under sparse attention.

    Raises:
        ModelError: predictions are NaN or infinite.
    """
    kl, agrees = [], []
    for expected, found in zip(_pieces(model, dense), _pieces(model, sparse), strict=True):
        p = _logits(model, expected).float()
        q = _logits(model, found).float()
        agrees.append((p.argmax(-1) == q.argmax(-1)).cpu())  # [piece]
        p, q = p.log_softmax(-1), q.log_softmax(-1)  # [piece, vocabulary]
        # A token that dense attention rules out adds nothing, whatever the other one makes of it.
        terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
        kl.append(terms.sum(-1, dtype=torch.float64).cpu())
    found_kl = torch.cat(kl)
    if not bool(found_kl.isfinite().all()):
        raise not_finite("they cannot be compared with those of dense attention")
    return Fidelity(found_kl.clamp_min(0), torch.cat(agrees))


@torch.no_grad()
def token_losses(model: Any, states: Tensor, input_ids: Tensor) -> Tensor:
    """Negative log likelihood of every token but the first, in nats, float64 `[N - 1]`.

    Args:
        model: The decoder that made the states.
        states: Final states of the prompt, `[N, hidden_size]`, on any device.
        input_ids: int64 `[N]`, N >= 2.

    Raises:
        ModelError: a loss is NaN or infinite.
    """
    losses, start = [], 1
    for piece in _pieces(model, states[:-1]):
        logits = _logits(model, piece).float()
        targets = input_ids[start : start + len(piece)].to(logits.device)
        losses.append(nn.functional.cross_entropy(logits, targets, reduction="none").cpu())
        start += len(piece)
    found = torch.cat(losses).double()
    if not bool(found.isfinite().all()):
        raise not_finite("the text has no perplexity")
    return found


def sampled_score(model: Any, states: Tensor, seed: int) -> Tensor:
    """Gradient of the log likelihood of next tokens that are drawn from the model's predictions.

    On every device the same tokens are drawn, but where roundings decide. Over draws the gradient's
    mean is zero, and its outer product's mean is the Fisher information of the predictions: half of
    it is their KL divergence for a small change of the states.

    Args:
        model: The decoder that made the states.
        states: Final states of a prompt, `[N, hidden_size]`, on any device.
        seed: Of the draw.

    Returns:
        By the states, of their shape and dtype, on the output layer's device.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    reached = torch.rand(len(states), 1, generator=generator, dtype=torch.float64, device="cpu")
    scores, first = [], 0
    for piece in _pieces(model, states):
        with torch.enable_grad():
            leaf = piece.detach().requires_grad_()
            losses = _logits(model, leaf).float().log_softmax(-1)  # [piece, vocabulary]
            drawn = _draw(losses.detach(), reached[first : first + len(piece)])
            scores.append(torch.autograd.grad(losses.gather(1, drawn).sum(), leaf)[0])
        first += len(piece)
    return torch.cat(scores)


def _draw(losses: Tensor, reached: Tensor) -> Tensor:
    """The token of each row at which the cumulative probability reaches a share of the whole.

    Sums of runs of tokens are added up on the CPU: GPUs add up in another order every time.

    Args:
        losses: Logarithms of probabilities, `[n, vocabulary]`.
        reached: The shares, float64 `[n, 1]`, on the CPU.

    Returns:
        int64 `[n, 1]`, on the device of the losses.
    """
    rows, vocabulary = losses.shape
    runs = pad(losses.exp(), (0, -vocabulary % _RUN)).view(rows, -1, _RUN)
    sums = runs.sum(-1, dtype=torch.float64).cpu().cumsum(-1)
    wanted = reached * sums[:, -1:]
    run = torch.searchsorted(sums, wanted, right=True).clamp_(max=sums.shape[1] - 1)
    every = torch.arange(rows, device=losses.device)
    inside = runs[every, run[:, 0].to(losses.device)].cpu().double().cumsum(-1)
    rest = wanted - (sums.gather(1, run) - inside[:, -1:])
    token = run * _RUN + torch.searchsorted(inside, rest, right=True).clamp_(max=_RUN - 1)
    return token.clamp_(max=vocabulary - 1).to(losses.device)


def _pieces(model: Any, states: Tensor) -> Iterator[Tensor]:
    """The states on the output layer's device, as many rows at a time as may have logits."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    device = model.get_output_embeddings().weight.device
    for piece in states.split(max(1, _LOGITS // vocabulary)):
        yield piece.to(device)


def _logits(model: Any, states: Tensor) -> Tensor:
    """The model's logits: the output layer, and what some families do to its result."""
    config = model.config.get_text_config(decoder=True)
    logits = model.get_output_embeddings()(states)
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None) is not None:  # Granite
        logits = logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return logits if cap is None else cap * torch.tanh(logits / cap)


@torch.no_grad()
def _check(model: Any, states: Tensor, own: Tensor) -> None:
    """Compares the last position's logits `[1, vocabulary]` with those that the model gave."""
    ours = _logits(model, states)
    if ours.shape != own.shape or not torch.allclose(
        ours, own.to(ours.dtype), rtol=1e-2, atol=1e-2, equal_nan=True
    ):
        raise UnsupportedError(
            f"{type(model).__name__} changes its logits after the output layer in a way that is "
            "not known here, so its predictions cannot be measured: leave out the task perplexity "
            "and, with --no-measure, the divergence from dense attention"
        )
