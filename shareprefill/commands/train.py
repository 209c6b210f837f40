"""`sp train`: the autoencoder of a calibration, again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shareprefill.commands.known import CalibrationArgument, calibration_folder
from shareprefill.commands.options import options_of
from shareprefill.config import TrainConfig

if TYPE_CHECKING:
    from shareprefill.autoencoder.pipeline import Training


@options_of(TrainConfig)
def train_command(options: dict[str, Any], calibration: CalibrationArgument = None) -> None:
    """Train the autoencoder of a calibration again.

    Example:
      sp train artifacts/sp-tiny/calibration --epochs 200
    """
    config = TrainConfig(**options)
    from shareprefill.autoencoder.pipeline import train
    from shareprefill.console import status

    folder = calibration_folder(calibration)
    with status("training the autoencoder"):
        training = train(folder, config)
    show_training(folder, training)


def show_training(folder: Path, training: Training) -> None:
    """The autoencoder's loss on held-out prompts, beside what it has to beat."""
    from shareprefill.console import show_line, show_table

    losses = training.losses
    size = training.config.code_size
    rows = [
        (f"autoencoder-{size}", losses.autoencoder),
        (f"PCA-{size}, rows normalised", losses.pca),
        (f"PCA-{size}", losses.pca_linear),
        ("mean map of each head", losses.head_mean),
        ("mean map", losses.mean),
    ]
    show_table(
        f"maps and autoencoder in {folder}",
        ("held-out loss", "mean Hellinger² per row"),
        [(name, f"{loss:.5f}") for name, loss in rows],
    )
    verdict = "beats" if losses.beats_pca else "does not beat"
    show_line(
        f"{training.epochs} epochs on {len(training.split.train)} prompts, "
        f"{len(training.split.held_out)} held out: the autoencoder {verdict} PCA"
    )
