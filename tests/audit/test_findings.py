from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from shareprefill.artifact import Policy
from shareprefill.audit.findings import examine, to_dict
from tests.audit.synthetic import clustered, made_up_artifact, made_up_calibration

NUMBER = (int, float)
MAYBE = (int, float, type(None))
POLICY = {
    "policy": str,
    "heads": int,
    "recall": MAYBE,
    "recall_p5": MAYBE,
    "recall_least": MAYBE,
    "density": MAYBE,
    "density_most": MAYBE,
}
CLUSTER = {
    "cluster": int,
    "heads": int,
    "sharing": int,
    "pivots": [str],
    "recall": float,
    "density": float,
    "spread": float,
    "distance": MAYBE,
}
PAIRS = {"pairs": int, **dict.fromkeys(("p5", "p25", "p50", "p75", "p95"), MAYBE), "counts": [int]}
HEAD = {
    "head": str,
    "cluster": int,
    "policy": str,
    "pivot": (str, type(None)),
    "recall": float,
    "density": float,
    "spread": float,
    "alone": bool,
    "unstable": bool,
    "pca": [float],
    "tsne": [float],
}
MAPS = {
    "clusters": [
        {
            "cluster": int,
            "head": str,
            "is_pivot": bool,
            "members": [str],
            "reconstruction_loss": float,
        }
    ],
    "clusters_left_out": int,
    "heads_left_out": int,
}
SCHEMA = {
    "format_version": int,
    "model": str,
    "fingerprint": {
        "model_type": str,
        "geometry": dict.fromkeys(("layers", "heads", "kv_heads", "head_dim"), int),
        "weights": str,
        "sketch": str,
        "checkpoint": str,
        "attention": (dict, type(None)),
    },
    "block_size": int,
    "thresholds": {"gamma": float, "tau": float, "delta": float},
    "rows": {"pivot": int, "sample": int, "check": int},
    "captured_layers": [int],
    "captured_heads": int,
    "expected": {
        "density": float,
        "recall": float,
        "cost": MAYBE,
        "recall_worst_5_percent": MAYBE,
    },
    "calibration": {"found": bool, "missing": str},
    "warnings": [str],
    "policies": [POLICY],
    "clusters": [CLUSTER],
    "noise": {
        "share": float,
        "too_much": float,
        "is_high": bool,
        "alone": int,
        "unstable": int,
    },
    "stability": {
        "spread_median": float,
        "spread_p95": float,
        "spread_most": float,
        "sources": [{"source": str, "prompts": int, "spread": float, "worst": float}],
    },
    "embedding": {"explained": [float], "perplexity": MAYBE},
    "distances": {
        "measure": str,
        "edges": [float],
        "within": PAIRS,
        "across": PAIRS,
        "silhouette": MAYBE,
        "tree": {
            "measure": str,
            "linkage": str,
            "is_artifacts": bool,
            "cut_height": MAYBE,
            "merges": [[float]],
        },
    },
    "maps": MAPS,
    "heads": [HEAD],
}


def check(value: Any, schema: Any, path: str) -> None:
    """Same keys, same types, everywhere; None stands for a list or object that is not there."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), path
        assert value.keys() == schema.keys(), path
        for key, inner in schema.items():
            check(value[key], inner, f"{path}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), path
        for number, item in enumerate(value):
            check(item, schema[0], f"{path}[{number}]")
    else:
        kinds = schema if isinstance(schema, tuple) else (schema,)
        assert type(value) in kinds, f"{path} is {value!r}"
        assert not isinstance(value, float) or math.isfinite(value), path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_calibration(tmp_path_factory.mktemp("calibration"))


def test_the_numbers_follow_their_schema(folder: Path) -> None:
    found = to_dict(examine(clustered(folder), folder))
    check(found, SCHEMA, "audit")
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_without_a_calibration_its_parts_are_null() -> None:
    found = to_dict(examine(made_up_artifact(3, 4)))
    bare = {**SCHEMA, "maps": type(None)}
    bare["stability"] = {**SCHEMA["stability"], "sources": type(None)}
    check(found, bare, "audit")
    assert found["calibration"] == {"found": False, "missing": "no calibration folder was given"}


def test_the_numbers_are_the_artifacts(folder: Path) -> None:
    artifact = clustered(folder)
    found = to_dict(examine(artifact, folder))
    commonest = Policy(int(artifact.policy.flatten().mode().values))
    chosen = artifact.policy == int(commonest)
    facts = {policy["policy"]: policy for policy in found["policies"]}
    assert {name: f["heads"] for name, f in facts.items()} == artifact.policy_counts()
    recall, density = (getattr(artifact, n)[chosen].double() for n in ("recall", "density"))
    assert facts[commonest.label]["recall"] == pytest.approx(float(recall.mean()))
    assert facts[commonest.label]["recall_least"] == pytest.approx(float(recall.min()))
    fifth = float(recall.quantile(0.05))
    assert facts[commonest.label]["recall_p5"] == pytest.approx(fifth)
    assert fifth < float(recall.median())
    assert facts[commonest.label]["density_most"] == pytest.approx(float(density.max()))
    assert sum(c["heads"] for c in found["clusters"]) == artifact.heads == len(found["heads"])
    shares = artifact.policy == int(Policy.SHARE)
    assert sum(c["sharing"] for c in found["clusters"]) == int(shares.sum())
    head = found["heads"][7]
    assert head["head"] == "1.2"
    assert head["cluster"] == int(artifact.cluster[1, 2])
    assert head["recall"] == pytest.approx(float(artifact.recall[1, 2]))
    assert found["expected"]["cost"] == artifact.summary["cost"]


def test_mean_distances_of_clusters(folder: Path) -> None:
    findings = examine(clustered(folder), folder)
    distances, heads = findings.separation.distances, findings.heads
    for facts in to_dict(findings)["clusters"]:
        members = (heads.cluster == facts["cluster"]).nonzero()[:, 0].tolist()
        pairs = [float(distances[i, j]) for i in members for j in members if i < j]
        expected = None if not pairs else pytest.approx(sum(pairs) / len(pairs))
        assert facts["distance"] == expected


def test_a_folder_without_a_calibration_is_named(tmp_path: Path) -> None:
    findings = examine(made_up_artifact(2, 3), tmp_path / "nowhere")
    assert findings.calibration is None
    assert findings.missing == f"{tmp_path}/nowhere holds no calibration"


@pytest.mark.parametrize(("alone", "warned"), [(6, False), (7, True)])
def test_the_warning_comes_above_thirty_percent(alone: int, warned: bool) -> None:
    artifact = made_up_artifact(2, 10, families=1)
    artifact.policy.fill_(int(Policy.SAMPLED))
    artifact.pivot.fill_(-1)
    artifact.cluster.view(-1)[:alone] = -1
    artifact.instability.zero_()
    warnings = examine(artifact).warnings
    assert len(warnings) == warned
    if warned:
        assert warnings[0].startswith("35% of the heads (7 of 20) are in no cluster or unstable")


@pytest.mark.parametrize(
    "changes",
    [
        {"code": torch.zeros(2, 3, 8), "instability": torch.ones(2, 3)},
        {"code": 1e37 * torch.randn(2, 3, 8), "instability": torch.full((2, 3), 3e38)},
        {"configuration": {"cluster": "none"}, "summary": {"cost": "cheap"}},
        {"configuration": {"cluster": {"metric": ["x"], "linkage": 3}}},
    ],
)
def test_strange_artifacts_have_finite_numbers(changes: dict[str, Any]) -> None:
    json.dumps(to_dict(examine(made_up_artifact(2, 3, **changes))), allow_nan=False)
