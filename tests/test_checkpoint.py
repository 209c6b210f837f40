"""Fingerprints of the files that a model lies in."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from shareprefill.checkpoint import check_checkpoint, checkpoint_fingerprint
from shareprefill.errors import ArtifactError, ModelError
from shareprefill.models import warn_once
from tests.support.tiny import tiny_artifact, tiny_llama

INDEX = "model.safetensors.index.json"


def tensors(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        "model.layers.0.q.weight": torch.randn(64, 512, generator=generator),
        "model.layers.1.q.weight": torch.randn(64, 512, generator=generator).half(),
        "model.norm.weight": torch.randn(7, generator=generator).bfloat16(),
        "empty": torch.empty(0),
    }
    return {**made, **changes}


def whole(folder: Path, values: dict[str, torch.Tensor], **metadata: str) -> str:
    folder.mkdir()
    save_file(values, folder / "model.safetensors", {"format": "pt", **metadata})
    return str(folder)


def sharded(folder: Path, values: dict[str, torch.Tensor]) -> str:
    folder.mkdir()
    names = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(values)}
    for file in set(names.values()):
        save_file({n: values[n] for n in values if names[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    return str(folder)


def test_tensors_count_and_not_their_files(tmp_path: Path) -> None:
    one = checkpoint_fingerprint(whole(tmp_path / "a", tensors()))
    assert len(one) == 64
    turned = dict(reversed(tensors().items()))
    assert checkpoint_fingerprint(whole(tmp_path / "b", turned, more="x")) == one
    assert checkpoint_fingerprint(sharded(tmp_path / "c", tensors())) == one
    (tmp_path / "c" / "consolidated.safetensors").write_bytes(save(tensors()))
    (tmp_path / "c" / "config.json").write_text("{}")
    assert checkpoint_fingerprint(str(tmp_path / "c")) == one


def _with(name: str, place: tuple[int, ...], value: float) -> dict[str, torch.Tensor]:
    changed = tensors()
    changed[name][place] = value
    return changed


@pytest.mark.parametrize(
    "changed",
    [
        lambda: _with("model.layers.0.q.weight", (0, 0), 9.0),
        lambda: _with("model.layers.0.q.weight", (-1, -1), 9.0),
        lambda: _with("model.layers.0.q.weight", (22, 0), 9.0),  # inside of the second piece
        lambda: _with("model.norm.weight", (3,), 9.0),
        lambda: {name: value.float() for name, value in tensors().items()},
        lambda: {name: value.reshape(-1) for name, value in tensors().items()},
        lambda: {f"x{name}": value for name, value in tensors().items()},
        lambda: {name: value for name, value in tensors().items() if name != "empty"},
        lambda: {name: value * 1.01 for name, value in tensors().items()},
    ],
)
def test_other_tensors_have_another_fingerprint(changed: Any, tmp_path: Path) -> None:
    one = checkpoint_fingerprint(whole(tmp_path / "a", tensors()))
    assert checkpoint_fingerprint(whole(tmp_path / "b", changed())) != one


def test_a_gguf_file_counts_whole(tmp_path: Path) -> None:
    data = bytearray(os.urandom(1 << 20))
    (tmp_path / "a.gguf").write_bytes(data)
    (tmp_path / "b.GGUF").write_bytes(data)
    one = checkpoint_fingerprint(str(tmp_path / "a.gguf"))
    assert checkpoint_fingerprint(str(tmp_path / "b.GGUF")) == one
    data[500_000] ^= 1
    (tmp_path / "b.GGUF").write_bytes(data)
    assert checkpoint_fingerprint(str(tmp_path / "b.GGUF")) != one
    # Larger than all samples: read in part, and quickly.
    for name, last in (("c.gguf", b"\0"), ("d.gguf", b"\1")):
        with open(tmp_path / name, "wb") as file:
            file.truncate(20 << 30)
            file.seek((20 << 30) - 1)
            file.write(last)
    assert checkpoint_fingerprint(str(tmp_path / "c.gguf")) != (
        checkpoint_fingerprint(str(tmp_path / "d.gguf"))
    )


def test_a_built_in_model_and_a_hub_id_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(checkpoint_fingerprint("sp-tiny")) == 64
    cache = tmp_path / "hub"
    repository = cache / "models--organisation--name"
    for revision in ("1" * 40, "2" * 40):
        snapshot = repository / "snapshots" / revision
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        whole(snapshot, tensors(extra=torch.tensor([float(revision[0])])))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1" * 40)
    script = (
        "import sys; from shareprefill.checkpoint import checkpoint_fingerprint as f;"
        "print(f('organisation/name'), f('organisation/name', '2' * 40), f('organisation/none'));"
        "assert not {'transformers', 'gguf'} & set(sys.modules)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    main, second, *none = done.stdout.rstrip("\n").split(" ")
    assert main == checkpoint_fingerprint(str(repository / "snapshots" / ("1" * 40)))
    assert second == checkpoint_fingerprint(str(repository / "snapshots" / ("2" * 40)))
    assert none == [""]
    assert "neither a folder nor in the hub's cache" in done.stderr


def test_pickled_weights_have_none_and_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert checkpoint_fingerprint(str(tmp_path)) == ""
    assert "no checkpoint fingerprint: it lies in no safetensors files" in caplog.text


def _header(path: Path, **entry: Any) -> None:
    facts = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}
    text = json.dumps({"x": facts}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b""), "header claims 0 of 0"),
        (lambda path: path.write_bytes(struct.pack("<Q", 2**63)), "header claims 9223"),
        (lambda path: path.write_bytes(struct.pack("<Q", 2) + b"[]"), "not that of a safetensors"),
        (lambda path: path.write_bytes(struct.pack("<Q", 2) + b"\xff{"), "not that of a safetens"),
        (lambda path: _header(path, data_offsets=[0, 5]), "not that of a safetensors"),
        (lambda path: _header(path, data_offsets=[-4, 0]), "not that of a safetensors"),
        (lambda path: _header(path, data_offsets=None), "not that of a safetensors"),
        (lambda path: _header(path, shape=["1"]), "not that of a safetensors"),
        (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
    ],
)
def test_damaged_files_are_refused(spoil: Any, message: str, tmp_path: Path) -> None:
    folder = whole(tmp_path / "a", tensors())
    spoil(tmp_path / "a" / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        checkpoint_fingerprint(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "no index"),
        ("[]", "no index"),
        ('{"weight_map": {"x": 3}}', "no index"),
        ('{"weight_map": {"x": "../a/model.safetensors"}}', "outside of the folder"),
        ('{"weight_map": {"x": "/dev/zero"}}', "outside of the folder"),
        ('{"weight_map": {"x": "gone.safetensors"}}', "no such file"),
        ('{"weight_map": {"x": "model-0.safetensors"}}', "lacks the tensor 'x'"),
    ],
)
def test_damaged_indices_are_refused(index: str, message: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "a", tensors())
    (tmp_path / "a" / INDEX).write_text(index)
    with pytest.raises(ModelError, match=message):
        checkpoint_fingerprint(folder)


def test_no_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model folder"):
        checkpoint_fingerprint(str(tmp_path / "none"))


def test_artifacts_are_checked_against_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own, other = (
        whole(tmp_path / name, tensors(x=torch.full((3,), value)))
        for name, value in (("a", 1.0), ("b", 2.0))
    )
    warn_once.cache_clear()
    artifact = tiny_artifact(tiny_llama())
    known = replace(artifact.fingerprint, checkpoint=checkpoint_fingerprint(own))
    artifact = replace(artifact, fingerprint=known)
    assert check_checkpoint(artifact, own)
    with pytest.raises(ArtifactError, match="from other files than those of .*b .checkpoint"):
        check_checkpoint(artifact, other)
    assert caplog.text == ""
    unknown = replace(artifact, fingerprint=replace(known, checkpoint=""))
    assert not check_checkpoint(unknown, own)
    assert "holds no fingerprint of its model's files" in caplog.text
    (tmp_path / "bin").mkdir()
    assert not check_checkpoint(artifact, str(tmp_path / "bin"))
