"""Decoding with what the prefill learnt: how much attention a step keeps, and what it changes.

    python benchmarks/decode_study.py prompts --model DIR --calibrate --seed 1 --samples 1 \
        --out chosen.json
    python benchmarks/decode_study.py prompts --model DIR --out measured.json
    python benchmarks/decode_study.py run --model DIR --prompts chosen.json measured.json \
        --artifact x.st --json model.json
    python benchmarks/decode_study.py session --model DIR --prompts measured.json \
        --artifact x.st --density .15 --json session.json
    python benchmarks/decode_study.py show --plot decoding.svg model.json other.json

`prompts` writes prompts and what follows them. Tasks with a right answer are given it, question
after question: the greedy answer is right exactly when every token of it is the likeliest one.
Plain text goes on greedily; `run` adds those tokens to the file.

`run` runs every prompt densely, and the decode steps behind it under each policy: blocks that a
policy does not read are hidden from its attention, in all layers, so that errors add up over steps
and layers as in decoding. All steps go through the model in one pass, as none depends on a token
that a policy would have chosen. With an artifact it also runs each prompt as a sparse prefill, and
the steps densely on the keys and values that this one left: what the prefill's own plan costs. Such
prefills are in bfloat16, all else in float32; the same of a dense prefill says what that costs.
Pivots, cuts, prices and effects come from other prompts, those of `--calibrate`.

`session` runs what users run: a session with `decode="sparse"`, token after token, prompts of a
length together in one padded batch, after a dense prefill. Effects are those of the artifact; all
heads count alike without one. Its density is of key blocks, without the sketch.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from decode_policies import (
    Basis,
    Calibration,
    Policy,
    Steps,
    by_block,
    causal_logits,
    first,
    level_counts,
    make_basis,
    make_policy,
    ranked,
)
from provenance import provenance
from torch import Tensor
from torch.nn import functional as F

from shareprefill.artifact import load_artifact
from shareprefill.calib.tasks import generate, wording
from shareprefill.calib.tasks.haystack import Haystack
from shareprefill.config import RuntimeConfig
from shareprefill.models import load_model, load_tokenizer, text_decoder
from shareprefill.runtime.fidelity import compare_predictions, final_states, sampled_score
from shareprefill.runtime.generation import cache_of
from shareprefill.runtime.interface import AttentionCall, HasGradients, attached
from shareprefill.runtime.ops.sketched_selection import Moments
from shareprefill.runtime.session import share_prefill
from shareprefill.tokens import encode

TASKS = ("retr_kv", "needle", "quotation", "text")
DENSITIES = (0.05, 0.1, 0.2, 0.3)
POLICIES = (
    *("oracle", "oracle+adaptive", "last", "vertical", "quest", "own/8", "own/64"),
    *("pivots:.05", "pivots:.05/8", "pivots:.1+effect", "pivots:.15+effect"),
    *("sketch:24x4", "sketch:24x4+adaptive"),
)
# Query rows of the prompt: the last ones, and one in so many of all.
LAST, EVERY = 128, 8
# Rows that the coordinates of a sketch are chosen by: so many of the last ones, one in so many.
BASIS_ROWS, BASIS_EVERY = 2048, 8
# Sets of tokens that a prompt's effects are measured with, and reads that they are measured at.
DRAWS, EFFECT_READS = 4, 0.1
_NEEDLES, _QUOTED_FROM, _QUOTED_WORDS = 8, 0.4, 24
_KV = re.compile(r'"([0-9a-f-]{36})": "([0-9a-f-]{36})"')
_NEEDLE = re.compile(r"magic numbers for (\S+) is: (\d+)\.")


@dataclass(frozen=True)
class Sample:
    """A prompt and what follows it.

    Attributes:
        task: Task.
        calibrates: Whether it is one that policies are chosen on, or one that is measured.
        prompt: Tokens of the prompt.
        follow: Tokens of the decode steps; none where they are yet to be generated.
        answers: First and last but one of the steps' tokens of every right answer.
    """

    task: str
    calibrates: bool
    prompt: list[int]
    follow: list[int]
    answers: list[tuple[int, int]]

    @property
    def ids(self) -> Tensor:
        """Tokens of prompt and steps, int64 `[N + T]`."""
        return torch.tensor(self.prompt + self.follow)


@dataclass(frozen=True)
class Prompt:
    """What decode steps read of a prompt, by layer.

    Attributes:
        key: `[G, N, D]`.
        value: `[G, N, D]`.
        last: Mean attention of the prompt's last rows by token, `[H, N]`.
        vertical: The same of rows of the whole prompt.
        basis: Coordinates of keys and queries.
    """

    key: list[Tensor]
    value: list[Tensor]
    last: list[Tensor]
    vertical: list[Tensor]
    basis: list[Basis]


class Prefill:
    """Attention handler: dense, keeping keys, values and what the prompt's rows attend to."""

    def __init__(self) -> None:
        self.key: list[Tensor] = []
        self.value: list[Tensor] = []
        self.query: list[Tensor] = []
        self.last: list[Tensor] = []
        self.vertical: list[Tensor] = []

    def __call__(self, call: AttentionCall) -> Tensor:
        query, key = call.query[0], call.key[0]
        repeats, rows = len(query) // len(key), query.shape[1]
        self.key.append(key)
        self.value.append(call.value[0])
        every = torch.arange(EVERY - 1, rows, EVERY, device=key.device)
        self.vertical.append(_mean_map(query[:, every], every, key, call.scale))
        tail = torch.arange(max(0, rows - LAST), rows, device=key.device)
        self.last.append(_mean_map(query[:, tail], tail, key, call.scale))
        of_basis = torch.arange(max(0, rows - BASIS_ROWS), rows, BASIS_EVERY, device=key.device)
        self.query.append(query[:, of_basis].unflatten(0, (len(key), -1)).flatten(1, 2))
        whole = (t[0].repeat_interleave(repeats, 0)[None] for t in (call.key, call.value))
        return F.scaled_dot_product_attention(call.query, *whole, is_causal=True, scale=call.scale)

    def prompt(self) -> Prompt:
        """What it kept."""
        bases = bases_of(self.moments())
        return Prompt(self.key, self.value, self.last, self.vertical, bases)

    def moments(self) -> Moments:
        """What all layers' coordinates are chosen by, `[L, G, ...]`."""
        return Moments.of(torch.stack(self.query), torch.stack(self.key))


def bases_of(moments: Moments) -> list[Basis]:
    """Coordinates of every layer."""
    basis = make_basis(moments)
    return [Basis(*part) for part in zip(*vars(basis).values(), strict=True)]


def _mean_map(query: Tensor, rows: Tensor, key: Tensor, scale: float) -> Tensor:
    """Mean attention of query rows `[H, rows, D]` by key `[H, N]`."""
    total = query.new_zeros(len(query), key.shape[1])
    places = torch.arange(key.shape[1], device=key.device)
    for piece, positions in zip(query.split(256, 1), rows.split(256), strict=True):
        logits = piece.unflatten(0, (len(key), -1)) @ key[:, None].mT * scale
        logits.masked_fill_(places > positions[:, None], -torch.inf)
        total += logits.softmax(-1).sum(2).flatten(0, 1)
    return total / len(rows)


class Decode:
    """Attention handler: the steps behind a prompt, densely or under a policy.

    Attributes:
        steps: Of every layer, without a policy.
        reads: Of every layer, mean over KV heads and steps.
        recall: Attention in what is read, of every layer `[H]`, mean over steps.
    """

    def __init__(
        self, prompt: Prompt, share: Tensor | None, policy: Policy | None, block: int
    ) -> None:
        self.prompt, self.share, self.policy, self.block = prompt, share, policy, block
        self.steps: list[Steps] = []
        self.reads: list[Tensor] = []
        self.recall: list[Tensor] = []

    def __call__(self, call: AttentionCall) -> Tensor:
        key, value = joined(self.prompt, call)
        logits = logits_of(call, key)
        if self.share is None:
            return (logits.softmax(-1) @ value[:, None]).flatten(0, 1)[None]
        steps = layer_steps(self.prompt, self.share, call, key, logits, self.block)
        if self.policy is None:
            self.steps.append(steps)
            return (logits.softmax(-1) @ value[:, None]).flatten(0, 1)[None]
        keep = self.policy.keep(call.layer, steps)
        self.reads.append((keep.sum(-1) / steps.visible.sum(-1)).mean() + self.policy.extra)
        self.recall.append((steps.heads * keep[:, None]).sum(-1).mean(2).flatten())
        tokens = keep.repeat_interleave(self.block, -1)[:, None, :, : key.shape[1]]
        if self.policy.means:
            guessed = self.policy.sketched_logits(call.layer, steps)
            return with_means(logits, guessed, tokens, value, self.block)[None]
        logits.masked_fill_(~tokens, -torch.inf)
        return (logits.softmax(-1) @ value[:, None]).flatten(0, 1)[None]


def with_means(
    logits: Tensor, guessed: Tensor, tokens: Tensor, value: Tensor, block: int
) -> Tensor:
    """Attention `[H, T, Dv]` where blocks that are not read stand in by their mean value.

    Args:
        logits: `[G, R, T, M]`.
        guessed: What is known of them where nothing is read.
        tokens: Those that are read, bool `[G, 1, T, M]`.
        value: `[G, M, Dv]`.
        block: Tokens a key block.
    """
    tops = torch.maximum(logits.amax(-1, keepdim=True), guessed.amax(-1, keepdim=True))
    rest = by_block((guessed - tops).exp().masked_fill(tokens, 0), block)  # [G, R, T, n]
    read = (logits - tops).exp().masked_fill(~tokens, 0)
    padded = F.pad(value, (0, 0, 0, -value.shape[1] % block)).unflatten(1, (-1, block))
    out = read @ value[:, None] + rest @ padded.mean(2)[:, None]
    return (out / (read.sum(-1, keepdim=True) + rest.sum(-1, keepdim=True))).flatten(0, 1)


def joined(prompt: Prompt, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Keys and values of prompt and steps, `[G, M, D]` each."""
    key = torch.cat((prompt.key[call.layer], call.key[0]), 1)
    return key, torch.cat((prompt.value[call.layer], call.value[0]), 1)


def logits_of(call: AttentionCall, key: Tensor) -> Tensor:
    """Of the steps, `[G, R, T, M]`."""
    query = call.query[0].unflatten(0, (len(key), -1))
    return causal_logits((query * call.scale) @ key[:, None].mT)


def layer_steps(
    prompt: Prompt, share: Tensor, call: AttentionCall, key: Tensor, logits: Tensor, block: int
) -> Steps:
    """The steps of one layer, as a policy sees them.

    Args:
        prompt: What is before them.
        share: Weights of query heads, `[L, G, R]`.
        call: Of the layer.
        key: Of prompt and steps, `[G, M, D]`.
        logits: `[G, R, T, M]`.
        block: Tokens a key block.
    """
    layer, steps, groups = call.layer, call.key.shape[2], len(key)
    maps = (F.pad(m[layer], (0, steps)) for m in (prompt.last, prompt.vertical))
    return Steps(
        by_block(logits.softmax(-1), block),
        share[layer],
        call.query[0].unflatten(0, (groups, -1)),
        key,
        call.scale,
        *(by_block(m, block).unflatten(0, (groups, -1)) for m in maps),
        basis=prompt.basis[layer],
        prompt=key.shape[1] - steps,
        block=block,
    )


class Traced(HasGradients):
    """Attention handler: dense steps, and what each head's output loses if it reads few blocks.

    Attributes:
        outputs: Of every layer `[1, H, T, D]`; their gradients can be asked for.
        change: What reading the best blocks alone changes them by.
        lost: Attention outside of those blocks, `[H, T]`.
    """

    def __init__(self, prompt: Prompt, share: Tensor, block: int) -> None:
        self.prompt, self.share, self.block = prompt, share, block
        self.outputs: list[Tensor] = []
        self.change: list[Tensor] = []
        self.lost: list[Tensor] = []

    def __call__(self, call: AttentionCall) -> Tensor:
        key, value = joined(self.prompt, call)
        weights = logits_of(call, key).softmax(-1)
        out = (weights @ value[:, None]).flatten(0, 1)[None]
        if not out.requires_grad:
            out = out.detach().requires_grad_()
        out.retain_grad()
        self.outputs.append(out)
        with torch.no_grad():
            steps = layer_steps(
                self.prompt, self.share, call, key, logits_of(call, key), self.block
            )
            heads, always, visible = steps.heads.flatten(0, 1), steps.always(), steps.visible
            counts = level_counts(EFFECT_READS, always, visible).expand(heads.shape[:2])
            keep = first(ranked(heads, always, visible), counts)
            read = keep.repeat_interleave(self.block, -1)[..., : key.shape[1]]
            few = weights * read.view_as(weights)
            few = few @ value[:, None] / few.sum(-1, keepdim=True)
            self.change.append(few.flatten(0, 1) - out[0])
            self.lost.append(1 - (heads * keep).sum(-1))
        return out


class Study:
    """A model, and what policies are chosen on.

    Attributes:
        model: In float32.
        half: In bfloat16, where there are artifacts to prefill by.
        share: Weight of every query head in its KV head, of sum 1, `[L, G, R]`.
        block: Tokens a key block.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        loaded: Any = load_model(options.model, device=options.device, dtype="float32")
        self.model = loaded.requires_grad_(False)
        self.half: Any = None
        if options.artifact:
            self.half = load_model(options.model, device=options.device, dtype="bfloat16")
        self.device, self.block = torch.device(options.device), options.block
        config = loaded.config
        groups = config.num_key_value_heads
        shape = config.num_hidden_layers, groups, config.num_attention_heads // groups
        self.share = torch.full(shape, 1 / shape[2], device=self.device)

    def prefill(self, sample: Sample) -> Prompt:
        """Runs a prompt densely."""
        return self.read(sample).prompt()

    @torch.no_grad()
    def read(self, sample: Sample) -> Prefill:
        """What was kept of a prompt that was run densely."""
        handler = Prefill()
        ids = torch.tensor(sample.prompt, device=self.device)
        with attached(self.model, handler):
            self.model(input_ids=ids[None], use_cache=False, logits_to_keep=1)
        return handler

    @torch.no_grad()
    def half_prefill(self, sample: Sample, artifact: Path | None) -> tuple[Prompt, float]:
        """Keys and values that a prefill in bfloat16 leaves, and its density; dense without a plan.

        The plan is followed even where this device would gain nothing by it.
        """
        config = RuntimeConfig(min_tokens=0, max_density=1.0)
        ids = torch.tensor(sample.prompt, device=self.device)[None]
        if artifact is None:
            out, density = self.half(input_ids=ids, use_cache=True, logits_to_keep=1), 1.0
        else:
            with share_prefill(self.half, load_artifact(artifact), config) as session:
                out = self.half(input_ids=ids, use_cache=True, logits_to_keep=1)
            density = session.report().density
        [cache] = cache_of(out).values()
        kept = [(layer.keys[0].float(), layer.values[0].float()) for layer in cache.layers]
        return Prompt([k for k, _ in kept], [v for _, v in kept], [], [], []), density

    def steps(self, sample: Sample, handler: Any) -> Tensor:
        """Final states `[T, hidden size]` of the steps behind a prompt."""
        ids = sample.ids.to(self.device)
        start = len(sample.prompt)
        positions = torch.arange(start, len(ids), device=self.device)[None]
        with attached(self.model, handler), final_states(self.model) as states:
            self.model(input_ids=ids[None, start:], position_ids=positions, use_cache=False)
        return states()

    def calibrate(self, samples: Sequence[Sample]) -> Calibration:
        """Effects of heads and KV heads, and the steps that policies are chosen on."""
        prompts = [self.prefill(sample) for sample in samples]
        pairs = list(zip(samples, prompts, strict=True))
        effect = self.head_effects(pairs).view_as(self.share)
        self.share = effect / effect.sum(-1, keepdim=True)
        found = []
        for sample, prompt in pairs:
            handler = Decode(prompt, self.share, None, self.block)
            with torch.no_grad():
                self.steps(sample, handler)
            found.append(handler.steps)
        return Calibration(found, effect.sum(-1).flatten())

    def head_effects(self, pairs: Sequence[tuple[Sample, Prompt]]) -> Tensor:
        """KL divergence for every head's mean squared lost attention, `[L, H]`, over the prompts.

        As `sp calibrate` measures it of prefills: tokens are drawn from the model's predictions,
        and the gradient of their log likelihood tells what a change of each head's output does.
        """
        caused, mass = torch.zeros(()), torch.zeros(())
        for sample, prompt in pairs:
            handler = Traced(prompt, self.share, self.block)
            states = self.steps(sample, handler)
            found = torch.zeros((), device=self.device)
            for draw in range(DRAWS):
                score = sampled_score(self.model, states, draw)
                grads = torch.autograd.grad(states, handler.outputs, score, retain_graph=True)
                change = [(g[0] * c).sum(-1) for g, c in zip(grads, handler.change, strict=True)]
                # Half of the mean square: the KL divergence of all steps, to second order.
                found = found + torch.stack(change).square().sum(-1) / 2 / DRAWS
            caused = caused + found.cpu()
            mass = mass + torch.stack(handler.lost).square().sum(-1).cpu()
        # A head's own figure, mixed with a quarter of its layer's.
        prior = mass.mean(1, keepdim=True) / 4
        of_layer = caused.sum(1, keepdim=True) / mass.sum(1, keepdim=True)
        return ((caused + prior * of_layer) / (mass + prior)).to(self.device)

    @torch.no_grad()
    def top_tokens(self, states: Tensor) -> Tensor:
        """The likeliest next token of every step, int64 `[T]`."""
        head = self.model.get_output_embeddings()
        return torch.cat([head(piece).argmax(-1) for piece in states.split(128)]).cpu()

    def outcome(self, sample: Sample, dense: Tensor, states: Tensor) -> dict[str, Any]:
        """KL divergence from the dense steps, and answers."""
        fidelity = compare_predictions(self.model, dense, states)
        return {
            "kl": fidelity.mean_kl,
            "kl_99": fidelity.kl.quantile(0.99).item(),
            "agrees": fidelity.top1_agreement,
            "dense_answers": answers_right(sample, self.top_tokens(dense)),
            "answers": answers_right(sample, self.top_tokens(states)),
        }

    @torch.no_grad()
    def continue_greedily(self, prompts: list[list[int]], steps: int) -> list[list[int]]:
        """Greedy continuations of prompts of one length, by the model itself."""
        out = self.model(
            input_ids=torch.tensor(prompts, device=self.device), use_cache=True, logits_to_keep=1
        )
        tokens = [out.logits[:, -1:].argmax(-1)]  # [B, 1]
        while len(tokens) < steps:
            out = self.model(input_ids=tokens[-1], **cache_of(out), use_cache=True)
            tokens.append(out.logits[:, -1:].argmax(-1))
        return torch.cat(tokens, 1).tolist()


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


def make_sample(
    task: str, tokenizer: Any, length: int, steps: int, seed: int, *, calibrates: bool
) -> Sample:
    """A prompt of at most `length` tokens and at most `steps` tokens that follow."""
    text, pieces = stream(task, tokenizer, length, seed)
    answers, tokens = [], []
    for answer, question in pieces:
        start = len(tokens)
        tokens += tokenizer(answer, add_special_tokens=False).input_ids
        answers.append((start, len(tokens)))
        tokens += tokenizer(question, add_special_tokens=False).input_ids
    follow = tokens[:steps]
    answers = [(a, min(b, len(follow))) for a, b in answers if b <= len(follow) or a == 0]
    prompt = encode(tokenizer, text).tolist()
    if not pieces:
        # Of one length, so that they go on together.
        prompt = prompt[: length * 15 // 16]
    return Sample(task, calibrates, prompt, follow, answers)


def prompts(options: argparse.Namespace) -> None:
    """Writes prompts of every task and length, or with `--calibrate` those of policies' choice."""
    tokenizer = load_tokenizer(options.model)
    found = []
    for length in options.length:
        for seed in range(options.seed, options.seed + options.samples):
            for task in options.task:
                sizes = length - options.steps, options.steps, seed
                found.append(make_sample(task, tokenizer, *sizes, calibrates=options.calibrate))
                print(task, seed, len(found[-1].prompt), len(found[-1].follow), flush=True)
    save_samples(options.out, found, options.steps)


def save_samples(path: Path, samples: Sequence[Sample], steps: int) -> None:
    """Writes them as JSON."""
    content = {"steps": steps, "samples": [asdict(sample) for sample in samples]}
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def load_samples(path: Path, study: Study) -> list[Sample]:
    """Reads them; greedy continuations that they lack are made, and written."""
    content = json.loads(path.read_text(encoding="utf-8"))
    samples = [Sample(**row) for row in content["samples"]]
    lengths = sorted({len(s.prompt) for s in samples if not s.follow})
    for length in lengths:
        places = [n for n, s in enumerate(samples) if not s.follow and len(s.prompt) == length]
        found = study.continue_greedily([samples[n].prompt for n in places], content["steps"])
        for place, follow in zip(places, found, strict=True):
            old = samples[place]
            samples[place] = Sample(old.task, old.calibrates, old.prompt, follow, [])
    if lengths:
        save_samples(path, samples, content["steps"])
    return samples


def run(options: argparse.Namespace) -> None:
    """Runs prompts and their steps under every policy, and as sparse prefills."""
    clock = time.perf_counter()
    study = Study(options)
    samples = [sample for path in options.prompts for sample in load_samples(path, study)]
    print(f"loaded, continued: {time.perf_counter() - clock:.1f} s", flush=True)
    calibration = study.calibrate([s for s in samples if s.calibrates])
    print(f"calibrated: {time.perf_counter() - clock:.1f} s", flush=True)
    with torch.no_grad():
        policies = {
            (spec, density): make_policy(spec, density, calibration)
            for spec in options.policy or POLICIES
            for density in options.density
        }
    print(f"chosen: {time.perf_counter() - clock:.1f} s", flush=True)
    rows: list[dict[str, Any]] = []
    measured = [s for s in samples if not s.calibrates and s.task in options.task]

    def note(sample: Sample, found: list[dict[str, Any]]) -> None:
        rows.extend(found)
        print(
            f"{sample.task} {len(sample.prompt)}: {time.perf_counter() - clock:.1f} s", flush=True
        )
        facts = provenance(options.device, options.commit)
        options.json.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")

    every_dense = []
    for sample in measured:
        dense, found = policy_rows(study, sample, policies)
        every_dense.append(dense)
        note(sample, found)
    for sample, dense in zip(measured, every_dense, strict=True):
        if options.artifact:
            note(sample, plan_rows(study, sample, dense, options.artifact))


def about(study: Study, sample: Sample) -> dict[str, Any]:
    """What a row is of."""
    return {
        "model": Path(study.model.config.name_or_path).name,
        "task": sample.task,
        "tokens": len(sample.prompt),
        "steps": len(sample.follow),
        "block": study.block,
    }


@torch.no_grad()
def policy_rows(
    study: Study, sample: Sample, policies: dict[tuple[str, float], Policy | None]
) -> tuple[Tensor, list[dict[str, Any]]]:
    """The dense steps' final states, and a row for every policy of one prompt."""
    prompt = study.prefill(sample)
    dense = study.steps(sample, Decode(prompt, None, None, study.block))
    rows = []
    for (spec, density), policy in policies.items():
        if policy is None:
            continue
        handler = Decode(prompt, study.share, policy, study.block)
        states = study.steps(sample, handler)
        heads = torch.cat(handler.recall)
        rows.append(
            {
                **about(study, sample),
                "policy": spec,
                "density": density,
                "reads": torch.stack(handler.reads).mean().item(),
                "recall": heads.mean().item(),
                "worst": heads.sort().values[: max(1, len(heads) // 20)].mean().item(),
                **study.outcome(sample, dense, states),
            }
        )
    return dense, rows


@torch.no_grad()
def session_rows(
    study: Study, samples: Sequence[Sample], artifact: Path | None, density: float
) -> list[dict[str, Any]]:
    """Rows of prompts of one length, whose steps a session decodes sparsely in one batch."""
    config = RuntimeConfig(
        policy="streaming",
        min_tokens=0,
        # Prompts are dense: the question is what decoding adds.
        max_density=1e-9,
        decode="sparse",
        decode_density=density,
    )
    loaded = None if artifact is None else load_artifact(artifact)
    longest = max(len(sample.prompt) for sample in samples)
    steps = max(len(sample.follow) for sample in samples)
    ids = torch.zeros(len(samples), longest + steps, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        first = longest - len(sample.prompt)
        ids[row, first : first + len(sample.ids)] = sample.ids
        mask[row, first:] = 1
    ids, mask = ids.to(study.device), mask.to(study.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    decoder, states, cache = text_decoder(study.model), [], {}
    pieces = [slice(0, longest), *(slice(n, n + 1) for n in range(longest, longest + steps))]
    with share_prefill(study.model, loaded, config) as session:
        for piece in pieces:
            out = decoder(
                input_ids=ids[:, piece],
                attention_mask=mask[:, : piece.stop],
                position_ids=positions[:, piece],
                use_cache=True,
                **cache,
            )
            cache = cache_of(out)
            if piece.start:
                states.append(out.last_hidden_state[:, 0])
    report = session.report().decoding
    assert report is not None
    print(report.summary(), flush=True)
    rows, every = [], torch.stack(states, 1)
    for row, sample in enumerate(samples):
        dense = study.steps(sample, Decode(study.prefill(sample), None, None, study.block))
        outcome = study.outcome(sample, dense, every[row, : len(sample.follow)])
        name = "session, all heads alike" if artifact is None else "session, effects of a plan"
        about_it = {"policy": name, "density": density, "reads": report.density}
        rows.append({**about(study, sample), **about_it, **outcome})
    return rows


def session(options: argparse.Namespace) -> None:
    """Runs prompts and their steps in sessions that decode sparsely."""
    artifacts, options.artifact = options.artifact or [None], []
    study = Study(options)
    samples = [sample for path in options.prompts for sample in load_samples(path, study)]
    groups: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        if not sample.calibrates and sample.task in options.task:
            groups[-(-len(sample.prompt) // 4096)].append(sample)
    rows: list[dict[str, Any]] = []
    for artifact in artifacts:
        for density in options.density:
            for together in groups.values():
                rows += session_rows(study, together, artifact, density)
                facts = provenance(options.device, options.commit)
                options.json.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")


@torch.no_grad()
def plan_rows(
    study: Study, sample: Sample, dense: Tensor, artifacts: Sequence[Path]
) -> list[dict[str, Any]]:
    """A row for every sparse prefill of one prompt, and one for a dense one in bfloat16."""
    rows = []
    for artifact in (None, *artifacts):
        left, density = study.half_prefill(sample, artifact)
        states = study.steps(sample, Decode(left, None, None, study.block))
        name = "dense in bfloat16" if artifact is None else f"sparse by {artifact.stem}"
        row = {**about(study, sample), "policy": f"prefill {name}, then dense", "density": None}
        rows.append({**row, "reads": density, **study.outcome(sample, dense, states)})
    return rows


def answers_right(sample: Sample, top: Tensor) -> dict[str, int]:
    """Right answers and tokens of them, and how many there are; the prefill gives the first token.

    Args:
        sample: With the right answers.
        top: The likeliest token after every step.
    """
    right = top[:-1] == torch.tensor(sample.follow[1:])
    counts = {"right": 0, "answers": 0, "tokens": 0, "of": 0}
    for start, stop in sample.answers:
        span = right[max(0, start - 1) : stop - 1]
        counts["right"] += int(span.all())
        counts["answers"] += 1
        counts["tokens"] += int(span.sum())
        counts["of"] += len(span)
    return counts


def show(options: argparse.Namespace) -> None:
    """Prints tables of means over prompts, and draws the picture."""
    panels: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for path in options.results:
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            wanted = not options.policy or row["policy"] in options.policy
            if (wanted or row["density"] is None) and row["task"] in options.task:
                panels[row["model"], -(-row["tokens"] // 4096) * 4].append(row)
    for (model, length), rows in panels.items():
        print(f"\n### {model}, {length}K\n")
        for line in table(rows):
            print(line)
    if options.plot:
        figure_of(panels).savefig(options.plot, metadata={"Date": None})


def grouped(rows: list[dict[str, Any]]) -> dict[tuple[str, float | None], list[dict[str, Any]]]:
    """Rows of each policy and density."""
    groups: dict[tuple[str, float | None], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["policy"], row["density"]].append(row)
    return groups


def mean_of(rows: list[dict[str, Any]], column: str) -> float:
    """Mean over prompts."""
    return sum(row[column] for row in rows) / len(rows)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Means over prompts by policy and density, KL divergence by task, answers."""
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    head = ["policy", "asked", "reads", "recall", "worst", "KL", *tasks, "top", "answers", "tokens"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for (policy, density), found in grouped(rows).items():
        cells = [policy, str(density), f"{mean_of(found, 'reads'):.3f}"]
        kept = [f"{mean_of(found, c):.3f}" for c in ("recall", "worst") if c in found[0]]
        cells += kept or ["", ""]
        cells.append(f"{mean_of(found, 'kl'):.4f}")
        for task in tasks:
            cells.append(f"{mean_of([r for r in found if r['task'] == task], 'kl'):.4f}")
        cells.append(f"{mean_of(found, 'agrees'):.3f}")
        for ours, of in (("right", "answers"), ("tokens", "of")):
            counts = [sum(r["answers"][k] for r in found) for k in (ours, of)]
            dense = sum(r["dense_answers"][ours] for r in found)
            cells.append(f"{counts[0]}/{counts[1]} ({dense})")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def figure_of(panels: dict[tuple[str, int], list[dict[str, Any]]]) -> Any:
    """KL and recall against reads: a column for each model and length, a line for each policy."""
    from matplotlib.figure import Figure

    from shareprefill.report.drawing import figure_style

    every_row = [row for rows in panels.values() for row in rows if row["reads"] < 1]
    names = list(dict.fromkeys(row["policy"] for row in every_row))
    with figure_style():
        figure = Figure(figsize=(3.7 * len(panels) + 2.6, 6.4), layout="constrained")
        every = figure.subplots(2, len(panels), squeeze=False)
        for column, ((model, length), rows) in enumerate(panels.items()):
            for axes, value in zip(every[:, column], ("kl", "recall"), strict=True):
                for number, name in enumerate(names):
                    mine = [r for r in rows if r["policy"] == name and value in r]
                    _line(axes, mine, value, name, number)
                axes.grid(visible=True)
                axes.set_xlabel("bytes read / dense")
            every[0, column].set_title(f"{model}, {length}K")
            every[0, column].set_yscale("log")
            every[0, column].set_xlim(0, 0.35)
            every[0, column].axhline(0.01, linewidth=0.8, linestyle=":", color="grey")
        every[0, 0].set_ylabel("KL from dense, nats")
        every[1, 0].set_ylabel("recall, mean of heads")
        handles, labels = every[0, 0].get_legend_handles_labels()
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
    points = sorted(
        (mean_of(found, "reads"), mean_of(found, value)) for found in grouped(rows).values()
    )
    axes.plot([p[0] for p in points], [p[1] for p in points], label=name, markersize=6, **look)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and runs one of the commands."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    commands = {f.__name__: f for f in (prompts, run, session, show)}
    parser.add_argument("command", choices=commands)
    parser.add_argument("results", type=Path, nargs="*", help="JSON, for show")
    parser.add_argument("--model", help="a folder, a hub id, or sp-tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--commit", help="of the sources, where they are a copy without git's files"
    )
    parser.add_argument("--task", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--length", type=int, nargs="*", default=[8192], help="tokens of prompt and steps"
    )
    parser.add_argument("--samples", type=int, default=3, help="prompts of a task and length")
    parser.add_argument("--steps", type=int, default=512, help="at most")
    parser.add_argument("--prompts", type=Path, nargs="*", default=[], help="written by prompts")
    parser.add_argument("--seed", type=int, default=1001, help="of the first prompts")
    parser.add_argument("--calibrate", action="store_true", help="policies are chosen on them")
    parser.add_argument("--artifact", type=Path, nargs="*", default=[], help="of sp cluster")
    parser.add_argument("--policy", nargs="*", help="several by default; for show, all")
    parser.add_argument("--density", type=float, nargs="*", default=list(DENSITIES))
    parser.add_argument("--block", type=int, default=32, help="tokens a key block")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_intermixed_args(arguments)
    commands[options.command](options)


if __name__ == "__main__":
    main()
