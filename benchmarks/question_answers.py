"""The questions of `questions.py`: a study of captured prompts in, tables out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from shared_patterns import (
    JS_ROWS,
    PLAN_CLUSTERS,
    TARGET_RECALL,
    Captured,
    Curve,
    Measurement,
    apply_plan,
    checked,
    choose_pivots,
    make_plan,
    shared_curve,
    worst,
)
from torch import Tensor

from shareprefill.autoencoder.embedding import consensus
from shareprefill.autoencoder.pca import fit_pca
from shareprefill.autoencoder.pipeline import WEIGHTS, Training, load_maps, load_training
from shareprefill.autoencoder.training import load_autoencoder
from shareprefill.calib.store import MapStore
from shareprefill.clustering.distances import code_distances, gamma_patterns, jaccard_distances
from shareprefill.clustering.hierarchy import build_linkage, cut
from shareprefill.clustering.measurements import GAMMAS
from shareprefill.config import ClusterConfig
from shareprefill.evaluation.statistics import Estimate, bootstrap

TASKS = (
    *("retr_kv", "retr_passkey", "retr_number", "math_find", "code_run", "variable_tracking"),
    "text",
)
CLUSTERS = (8, 16, 32, 64)
RANDOM_DRAWS = 5
# Of the tables where nothing else is said: mass to cover, clusters, and slack of the check.
GAMMA, K, SLACK, TAU = 0.9, 16, 0.04, 0.2
TAUS = (0.05, 0.1, 0.2, 0.3, 0.4)
SLACKS = (0.0, 0.02, 0.04, 0.08, 0.16)
GAMMAS_TRIED = (0.8, 0.87, 0.9, 0.95, 0.97)
DELTAS = (0.0, 0.2, 0.3, 0.4, 0.6)
TARGETS = (0.9, 0.93, 0.95, 0.97, 0.98)
PLAN_COLUMNS = ("recall", "worst", "effective", "work", "shares", "failed")
PLAN_TITLES = (
    *("recall", "worst 5 %", "effective density", "selection work"),
    *("heads sharing", "checks failed"),
)


@dataclass(frozen=True)
class Table:
    """One answer.

    Attributes:
        title: What it tells.
        columns: Of the cells.
        rows: Texts, numbers, estimates, or None where there is nothing to tell.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def markdown(self) -> str:
        """The table, below its title."""
        lines = [f"### {self.title}", ""]
        for cells in (self.columns, ("---",) * len(self.columns), *self.rows):
            lines.append(f"| {' | '.join(map(shown, cells))} |")
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rows = [[c.to_dict() if isinstance(c, Estimate) else c for c in row] for row in self.rows]
        return {"title": self.title, "columns": list(self.columns), "rows": rows}


def shown(cell: Any) -> str:
    """A cell as text."""
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.4f}"
    if isinstance(cell, Estimate):
        ends = "" if cell.low is None else f" [{cell.low:.3f}, {cell.high:.3f}]"
        return f"{cell.value:.3f}{ends}"
    return str(cell)


def estimate(values: Iterable[float]) -> Estimate | None:
    """Mean over prompts with its interval; None where a prompt has no value."""
    found = np.array(list(values))
    return None if np.isnan(found).any() else bootstrap(found)


@dataclass(frozen=True)
class Study:
    """Everything that the questions are answered from.

    Attributes:
        store: Calibration prompts, with a trained autoencoder beside them.
        training: The autoencoder's.
        known: Numbers of the calibration prompts that form clusters.
        held_out: The others, one a task: policies are chosen on them.
        unseen: Prompts that figures are of.
        layers: Layer of every head, int64 `[K]`.
        density: That recalls are compared at.
    """

    store: MapStore
    training: Training
    known: list[int]
    held_out: list[Measurement]
    unseen: list[Measurement]
    layers: Tensor
    density: float

    @property
    def heads(self) -> int:
        """K."""
        return len(self.layers)


def autoencoder_question(study: Study) -> list[Table]:
    """Autoencoder, PCA, raw maps and codes as the measure of likeness; random clusters."""
    distances = all_distances(study)
    losses = study.training.losses
    loss = Table(
        "1a. Reconstruction of held-out maps (mean squared Hellinger distance of a row)",
        ("autoencoder", "its PCA start", "PCA, normalised", "PCA", "mean map of each head"),
        [(losses.autoencoder, losses.start, losses.pca, losses.pca_linear, losses.head_mean)],
    )
    rows: list[tuple[Any, ...]] = []
    alone = [m.own.at_recall(m.own.effective) / oracle_density(m) for m in study.unseen]
    rows.append((None, "no sharing", None, None, estimate(alone), None))
    for k in (k for k in CLUSTERS if k <= study.heads):
        for name, matrix in distances.items():
            labels = cut(build_linkage(matrix, "average"), k)
            rows.append((k, name, *cluster_figures(study, [labels])))
        labels = cut(build_linkage(distances["autoencoder, Jaccard"], "average"), k)
        draws = [torch.Generator().manual_seed(n) for n in range(RANDOM_DRAWS)]
        shuffled = [labels[torch.randperm(len(labels), generator=draw)] for draw in draws]
        rows.append((k, "random, of the first one's sizes", *cluster_figures(study, shuffled)))
    found = Table(
        f"1b. Clusters by measure of likeness (recall at density {study.density}; effective "
        f"density at mean recall {TARGET_RECALL} over the oracle's density)",
        (
            *("k", "measure", "pivot's pattern, recall", "own exact pattern, recall"),
            *("effective ÷ oracle", "heads sharing"),
        ),
        rows,
    )
    return [loss, found]


def cluster_figures(study: Study, clusterings: Sequence[Tensor]) -> tuple[Estimate | None, ...]:
    """Of clusterings, means over them: the figures of table 1b."""
    values: list[list[list[float]]] = []
    for labels in clusterings:
        pivot = pivots_of(study, labels)
        values.append([one_prompt(m, pivot, study.density) for m in study.unseen])
    means = np.array(values).mean(0)  # [P, figures]
    return tuple(estimate(column) for column in means.T)


def one_prompt(measured: Measurement, pivot: Tensor, density: float) -> list[float]:
    """One prompt's figures of table 1b."""
    every = torch.arange(len(pivot))
    sharer = (pivot != every).nonzero()[:, 0]
    pairs, oracle = measured.pairs, measured.oracle
    found = [float("nan")] * 2
    if len(sharer):
        under = pairs.recall[:, sharer, pivot[sharer]].mean(1).numpy()
        found = [
            at_density(under, pairs.density[:, pivot[sharer]].mean(1).numpy(), density),
            at_density(
                oracle.recall[:, sharer].mean(1).numpy(),
                oracle.density[:, sharer].mean(1).numpy(),
                density,
            ),
        ]
    curve = shared_curve(measured, pivot, checked(pairs, pivot, SLACK))
    found.append(curve.at_recall(curve.effective) / oracle_density(measured))
    found.append(curve.at_recall(curve.shares.mean(1).numpy()))
    return found


def oracle_density(measured: Measurement) -> float:
    """The oracle's density at the target recall."""
    return measured.oracle.at_recall(measured.oracle.density.mean(1).numpy())


def at_density(recalls: np.ndarray, densities: np.ndarray, target: float) -> float:
    """Recall at a density, between thresholds; NaN where none gives it."""
    order = np.argsort(densities, kind="stable")
    if not densities[order[0]] <= target <= densities[order[-1]]:
        return float("nan")
    return float(np.interp(target, densities[order], recalls[order]))


def pivots_of(study: Study, labels: Tensor) -> Tensor:
    """The pivot of every head, int64 `[K]`, chosen on the held-out calibration prompts."""
    return choose_pivots([m.pairs for m in study.held_out], labels, study.layers, GAMMA)


def all_distances(study: Study) -> dict[str, Tensor]:
    """Distances of heads by each measure, float64 `[K, K]`, from the known prompts."""
    folder, resolution = study.store.folder, study.training.config.resolution
    network, (_, codes) = load_autoencoder(folder / WEIGHTS), load_training(folder)
    maps = load_maps(study.store, resolution).maps  # [P, K, R, R]
    known = sorted((*study.training.split.train, *study.training.split.validation))
    agreed = consensus(network, codes, known)
    roots = network.roots(maps[list(study.training.split.train)]).flatten(0, 1)
    pca = fit_pca([roots], study.training.config.code_size)
    mean = network.roots(maps[known]).mean(0)  # [K, S]
    rebuilt = torch.zeros(len(mean), resolution * resolution)
    rebuilt[:, network.entries] = network.normalise(pca.reconstruct(mean)).square()
    consensus_maps = {
        "autoencoder, Jaccard": agreed.maps,
        "PCA, Jaccard": rebuilt.unflatten(1, (resolution, resolution)),
        "raw maps, Jaccard": maps[known].mean(0),
    }
    found = {
        name: jaccard_distances(gamma_patterns(each.detach(), GAMMA))
        for name, each in consensus_maps.items()
    }
    return {**found, "autoencoder's codes, cosine": code_distances(agreed.code)}


def consensus_labels(study: Study) -> list[Tensor]:
    """Clusterings on the consensus maps, as `sp cluster` makes them, for a plan to choose from."""
    return labels_of(all_distances(study)["autoencoder, Jaccard"])


def labels_of(distances: Tensor) -> list[Tensor]:
    """Clusterings of some numbers of clusters."""
    linkage = build_linkage(distances, "average")
    return [cut(linkage, k) for k in PLAN_CLUSTERS if k <= len(distances)]


def plan_row(found: Sequence[dict[str, float]]) -> tuple[Estimate | None, ...]:
    """Figures of a plan on some prompts."""
    return tuple(estimate(one[name] for one in found) for name in PLAN_COLUMNS)


def sharing_question(study: Study, labels: list[Tensor]) -> list[Table]:
    """Plans with and without sharing, by task."""
    config, alone = ClusterConfig(), [torch.arange(study.heads)]
    plans = {
        "on": make_plan(study.held_out, labels, study.layers, config),
        "off": make_plan(study.held_out, alone, study.layers, config),
    }
    rows = []
    for task in (*TASKS, "all"):
        chosen = [m for m in study.unseen if task in ("all", m.prompt.task)]
        for name, plan in plans.items():
            rows.append((task, name, *plan_row([apply_plan(plan, m) for m in chosen])))
    title = f"2. Sharing on and off (plans for recall {config.target_recall} of every head)"
    return [Table(title, ("task", "sharing", *PLAN_TITLES), rows)]


def transfer_question(study: Study) -> list[Table]:
    """Plans that were calibrated on other tasks than they are used on."""
    maps = load_maps(study.store, study.training.config.resolution).maps
    plans: dict[tuple[str, ...], Any] = {}

    def plan_for(tasks: tuple[str, ...]) -> Any:
        chosen = tuple(task for task in TASKS if task in tasks)
        if chosen not in plans:
            known = [n for n in study.known if study.store.prompts[n].source in chosen]
            # Without the autoencoder: it has seen all tasks.
            distances = jaccard_distances(gamma_patterns(maps[known].mean(0), GAMMA))
            parts = [m for m in study.held_out if m.prompt.task in chosen]
            labels = labels_of(distances)
            plans[chosen] = make_plan(parts, labels, study.layers, ClusterConfig())
        return plans[chosen]

    rows, by_scope = [], {}
    for number, task in enumerate(TASKS):
        others = [TASKS[(number + step) % len(TASKS)] for step in range(1, len(TASKS))]
        scopes = {
            "the task itself": (task,),
            "one other": tuple(others[:1]),
            "three others": tuple(others[:3]),
            "all others": tuple(others),
            "all tasks": TASKS,
        }
        chosen = [m for m in study.unseen if m.prompt.task == task]
        for scope, tasks in scopes.items():
            found = [apply_plan(plan_for(tasks), m) for m in chosen]
            by_scope.setdefault(scope, []).extend(found)
            rows.append((task, scope, *plan_row(found)))
    rows += [("all", scope, *plan_row(found)) for scope, found in by_scope.items()]
    title = "3. Calibrated on other tasks (clusters on raw maps; 'one' and 'three': the next ones)"
    return [Table(title, ("task", "calibrated on", *PLAN_TITLES), rows)]


def threshold_question(study: Study, labels: list[Tensor]) -> list[Table]:
    """Recall and density as each threshold moves, the others as they are by default."""
    clusters = next(each for each in reversed(labels) if len(each.unique()) <= K)
    pivot = pivots_of(study, clusters)

    def curve_rows(
        name: str, values: Sequence[float], passes: Callable[[Measurement, float], Tensor]
    ) -> list[tuple[Any, ...]]:
        rows = []
        for value in values:
            g = GAMMAS.index(value if name == "gamma" else GAMMA)
            curves = [shared_curve(m, pivot, passes(m, value)) for m in study.unseen]
            found = [point(curve, g) for curve in curves]
            rows.append((name, value, *plan_row(found)))
        return rows

    def by_distance(measured: Measurement, tau: float) -> Tensor:
        near = measured.prompt.distances(pivot) < tau
        return near.expand(len(GAMMAS), -1)

    def by_mass(measured: Measurement, slack: float) -> Tensor:
        return checked(measured.pairs, pivot, slack)

    rows = curve_rows("tau (the paper's check)", TAUS, by_distance)
    for delta in DELTAS:
        # As the paper's: heads whose check fails, and that are highly sparse, take vertical-slash.
        curves = [
            shared_curve(with_slashes(m, delta), pivot, by_distance(m, TAU)) for m in study.unseen
        ]
        found = [point(curve, GAMMAS.index(GAMMA)) for curve in curves]
        rows.append((f"delta (the paper's check, tau {TAU})", delta, *plan_row(found)))
    rows += curve_rows("slack", SLACKS, by_mass)
    rows += curve_rows("gamma", GAMMAS_TRIED, lambda m, _: by_mass(m, SLACK))
    for target in TARGETS:
        config = ClusterConfig(target_recall=target)
        plan = make_plan(study.held_out, labels, study.layers, config)
        found = [apply_plan(plan, m) for m in study.unseen]
        rows.append(("target recall (plan)", target, *plan_row(found)))
    title = (
        f"4. Thresholds, one at a time (gamma {GAMMA}, {len(clusters.unique())} clusters, slack "
        f"{SLACK}; tau is checked on {JS_ROWS} rows)"
    )
    return [Table(title, ("threshold", "value", *PLAN_TITLES), rows)]


def with_slashes(measured: Measurement, delta: float) -> Measurement:
    """The same with vertical-slash for heads that are farther than `delta` from uniform."""
    own, slashes = measured.own, measured.evidence.vertical_slash
    sparse = measured.evidence.distance_to_uniform > delta
    mixed = replace(
        own,
        recall=torch.where(sparse, slashes.recall, own.recall),
        density=torch.where(sparse, slashes.density, own.density),
        work=torch.where(sparse, slashes.work, own.work),
    )
    return replace(measured, own=mixed)


def point(curve: Curve, g: int) -> dict[str, float]:
    """A curve's figures at one threshold, named as a plan's."""
    return {
        "recall": curve.recall[g].mean().item(),
        "worst": worst(curve.recall[g]),
        "effective": float(curve.effective[g]),
        "work": curve.work[g].mean().item(),
        "shares": curve.shares[g].mean().item(),
        "failed": curve.refused[g].mean().item(),
    }


def layer_question(study: Study, labels: list[Tensor]) -> list[Table]:
    """Whether pivots of the own layer are worth their place."""
    same = study.layers[:, None] == study.layers[None, :]
    itself = torch.eye(study.heads, dtype=torch.bool)
    rows = []
    for name, allowed in (
        ("earlier layers only", ~same | itself),
        ("earlier layers and the same", None),
        ("the same layer only", same),
    ):
        plan = make_plan(study.held_out, labels, study.layers, ClusterConfig(), allowed)
        found = [apply_plan(plan, m) for m in study.unseen]
        cost = sum(c.cost for c in plan.choices) / study.heads
        rows.append((name, plan.sharing, cost, *plan_row(found)))
    columns = ("pivots from", "planned to share", "predicted cost", *PLAN_TITLES)
    return [Table("5. Pivots of the same layer (plans)", columns, rows)]


def block_question(study: Study, other: list[Captured]) -> list[Table]:
    """Finer blocks: what they save and what their selection costs."""
    coarse = [m.prompt for m in study.unseen]
    references = [oracle_density(m) for m in study.unseen]
    rows = []
    for prompts in (coarse, other):
        size = prompts[0].block_size
        oracles = [prompt.oracle() for prompt in prompts]
        densities = [curve.at_recall(curve.density.mean(1).numpy()) for curve in oracles]
        ratios = np.array(densities) / references
        rows.append((size, "oracle", estimate(densities), None, 0.0, estimate(ratios)))
        for rows_a_block in (1, 2):
            for name in ("smoothed", "global-threshold"):
                curves = [getattr(prompt, name)(rows_a_block) for prompt in prompts]
                effective = np.array([curve.at_recall(curve.effective) for curve in curves])
                plain = [curve.at_recall(curve.density.mean(1).numpy()) for curve in curves]
                label = f"{name}, {rows_a_block} row{'s' * (rows_a_block > 1)}"
                work = prompts[0].work(rows_a_block)
                ratios = estimate(effective / references)
                rows.append((size, label, estimate(plain), estimate(effective), work, ratios))
    title = (
        f"6. Block sizes at mean recall {TARGET_RECALL} (÷ the oracle's density with blocks of "
        f"{coarse[0].block_size}; the kernel's own cost is not in it)"
    )
    columns = ("block", "choice", "density", "effective density", "selection work", "÷ oracle")
    return [Table(title, columns, rows)]
