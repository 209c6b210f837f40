"""Which key blocks a decode step reads: the policies that `decode_study.py` compares.

A *unit* is what reads for itself: a query head, or a KV head with all of its query heads, which is
what a kernel loads. All densities here are *reads*: the bytes that a policy reads of keys, values
and what it chooses by, over those of dense decoding, mean over units and steps. What a policy
spends on choosing is taken off what it may read, so that policies of one density cost the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from shareprefill.errors import ConfigError

# The newest tokens, which every step reads, as it reads the first block.
LOCAL = 64
# What sharing is planned at: reads of a pivot's order, and the attention mass that cuts ask for.
_PLAN_READS = 0.1
# Reads that a plan chooses among, where an order knows no attention; steps between its refreshes.
_LEVELS = torch.tensor([0.0, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 1.0])
_PLAN_EVERY = 64
_CUTS = torch.tensor(
    [
        *(0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92),
        *(0.94, 0.96, 0.97, 0.98, 0.985, 0.99, 0.993, 0.996, 0.998, 0.999, 1.1),
    ]
)
_SPEC = re.compile(
    r"(?P<name>oracle|last|vertical|quest|own|pivots|planned)"
    r"(:(?P<share>[.\d]+))?(/(?P<every>\d+))?(?P<ahead>>)?(\+(?P<goal>cuts|effect))?"
)


@dataclass(frozen=True)
class Steps:
    """What the decode steps of one layer show.

    Attributes:
        mass: Attention of every step by key block, mean over a unit's heads, `[U, T, n]`.
        bounds: The like by rank, from upper bounds of the blocks' logits (Quest), `[U, T, n]`.
        last: Mean attention of the prompt's last 128 rows by key block, `[U, n]`.
        vertical: The same of all rows of the prompt, `[U, n]`.
        prompt: Tokens before the first step.
        block: Tokens a key block.
    """

    mass: Tensor
    bounds: Tensor
    last: Tensor
    vertical: Tensor
    prompt: int
    block: int

    @property
    def positions(self) -> Tensor:
        """Of the steps, int64 `[T]`."""
        return self.prompt + torch.arange(self.mass.shape[1])

    @property
    def visible(self) -> Tensor:
        """Blocks that a step may read, bool `[T, n]`."""
        return visible_blocks(self.positions, self.mass.shape[2], self.block)

    def always(self, since: int | None = None) -> Tensor:
        """Blocks that a step reads whatever a policy says, bool `[T, n]`.

        Args:
            since: Tokens that the policy's order knows; newer blocks are read too.
        """
        oldest = self.positions - LOCAL + 1
        if since is not None:
            oldest = oldest.clamp(max=since)
        starts = torch.arange(self.mass.shape[2]) * self.block
        newest = (starts + self.block > oldest[:, None]) & self.visible
        newest[:, 0] = True
        return newest


class Policy(Protocol):
    """Chooses blocks; layers are asked for in their order."""

    extra: float

    def keep(self, layer: int, steps: Steps) -> Tensor:
        """Blocks that every unit reads at every step, bool `[U, T, n]`."""
        ...


@dataclass(frozen=True)
class Ordered:
    """Every unit reads the same number of blocks, in the order of one of the scores of `Steps`.

    Attributes:
        score: Its name.
        density: Reads.
        extra: Reads that choosing takes: a minimum and a maximum of each block's keys.
    """

    score: str
    density: float
    extra: float = 0.0

    def keep(self, layer: int, steps: Steps) -> Tensor:
        score = getattr(steps, self.score)
        always = steps.always(steps.prompt if score.dim() == 2 else None)
        score = score[:, None].expand_as(steps.mass) if score.dim() == 2 else score
        return first(ranked(score, always, steps.visible), self.density, always, steps.visible)


@dataclass
class Shared:
    """Pivots attend densely every `every` steps; all units read in the order that one then saw.

    Attributes:
        pivots: The pivot of every unit of the model, its own number for a pivot, int64 `[L * U]`.
        every: Steps from one dense step of a pivot to the next.
        density: Reads of a step that is not dense; for units without cuts.
        cuts: Share of the pivot's attention that a unit's blocks hold, `[L * U]`.
        oracle: Pivots know their attention without reading it: no policy, but a bound.
        ahead: A block counts as much as the one before it, if that is more: what copies a passage
            moves on from block to block.
        extra: Reads that choosing takes; the pivots' are in what they keep.
    """

    pivots: Tensor
    every: int
    density: float
    cuts: Tensor | None = None
    oracle: bool = False
    ahead: bool = False
    extra: float = 0.0
    seen: dict[int, Tensor] = field(default_factory=dict)

    def keep(self, layer: int, steps: Steps) -> Tensor:
        units, count, _ = steps.mass.shape
        mine = layer * units + torch.arange(units)
        known = self.known(steps.mass)
        is_pivot = torch.isin(mine, self.pivots)
        for unit in is_pivot.nonzero()[:, 0].tolist():
            self.seen[int(mine[unit])] = known[unit]
        score = torch.stack([self.seen[pivot] for pivot in self.pivots[mine].tolist()])
        always, visible = steps.always(), steps.visible
        order = ranked(score, always, visible)
        if self.cuts is None:
            kept = first(order, self.density, always, visible)
        else:
            kept = covering(order, score, self.cuts[mine], always, visible)
        if self.oracle:
            return kept
        dense = is_pivot[:, None] & (torch.arange(count) % self.every == 0)
        return kept | (dense[..., None] & visible)

    def known(self, mass: Tensor) -> Tensor:
        """What pivots of this attention tell at every step, `[U, T, n]`."""
        mass = stale(mass, self.every)
        if not self.ahead:
            return mass
        return torch.maximum(mass, torch.nn.functional.pad(mass[..., :-1], (1, 0)))


def visible_blocks(positions: Tensor, n: int, block: int) -> Tensor:
    """Blocks up to each position, bool `[T, n]`."""
    return torch.arange(n) * block <= positions[:, None]


def stale(mass: Tensor, every: int) -> Tensor:
    """What was seen at the newest of every `every` steps, `[U, T, n]`."""
    steps = torch.arange(mass.shape[1])
    return mass[:, steps // every * every]


def ranked(score: Tensor, always: Tensor, visible: Tensor) -> Tensor:
    """Blocks by falling score, int64 `[U, T, n]`: those always read first, invisible ones last."""
    score = score.masked_fill(always, torch.inf).masked_fill(~visible, -torch.inf)
    return score.argsort(-1, descending=True)


def first(order: Tensor, density: float, always: Tensor, visible: Tensor) -> Tensor:
    """The first blocks of an order, as many as a density allows, bool `[U, T, n]`."""
    return _take(order, level_counts(density, always, visible)[None, :, None])


def level_counts(density: float, always: Tensor, visible: Tensor) -> Tensor:
    """How many blocks a density allows, no fewer than are always read, int64 `[T]`."""
    return (density * visible.sum(-1)).floor().long().clamp(min=always.sum(-1))


def covering(order: Tensor, score: Tensor, cuts: Tensor, always: Tensor, visible: Tensor) -> Tensor:
    """The first blocks that hold a share `cuts` `[U]` of the score, bool `[U, T, n]`."""
    held = score.gather(-1, order).cumsum(-1)
    counts = cut_counts(held, cuts[:, None], always, visible)
    return _take(order, counts[..., None])


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


def _take(order: Tensor, counts: Tensor) -> Tensor:
    ranks = torch.arange(order.shape[-1])
    taken = (ranks < counts).expand_as(order)
    return torch.zeros(order.shape, dtype=torch.bool).scatter(-1, order, taken)


def quest_bounds(query: Tensor, key: Tensor, block: int) -> Tensor:
    """Order of key blocks by upper bounds of their logits (Quest; Tang et al., 2024).

    The bounds come from minima and maxima of a block's keys.

    Args:
        query: `[G, R, T, D]`.
        key: `[G, M, D]`, M a multiple of `block`; keys after a step count as they do in no cache,
            but blocks that hold them are always read.
        block: Tokens a key block.

    Returns:
        1 / (1 + rank) of every block, `[G, R, T, M // block]`: bounds of one query head say nothing
        about another's, so that their mean over a KV head goes by ranks.
    """
    blocks = key.unflatten(1, (-1, block))  # [G, n, block, D]
    high, low = blocks.amax(2)[:, None], blocks.amin(2)[:, None]
    bound = query.clamp(min=0) @ high.mT + query.clamp(max=0) @ low.mT
    return 1 / (1 + bound.argsort(-1, descending=True).argsort(-1))


@dataclass(frozen=True)
class Calibration:
    """Decode steps of prompts that no figure is of.

    Attributes:
        layers: L.
        prompts: Steps of all layers of each prompt, units of a layer behind those of the one
            before: `mass` is `[L * U, T, n]`.
        effect: KL divergence for a unit's mean squared lost attention, `[L * U]`; None: not known.
    """

    layers: int
    prompts: Sequence[Steps]
    effect: Tensor | None = None

    @property
    def units(self) -> int:
        """L * U."""
        return self.prompts[0].mass.shape[0]

    @property
    def layer(self) -> Tensor:
        """Layer of every unit, int64 `[L * U]`."""
        return torch.arange(self.units) // (self.units // self.layers)


def choose_pivots(calibration: Calibration, count: int) -> Tensor:
    """The pivot of every unit, int64 `[L * U]`: greedy facility location on covered attention.

    A pivot is of the same layer as the units that share it, or of an earlier one.
    """
    covered = _covered(calibration)
    best, chosen = torch.zeros(calibration.units), []
    for _ in range(count):
        chosen.append(int(torch.maximum(best, covered).sum(1).argmax()))
        best = torch.maximum(best, covered[chosen[-1]])
    pivots = torch.tensor(chosen)
    found = pivots[covered[pivots].argmax(0)]
    # Two pivots may be equally good for one of them.
    found[pivots] = pivots
    return found


def _covered(calibration: Calibration) -> Tensor:
    """Attention of units in what a pivot reads first, `[pivot, unit]`; 0 where it is later."""
    covered = torch.zeros(calibration.units, calibration.units)
    for steps in calibration.prompts:
        always, visible = steps.always(), steps.visible
        kept = first(ranked(steps.mass, always, visible), _PLAN_READS, always, visible)
        covered += kept.flatten(1).float() @ steps.mass.flatten(1).T
    return covered.masked_fill(calibration.layer[:, None] > calibration.layer, 0)


def choose_cuts(calibration: Calibration, shared: Shared, density: float, goal: str) -> Tensor:
    """The cut of every unit, `[L * U]`, that loses least at a mean density of `density`.

    Args:
        calibration: Steps to choose on.
        shared: The policy without cuts.
        density: Reads of all units, dense steps included.
        goal: `cuts`: the lost attention; `effect`: its square, weighed by the unit's effect.

    Raises:
        ConfigError: units' effects are not known.
    """
    lost, reads = _cut_curves(calibration, shared, squared=goal == "effect")
    if goal == "effect":
        if calibration.effect is None:
            raise ConfigError("units' effects are not known: name a file of them with --effect")
        lost *= calibration.effect
    return _CUTS[_at_one_price(lost, reads, density)]


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


def _cut_curves(
    calibration: Calibration, shared: Shared, *, squared: bool
) -> tuple[Tensor, Tensor]:
    """Lost attention and reads of every unit at every cut, `[cuts, L * U]`, means over steps."""
    lost = torch.zeros(len(_CUTS), calibration.units)
    reads = torch.zeros_like(lost)
    is_pivot = torch.isin(torch.arange(calibration.units), shared.pivots) & (not shared.oracle)
    for steps in calibration.prompts:
        always, visible = steps.always(), steps.visible
        score = shared.known(steps.mass)[shared.pivots]
        order = ranked(score, always, visible)
        held = score.gather(-1, order).cumsum(-1)
        own = steps.mass.gather(-1, order).cumsum(-1)
        dense = is_pivot[:, None] & (torch.arange(own.shape[1]) % shared.every == 0)
        for number, cut in enumerate(_CUTS):
            counts = cut_counts(held, cut[None, None], always, visible)
            missed = (1 - own.gather(-1, counts[..., None] - 1)[..., 0]).clamp(min=0)
            missed = missed.masked_fill(dense, 0)
            share = (counts / visible.sum(-1)).masked_fill(dense, 1)
            lost[number] += (missed**2 if squared else missed).mean(1)
            reads[number] += share.mean(1)
    return lost / len(calibration.prompts), reads / len(calibration.prompts)


@dataclass
class Planned:
    """Every unit has an order, and how far it reads in it.

    Attributes:
        order: Of every unit: `vertical`, `bounds`, `own` or `pivot`, or `dense`.
        level: Share of the blocks, or of the attention that `own` and `pivot` know, `[L * U]`.
        pivots: Of every unit, int64 `[L * U]`; units that are dense.
        extra: Reads of the bounds.
    """

    order: Sequence[str]
    level: Tensor
    pivots: Tensor
    extra: float
    seen: dict[int, Tensor] = field(default_factory=dict)

    def keep(self, layer: int, steps: Steps) -> Tensor:
        units, count, _ = steps.mass.shape
        mine = range(layer * units, (layer + 1) * units)
        for unit, mass in zip(mine, steps.mass, strict=True):
            if self.order[unit] == "dense":
                self.seen[unit] = mass
        refresh = torch.arange(count) % _PLAN_EVERY == 0
        found = []
        for unit, number in enumerate(mine):
            order, level = self.order[number], self.level[number : number + 1]
            if order == "dense":
                found.append(steps.visible)
                continue
            one = _unit(steps, unit)
            known = self.seen[int(self.pivots[number])][None] if order == "pivot" else None
            score, always = _score(order, one, known)
            ranks = ranked(score, always, steps.visible)
            if order in ("own", "pivot"):
                kept = covering(ranks, score, level, always, steps.visible)[0]
            else:
                kept = first(ranks, float(level), always, steps.visible)[0]
            if order == "own":
                kept = kept | (refresh[:, None] & steps.visible)
            found.append(kept)
        return torch.stack(found)


def _unit(steps: Steps, unit: int) -> Steps:
    """The same of one unit."""
    own = slice(unit, unit + 1)
    maps = {name: getattr(steps, name)[own] for name in ("mass", "bounds", "last", "vertical")}
    return replace(steps, **maps)


def _score(order: str, steps: Steps, known: Tensor | None) -> tuple[Tensor, Tensor]:
    """What blocks are ordered by `[U, T, n]`, and those that are read whatever it says."""
    if order == "vertical":
        return steps.vertical[:, None].expand_as(steps.mass), steps.always(steps.prompt)
    if order == "own":
        known = stale(steps.mass, _PLAN_EVERY)
    return (steps.bounds if known is None else known), steps.always()


def make_plan(calibration: Calibration, density: float, block: int) -> Planned:
    """Chooses order and level of every unit for the least predicted KL divergence.

    Units that the first plan leaves dense are pivots that the others may follow in the second.

    Raises:
        ConfigError: units' effects are not known.
    """
    if calibration.effect is None:
        raise ConfigError("units' effects are not known: name a file of them with --effect")
    names = ["vertical", "bounds", "own"]
    curves = [_option_curves(calibration, name, None, block) for name in names]
    best = _best(calibration, names, curves, density)
    dense = torch.tensor([order == "dense" for order, _ in best])
    pivots = torch.arange(calibration.units)
    if bool(dense.any()):
        places = dense.nonzero()[:, 0]
        covered = _covered(calibration)[places]
        pivots = places[covered.argmax(0)]
        curve = _option_curves(calibration, "pivot", pivots, block)
        curve[0][:, covered.amax(0) == 0] = torch.inf  # no pivot is early enough
        for lost, _ in [*curves, curve]:
            lost[:-1, dense] = torch.inf
        best = _best(calibration, [*names, "pivot"], [*curves, curve], density)
    extra = sum(order == "bounds" for order, _ in best) / len(best) / block
    return Planned([o for o, _ in best], torch.tensor([v for _, v in best]), pivots, extra)


def _best(
    calibration: Calibration,
    names: Sequence[str],
    curves: Sequence[tuple[Tensor, Tensor]],
    density: float,
) -> list[tuple[str, float]]:
    """Order and level of every unit."""
    options = [
        ("dense" if number == len(levels) - 1 else name, float(level))
        for name in names
        for levels in (_CUTS if name in ("own", "pivot") else _LEVELS,)
        for number, level in enumerate(levels)
    ]
    assert calibration.effect is not None
    lost = torch.cat([curve[0] for curve in curves]) * calibration.effect
    reads = torch.cat([curve[1] for curve in curves])
    return [options[number] for number in _at_one_price(lost, reads, density).tolist()]


def _option_curves(
    calibration: Calibration, order: str, pivots: Tensor | None, block: int
) -> tuple[Tensor, Tensor]:
    """Squared lost attention and reads of every unit at every level, means over steps."""
    levels = _CUTS if order in ("own", "pivot") else _LEVELS
    lost = torch.zeros(len(levels), calibration.units)
    reads = torch.zeros_like(lost)
    for steps in calibration.prompts:
        visible = steps.visible
        score, always = _score(order, steps, None if pivots is None else steps.mass[pivots])
        ranks = ranked(score, always, visible)
        own, held = (m.gather(-1, ranks).cumsum(-1) for m in (steps.mass, score))
        refresh = torch.arange(own.shape[1]) % _PLAN_EVERY == 0
        for number, level in enumerate(levels):
            if number == len(levels) - 1:
                reads[number] += 1
                continue
            if order in ("own", "pivot"):
                counts = cut_counts(held, level[None, None], always, visible)
            else:
                counts = level_counts(float(level), always, visible).expand(own.shape[:2])
            missed = (1 - own.gather(-1, counts[..., None] - 1)[..., 0]).clamp(min=0)
            share = counts / visible.sum(-1) + (1 / block if order == "bounds" else 0)
            if order == "own":
                missed, share = missed.masked_fill(refresh, 0), share.masked_fill(refresh, 1)
            lost[number] += (missed**2).mean(1)
            reads[number] += share.mean(1)
    return lost / len(calibration.prompts), reads / len(calibration.prompts)


def make_policy(spec: str, density: float, block: int, calibration: Calibration) -> Policy | None:
    """A policy by its name at a density of reads; None where choosing alone takes as much.

    Args:
        spec: `oracle`, `last`, `vertical`, `quest`, `own/8` (refreshed every 8 steps),
            `own/8>` (and of each block the next one too), `pivots:.05/4` (a twentieth of the
            units are pivots, dense every 4 steps); `+cuts` gives
            every unit a cut of its own, `+effect` one by what its lost attention does; `planned`
            chooses an order and a cut for every unit by that.
        density: Reads.
        block: Tokens a key block.
        calibration: What pivots and cuts are chosen on.

    Raises:
        ConfigError: there is no such policy.
    """
    found = _SPEC.fullmatch(spec)
    if found is None:
        raise ConfigError(f"policy {spec!r} is not known: see make_policy for their names")
    name, every, goal = found["name"], int(found["every"] or 1), found["goal"]
    if name in ("last", "vertical", "oracle") and goal is None:
        return Ordered("mass" if name == "oracle" else name, density)
    if name == "quest":
        # A minimum and a maximum stand beside the keys and values of `block` tokens.
        extra = 1 / block
        return Ordered("bounds", density - extra, extra) if density > extra else None
    if name == "planned":
        return make_plan(calibration, density, block)
    if every > LOCAL:
        raise ConfigError(f"policy {spec!r}: at most {LOCAL} steps lie between two refreshes")
    pivots = torch.arange(calibration.units)
    if name == "pivots":
        count = max(1, round(float(found["share"]) * calibration.units))
        pivots = choose_pivots(calibration, count)
    dense = 0.0 if name == "oracle" else len(pivots.unique()) / len(pivots) / every
    if dense >= density:
        return None
    shared = Shared(pivots, every, (density - dense) / (1 - dense), oracle=name == "oracle")
    shared.ahead = found["ahead"] is not None
    if goal is not None:
        shared.cuts = choose_cuts(calibration, shared, density, goal)
    return shared
