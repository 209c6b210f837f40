"""What changed between two artifacts of one model: heads that moved, agreement, settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from shareprefill.artifact import Artifact, Policy, artifact_bytes
from shareprefill.errors import ArtifactError
from shareprefill.files import printable
from shareprefill.safetensors_reader import canonical_json

ABSENT = object()
# Figures that `Comparison` names on their own.
_FIGURES = ("density", "recall", "cost")
# Per-head tensors other than policy, pivot and cluster.
_VALUES = (
    *("fallback", "gamma", "fallback_gamma", "slack"),
    *("recall", "density", "instability", "effect", "step_effect", "fp8_error", "code"),
)


@dataclass(frozen=True)
class MovedHead:
    """A head that changed place; each pair is (before, after).

    Attributes:
        head: Its place, `layer.head`.
        policy: Its policy's label.
        pivot: The head whose pattern it uses, `layer.head`; None: none.
        cluster: Its cluster in the first artifact's numbers; clusters of the second one that
            match none of the first follow after them; -1: none.
    """

    head: str
    policy: tuple[str, str]
    pivot: tuple[str | None, str | None]
    cluster: tuple[int, int]


@dataclass(frozen=True)
class Setting:
    """A value of the metadata that differs; `ABSENT` where one artifact does not have it."""

    name: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Comparison:
    """What changed between two artifacts; each pair is (before, after).

    Attributes:
        models: Names of the models.
        heads: Heads of all layers.
        moved: Heads whose policy, pivot or cluster changed, by layer and head.
        rand_index: Adjusted Rand index of the cluster labels; 1: the same clusters.
        density: Expected share of causal blocks computed, mean over the heads.
        recall: Expected attention mass inside the patterns, mean over the heads.
        cost: Predicted cost as a share of dense attention; None where an artifact has none.
        values: For each per-head tensor that differs otherwise, the number of heads.
        settings: Thresholds, configuration and the rest of the metadata, where they differ.
        differs: Whether the two files' bytes would differ.
    """

    models: tuple[str, str]
    heads: int
    moved: tuple[MovedHead, ...]
    rand_index: float
    density: tuple[float, float]
    recall: tuple[float, float]
    cost: tuple[float | None, float | None]
    values: dict[str, int]
    settings: tuple[Setting, ...]
    differs: bool

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values; a setting lacks the side where it is absent."""
        settings = [
            {
                "name": setting.name,
                **({} if setting.before is ABSENT else {"before": setting.before}),
                **({} if setting.after is ABSENT else {"after": setting.after}),
            }
            for setting in self.settings
        ]
        moved = [asdict(head) for head in self.moved]
        return {**self.__dict__, "moved": moved, "settings": settings}


def compare_artifacts(before: Artifact, after: Artifact) -> Comparison:
    """Compares two artifacts of one model, head by head.

    Cluster numbers mean nothing by themselves, so clusters are matched first, such that as many
    heads as possible stay where they were.

    Raises:
        ArtifactError: the artifacts are of models of different geometry.
    """
    from sklearn.metrics import adjusted_rand_score

    if before.fingerprint.geometry != after.fingerprint.geometry:
        raise ArtifactError(
            "artifacts of different models cannot be compared: the first was made for "
            f"{printable(before.model)} ({before.fingerprint.describe()}), the second for "
            f"{printable(after.model)} ({after.fingerprint.describe()}); name two artifacts of "
            "one model"
        )
    labels = before.cluster.flatten().long(), after.cluster.flatten().long()
    return Comparison(
        models=(printable(before.model), printable(after.model)),
        heads=before.heads,
        moved=_moved(before, after, match_clusters(*labels)),
        rand_index=float(adjusted_rand_score(labels[0].numpy(), labels[1].numpy())),
        density=(before.expected("density"), after.expected("density")),
        recall=(before.expected("recall"), after.expected("recall")),
        cost=(_cost(before), _cost(after)),
        values=_values(before, after),
        settings=_settings(before, after),
        differs=artifact_bytes(before) != artifact_bytes(after),
    )


def match_clusters(before: Tensor, after: Tensor) -> Tensor:
    """The second labels in the first ones' numbers, such that most heads keep their cluster.

    Of matchings that are as good, it is the one whose keeping heads come first: the least sum of
    their ids.

    Args:
        before: int64 `[K]`, labels from 0; -1: no cluster.
        after: int64 `[K]`, likewise.

    Returns:
        int64 `[K]`: `after` renumbered, one to one; clusters that match none of `before` get the
        numbers after its last.

    >>> match_clusters(torch.tensor([0, 0, 1, 2]), torch.tensor([1, 0, 2, 2])).tolist()
    [0, 3, 1, 1]
    """
    from scipy.optimize import linear_sum_assignment

    first, second = int(before.max()) + 1, int(after.max()) + 1
    overlap = torch.zeros(first, second, dtype=torch.int64, device="cpu")
    both = (before >= 0) & (after >= 0)
    # A head counts more than all preferences among heads together.
    heads = torch.arange(len(before), device="cpu")
    weights = len(before) ** 2 + len(before) - heads
    overlap.index_put_((before[both], after[both]), weights[both], accumulate=True)
    numbers = torch.full(
        (second + 1,), -1, dtype=torch.int64, device="cpu"
    )  # the last one is for -1
    for row, column in zip(*linear_sum_assignment(overlap.numpy(), maximize=True), strict=True):
        if overlap[row, column]:
            numbers[column] = int(row)
    unmatched = (numbers[:second] < 0).nonzero()[:, 0]
    numbers[unmatched] = first + torch.arange(len(unmatched), device="cpu")
    return numbers[after]


def _moved(before: Artifact, after: Artifact, cluster: Tensor) -> tuple[MovedHead, ...]:
    width = before.fingerprint.geometry.heads
    columns = [
        (old.flatten().tolist(), new.flatten().tolist())
        for old, new in (
            (before.policy, after.policy),
            (before.pivot, after.pivot),
            (before.cluster, cluster),
        )
    ]

    def place(head: int) -> str | None:
        return None if head < 0 else f"{head // width}.{head % width}"

    found = []
    for head in range(before.heads):
        policy, pivot, label = ((old[head], new[head]) for old, new in columns)
        if any(old != new for old, new in (policy, pivot, label)):
            found.append(
                MovedHead(
                    head=f"{head // width}.{head % width}",
                    policy=(Policy(policy[0]).label, Policy(policy[1]).label),
                    pivot=(place(pivot[0]), place(pivot[1])),
                    cluster=label,
                )
            )
    return tuple(found)


def _cost(artifact: Artifact) -> float | None:
    cost = artifact.summary.get("cost")
    return float(cost) if isinstance(cost, int | float) and not isinstance(cost, bool) else None


def _values(before: Artifact, after: Artifact) -> dict[str, int]:
    found = {}
    for name in _VALUES:
        old, new = (_of_heads(artifact, name) for artifact in (before, after))
        # Codes of another size differ everywhere.
        if old.shape != new.shape:
            changed = len(old)
        else:
            differs = (old != new) & ~(old.isnan() & new.isnan())
            changed = int(differs.reshape(len(old), -1).any(1).sum())
        if changed:
            found[name] = changed
    return found


def _of_heads(artifact: Artifact, name: str) -> Tensor:
    """A tensor head by head; of none, as of a size of its own."""
    tensor: Tensor | None = getattr(artifact, name)
    return (
        torch.empty(artifact.heads, 0, dtype=torch.float32, device="cpu")
        if tensor is None
        else tensor.flatten(0, 1)
    )


def _settings(before: Artifact, after: Artifact) -> tuple[Setting, ...]:
    old, new = _metadata(before), _metadata(after)
    settings = [
        Setting(name, old.get(name, ABSENT), new.get(name, ABSENT))
        for name in sorted(old.keys() | new.keys())
    ]
    return tuple(setting for setting in settings if _differs(setting))


def _differs(setting: Setting) -> bool:
    if setting.before is ABSENT or setting.after is ABSENT:
        return True
    # As text: in Python, True equals 1.
    return canonical_json(setting.before) != canonical_json(setting.after)


def _metadata(artifact: Artifact) -> dict[str, Any]:
    """The metadata as one flat object, its keys joined by dots."""
    summary = {name: value for name, value in artifact.summary.items() if name not in _FIGURES}
    return _flat(
        {
            "model": artifact.model,
            "model_type": artifact.fingerprint.model_type,
            "weights": artifact.fingerprint.weights,
            "attention": artifact.fingerprint.attention or {},
            "block_size": artifact.block_size,
            "thresholds": {k: float(v) for k, v in asdict(artifact.thresholds).items()},
            "rows": asdict(artifact.rows),
            **({} if artifact.estimator is None else {"estimator": artifact.estimator}),
            "configuration": artifact.configuration,
            "summary": summary,
        }
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
