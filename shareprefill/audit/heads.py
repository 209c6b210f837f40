"""What an audit reads: the captured heads of an artifact, and the calibration it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from shareprefill.artifact import Artifact
from shareprefill.autoencoder.embedding import Consensus, consensus
from shareprefill.autoencoder.network import MapAutoencoder
from shareprefill.autoencoder.pipeline import WEIGHTS, Training, load_training
from shareprefill.autoencoder.training import load_autoencoder
from shareprefill.calib.store import INDEX, MapStore
from shareprefill.errors import ArtifactError
from shareprefill.files import kind_of, printable, reading_folder

# Codes are float32 and pass through one matrix product: anything beyond is another training.
_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Heads:
    """The heads of the layers that were captured, in order: the columns of an artifact.

    Attributes:
        layers: The captured layers.
        width: Heads a layer.
        ids: int64 `[K]`, `layer * H + head`.
        cluster: int64 `[K]`; -1: none.
        policy: int64 `[K]`.
        pivot: int64 `[K]`, an id; -1: none.
        recall: float64 `[K]`.
        density: float64 `[K]`.
        instability: float64 `[K]`.
        code: float64 `[K, Z]`.
    """

    layers: tuple[int, ...]
    width: int
    ids: Tensor
    cluster: Tensor
    policy: Tensor
    pivot: Tensor
    recall: Tensor
    density: Tensor
    instability: Tensor
    code: Tensor

    @classmethod
    def of(cls, artifact: Artifact) -> Self:
        """The heads of an artifact."""
        rows = torch.tensor(artifact.measured_layers, device="cpu")
        width = artifact.cluster.shape[1]

        def column(name: str, dtype: torch.dtype) -> Tensor:
            return getattr(artifact, name)[rows].flatten(0, 1).to(dtype)

        whole = {name: column(name, torch.int64) for name in ("cluster", "policy", "pivot")}
        real = {
            name: column(name, torch.float64)
            for name in ("recall", "density", "instability", "code")
        }
        ids = (rows[:, None] * width + torch.arange(width, device="cpu")).flatten()
        return cls(layers=tuple(rows.tolist()), width=width, ids=ids, **whole, **real)

    @property
    def count(self) -> int:
        """K."""
        return len(self.ids)

    def name(self, index: int) -> str:
        """The place `layer.head` of the head at an index."""
        return self.place(int(self.ids[index]))

    def place(self, head: int) -> str:
        """The place `layer.head` of a head id."""
        return f"{head // self.width}.{head % self.width}"

    def sizes(self) -> dict[int, int]:
        """Heads of each cluster, -1 left out, the largest first."""
        labels, counts = self.cluster[self.cluster >= 0].unique(return_counts=True)
        pairs = zip(labels.tolist(), counts.tolist(), strict=True)
        return dict(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))

    def grid(self, values: Tensor) -> Tensor:
        """`[K]` as `[captured layers, H]`."""
        return values.unflatten(0, (len(self.layers), self.width))


@dataclass(frozen=True, eq=False)
class Calibration:
    """The calibration that an artifact was made from.

    Attributes:
        folder: Where it is.
        store: Its maps.
        training: How its autoencoder was trained.
        network: The autoencoder.
        codes: float32 `[P, K, Z]`, of every prompt and head.
        known: Prompts that codes and consensus maps are means of.
        agreed: Mean codes and consensus maps.
    """

    folder: Path
    store: MapStore
    training: Training
    network: MapAutoencoder
    codes: Tensor
    known: tuple[int, ...]
    agreed: Consensus


def has_calibration(folder: Path) -> bool:
    """Whether there is a calibration in the folder, of whatever model."""
    return kind_of(folder / INDEX) == "file"


def open_calibration(folder: Path, artifact: Artifact, heads: Heads) -> Calibration:
    """Opens the calibration that the artifact was made from.

    Args:
        folder: A folder that holds a calibration.
        artifact: The artifact.
        heads: Its heads.

    Raises:
        ArtifactError: the folder's calibration is of another model, or of another run.
        DataError: it is incomplete, not trained, damaged, or being written.
    """
    with reading_folder(folder):
        store = MapStore.open(folder)
        _check_model(folder, store, artifact)
        training, codes = load_training(folder)
        store.verify()
        network = load_autoencoder(folder / WEIGHTS)
    known = tuple(sorted((*training.split.train, *training.split.validation)))
    agreed = consensus(network, codes, known)
    _check_run(folder, store, artifact, heads, agreed)
    return Calibration(folder, store, training, network, codes, known, agreed)


def _check_model(folder: Path, store: MapStore, artifact: Artifact) -> None:
    there, wanted = store.fingerprint, artifact.fingerprint
    if there != wanted:
        raise ArtifactError(
            f"{printable(folder)} is a calibration of another model: {there.describe()}, weights "
            f"{there.weights[:12]}; the artifact was made for {printable(artifact.model)}: "
            f"{wanted.describe()}, weights {wanted.weights[:12]}; name the calibration that the "
            "artifact was made from, or leave --calibration out"
        )


def _check_run(
    folder: Path, store: MapStore, artifact: Artifact, heads: Heads, agreed: Consensus
) -> None:
    made_from = artifact.configuration.get("calibrate")
    changed = ""
    if isinstance(made_from, dict):
        here = store.config.to_dict()
        differing = sorted(
            name for name in here.keys() | made_from.keys() if here.get(name) != made_from.get(name)
        )
        if differing:
            changed = f"its {printable(', '.join(differing))} differ"
    if not changed:
        same_heads = store.layers == heads.layers and agreed.code.shape == heads.code.shape
        bound = _TOLERANCE * float(heads.code.abs().max()) if same_heads else 0.0
        if same_heads and bool(((agreed.code - heads.code).abs() <= bound).all()):
            return
        changed = "its configuration is the same, but its codes are not: it was trained again"
    raise ArtifactError(
        f"{printable(folder)} is a calibration of this model, but of another run than the "
        f"artifact's ({changed}); name the calibration that the artifact was made from, run sp "
        "cluster on this one, or leave --calibration out"
    )
