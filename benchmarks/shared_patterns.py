"""Captured prompts with every head laid under every head's pattern, and plans laid over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from shareprefill.artifact import Policy
from shareprefill.calib.capture import FULL, map_names, rows_key
from shareprefill.calib.store import MapStore
from shareprefill.clustering.assignment import Choice, choose, slacks, total_cost
from shareprefill.clustering.estimator import fit_estimator
from shareprefill.clustering.measurements import GAMMAS, HeldOutMeasurements, PolicyCurve
from shareprefill.config import LOCAL_BLOCKS, SINK_BLOCKS, ClusterConfig
from shareprefill.runtime.geometry import Geometry
from shareprefill.runtime.ops.block_selection import head_blocks, js_distances, smooth_maps
from shareprefill.runtime.policies.global_threshold import GlobalThreshold
from shareprefill.runtime.policies.smoothed import Smoothed, line_weights

TARGET_RECALL = 0.95
# Query rows a block: of the paper's check by distance, and of a head that estimates its own map.
JS_ROWS, OWN_ROWS = 2, Smoothed().rows
# Numbers of clusters that a plan chooses from; the largest that K allows stands for no sharing.
PLAN_CLUSTERS = (1, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Curve:
    """What heads get at ascending thresholds; all float64 `[G, K]`.

    Attributes:
        recall: Attention mass inside the pattern.
        density: Blocks over causal blocks.
        work: Selection work, as a share of dense attention's operations.
        shares: 1 where a head reads another head's pattern.
        refused: 1 where it does not because its check failed.
    """

    recall: Tensor
    density: Tensor
    work: Tensor
    shares: Tensor
    refused: Tensor

    @property
    def effective(self) -> np.ndarray:
        """Density and work together, mean over heads, `[G]`."""
        return (self.density + self.work).mean(1).numpy()

    def at_recall(self, values: np.ndarray, target: float = TARGET_RECALL) -> float:
        """`values [G]` where the mean recall is `target`; NaN where no threshold reaches it."""
        means = self.recall.mean(1).numpy()
        order = np.argsort(means, kind="stable")
        if not means[order[0]] <= target <= means[order[-1]]:
            return float("nan")
        return float(np.interp(target, means[order], values[order]))


class Captured:
    """One captured prompt.

    Args:
        store: The calibration that it is of.
        number: Its number there.
        pivot_rows: Query rows a block of a pivot's map.
        device: Where its tables are made.
    """

    def __init__(self, store: MapStore, number: int, pivot_rows: int, device: str) -> None:
        self.device = device
        self.task, self.pivot_rows = store.prompts[number].source, pivot_rows
        self.block_size = store.config.block_size
        tokens = store.prompts[number].tokens
        self._geometry = Geometry(
            tokens,
            tokens,
            torch.device(device),
            block_size=self.block_size,
            sink_blocks=SINK_BLOCKS,
            local_blocks=LOCAL_BLOCKS,
        )
        names = map_names(store.config)
        maps = {
            n: t.to(device).float().flatten(0, 1) for n, t in store.load(number, *names).items()
        }
        self._maps = maps
        self._full = maps[FULL]
        self.heads = len(self._full)
        self.check_rows = store.config.rows[0]
        others = [n for n in range(len(store.prompts)) if n != number]
        self.estimator = fit_estimator(store, others)

    def oracle(self) -> Curve:
        """Every head under its own exact map."""
        return self._curve(self._full, self._head_blocks, 0.0)

    def smoothed(self, rows: int = OWN_ROWS) -> Curve:
        """Every head under its own sampled rows, smoothed."""
        return self._curve(self._estimate(rows), self._head_blocks, self.work(rows))

    def level(self, rows: int = OWN_ROWS) -> Curve:
        """The same under one threshold for all heads."""
        inputs = cast(Any, SimpleNamespace(geometry=self._geometry))

        def chosen(estimate: Tensor, gamma: Tensor) -> Tensor:
            return GlobalThreshold(rows=rows).choose(inputs, estimate, gamma)

        return self._curve(self._estimate(rows), chosen, self.work(rows))

    def work(self, rows: int) -> float:
        """Selection work of sampled rows."""
        return rows / (2 * self.block_size)

    def pairs(self) -> Pairs:
        """Every head under every head's pattern."""
        estimate = self._estimate(self.pivot_rows)
        check = self._maps[rows_key(self.check_rows)].flatten(1)
        n_q = self._full.shape[1]
        recalls, covered, densities = [], [], []
        for gamma in GAMMAS:
            pattern = self._head_blocks(estimate, self._full.new_full((self.heads,), gamma))
            columns = pattern.flatten(1).float().T
            recalls.append((self._full.flatten(1) @ columns).double().div(n_q).clamp(max=1))
            covered.append((check @ columns).double().div(n_q).clamp(max=1))
            densities.append(pattern.sum((1, 2)).double() / self._geometry.causal_count)
        return Pairs(*(torch.stack(t).cpu() for t in (recalls, covered, densities)))

    def distances(self, pivot: Tensor) -> Tensor:
        """JS distance of each head's sampled rows to its pivot's map, mean over blocks, `[K]`."""
        own = self._maps[rows_key(JS_ROWS)]
        shared = self._maps[rows_key(self.pivot_rows)][pivot.to(own.device)]
        return js_distances(own, shared, torch.arange(len(own), device=own.device)).cpu()

    def _estimate(self, rows: int) -> Tensor:
        maps = self._maps[rows_key(rows)]
        return smooth_maps(maps, line_weights(self.estimator, rows), **self._geometry.sizes)

    def _head_blocks(self, estimate: Tensor, gamma: Tensor) -> Tensor:
        return head_blocks(estimate, gamma, **self._geometry.reads)[0]

    def _read(self, pattern: Tensor) -> Tensor:
        return (pattern | self._geometry.always) & self._geometry.causal

    def _curve(self, estimate: Tensor, chosen: Any, work: float) -> Curve:
        recalls, densities = [], []
        for gamma in GAMMAS:
            pattern = self._read(chosen(estimate, self._full.new_full((self.heads,), gamma)))
            recalls.append((self._full * pattern).sum((1, 2)).double() / self._full.shape[1])
            densities.append(pattern.sum((1, 2)).double() / self._geometry.causal_count)
        recall, density = torch.stack(recalls).clamp(max=1).cpu(), torch.stack(densities).cpu()
        none = torch.zeros_like(recall)
        return Curve(recall, density, torch.full_like(recall, work), none, none)


@dataclass(frozen=True)
class Pairs:
    """Heads under the patterns of others; float64.

    Attributes:
        recall: Of head h under pivot p's pattern, `[G, K, K]`.
        covered: The same of the head's check rows.
        density: Of the pivots' patterns `[G, K]`.
    """

    recall: Tensor
    covered: Tensor
    density: Tensor


@dataclass(frozen=True)
class Measurement:
    """A prompt with all that is measured of it."""

    prompt: Captured
    evidence: HeldOutMeasurements
    pairs: Pairs
    own: Curve
    oracle: Curve


def shared_curve(measured: Measurement, pivot: Tensor, passes: Tensor) -> Curve:
    """Heads under their pivots' patterns, or their own where the check fails.

    Args:
        measured: The prompt.
        pivot: Head whose pattern each head shares, its own number for the others, int64 `[K]`.
        passes: Whether a head's check passes, bool `[G, K]`.
    """
    prompt, pairs, own = measured.prompt, measured.pairs, measured.own
    every = torch.arange(len(pivot))
    sharer = pivot != every
    giver = torch.isin(every, pivot[sharer])
    shares = sharer & passes
    read = shares | giver
    work = torch.where(giver, prompt.work(prompt.pivot_rows), own.work)
    tried = prompt.work(prompt.check_rows)
    work = torch.where(sharer, tried + torch.where(passes, 0.0, own.work), work)
    return Curve(
        recall=torch.where(read, pairs.recall[:, every, pivot], own.recall),
        density=torch.where(read, pairs.density[:, pivot], own.density),
        work=work,
        shares=shares.double(),
        refused=(sharer & ~passes).double(),
    )


def checked(pairs: Pairs, pivot: Tensor, slack: float) -> Tensor:
    """Whether the sampled rows of a head have gamma - slack of their mass in the pivot's pattern.

    Returns:
        bool `[G, K]`.
    """
    covered = pairs.covered[:, torch.arange(len(pivot)), pivot]
    return covered >= torch.tensor(GAMMAS)[:, None] - slack


def choose_pivots(known: Sequence[Pairs], labels: Tensor, layers: Tensor, gamma: float) -> Tensor:
    """The head whose pattern each head shares, int64 `[K]`; its own number where it shares none.

    The pivot of a cluster is the member whose pattern covers most for the members of its layer and
    later ones, on prompts that are known. Members of earlier layers choose for themselves.
    """
    covered = torch.stack([p.recall[GAMMAS.index(gamma)] for p in known]).mean(0)
    pivot = torch.arange(len(labels))
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero()[:, 0]
        if len(members) < 2:
            continue
        later = layers[members][:, None] >= layers[members][None, :]
        gains = torch.where(later, covered[members][:, members], 0.0).sum(0)
        best = members[int(gains.argmax())]
        pivot[members[layers[members] >= layers[best]]] = best
    return pivot


class Pooled:
    """Several prompts' evidence as one, for `clustering.assignment`.

    Args:
        parts: HeldOutMeasurements and pairs of each prompt.
        allowed: Which head may share which pivot's pattern, bool `[K, K]`; None: any.
    """

    def __init__(self, parts: Sequence[Measurement], allowed: Tensor | None = None) -> None:
        first = parts[0].evidence
        self._parts = parts
        self.heads, self.pivot_rows = first.heads, first.pivot_rows
        self.check_work, self.check_rows = first.check_work, first.check_rows
        self.alone = {p: _pooled([m.evidence.alone[p] for m in parts]) for p in first.alone}
        self.pivots = _pooled([m.evidence.pivots for m in parts])
        self.distance_to_uniform = (
            torch.stack([m.evidence.distance_to_uniform for m in parts]).min(0).values
        )
        self.pairs = torch.stack([m.evidence.pairs for m in parts]).mean(0)
        self.worst_pairs = torch.stack([m.evidence.worst_pairs for m in parts]).min(0).values
        # Its plans reach targets and budgets of recall.
        self.pair_harm = None
        if allowed is not None:
            self.worst_pairs = torch.where(allowed, self.worst_pairs, 0.0)

    def least_covered(self, head: int, pivot: int, gamma: float) -> float:
        """Mass of a head's check inside a pivot's pattern, on the prompt where it is least."""
        g = GAMMAS.index(gamma)
        return min(m.pairs.covered[g, head, pivot].item() for m in self._parts)


def _pooled(parts: Sequence[PolicyCurve]) -> PolicyCurve:
    return PolicyCurve(
        torch.stack([m.recall for m in parts]).mean(0),
        torch.stack([m.worst_recall for m in parts]).min(0).values,
        torch.stack([m.density for m in parts]).mean(0),
        sum(m.work for m in parts) / len(parts),
    )


@dataclass(frozen=True)
class Plan:
    """Choices of all heads, with the slack of each one's check."""

    choices: list[Choice]
    slacks: list[float]

    @property
    def sharing(self) -> int:
        """Heads that are to share."""
        return sum(c.policy is Policy.SHARE for c in self.choices)


def make_plan(
    parts: Sequence[Measurement],
    labels: Sequence[Tensor],
    layers: Tensor,
    config: ClusterConfig,
    allowed: Tensor | None = None,
) -> Plan:
    """The plan of least predicted cost over several clusterings, as `sp cluster` makes it."""
    pooled = cast(Any, Pooled(parts, allowed))
    found = min((choose(each, layers, pooled, config)[0] for each in labels), key=total_cost)
    return Plan(found, slacks(found, pooled, config))


def apply_plan(plan: Plan, measured: Measurement) -> dict[str, float]:
    """What a plan gives on a prompt: means over heads, as a session would run it."""
    evidence, rows = measured.evidence, []
    for head, (choice, slack) in enumerate(zip(plan.choices, plan.slacks, strict=True)):
        policy, gamma, work, failed = choice.policy, choice.gamma, 0.0, 0.0
        if policy is Policy.SHARE:
            g = GAMMAS.index(gamma)
            covered = measured.pairs.covered[g, head, choice.pivot].item()
            work = evidence.check_work
            if covered >= gamma - slack:
                recall = evidence.pairs[g, head, choice.pivot].item()
                rows.append((recall, evidence.pivots.density[g, choice.pivot].item(), work, 1, 0))
                continue
            assert choice.fallback is not None
            policy, gamma, failed = choice.fallback, choice.fallback_gamma, 1.0
        if policy is Policy.DENSE:
            rows.append((1.0, 1.0, work, 0, failed))
            continue
        table = evidence.pivots if policy is Policy.PIVOT else evidence.alone[policy]
        g = GAMMAS.index(gamma)
        found = (table.recall[g, head].item(), table.density[g, head].item())
        rows.append((*found, work + table.work, 0, failed))
    recall, density, work, shares, failed = torch.tensor(rows, dtype=torch.float64).T
    return {
        "recall": recall.mean().item(),
        "worst": worst(recall),
        "density": density.mean().item(),
        "work": work.mean().item(),
        "effective": (density + work).mean().item(),
        "shares": shares.mean().item(),
        "failed": failed.mean().item(),
    }


def worst(recalls: Tensor) -> float:
    """Mean recall of the worst 5 % of heads, at least one."""
    return recalls.sort().values[: max(1, len(recalls) // 20)].mean().item()
