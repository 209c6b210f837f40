from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from shareprefill.autoencoder import fitting, training
from shareprefill.autoencoder.dataset import Split, split_prompts
from shareprefill.autoencoder.fitting import Batches
from shareprefill.autoencoder.network import MapAutoencoder
from shareprefill.autoencoder.pca import fit_pca
from shareprefill.autoencoder.training import (
    TrainedAutoencoder,
    load_autoencoder,
    save_autoencoder,
    train_autoencoder,
)
from shareprefill.config import TrainConfig
from shareprefill.errors import DataError

SIDE = 12
CONFIG = TrainConfig(
    code_size=6,
    resolution=SIDE,
    hidden=32,
    epochs=100,
    patience=50,
    batch_size=32,
    learning_rate=3e-3,
)


def prompt_maps(seed: int, prompts: int, heads: int) -> torch.Tensor:
    """Maps as of a model: logits are a key's term of the prompt plus a distance's of the head."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    decay = torch.linspace(0.05, 0.8, heads)[:, None, None] * (rows - columns)
    keys = torch.randn(prompts, 1, 1, SIDE, generator=generator)
    reach = torch.linspace(1.5, 0.2, heads)[None, :, None, None]
    scores = keys * reach - decay
    return scores.masked_fill(columns > rows, -torch.inf).softmax(-1)


def weights(trained: TrainedAutoencoder) -> bytes:
    return save(trained.network.state_dict())


@pytest.fixture(scope="module")
def trained() -> TrainedAutoencoder:
    return train_autoencoder(prompt_maps(0, 12, 16), CONFIG, split=split_prompts(12))


def test_it_beats_pca_on_held_out_prompts(trained: TrainedAutoencoder) -> None:
    losses = trained.losses
    assert losses.autoencoder < 0.9 * min(losses.pca, losses.start)
    assert max(losses.pca, losses.pca_linear) < losses.mean
    assert losses.head_mean < losses.mean
    assert trained.beats_pca
    assert losses.beats_pca is True


def test_losses_are_hellinger_distances_of_held_out_maps(trained: TrainedAutoencoder) -> None:
    split = split_prompts(12)
    maps = prompt_maps(0, 12, 16)
    held_out = maps[list(split.held_out)].flatten(0, 1)
    with torch.no_grad():
        decoded = trained.network(held_out)
    distance = 1 - (decoded * held_out).sqrt().sum(-1)
    assert trained.losses.autoencoder == pytest.approx(float(distance.mean()), abs=1e-6)
    roots = maps[list(split.train)].sqrt().mean(0)
    mean = (roots / roots.norm(dim=-1, keepdim=True)).expand(4, 16, SIDE, SIDE).flatten(0, 1)
    distance = 1 - (mean * held_out.sqrt()).sum(-1)
    assert trained.losses.head_mean == pytest.approx(float(distance.mean()), abs=1e-6)


def test_history_tells_the_best_epoch_and_its_weights_are_kept(trained: TrainedAutoencoder) -> None:
    history = trained.history
    assert [entry["epoch"] for entry in history] == list(range(len(history)))
    best = [entry for entry in history if entry["best"]][-1]
    assert best["validation"] == min(entry["validation"] for entry in history)
    validation = prompt_maps(0, 12, 16)[list(split_prompts(12).validation)].flatten(0, 1)
    with torch.no_grad():
        distance = 1 - (trained.network(validation) * validation).sqrt().sum(-1)
    assert float(distance.mean()) == pytest.approx(best["validation"], abs=1e-6)
    assert json.loads(json.dumps(history)) == history


def test_same_seed_same_bytes_and_no_trace_in_the_random_state(trained: TrainedAutoencoder) -> None:
    maps, split = prompt_maps(0, 12, 16), split_prompts(12)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = train_autoencoder(maps, CONFIG, split=split)
    assert torch.equal(torch.get_rng_state(), before)
    assert weights(again) == weights(trained)
    assert again.history == trained.history
    other = train_autoencoder(maps, replace(CONFIG, seed=1), split=split)
    assert weights(other) != weights(trained)


def test_held_out_prompts_do_not_touch_the_weights(trained: TrainedAutoencoder) -> None:
    maps, split = prompt_maps(0, 12, 16), split_prompts(12)
    maps[list(split.held_out)] = prompt_maps(77, 12, 16)[list(split.held_out)]
    other = train_autoencoder(maps, CONFIG, split=split)
    assert weights(other) == weights(trained)
    assert other.losses != trained.losses


def test_without_improvement_the_start_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "_train_epoch", _spoil)
    epochs: list[int] = []
    result = train_autoencoder(
        prompt_maps(0, 12, 16),
        CONFIG,
        split=split_prompts(12),
        on_epoch=lambda entry: epochs.append(entry["epoch"]),
    )
    assert epochs == 2 * list(range(CONFIG.patience + 1))
    assert result.strength == min(result.trials)
    assert result.losses.autoencoder == result.losses.start


def _spoil(_network: MapAutoencoder, average: MapAutoencoder, *_: object) -> float:
    with torch.no_grad():
        average.decode_linear.weight.mul_(0.5)
    return 1.0


def test_the_kept_weights_are_a_running_mean() -> None:
    maps = prompt_maps(0, 4, 4)
    started = MapAutoencoder(SIDE, CONFIG.code_size, CONFIG.hidden)
    train = started.roots(maps).flatten(0, 1)
    pca = fit_pca([train], CONFIG.code_size)
    started.start_from(pca.mean, pca.basis, pca.scale, torch.Generator().manual_seed(1))
    average = copy.deepcopy(started)
    batches = Batches(
        started, train, torch.arange(4).repeat(4), 0.5, 64, torch.Generator().manual_seed(0)
    )
    optimizer = torch.optim.SGD(started.parameters(), lr=0.5)
    fitting._train_epoch(started, average, batches, optimizer)
    moved = started.decode_branch[2].bias
    assert moved.abs().max() > 0
    torch.testing.assert_close(average.decode_branch[2].bias, 0.01 * moved, rtol=1e-3, atol=1e-9)


def test_batches_show_each_map_once_and_some_of_them_plain() -> None:
    maps = prompt_maps(0, 8, 16)
    network = MapAutoencoder(SIDE, 4, 5)
    train = network.roots(maps).flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    batches = Batches(network, train, torch.arange(16).repeat(8), 1.0, 50, generator)
    shown = list(batches)
    assert [len(batch) for batch in shown] == [50, 50, 28]
    distances = torch.cdist(torch.cat(shown), train, compute_mode="donot_use_mm_for_euclid_dist")
    plain = distances.min(1).values < 1e-5
    # Neither mixed nor varied: 0.4 * 0.3, and some partners are the map itself.
    assert 5 <= int(plain.sum()) <= 40
    again = torch.cat(list(batches))
    assert not torch.equal(torch.cat(shown), again)


@pytest.mark.parametrize("heads", [1, 3])
def test_fewer_maps_than_code_dimensions(heads: int) -> None:
    split = split_prompts(3)
    assert split == Split((0, 1), (), (2,))
    result = train_autoencoder(prompt_maps(0, 3, heads), replace(CONFIG, code_size=64), split=split)
    assert 0 <= result.losses.autoencoder <= 1
    assert all(bool(value.isfinite().all()) for value in result.network.state_dict().values())


@pytest.mark.parametrize(
    ("validation", "strength"),
    [((2.0, 1.0), 1.0), ((1.0, 2.0), 0.5), ((1.015, 1.0), 0.5), ((1.03, 1.0), 1.0)],
)
def test_the_stronger_variation_must_be_better_by_a_margin(
    monkeypatch: pytest.MonkeyPatch, validation: tuple[float, float], strength: float
) -> None:
    losses = iter(validation)

    def fitted(*_: object) -> list[dict[str, Any]]:
        return [{"epoch": 0, "validation": next(losses)}]

    monkeypatch.setattr(training, "fit", fitted)
    result = train_autoencoder(prompt_maps(0, 12, 16), CONFIG, split=split_prompts(12))
    assert result.strength == strength
    assert result.trials == dict(zip((0.5, 1.0), validation, strict=True))
    assert result.history[0]["validation"] == result.trials[strength]


def test_saved_weights_come_back(trained: TrainedAutoencoder, tmp_path: Path) -> None:
    path = tmp_path / "autoencoder.safetensors"
    save_autoencoder(path, trained, CONFIG)
    first = path.read_bytes()
    save_autoencoder(path, trained, CONFIG)
    assert path.read_bytes() == first
    loaded = load_autoencoder(path)
    maps = prompt_maps(5, 1, 4)
    with torch.no_grad():
        assert torch.equal(loaded(maps), trained.network(maps))


def test_weights_that_cannot_be_read(trained: TrainedAutoencoder, tmp_path: Path) -> None:
    path = tmp_path / "autoencoder.safetensors"
    with pytest.raises(DataError, match="does not exist: run sp train"):
        load_autoencoder(path)
    path.write_bytes(b"no tensors here")
    with pytest.raises(DataError, match="is no autoencoder of this package"):
        load_autoencoder(path)
    state = trained.network.state_dict()
    path.write_bytes(save(state))
    with pytest.raises(DataError, match="is no autoencoder of this package"):
        load_autoencoder(path)
    record = {"format": 99, "band": 0, "config": CONFIG.to_dict()}
    path.write_bytes(save(state, metadata={"shareprefill": json.dumps(record)}))
    with pytest.raises(DataError, match="format 99, but 1 was expected"):
        load_autoencoder(path)
    record = {"format": 1, "band": 3, "config": CONFIG.to_dict()}
    path.write_bytes(save(state, metadata={"shareprefill": json.dumps(record)}))
    with pytest.raises(DataError, match="size mismatch"):
        load_autoencoder(path)
