"""Training the autoencoder of block maps, and what it is measured against."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from shareprefill.autoencoder.augmentation import vary_key_blocks
from shareprefill.autoencoder.dataset import Split
from shareprefill.autoencoder.fitting import Batches, fit, step_seconds
from shareprefill.autoencoder.losses import Losses, reconstruction_loss, reference_losses
from shareprefill.autoencoder.network import MapAutoencoder, band_of
from shareprefill.autoencoder.pca import fit_pca
from shareprefill.config import TrainConfig
from shareprefill.errors import DataError
from shareprefill.files import atomic_write_bytes

_FORMAT = 1

# How strongly key blocks are varied, weakest first: prompts differ more in some data.
_STRENGTHS = (0.5, 1.0)
# A stronger variation must be better by this share: validation prompts are few, and the weaker
# one fits maps better that are like those of the training prompts.
_MARGIN = 0.02
# Varied copies of each training map that the starting PCA sees beside the map itself.
_START_COPIES = 4
# Steps that are timed to tell how long a training takes.
_TIMED_STEPS = 8


@dataclass(frozen=True)
class TrainedAutoencoder:
    """A trained network with its record.

    Attributes:
        network: The weights of the best epoch.
        history: One entry an epoch: `epoch` (0 before the first step), `train` (mean loss of the
            steps, on mixed and varied maps; at epoch 0 the loss of the training maps),
            `validation` (of the averaged weights), `learning_rate`, `best` (whether it is the
            best so far).
        strength: How strongly its training varied the key blocks.
        trials: The least validation loss with each strength that was tried.
        losses: Held-out losses.
    """

    network: MapAutoencoder
    history: list[dict[str, Any]]
    strength: float
    trials: dict[float, float]
    losses: Losses

    @property
    def beats_pca(self) -> bool:
        """`Losses.beats_pca`."""
        return self.losses.beats_pca


def train_autoencoder(
    maps: Tensor,
    config: TrainConfig,
    *,
    split: Split,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> TrainedAutoencoder:
    """Trains on the training prompts, chooses on the validation prompts, reports on the held-out.

    Each step shows some maps mixed with their head's maps of other prompts (`PromptMixer`), and
    most with new key-block gains (`vary_key_blocks`). A network is trained with each of two
    strengths of these gains; the validation prompts choose between them, and the epoch whose
    weights, a running mean over steps, are kept, the start among them. Runs on the CPU; the same
    input and seed give the same bytes, and the global random state is untouched.

    Args:
        maps: float32 `[P, K, R, R]`, rows sum to 1, R = `config.resolution`.
        config: Sizes, rates and seed.
        split: The use of each prompt.
        on_epoch: Called with each entry of each strength's history as it is made.
    """
    assert maps.shape[-2:] == (config.resolution, config.resolution)
    generator = torch.Generator().manual_seed(config.seed)
    band = band_of(maps)
    roots = _network(config, band).roots(maps)  # [P, K, S]
    train, heads, validation = _training_rows(roots, split, generator)
    held_out = roots[list(split.held_out)]  # [P', K, S]
    seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
    runs: list[_Run] = []
    for strength in _STRENGTHS:
        # The same draws for each: only the strength differs.
        draws = torch.Generator().manual_seed(seed)
        network = _started(_network(config, band), train, strength, draws)
        start_loss = reconstruction_loss(network, held_out.flatten(0, 1))
        batches = Batches(network, train, heads, strength, config.batch_size, draws)
        history = fit(network, batches, validation, config, on_epoch)
        least = min(entry["validation"] for entry in history)
        runs.append(_Run(strength, network, start_loss, history, least))
    chosen = _choose(runs)
    baseline = fit_pca([train], config.code_size)
    known = roots[list(split.train)].mean(0)  # [K, S]
    references = reference_losses(chosen.network, baseline, held_out, train.mean(0), known)
    loss = reconstruction_loss(chosen.network, held_out.flatten(0, 1))
    return TrainedAutoencoder(
        network=chosen.network,
        history=chosen.history,
        strength=chosen.strength,
        trials={run.strength: run.validation for run in runs},
        losses=Losses(autoencoder=loss, start=chosen.start, **references),
    )


def training_seconds(maps: int, config: TrainConfig) -> float:
    """Seconds of all epochs with all strengths, as a few steps take here.

    Args:
        maps: Training maps.
        config: Sizes, at the maps' own resolution.
    """
    draws = torch.Generator().manual_seed(config.seed)
    network = _network(config, band=0)
    size = min(maps, _TIMED_STEPS * config.batch_size), len(network.mean)
    random = torch.rand(size, generator=draws, dtype=torch.float32, device="cpu")
    heads = torch.arange(len(random), device="cpu")
    train = network.normalise(random)
    batches = Batches(network, train, heads, _STRENGTHS[0], config.batch_size, draws)
    steps = len(_STRENGTHS) * config.epochs * math.ceil(maps / config.batch_size)
    return steps * step_seconds(network, batches, config)


@dataclass(frozen=True)
class _Run:
    """A network trained with one strength; `start` is held-out and decides nothing."""

    strength: float
    network: MapAutoencoder
    start: float
    history: list[dict[str, Any]]
    validation: float


def _choose(runs: list[_Run]) -> _Run:
    """The run with the least validation loss, or a weaker one that is as good but for a margin."""
    bound = min(run.validation for run in runs) / (1 - _MARGIN)
    return next(run for run in runs if run.validation <= bound)


def _network(config: TrainConfig, band: int) -> MapAutoencoder:
    return MapAutoencoder(config.resolution, config.code_size, config.hidden, band)


def _started(
    network: MapAutoencoder, train: Tensor, strength: float, generator: torch.Generator
) -> MapAutoencoder:
    """The network, set to the PCA of the training roots `[N, S]` and of varied copies."""
    copies = [vary_key_blocks(network, train, strength, generator) for _ in range(_START_COPIES)]
    start = fit_pca([train, *copies], network.code_size)
    network.start_from(start.mean, start.basis, start.scale, generator)
    return network


def _training_rows(
    roots: Tensor, split: Split, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Training roots `[N, S]`, their heads `[N]`, and validation roots `[N', S]`.

    Without validation prompts a tenth of the training maps is drawn for validation.
    """
    train = roots[list(split.train)].flatten(0, 1)
    heads = torch.arange(roots.shape[1], device="cpu").repeat(len(split.train))
    if split.validation:
        return train, heads, roots[list(split.validation)].flatten(0, 1)
    order = torch.randperm(len(train), generator=generator, device="cpu")
    count = max(1, len(train) // 10)
    kept, drawn = order[count:].sort().values, order[:count].sort().values
    return train[kept], heads[kept], train[drawn]


def save_autoencoder(path: Path, trained: TrainedAutoencoder, config: TrainConfig) -> None:
    """Writes weights and configuration to a safetensors file, whole or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    record = {"format": _FORMAT, "band": trained.network.band, "config": config.to_dict()}
    # One string: the order of several metadata keys differs from run to run.
    metadata = {"shareprefill": json.dumps(record, sort_keys=True)}
    atomic_write_bytes(path, save(trained.network.state_dict(), metadata=metadata))


def load_autoencoder(path: Path) -> MapAutoencoder:
    """Reads what `save_autoencoder` wrote.

    Raises:
        DataError: the file is missing, damaged, or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})["shareprefill"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if record["format"] != _FORMAT:
            raise DataError(
                f"{path} has format {record['format']!r}, but {_FORMAT} was expected: train again"
            )
        config = TrainConfig.from_dict(record["config"])
        network = _network(config, int(record["band"]))
        network.load_state_dict(state)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: run sp train") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"{path} is no autoencoder of this package ({error}): train again"
        ) from error
    return network.eval()
