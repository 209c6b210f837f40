from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shareprefill.artifact import Policy, artifact_bytes
from shareprefill.autoencoder.pipeline import load_training, train
from shareprefill.calib.pipeline import capture_maps
from shareprefill.calib.store import MapStore
from shareprefill.checkpoint import check_checkpoint
from shareprefill.clustering import pipeline
from shareprefill.clustering.assignment import Choice, Goal
from shareprefill.clustering.effects import effects_of, head_effects, prompt_effects
from shareprefill.clustering.estimator import fit_estimator
from shareprefill.clustering.measurements import GAMMAS, HeldOutMeasurements
from shareprefill.clustering.pipeline import Clustering, cluster
from shareprefill.config import CalibrateConfig, ClusterConfig, TrainConfig
from shareprefill.errors import ConfigError, DataError
from shareprefill.models import fingerprint, load_model
from shareprefill.runtime.ops.blocks import always_blocks
from tests.audit.synthetic import MEASURED, clustered, made_up_calibration
from tests.support.checkpoint import save_checkpoint, small_calibration
from tests.support.maps import head_pattern, recall

TRAIN = TrainConfig(epochs=3, hidden=16, resolution=16, code_size=8)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = save_checkpoint(tmp_path_factory.mktemp("model"))
    folder = tmp_path_factory.mktemp("calibration")
    capture_maps(CalibrateConfig(**small_calibration(checkpoint, samples=6)), folder)
    train(folder, TRAIN)
    return folder


def test_same_inputs_give_the_same_bytes(calibration: Path) -> None:
    config = ClusterConfig(target_recall=0.8)
    first, second = (cluster(calibration, config)[0] for _ in range(2))
    assert artifact_bytes(first) == artifact_bytes(second)
    # The model's fingerprints come with it.
    assert check_checkpoint(first, first.model)
    assert first.fingerprint.sketch == fingerprint(load_model(first.model, device="cpu")).sketch


def test_training_again_gives_the_same_codes(calibration: Path) -> None:
    _, before = load_training(calibration)
    train(calibration, TRAIN)
    assert torch.equal(load_training(calibration)[1], before)


@pytest.mark.parametrize("metric", ["jaccard", "jaccard-raw", "code"])
@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
def test_metrics_and_linkages(calibration: Path, metric: str, linkage: str) -> None:
    config = ClusterConfig.from_dict({"k": 3, "metric": metric, "linkage": linkage})
    artifact, trials = cluster(calibration, config)
    assert [trial.k for trial in trials] == [3]
    assert sorted(artifact.cluster.unique().tolist()) == [0, 1, 2]


def most_alike(trials: list[Clustering]) -> Clustering:
    """The first one, where one cluster alone is left, which has no silhouette."""
    defined = [t for t in trials if t.silhouette == t.silhouette]
    return max(defined, key=lambda t: t.silhouette, default=trials[0])


def test_auto_takes_the_most_alike_of_the_cheapest(calibration: Path) -> None:
    artifact, trials = cluster(calibration, ClusterConfig(target_recall=0.8))
    assert len(trials) > 3
    (taken,) = [trial for trial in trials if trial.is_best]
    assert artifact.summary["cost"] == pytest.approx(taken.cost, abs=1e-6)
    assert artifact.summary["clusters"] == taken.k
    least = min(trial.cost for trial in trials)
    assert taken == most_alike([trial for trial in trials if trial.cost <= 1.01 * least])
    assert (artifact.recall >= 0.8 - 1e-6).all()


def test_auto_heeds_cost_before_likeness(
    calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number of clusters that costs a tenth more is not taken for its silhouette."""
    _, trials = cluster(calibration, ClusterConfig(target_recall=0.8))
    liked = most_alike(trials).k
    choose_by = pipeline.choose_by

    def dearer(goal: Goal, labels: Tensor, *args: Any) -> list[Choice]:
        found = choose_by(goal, labels, *args)
        clusters = int(labels.max()) + 1
        return [replace(c, cost=1.1 * c.cost) for c in found] if clusters == liked else found

    monkeypatch.setattr(pipeline, "choose_by", dearer)
    _, trials = cluster(calibration, ClusterConfig(target_recall=0.8))
    (taken,) = [trial for trial in trials if trial.is_best]
    assert taken.k != liked
    assert taken.cost <= 1.01 * min(trial.cost for trial in trials)


def test_likeness_does_not_buy_a_budget_that_takes_longer() -> None:
    """As little harm, and heads more alike, but nobody shares: the blocks' choice takes longer."""

    def plan(objective: float, cost: float, silhouette: float) -> pipeline._Plan:
        choice = Choice(Policy.SMOOTHED, 0.9, 0.9, 0.2, cost)
        return pipeline._Plan(objective, [choice], silhouette)

    plans = {
        1: plan(1.0, 0.3287, float("nan")),
        2: plan(1.001, 0.3287, 0.355),
        3: plan(1.005, 0.33, 0.34),
        45: plan(1.005, 0.3394, 0.414),
        90: plan(1.2, 0.32, 0.5),
    }
    assert pipeline._best(plans) == 2


def test_more_clusters_than_heads_are_refused(calibration: Path) -> None:
    with pytest.raises(ConfigError, match=r"k = 13 is larger than the number of heads \(12\)"):
        cluster(calibration, ClusterConfig(k=13))


def test_pivot_rows_that_were_not_captured_are_refused(calibration: Path) -> None:
    """Nor may a pivot sample the rows of the check: too few tell where attention lies."""
    for rows in (5, 1):
        message = rf"pivot_rows = {rows} was not captured: it must be one of \(0, 2, 4, 8\)"
        with pytest.raises(ConfigError, match=message):
            cluster(calibration, ClusterConfig(pivot_rows=rows))


def test_an_untrained_calibration_is_refused(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "model")
    capture_maps(CalibrateConfig(**small_calibration(checkpoint, samples=3)), tmp_path / "out")
    with pytest.raises(DataError, match="no trained autoencoder; run sp train"):
        cluster(tmp_path / "out", ClusterConfig())


def test_evidence_is_measured_on_the_exact_maps(calibration: Path) -> None:
    """Every head's recall under every pivot's pattern, recomputed pair by pair."""
    store = MapStore.open(calibration)
    evidence = HeldOutMeasurements(store, [2, 5], pivot_rows=0, estimator={})
    g = GAMMAS.index(0.9)
    expected = torch.zeros(12, 12, dtype=torch.float64)
    for number in (2, 5):
        full = store.load(number, "full")["full"].float().flatten(0, 1)
        tokens = store.prompts[number].tokens
        always = always_blocks(tokens, 0, 32, sink_blocks=1, local_blocks=2)
        for pivot in range(12):
            pattern = head_pattern(full[pivot, None], 0.9)[0] | always
            expected[:, pivot] += recall(full, pattern).double() / 2
    torch.testing.assert_close(evidence.pairs[g], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(evidence.pivots.recall[g], expected.diagonal(), rtol=1e-5, atol=1e-5)
    assert evidence.pivots.work == 0.0
    assert (evidence.pivots.recall[g] >= 0.9 - 1e-3).all()
    assert (evidence.alone[Policy.SAMPLED].recall <= 1).all()


def test_the_policies_of_an_artifact_are_consistent(calibration: Path) -> None:
    artifact, _ = cluster(calibration, ClusterConfig(k=2, target_recall=0.7))
    sharing = artifact.policy == int(Policy.SHARE)
    assert (artifact.pivot[~sharing & (artifact.policy != int(Policy.PIVOT))] == -1).all()


def test_a_budget_bounds_the_density_of_the_artifact(calibration: Path) -> None:
    tight, trials = cluster(calibration, ClusterConfig(budget=0.7))
    (taken,) = [trial for trial in trials if trial.is_best]
    least = min(trial.objective for trial in trials)
    close = [trial for trial in trials if trial.objective <= 1.01 * least]
    least = min(trial.cost for trial in close)
    assert taken == most_alike([trial for trial in close if trial.cost <= 1.01 * least])
    assert tight.summary["recall"] == pytest.approx(taken.recall, abs=1e-6)
    assert tight.summary["kl"] == pytest.approx(taken.harm, abs=1e-8)
    loose, _ = cluster(calibration, ClusterConfig(budget=0.95))
    assert tight.summary["density"] <= 0.7
    assert tight.summary["density"] < loose.summary["density"] <= 0.95
    assert tight.summary["recall"] < loose.summary["recall"]
    assert len(trials) > 3
    with pytest.raises(ConfigError, match=r"budget = 0\.01 cannot be met"):
        cluster(calibration, ClusterConfig(budget=0.01))


@pytest.mark.parametrize("options", [{"budget": 0.7}, {"max_kl": 0.001}, {"target_recall": 0.8}])
def test_numbers_of_clusters_compare_at_one_price(
    calibration: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """More heads that may share are never worse, however much of a budget each plan would spend."""
    goals = []
    choose_by = pipeline.choose_by

    def noted(goal: Goal, *args: Any) -> list[Choice]:
        goals.append(goal)
        return choose_by(goal, *args)

    monkeypatch.setattr(pipeline, "choose_by", noted)
    _, trials = cluster(calibration, ClusterConfig(**options))
    assert len(set(goals[-len(trials) :])) == 1
    fewest, *others = trials
    assert all(fewest.objective <= trial.objective * 1.001 for trial in others)


def test_policies_are_chosen_on_every_data_set(
    calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mixture has more data sets than this calibration holds prompts out."""
    measured = []

    class Noted(HeldOutMeasurements):
        def __init__(self, store: MapStore, prompts: Any, *args: Any, **options: Any) -> None:
            measured.append((store, prompts))
            super().__init__(store, prompts, *args, **options)

    monkeypatch.setattr(pipeline, "HeldOutMeasurements", Noted)
    artifact, _ = cluster(calibration, ClusterConfig(k=2))
    ((store, prompts),) = measured
    sources = [store.prompts[number].source for number in prompts]
    assert sorted(sources) == sorted({prompt.source for prompt in store.prompts})
    held_out = load_training(calibration)[0].split.held_out
    assert set(held_out) < set(prompts)
    summary = artifact.summary
    assert summary["held_out_prompts"] + summary["further_prompts"] == sources


@pytest.mark.parametrize("metric", ["jaccard", "jaccard-raw", "code"])
def test_held_out_prompts_stay_out_of_clusters(
    calibration: Path, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distances and consensus are the same whatever the held-out prompts' maps and codes are."""
    store = MapStore.open(calibration)
    training, codes = load_training(calibration)
    config = ClusterConfig.from_dict({"metric": metric})
    known = pipeline._distances(store, calibration, training, codes, config)
    held_out = list(training.split.held_out)
    assert held_out
    other = codes.clone()
    other[held_out] = torch.randn_like(other[held_out])
    loaded = pipeline.load_maps(store, training.config.resolution)
    loaded.maps[held_out] = torch.rand_like(loaded.maps[held_out])
    monkeypatch.setattr(pipeline, "load_maps", lambda *_: loaded)
    found = pipeline._distances(store, calibration, training, other, config)
    assert torch.equal(found[0], known[0])
    for name in ("code", "maps", "instability"):
        assert torch.equal(getattr(found[1], name), getattr(known[1], name))


def test_an_artifact_carries_what_was_fitted_to_the_model(calibration: Path) -> None:
    artifact, _ = cluster(calibration, ClusterConfig(target_recall=0.6))
    store = MapStore.open(calibration)
    assert artifact.estimator is not None
    assert artifact.effect is not None
    assert sorted(map(int, artifact.estimator)) == list(store.config.rows)
    split = load_training(calibration)[0].split
    known = sorted((*split.train, *split.validation))
    assert artifact.estimator == fit_estimator(store, known)
    assert all(
        sum(weights) == pytest.approx(1, abs=1e-5) for weights in artifact.estimator.values()
    )
    assert (artifact.effect > 0).all()
    assert artifact.step_effect is not None
    assert (artifact.step_effect > 0).all()
    measured = torch.stack([store.load(n, "fp8_error")["fp8_error"] for n in known])
    assert artifact.fp8_error is not None
    torch.testing.assert_close(artifact.fp8_error, measured.mean(0))
    assert artifact.summary["kl"] > 0


def test_what_was_not_captured_does_not_look_measured(tmp_path: Path) -> None:
    artifact = clustered(made_up_calibration(tmp_path, captured=(1, 2)))
    assert artifact.measured_layers == [1, 2]
    for name in MEASURED:
        values = getattr(artifact, name)
        assert values[[0, 3]].isnan().all(), name
        assert values[[1, 2]].isfinite().all(), name
    assert (artifact.policy[[0, 3]] == Policy.DENSE).all()
    assert artifact.expected("density") == pytest.approx(artifact.summary["density"], abs=1e-6)
    assert artifact.expected("recall") == pytest.approx(artifact.summary["recall"], abs=1e-6)


def test_effects_of_a_prompt_add_up_to_what_its_data_set_measured(calibration: Path) -> None:
    store = MapStore.open(calibration)
    known = [0, 1, 2, 3]
    sources = [prompt.source for prompt in store.prompts]
    assert len(set(sources)) == len(sources)
    store.prompts[4] = replace(store.prompts[4], source=sources[0])
    found, pooled = prompt_effects(store, known, [0, 1, 4, 5]), head_effects(store, known)
    assert found is not None
    assert pooled is not None
    for effect, number in ((found[0], 0), (found[1], 1), (found[2], 0)):
        tensors = store.load(number, "effect_lost", "effect_divergence")
        predicted = (effect * tensors["effect_lost"].flatten()).sum()
        assert predicted.item() == pytest.approx(tensors["effect_divergence"].item(), rel=1e-5)
        torch.testing.assert_close(effect / effect.sum(), pooled / pooled.sum())
    # A data set that nothing is known of.
    torch.testing.assert_close(found[3], pooled)


def test_a_heads_effect_is_mixed_with_those_of_its_own_layer() -> None:
    change, lost = (torch.rand(3, 2, 4, dtype=torch.float64) for _ in range(2))
    lost[:, 0] *= 1e-6
    found = effects_of(change, lost, torch.ones(3, 1, dtype=torch.float64))
    assert found[:4].std() > 0.05 * found[:4].mean()
    lost[:, 1] *= 1000
    other = effects_of(change, lost, torch.ones(3, 1, dtype=torch.float64))
    torch.testing.assert_close(found[:4] / found[0], other[:4] / other[0])
    # One that loses nothing has what its layer has.
    lost[:, :, 0] = change[:, :, 0] = 0
    found = effects_of(change, lost, torch.ones(3, 1, dtype=torch.float64)).view(2, 4)
    means = change.sum((0, 2)) / lost.sum((0, 2))
    assert (found[0, 0] / found[1, 0]).item() == pytest.approx((means[0] / means[1]).item())


def test_calibrations_of_earlier_versions_lack_effects_of_steps_and_errors_in_fp8(
    calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MapStore.open(calibration)
    assert store.holds(0, "step_change")
    assert not store.holds(0, "step")
    own = MapStore.holds
    monkeypatch.setattr(
        MapStore, "holds", lambda *given: own(*given) and not given[2].startswith(("step", "fp8"))
    )
    artifact, _ = cluster(calibration, ClusterConfig(target_recall=0.8))
    assert artifact.effect is not None
    assert artifact.step_effect is None
    assert artifact.fp8_error is None


def test_a_bound_of_the_divergence_is_kept_by_the_artifact(calibration: Path) -> None:
    loose = cluster(calibration, ClusterConfig(max_kl=0.5, k=1))[0].summary
    tight = cluster(calibration, ClusterConfig(max_kl=0.01, k=1))[0].summary
    assert tight["kl"] <= 0.01 < loose["kl"] <= 0.5
    assert tight["density"] > loose["density"]
