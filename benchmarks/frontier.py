"""The frontier of every selection policy: recall and output error against density, by task.

`python benchmarks/frontier.py --model DIR --length 8192 --task retr_kv --task text` runs the model
on prompts that calibration never sees (their seeds differ), lays every policy over every layer's
own queries and keys at a grid of its threshold, and prints, for each task and policy:

- density at mean recall .95, and with the selection work added (effective density), over the
  oracle's density there;
- the mean recall of the worst 5 % of heads at that point;
- effective density over the oracle's, where the mean recall is at least .95 and that of the worst
  5 % of heads at least .93;
- the relative error of the attention output at density .20, mean over heads.

Policies with a star take a threshold for each head: the one that gives it the target recall on
calibration prompts (a mixture of all tasks, `--calibrate` of them). `+mean` adds one mean key and
value for every skipped block to the output. `share` clusters the heads on the calibration prompts;
the pivot of a cluster (its own rows sampled and smoothed as in `global-threshold`) gives its
pattern to every head of the cluster for which it covers, on one sampled row a block, nearly as much
as for the pivot itself; the others choose for themselves.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shareprefill.calib.tasks import generate
from shareprefill.clustering.distances import gamma_patterns, jaccard_distances
from shareprefill.clustering.hierarchy import build_linkage, cut
from shareprefill.models import load_model, load_tokenizer
from shareprefill.runtime.geometry import Geometry
from shareprefill.runtime.interface import AttentionCall, attached, dense_attention
from shareprefill.runtime.ops.block_selection import covered_mass, head_blocks
from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
from shareprefill.runtime.ops.blocks import BlockLists
from shareprefill.runtime.policies import SELECTION_POLICIES, make_policy
from shareprefill.runtime.policies.base import LayerInputs, MapEstimator
from shareprefill.runtime.policies.flash import mean_correction
from shareprefill.runtime.policies.global_threshold import GlobalThreshold
from shareprefill.runtime.policies.oracle import Oracle
from shareprefill.runtime.policies.sampled import sampled_maps, sampling_work
from shareprefill.runtime.policies.streaming import Streaming
from shareprefill.tokens import encode

TASKS = (
    *("retr_kv", "retr_passkey", "retr_number", "math_find", "code_run", "variable_tracking"),
    "text",
)
GAMMAS = (
    *(
        0.01,
        0.03,
        0.06,
        0.1,
        0.2,
        0.3,
        0.4,
        0.5,
        0.55,
        0.6,
        0.65,
        0.7,
        0.74,
        0.78,
        0.81,
        0.84,
        0.86,
        0.88,
    ),
    *(0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995, 0.999, 0.9999),
)
# Recall that a head's own threshold aims at.
TARGETS = (*(0.7, 0.8, 0.85, 0.88, 0.9), *(0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99))
LOCAL_BLOCKS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)
TARGET_RECALL, TARGET_WORST, TARGET_DENSITY = 0.95, 0.93, 0.20
# Policy share: rows a block of a pivot, and how much less mass it may cover for a sharing head.
PIVOT_ROWS, CHECK_SLACK = 4, 0.04
CALIBRATION_SEED, HELD_OUT_SEED = 1, 1001


@dataclass(frozen=True)
class Candidate:
    """A policy and the points of its curve.

    Attributes:
        name: In the table.
        policies: The policy at every point (one object where only the threshold changes).
        gammas: Thresholds, float32 `[points, K]` (`[points, 1]` where heads have the same).
        corrected: Mean keys and values of skipped blocks are added to the output.
        pivot: Head whose pattern each head shares, its own number for the others, int64 `[K]`; None
            where nothing is shared.
    """

    name: str
    policies: tuple[Any, ...]
    gammas: Tensor
    corrected: bool = False
    pivot: Tensor | None = None


@dataclass
class Curve:
    """What a candidate gave on one prompt: by layer, then over all heads.

    Attributes:
        recall: `[points, H]`.
        density: `[points, H]`.
        work: Selection work `[points, H]`.
        error: Of the output `[H]`, where asked for.
    """

    recall: list[Tensor] = field(default_factory=list)
    density: list[Tensor] = field(default_factory=list)
    work: list[Tensor] = field(default_factory=list)
    error: list[Tensor] = field(default_factory=list)


class Probe:
    """Attention handler: the model's own attention, and every candidate laid over its inputs."""

    def __init__(self, candidates: list[Candidate], block_size: int, *, outputs: bool) -> None:
        self.candidates, self.block_size, self.outputs = candidates, block_size, outputs
        self.curves = {c.name: Curve() for c in candidates}
        self.heads = 0
        self.exact: list[Tensor] = []
        # Patterns of the pivots so far and what they cover for themselves, by candidate and head.
        self._shared: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, call: AttentionCall) -> Tensor:
        out = dense_attention(call)
        if call.is_shareable:
            self._measure(call, out[0])
            self.heads += call.query.shape[1]
        return out

    def _measure(self, call: AttentionCall, dense: Tensor) -> None:
        inputs = layer_inputs(call, self.block_size)
        every = torch.arange(inputs.query.shape[0], device=inputs.query.device)
        exact = sampled_maps(inputs, every, None)
        self.exact.append(exact.half().cpu())
        known: dict[int, Any] = {}
        for candidate in self.candidates:
            gammas = self._gammas(candidate, len(every)).to(every.device)
            patterns = torch.stack(
                [
                    choose(policy, inputs, every, gamma, exact, known)
                    for policy, gamma in zip(candidate.policies, gammas, strict=True)
                ]
            )
            work = torch.full(patterns.shape[:2], policy_work(candidate.policies[0], inputs))
            if candidate.pivot is not None:
                patterns, work = self._share(candidate, inputs, gammas, patterns)
            curve = self.curves[candidate.name]
            curve.work.append(work)
            curve.recall.append(torch.stack([covered_mass(exact, p, every) for p in patterns]))
            curve.density.append(patterns.sum((2, 3)) / inputs.geometry.causal_count)
            if self.outputs:
                out = attend(inputs, call.value[0], patterns[0], corrected=candidate.corrected)
                curve.error.append(relative_error(out, dense))

    def _share(
        self, candidate: Candidate, inputs: LayerInputs, gammas: Tensor, own: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Patterns `[points, H, n_q, n_k]` and work `[points, H]` where heads share."""
        assert candidate.pivot is not None
        pivots = candidate.pivot[self.heads : self.heads + own.shape[1]].tolist()
        every = torch.arange(own.shape[1], device=own.device)
        check = sampled_maps(inputs, every, 1)
        fine = GlobalThreshold(rows=PIVOT_ROWS).estimate(inputs, every)
        alone = sampling_work(inputs, 2)
        one, rows = sampling_work(inputs, 1), sampling_work(inputs, PIVOT_ROWS)
        patterns, work = own.clone(), torch.full(own.shape[:2], alone)
        given = set(candidate.pivot[candidate.pivot != torch.arange(len(candidate.pivot))].tolist())
        for h, head in enumerate(range(self.heads, self.heads + own.shape[1])):
            if head not in given:
                continue
            policy = GlobalThreshold(rows=PIVOT_ROWS)
            chosen = [policy.choose(inputs, fine[h : h + 1], g[h : h + 1])[0] for g in gammas]
            pattern = (torch.stack(chosen) | inputs.geometry.always) & inputs.geometry.causal
            self._shared[candidate.name, head] = pattern, _covered(check[h], pattern)
            patterns[:, h], work[:, h] = pattern, rows + one
        for h, pivot in enumerate(pivots):
            if pivot == self.heads + h:
                continue
            pattern, covered = self._shared[candidate.name, pivot]
            passed = _covered(check[h], pattern) >= covered - CHECK_SLACK
            patterns[:, h] = torch.where(passed[:, None, None], pattern, own[:, h])
            work[:, h] = torch.where(passed.cpu(), one, one + alone)
        return patterns, work

    def _gammas(self, candidate: Candidate, heads: int) -> Tensor:
        if candidate.gammas.shape[1] == 1:
            return candidate.gammas.expand(-1, heads)
        return candidate.gammas[:, self.heads : self.heads + heads]


def layer_inputs(call: AttentionCall, block_size: int) -> LayerInputs:
    """A call's tensors as a policy sees them."""
    query, key = call.query[0], call.key[0]
    geometry = Geometry(
        query.shape[1],
        key.shape[1],
        query.device,
        block_size=block_size,
        sink_blocks=1,
        local_blocks=2,
    )
    return LayerInputs(query, key, call.scale, geometry)


def _covered(check: Tensor, patterns: Tensor) -> Tensor:
    """Mass of one head's sampled rows `[n_q, n_k]` inside each of some patterns, `[P]`."""
    every = torch.arange(len(patterns), device=patterns.device)
    return covered_mass(check.expand(len(patterns), -1, -1).contiguous(), patterns, every)


def choose(
    policy: Any,
    inputs: LayerInputs,
    heads: Tensor,
    gamma: Tensor,
    exact: Tensor,
    known: dict[int, Any],
) -> Tensor:
    """A policy's blocks with those that are always read; estimates are made once a layer."""
    if isinstance(policy, MapEstimator):
        if id(policy) not in known:
            is_oracle = isinstance(policy, Oracle)
            known[id(policy)] = exact if is_oracle else policy.estimate(inputs, heads)
        pattern = policy.choose(inputs, known[id(policy)], gamma)
    else:
        pattern = policy.select(inputs, heads, gamma).pattern
    return (pattern | inputs.geometry.always) & inputs.geometry.causal


def policy_work(policy: Any, inputs: LayerInputs) -> float:
    """Selection work; the oracle's is not counted, as it is the measure of the others."""
    counted = isinstance(policy, MapEstimator) and not isinstance(policy, Oracle)
    return policy.work(inputs) if counted else 0.0


def attend(inputs: LayerInputs, value: Tensor, pattern: Tensor, *, corrected: bool) -> Tensor:
    """Sparse attention `[H, N, Dv]` over the patterns."""
    every = torch.arange(len(pattern), device=pattern.device)
    lists = BlockLists.from_bitmap(pattern, every.int(), inputs.geometry.block_size)
    lse = torch.empty(inputs.query.shape[:2], device=value.device)
    out = block_sparse_attention(
        inputs.query, inputs.key, value, lists, scale=inputs.scale, lse=lse
    )
    return mean_correction(inputs, value, every, pattern, out, lse) if corrected else out


def relative_error(out: Tensor, dense: Tensor) -> Tensor:
    """Norm of the difference over the norm of the dense output, by head."""
    difference = (out.float() - dense.float()).flatten(1).norm(dim=1)
    return difference / dense.float().flatten(1).norm(dim=1)


def candidates_of(names: list[str]) -> list[Candidate]:
    """Every named policy with its grid; one may have parameters (`sampled:rows=4`)."""
    found = []
    grid = torch.tensor(GAMMAS)[:, None]
    for name in names:
        if name == "streaming":
            policies = tuple(Streaming(local_blocks=n) for n in LOCAL_BLOCKS)
            found.append(Candidate(name, policies, torch.ones(len(policies), 1)))
            continue
        policy = make_policy(name)
        found.append(Candidate(name, (policy,) * len(grid), grid))
    return found


def run_prompt(model: Any, ids: Tensor, probe: Probe) -> dict[str, Curve]:
    """Measures one prompt: every curve's lists become one tensor over all heads."""
    with torch.no_grad(), attached(model, probe):
        model(input_ids=ids[None].to(model.device), use_cache=False, logits_to_keep=1)
    for curve in probe.curves.values():
        curve.recall = [torch.cat(curve.recall, 1).double().cpu()]
        curve.density = [torch.cat(curve.density, 1).double().cpu()]
        curve.work = [torch.cat(curve.work, 1).double()]
        curve.error = [torch.cat(curve.error).double().cpu()] if curve.error else []
    return probe.curves


def own_thresholds(curves: list[Curve], gammas: Tensor) -> Tensor:
    """For every target recall the gamma that gives it to each head, `[targets, K]`.

    Args:
        curves: On calibration prompts; a head's recall is their mean.
        gammas: Of the curves' points, ascending.
    """
    recalls = torch.stack([c.recall[0] for c in curves]).mean(0).cummax(0).values
    found = [np.interp(TARGETS, recalls[:, h], gammas) for h in range(recalls.shape[1])]
    return torch.tensor(np.stack(found, 1), dtype=torch.float32)


def mean_curve(curves: list[Curve]) -> dict[str, Any]:
    """Means over prompts at every point, as arrays: recall, worst heads, density, work."""
    recalls = torch.stack([c.recall[0] for c in curves]).mean(0)
    count = max(1, recalls.shape[1] // 20)
    return {
        "recall": recalls.mean(1).numpy(),
        "worst": recalls.sort(1).values[:, :count].mean(1).numpy(),
        "density": torch.stack([c.density[0] for c in curves]).mean(0).mean(1).numpy(),
        "work": torch.stack([c.work[0] for c in curves]).mean(0).mean(1).numpy(),
    }


def at_recall(curves: list[Curve]) -> dict[str, Any]:
    """Density, work, worst heads and effective density where the mean recall is the target."""
    curve = mean_curve(curves)
    order = np.argsort(curve["recall"], kind="stable")
    means = curve["recall"][order]
    found: dict[str, Any] = {"curve": {name: values.tolist() for name, values in curve.items()}}
    if means.max() < TARGET_RECALL:
        return found
    for name in ("density", "work", "worst"):
        found[name] = float(np.interp(TARGET_RECALL, means, curve[name][order]))
    found["effective"] = found["density"] + found["work"]
    both = (curve["recall"] >= TARGET_RECALL) & (curve["worst"] >= TARGET_WORST)
    if both.any():
        order = np.argsort(curve["density"], kind="stable")
        effective = (curve["density"] + curve["work"])[order]
        worst = np.maximum.accumulate(curve["worst"][order])
        found["floor"] = max(found["effective"], float(np.interp(TARGET_WORST, worst, effective)))
    return found


def at_density(candidate: Candidate, curves: list[Curve], target: float) -> Candidate | None:
    """The candidate at the one threshold whose mean density is the target."""
    density = torch.stack([c.density[0] for c in curves]).mean(0).mean(1).numpy()
    if len(set(map(id, candidate.policies))) > 1:
        nearest = int(np.abs(density - target).argmin())
        policy, gamma = candidate.policies[nearest], candidate.gammas[nearest : nearest + 1]
        return replace(candidate, policies=(policy,), gammas=gamma)
    if not density.min() <= target <= density.max():
        return None
    order = np.argsort(density)
    gammas = candidate.gammas.numpy()[order]
    found = [np.interp(target, density[order], column) for column in gammas.T]
    gammas = torch.tensor(np.array(found), dtype=torch.float32)[None]
    return replace(candidate, policies=candidate.policies[:1], gammas=gammas)


def measure(
    model: Any, prompts: list[Tensor], candidates: list[Candidate], options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """All figures of one task at one length."""
    runs = [
        run_prompt(model, ids, Probe(candidates, options.block_size, outputs=False))
        for ids in prompts
    ]
    figures: dict[str, dict[str, Any]] = {}
    fixed = []
    for candidate in candidates:
        curves = [run[candidate.name] for run in runs]
        figures[candidate.name] = at_recall(curves)
        point = at_density(candidate, curves, TARGET_DENSITY)
        if point is not None:
            fixed.append(point)
            if options.corrected and candidate.name.rstrip("*") in options.corrected:
                fixed.append(replace(point, name=f"{candidate.name}+mean", corrected=True))
    errors = [
        run_prompt(model, ids, Probe(fixed, options.block_size, outputs=True)) for ids in prompts
    ]
    for point in fixed:
        found = [run[point.name] for run in errors]
        figure = figures.setdefault(point.name, {})
        figure["error"] = float(np.mean([c.error[0].mean().item() for c in found]))
        figure["error_density"] = float(np.mean([c.density[0].mean().item() for c in found]))
    reference = figures["oracle"]["density"]
    for figure in figures.values():
        for name, of in (("ratio", "effective"), ("floor_ratio", "floor")):
            if of in figure:
                figure[name] = figure[of] / reference
    return figures


def calibrated(
    model: Any, tokenizer: Any, candidates: list[Candidate], options: argparse.Namespace
) -> list[Candidate]:
    """The starred candidates, with a threshold for each head, and `share`."""
    chosen = [c for c in candidates if c.name in options.starred]
    runs, maps = [], []
    for number in range(options.calibrate):
        task = TASKS[number % len(TASKS)]
        length = options.calibration_length or options.length[0]
        ids = prompt_ids(tokenizer, task, length, CALIBRATION_SEED + number // len(TASKS))
        probe = Probe(chosen, options.block_size, outputs=False)
        runs.append(run_prompt(model, ids, probe))
        maps.append(torch.stack(probe.exact).float())
    found = []
    for candidate in chosen:
        gammas = own_thresholds([run[candidate.name] for run in runs], torch.tensor(GAMMAS))
        policies = (candidate.policies[0],) * len(TARGETS)
        found.append(Candidate(f"{candidate.name}*", policies, gammas))
    for clusters in options.clusters:
        grid = torch.tensor(GAMMAS)[:, None]
        pivot = choose_pivots(maps, clusters)
        found.append(
            Candidate(f"share:{clusters}", (GlobalThreshold(),) * len(grid), grid, pivot=pivot)
        )
    return found


def choose_pivots(maps: list[Tensor], clusters: int) -> Tensor:
    """The head whose pattern each head shares, int64 `[K]`; its own number where it shares none.

    Clusters come from average linkage on the Jaccard distances of the mean maps' patterns. The
    pivot is the member whose pattern covers most for the members of its layer and later ones.

    Args:
        maps: Exact maps of the calibration prompts `[L, H, n, n]`.
        clusters: Number of clusters.
    """
    layers, heads = maps[0].shape[:2]
    n = min(m.shape[-1] for m in maps)
    flat = [m[..., :n, :n].flatten(0, 1) for m in maps]
    distances = jaccard_distances(gamma_patterns(torch.stack(flat).mean(0), 0.9))
    labels = cut(build_linkage(distances, "average"), clusters)
    layer = torch.arange(layers).repeat_interleave(heads)
    pivot = torch.arange(layers * heads)
    for label in range(clusters):
        members = (labels == label).nonzero()[:, 0]
        if len(members) < 2:
            continue
        covered = torch.zeros(len(members), len(members))
        for one in flat:
            gammas = torch.full((len(members),), 0.9)
            patterns, _ = head_blocks(one[members], gammas, n_query=n, n_key=n, block_size=1)
            covered += torch.einsum("hij,pij->hp", one[members], patterns.float())
        later = layer[members][:, None] >= layer[members][None, :]
        best = members[int(torch.where(later, covered, 0.0).sum(0).argmax())]
        pivot[members[layer[members] >= layer[best]]] = best
    return pivot


def prompt_ids(tokenizer: Any, task: str, length: int, seed: int) -> Tensor:
    """Token ids of a generated prompt."""
    return encode(tokenizer, generate(task, tokenizer, length, seed).prompt)


def show(task: str, length: int, figures: dict[str, dict[str, Any]]) -> None:
    """Prints one table."""
    print(f"\n{task}, {length} tokens")
    columns = ("density", "work", "ratio", "worst", "floor_ratio", "error")
    titles = ("density", "work", "/ oracle", "worst 5%", "at .93", "error")
    print(f"{'policy':<18}" + "".join(f"{title:>10}" for title in titles))
    for name, figure in figures.items():
        cells = [figure.get(column, math.nan) for column in columns]
        print(f"{name:<18}" + "".join(f"{cell:>10.4f}" for cell in cells))


def main() -> None:
    """Runs the model, prints the tables, writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", required=True, help="a folder, a hub id, or sp-tiny")
    parser.add_argument("--task", action="append", choices=TASKS, help="all of them by default")
    parser.add_argument("--length", action="append", type=int, help="tokens a prompt")
    parser.add_argument("--samples", type=int, default=1, help="prompts a task")
    parser.add_argument("--policy", action="append", help="name, or name:rows")
    parser.add_argument("--starred", action="append", help="with a threshold for each head too")
    parser.add_argument("--corrected", action="append", help="with the mean correction too")
    parser.add_argument("--calibrate", type=int, default=7, help="calibration prompts")
    parser.add_argument("--calibration-length", type=int, help="their tokens")
    parser.add_argument("--clusters", action="append", type=int, help="of policy share")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.length = options.length or [8192]
    options.starred = options.starred or ["smoothed"]
    options.corrected = options.corrected or ["global-threshold", "flash"]
    options.clusters = options.clusters or [16]
    names = options.policy or [*SELECTION_POLICIES]
    names = list(dict.fromkeys(["oracle", *names]))
    tokenizer = load_tokenizer(options.model)
    model = load_model(options.model, device=options.device, dtype=options.dtype)
    candidates = candidates_of(names)
    candidates += calibrated(model, tokenizer, candidates, options)
    results = []
    for length in options.length:
        for task in options.task or TASKS:
            prompts = [
                prompt_ids(tokenizer, task, length, HELD_OUT_SEED + n)
                for n in range(options.samples)
            ]
            figures = measure(model, prompts, candidates, options)
            show(task, length, figures)
            results.append({"task": task, "length": length, "policies": figures})
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
