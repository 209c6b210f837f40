"""Fingerprints of checkpoints: of the files that a model lies in, without loading it.

Serving engines fuse, split and pack weights, so that a hash of what they have loaded tells nothing;
the files are the same everywhere. Samples of every tensor are read, not all of it: seconds for any
size. Equal files have equal fingerprints; one that somebody has edited on purpose between the
samples has, too.
"""

from __future__ import annotations

import hashlib
import json
import os
from io import BufferedIOBase
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from shareprefill.artifact import Artifact
from shareprefill.errors import ArtifactError, ModelError
from shareprefill.files import printable
from shareprefill.models import resolve_model, warn_once
from shareprefill.safetensors_reader import RefusedError, open_regular

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# safetensors' own bound of a header.
_MAX_HEADER = 100_000_000
_PIECE = 4096
# Pieces of a tensor, and of a GGUF file, from its first bytes to its last.
_TENSOR_PIECES, _FILE_PIECES = 4, 1024


class _Place(NamedTuple):
    """Where a tensor lies, and what its file says of it."""

    path: Path
    start: int
    size: int
    dtype: str
    shape: list[int]


def checkpoint_fingerprint(model: str, revision: str | None = None) -> str:
    """SHA-256 over a checkpoint's tensors: names, dtypes, shapes, and samples of their bytes.

    It does not depend on how the tensors are spread over files, nor on anything else in the folder.
    A GGUF file counts as a whole, by its length and samples. Neither transformers nor the hub is
    asked: a hub id must be in the cache.

    Args:
        model: A local folder, a GGUF file, a hub id, or a name in `BUILT_IN`.
        revision: Of a hub id; None for its main branch.

    Returns:
        The hash; empty where there is none, for a reason that is logged as a warning: a checkpoint
        of pickled weights (`.bin`), or a hub id that is not in the cache.

    Raises:
        ModelError: there is no such model, or its files are damaged or incomplete.
    """
    path = Path(resolve_model(model))
    if path.suffix.lower() == ".gguf" and path.is_file():
        return _of_file(path)
    folder = path if path.is_dir() else _cached(model, revision)
    if folder is None:
        warn_once(
            f"{printable(model)} has no checkpoint fingerprint: it is neither a folder nor in the "
            "hub's cache"
        )
        return ""
    places = _tensors(folder)
    if places is None:
        warn_once(
            f"{printable(model)} has no checkpoint fingerprint: it lies in no safetensors files "
            f"({_SINGLE} or {_INDEX}), save it as such"
        )
        return ""
    digest = hashlib.sha256(b"safetensors 1\n")
    for name, place in sorted(places.items()):
        facts = [name, place.dtype, place.shape, place.size]
        digest.update(json.dumps(facts).encode() + b"\n")
        with _opened(place.path) as file:
            _add_samples(digest, file, place.start, place.size, _TENSOR_PIECES)
    return digest.hexdigest()


def check_checkpoint(artifact: Artifact, model: str, revision: str | None = None) -> bool:
    """Checks that an artifact was made from the files that a model lies in.

    Args:
        artifact: What is to be used.
        model: See `checkpoint_fingerprint`.
        revision: Of a hub id.

    Returns:
        Whether the files were compared, and are the same. False, with a warning, where the artifact
        or the model has no checkpoint fingerprint: the caller should compare the geometry at least.

    Raises:
        ArtifactError: it was made from other files.
        ModelError: see `checkpoint_fingerprint`.
    """
    made_from = artifact.fingerprint.checkpoint
    if not made_from:
        warn_once(
            f"the artifact for {printable(artifact.model)} holds no fingerprint of its model's "
            "files: whether it was made for this model's weights cannot be checked; make it anew "
            "with sp calibrate and sp cluster from a folder, a hub id or a GGUF file"
        )
        return False
    found = checkpoint_fingerprint(model, revision)
    if found and found != made_from:
        raise ArtifactError(
            f"the artifact was made for {printable(artifact.model)}, from other files than those "
            f"of {printable(model)} (checkpoint {made_from[:12]}, here {found[:12]}): load the "
            "checkpoint that was calibrated, in its own dtype and packing, or calibrate this one"
        )
    return bool(found)


def _cached(hub_id: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _tensors(folder: Path) -> dict[str, _Place] | None:
    """All tensors of a folder's checkpoint, chosen as transformers does; None without any."""
    if (folder / _SINGLE).exists():
        return _entries(folder / _SINGLE)
    index = folder / _INDEX
    if not index.exists():
        return None
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): PurePosixPath(file) for name, file in named.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(index, "it is no index of safetensors files") from error
    for file in names.values():
        if file.is_absolute() or ".." in file.parts:
            raise _damaged(index, f"it names the file {printable(file)!r} outside of the folder")
    files = {file: _entries(folder / file) for file in sorted(set(names.values()))}
    missing = sorted(name for name, file in names.items() if name not in files[file])
    if missing:
        raise _damaged(index, f"its file lacks the tensor {printable(missing[0])!r}")
    return {name: files[file][name] for name, file in names.items()}


def _entries(path: Path) -> dict[str, _Place]:
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(_MAX_HEADER, size - 8):
            raise _damaged(path, f"its header claims {length} of {size} bytes")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            return {
                str(name): _place(path, entry, 8 + length, size) for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(path, "its header is not that of a safetensors file") from error


def _place(path: Path, entry: dict[str, Any], data: int, size: int) -> _Place:
    (first, last), shape = entry["data_offsets"], entry["shape"]
    if not all(type(number) is int and number >= 0 for number in (first, last, *shape)):
        raise ValueError("an offset or a size is no natural number")
    if not first <= last <= size - data:
        raise ValueError("a tensor lies outside of the file")
    return _Place(path, data + first, last - first, str(entry["dtype"]), shape)


def _of_file(path: Path) -> str:
    digest = hashlib.sha256(b"gguf 1\n")
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(f"{size}\n".encode())
        _add_samples(digest, file, 0, size, _FILE_PIECES)
    return digest.hexdigest()


def _add_samples(digest: Any, file: BufferedIOBase, start: int, size: int, pieces: int) -> None:
    """Adds all of a few bytes; of more, pieces at even distances, the first and the last too."""
    if size <= pieces * _PIECE:
        places, length = [start], size
    else:
        places = [start + (size - _PIECE) * number // (pieces - 1) for number in range(pieces)]
        length = _PIECE
    for place in places:
        file.seek(place)
        digest.update(file.read(length))


def _opened(path: Path) -> BufferedIOBase:
    try:
        return open_regular(path)
    except RefusedError as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, reason: str) -> ModelError:
    return ModelError(f"{printable(path)} cannot be used: {reason}: get the model again")
