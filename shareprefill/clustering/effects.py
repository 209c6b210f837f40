"""The effect of each head: KL divergence of the predictions for the attention mass it loses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shareprefill.calib.effect import CHANGE, DIVERGENCE, FP8_ERROR, LOST, STEP_CHANGE, STEP_LOST
from shareprefill.calib.store import MapStore

# Prompts' worth of its layer's mean that a head's own figure is mixed with, in shares of the
# evidence: a head that loses next to nothing says little about itself.
_OF_LAYER = 0.25


def head_effects(store: MapStore, prompts: Sequence[int]) -> Tensor | None:
    """Nats a position that every head's lost mass costs, for a mean square of 1 over query blocks.

    So the KL divergence that a plan is predicted to have is the sum over heads of effect times the
    mean square, over query blocks, of the mass outside the head's pattern. Heads' effects are
    relative to each other what derivatives say, and in sum what sparse prefills measured.

    Args:
        store: A complete calibration.
        prompts: Numbers of the prompts to take.

    Returns:
        float64 `[K]`, captured heads one after the other; None where none were measured.
    """
    if not store.config.effect_tokens:
        return None
    return effects_of(*_of_prompts(store, prompts, CHANGE, LOST, DIVERGENCE))


def prompt_effects(store: MapStore, known: Sequence[int], prompts: Sequence[int]) -> Tensor | None:
    """The same of single prompts: a data set's heads are relative to each other as on all of them.

    What lost mass costs differs tenfold between data sets. In sum a prompt's effects are what
    sparse prefills of its own data set measured; how they differ from head to head, one data set's
    derivatives are too few to tell.

    Args:
        store: A complete calibration.
        known: Numbers of the prompts whose effects are taken.
        prompts: Numbers of the prompts that they are for, in order.

    Returns:
        float64 `[P, K]`; None where none were measured.
    """
    effect = head_effects(store, known)
    if effect is None:
        return None
    lost, divergence = _of_prompts(store, known, LOST, DIVERGENCE)
    predicted = (lost.flatten(1) * effect).sum(1)  # [P]
    sources = [store.prompts[number].source for number in known]
    scales = []
    for number in prompts:
        source = store.prompts[number].source
        # Of a data set that nothing is known of, what all have in common.
        alike = [n for n, other in enumerate(sources) if other == source] or [*range(len(known))]
        scales.append(divergence[alike].sum() / predicted[alike].sum().clamp_min(_TINY))
    return torch.stack(scales)[:, None] * effect


def step_effects(store: MapStore, prompts: Sequence[int]) -> Tensor | None:
    """The same of decode steps, which each read blocks of their own; relative to each other alone.

    Returns:
        float64 `[K]`; None where none were measured, or prompts were so short that nothing is lost.
    """
    if not store.config.effect_tokens or not all(store.holds(n, STEP_CHANGE) for n in prompts):
        return None
    change, lost = _of_prompts(store, prompts, STEP_CHANGE, STEP_LOST)
    return _relative(change.sum(0), lost.sum(0)).flatten() if lost.any() else None


def fp8_errors(store: MapStore, prompts: Sequence[int]) -> Tensor | None:
    """How far every head's output is off in FP8, relative to its norm, mean over prompts.

    Returns:
        float64 `[K]`; None where it was not measured.
    """
    if not store.config.effect_tokens or not all(store.holds(n, FP8_ERROR) for n in prompts):
        return None
    return _of_prompts(store, prompts, FP8_ERROR)[0].mean(0).flatten()


def effects_of(change: Tensor, lost: Tensor, divergence: Tensor) -> Tensor:
    """The same from the tensors of prompts: float64 `[P, L, H]`, `[P, L, H]` and `[P, 1]`."""
    caused, mass = change.sum(0), lost.sum(0)  # [L, H]
    effect = _relative(caused, mass)
    predicted = (effect * mass).sum()
    scale = divergence.sum() / predicted.clamp_min(_TINY)
    return (effect * scale).flatten()


def _of_prompts(store: MapStore, prompts: Sequence[int], *names: str) -> list[Tensor]:
    """Tensors of prompts by name, each float64 `[P, ...]`."""
    loaded = [store.load(number, *names) for number in prompts]
    return [torch.stack([tensors[name].double() for tensors in loaded]) for name in names]


def _relative(caused: Tensor, mass: Tensor) -> Tensor:
    """What each head's lost mass causes, mixed with its layer's, `[L, H]`."""
    prior = _OF_LAYER * mass.mean(1, keepdim=True)
    of_layer = caused.sum(1, keepdim=True) / mass.sum(1, keepdim=True).clamp_min(_TINY)
    return (caused + prior * of_layer) / (mass + prior).clamp_min(_TINY)


_TINY = torch.finfo(torch.float64).tiny
