"""How much a model's predictions change for the attention that each head loses.

A block that a head leaves out changes its output by P (v - o), summed over the block. How much that
matters to the predictions is a derivative: labels are drawn from the model's own predictions, and
one backward pass of their log likelihood gives, for every block, the change of it to first order.
Its mean square over such draws is twice the KL divergence that the change causes (the Fisher
information): one pass stands for all blocks of all heads. There is one draw a prompt, as in
Hutchinson's estimate of a trace: query blocks and prompts average over it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shareprefill.errors import UnsupportedError
from shareprefill.runtime.decoding import BLOCK as DECODE_BLOCK
from shareprefill.runtime.decoding import LOCAL
from shareprefill.runtime.dense import sdpa
from shareprefill.runtime.fidelity import compare_predictions, final_states, sampled_score
from shareprefill.runtime.geometry import Geometry
from shareprefill.runtime.interface import (
    AttentionCall,
    HasGradients,
    attached,
    dense_attention,
)
from shareprefill.runtime.ops.block_selection import head_blocks, list_blocks
from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
from shareprefill.runtime.ops.fp8_attention import reference as fp8
from shareprefill.runtime.plan import default_geometry

CHANGE, LOST, DIVERGENCE = "effect_change", "effect_lost", "effect_divergence"
# The same of rows that each read few blocks, as decode steps do.
STEP_CHANGE, STEP_LOST = "step_change", "step_lost"
FP8_ERROR = "fp8_error"

# Attention mass that the patterns cover whose lost blocks are measured.
_COVERED = 0.9
# Probabilities that are made at once: a few MiB, and hardly any behind the diagonal.
_STRIP = 2**21
# The last rows of a prompt that stand for decode steps, at most, and the share of the key blocks
# that each of them reads.
_STEPS, _STEP_READS = 256, 0.1
# Rows at most, evenly spaced, whose outputs are computed in FP8.
_FP8_ROWS = 256


@dataclass(frozen=True, eq=False)
class _Cut:
    """What a layer's heads lose under patterns of their own exact maps.

    Attributes:
        pattern: bool `[H, n, n]`.
        change: First-order change of the log likelihood of the drawn labels, by head and query
            block, float64 `[H, n]`.
        lost: Attention mass outside the patterns, float64 `[H, n]`.
    """

    pattern: Tensor
    change: Tensor
    lost: Tensor


class _Tracer(HasGradients):
    """Attention handler: dense attention whose outputs' gradients can be asked for."""

    def __init__(self) -> None:
        self.calls: dict[int, AttentionCall] = {}
        self.outputs: dict[int, Tensor] = {}

    def __call__(self, call: AttentionCall) -> Tensor:
        if not call.is_shareable:
            return dense_attention(call)
        if call.needs_family is None:
            # Not by lists of blocks, which have no gradients.
            out = sdpa(call.query, call.key, call.value, None, True, call.scale)
        else:
            out = dense_attention(call)
        if not out.requires_grad:
            out = out.detach().requires_grad_()
        # A layer that is recomputed for its gradients calls again: they are of the first outputs.
        if call.layer not in self.outputs:
            self.calls[call.layer], self.outputs[call.layer] = call, out
        return out


class _Sparse:
    """Attention handler: given patterns."""

    def __init__(self, patterns: dict[int, Tensor], geometry: Geometry) -> None:
        self.patterns, self.geometry = patterns, geometry

    def __call__(self, call: AttentionCall) -> Tensor:
        pattern = self.patterns.get(call.layer)
        if pattern is None:
            return dense_attention(call)
        index = torch.arange(len(pattern), device=pattern.device)
        lists = list_blocks(pattern, index, **self.geometry.sizes)
        return block_sparse_attention(
            call.query[0],
            call.key[0],
            call.value[0],
            lists,
            scale=call.scale,
            softcap=call.softcap,
            sinks=call.sinks,
        )[None]


def measure_effect(
    model: torch.nn.Module,
    input_ids: Tensor,
    layers: Sequence[int],
    *,
    block_size: int,
    tokens: int,
    seed: int,
) -> dict[str, Tensor]:
    """Measures on one prompt what lost attention mass does to the predictions.

    Every head gets the pattern of its own exact map, and what lies outside it is measured twice:
    for each head alone by derivatives, and for all heads together by a sparse prefill. Sums over
    prompts of the three results give each head's effect (see `clustering.effects`).

    Args:
        model: A transformers decoder, in eval mode.
        input_ids: int64 `[N]`.
        layers: The layers to measure: those that are captured.
        block_size: Tokens a block.
        tokens: Positions at most: of a longer prompt its beginning and its end are taken.
        seed: Of the labels that are drawn.

    Returns:
        `effect_change` float32 `[L, H]`, the KL divergence in nats a position that the head's lost
        mass causes alone; `effect_lost` float32 `[L, H]`, the mean square of that mass over query
        blocks; `effect_divergence` float32 `[1]`, the measured KL divergence of all heads;
        `step_change` and `step_lost`, the first two of the last rows, where each of them reads a
        tenth of the blocks that decode steps read or do not, those with most of its attention; and
        `fp8_error` float32 `[L, H]`, how far outputs are off, relative to their norm, where
        operands are rounded to e4m3 (not of models with soft-capped logits or attention sinks,
        which FP8 attention does not compute).

    Raises:
        UnsupportedError: the model has no gradients.
    """
    if len(input_ids) > tokens:
        input_ids = torch.cat([input_ids[: tokens // 2], input_ids[tokens // 2 - tokens :]])
    device = cast(Any, model).get_input_embeddings().weight.device
    ids = input_ids[None].to(device)
    tracer = _Tracer()
    with torch.enable_grad(), attached(model, tracer), _recomputed(model):
        with final_states(model) as states:
            cast(Any, model)(input_ids=ids, use_cache=False)
        final = states()
        if not final.requires_grad:
            raise UnsupportedError(
                f"{type(model).__name__} has no gradients from its attention to its predictions, "
                "so the effect of lost attention cannot be measured: calibrate with "
                "--effect-tokens 0"
            )
        with _deterministic():
            gradients = _gradients(model, final, [tracer.outputs[n] for n in layers], seed)
    cuts = {
        n: _cut(tracer.calls[n], tracer.outputs[n].detach(), gradient, block_size)
        for n, gradient in zip(layers, gradients, strict=True)
    }
    steps = [
        _lost_steps(tracer.calls[n], tracer.outputs[n].detach(), gradient)
        for n, gradient in zip(layers, gradients, strict=True)
    ]
    fp8_errors: list[Tensor] = []
    if all(tracer.calls[n].softcap is None and tracer.calls[n].sinks is None for n in layers):
        fp8_errors = [_fp8_error(tracer.calls[n], tracer.outputs[n].detach()[0]) for n in layers]
    dense = final.detach()
    geometry = default_geometry(len(input_ids), block_size, device)
    sparse = _Sparse({n: cut.pattern for n, cut in cuts.items()}, geometry)
    with torch.no_grad(), attached(model, sparse), final_states(model) as states:
        cast(Any, model)(input_ids=ids, use_cache=False)
    divergence = compare_predictions(model, dense, states()).mean_kl
    # Half the mean square of the change is the KL divergence. The changes of query blocks are taken
    # for unlike each other: that costs a factor that all heads have in common, about, and makes
    # one draw enough.
    change = [cut.change.square().sum(-1) / (2 * len(input_ids)) for cut in cuts.values()]
    lost = [cut.lost.square().mean(-1) for cut in cuts.values()]
    return {
        CHANGE: torch.stack([t.cpu() for t in change]).float(),
        LOST: torch.stack([t.cpu() for t in lost]).float(),
        STEP_CHANGE: torch.stack([t.square().mean(-1).cpu() / 2 for t, _ in steps]).float(),
        STEP_LOST: torch.stack([t.square().mean(-1).cpu() for _, t in steps]).float(),
        DIVERGENCE: torch.tensor([divergence], dtype=torch.float32, device="cpu"),
        **({FP8_ERROR: torch.stack([t.cpu() for t in fp8_errors]).float()} if fp8_errors else {}),
    }


@contextmanager
def _recomputed(model: torch.nn.Module) -> Iterator[None]:
    """Has the model's layers compute anew, one by one, what their gradients need.

    In memory are then the layers' inputs and one layer's activations, at the cost of one more
    forward pass. A layer of a model's own code that transformers cannot recompute keeps them all.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    # Hooks that loading over several devices leaves are attributes of a module's own.
    own = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            layer.forward = partial(checkpoint, layer.forward, **options)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


@contextmanager
def _deterministic() -> Iterator[None]:
    """Has a GPU sum gradients in one order: a calibration that goes on gives the same bytes.

    That holds in float32. In bfloat16 the attention of cuDNN only warns, and sums in any order:
    asking for an error instead would refuse models for other operators.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def _gradients(
    model: torch.nn.Module, final: Tensor, outputs: list[Tensor], seed: int
) -> tuple[Tensor, ...]:
    """Gradients of the log likelihood of drawn labels, by layer: `[1, H, N, Dv]`."""
    score = sampled_score(model, final.detach(), seed).to(final.device)
    return torch.autograd.grad(final, outputs, score.to(final.dtype))


@torch.no_grad()
def _cut(call: AttentionCall, output: Tensor, gradient: Tensor, block_size: int) -> _Cut:
    """What the heads of a layer lose."""
    query, key, value = call.query[0].detach(), call.key[0].detach(), call.value[0].detach()
    heads, n_tokens = query.shape[:2]
    geometry = default_geometry(n_tokens, block_size, query.device)
    # What a unit of attention to a key adds to a row's log likelihood is gradient . (v - o).
    way = gradient[0].float()  # [H, N, Dv]
    offset = (way * output[0].float()).sum(-1, keepdim=True)  # [H, N, 1]
    masses, changes = [], []
    strip = max(1, _STRIP // (heads * n_tokens * block_size)) * block_size
    repeats = heads // len(key)
    keys, values = (t.float().repeat_interleave(repeats, 0) for t in (key, value))
    for start in range(0, n_tokens, strip):
        end = min(start + strip, n_tokens)
        weights = _weights(call, query[:, start:end].float(), keys[:, :end], start)
        masses.append(_pool(weights, block_size, geometry.shape[1]))
        gain = way[:, start:end] @ values[:, :end].transpose(1, 2)
        gain.sub_(offset[:, start:end]).mul_(weights)
        changes.append(_pool(gain, block_size, geometry.shape[1]))
    n_rows = torch.full((geometry.shape[0], 1), block_size, dtype=torch.int64, device=query.device)
    n_rows[-1] = n_tokens - (len(n_rows) - 1) * block_size
    mass, change = torch.cat(masses, 1) / n_rows, torch.cat(changes, 1)
    gamma = torch.full((heads,), _COVERED, dtype=torch.float32, device=query.device)
    pattern = head_blocks(mass, gamma, **geometry.reads)[0]
    lost = (mass.double() * ~pattern).sum(-1)
    # Those that are left are scaled up by the softmax.
    change = (change.double() * ~pattern).sum(-1) / (1 - lost)
    return _Cut(pattern, change, lost)


@torch.no_grad()
def _lost_steps(call: AttentionCall, output: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """What heads of a layer lose whose last rows each read few blocks.

    Returns:
        First-order change of the log likelihood of the drawn labels, and attention that is not
        read, by head and row, float64 `[H, T]`.
    """
    query, key, value = call.query[0].detach(), call.key[0].detach(), call.value[0].detach()
    heads, n_tokens = query.shape[:2]
    repeats = heads // len(key)
    keys, values = (t.float().repeat_interleave(repeats, 0) for t in (key, value))
    way = gradient[0].float()
    starts = torch.arange(0, n_tokens, DECODE_BLOCK, device=query.device)
    most, missing = int(_STEP_READS * len(starts)), -n_tokens % DECODE_BLOCK
    strip = max(1, _STRIP // (heads * n_tokens))
    changes, losses = [], []
    for start in range(n_tokens - min(_STEPS, n_tokens // 4), n_tokens, strip):
        rows = slice(start, min(start + strip, n_tokens))
        weights = _weights(call, query[:, rows].float(), keys, start)  # [H, rows, N]
        offset = (way[:, rows] * output[0, :, rows].float()).sum(-1, keepdim=True)
        gain = (way[:, rows] @ values.transpose(1, 2) - offset) * weights
        mass, gain = (
            F.pad(t, (0, missing)).unflatten(2, (-1, DECODE_BLOCK)).sum(-1).double()
            for t in (weights, gain)
        )
        newest = torch.arange(rows.start, rows.stop, device=query.device)[:, None] - LOCAL + 1
        always = (starts == 0) | (starts + DECODE_BLOCK > newest)  # [rows, n]
        order = mass.masked_fill(always, torch.inf).argsort(-1, descending=True)
        counts = always.sum(-1, keepdim=True).clamp(min=most)
        is_lost = torch.zeros_like(mass, dtype=torch.bool).scatter(
            -1, order, (torch.arange(len(starts), device=query.device) >= counts).expand_as(order)
        )
        lost = (mass * is_lost).sum(-1)
        losses.append(lost)
        changes.append((gain * is_lost).sum(-1) / (1 - lost))
    return torch.cat(changes, 1), torch.cat(losses, 1)


@torch.no_grad()
def _fp8_error(call: AttentionCall, output: Tensor) -> Tensor:
    """How far heads' outputs are off with operands of e4m3, relative to their norm, `[H]`.

    Rounded as `fp8_attention` rounds; other errors of its kernel are small beside that.
    """
    query, key, value = call.query[0].detach(), call.key[0].detach(), call.value[0].detach()
    heads, n_tokens = query.shape[:2]
    keys, values = (
        t.repeat_interleave(heads // len(key), 0) for t in fp8.rounded_keys_and_values(key, value)
    )
    step = math.ceil(n_tokens / _FP8_ROWS)
    rows = torch.arange(step - 1, n_tokens, step, device=query.device)
    logits = fp8.rounded_queries(query[:, rows]) @ keys.transpose(1, 2) * call.scale
    hidden = torch.arange(n_tokens, device=query.device) > rows[:, None]
    weights, sums = fp8.rounded_weights(logits.masked_fill_(hidden, -math.inf))
    exact = output[:, rows].float().flatten(1)
    found = (weights @ values / sums[..., None]).flatten(1)
    return (found - exact).norm(dim=1) / exact.norm(dim=1).clamp(min=fp8.TINY)


def _weights(call: AttentionCall, query: Tensor, key: Tensor, start: int) -> Tensor:
    """Attention probabilities of some rows, float32 `[H, R, N]`."""
    logits = query @ key.transpose(1, 2) * call.scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    rows = torch.arange(start, start + query.shape[1], device=query.device)
    hidden = torch.arange(key.shape[1], device=query.device) > rows[:, None]
    logits.masked_fill_(hidden, -math.inf)
    if call.sinks is None:
        return logits.softmax(-1)
    sink = call.sinks.float()[:, None, None].expand(-1, logits.shape[1], 1)
    return torch.cat([logits, sink], -1).softmax(-1)[..., :-1]


def _pool(values: Tensor, block_size: int, n_k: int) -> Tensor:
    """Sums by block: `[H, R, N]` to `[H, rows of blocks, n_k]`; zeros behind the last column."""
    short = (-values.shape[2] % block_size, -values.shape[1] % block_size)
    if any(short):
        values = F.pad(values, (0, short[0], 0, short[1]))
    blocks = values.unflatten(2, (-1, block_size)).sum(-1).unflatten(1, (-1, block_size)).sum(2)
    return F.pad(blocks, (0, n_k - blocks.shape[2]))
