"""The clustering stage: a trained calibration in, an artifact out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shareprefill.artifact import Artifact, Policy, Rows, Thresholds
from shareprefill.autoencoder.embedding import Consensus, consensus
from shareprefill.autoencoder.pipeline import WEIGHTS, Training, load_maps, load_training
from shareprefill.autoencoder.training import load_autoencoder
from shareprefill.calib.store import MapStore
from shareprefill.clustering.assignment import (
    Choice,
    Goal,
    Scored,
    choose,
    choose_by,
    mean_recall,
    slacks,
    total_cost,
    total_harm,
)
from shareprefill.clustering.distances import code_distances, gamma_patterns, jaccard_distances
from shareprefill.clustering.effects import (
    fp8_errors,
    head_effects,
    prompt_effects,
    step_effects,
)
from shareprefill.clustering.estimator import fit_estimator
from shareprefill.clustering.hierarchy import build_linkage, candidate_counts, cut, silhouette
from shareprefill.clustering.measurements import HeldOutMeasurements
from shareprefill.config import ClusterConfig
from shareprefill.errors import ConfigError

# What a plan may cost more than the best one, for heads that are more alike.
_AS_GOOD = 0.01


@dataclass(frozen=True)
class Clustering:
    """One number of clusters, and what it would cost.

    Attributes:
        k: Clusters.
        cost: Predicted cost of all heads on held-out prompts, as a share of dense attention.
        recall: Mean attention mass inside the patterns of all heads there.
        harm: Predicted KL divergence from dense attention there, in nats a position; the heads'
            lost mass where no effects are known.
        silhouette: Of the labels; NaN where it is not defined.
        sharing: Heads that share another head's pattern.
        objective: What numbers of clusters are compared by, the less the better: the predicted
            cost, or with a budget or a bound that as a density, with harm at one price.
        is_best: Whether the artifact is made from it (see `cluster`).
    """

    k: int
    cost: float
    recall: float
    harm: float
    silhouette: float
    sharing: int
    objective: float
    is_best: bool = False


def cluster(folder: Path, config: ClusterConfig) -> tuple[Artifact, list[Clustering]]:
    """Clusters a calibration's heads and chooses every head's policy.

    Consensus maps, distances and clusters come from the prompts that are not held out; the policy
    of every head, and the number of clusters where it is not given, from those that are, and from a
    prompt of every data set that none of these is of. That number is, of all whose predicted cost
    is at most 1 % more than the least, the one of the largest silhouette: cost hardly depends on
    it, as the choice of pivots finds who is alike in a large cluster too. With a budget or a bound,
    harm counts as well, at one price for all numbers of clusters: plans that each meet the budget
    by themselves spend unlike parts of it, and differ in harm by more than clusters do. What is
    taken then spends the budget.
    The rows that pivots sample are those that are best for the fewest clusters.

    Args:
        folder: A trained calibration.
        config: Metric, linkage, targets and thresholds.

    Returns:
        The artifact, and every number of clusters that was tried, in ascending order.

    Raises:
        ConfigError: k is larger than the number of heads, `pivot_rows` was not captured, or the
            budget is less than what every pattern reads.
        DataError: the calibration is missing, incomplete or damaged.
    """
    store = MapStore.open(folder)
    training, codes = load_training(folder)
    store.verify()
    distances, means = _distances(store, folder, training, codes, config)
    heads = len(distances)
    if config.k is not None and config.k > heads:
        raise ConfigError(f"k = {config.k} is larger than the number of heads ({heads})")
    linkage = build_linkage(distances, config.linkage)
    layers = torch.arange(len(store.layers), device="cpu").repeat_interleave(
        heads // len(store.layers)
    )
    counts = candidate_counts(heads) if config.k is None else [config.k]
    labels = {k: cut(linkage, k) for k in counts}
    known = sorted((*training.split.train, *training.split.validation))
    evidence, scored, goal = _best_rows(store, training, known, labels[counts[0]], layers, config)

    def plan(k: int) -> _Plan:
        choices = choose_by(goal, labels[k], layers, evidence, config, scored)
        return _Plan(goal.mean(choices), choices, silhouette(distances, labels[k]))

    plans = {k: plan(k) for k in counts}
    taken = _best(plans)
    choices, _ = choose(labels[taken], layers, evidence, config, scored)
    plans[taken] = replace(plans[taken], choices=choices)
    effects = {
        "effect": head_effects(store, known),
        "step_effect": step_effects(store, known),
        "fp8_error": fp8_errors(store, known),
    }
    artifact = _artifact(store, training, config, evidence, choices, labels[taken], means, effects)
    return artifact, [plans[k].summary(k, is_best=k == taken) for k in counts]


def _best_rows(
    store: MapStore,
    training: Training,
    known: list[int],
    labels: Tensor,
    layers: Tensor,
    config: ClusterConfig,
) -> tuple[HeldOutMeasurements, dict[Goal, Scored], Goal]:
    """Measurements with the rows that pivots sample best for a clustering, and its goal with them.

    All are compared at the goal that the clustering has with the first ones.
    """
    first, *others = _pivot_rows(store, config)
    prompts = [*training.split.held_out, *_further_prompts(store, training)]
    effect = prompt_effects(store, known, prompts)
    estimator = fit_estimator(store, known)
    measured = HeldOutMeasurements(store, prompts, first, estimator=estimator, effect=effect)
    of_first = dict[Goal, Scored]()
    _, goal = choose(labels, layers, measured, config, of_first)

    def judged(
        evidence: HeldOutMeasurements, scored: dict[Goal, Scored]
    ) -> tuple[float, HeldOutMeasurements, dict[Goal, Scored]]:
        found = choose_by(goal, labels, layers, evidence, config, scored)
        return goal.mean(found), evidence, scored

    # Two at a time are kept: measurements take memory.
    further = (judged(measured.with_pivots(rows), {}) for rows in others)
    _, evidence, scored = min(chain([judged(measured, of_first)], further), key=itemgetter(0))
    return evidence, scored, choose(labels, layers, evidence, config, scored)[1]


@dataclass(frozen=True)
class _Plan:
    """The best choice of policies for a number of clusters.

    Attributes:
        objective: What the choices come to by the goal that all numbers are compared by.
        choices: Of every head.
        silhouette: Of the labels.
    """

    objective: float
    choices: list[Choice]
    silhouette: float

    def summary(self, k: int, *, is_best: bool) -> Clustering:
        sharing = sum(choice.policy is Policy.SHARE for choice in self.choices)
        cost, recall = total_cost(self.choices), mean_recall(self.choices)
        harm = total_harm(self.choices)
        return Clustering(
            k, cost, recall, harm, self.silhouette, sharing, self.objective, is_best=is_best
        )


def _best(plans: dict[int, _Plan]) -> int:
    """The number of clusters to take, as `cluster` says."""
    least = min(plan.objective for plan in plans.values())
    close = [k for k, plan in plans.items() if plan.objective <= (1 + _AS_GOOD) * least]
    # With a price of harm, as little harm may make up for a plan that shares less: it takes longer.
    costs = {k: total_cost(plans[k].choices) for k in close}
    close = [k for k in close if costs[k] <= (1 + _AS_GOOD) * min(costs.values())]
    defined = [k for k in close if not math.isnan(plans[k].silhouette)]
    if defined:
        return max(defined, key=lambda k: (plans[k].silhouette, -k))
    return min(close, key=lambda k: (plans[k].objective, k))


def _further_prompts(store: MapStore, training: Training) -> list[int]:
    """The last prompt of every data set that no held-out prompt is of.

    Where data sets are many for the prompts, some have none held out. What heads do on them would
    then be known to no policy: a pattern that serves all others may fail there.
    """
    seen = {store.prompts[number].source for number in training.split.held_out}
    last = {prompt.source: number for number, prompt in enumerate(store.prompts)}
    return sorted(number for source, number in last.items() if source not in seen)


def _pivot_rows(store: MapStore, config: ClusterConfig) -> tuple[int, ...]:
    captured = (0, *store.config.rows[1:])
    if config.pivot_rows is None:
        return captured
    if config.pivot_rows not in captured:
        raise ConfigError(
            f"pivot_rows = {config.pivot_rows} was not captured: it must be one of {captured} "
            "(0: all rows)"
        )
    return (config.pivot_rows,)


def _distances(
    store: MapStore, folder: Path, training: Training, codes: Tensor, config: ClusterConfig
) -> tuple[Tensor, Consensus]:
    known = sorted((*training.split.train, *training.split.validation))
    network = load_autoencoder(folder / WEIGHTS)
    means = consensus(network, codes, known)
    if config.metric == "code":
        return code_distances(means.code), means
    maps = means.maps
    if config.metric == "jaccard-raw":
        maps = load_maps(store, training.config.resolution).maps[known].mean(0)
    return jaccard_distances(gamma_patterns(maps, config.gamma)), means


def _artifact(
    store: MapStore,
    training: Training,
    config: ClusterConfig,
    evidence: HeldOutMeasurements,
    choices: list[Choice],
    labels: Tensor,
    means: Consensus,
    effects: dict[str, Tensor | None],
) -> Artifact:
    geometry = store.fingerprint.geometry
    layers, heads = geometry.layers, geometry.heads
    # Captured heads are numbered one after the other; the artifact counts all layers.
    captured = torch.tensor(store.layers, device="cpu")

    def spread(values: list[Any] | Tensor, dtype: torch.dtype, missing: float) -> Tensor:
        found = torch.as_tensor(values, dtype=dtype, device="cpu")
        full = torch.full((layers, heads, *found.shape[1:]), missing, dtype=dtype, device="cpu")
        full[captured] = found.unflatten(0, (len(captured), heads))
        return full

    def head_id(number: int) -> int:
        return number if number < 0 else int(captured[number // heads]) * heads + number % heads

    fallbacks = [c.policy if c.fallback is None else c.fallback for c in choices]
    return Artifact(
        model=store.config.model,
        fingerprint=store.fingerprint,
        cluster=spread(labels, torch.int32, -1),
        policy=spread([int(c.policy) for c in choices], torch.int8, int(Policy.DENSE)),
        pivot=spread([head_id(c.pivot) for c in choices], torch.int32, -1),
        fallback=spread([int(f) for f in fallbacks], torch.int8, int(Policy.DENSE)),
        gamma=spread([c.gamma for c in choices], torch.float32, 1.0),
        fallback_gamma=spread(
            [c.gamma if c.fallback is None else c.fallback_gamma for c in choices],
            torch.float32,
            1.0,
        ),
        slack=spread(slacks(choices, evidence, config), torch.float32, 0.0),
        recall=spread([c.recall for c in choices], torch.float32, math.nan),
        density=spread([c.density for c in choices], torch.float32, math.nan),
        instability=spread(means.instability, torch.float32, math.nan),
        code=spread(means.code, torch.float32, math.nan),
        **{
            name: None if values is None else spread(values, torch.float32, math.nan)
            for name, values in effects.items()
        },
        block_size=store.config.block_size,
        thresholds=Thresholds(gamma=config.gamma, tau=config.tau, delta=config.delta),
        rows=Rows(
            pivot=evidence.pivot_rows, sample=evidence.sample_rows, check=evidence.check_rows
        ),
        estimator=dict(evidence.estimator),
        configuration={
            "calibrate": store.config.to_dict(),
            "train": training.config.to_dict(),
            "cluster": config.to_dict(),
        },
        summary=_summary(store, training, evidence.numbers, choices, labels),
    )


def _summary(
    store: MapStore,
    training: Training,
    judged: list[int],
    choices: list[Choice],
    labels: Tensor,
) -> dict[str, Any]:
    held_out = training.split.held_out
    recalls = sorted(c.recall for c in choices)
    worst = recalls[: max(1, len(recalls) // 20)]
    return {
        "clusters": int(labels.max()) + 1,
        "sharing_heads": sum(c.policy is Policy.SHARE for c in choices),
        "cost": round(total_cost(choices), 6),
        "density": round(sum(c.density for c in choices) / len(choices), 6),
        "recall": round(sum(recalls) / len(recalls), 6),
        **({"kl": round(total_harm(choices), 9)} if store.config.effect_tokens else {}),
        "recall_worst_5_percent": round(sum(worst) / len(worst), 6),
        "held_out_prompts": [store.prompts[n].source for n in held_out],
        "held_out_tokens": [store.prompts[n].tokens for n in held_out],
        "further_prompts": [store.prompts[n].source for n in judged if n not in held_out],
    }
