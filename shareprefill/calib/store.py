"""The map store: a folder of shards and an index, written so that a killed run can go on.

    index.json              configuration, fingerprint, and one record for every finished prompt
    maps-00000.safetensors  the maps of prompt 0
    ...

A shard is written whole and then named in the index; both are replaced atomically. What the index
does not name was never finished.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shareprefill.calib.capture import FULL, ROWS, PromptMaps
from shareprefill.config import CalibrateConfig
from shareprefill.errors import ConfigError, DataError
from shareprefill.files import (
    atomic_write_bytes,
    atomic_write_text,
    kind_of,
    make_folder,
    printable,
    remove,
    sealed,
    unsealed,
)
from shareprefill.models import Fingerprint, ModelGeometry, settings_that_differ
from shareprefill.runtime.ops.blocks import count_blocks

FORMAT_VERSION = 2
INDEX = "index.json"
_SHARD = re.compile(r"maps-\d{5,}\.safetensors")
# Beside the shards, of the training on them.
_TRAINED = ("autoencoder.safetensors", "codes.safetensors")
# Of the maps of one prompt.
_PROMPT_BYTES = 300_000_000


@dataclass(frozen=True)
class PromptRecord:
    """A finished prompt.

    Attributes:
        file: Its shard.
        sha256: Of the shard.
        source: Where the prompt came from.
        tokens: Its length.
        digest: SHA-256 of its token ids.
        layers: Captured layers.
        map_block: Tokens a block of its maps: more than the configuration's in long prompts.
    """

    file: str
    sha256: str
    source: str
    tokens: int
    digest: str
    layers: tuple[int, ...]
    map_block: int


class MapStore:
    """Maps of the prompts of one calibration.

    Args:
        folder: Where the shards and the index are.
        config: What was captured.
        fingerprint: Of the model they were captured from.
        prompts: The finished prompts, in order.
        digest: Of the whole model (`models.model_digest`); empty where it is not known.
    """

    def __init__(
        self,
        folder: Path,
        config: CalibrateConfig,
        fingerprint: Fingerprint,
        prompts: list[PromptRecord],
        digest: str = "",
    ) -> None:
        self.folder, self.config, self.fingerprint = folder, config, fingerprint
        self.prompts, self.digest = prompts, digest

    @classmethod
    def begin(
        cls,
        folder: Path,
        config: CalibrateConfig,
        fingerprint: Fingerprint,
        *,
        resume: bool,
        digest: str = "",
    ) -> MapStore:
        """Opens the store to write to: goes on with one of the same configuration, or starts anew.

        Args:
            folder: The store's folder; made where it is missing.
            config: What is captured.
            fingerprint: Of the model.
            resume: Go on with what is there; False deletes it, and no other file of the folder.
            digest: Of the whole model; empty where it is not known.

        Raises:
            ConfigError: what is there has another configuration, or is of another model.
            DataError: the folder cannot be written to, or its index is damaged.
        """
        if resume and (folder / INDEX).exists():
            store = cls.open(folder)
            store.refuse_other(config, fingerprint, digest)
            known = (asdict(store.fingerprint), store.digest)
            if not digest or store.digest != digest:
                # Maps of before may be of another configuration.
                fingerprint = replace(fingerprint, attention=store.fingerprint.attention)
            if known != (asdict(fingerprint), digest):
                # Equal weights: an earlier version knew less of them, or the files were repacked.
                store.fingerprint, store.digest = fingerprint, digest
                store._write_index()
            store._remove_unnamed()
            return store
        make_folder(folder)
        store = cls(folder, config, fingerprint, [], digest)
        # The index first: it must never name what is gone.
        store._write_index()
        store._remove_unnamed(*_TRAINED)
        return store

    @classmethod
    def open(cls, folder: Path) -> MapStore:
        """Opens a store to read.

        Raises:
            DataError: there is none, it is damaged, or it was written by a newer version.
        """
        path = folder / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            there = "holds no calibration" if kind_of(folder) else "does not exist"
            raise DataError(
                f"{printable(folder)} {there}: run sp calibrate, or name another folder"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path} cannot be read ({error}); run sp calibrate --fresh") from error
        try:
            version = index["format_version"]
            if version != FORMAT_VERSION:
                raise DataError(
                    f"{path} has format version {printable(repr(version))}, this version reads "
                    f"{FORMAT_VERSION}; run sp calibrate --fresh"
                )
            index = unsealed(index)
            return cls(
                folder,
                CalibrateConfig.from_dict(index["config"]),
                _fingerprint(index["fingerprint"]),
                [
                    PromptRecord(**{**record, "layers": tuple(record["layers"])})
                    for record in index["prompts"]
                ],
                # Earlier versions had none.
                index.get("model_digest", ""),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged ({error}); run sp calibrate --fresh") from error

    @property
    def complete(self) -> bool:
        """Whether all prompts of the configuration are captured."""
        return len(self.prompts) == self.config.samples

    @property
    def layers(self) -> tuple[int, ...]:
        """Captured layers: the same for every prompt."""
        return self.prompts[0].layers

    def map_block(self, tokens: int) -> int:
        """Tokens a block of the maps that are kept of a prompt: a multiple of the block size."""
        layers, config = self.fingerprint.geometry.layers, self.config
        most = config.map_blocks
        while most > 1 and self._bytes(most, layers) > _PROMPT_BYTES:
            most -= 1
        blocks = count_blocks(tokens, config.block_size)
        return config.block_size * count_blocks(blocks, most)

    def prompt_bytes(self, tokens: int, layers: int) -> int:
        """Bytes of the tensors that are kept of a prompt, of which so many layers are captured."""
        return self._bytes(count_blocks(tokens, self.map_block(tokens)), layers)

    def _bytes(self, n: int, layers: int) -> int:
        """The same for maps of `n` blocks a side."""
        kinds, heads = len(self.config.rows), layers * self.fingerprint.geometry.heads
        # Two bytes an entry: the causal half of the maps, and the last query block's two profiles.
        maps = 2 * heads * ((1 + kinds) * n * (n + 1) // 2 + n + n + 1)
        lines = 8 * 8 * 8 * kinds
        return maps + lines + (4 * (5 * heads + 1) if self.config.effect_tokens else 0)

    def add(self, source: str, input_ids: Tensor, digest: str, maps: PromptMaps) -> None:
        """Writes the next prompt's maps, then names them in the index."""
        from safetensors.torch import save

        data = save({name: _packed(tensor) for name, tensor in maps.tensors.items()})
        file = f"maps-{len(self.prompts):05d}.safetensors"
        atomic_write_bytes(self.folder / file, data)
        sha256 = hashlib.sha256(data).hexdigest()
        tokens = len(input_ids)
        self.prompts.append(
            PromptRecord(file, sha256, source, tokens, digest, maps.layers, self.map_block(tokens))
        )
        self._write_index()

    def holds(self, number: int, name: str) -> bool:
        """Whether there is a tensor of this name of a prompt: earlier versions kept fewer.

        Raises:
            DataError: the shard is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = self.folder / self.prompts[number].file
        try:
            with safe_open(path, framework="pt") as shard:
                return name in shard.keys()  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read ({error}); run sp calibrate --fresh") from error

    def load(self, number: int, *names: str) -> dict[str, Tensor]:
        """Tensors of one prompt, by name; all of them where none is named.

        Raises:
            DataError: the shard is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = self.folder / self.prompts[number].file
        try:
            with safe_open(path, framework="pt") as shard:
                found = {name: shard.get_tensor(name) for name in names or shard.keys()}
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read ({error}); run sp calibrate --fresh") from error
        return {name: _unpacked(name, tensor) for name, tensor in found.items()}

    def verify(self) -> None:
        """Compares every shard with its checksum.

        Raises:
            DataError: a shard is missing or is not what was written.
        """
        for record in self.prompts:
            path = self.folder / record.file
            try:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                raise DataError(
                    f"{path} cannot be read ({error}); run sp calibrate --fresh"
                ) from error
            if digest != record.sha256:
                raise DataError(f"{path} is damaged (checksum); run sp calibrate --fresh")

    def refuse_other(self, config: CalibrateConfig, fingerprint: Fingerprint, digest: str) -> None:
        """Refuses to be gone on with by a calibration of another configuration or model.

        Args:
            config: That of the other calibration.
            fingerprint: Of its model.
            digest: Of its whole model; empty where it is not known.

        Raises:
            ConfigError: it has another one.
        """
        way_out = "use --fresh to replace it, or --out for another folder"
        if self.config != config:
            old, new = self.config.to_dict(), config.to_dict()
            changed = ", ".join(
                f"{name} {old[name]!r} there, {new[name]!r} now"
                for name in new
                if old[name] != new[name]
            )
            raise ConfigError(
                f"{self.folder} holds a calibration with another configuration ({changed}); "
                f"{way_out}"
            )
        if self.fingerprint != fingerprint:
            there, now = (
                f"{model.describe()}, attention weights {model.weights[:12]}"
                for model in (self.fingerprint, fingerprint)
            )
            raise ConfigError(
                f"{self.folder} holds a calibration of another model ({there} there; {now} now); "
                f"{way_out}"
            )
        old, new = self.fingerprint.attention, fingerprint.attention
        if old is not None and new is not None and (changed := settings_that_differ(old, new)):
            raise ConfigError(
                f"{self.folder} holds a calibration of a model with the same attention weights, "
                f"but other positions (RoPE), windows or logits ({changed}); {way_out}"
            )
        if self.digest and digest and self.digest != digest:
            raise ConfigError(
                f"{self.folder} holds a calibration of a model with the same attention weights, "
                "but other ones elsewhere, other adapters or another configuration: "
                f"{self.digest[:12]} there, {digest[:12]} now; {way_out}"
            )

    def _remove_unnamed(self, *others: str) -> None:
        """Removes shards that the index does not name, and others by name; no one else's files."""
        named = {record.file for record in self.prompts}
        for path in [*self.folder.iterdir()]:
            if path.name in others or (_SHARD.fullmatch(path.name) and path.name not in named):
                remove(path)

    def _write_index(self) -> None:
        index: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "config": self.config.to_dict(),
            "fingerprint": asdict(self.fingerprint),
            "model_digest": self.digest,
            "prompts": [asdict(record) for record in self.prompts],
        }
        atomic_write_text(
            self.folder / INDEX, json.dumps(sealed(index), indent=1, sort_keys=True) + "\n"
        )


def _packed(tensor: Tensor) -> Tensor:
    """The causal half of maps `[L, H, n, n]`, row by row; other tensors as they are."""
    if tensor.ndim != 4:
        return tensor.contiguous()
    row, column = torch.tril_indices(*tensor.shape[2:], device=tensor.device)
    return tensor[..., row, column].contiguous()


def _unpacked(name: str, tensor: Tensor) -> Tensor:
    """What `_packed` was given."""
    if name != FULL and not name.startswith(ROWS):
        return tensor
    size = (math.isqrt(8 * tensor.shape[2] + 1) - 1) // 2
    row, column = torch.tril_indices(size, size, device=tensor.device)
    maps = tensor.new_zeros((*tensor.shape[:2], size, size))
    maps[..., row, column] = tensor
    return maps


def _fingerprint(values: dict[str, Any]) -> Fingerprint:
    return Fingerprint(**{**values, "geometry": ModelGeometry(**values["geometry"])})


def newest_calibration(root: Path) -> Path:
    """The calibration under `root` that was changed last.

    Raises:
        DataError: there is none.
    """
    found = sorted(root.glob(f"*/calibration/{INDEX}"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise DataError(f"{root} holds no calibration; run sp calibrate first, or name its folder")
    return found[-1].parent
