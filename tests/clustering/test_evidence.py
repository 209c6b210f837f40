from __future__ import annotations

from enum import IntEnum

import pytest
import torch

from shareprefill.artifact import Policy
from shareprefill.calib.pipeline import capture_maps
from shareprefill.calib.store import MapStore
from shareprefill.clustering import evidence as evidence_module
from shareprefill.clustering.evidence import GAMMAS, Evidence
from shareprefill.config import CalibrateConfig
from shareprefill.runtime.ops.blocks import causal_blocks
from shareprefill.runtime.patterns import always_blocks, recall
from shareprefill.runtime.policies.coverage import head_pattern
from shareprefill.runtime.policies.smoothed import smooth
from tests.support.checkpoint import save_checkpoint, small_calibration


class Extended(IntEnum):
    """Policies of a runtime that knows one more."""

    SAMPLED = 3
    VERTICAL_SLASH = 4
    SMOOTHED = 5

    @property
    def label(self) -> str:
        return self.name.lower()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> MapStore:
    checkpoint = save_checkpoint(tmp_path_factory.mktemp("model"))
    folder = tmp_path_factory.mktemp("calibration")
    config = CalibrateConfig(**small_calibration(checkpoint, samples=3))
    found = capture_maps(config, folder)
    assert found is not None
    return found


def test_policies_are_those_that_the_runtime_knows(
    store: MapStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {p for p in Policy if p.label in ("sampled", "vertical-slash", "smoothed")}
    assert set(Evidence(store, [0], 0).alone) == known
    monkeypatch.setattr(evidence_module, "Policy", Extended)
    assert set(Evidence(store, [0], 0).alone) == set(Extended)


def test_smoothed_maps_are_measured_on_the_exact_ones(
    store: MapStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence_module, "Policy", Extended)
    found = {int(p): m for p, m in Evidence(store, [0, 2], 0).alone.items()}[5]
    g = GAMMAS.index(0.8)
    recalls, densities = [], []
    for number in (0, 2):
        maps = store.load(number)
        tokens = store.prompts[number].tokens
        causal = causal_blocks(tokens, 0, 32)
        always = always_blocks(tokens, tokens, 32, sink=1, local=2, device=causal.device)
        estimate = smooth(maps["rows2"].float().flatten(0, 1), causal, 2)
        pattern = head_pattern(estimate, torch.full((len(estimate),), 0.8)) | always
        recalls.append(recall(maps["full"].float().flatten(0, 1), pattern & causal))
        densities.append((pattern & causal).sum((1, 2)) / causal.sum())
    both = torch.stack(recalls).double()
    torch.testing.assert_close(found.recall[g], both.mean(0))
    torch.testing.assert_close(found.lowest[g], both.min(0).values)
    torch.testing.assert_close(found.density[g], torch.stack(densities).double().mean(0))
    assert found.work == 2 / 64
