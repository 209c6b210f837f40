"""Decoding with what the prefill learnt: how much attention a step keeps, and what it changes.

    python benchmarks/decode_study.py capture --model DIR --task text --length 8192 --out F/a.pt
    python benchmarks/decode_study.py recall --by-head --calibrate F/c.pt --json r.json F/a.pt
    python benchmarks/decode_study.py effect --model DIR --calibrate F/c.pt --out F/e.pt
    python benchmarks/decode_study.py kl --model DIR --calibrate F/c.pt --effect F/e.pt \
        --json kl.json F/a.pt
    python benchmarks/decode_study.py plan --model DIR --artifact x.st --json plan.json F/a.pt
    python benchmarks/decode_study.py show --plot decoding.svg r.json kl.json plan.json

`capture` runs a prompt densely and keeps its keys and values, and the queries of the decode steps
behind it. The steps continue plain text greedily. Tasks with a right answer are given it, question
after question: the greedy answer is right exactly when every token of it is the likeliest one.
`recall` lays every policy over the captured steps. `kl` runs the steps under each: blocks that a
policy does not read are hidden from its attention, in all layers, so that errors add up over steps
and layers as in decoding. All steps go through the model in one pass, as none depends on a token
that a policy would have chosen. `plan` runs prompt and steps as a prefill under an artifact:
the divergence that the product's own plan brings at the same tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from decode_policies import Calibration, Ordered, Policy, Steps, make_policy, quest_bounds
from provenance import provenance
from torch import Tensor
from torch.nn import functional as F

from shareprefill.artifact import load_artifact
from shareprefill.calib.tasks import generate, wording
from shareprefill.calib.tasks.haystack import Haystack
from shareprefill.config import RuntimeConfig
from shareprefill.models import load_model, load_tokenizer
from shareprefill.runtime.fidelity import Fidelity, compare_predictions, final_states, sampled_score
from shareprefill.runtime.generation import cache_of
from shareprefill.runtime.interface import AttentionCall, HasGradients, attached
from shareprefill.runtime.session import share_prefill
from shareprefill.tokens import encode

TASKS = ("retr_kv", "needle", "quotation", "text")
DENSITIES = (0.05, 0.1, 0.2, 0.3)
POLICIES = (
    *("oracle", "oracle+cuts", "last", "vertical", "quest", "own/8", "own/16", "own/64"),
    *("pivots:.05", "pivots:.05+cuts", "pivots:.05/4", "pivots:.1", "pivots:.1/4+cuts"),
)
# Query rows of the prompt: the last ones, and one in so many of all.
LAST, EVERY = 128, 8
# Sets of tokens that a prompt's effects are measured with.
DRAWS = 4
# Tokens of the finest key blocks that maps of the prompt are kept at.
FINE = 16
_NEEDLES, _QUOTED_FROM, _QUOTED_WORDS = 8, 0.4, 24
_KV = re.compile(r'"([0-9a-f-]{36})": "([0-9a-f-]{36})"')
_NEEDLE = re.compile(r"magic numbers for (\S+) is: (\d+)\.")


@dataclass(frozen=True)
class Captured:
    """A prompt and the decode steps behind it, run densely.

    Attributes:
        task: Task.
        ids: Tokens of prompt and steps, int64 `[N + T]`.
        prompt: N.
        answers: First and last but one of the tokens of every right answer.
        key: Keys of prompt and steps, float16 `[L, G, N + T, D]`.
        value: Values of the prompt, float16 `[L, G, N, D]`.
        query: Queries of the steps, float16 `[L, H, T, D]`.
        last: Mean attention of the prompt's last rows by key block, `[L, H, n]`.
        vertical: The same of rows of the whole prompt, `[L, H, n]`.
        states: Final states of the steps, `[T, hidden size]`.
        scale: On the logits.
    """

    task: str
    ids: Tensor
    prompt: int
    answers: list[tuple[int, int]]
    key: Tensor
    value: Tensor
    query: Tensor
    last: Tensor
    vertical: Tensor
    states: Tensor
    scale: float

    @property
    def steps(self) -> int:
        """T."""
        return len(self.ids) - self.prompt

    def save(self, path: Path) -> None:
        """Writes it; tensors alone, so that nothing of it is code."""
        torch.save(vars(self), path)

    @classmethod
    def load(cls, path: Path, steps: int | None = None) -> Captured:
        """Reads it, with its first steps alone where `steps` says so."""
        found = cls(**torch.load(path))
        if steps is None or steps >= found.steps:
            return found
        stop = found.prompt + steps
        return replace(
            found,
            ids=found.ids[:stop],
            answers=[(a, min(b, steps)) for a, b in found.answers if b <= steps or a == 0],
            key=found.key[:, :, :stop],
            query=found.query[:, :, :steps],
            states=found.states[:steps],
        )


class Prefill:
    """Attention handler: dense, keeping keys, values and what the prompt's rows attend to."""

    def __init__(self) -> None:
        self.key: list[Tensor] = []
        self.value: list[Tensor] = []
        self.last: list[Tensor] = []
        self.vertical: list[Tensor] = []
        self.scale = 1.0

    def __call__(self, call: AttentionCall) -> Tensor:
        query, key = call.query[0], call.key[0]
        repeats, rows = len(query) // len(key), query.shape[1]
        self.scale = call.scale
        self.key.append(key.half())
        self.value.append(call.value[0].half())
        every = torch.arange(EVERY - 1, rows, EVERY)
        self.vertical.append(_mean_map(query[:, every], every, key, call.scale))
        tail = torch.arange(max(0, rows - LAST), rows)
        self.last.append(_mean_map(query[:, tail], tail, key, call.scale))
        whole = (t[0].repeat_interleave(repeats, 0)[None] for t in (call.key, call.value))
        return F.scaled_dot_product_attention(call.query, *whole, is_causal=True, scale=call.scale)


def _mean_map(query: Tensor, rows: Tensor, key: Tensor, scale: float) -> Tensor:
    """Mean attention of query rows `[H, rows, D]` by key block `[H, n]`."""
    total = torch.zeros(len(query), key.shape[1])
    for piece, places in zip(query.split(256, 1), rows.split(256), strict=True):
        logits = piece.unflatten(0, (len(key), -1)) @ key[:, None].mT * scale
        logits.masked_fill_(torch.arange(key.shape[1]) > places[:, None], -torch.inf)
        total += logits.softmax(-1).sum(2).flatten(0, 1)
    return by_block(total / len(rows), FINE)


def by_block(mass: Tensor, block: int) -> Tensor:
    """Sums over blocks of the last dimension; the last block may be smaller."""
    full = mass.shape[-1] // block * block
    sums = mass[..., :full].unflatten(-1, (-1, block)).sum(-1)
    if full == mass.shape[-1]:
        return sums
    return torch.cat((sums, mass[..., full:].sum(-1, keepdim=True)), -1)


class Decode:
    """Attention handler: the steps behind a captured prompt, densely or under a policy.

    Attributes:
        query: Of every layer.
        key: Of every layer's steps.
        kept: Reads of every layer, mean over KV heads and steps.
        heads: Weight of every query head in its KV head's order, `[L, H]`; all equal without.
    """

    def __init__(
        self,
        prompt: Prompt,
        policy: Policy | None = None,
        block: int = FINE,
        heads: Tensor | None = None,
    ) -> None:
        self.prompt, self.policy, self.block, self.heads = prompt, policy, block, heads
        self.query: list[Tensor] = []
        self.key: list[Tensor] = []
        self.kept: list[float] = []

    def __call__(self, call: AttentionCall) -> Tensor:
        layer, prompt = call.layer, self.prompt
        self.query.append(call.query[0].half())
        self.key.append(call.key[0].half())
        key = torch.cat((prompt.key[layer], call.key[0]), 1)
        value = torch.cat((prompt.value[layer], call.value[0]), 1)
        weights = attention(call.query[0], key, call.scale)
        if self.policy is not None:
            self._hide(layer, weights, call, key)
        out = weights @ value[:, None]
        if self.policy is not None:
            out /= weights.sum(-1, keepdim=True)
        return out.flatten(0, 1)[None]

    def _hide(self, layer: int, weights: Tensor, call: AttentionCall, key: Tensor) -> None:
        """Takes the weights of blocks that the policy does not read away; rows sum to less then."""
        assert self.policy is not None
        prompt, block = self.prompt, self.block
        steps = layer_steps(
            *(weights, call.query[0], key, prompt.last[layer], prompt.vertical[layer]),
            block=block,
            heads=None if self.heads is None else self.heads[layer],
        )
        keep = self.policy.keep(layer, steps)
        self.kept.append((keep.sum(-1) / steps.visible.sum(-1)).mean().item() + self.policy.extra)
        full = weights.shape[-1] // block
        blocks = weights[..., : full * block].unflatten(-1, (full, block))
        blocks *= keep[:, None, :, :full, None]
        weights[..., full * block :] *= keep[:, None, :, full:].any(-1, keepdim=True)


@dataclass(frozen=True)
class Prompt:
    """What decode steps read of a prompt, by layer: float32 keys and values, maps of its rows."""

    key: list[Tensor]
    value: list[Tensor]
    last: list[Tensor]
    vertical: list[Tensor]


def prompt_of(captured: Captured) -> Prompt:
    """What the steps of a captured prompt read."""
    keys = captured.key[:, :, : captured.prompt].float()
    return Prompt(
        *(list(keys), list(captured.value.float())), list(captured.last), list(captured.vertical)
    )


def attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Dense attention weights `[G, R, T, M]` of the last T of M tokens.

    Args:
        query: `[H, T, D]`.
        key: `[G, M, D]`.
        scale: On the logits.
    """
    steps, tokens = query.shape[1], key.shape[1]
    logits = (query * scale).unflatten(0, (len(key), -1)) @ key[:, None].mT
    later = torch.ones(steps, steps, dtype=torch.bool).triu(1)
    logits[..., tokens - steps :].masked_fill_(later, -torch.inf)
    return logits.softmax(-1)


def layer_steps(
    weights: Tensor,
    query: Tensor,
    key: Tensor,
    last: Tensor,
    vertical: Tensor,
    *,
    block: int,
    by_head: bool = False,
    heads: Tensor | None = None,
) -> Steps:
    """The steps of one layer, as a policy sees them: KV heads are the units, or query heads.

    A KV head has the mean of its query heads, weighed by `heads` `[H]`.
    """
    n = -(-key.shape[1] // block)
    groups, repeats, count, tokens = weights.shape
    padded = F.pad(key, (0, 0, 0, n * block - tokens))
    bounds = quest_bounds(query.unflatten(0, (groups, -1)), padded, block)
    mass = by_block(weights, block)  # [G, R, T, n]
    maps = [by_block(m, block // FINE) for m in (last, vertical)]
    maps = [F.pad(m, (0, n - m.shape[-1])).unflatten(0, (groups, -1)) for m in maps]
    every = (mass, bounds, *maps)
    if by_head:
        units = [t.flatten(0, 1) for t in every]
    else:
        share = (torch.ones(groups * repeats) if heads is None else heads).view(groups, repeats)
        share = share / share.sum(1, keepdim=True)
        units = [torch.einsum("gr,gr...->g...", share, t) for t in every]
    return Steps(*units, prompt=tokens - count, block=block)


@torch.no_grad()
def run_steps(model: Any, ids: Tensor, prompt: int, handler: Decode) -> Tensor:
    """Final states `[T, hidden size]` of the steps behind a prompt."""
    positions = torch.arange(prompt, len(ids))[None]
    with attached(model, handler), final_states(model) as states:
        model(input_ids=ids[None, prompt:], position_ids=positions, use_cache=False)
    return states()


@torch.no_grad()
def greedy(model: Any, ids: Tensor, first: int, prompt: Prompt, steps: int) -> Tensor:
    """A greedy continuation of `steps` tokens, of which the first is known."""
    tokens, cache = [first], {}
    while len(tokens) < steps:
        positions = torch.tensor([[len(ids) + len(tokens) - 1]])
        step = torch.tensor([[tokens[-1]]])
        with attached(model, _Step(prompt)):
            out = model(input_ids=step, position_ids=positions, **cache, use_cache=True)
        cache = cache_of(out)
        tokens.append(int(out.logits[0, -1].argmax()))
    return torch.tensor(tokens)


class _Step:
    """Attention handler: one dense step; the model's cache holds the steps before it alone."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt

    def __call__(self, call: AttentionCall) -> Tensor:
        query = call.query[0].unflatten(0, (call.key.shape[1], -1))[:, :, 0]  # [G, R, D]
        keys = (self.prompt.key[call.layer], call.key[0])
        weights = torch.cat([query @ key.mT for key in keys], -1).mul_(call.scale).softmax(-1)
        old, new = weights.split([key.shape[1] for key in keys], -1)
        out = old @ self.prompt.value[call.layer] + new @ call.value[0]
        return out.flatten(0, 1)[None, :, None]


def stream(task: str, tokenizer: Any, length: int, seed: int) -> tuple[str, list[tuple[str, str]]]:
    """A prompt of at most `length` tokens, and what follows: right answers and next questions.

    Each piece is an answer and the question behind it. There is none for plain text.
    """
    draw = random.Random(f"decode-{task}-{seed}")
    if task == "text":
        return generate("text", tokenizer, length, seed).prompt, []
    if task == "quotation":
        words = Haystack(draw)
        size = int(length / 1.7)
        while len(encode(tokenizer, quotation(words.words(size))[0])) > length:
            size = int(size * 0.98)
        prompt, answer = quotation(words.words(size))
        return prompt, [(answer, "")]
    if task == "needle":
        seeds = (seed * 1000 + n for n in range(1000))
        examples = (generate("needle", tokenizer, length, n) for n in seeds)
        prompt = next(e.prompt for e in examples if len(_NEEDLE.findall(e.prompt)) >= _most(length))
        pairs, ask, answer = _NEEDLE.findall(prompt), wording.needle_query, wording.value_answer
    else:
        prompt = generate("retr_kv", tokenizer, length, seed).prompt
        pairs, ask, answer = _KV.findall(prompt), wording.kv_query, wording.kv_answer
    values = dict(pairs)
    asked = [next(key for key in values if prompt.endswith(ask(key)))]
    others = sorted(values.keys() - set(asked))
    asked += draw.sample(others, len(others))
    after = [ask(key) for key in asked[1:]] + [""]
    return prompt, [(answer(values[key]), q) for key, q in zip(asked, after, strict=True)]


def _most(length: int) -> int:
    """Needles of a prompt; generated prompts hold no more than these."""
    return min(_NEEDLES, length // 128)


def quotation(words: Sequence[str]) -> tuple[str, str]:
    """A text with the beginning of a passage behind it, and how that passage goes on."""
    start = int(len(words) * _QUOTED_FROM)
    begun = "".join(words[start : start + _QUOTED_WORDS])
    asked = "\n\nA passage of this text, word for word:\n\n"
    return "".join(words) + asked + begun, "".join(words[start + _QUOTED_WORDS :])


@torch.no_grad()
def capture(options: argparse.Namespace) -> None:
    """Runs a prompt and its decode steps densely and writes them."""
    tokenizer = load_tokenizer(options.model)
    model = load_model(options.model, device="cpu", dtype="float32")
    room = options.length - options.steps
    text, pieces = stream(options.task, tokenizer, room, options.seed)
    ids = encode(tokenizer, text)
    prefill = Prefill()
    with attached(model, prefill):
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=1).logits
    maps = torch.stack(prefill.last), torch.stack(prefill.vertical)
    prompt = Prompt(
        [key.float() for key in prefill.key],
        [value.float() for value in prefill.value],
        *map(list, maps),
    )
    answers, tokens = [], []
    for answer, question in pieces:
        start = len(tokens)
        tokens += tokenizer(answer, add_special_tokens=False).input_ids
        answers.append((start, len(tokens)))
        tokens += tokenizer(question, add_special_tokens=False).input_ids
    follow = torch.tensor(tokens[: options.steps])
    if not pieces:
        follow = greedy(model, ids, int(logits[0, -1].argmax()), prompt, options.steps)
    whole = torch.cat((ids, follow))
    handler = Decode(prompt)
    states = run_steps(model, whole, len(ids), handler)
    keys = torch.cat((torch.stack(prefill.key), torch.stack(handler.key)), 2)
    found = Captured(
        *(options.task, whole, len(ids)),
        [(a, min(b, len(follow))) for a, b in answers if b <= len(follow) or a == 0],
        *(keys, torch.stack(prefill.value), torch.stack(handler.query), *maps, states),
        scale=prefill.scale,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found.save(options.out)
    right = answers_right(found, top_tokens(model, states))
    print(f"{options.out.stem}: {len(ids)} + {found.steps} tokens, answers {right}")
    if not pieces:
        print(repr(tokenizer.decode(follow)[:300]))


def steps_of(
    captured: Captured, block: int, *, by_head: bool, heads: Tensor | None = None
) -> list[Steps]:
    """The captured steps of every layer."""
    found = []
    for layer in range(len(captured.key)):
        query, key = captured.query[layer].float(), captured.key[layer].float()
        weights = attention(query, key, captured.scale)
        maps = captured.last[layer], captured.vertical[layer]
        found.append(
            layer_steps(
                *(weights, query, key, *maps),
                block=block,
                by_head=by_head,
                heads=None if heads is None else heads[layer],
            )
        )
    return found


def calibration_of(
    options: argparse.Namespace, block: int, *, by_head: bool = False, weighed: bool = False
) -> Calibration:
    """Captured prompts as pivots and cuts are chosen on them, with heads' effects.

    Args:
        options: Of the command line.
        block: Tokens a key block.
        by_head: Units are query heads.
        weighed: Query heads count in their KV head by their effect.
    """
    prompts, layers = [], 0
    effects = effects_of(options)
    for path in options.calibrate:
        heads = effects if weighed else None
        every = steps_of(Captured.load(path, options.steps), block, by_head=by_head, heads=heads)
        layers = len(every)
        joined = {
            name: torch.cat([getattr(steps, name) for steps in every])
            for name in ("mass", "bounds", "last", "vertical")
        }
        prompts.append(replace(every[0], **joined))
    if effects is None:
        return Calibration(layers, prompts)
    units = len(prompts[0].mass) // layers
    return Calibration(layers, prompts, effects.unflatten(1, (units, -1)).sum(2).flatten())


def effects_of(options: argparse.Namespace) -> Tensor | None:
    """KL divergence for every head's squared lost attention `[L, H]`, where it was measured."""
    return None if options.effect is None else torch.load(options.effect)


def by_effect(spec: str) -> bool:
    """Whether a policy weighs heads by their effect."""
    return spec.endswith("+effect") or spec == "planned"


@torch.no_grad()
def recall(options: argparse.Namespace) -> None:
    """Attention inside what every policy reads, by density; nothing is run."""
    rows = []
    for block in options.block:
        calibration = calibration_of(options, block, by_head=options.by_head)
        policies = {
            (spec, density): make_policy(spec, density, block, calibration)
            for spec, density in product_of(options)
        }
        for path in options.captured:
            captured = Captured.load(path, options.steps)
            every = steps_of(captured, block, by_head=options.by_head)
            for (spec, density), policy in policies.items():
                if policy is None:
                    continue
                held, reads, union = [], [], []
                for layer, steps in enumerate(every):
                    keep = policy.keep(layer, steps)
                    held.append((steps.mass * keep).sum(-1).mean(1))  # [U]
                    reads.append((keep.sum(-1) / steps.visible.sum(-1)).mean(1))
                    groups = captured.key.shape[1]
                    joint = keep.unflatten(0, (groups, -1)).any(1)
                    union.append((joint.sum(-1) / steps.visible.sum(-1)).mean(1))
                by_unit = torch.cat(held)
                worst = by_unit.sort().values[: max(1, len(by_unit) // 20)].mean()
                rows.append(
                    {
                        **described(captured, path, spec, density, block),
                        "recall": by_unit.mean().item(),
                        "worst": worst.item(),
                        "reads": torch.cat(reads).mean().item() + policy.extra,
                        "kv_reads": torch.cat(union).mean().item() + policy.extra,
                    }
                )
                show_row(rows[-1])
    write(options, "recall by head" if options.by_head else "recall by KV head", rows)


@torch.no_grad()
def kl(options: argparse.Namespace) -> None:
    """Runs the steps under every policy; KV heads are the units."""
    model = load_model(options.model, device="cpu", dtype="float32")
    rows = []
    for block in options.block:
        plain = calibration_of(options, block)
        effects = effects_of(options)
        weighed = None if effects is None else calibration_of(options, block, weighed=True)
        policies = {}
        for spec, density in product_of(options):
            calibration = weighed if weighed is not None and by_effect(spec) else plain
            policies[spec, density] = make_policy(spec, density, block, calibration)
        for path in options.captured:
            captured = Captured.load(path, options.steps)
            prompt = prompt_of(captured)
            for (spec, density), policy in policies.items():
                if policy is None:
                    continue
                heads = effects if by_effect(spec) else None
                handler = Decode(prompt, policy, block, heads)
                states = run_steps(model, captured.ids, captured.prompt, handler)
                reads = sum(handler.kept) / len(handler.kept)
                row = described(captured, path, spec, density, block)
                rows.append({**row, "reads": reads, **outcome(model, captured, states)})
                show_row(rows[-1])
                write(options, "kl", rows)


class Traced(HasGradients):
    """Attention handler: dense steps, and what each head's output loses if it reads few blocks.

    Attributes:
        outputs: Of every layer `[1, H, T, D]`; their gradients can be asked for.
        change: What reading the best blocks alone changes them by.
        lost: Attention outside of those blocks, `[H, T]`.
    """

    def __init__(self, prompt: Prompt, block: int, density: float) -> None:
        self.prompt, self.block, self.density = prompt, block, density
        self.outputs: list[Tensor] = []
        self.change: list[Tensor] = []
        self.lost: list[Tensor] = []

    def __call__(self, call: AttentionCall) -> Tensor:
        prompt, layer = self.prompt, call.layer
        key = torch.cat((prompt.key[layer], call.key[0]), 1)
        value = torch.cat((prompt.value[layer], call.value[0]), 1)[:, None]
        weights = attention(call.query[0], key, call.scale)
        out = (weights @ value).flatten(0, 1)[None]
        if not out.requires_grad:
            out = out.detach().requires_grad_()
        out.retain_grad()
        self.outputs.append(out)
        with torch.no_grad():
            maps = prompt.last[layer], prompt.vertical[layer]
            sizes = {"block": self.block, "by_head": True}
            steps = layer_steps(weights, call.query[0], key, *maps, **sizes)
            keep = Ordered("mass", self.density).keep(layer, steps)
            read = keep.repeat_interleave(self.block, -1)[..., : key.shape[1]]
            few = weights * read.view_as(weights)
            few = few @ value / few.sum(-1, keepdim=True)
            self.change.append(few.flatten(0, 1) - out[0])
            self.lost.append(1 - (steps.mass * keep).sum(-1))
        return out


def effect(options: argparse.Namespace) -> None:
    """KL divergence for every head's mean squared lost attention, `[L, H]`, over the prompts.

    As `sp calibrate` measures it of prefills: tokens are drawn from the model's predictions, and
    the gradient of their log likelihood tells what a change of each head's output does.
    """
    model: Any = load_model(options.model, device="cpu", dtype="float32").requires_grad_(False)
    caused, mass = 0.0, 0.0
    for path in options.calibrate:
        captured = Captured.load(path, options.steps)
        positions = torch.arange(captured.prompt, len(captured.ids))[None]
        ids = captured.ids[None, captured.prompt :]
        handler = Traced(prompt_of(captured), options.block[0], options.density[0])
        with attached(model, handler), final_states(model) as states:
            model(input_ids=ids, position_ids=positions, use_cache=False)
        for draw in range(DRAWS):
            generator = torch.Generator().manual_seed(draw)
            score = sampled_score(model, states(), generator)
            grads = torch.autograd.grad(states(), handler.outputs, score, retain_graph=True)
            change = [(g[0] * c).sum(-1) for g, c in zip(grads, handler.change, strict=True)]
            # Half of the mean square: the KL divergence of all steps, to second order.
            caused = caused + torch.stack(change).square().sum(-1) / 2 / DRAWS
        mass = mass + torch.stack(handler.lost).square().sum(-1)
        print(path.stem, flush=True)
    # A head's own figure, mixed with a quarter of its layer's.
    prior = mass.mean(1, keepdim=True) / 4
    of_layer = caused.sum(1, keepdim=True) / mass.sum(1, keepdim=True)
    found = (caused + prior * of_layer) / (mass + prior)
    print("by layer", " ".join(f"{e:.3g}" for e in found.mean(1).tolist()))
    torch.save(found, options.out)


@torch.no_grad()
def plan(options: argparse.Namespace) -> None:
    """Runs prompt and steps as one prefill under artifacts: KL at the steps' tokens."""
    model = load_model(options.model, device="cpu", dtype="float32")
    rows = []
    for path in options.captured:
        captured = Captured.load(path, options.steps)
        for artifact in options.artifact:
            # Sparse even where this device would gain nothing by it.
            config = RuntimeConfig(min_tokens=0, max_density=1.0)
            session = share_prefill(model, load_artifact(artifact), config)
            with session, final_states(model) as states:
                model(input_ids=captured.ids[None], use_cache=False, logits_to_keep=1)
            report = session.report()
            row = described(captured, path, f"prefill plan {artifact.stem}", report.density, 128)
            found = outcome(model, captured, states()[captured.prompt :])
            rows.append({**row, "reads": report.density, **found})
            show_row(rows[-1])
            write(options, "plan", rows)


def outcome(model: Any, captured: Captured, states: Tensor) -> dict[str, Any]:
    """KL divergence from the dense steps, and answers."""
    fidelity: Fidelity = compare_predictions(model, captured.states, states)
    dense, found = (top_tokens(model, s) for s in (captured.states, states))
    return {
        "kl": fidelity.mean_kl,
        "kl_99": fidelity.kl.quantile(0.99).item(),
        "agrees": fidelity.top1_agreement,
        "dense_answers": answers_right(captured, dense),
        "answers": answers_right(captured, found),
    }


@torch.no_grad()
def top_tokens(model: Any, states: Tensor) -> Tensor:
    """The likeliest next token of every step, int64 `[T]`."""
    head = model.get_output_embeddings()
    return torch.cat([head(piece).argmax(-1) for piece in states.split(128)])


def answers_right(captured: Captured, top: Tensor) -> dict[str, int]:
    """Right answers and tokens of them, and how many there are; the prefill gives the first token.

    Args:
        captured: With the right answers.
        top: The likeliest token after every step.
    """
    right = top[:-1] == captured.ids[captured.prompt + 1 :]
    counts = {"right": 0, "answers": 0, "tokens": 0, "of": 0}
    for start, stop in captured.answers:
        span = right[max(0, start - 1) : stop - 1]
        counts["right"] += int(span.all())
        counts["answers"] += 1
        counts["tokens"] += int(span.sum())
        counts["of"] += len(span)
    return counts


def product_of(options: argparse.Namespace) -> list[tuple[str, float]]:
    """Every policy at every density."""
    specs = options.policy or POLICIES
    return [(spec, density) for spec in specs for density in options.density]


def described(
    captured: Captured, path: Path, spec: str, density: float, block: int
) -> dict[str, Any]:
    """What a row is of."""
    return {
        "task": captured.task,
        "prompt": path.stem,
        "tokens": captured.prompt,
        "steps": captured.steps,
        "policy": spec,
        "density": density,
        "block": block,
    }


def show_row(row: dict[str, Any]) -> None:
    """Prints a row as it comes."""
    cells = [f"{k} {v:.4f}" if isinstance(v, float) else f"{v}" for k, v in row.items()]
    print("  ".join(cells), flush=True)


def write(options: argparse.Namespace, kind: str, rows: list[dict[str, Any]]) -> None:
    """Writes rows with what they belong to."""
    if options.json:
        found = {"kind": kind, "facts": provenance("cpu"), "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def show(options: argparse.Namespace) -> None:
    """Prints tables of means over prompts, and draws the picture."""
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in options.captured:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = found["rows"]
        if options.policy:
            rows = [row for row in rows if row["policy"] in options.policy]
        kinds[found["kind"]] += rows
    for kind, rows in kinds.items():
        print(f"\n### {kind}\n")
        for line in table(rows):
            print(line)
    if options.plot:
        figure_of(kinds).savefig(options.plot, metadata={"Date": None})


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Means over prompts by block, policy and density."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        density = None if row["policy"].startswith("prefill") else row["density"]
        groups[row["block"], row["policy"], density].append(row)
    columns = [c for c in ("reads", "kv_reads", "recall", "worst", "kl", "agrees") if c in rows[0]]
    lines = ["| block | policy | density | " + " | ".join([*columns, "answers", "tokens"]) + " |"]
    lines.append("| --- " * (len(columns) + 5) + "|")
    for (block, policy, density), found in groups.items():
        cells = [f"{sum(r[c] for r in found) / len(found):.4f}" for c in columns]
        if "answers" in rows[0]:
            ours = [sum(r["answers"][k] for r in found) for k in ("right", "answers")]
            dense = sum(r["dense_answers"]["right"] for r in found)
            tokens = [sum(r["answers"][k] for r in found) for k in ("tokens", "of")]
            dense_tokens = sum(r["dense_answers"]["tokens"] for r in found)
            cells += [f"{ours[0]}/{ours[1]} ({dense})", f"{tokens[0]}/{tokens[1]} ({dense_tokens})"]
        lines.append("| " + " | ".join(map(str, (block, policy, density, *cells))) + " |")
    return lines


def figure_of(kinds: dict[str, list[dict[str, Any]]]) -> Any:
    """Recall or KL against reads: a panel for each kind and prompt, a line for each policy."""
    from matplotlib.figure import Figure

    from shareprefill.report.drawing import figure_style

    panels: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for kind, rows in kinds.items():
        for row in rows:
            panels["kl" if kind == "plan" else kind, row["prompt"]].append(row)
    names = list(dict.fromkeys(row["policy"] for rows in panels.values() for row in rows))
    with figure_style():
        figure = Figure(figsize=(4.4 * len(panels) + 1.9, 3.9), layout="constrained")
        every = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, ((_, prompt), rows) in zip(every, panels.items(), strict=True):
            value = "kl" if "kl" in rows[0] else "recall"
            for number, name in enumerate(names):
                _line(axes, [row for row in rows if row["policy"] == name], value, name, number)
            axes.set_yscale("log" if value == "kl" else "linear")
            axes.set_title(prompt)
            axes.set_xlabel("bytes read / dense")
            axes.set_ylabel("KL from dense, nats" if value == "kl" else "recall")
            axes.grid(visible=True)
        handles, labels = every[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper")
    return figure


def _line(axes: Any, rows: list[dict[str, Any]], value: str, name: str, number: int) -> None:
    from shareprefill.report.drawing import INK, MARKERS, SERIES

    turn = number // len(SERIES)
    look = {
        "color": SERIES[number % len(SERIES)],
        "marker": MARKERS[(number + turn) % len(MARKERS)],
    }
    if name == "oracle":
        look = {"color": INK, "marker": "."}
    points = sorted((row["reads"], row[value]) for row in rows)
    x, y = [p[0] for p in points], [p[1] for p in points]
    axes.plot(x, y, label=name, markersize=6, **look)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and runs one of the commands."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    commands = {f.__name__: f for f in (capture, effect, recall, kl, plan, show)}
    parser.add_argument("command", choices=commands)
    parser.add_argument("captured", type=Path, nargs="*", help="written by capture; JSON for show")
    parser.add_argument("--model", help="a folder, a hub id, or sp-tiny")
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--length", type=int, default=8192, help="tokens of prompt and steps")
    parser.add_argument("--steps", type=int, default=256, help="at most")
    parser.add_argument("--seed", type=int, default=1001)
    parser.add_argument("--calibrate", type=Path, nargs="*", default=[], help="captured prompts")
    parser.add_argument("--effect", type=Path, help="written by effect")
    parser.add_argument("--artifact", type=Path, nargs="*", default=[], help="of sp cluster")
    parser.add_argument("--policy", nargs="*", help="several by default; for show, all")
    parser.add_argument("--density", type=float, nargs="*", default=list(DENSITIES))
    parser.add_argument("--block", type=int, nargs="*", default=[32])
    parser.add_argument("--by-head", action="store_true", help="units are query heads")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_intermixed_args(arguments)
    commands[options.command](options)


if __name__ == "__main__":
    main()
