"""A fixed small budget of the long run in tools/fuzz_artifact.py."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

FUZZ = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "fuzz_artifact.py"))


def test_mutated_artifacts_load_as_written_or_are_refused(tmp_path: Path) -> None:
    findings = FUZZ["fuzz"](2000, 1, tmp_path)
    assert findings.broken == []
    assert findings.outcomes.total() == 2000
    # The mutator reaches both sides of the gate.
    assert findings.outcomes["refused"] > 1000
    assert findings.outcomes["equal"] > 20
    assert len(findings.outcomes) == 3


@pytest.mark.parametrize("seed", range(3))
def test_the_mutator_starts_from_files_with_every_policy(seed: int) -> None:
    artifact = FUZZ["sample_artifact"](seed, 32, 32, 4)
    assert all(artifact.policy_counts().values())
