"""Fitting one network to the training maps, and the epoch that the validation maps choose."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from shareprefill.autoencoder.augmentation import PromptMixer, vary_key_blocks
from shareprefill.autoencoder.losses import hellinger_loss, reconstruction_loss
from shareprefill.autoencoder.network import MapAutoencoder
from shareprefill.config import TrainConfig

# Share of a batch that is mixed with the same head's maps of other prompts.
_MIXED = 0.6
# Share of a batch whose key blocks keep their gains.
_KEPT = 0.3
# The linear maps start at an optimum of their own: they move slower than the branches.
_LINEAR_RATE = 0.1
_WARM_UP_EPOCHS = 5
# Of the running mean of the weights, each step.
_DECAY = 0.99


class Batches:
    """The training maps, shown anew in each pass: mixed, varied, in another order.

    Args:
        network: Knows the entries of the roots.
        train: `[N, S]` roots.
        heads: int64 `[N]`, the head of each.
        strength: `vary_key_blocks`' strength.
        size: Maps a batch.
        generator: Source of all draws.
    """

    def __init__(
        self,
        network: MapAutoencoder,
        train: Tensor,
        heads: Tensor,
        strength: float,
        size: int,
        generator: torch.Generator,
    ) -> None:
        self.plain = train
        self._network = network
        self._mixer = PromptMixer(train, heads)
        self._strength = strength
        self._size = size
        self._generator = generator

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.plain), generator=self._generator, device="cpu")
        for rows in order.split(self._size):
            seen = torch.where(
                self._draw(len(rows), _MIXED),
                self._mixer.mix(rows, self._generator),
                self.plain[rows],
            )
            varied = vary_key_blocks(self._network, seen, self._strength, self._generator)
            yield torch.where(self._draw(len(rows), _KEPT), seen, varied)

    def _draw(self, count: int, share: float) -> Tensor:
        return (
            torch.rand(count, 1, generator=self._generator, dtype=torch.float32, device="cpu")
            < share
        )


def fit(
    network: MapAutoencoder,
    batches: Batches,
    validation: Tensor,
    config: TrainConfig,
    on_epoch: Callable[[dict[str, Any]], None] | None,
) -> list[dict[str, Any]]:
    """Trains until patience ends, and leaves the best epoch's averaged weights in `network`.

    A running mean of the weights over steps is what each epoch is judged by and what is kept:
    the noise of the steps costs more than they gain while the rate is high.

    Args:
        network: Starts from its present weights.
        batches: The training maps.
        validation: `[N', S]` roots that choose the epoch, the start among them.
        config: Sizes and rates.
        on_epoch: Called with each entry as it is made.

    Returns:
        One entry an epoch, as in `TrainedAutoencoder.history`.
    """
    optimizer = _optimizer(network, config)
    average = copy.deepcopy(network)
    best_loss, best_epoch = math.inf, 0
    best_state: dict[str, Tensor] = {}
    history: list[dict[str, Any]] = []
    for epoch in range(config.epochs + 1):
        rate = config.learning_rate * _rate_factor(epoch, config.epochs)
        if epoch == 0:
            train_loss, rate = reconstruction_loss(network, batches.plain), 0.0
        else:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            train_loss = _train_epoch(network, average, batches, optimizer)
        loss = reconstruction_loss(average, validation)
        improved = loss < best_loss
        if improved:
            best_loss, best_epoch = loss, epoch
            best_state = {name: value.clone() for name, value in average.state_dict().items()}
        entry: dict[str, Any] = {
            "epoch": epoch,
            "train": train_loss,
            "validation": loss,
            "learning_rate": rate,
            "best": improved,
        }
        history.append(entry)
        if on_epoch is not None:
            on_epoch(entry)
        if epoch - best_epoch >= config.patience:
            break
    network.load_state_dict(best_state)
    network.eval()
    return history


def step_seconds(network: MapAutoencoder, batches: Batches, config: TrainConfig) -> float:
    """Seconds of a step of `fit`, which this moves `network` by: the mean of the quicker pass."""
    optimizer, average = _optimizer(network, config), copy.deepcopy(network)
    passes = []
    for _ in range(2):
        begun = perf_counter()
        _train_epoch(network, average, batches, optimizer)
        passes.append(perf_counter() - begun)
    return min(passes) / math.ceil(len(batches.plain) / config.batch_size)


def _optimizer(network: MapAutoencoder, config: TrainConfig) -> torch.optim.Optimizer:
    linear = [network.encode_linear.weight, network.decode_linear.weight]
    branches = [*network.encode_branch.parameters(), *network.decode_branch.parameters()]
    return torch.optim.AdamW(
        [{"params": branches, "factor": 1.0}, {"params": linear, "factor": _LINEAR_RATE}],
        lr=config.learning_rate,
        weight_decay=0.0,
    )


def _rate_factor(epoch: int, epochs: int) -> float:
    """Linear warm-up, then a cosine to zero: epochs count from 1."""
    warm_up = min(1.0, epoch / _WARM_UP_EPOCHS)
    return warm_up * 0.5 * (1.0 + math.cos(math.pi * max(0, epoch - 1) / epochs))


def _train_epoch(
    network: MapAutoencoder,
    average: MapAutoencoder,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
) -> float:
    """One pass over the training maps, moving `average` after `network`.

    Returns:
        The mean loss of the steps.
    """
    network.train()
    total = 0.0
    for target in batches:
        decoded = network.decode_roots(network.encode_roots(target))
        loss = hellinger_loss(decoded, target, network.resolution)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mean, value in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(value, 1 - _DECAY)
        total += float(loss.detach()) * len(target)
    return total / len(batches.plain)
