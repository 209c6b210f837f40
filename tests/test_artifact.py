from __future__ import annotations

import json
import math
import os
import runpy
import struct
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from shareprefill import artifact as artifact_module
from shareprefill.artifact import (
    FORMAT_VERSION,
    Artifact,
    Fingerprint,
    ModelGeometry,
    Policy,
    Rows,
    Thresholds,
    artifact_bytes,
    check_fingerprint,
    load_artifact,
    model_to_load,
    save_artifact,
)
from shareprefill.errors import ArtifactError, DataError
from shareprefill.models import warn_once
from tests.audit.synthetic import made_up_artifact, with_gaps

FUZZ = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "fuzz_artifact.py"))
Parts = FUZZ["Parts"]
LAYERS, HEADS = 2, 4
ATTENTION: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "layer_types": ["full_attention", "sliding_attention"],
    "sliding_window": 512,
}


def example(**changes: Any) -> Artifact:
    """Head 1 of layer 0 is the pivot of heads 2 of layer 0, and 0 and 3 of layer 1."""
    shape = (LAYERS, HEADS)
    artifact = Artifact(
        model="organisation/model",
        fingerprint=Fingerprint(
            "llama", ModelGeometry(LAYERS, HEADS, 2, 16), "0a" * 32, attention=ATTENTION
        ),
        cluster=torch.tensor([[-1, 0, 0, -1], [0, 1, 1, 0]], dtype=torch.int32),
        policy=torch.tensor([[0, 1, 2, 4], [2, 3, 1, 2]], dtype=torch.int8),
        pivot=torch.tensor([[-1, 1, 1, -1], [1, -1, 6, 1]], dtype=torch.int32),
        fallback=torch.tensor([[0, 1, 3, 4], [5, 3, 1, 0]], dtype=torch.int8),
        gamma=torch.rand(shape).clamp(min=0.1),
        fallback_gamma=torch.rand(shape).clamp(min=0.1),
        slack=torch.rand(shape) * 2 - 1,
        recall=torch.rand(shape),
        density=torch.rand(shape),
        instability=torch.rand(shape) * 5,
        effect=torch.rand(shape) * 3,
        step_effect=torch.rand(shape),
        fp8_error=torch.rand(shape),
        code=torch.randn(*shape, 7),
        block_size=64,
        thresholds=Thresholds(gamma=0.9, tau=0.2, delta=0.3),
        rows=Rows(pivot=0, sample=8, check=1),
        estimator={"1": [0.5, 0.25, 0.0, 0.0, 0.0, 0.125, 0.125], "8": [1.0, *[0.0] * 6]},
        configuration={"data": ["mixture", "über"], "k": None, "rows": [1, 2, 4, 8]},
        summary={"density": 0.21, "recall": 0.95, "costs": {"8": 0.5}},
    )
    return replace(artifact, **changes)


def with_head(name: str, layer: Any, head: Any, value: float) -> Artifact:
    tensor = getattr(example(), name).clone()
    tensor[layer, head] = value
    return example(**{name: tensor})


def _as_format_1(parts: Any) -> None:
    parts.metadata["format_version"] = 1
    del parts.metadata["estimator"]


def write_parts(path: Path, edit: Any) -> Path:
    """Writes a good file after `edit(parts)`, its digest right for what it then holds."""
    parts = Parts.of(artifact_bytes(example()))
    edit(parts)
    parts.seal()
    path.write_bytes(parts.join())
    return path


def test_load_returns_what_was_saved(tmp_path: Path) -> None:
    saved = example()
    save_artifact(saved, tmp_path / "a.st")
    loaded = load_artifact(str(tmp_path / "a.st"))
    for field in fields(Artifact):
        before, after = getattr(saved, field.name), getattr(loaded, field.name)
        if isinstance(before, torch.Tensor):
            assert before.dtype == after.dtype
            assert torch.equal(before, after)
        else:
            assert before == after
    assert loaded.heads == LAYERS * HEADS
    assert loaded.policy_counts() == {
        "dense": 1, "pivot": 2, "share": 3, "sampled": 1, "vertical-slash": 1, "smoothed": 0
    }  # fmt: skip


def test_the_file_is_ordinary_safetensors_with_one_metadata_string(tmp_path: Path) -> None:
    artifact = example()
    save_artifact(artifact, tmp_path / "a.st")
    with safetensors.safe_open(tmp_path / "a.st", "pt") as file:
        assert list(file.metadata()) == ["shareprefill"]
        metadata = json.loads(file.metadata()["shareprefill"])
        assert torch.equal(file.get_tensor("code"), artifact.code)
    assert metadata["format_version"] == FORMAT_VERSION
    assert metadata["model"] == "organisation/model"
    assert metadata["fingerprint"] == asdict(artifact.fingerprint)


def test_equal_artifacts_have_equal_bytes_in_any_process() -> None:
    script = (
        "import runpy, hashlib; from shareprefill.artifact import artifact_bytes;"
        f"f = runpy.run_path({str(FUZZ['__file__'])!r});"
        "print(hashlib.sha256(artifact_bytes(f['sample_artifact'](5))).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1
    artifact = example()
    shuffled = dict(reversed(artifact.configuration.items()))
    assert artifact_bytes(artifact) == artifact_bytes(replace(artifact, configuration=shuffled))
    # Memory layout is no content.
    strided = artifact.code.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    assert artifact_bytes(artifact) == artifact_bytes(replace(artifact, code=strided))


def test_loaded_artifact_saves_to_the_same_bytes(tmp_path: Path) -> None:
    save_artifact(example(), tmp_path / "a.st")
    assert artifact_bytes(load_artifact(tmp_path / "a.st")) == (tmp_path / "a.st").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda: {"model": ""}, "model has 0 characters"),
        (lambda: {"model": "m" * 513}, "model has 513 characters"),
        (lambda: {"model": "m\x1b[31m"}, r"control characters: 'm\\x1b\[31m'"),
        (lambda: {"model": "m\u202e"}, "control characters"),
        (lambda: {"model": 3}, "model is 3, not text"),
        (lambda: {"block_size": 48}, "block_size is 48"),
        (lambda: {"thresholds": Thresholds(0.0, 0.2, 0.3)}, "thresholds.gamma is 0"),
        (lambda: {"thresholds": Thresholds(0.9, 1.2, 0.3)}, "thresholds.tau is 1.2"),
        (lambda: {"thresholds": Thresholds(0.9, 0.2, float("nan"))}, "thresholds.delta is nan"),
        (lambda: {"rows": Rows(65, 8, 2)}, "rows.pivot is 65"),
        (lambda: {"estimator": {"65": [1.0] * 7}}, "estimator has weights for '65' rows"),
        (lambda: {"estimator": {"01": [1.0] * 7}}, "estimator has weights for '01' rows"),
        (lambda: {"estimator": {"2": [1.0] * 6}}, "not 7 weights"),
        (lambda: {"estimator": {"2": 1.0}}, "estimator has 1.0, not 7 weights"),
        (lambda: {"estimator": {"2": [0.0] * 7}}, "weights that are all 0"),
        (lambda: {"estimator": {"2": [-0.5] * 7}}, "a weight of estimator is -0.5"),
        (lambda: {"rows": Rows(0, 0, 2)}, "rows.sample is 0"),
        (lambda: {"rows": Rows(0, 8, True)}, "rows.check is True"),
        (lambda: {"configuration": {"a": float("inf")}}, "configuration holds inf"),
        (lambda: {"configuration": {1: 2}}, "configuration has the key 1"),
        (lambda: {"configuration": {"a": "\x07"}}, "configuration holds control characters"),
        (lambda: {"configuration": {"a": Path("x")}}, "configuration holds a PosixPath"),
        (lambda: {"summary": []}, r"summary is \[\], not an object"),
        (lambda: {"summary": {"a": 2**64}}, "more than 64 bits"),
        (lambda: {"summary": json.loads("[" * 20 + "]" * 20, object_hook=None)}, "not an object"),
        (lambda: {"summary": {"a": json.loads("[" * 20 + "]" * 20)}}, "nested more than 16"),
        (lambda: {"summary": {"a": [0] * 10_000}}, "JSON values, more than"),
        (lambda: {"gamma": torch.rand(LAYERS, HEADS, dtype=torch.float64)}, "'gamma' is .*float64"),
        (lambda: {"gamma": [0.5]}, "gamma is a list"),
        (lambda: {"recall": torch.rand(HEADS, LAYERS)}, r"'recall' is .*\[4, 2\], expected"),
        (lambda: {"code": torch.rand(LAYERS, HEADS, 0)}, "code_size is 0"),
    ],
)  # fmt: skip
def test_artifacts_that_break_a_rule_are_not_saved(
    changes: Any, message: str, tmp_path: Path
) -> None:
    artifact = example(**changes())
    with pytest.raises(ArtifactError, match=message):
        save_artifact(artifact, tmp_path / "a.st")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "layer", "head", "value", "message"),
    [
        ("policy", 0, 3, 6, "head 3 of layer 0 has an unknown policy"),
        ("policy", 0, 3, -1, "head 3 of layer 0 has an unknown policy"),
        ("cluster", 1, 1, 8, "head 1 of layer 1 has a cluster out of range"),
        ("cluster", 0, 1, -1, "head 1 of layer 0 is a pivot or shares, but has no cluster"),
        ("pivot", 0, 1, 2, "head 1 of layer 0 is a pivot, but does not name itself"),
        ("pivot", 0, 0, 1, "head 0 of layer 0 names a pivot, but does not share"),
        ("pivot", 1, 3, 8, "head 3 of layer 1 has a pivot out of range"),
        ("pivot", 1, 3, -1, "head 3 of layer 1 has a pivot out of range"),
        ("pivot", 1, 3, 4, "head 3 of layer 1 shares with a head that is no pivot"),
        ("pivot", 0, 2, 6, "head 2 of layer 0 shares with a pivot of a later layer"),
        ("fallback", 1, 3, 1, "head 3 of layer 1 shares, but its fallback"),
        ("fallback", 1, 3, 2, "head 3 of layer 1 shares, but its fallback"),
        ("fallback", 1, 3, -1, "head 3 of layer 1 shares, but its fallback"),
        ("fallback", 1, 3, 6, "head 3 of layer 1 shares, but its fallback"),
        ("fallback", 1, 1, 0, "head 1 of layer 1 does not share, but has another fallback"),
        ("gamma", 0, 0, 0.0, "gamma holds 0 to"),
        ("fallback_gamma", 0, 0, 0.0, "fallback_gamma holds 0 to"),
        ("gamma", 0, 0, float("nan"), "gamma holds values that are not finite"),
        ("slack", 0, 0, -1.001, "slack holds -1.001 to .*, expected between -1 and 1"),
        ("slack", 0, 0, 1.001, "slack holds .* to 1.001, expected between -1 and 1"),
        ("slack", 0, 0, float("nan"), "slack holds values that are not finite"),
        ("recall", 0, 0, 1.001, "recall holds .* to 1.001"),
        ("density", 0, 0, -0.1, "density holds -0.1"),
        ("instability", 0, 0, -0.1, "instability holds -0.1"),
        ("effect", 0, 0, -0.1, "effect holds -0.1"),
        ("step_effect", 0, 0, -0.1, "step_effect holds -0.1"),
        ("fp8_error", 0, 0, -0.1, "fp8_error holds -0.1"),
        ("instability", 0, 0, float("inf"), "instability holds values that are not finite"),
        ("code", 1, 3, float("nan"), "code holds values that are not finite"),
        ("recall", 0, 0, float("nan"), "recall holds values that are not finite"),
        ("fp8_error", 0, 0, float("nan"), "fp8_error holds values that are not finite"),
        ("effect", 0, slice(None), float("nan"), "effect holds values that are not finite"),
        (
            "recall",
            0,
            slice(None),
            float("nan"),
            "density has values of layer 0, which recall calls not measured",
        ),
        ("recall", slice(None), slice(None), float("nan"), "recall says that no layer"),
    ],
)
def test_heads_that_break_a_rule_are_refused_in_memory_and_in_a_file(
    name: str, layer: Any, head: Any, value: float, message: str, tmp_path: Path
) -> None:
    broken = with_head(name, layer, head, value)
    with pytest.raises(ArtifactError, match=message):
        artifact_bytes(broken)

    def edit(parts: Any) -> None:
        raw = getattr(broken, name).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        begin, end = parts.header[name]["data_offsets"]
        parts.tensors[begin:end] = raw

    path = write_parts(tmp_path / "a.st", edit)
    with pytest.raises(ArtifactError, match=rf"a\.st is not usable: {message}.*sp calibrate"):
        load_artifact(path)


@pytest.mark.parametrize(
    ("tokens", "longest"),
    [([100, 300, 200], 300), ([100, "9", True, 2.5], 100), ([], None), ("300", None)],
)
def test_the_longest_prompt_that_was_measured(tokens: Any, longest: int | None) -> None:
    assert example(summary={"held_out_tokens": tokens}).measured_tokens == longest
    assert example().measured_tokens is None


class TestLayersThatWereNotCaptured:
    def test_they_are_dense_and_told_from_measured_ones(self, tmp_path: Path) -> None:
        artifact = with_gaps(made_up_artifact(4, 3), 1, 3)
        save_artifact(artifact, tmp_path / "a.st")
        loaded = load_artifact(tmp_path / "a.st")
        assert loaded.measured_layers == [0, 2]
        assert loaded.expected("density") == pytest.approx(artifact.density[[0, 2]].mean().item())
        assert loaded.expected("recall", [2, 3]) == pytest.approx(artifact.recall[2].mean().item())
        assert math.isnan(loaded.expected("recall", [1]))
        assert artifact_bytes(loaded) == (tmp_path / "a.st").read_bytes()
        assert "density nan" not in repr(loaded)

    def test_a_head_there_follows_no_sparse_policy(self) -> None:
        artifact = with_gaps(made_up_artifact(4, 3), 2)
        for tensor in (artifact.policy, artifact.fallback):
            tensor[2, 1] = Policy.SAMPLED
        with pytest.raises(ArtifactError, match="head 1 of layer 2 was not measured, but is not"):
            artifact_bytes(artifact)

    def test_made_up_values_of_earlier_versions_are_not_believed(self, tmp_path: Path) -> None:
        gaps = with_gaps(made_up_artifact(4, 3, fp8_error=torch.rand(4, 3)), 1, 3)
        filled = {"recall": 1.0, "density": 1.0, "instability": 0.0, "fp8_error": 0.0, "code": 0.0}
        old = {name: getattr(gaps, name).nan_to_num(value) for name, value in filled.items()}
        save_artifact(replace(gaps, **old), tmp_path / "a.st")
        loaded = load_artifact(tmp_path / "a.st")
        for name in filled:
            torch.testing.assert_close(
                getattr(loaded, name), getattr(gaps, name), rtol=0, atol=0, equal_nan=True
            )
        assert artifact_bytes(loaded) == artifact_bytes(gaps)


def flip_bit_of_code(data: bytes) -> bytes:
    parts = Parts.of(data)
    parts.tensors[parts.header["code"]["data_offsets"][0]] ^= 1
    return parts.join()


def _set(target: str, *keys: str, value: Any) -> Any:
    def edit(parts: Any) -> None:
        place = getattr(parts, target)
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set("metadata", "format_version", value=3), "has format 3.*reads format 2: upgrade"),
        (_set("metadata", "format_version", value=0), "format_version is 0"),
        (_set("metadata", "format_version", value=True), "format_version is True"),
        (_set("metadata", "extra", value=1), "keys of metadata: 'extra' is unknown"),
        (_set("metadata", "\x1b[2J", value=1), r"'\\x1b\[2J' is unknown"),
        (lambda parts: parts.metadata.pop("rows"), "keys of metadata: 'rows' is missing"),
        (_set("metadata", "rows", "more", value=1), "keys of rows: 'more' is unknown"),
        (_set("metadata", "fingerprint", value=[]), r"fingerprint is \[\], not an object"),
        (_set("metadata", "fingerprint", "weights", value="0A" * 32), "not a sha256"),
        (
            _set("metadata", "fingerprint", "checkpoint", value="0c"),
            "checkpoint is '0c', not empty",
        ),
        (_set("metadata", "fingerprint", "checkpoint", value=None), "checkpoint is None"),
        (
            _set("metadata", "fingerprint", "sketch", value="0c" * 63),
            "sketch is .* 128 hexadecimal",
        ),
        (_set("metadata", "fingerprint", "sketch", value="0C" * 64), "sketch is '0C"),
        (_set("metadata", "fingerprint", "sketch", value="0c" * 192), "of at most 2 layers"),
        (_set("metadata", "fingerprint", "sketch", value=["0c" * 64]), "sketch is .*, expected"),
        (_set("metadata", "fingerprint", "sketch", value=0), "sketch is 0, expected"),
        (_set("metadata", "fingerprint", "attention", value=[]), "attention is .*, not an object"),
        (_set("metadata", "fingerprint", "attention", value=None), "attention is None, not an ob"),
        (_set("metadata", "fingerprint", "attention", value={"x": "\n"}), "attention holds"),
        (_set("metadata", "format_version", value=1), "keys of metadata: 'estimator' is unknown"),
        (_as_format_1, "keys of fingerprint: 'attention' is unkn"),
        (lambda parts: parts.metadata["fingerprint"].pop("sketch"), "'sketch' is missing"),
        (_set("metadata", "fingerprint", "geometry", "layers", value=3), "tensor 'cluster' has sh"),
        (_set("metadata", "fingerprint", "geometry", "layers", value=2**40), "geometry.layers is"),
        (_set("metadata", "fingerprint", "geometry", "heads", value=2**20), "number of all heads"),
        (_set("metadata", "fingerprint", "geometry", "kv_heads", value=3), "do not divide"),
        (_set("metadata", "code_size", value=8), r"'code' has shape \[2, 4, 7\], expected"),
        (_set("metadata", "model", value="\x1b]0;x\x07"), r"control characters: '\\x1b"),
        (_set("metadata", "summary", value={"\n": 1}), "summary holds control characters"),
        (_set("metadata", "summary", value={"a": "\ud800"}), "summary holds control characters"),
        (_set("metadata", "summary", value={"a": float("nan")}), "'NaN', which is not finite"),
        (_set("metadata", "summary", value={"a": 10**400}), "more than 64 bits"),
        (_set("header", "extra", value={}), "tensors: 'extra' is unknown"),
        (lambda parts: parts.header.pop("gamma"), "tensors: 'gamma' is missing"),
        (_set("header", "gamma", "dtype", value="F64"), "'gamma' has dtype 'F64', expected 'F32'"),
        (_set("header", "gamma", "dtype", value="I32"), "'gamma' has dtype 'I32', expected 'F32'"),
        (_set("header", "gamma", "shape", value=[8]), r"'gamma' has shape \[8\], expected \[2, 4"),
        (_set("header", "gamma", "shape", value=[2.0, 4]), r"'gamma' has shape \[2.0, 4\]"),
        (_set("header", "gamma", "strides", value=[1]), "keys of tensor 'gamma': 'strides'"),
        (_set("header", "gamma", "data_offsets", value=[0]), "not two integers"),
        (_set("header", "gamma", "data_offsets", value=[-32, 0]), "'gamma' lies at bytes -32"),
        (_set("header", "gamma", "data_offsets", value=[0, 2**63]), "more than 64 bits"),
    ],
)
def test_forged_headers_are_refused(edit: Any, message: str, tmp_path: Path) -> None:
    path = write_parts(tmp_path / "a.st", edit)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_artifact(path)
    assert str(caught.value).isprintable()


def _swap_places(parts: Any) -> None:
    """Two tensors on one place."""
    parts.header["gamma"]["data_offsets"] = parts.header["recall"]["data_offsets"]


def test_overlapping_and_misaligned_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="lies at bytes"):
        load_artifact(write_parts(tmp_path / "a.st", _swap_places))

    def shift(parts: Any) -> None:
        # A byte tensor in front of all others moves them off their alignment.
        size = LAYERS * HEADS - 1
        parts.metadata["fingerprint"]["geometry"] = {
            "layers": 1, "heads": size, "kv_heads": 1, "head_dim": 16
        }  # fmt: skip
        parts.tensors = bytearray()
        names = ("policy", *sorted(set(parts.header) - {"policy", "code"}), "code")
        for name in names:
            entry = parts.header[name]
            entry["shape"] = [1, size] + ([7] if name == "code" else [])
            count = size * (7 if name == "code" else 1) * (1 if entry["dtype"] == "I8" else 4)
            entry["data_offsets"] = [len(parts.tensors), len(parts.tensors) + count]
            parts.tensors += bytes(count)

    with pytest.raises(ArtifactError, match="not aligned"):
        load_artifact(write_parts(tmp_path / "b.st", shift))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "truncated: 0 bytes where 8"),
        (lambda data: data[:100], "truncated: 100 bytes, the header alone needs"),
        (lambda data: data[:-1], "truncated: .* bytes of tensors"),
        (lambda data: data + b"\0", "trailing bytes"),
        (lambda data: struct.pack("<Q", 2**63) + data[8:], "header claims 9223372036854775808"),
        (lambda data: flip_bit_of_code(data), "does not match its sha256"),
        (lambda data: data.replace(b"0.21", b"0.22"), "does not match its sha256"),
        (lambda data: data.replace(b'"density":{', b'"cluster":{'), "key 'cluster' occurs"),
        (lambda data: data.replace(rb"\"density\":0.21", rb"\"recall\":0.210"), "occurs twice"),
        (lambda data: b"\x80" * len(data), "header claims"),
        (lambda data: data.replace(b"organisation", b"\xc3\xa9ganisation"), "header is not JSON"),
        (lambda data: data.replace(b'"shareprefill"', b'"shareprefil2"'), "metadata is not the on"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(damage: Any, message: str, tmp_path: Path) -> None:
    data = artifact_bytes(example())
    assert damage(data) != data
    (tmp_path / "a.st").write_bytes(damage(data))
    with pytest.raises(ArtifactError, match=message):
        load_artifact(tmp_path / "a.st")


def test_files_written_by_safetensors_itself_are_checked_alike(tmp_path: Path) -> None:
    artifact = example()
    save_artifact(artifact, tmp_path / "a.st")
    with safetensors.safe_open(tmp_path / "a.st", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["pivot"] = tensors["pivot"].long()
    safetensors.torch.save_file(tensors, tmp_path / "b.st", metadata)
    with pytest.raises(ArtifactError, match="'pivot' has dtype 'I64', expected 'I32'"):
        load_artifact(tmp_path / "b.st")


def test_links_are_followed_and_other_files_refused(tmp_path: Path) -> None:
    save_artifact(example(), tmp_path / "a.st")
    (tmp_path / "link.st").symlink_to(tmp_path / "a.st")
    assert load_artifact(tmp_path / "link.st").model == "organisation/model"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, message in (
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        (tmp_path / "loop", "cannot be opened"),
        (tmp_path / "none.st", "none.st does not exist.*sp calibrate and sp cluster"),
        ("a\0b", "null character"),
        ("x" * 5000, "cannot be opened"),
    ):
        with pytest.raises(ArtifactError, match=message):
            load_artifact(path)


def test_failed_save_leaves_the_earlier_artifact(tmp_path: Path) -> None:
    path = tmp_path / "a.st"
    save_artifact(example(), path)
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match="cannot be saved: code holds"):
        save_artifact(with_head("code", 0, 0, float("nan")), path)
    assert path.read_bytes() == before
    with pytest.raises(DataError, match="does not exist"):
        save_artifact(example(), tmp_path / "none" / "a.st")


def test_check_fingerprint_names_both_models() -> None:
    artifact = example()
    made_for = artifact.fingerprint
    check_fingerprint(artifact, replace(made_for))
    other = replace(made_for, geometry=ModelGeometry(32, 24, 8, 128))
    both = "2 layers, 4 heads, 2 KV heads, head_dim 16; .* 32 layers, 24 heads, 8 KV heads"
    with pytest.raises(ArtifactError, match=both):
        check_fingerprint(artifact, other)
    with pytest.raises(ArtifactError, match=r"llama of .*qwen3 of"):
        check_fingerprint(artifact, replace(made_for, model_type="qwen3"))
    with pytest.raises(ArtifactError, match=r"weights differ .hash 0a0a0a0a0a0a, .*ffff"):
        check_fingerprint(artifact, replace(made_for, weights="ff" * 32))


def test_other_positions_and_windows_are_refused() -> None:
    artifact = example()
    made_for = artifact.fingerprint
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    changed = {**ATTENTION, "rope_parameters": rope, "layer_types": ["full_attention"] * 2}
    del changed["sliding_window"]
    message = (
        "with other positions .RoPE., windows or logits than this model's "
        r".layer_types.1 'sliding_attention' there, 'full_attention' now; "
        r"rope_parameters.factor none there, 4.0 now; "
        r"rope_parameters.rope_type 'default' there, 'yarn' now; "
        r"sliding_window 512 there, none now.: load the model as it was calibrated, or make"
    )
    with pytest.raises(ArtifactError, match=message):
        check_fingerprint(artifact, replace(made_for, attention=changed))
    near = {**ATTENTION, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.000977}}
    assert check_fingerprint(artifact, replace(made_for, attention=near)) == 0
    many = {**ATTENTION, "layer_types": ["x"] * 20}
    with pytest.raises(ArtifactError, match="layer_types.13 none there, 'x' now; and 14 more"):
        check_fingerprint(artifact, replace(made_for, attention=many))


def test_files_of_before_say_nothing_of_positions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    artifact = example(fingerprint=replace(example().fingerprint, attention=None))
    save_artifact(artifact, tmp_path / "a.st")
    assert b"attention" not in (tmp_path / "a.st").read_bytes()
    loaded = load_artifact(tmp_path / "a.st")
    assert loaded.fingerprint.attention is None
    for _ in range(2):
        assert check_fingerprint(loaded, example().fingerprint) == 0
    (record,) = caplog.records
    assert "which positions (RoPE) and windows it was made for" in record.message
    assert "was not compared" in record.message


def sketched(numbers: torch.Tensor) -> str:
    return bytes(numbers.to(torch.int8).view(torch.uint8).tolist()).hex()


def test_near_weights_are_accepted_with_their_distance(caplog: Any) -> None:
    numbers = torch.randint(-60, 60, (2, 64))
    numbers[0, 0] = 0
    own = replace(example().fingerprint, sketch=sketched(numbers.flatten()))
    artifact = example(fingerprint=own)
    numbers[0, 0] = 58  # 58 of the 200 that a norm of 1 has
    near = replace(own, weights="ee" * 32, sketch=sketched(numbers.flatten()))
    for _ in range(2):
        assert check_fingerprint(artifact, near) == pytest.approx(0.29)
    assert [record.message for record in caplog.records] == [
        record.message for record in caplog.records if "relative distance 0.290" in record.message
    ]
    assert len(caplog.records) == 1
    assert check_fingerprint(artifact, own) == 0
    numbers[0, 0] = 62
    far = replace(near, sketch=sketched(numbers.flatten()))
    with pytest.raises(ArtifactError, match=r"differ .*relative distance 0\.31 in layer 0"):
        check_fingerprint(artifact, far)
    for without in ("", sketched(numbers[0])):
        with pytest.raises(ArtifactError, match="differ .*no distance is known"):
            check_fingerprint(artifact, replace(near, sketch=without))
    with pytest.raises(ArtifactError, match="made for organisation/model: llama"):
        check_fingerprint(artifact, replace(near, model_type="qwen3"))


def test_optional_entries_may_be_missing(monkeypatch: Any, tmp_path: Path) -> None:
    without: dict[str, Any] = {"slack": None, "summary": None}
    with pytest.raises(ArtifactError, match="summary is None, not an object"):
        save_artifact(example(**without), tmp_path / "a.st")
    monkeypatch.setitem(artifact_module._OBJECTS, "summary", True)
    with pytest.raises(ArtifactError, match="slack is a NoneType"):
        save_artifact(example(**without), tmp_path / "a.st")
    kind = artifact_module._TENSORS["slack"]
    monkeypatch.setitem(artifact_module._TENSORS, "slack", kind._replace(optional=True))
    save_artifact(example(**without), tmp_path / "a.st")
    loaded = load_artifact(tmp_path / "a.st")
    assert loaded.slack is None
    assert loaded.summary is None
    save_artifact(example(), tmp_path / "b.st")
    assert load_artifact(tmp_path / "b.st").summary == example().summary
    with pytest.raises(ArtifactError, match="slack holds 2 to"):
        artifact_bytes(example(slack=torch.full((LAYERS, HEADS), 2.0)))


def test_policy_labels() -> None:
    assert [policy.label for policy in Policy] == [
        "dense",
        "pivot",
        "share",
        "sampled",
        "vertical-slash",
        "smoothed",
    ]
    assert [int(policy) for policy in Policy] == [0, 1, 2, 3, 4, 5]


def test_tensors_that_share_memory_are_saved() -> None:
    artifact = example()
    both = torch.stack((artifact.recall, artifact.density))
    views = replace(artifact, recall=both[0], density=both[1], fallback_gamma=artifact.gamma)
    apart = replace(artifact, fallback_gamma=artifact.gamma.clone())
    assert artifact_bytes(views) == artifact_bytes(apart)
    turned = replace(artifact, slack=artifact.slack.t().contiguous().t())
    assert not turned.slack.is_contiguous()
    assert artifact_bytes(turned) == artifact_bytes(artifact)


def test_a_path_in_a_file_is_not_loaded_by_itself() -> None:
    assert model_to_load(example(model="sp-tiny"), None) == "sp-tiny"
    assert model_to_load(example(), "mine") == "mine"
    for name in ("folder", ".", "sp-tiny/", "a/b/c", "../model", "/models/m", "~/model", "a/.."):
        with pytest.raises(ArtifactError, match="is not loaded by itself: say --model"):
            model_to_load(example(model=name), None)
        assert model_to_load(example(model=name), None, {name}) == name


def test_a_hub_id_in_a_file_is_loaded_but_runs_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    named = example(model="organisation/model-1.5")
    assert model_to_load(named, None) == "organisation/model-1.5"
    with pytest.raises(ArtifactError, match="is not run: say --model organisation/model-1.5"):
        model_to_load(named, None, trust_remote_code=True)
    assert model_to_load(named, "mine", trust_remote_code=True) == "mine"
    (tmp_path / "organisation" / "model-1.5").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="is not loaded by itself"):
        model_to_load(named, None)
