"""The training stage: a complete map store in; weights, codes and history beside it out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from shareprefill.autoencoder.dataset import MapDataset, Split, resample_maps, split_prompts
from shareprefill.autoencoder.embedding import embed
from shareprefill.autoencoder.losses import Losses
from shareprefill.autoencoder.training import (
    save_autoencoder,
    train_autoencoder,
    training_seconds,
)
from shareprefill.calib.capture import FULL
from shareprefill.calib.store import MapStore
from shareprefill.config import MIN_RESOLUTION, TrainConfig
from shareprefill.errors import DataError
from shareprefill.files import (
    atomic_write_bytes,
    atomic_write_text,
    locked_folder,
    sealed,
    unsealed,
)
from shareprefill.runtime.ops.blocks import count_blocks

WEIGHTS = "autoencoder.safetensors"
CODES = "codes.safetensors"
HISTORY = "history.json"


@dataclass(frozen=True)
class Training:
    """What a training left beside its maps.

    Attributes:
        config: How it was trained, at the resolution that it had.
        split: Which prompts trained, stopped and measured it.
        losses: On the held-out prompts.
        epochs: Epochs run.
    """

    config: TrainConfig
    split: Split
    losses: Losses
    epochs: int


def load_maps(store: MapStore, resolution: int) -> MapDataset:
    """The exact maps of all prompts and heads, at one resolution."""
    prompts = []
    for number in range(len(store.prompts)):
        maps = store.load(number, FULL)[FULL].flatten(0, 1)
        # One by one: at their own size, the maps of all prompts take several times the memory.
        prompts.append(resample_maps(maps, resolution))
    return MapDataset.from_prompts(prompts, resolution)


def train(
    folder: Path, config: TrainConfig, *, on_epoch: Callable[[dict[str, Any]], None] | None = None
) -> Training:
    """Trains the autoencoder on a calibration's maps, and writes weights, codes and history.

    Args:
        folder: The calibration.
        config: How to train; a resolution beyond the maps' own is lowered to it.
        on_epoch: Called with every epoch's entry of every trial.

    Returns:
        The training's configuration, split and losses.

    Raises:
        DataError: the calibration is missing, incomplete or damaged.
    """
    with locked_folder(folder):
        store = MapStore.open(folder)
        if not store.complete:
            raise DataError(
                f"{folder} has {len(store.prompts)} of {store.config.samples} prompts; run sp "
                "calibrate again to finish it"
            )
        store.verify()
        config = _fitting(config, [p.tokens for p in store.prompts], store.config.block_size)
        dataset = load_maps(store, config.resolution)
        split = dataset.split([record.source for record in store.prompts])
        trained = train_autoencoder(dataset.maps, config, split=split, on_epoch=on_epoch)
        codes = embed(trained.network, dataset.maps)
        training = Training(config, split, trained.losses, len(trained.history) - 1)
        save_autoencoder(folder / WEIGHTS, trained, config)
        atomic_write_bytes(folder / CODES, save({"codes": codes}))
        history = {
            "config": config.to_dict(),
            "split": asdict(split),
            "strength": trained.strength,
            "trials": trained.trials,
            "losses": asdict(trained.losses),
            "epochs": trained.history,
            # Written last, so that a killed training is not taken for a whole one.
            "files": {name: _sha256((folder / name).read_bytes()) for name in (WEIGHTS, CODES)},
            "maps": [record.sha256 for record in store.prompts],
        }
        atomic_write_text(
            folder / HISTORY, json.dumps(sealed(history), indent=1, sort_keys=True) + "\n"
        )
    return training


def forecast_training(
    tokens: Sequence[int], heads: int, block_size: int, config: TrainConfig
) -> float:
    """Seconds that a training will take, as a few steps of it take here.

    Args:
        tokens: Of each prompt.
        heads: Captured heads.
        block_size: Tokens a block.
        config: How to train.

    Raises:
        DataError: there are fewer prompts than are needed.
    """
    maps = len(split_prompts(len(tokens)).train) * heads
    return training_seconds(maps, _fitting(config, tokens, block_size))


def _fitting(config: TrainConfig, tokens: Sequence[int], block_size: int) -> TrainConfig:
    """The configuration at a resolution that the maps have: a finer one only repeats blocks."""
    blocks = count_blocks(max(tokens), block_size)
    return replace(config, resolution=min(config.resolution, max(blocks, MIN_RESOLUTION)))


def load_training(folder: Path) -> tuple[Training, Tensor]:
    """A training's record and its codes, float32 `[P, K, Z]`.

    Raises:
        DataError: the calibration was not trained, or not to the end, or on other maps than it
            holds; or its files are damaged.
    """
    try:
        history = unsealed(json.loads((folder / HISTORY).read_text(encoding="utf-8")))
        training = Training(
            TrainConfig.from_dict(history["config"]),
            Split(**{name: tuple(numbers) for name, numbers in history["split"].items()}),
            Losses(**history["losses"]),
            len(history["epochs"]) - 1,
        )
        data = {name: (folder / name).read_bytes() for name in (WEIGHTS, CODES)}
        for name in (WEIGHTS, CODES):
            if _sha256(data[name]) != history["files"][name]:
                raise DataError(
                    f"{folder} has a damaged training ({name} is not the one that {HISTORY} "
                    "names: it was changed, or a training was killed); run sp train"
                )
        if history["maps"] != [record.sha256 for record in MapStore.open(folder).prompts]:
            raise DataError(f"{folder} was trained on other maps than it holds; run sp train")
        return training, load(data[CODES])["codes"]
    except FileNotFoundError as error:
        raise DataError(f"{folder} has no trained autoencoder; run sp train") from error
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        SafetensorError,
    ) as error:
        raise DataError(f"{folder} has a damaged training ({error}); run sp train") from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
