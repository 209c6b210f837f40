"""Artifacts of one calibration, each without one part of the plan, for `sp eval` to compare.

whole       as `sp cluster` makes it
half        the estimate weighs a block's own rows and its neighbours' alike, whatever the model
other       they are those of another model's artifact (--other)
pivots-cut  a sharing head cuts its pivot's order where the pivot does
recall      blocks are spent by recall: no effects
one-effect  a head's lost mass counts alike on all prompts
unchecked   of `whole`: every sharing head shares, whatever its check says

`--parts` names those to make.

python benchmarks/ablation.py CALIBRATION --budget .25 --other sp-ref.st --out FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from shareprefill.artifact import Artifact, load_artifact, save_artifact
from shareprefill.calib.store import MapStore
from shareprefill.clustering import assignment, pipeline
from shareprefill.clustering.assignment import Goal
from shareprefill.clustering.effects import head_effects
from shareprefill.clustering.measurements import GAMMAS, HeldOutMeasurements
from shareprefill.config import ClusterConfig
from shareprefill.runtime.policies.smoothed import UNFITTED

PARTS = ("whole", "half", "other", "pivots-cut", "recall", "one-effect")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--budget", type=float)
    parser.add_argument("--k", type=int, help="of clusters; auto by default")
    parser.add_argument("--other", type=Path, help="artifact whose estimator `other` has")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    config = ClusterConfig(budget=args.budget, k=args.k)
    parts: dict[str, tuple[Any, str, Callable[..., Any]] | None] = {
        "whole": None,
        "half": (pipeline, "fit_estimator", lambda store, _: unfitted(store.config.rows)),
        "pivots-cut": (assignment, "_share_scores", scores_at_pivots_cut),
        "recall": (pipeline, "prompt_effects", lambda *_: None),
        "one-effect": (pipeline, "prompt_effects", one_effect),
    }
    if args.other is not None:
        estimator = load_artifact(args.other).estimator
        parts["other"] = (pipeline, "fit_estimator", lambda *_: estimator)
    for name, part in parts.items():
        if name in args.parts:
            artifact = plan(args.calibration, config, part)
            keep(artifact, args.out / f"{name}.st")
            if name == "whole":
                slack = torch.ones_like(artifact.slack)
                keep(replace(artifact, slack=slack), args.out / "unchecked.st")


def keep(artifact: Artifact, path: Path) -> None:
    """Saves an artifact, and prints what it plans."""
    save_artifact(artifact, path)
    counts = ", ".join(f"{n} {policy}" for policy, n in artifact.policy_counts().items() if n)
    print(f"{path.stem}: {artifact.summary}; {artifact.rows}; {counts}", flush=True)


def plan(
    calibration: Path,
    config: ClusterConfig,
    part: tuple[Any, str, Callable[..., Any]] | None = None,
) -> Artifact:
    """What `sp cluster` makes, with another function in place of one of its own."""
    with ExitStack() as stack:
        if part is not None:
            stack.enter_context(patch.object(*part))
        return pipeline.cluster(calibration, config)[0]


def unfitted(rows: tuple[int, ...]) -> dict[str, list[float]]:
    """Weights that are fitted to no model, for every count of rows."""
    return {str(count): list(astuple(UNFITTED)) for count in rows}


def one_effect(store: MapStore, known: Sequence[int], prompts: Sequence[int]) -> torch.Tensor:
    """What all data sets' prompts together say, for each prompt."""
    effect = head_effects(store, known)
    assert effect is not None, "calibrate without --effect-tokens 0"
    return effect.expand(len(prompts), -1)


def scores_at_pivots_cut(
    evidence: HeldOutMeasurements, goal: Goal
) -> tuple[torch.Tensor, torch.Tensor]:
    """`assignment._share_scores` for heads that cut where their pivots do."""
    pivots = assignment._pivot_choices(evidence, ClusterConfig(), goal)
    cuts = [GAMMAS.index(choice.gamma) if choice.gamma in GAMMAS else None for choice in pivots]
    scores = torch.full_like(evidence.pairs[0], torch.inf)
    numbers = torch.zeros(scores.shape, dtype=torch.int64)
    for p, g in enumerate(cuts):
        # A pivot that would rather be dense gives no pattern.
        if g is not None:
            scores[:, p] = assignment._share_score(evidence, goal, g, slice(None), p)
            numbers[:, p] = g
    return scores, numbers


if __name__ == "__main__":
    main()
