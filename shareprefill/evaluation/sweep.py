"""The sweep: one parameter after the other, and where more of it stops paying."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shareprefill.artifact import Artifact, load_artifact, save_artifact
from shareprefill.calib.store import MapStore
from shareprefill.clustering.pipeline import cluster
from shareprefill.config import ClusterConfig, RuntimeConfig
from shareprefill.errors import ConfigError
from shareprefill.evaluation.config import SweepConfig
from shareprefill.evaluation.frontier import knee
from shareprefill.evaluation.questions import check_task
from shareprefill.evaluation.results import SCHEMA, Cell, Summary, summarize_cells
from shareprefill.evaluation.runner import ModelRunner, Variant, artifact_digest, model_name
from shareprefill.evaluation.suite import OutcomeCache, Progress, measure_variants, output_folder
from shareprefill.runtime.plan import require_read, what_is_read
from shareprefill.runtime.policies import require_policy

COSTS = ("effective_density", "ttft_s")
GAINS = ("recall", "accuracy", "perplexity_change", "kl")


@dataclass(frozen=True)
class Curve:
    """One parameter's values.

    Attributes:
        parameter: `slack`, `tau`, `delta`, `gamma`, `block_size` or `k`.
        values: In ascending order.
        points: What was measured of each, over all tasks.
        knees: By "gain against cost", the value at the knee; None where there is none.
    """

    parameter: str
    values: tuple[float, ...]
    points: tuple[Summary, ...]
    knees: dict[str, float | None]


@dataclass(frozen=True)
class Sweep:
    """All curves of a sweep.

    Attributes:
        config: What was asked for.
        context: What it ran on.
        dense: Dense attention on the same prompts.
        curves: One for each parameter that was varied.
        cells: Every task under every value.
    """

    config: SweepConfig
    context: dict[str, Any]
    dense: Summary
    curves: tuple[Curve, ...]
    cells: tuple[Cell, ...]

    def to_json(self) -> str:
        """All of it as JSON; docs/evaluation.md describes the format."""
        values = {
            "schema": SCHEMA,
            "config": self.config.to_dict(),
            "context": self.context,
            "dense": _summary(self.dense),
            "curves": [
                {
                    "parameter": curve.parameter,
                    "values": list(curve.values),
                    "points": [_summary(point) for point in curve.points],
                    "knees": curve.knees,
                }
                for curve in self.curves
            ],
            "cells": [cell.to_dict() for cell in self.cells],
        }
        return json.dumps(values, indent=1, allow_nan=False) + "\n"


def _summary(summary: Summary) -> dict[str, Any]:
    return {**asdict(summary), "effective_density": summary.effective_density}


def sweep(
    config: SweepConfig,
    *,
    out: Path | None = None,
    fresh: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Sweep:
    """Measures an artifact with one parameter changed at a time.

    slack, tau, delta and gamma are options of the session. Another k, or another block size, is
    clustered anew from a calibration with the artifact's other settings; those artifacts are kept
    in `out`.

    Args:
        config: Values, tasks and prompts.
        out: Folder of the outcomes and artifacts; None keeps none.
        fresh: Forget the outcomes that are there.
        trust_remote_code: Run the model repository's own code.
        progress: Called with (outcomes done, outcomes in all).

    Raises:
        ConfigError: a block size has no calibration, a task is unknown, or no head of the artifact
            reads a parameter.
        ShareprefillError: see `evaluation.suite.evaluate`.
    """
    for task in config.tasks:
        check_task(task)
    require_policy(config.policy)
    artifact = None if config.artifact is None else load_artifact(config.artifact)
    variants = {
        name: _of_session(config, artifact, name, values)
        for name, values in config.of_sessions().items()
        if values
    }
    with output_folder(out) as folder:
        runtime = config.runtime()
        if artifact is not None and config.block_sizes:
            variants["block_size"] = [
                _clustered(config, artifact, "block_size", size, runtime, folder)
                for size in sorted(config.block_sizes)
            ]
        if artifact is not None and config.ks:
            variants["k"] = [
                _clustered(config, artifact, "k", k, runtime, folder) for k in sorted(config.ks)
            ]
        runner = ModelRunner.load(
            model_name(config.evaluation(), [artifact] if artifact else []),
            config.evaluation(),
            trust_remote_code=trust_remote_code,
        )
        every = [variant for group in variants.values() for variant in group]
        cells = measure_variants(runner, every, OutcomeCache(folder, fresh=fresh), progress)
    dense, *summaries = summarize_cells(tuple(cells))
    digest = None if artifact is None else artifact_digest(artifact)
    return Sweep(
        config,
        {**runner.context.values, "artifact": digest},
        dense,
        tuple(_curve(name, summaries) for name in variants),
        tuple(cells),
    )


def _of_session(
    config: SweepConfig, artifact: Artifact | None, name: str, values: tuple[float, ...]
) -> list[Variant]:
    variants = []
    for value in sorted(values):
        runtime = config.runtime(**{name: value})
        if artifact is not None:
            require_read(artifact, runtime)
        variants.append(Variant(config.policy, {name: value}, artifact, runtime))
    return variants


def _clustered(
    config: SweepConfig,
    artifact: Artifact,
    name: str,
    value: int,
    runtime: RuntimeConfig,
    folder: Path | None,
) -> Variant:
    """An artifact with another k or block size, clustered with the other settings as they were."""
    settings = artifact.configuration.get("cluster")
    if not isinstance(settings, dict):
        raise ConfigError(
            f"{config.artifact} does not say how it was clustered, so {name} cannot be varied: "
            "make it again with sp cluster"
        )
    size = value if name == "block_size" else artifact.block_size
    changes = {"k": value} if name == "k" else {}
    made, _ = cluster(_calibration(config, size), ClusterConfig.from_dict({**settings, **changes}))
    if folder is not None:
        save_artifact(made, folder / f"{name}-{value}.st")
    return Variant(config.policy, {name: value}, made, what_is_read(made, runtime))


def _calibration(config: SweepConfig, block_size: int) -> Path:
    sizes = {}
    for name in config.calibrations:
        sizes.setdefault(MapStore.open(Path(name)).config.block_size, Path(name))
    if block_size not in sizes:
        raise ConfigError(
            f"block size {block_size} needs a calibration of that block size, and "
            f"{', '.join(config.calibrations)} have {', '.join(map(str, sizes))}: make one with "
            f"sp calibrate --block-size {block_size}, and name it with --calibration"
        )
    return sizes[block_size]


def _curve(name: str, summaries: list[Summary]) -> Curve:
    points = [summary for summary in summaries if set(summary.settings) == {name}]
    values = [point.settings[name] for point in points]
    knees: dict[str, float | None] = {}
    for gain in GAINS:
        if all(getattr(point, gain) is not None for point in points):
            for cost in COSTS:
                place = knee([(getattr(p, cost), _more_is_better(p, gain)) for p in points])
                knees[f"{gain} against {cost}"] = None if place is None else values[place]
    return Curve(name, tuple(values), tuple(points), knees)


def _more_is_better(point: Summary, gain: str) -> float:
    """A gain of which more is better: a change for the worse with its sign turned."""
    value = getattr(point, gain)
    return -value if gain in ("perplexity_change", "kl") else value
