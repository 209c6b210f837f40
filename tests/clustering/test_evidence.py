from __future__ import annotations

import pytest
import torch

from shareprefill.artifact import Policy
from shareprefill.calib.pipeline import capture_maps
from shareprefill.calib.store import MapStore
from shareprefill.clustering.evidence import GAMMAS, Evidence
from shareprefill.config import CalibrateConfig
from shareprefill.runtime.ops.blocks import causal_blocks
from shareprefill.runtime.patterns import always_blocks, recall
from shareprefill.runtime.policies.coverage import head_pattern
from shareprefill.runtime.policies.smoothed import smooth
from tests.support.checkpoint import save_checkpoint, small_calibration


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> MapStore:
    checkpoint = save_checkpoint(tmp_path_factory.mktemp("model"))
    folder = tmp_path_factory.mktemp("calibration")
    config = CalibrateConfig(**small_calibration(checkpoint, samples=3))
    found = capture_maps(config, folder)
    assert found is not None
    return found


def test_policies_that_need_no_other_head(store: MapStore) -> None:
    assert set(Evidence(store, [0], 0).alone) == {
        Policy.SAMPLED,
        Policy.VERTICAL_SLASH,
        Policy.SMOOTHED,
    }


def test_smoothed_maps_are_measured_on_the_exact_ones(store: MapStore) -> None:
    found = Evidence(store, [0, 2], 0).alone[Policy.SMOOTHED]
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
