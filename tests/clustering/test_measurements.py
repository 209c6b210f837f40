from __future__ import annotations

from typing import Any

import pytest
import torch

from shareprefill.artifact import Policy
from shareprefill.calib.pipeline import capture_maps
from shareprefill.calib.store import MapStore
from shareprefill.clustering import measurements
from shareprefill.clustering.measurements import GAMMAS, HeldOutMeasurements
from shareprefill.config import CalibrateConfig
from shareprefill.runtime.ops.blocks import always_blocks, causal_blocks
from tests.support.checkpoint import save_checkpoint, small_calibration
from tests.support.maps import head_pattern, recall, smooth


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> MapStore:
    checkpoint = save_checkpoint(tmp_path_factory.mktemp("model"))
    folder = tmp_path_factory.mktemp("calibration")
    config = CalibrateConfig(**small_calibration(checkpoint, samples=3))
    found = capture_maps(config, folder)
    assert found is not None
    return found


def test_policies_that_need_no_other_head(store: MapStore) -> None:
    assert set(HeldOutMeasurements(store, [0], 0, estimator={}).alone) == {
        Policy.SAMPLED,
        Policy.VERTICAL_SLASH,
        Policy.SMOOTHED,
    }


def test_smoothed_maps_are_measured_on_the_exact_ones(store: MapStore) -> None:
    found = HeldOutMeasurements(store, [0, 2], 0, estimator={}).alone[Policy.SMOOTHED]
    g = GAMMAS.index(0.8)
    recalls, densities = [], []
    for number in (0, 2):
        maps = store.load(number)
        tokens = store.prompts[number].tokens
        causal = causal_blocks(tokens, 0, 32)
        always = always_blocks(tokens, 0, 32, sink_blocks=1, local_blocks=2)
        estimate = smooth(maps["rows2"].float().flatten(0, 1))
        pattern = head_pattern(estimate, 0.8) | always
        recalls.append(recall(maps["full"].float().flatten(0, 1), pattern & causal))
        densities.append((pattern & causal).sum((1, 2)) / causal.sum())
    both = torch.stack(recalls).double()
    torch.testing.assert_close(found.recall[g], both.mean(0))
    torch.testing.assert_close(found.worst_recall[g], both.min(0).values)
    torch.testing.assert_close(found.density[g], torch.stack(densities).double().mean(0))
    assert found.work == 2 / 64


def test_a_head_is_as_sparse_as_on_its_least_sparse_prompt(store: MapStore) -> None:
    first, second, both = (
        HeldOutMeasurements(store, prompts, 0, estimator={}).distance_to_uniform
        for prompts in ([0], [2], [0, 2])
    )
    assert not torch.equal(first, second)
    assert torch.equal(both, torch.minimum(first, second))


def test_lost_mass_does_harm_by_the_effects_of_its_own_prompt(store: MapStore) -> None:
    """Of heads alone, too."""
    heads = len(store.layers) * store.fingerprint.geometry.heads
    one = torch.linspace(0.5, 2, heads, dtype=torch.float64)

    def harm(prompts: list[int], *effects: torch.Tensor) -> torch.Tensor:
        made: dict[str, Any] = {"estimator": {}, "effect": torch.stack(effects)}
        found = HeldOutMeasurements(store, prompts, 4, **made).alone[Policy.SMOOTHED].harm
        assert found is not None
        return found

    first, second, both = harm([0], one), harm([2], one), harm([0, 2], 10 * one, one)
    assert first.max() > 0
    torch.testing.assert_close(both, (10 * first + second) / 2)


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_a_sampled_pivot_gives_what_it_would_read_itself(store: MapStore, rows: int) -> None:
    """Recall and density of its pattern, and of others under it, on the exact maps."""
    evidence = HeldOutMeasurements(store, [0, 2], rows, estimator={})
    g = GAMMAS.index(0.8)
    recalls, densities = [], []
    for number in (0, 2):
        maps, causal, always = _of_prompt(store, number)
        estimate = smooth(maps[f"rows{rows}"])
        pattern = (head_pattern(estimate, 0.8) | always) & causal
        recalls.append(recall(maps["full"][:, None], pattern[None]))
        densities.append(pattern.sum((1, 2)) / causal.sum())
    both = torch.stack(recalls).double()
    torch.testing.assert_close(evidence.pairs[g], both.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(evidence.worst_pairs[g], both.min(0).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(evidence.pivots.recall, evidence.pairs.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(
        evidence.pivots.density[g], torch.stack(densities).double().mean(0), check_dtype=False
    )
    assert evidence.pivots.work == rows / 64
    if rows == 2:
        alone = evidence.alone[Policy.SMOOTHED]
        torch.testing.assert_close(evidence.pivots.recall, alone.recall, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(evidence.pivots.density, alone.density)


@pytest.mark.parametrize("rows", [0, 4])
def test_the_check_is_of_the_fewest_rows(store: MapStore, rows: int) -> None:
    evidence = HeldOutMeasurements(store, [0, 2], rows, estimator={})
    assert (evidence.check_rows, evidence.sample_rows) == (1, 8)
    found, work = [], []
    for number in (0, 2):
        maps, causal, always = _of_prompt(store, number)
        work.append(len(causal) / (2 * store.prompts[number].tokens))
        estimate = smooth(maps[f"rows{rows}"]) if rows else maps["full"]
        pattern = (head_pattern(estimate[5, None], 0.75)[0] | always) & causal
        found.append(recall(maps["rows1"][3], pattern).item())
    assert evidence.check_work == pytest.approx(sum(work) / 2)
    assert evidence.least_covered(3, 5, 0.75) == pytest.approx(min(found), abs=1e-6)
    assert max(found) > min(found)


def test_the_check_of_a_long_prompt_is_of_some_query_blocks(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Of 16 of them, the last one included; what it costs falls with the length."""
    checkpoint = save_checkpoint(tmp_path_factory.mktemp("model"))
    folder = tmp_path_factory.mktemp("calibration")
    config = CalibrateConfig(**small_calibration(checkpoint, samples=3, length=18 * 32))
    store = capture_maps(config, folder)
    assert store is not None
    evidence = HeldOutMeasurements(store, [1], 4, estimator={})
    maps, causal, always = _of_prompt(store, 1)
    n = len(causal)
    assert n > 16
    rows = [(step + 1) * n // 16 - 1 for step in range(16)]
    pattern = (head_pattern(smooth(maps["rows4"])[5, None], 0.75)[0] | always) & causal
    inside = (maps["rows1"][3] * pattern)[rows].sum(-1).mean().item()
    assert evidence.least_covered(3, 5, 0.75) == pytest.approx(inside, abs=1e-6)
    assert evidence.check_work == 16 / (2 * store.prompts[1].tokens)


def test_stores_of_other_rows_are_read(tmp_path_factory: pytest.TempPathFactory) -> None:
    """As those that were captured when three counts were the rule."""
    checkpoint = save_checkpoint(tmp_path_factory.mktemp("model"))
    config = CalibrateConfig(**small_calibration(checkpoint, samples=3, rows=(1, 8, 32)))
    folder = tmp_path_factory.mktemp("calibration")
    capture_maps(config, folder)
    evidence = HeldOutMeasurements(MapStore.open(folder), [1], 32, estimator={})
    assert (evidence.check_rows, evidence.sample_rows, evidence.pivot_rows) == (1, 32, 32)
    # Two rows were not captured.
    assert set(evidence.alone) == {Policy.SAMPLED, Policy.VERTICAL_SLASH}


def test_pairs_in_parts(store: MapStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in one, but that later layers' patterns need not be measured on earlier layers' heads."""
    heads = store.fingerprint.geometry.heads
    effect = torch.rand(2, len(store.layers) * heads, dtype=torch.float64)

    def measured() -> HeldOutMeasurements:
        return HeldOutMeasurements(store, [0, 2], 2, estimator={}, effect=effect)

    whole = measured()
    monkeypatch.setattr(measurements, "_HEADS", 5)
    monkeypatch.setattr(measurements, "_PIVOTS", 3)
    monkeypatch.setattr(measurements, "_PAIR_ROWS", 5)
    parts = measured()
    layer = torch.arange(effect.shape[1]) // heads
    of_block = torch.arange(effect.shape[1]) // 3 * 3 // heads  # the first layer of a part's pivots
    is_later = layer[:, None] >= of_block
    assert whole.pair_harm is not None
    assert parts.pair_harm is not None
    assert not is_later.all()
    for name, missing in (("pairs", 0.0), ("worst_pairs", 0.0), ("pair_harm", torch.inf)):
        expected = getattr(whole, name).masked_fill(~is_later, missing)
        torch.testing.assert_close(getattr(parts, name), expected, rtol=1e-5, atol=1e-6)
    for name in ("recall", "worst_recall", "density", "harm"):
        for own, all_at_once in (
            (parts.pivots, whole.pivots),
            *zip(parts.alone.values(), whole.alone.values(), strict=True),
        ):
            torch.testing.assert_close(getattr(own, name), getattr(all_at_once, name))


def test_harm_is_the_mean_square_of_what_is_lost_by_its_prompts_effects(store: MapStore) -> None:
    heads = len(store.layers) * store.fingerprint.geometry.heads
    effect = torch.rand(2, heads, dtype=torch.float64) * torch.tensor([[10.0], [1.0]])
    evidence = HeldOutMeasurements(store, [0, 2], 0, estimator={}, effect=effect)
    g, harms = GAMMAS.index(0.8), []
    for number, own in zip((0, 2), effect, strict=True):
        maps, causal, always = _of_prompt(store, number)
        pattern = (head_pattern(maps["full"], 0.8) | always) & causal
        outside = (maps["full"][:, None] * ~pattern[None]).sum(-1)  # [head, pivot, n_q]
        harms.append(outside.square().mean(-1).double() * own[:, None])
    expected = torch.stack(harms).mean(0)
    assert evidence.pair_harm is not None
    assert evidence.pivots.harm is not None
    torch.testing.assert_close(evidence.pair_harm[g], expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(evidence.pivots.harm[g], expected.diagonal(), rtol=1e-5, atol=1e-8)


def _of_prompt(store: MapStore, number: int) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    maps = {
        name: maps.float().flatten(0, 1)
        for name, maps in store.load(number).items()
        if maps.ndim == 4
    }
    tokens = store.prompts[number].tokens
    causal = causal_blocks(tokens, 0, 32)
    always = always_blocks(tokens, 0, 32, sink_blocks=1, local_blocks=2)
    return maps, causal, always
