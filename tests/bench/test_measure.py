from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shareprefill.artifact import Policy, load_artifact, save_artifact
from shareprefill.bench import measure, shapes
from shareprefill.bench.config import BenchConfig
from shareprefill.bench.measure import run_bench
from shareprefill.bench.shapes import SHAPES, build_shape
from shareprefill.bench.synthetic import synthetic_artifact
from shareprefill.commands.bench import show_bench
from shareprefill.commands.options import parse_lengths
from shareprefill.errors import ArtifactError, ConfigError, UnsupportedError
from tests.support.checkpoint import save_checkpoint
from tests.support.tiny import tiny_artifact, tiny_llama

CPU = torch.device("cpu")


def tiny(**options: Any) -> BenchConfig:
    return BenchConfig(**{"lengths": (3000, 2500), "shape": "tiny", "device": "cpu", **options})


def test_rows_are_dense_and_shared_at_every_length() -> None:
    told: list[Any] = []
    result = run_bench(tiny(chunk=0, density=0.05), progress=told.append)
    assert [(row.tokens, row.attention) for row in result.rows] == [
        (3000, "dense"), (3000, "share"), (2500, "dense"), (2500, "share"),
    ]  # fmt: skip
    assert list(result.rows) == told
    for row in result.rows:
        assert row.ttft_s > 0
        assert (row.density < 1) == (row.attention == "share")
        assert (row.selection_work > 0) == (row.attention == "share")
        assert row.peak_gib is None
    dense, share = result.rows[:2]
    assert result.speedup(3000) == dense.ttft_s / share.ttft_s
    assert (result.model, result.device, result.dtype) == ("tiny, 2 layers", "CPU", "float32")


def test_less_density_is_asked_for_and_computed() -> None:
    densities = [
        run_bench(tiny(lengths=(4000,), dense=False, density=d)).rows[0].density
        for d in (0.05, 0.2)
    ]
    assert 0.05 < densities[0] < densities[1] < 1


def test_fewer_layers_and_chunks_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_bench(tiny(layers=1, chunk=512))
    assert [row.chunk for row in result.rows] == [512] * 4
    show_bench(result)
    text = capsys.readouterr().out
    assert "1 of 2 layers" in text
    assert "in chunks" in text
    assert "random weights" in text
    rows = re.findall(r"(?m)^ *\d+ +(dense|share)\b", text)
    assert sorted(rows) == ["dense", "dense", "share", "share"]
    assert result.to_dict()["rows"][1]["speedup"] == result.speedup(3000)


@pytest.mark.parametrize("chunk", [0, 512])
def test_what_is_timed_was_warmed_up(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Also the way that chunks take: their first dense call imports torch's compiler."""
    taken: list[tuple[str, bool]] = []
    run = measure._Bench._prefill

    def watch(bench: Any, prompt: torch.Tensor, attention: str, size: int) -> float:
        taken.append((attention, 0 < size < len(prompt)))
        return run(bench, prompt, attention, size)

    monkeypatch.setattr(measure._Bench, "_prefill", watch)
    monkeypatch.setattr(measure, "_SHORT", 600)
    run_bench(tiny(lengths=(1000,), chunk=chunk))
    *warm, dense, share = taken
    assert {dense, share} <= set(warm[:-4])
    taken.clear()
    run_bench(tiny(lengths=(1000,), chunk=chunk, dense=False))
    assert {attention for attention, _ in taken} == {"share"}


def test_dense_and_shared_take_turns_and_the_median_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[str] = []
    clock = iter([5.0, 40.0, 9.0, 20.0, 1.0, 30.0])

    def timed(_bench: Any, prompt: torch.Tensor, attention: str, _chunk: int) -> float:
        if len(prompt) <= 600:
            return 0.0  # It warms up.
        taken.append(attention)
        return next(clock)

    monkeypatch.setattr(measure._Bench, "_prefill", timed)
    monkeypatch.setattr(measure, "_SHORT", 600)
    result = run_bench(tiny(lengths=(1000,)))
    assert taken == ["dense", "share"] * 3
    assert [row.ttft_s for row in result.rows] == [5.0, 30.0]
    assert any("medians of 3 prefills" in note for note in result.notes)


def test_an_artifact_without_its_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="timed with its model"):
        run_bench(tiny(), tiny_artifact(tiny_llama()))


def test_a_model_with_its_artifact(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    network = tiny_llama(vocab_size=tiny_vocabulary(model))
    artifact = tmp_path / "clusters.st"
    save_artifact(tiny_artifact(network), artifact)
    config = BenchConfig(lengths=(900,), model=str(model), device="cpu")
    result = run_bench(config, load_artifact(artifact))
    assert 500 < result.rows[1].tokens <= 900
    assert any("retr_kv" in note for note in result.notes)
    save_artifact(tiny_artifact(tiny_llama(seed=4)), artifact)
    with pytest.raises(ArtifactError, match="weights differ"):
        run_bench(config, load_artifact(artifact))
    with pytest.raises(ConfigError, match="needs its artifact"):
        run_bench(config)


def tiny_vocabulary(folder: Path) -> int:
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_their_synthetic_artifacts(shape: str) -> None:
    meta = torch.device("meta")
    model: Any = build_shape(shape, layers=1, tokens=64, device=meta, dtype=torch.bfloat16)
    sizes = SHAPES[shape]
    assert model.model.layers[0].mlp.gate_proj.out_features == sizes["intermediate_size"]
    artifact = synthetic_artifact(model, 0.2)
    heads = sizes["num_attention_heads"]
    assert artifact.policy.shape == (1, heads)
    taken = artifact.policy_counts()
    assert abs(taken["share"] - heads * 10 / 16) < 1
    pivots = artifact.pivot[artifact.policy == int(Policy.SHARE)]
    assert artifact.policy.flatten()[pivots.long()].eq(int(Policy.PIVOT)).all()


def test_lengths_as_written() -> None:
    assert parse_lengths("8K,131072, 1m") == (8192, 131072, 1048576)
    for text in ("", "8G", "0", "8K;4K", "-1"):
        with pytest.raises(ConfigError, match="lengths"):
            parse_lengths(text)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lengths": ()}, "lengths"),
        ({"density": 0.0}, "density = 0.0"),
        ({"chunk": -1}, "chunk = -1"),
        ({"dtype": "int8"}, "dtype = 'int8'"),
        ({"layers": 3}, "layers = 3 .* tiny has 1 to 2"),
        ({"shape": "huge"}, "no shape 'huge'"),
        ({"model": "sp-tiny", "layers": 2}, "layers is for a shape"),
        ({"model": "sp-tiny"}, "shape is for a shape"),
        ({"model": "sp-tiny", "shape": BenchConfig.shape, "density": 0.2}, "density is for a shap"),
    ],
)
def test_what_cannot_be_timed_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        run_bench(tiny(**options))


@pytest.mark.parametrize(
    ("free", "text"),
    [
        (10**6, r"2 layers of tiny take 0\.00164 GB .* 0\.001 GB are free: name another --shape"),
        (1_500_000, r"2 layers of tiny .* are free: ask for --layers 1, or name another --shape"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_before_it_is_made(
    free: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that runs out of memory ends the process without a word."""
    monkeypatch.setattr(shapes, "_free_bytes", lambda _: free)
    with pytest.raises(ConfigError, match=text):
        build_shape("tiny", layers=2, tokens=64, device=CPU, dtype=torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells")
def test_memory_that_is_free_is_known_here() -> None:
    free = shapes._free_bytes(CPU)
    assert free is not None
    assert 10**6 < free < 10**15


def test_fp8_is_refused_before_a_model_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "build_shape", lambda *_, **__: pytest.fail("it was made"))
    with pytest.raises(UnsupportedError, match="needs a Hopper GPU .*; use precision='model'"):
        run_bench(tiny(precision="fp8", device="cpu"))
