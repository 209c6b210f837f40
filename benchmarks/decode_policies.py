"""Which key blocks a decode step reads: the policies that `decode_study.py` compares.

A *unit* is what reads for itself: a KV head with all of its query heads, which is what a kernel
loads. All densities here are *reads*: the bytes that a policy reads of keys, values and what it
chooses by, over those of dense decoding, mean over units and steps. What a policy spends on
choosing is taken off what it may read, so that policies of one density cost the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.sketched_selection import Moments

# The newest tokens, which every step reads, as it reads the first block.
LOCAL = 64
# Reads of a pivot's order that pivots are chosen at.
_PIVOT_READS = 0.1
# Bytes of a key or a value's number, in the cache that reads are counted of.
_BYTES = 2
# Standard deviations that four bits of a sketch reach.
_REACH = 2.7
_CUTS = torch.tensor(
    [
        *(0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92),
        *(0.94, 0.96, 0.97, 0.98, 0.985, 0.99, 0.993, 0.996, 0.998, 0.999, 1.1),
    ]
)
_WORTHS = torch.cat((torch.zeros(1), torch.logspace(-8, 1, 37)))
_SPEC = re.compile(
    r"(?P<name>oracle|last|vertical|quest|own|pivots|sketch|channels)"
    r"(:(?P<share>0?\.\d+)|:(?P<rank>\d+)x(?P<bits>4|8|16))?(/(?P<every>\d+))?"
    r"(\+(?P<goal>cuts|effect|adaptive))?(?P<means>\+means)?"
)


@dataclass(frozen=True)
class Basis:
    """Coordinates of one layer's keys and queries, the ones that matter most first.

    A logit is nearly the product of the first coordinates of query and key, plus what the mean key
    gives.

    Attributes:
        mean: Mean key of the prompt, `[G, D]`.
        query: Of queries, `[G, D, D]`; a row is a coordinate.
        key: Of keys less their mean, `[G, D, D]`.
        spread: Standard deviation of the keys' coordinates, `[G, D]`.
    """

    mean: Tensor
    query: Tensor
    key: Tensor
    spread: Tensor


def make_basis(moments: Moments) -> Basis:
    """The coordinates that keep the mean square of logits, `[..., G, D]`.

    Args:
        moments: Of queries of prompts' last rows, and of prompts' keys.
    """
    # The decomposition of many small matrices is faster on a CPU.
    of_query, of_key = moments.query.cpu(), moments.key.cpu()
    values, vectors = torch.linalg.eigh(of_query)
    root = values.clamp(min=1e-6 * values.amax(-1, keepdim=True)).sqrt()
    half = (vectors * root[..., None, :]) @ vectors.mT
    inverse = (vectors / root[..., None, :]) @ vectors.mT
    found, axes = torch.linalg.eigh(half @ of_key @ half)
    axes = axes.flip(-1).mT
    spread = found.flip(-1).clamp(min=0).sqrt()
    parts = (moments.mean, axes @ inverse, axes @ half, spread)
    return Basis(*(part.to(moments.mean.device, torch.float32) for part in parts))


@dataclass(frozen=True)
class Steps:
    """The decode steps of one layer.

    Attributes:
        heads: Attention of every query head and step by key block, `[G, R, T, n]`.
        share: Weight of a query head in its KV head, of sum 1, `[G, R]`.
        query: `[G, R, T, D]`.
        key: Of prompt and steps, `[G, M, D]`.
        scale: On the logits.
        last: Mean attention of the prompt's last rows by key block, `[G, R, n]`.
        vertical: The same of rows of the whole prompt.
        basis: Of the prompt.
        prompt: Tokens before the first step.
        block: Tokens a key block.
    """

    heads: Tensor
    share: Tensor
    query: Tensor
    key: Tensor
    scale: float
    last: Tensor
    vertical: Tensor
    basis: Basis
    prompt: int
    block: int

    def of_unit(self, maps: Tensor) -> Tensor:
        """The mean over each KV head's query heads, `[G, ...]`."""
        return torch.einsum("gr,gr...->g...", self.share, maps)

    @cached_property
    def mass(self) -> Tensor:
        """Attention of every step by key block, `[G, T, n]`."""
        return self.of_unit(self.heads)

    @property
    def positions(self) -> Tensor:
        """Of the steps, int64 `[T]`."""
        count = self.heads.shape[2]
        return self.prompt + torch.arange(count, device=self.heads.device)

    @cached_property
    def visible(self) -> Tensor:
        """Blocks that a step may read, bool `[T, n]`."""
        return self._starts <= self.positions[:, None]

    @property
    def _starts(self) -> Tensor:
        return torch.arange(self.heads.shape[3], device=self.heads.device) * self.block

    def always(self, since: int | None = None) -> Tensor:
        """Blocks that a step reads whatever a policy says, bool `[T, n]`.

        Args:
            since: Tokens that the policy's order knows; newer blocks are read too.
        """
        oldest = self.positions - LOCAL + 1
        if since is not None:
            oldest = oldest.clamp(max=since)
        newest = (self._starts + self.block > oldest[:, None]) & self.visible
        newest[:, 0] = True
        return newest


def by_block(mass: Tensor, block: int) -> Tensor:
    """Sums over blocks of the last dimension; the last block may be smaller."""
    return F.pad(mass, (0, -mass.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def causal_logits(logits: Tensor) -> Tensor:
    """Logits `[..., T, M]` of the last T of M tokens, without those of later tokens."""
    steps, tokens = logits.shape[-2:]
    later = torch.ones(steps, steps, dtype=torch.bool, device=logits.device).triu(1)
    logits[..., tokens - steps :].masked_fill_(later, -torch.inf)
    return logits


def sketched_logits(steps: Steps, rank: int, bits: int, channels: Tensor | None = None) -> Tensor:
    """Logits from a few coordinates of keys alone, of few bits each, `[G, R, T, M]`.

    Args:
        steps: Of a layer.
        rank: Coordinates.
        bits: Of each.
        channels: Those of the keys that are taken, int64 `[G, rank]`; None: the basis's first ones.
    """
    basis = steps.basis
    key = steps.key - basis.mean[:, None]
    if channels is None:
        axes = slice(0, rank)
        query = steps.query @ basis.query[:, None, axes].mT
        key = key @ basis.key[:, axes].mT
        spread = basis.spread[:, None, axes]
    else:
        query = steps.query.gather(3, channels[:, None, None].expand(*steps.query.shape[:3], -1))
        key = key.gather(2, channels[:, None].expand(*key.shape[:2], -1))
        spread = key[:, : steps.prompt].std(1, keepdim=True)
    if bits == 4:
        size = 2 * _REACH / 15
        key = ((key / spread).clamp(-_REACH, _REACH) / size + 0.5).round() - 0.5
        key = key * size * spread
    if bits == 8:
        key = (key / spread).to(torch.float8_e4m3fn).to(key.dtype) * spread
    mean = steps.query @ basis.mean[:, None, :, None]  # [G, R, T, 1]
    return causal_logits((query @ key[:, None].mT + mean) * steps.scale)


def quest_order(steps: Steps) -> Tensor:
    """Order of key blocks by upper bounds of their logits (Quest; Tang et al., 2024).

    The bounds come from minima and maxima of a block's keys. Keys after a step count as they do in
    no cache, but blocks that hold them are always read.

    Returns:
        1 / (1 + rank) of every block, `[G, T, n]`: bounds of one query head say nothing about
        another's, so that their mean over a KV head goes by ranks.
    """
    key, query, block = steps.key, steps.query, steps.block
    blocks = F.pad(key, (0, 0, 0, -key.shape[1] % block)).unflatten(1, (-1, block))
    high, low = blocks.amax(2)[:, None], blocks.amin(2)[:, None]  # [G, 1, n, D]
    bound = query.clamp(min=0) @ high.mT + query.clamp(max=0) @ low.mT
    return steps.of_unit(1 / (1 + bound.argsort(-1, descending=True).argsort(-1)))


@dataclass
class Policy:
    """Every unit reads blocks in an order, as many as its rule says.

    Attributes:
        order: `last`, `vertical`, `quest`, `sketch`, or `pivots`: attention that a unit's pivot saw
            at its last dense step.
        density: Reads of a unit and step that is not dense, where there is no other rule.
        pivots: The pivot of every unit of the model, its own number for a pivot.
        every: Steps from one dense step of a pivot to the next, or from one choice by the sketch to
            the next.
        oracle: Pivots know their attention without reading it: no policy, but a bound.
        sketch: Coordinates of a key, and bits of each.
        channels: The coordinates, where they are channels of the keys, int64 `[L * U, rank]`.
        cuts: Share of the order's attention that a unit's blocks hold, `[L * U]`.
        worth: What all blocks of a unit together must be worth, in half squares of lost attention,
            `[L * U]`: each step reads what is worth more than it costs.
        means: Blocks that are not read stand in by their mean value.
        extra: Reads that choosing takes, without the pivots' dense steps.
    """

    order: str
    density: float
    pivots: list[int] = field(default_factory=list)
    every: int = 1
    oracle: bool = False
    sketch: tuple[int, int] = (0, 0)
    channels: Tensor | None = None
    cuts: Tensor | None = None
    worth: Tensor | None = None
    means: bool = False
    extra: float = 0.0
    seen: dict[int, Tensor] = field(default_factory=dict)

    def score(self, layer: int, steps: Steps) -> Tensor:
        """What blocks are ordered by, `[U, T, n]`; layers are asked for in their order."""
        if self.order == "pivots":
            known = stale(steps.mass, self.every)
            first_unit = layer * len(known)
            for unit, mass in enumerate(known):
                self.seen[first_unit + unit] = mass
            mine = self.pivots[first_unit : first_unit + len(known)]
            return torch.stack([self.seen[pivot] for pivot in mine])
        if self.order == "quest":
            return quest_order(steps)
        if self.order == "sketch":
            weights = self.sketched_logits(layer, steps).softmax(-1)
            return steps.of_unit(by_block(weights, steps.block))
        return steps.of_unit(getattr(steps, self.order))[:, None].expand_as(steps.mass)

    def sketched_logits(self, layer: int, steps: Steps) -> Tensor:
        """What the sketch tells of the logits, `[G, R, T, M]`."""
        channels, groups = self.channels, len(steps.key)
        if channels is not None:
            channels = channels[layer * groups : (layer + 1) * groups]
        return sketched_logits(steps, *self.sketch, channels)

    def always(self, steps: Steps) -> Tensor:
        """Blocks that are read whatever the score says, bool `[T, n]`."""
        return steps.always(steps.prompt if self.order in ("last", "vertical") else None)

    def dense(self, units: range, count: int, device: torch.device) -> Tensor:
        """Units and steps that read all, bool `[U, T]`."""
        if self.order != "pivots" or self.oracle:
            return torch.zeros(len(units), count, dtype=torch.bool, device=device)
        own = torch.tensor([self.pivots[unit] == unit for unit in units], device=device)
        return own[:, None] & (torch.arange(count, device=device) % self.every == 0)

    def keep(self, layer: int, steps: Steps) -> Tensor:
        """Blocks that every unit reads at every step, bool `[U, T, n]`."""
        score, always, visible = self.score(layer, steps), self.always(steps), steps.visible
        units = range(layer * len(score), (layer + 1) * len(score))
        mine = slice(units.start, units.stop)
        order = ranked(score, always, visible)
        if self.worth is not None:
            held = score.gather(-1, order).cumsum(-1)
            counts = worth_counts(held, self.worth[mine], always, visible)
        elif self.cuts is not None:
            held = score.gather(-1, order).cumsum(-1)
            counts = cut_counts(held, self.cuts[mine, None], always, visible)
        else:
            counts = level_counts(self.density, always, visible).expand(score.shape[:2])
        dense = self.dense(units, score.shape[1], score.device)
        keep = first(order, counts)
        if self.order == "sketch":
            # What was chosen last, and the newest; layers in turns, so that steps take alike.
            numbers = torch.arange(keep.shape[1], device=keep.device)
            last = (numbers - (numbers + layer) % self.every).clamp(min=0)
            keep = keep[:, last] | always
        return keep | (dense[..., None] & visible)


def stale(mass: Tensor, every: int) -> Tensor:
    """What was seen at the newest of every `every` steps, `[U, T, n]`."""
    steps = torch.arange(mass.shape[1], device=mass.device)
    return mass[:, steps // every * every]


def ranked(score: Tensor, always: Tensor, visible: Tensor) -> Tensor:
    """Blocks by falling score, int64 `[U, T, n]`: those always read first, invisible ones last."""
    score = score.masked_fill(always, torch.inf).masked_fill(~visible, -torch.inf)
    return score.argsort(-1, descending=True)


def first(order: Tensor, counts: Tensor) -> Tensor:
    """The first `counts` `[U, T]` blocks of an order, bool `[U, T, n]`."""
    ranks = torch.arange(order.shape[-1], device=order.device)
    taken = (ranks < counts[..., None]).expand_as(order)
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, taken)


def level_counts(density: float, always: Tensor, visible: Tensor) -> Tensor:
    """How many blocks a density allows, no fewer than are always read, int64 `[T]`."""
    return (density * visible.sum(-1)).floor().long().clamp(min=always.sum(-1))


def cut_counts(held: Tensor, cuts: Tensor, always: Tensor, visible: Tensor) -> Tensor:
    """How many blocks hold a share of the score, int64 `[U, T]`.

    Args:
        held: Score of the first blocks together, `[U, T, n]`.
        cuts: Shares, `[U or 1, 1]`.
        always: Blocks that are read whatever they hold.
        visible: Blocks that there are.
    """
    counts = (held < cuts[..., None]).sum(-1) + 1
    return torch.minimum(torch.maximum(counts, always.sum(-1)), visible.sum(-1))


def worth_counts(held: Tensor, worth: Tensor, always: Tensor, visible: Tensor) -> Tensor:
    """How many blocks make the least of half the squared lost score and their worth, `[U, T]`.

    Args:
        held: Score of the first blocks together, `[U, T, n]`.
        worth: Of all blocks together, `[U or 1]`.
        always: Blocks that are read whatever they hold.
        visible: Blocks that there are.
    """
    counts = torch.arange(1, held.shape[-1] + 1, device=held.device)
    there = visible.sum(-1)[:, None]  # [T, 1]
    loss = (1 - held).clamp(min=0).square() / 2 + worth[:, None, None] * counts / there
    allowed = (counts >= always.sum(-1)[:, None]) & (counts <= there)
    return loss.masked_fill(~allowed, torch.inf).argmin(-1) + 1


@dataclass(frozen=True)
class Calibration:
    """Dense decode steps of prompts that no figure is of.

    Attributes:
        prompts: Steps of every layer of each prompt.
        effect: KL divergence for a unit's mean squared lost attention, `[L * U]`.
    """

    prompts: Sequence[Sequence[Steps]]
    effect: Tensor

    @property
    def units(self) -> int:
        """L * U."""
        return len(self.effect)

    @cached_property
    def covered(self) -> Tensor:
        """Attention of units in what a pivot reads first, `[pivot, unit]`; 0 where it is later."""
        found = self.effect.new_zeros(self.units, self.units)
        for layers in self.prompts:
            mass = torch.cat([steps.mass for steps in layers])
            always, visible = layers[0].always(), layers[0].visible
            counts = level_counts(_PIVOT_READS, always, visible).expand(mass.shape[:2])
            kept = first(ranked(mass, always, visible), counts)
            found += kept.flatten(1).float() @ mass.flatten(1).T
        layer = torch.arange(self.units, device=found.device) // len(self.prompts[0][0].mass)
        return found.masked_fill(layer[:, None] > layer, 0)


def choose_pivots(calibration: Calibration, count: int) -> list[int]:
    """The pivot of every unit: greedy facility location on covered attention.

    A pivot is of the same layer as the units that share it, or of an earlier one.
    """
    covered = calibration.covered
    best, chosen = covered.new_zeros(calibration.units), []
    for _ in range(count):
        chosen.append(int(torch.maximum(best, covered).sum(1).argmax()))
        best = torch.maximum(best, covered[chosen[-1]])
    pivots = torch.tensor(chosen, device=covered.device)
    found = pivots[covered[pivots].argmax(0)]
    # Two pivots may be equally good for one of them.
    found[pivots] = pivots
    return found.tolist()


def choose_channels(calibration: Calibration, count: int) -> Tensor:
    """Channels of every unit's keys that logits vary most by, int64 `[L * U, count]`."""
    weight = 0.0
    for layers in calibration.prompts:
        query = torch.cat([s.query.square().mean((1, 2)) for s in layers])  # [L * U, D]
        weight = weight + query * torch.cat([s.key[:, : s.prompt].var(1) for s in layers])
    return torch.as_tensor(weight).topk(count, -1).indices


def choose_levels(calibration: Calibration, policy: Policy, density: float, goal: str) -> Tensor:
    """The cut or worth of every unit, `[L * U]`, that loses least at a mean density of `density`.

    What is lost is the units' own attention, whatever the policy's order believes.

    Args:
        calibration: Steps to choose on.
        policy: Without levels.
        density: Reads of all units, dense steps included.
        goal: `cuts`: cuts by the lost attention; `effect`: cuts by its square, weighed by the
            unit's effect; `adaptive`: worths by that.
    """
    levels = (_WORTHS if goal == "adaptive" else _CUTS).to(calibration.effect)
    lost = calibration.effect.new_zeros(len(levels), calibration.units)
    reads = torch.zeros_like(lost)
    for layers in calibration.prompts:
        score = torch.cat([policy.score(n, steps) for n, steps in enumerate(layers)])
        mass = torch.cat([steps.mass for steps in layers])
        always, visible = policy.always(layers[0]), layers[0].visible
        order = ranked(score, always, visible)
        held, own = (m.gather(-1, order).cumsum(-1) for m in (score, mass))
        dense = policy.dense(range(len(score)), score.shape[1], score.device)
        for number, level in enumerate(levels):
            if goal == "adaptive":
                counts = worth_counts(held, level[None], always, visible)
            else:
                counts = cut_counts(held, level[None, None], always, visible)
            missed = (1 - own.gather(-1, counts[..., None] - 1)[..., 0]).clamp(min=0)
            missed = missed.masked_fill(dense, 0)
            share = (counts / visible.sum(-1)).masked_fill(dense, 1)
            lost[number] += (missed if goal == "cuts" else missed**2).mean(1)
            reads[number] += share.mean(1) / len(calibration.prompts)
    if goal != "cuts":
        lost *= calibration.effect
    return levels[_at_one_price(lost, reads, density)]


def _at_one_price(lost: Tensor, reads: Tensor, density: float) -> Tensor:
    """The option of every unit, int64 `[units]`, at the lowest price of reads that `density` pays.

    Args:
        lost: What every option loses, `[options, units]`.
        reads: What it reads.
        density: Mean reads at most.
    """
    low, high = 1e-12, 1e3
    for _ in range(60):
        price = (low * high) ** 0.5
        best = (lost + price * reads).argmin(0, keepdim=True)
        low, high = (price, high) if reads.gather(0, best).mean() > density else (low, price)
    return (lost + high * reads).argmin(0)


def make_policy(spec: str, density: float, calibration: Calibration) -> Policy | None:
    """A policy by its name at a density of reads; None where choosing alone takes as much.

    Args:
        spec: `oracle`, `last`, `vertical`, `quest`, `own/8` (refreshed every 8 steps),
            `pivots:.05/4` (a twentieth of the units are pivots, dense every 4 steps),
            `sketch:8x4` (8 coordinates of each key, 4 bits each, in a basis of the prompt),
            `sketch:8x4/4` (blocks are chosen by it every 4 steps, which layers take in turns),
            `channels:8x4` (8 channels of each key, chosen offline). `+cuts` gives every unit a cut
            of its own, `+effect` one by what its lost attention does, `+adaptive` a new one at
            every step by that. `+means` lets blocks that are not read stand in by their mean value.
        density: Reads.
        calibration: What pivots, cuts and prices are chosen on.

    Raises:
        ConfigError: there is no such policy.
    """
    found = _SPEC.fullmatch(spec)
    if found is None:
        raise ConfigError(f"policy {spec!r} is not known: see make_policy for their names")
    name, every, goal = found["name"], int(found["every"] or 1), found["goal"]
    if every > LOCAL:
        raise ConfigError(f"policy {spec!r}: at most {LOCAL} steps lie between two refreshes")
    needs = {"pivots": found["share"], "sketch": found["rank"], "channels": found["rank"]}
    if name in needs and needs[name] is None:
        raise ConfigError(f"policy {spec!r} lacks its size: pivots:.05, sketch:8x4")
    if goal is not None and name in ("last", "vertical", "quest"):
        raise ConfigError(f"policy {spec!r}: the order of {name} is no attention that a cut can be")
    if found["means"] and name not in ("sketch", "channels"):
        raise ConfigError(f"policy {spec!r}: means need the logits of a sketch")
    block, dim = calibration.prompts[0][0].block, calibration.prompts[0][0].key.shape[-1]
    policy = Policy(name, density, every=every, means=found["means"] is not None)
    if name in ("oracle", "own", "pivots"):
        policy.order, policy.oracle = "pivots", name == "oracle"
        policy.pivots = list(range(calibration.units))
    if name == "pivots":
        count = max(1, round(float(found["share"]) * calibration.units))
        policy.pivots = choose_pivots(calibration, count)
    if name == "quest":
        policy.extra = 1 / block  # A minimum and a maximum beside the keys and values of a block.
    if name in ("sketch", "channels"):
        policy.order = "sketch"
        policy.sketch = int(found["rank"]), int(found["bits"])
        policy.extra = policy.sketch[0] * policy.sketch[1] / 8 / (2 * dim * _BYTES) / every
        policy.extra += 1 / (2 * block) if policy.means else 0
    if name == "channels":
        policy.channels = choose_channels(calibration, policy.sketch[0])
    units = range(calibration.units)
    dense = policy.dense(units, every, calibration.effect.device).float().mean().item()
    allowed = density - policy.extra
    if allowed <= dense:
        return None
    policy.density = (allowed - dense) / (1 - dense)
    if goal is not None:
        levels = choose_levels(calibration, policy, allowed, goal)
        policy.worth, policy.cuts = (levels, None) if goal == "adaptive" else (None, levels)
    return policy
