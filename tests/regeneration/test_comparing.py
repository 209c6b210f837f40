from __future__ import annotations

from dataclasses import replace

import pytest

from shareprefill.artifact import Artifact, Thresholds
from shareprefill.clustering.comparison import compare_artifacts
from shareprefill.regeneration.jobs import Tolerances
from shareprefill.regeneration.outcomes import Change, Figures, changed_settings, changes_of
from tests.support.tiny import tiny_artifact, tiny_llama

MEASURED = Figures(accuracy=0.5, density=0.3, recall=0.95)


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    configuration = {
        "calibrate": {"model": "a", "device": "cpu", "samples": 4},
        "cluster": {"tau": 0.2},
    }
    return tiny_artifact(tiny_llama(), configuration=configuration)


def drifted(before: Artifact, after: Artifact, figures: Figures, **limits: float) -> list[str]:
    comparison = compare_artifacts(before, after)
    changes = changes_of(comparison, MEASURED, figures, Tolerances(**limits))
    return [change.name for change in changes if change.drifted]


def test_equal_artifacts_have_not_drifted(artifact: Artifact) -> None:
    zero = {"accuracy": 0.0, "density": 0.0, "recall": 0.0, "clusters": 0.0}
    assert drifted(artifact, artifact, MEASURED, **zero) == []
    assert changed_settings(compare_artifacts(artifact, artifact)) == []


@pytest.mark.parametrize("name", ["accuracy", "density", "recall"])
@pytest.mark.parametrize("change", [0.03, -0.03])
def test_measured_figures_against_their_tolerance(
    name: str, change: float, artifact: Artifact
) -> None:
    after = replace(MEASURED, **{name: getattr(MEASURED, name) + change})
    assert drifted(artifact, artifact, after, **{name: 0.029}) == [name]
    assert drifted(artifact, artifact, after, **{name: 0.03}) == []


def test_expected_figures_and_clusters(artifact: Artifact) -> None:
    after = replace(artifact, recall=artifact.recall - 0.1, density=artifact.density + 0.1)
    assert drifted(artifact, after, MEASURED, recall=0.05, density=0.05) == [
        "expected density", "expected recall"
    ]  # fmt: skip
    # Each by its own tolerance.
    assert drifted(artifact, after, MEASURED, recall=0.2, density=0.05) == ["expected density"]
    assert drifted(artifact, after, MEASURED, recall=0.05, density=0.2) == ["expected recall"]
    apart = artifact.cluster.clone()
    apart[0] = 1
    after = replace(artifact, cluster=apart)
    assert drifted(artifact, after, MEASURED) == []
    assert drifted(artifact, after, MEASURED, clusters=0.5) == ["clusters (adjusted Rand index)"]


def test_what_was_not_measured_has_no_change(artifact: Artifact) -> None:
    nothing = Figures(accuracy=None, density=0.3, recall=None)
    changes = changes_of(compare_artifacts(artifact, artifact), nothing, nothing, Tolerances())
    assert [change.name for change in changes] == [
        "density", "expected density", "expected recall", "clusters (adjusted Rand index)"
    ]  # fmt: skip


def test_settings_count_and_places_do_not(artifact: Artifact) -> None:
    after = replace(
        artifact,
        model="elsewhere\x1b"[:-1],
        thresholds=Thresholds(gamma=0.9, tau=0.3, delta=0.3),
        configuration={
            "calibrate": {"model": "b", "device": "cuda", "samples": 5, "new": 1},
            "cluster": {"tau": 0.3},
        },
        summary={"clusters": 3},
    )
    assert changed_settings(compare_artifacts(artifact, after)) == [
        "setting configuration.calibrate.samples 4 -> 5",
        "setting configuration.cluster.tau 0.2 -> 0.3",
        "setting thresholds.tau 0.2 -> 0.3",
    ]
    other = replace(artifact, fingerprint=replace(artifact.fingerprint, weights="ab" * 32))
    (line,) = changed_settings(compare_artifacts(artifact, other))
    assert line.startswith("setting weights ")


def test_a_change_in_words() -> None:
    change = Change(name="recall", before=0.95, after=0.9, tolerance=0.01)
    assert change.describe() == "recall 0.9500 -> 0.9000 (-0.0500, tolerance 0.01)"
    assert replace(change, tolerance=None).describe() == "recall 0.9500 -> 0.9000 (-0.0500)"
    assert not replace(change, tolerance=None).drifted
