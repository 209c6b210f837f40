"""benchmarks/bench_ttft.py."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def model_of(layers: int) -> Any:
    """Heads as in the benchmark, and nothing else of size."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=64,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@torch.inference_mode()
def test_times_a_model_and_scales_what_few_layers_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench_ttft
    import layer_cases
    from timing import Timing

    def tuned(self: Any, density: float, recall: float, policies: tuple[Any, ...]) -> Any:
        self.place(1)
        gammas = dict.fromkeys(layer_cases.gammas_of(policies), recall)
        return layer_cases.Tuning(1, gammas, density)

    monkeypatch.setattr(layer_cases.Structured, "tune", tuned)
    monkeypatch.setattr(bench_ttft, "LONGEST_RECALL", 300)
    choices = ["--tokens", "384", "256", "--layers", "2", "1", "--repeats", "1", "--plan", "shared"]
    model = model_of(2)
    seen = []
    inner = bench_ttft.Lengths._seconds

    def one_second_a_layer(self: Any, prompt: torch.Tensor) -> float:
        inner(self, prompt)
        seen.append((model.config._attn_implementation, len(prompt)))
        return 0.5 + len(model.model.layers)

    monkeypatch.setattr(bench_ttft.Lengths, "_seconds", one_second_a_layer)
    monkeypatch.setattr(bench_ttft, "measure", lambda call, _device: call() and Timing(0.0, 500.0))
    rows = bench_ttft.run(model, bench_ttft.parse(choices))
    for row in rows:
        assert set(row.missing) == {"FlashAttention-4", "session in FP8"}
        assert "Hopper" in row.missing["session in FP8"]
        assert row.seconds == {"SDPA": [2.5], "session": [2.5], "no attention": [2.5]}
        # Half a second a layer.
        assert row.attention == 1.0
        assert 0.0 < row.density <= 1.0
    assert rows[0].recall is None
    assert rows[1].recall > 0.5
    assert [row.layers for row in rows] == [2, 1]
    assert {("sdpa", 384), ("none", 384)} <= set(seen)
    assert any(name not in ("sdpa", "none") for name, _ in seen)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(
        "| 256 | 1 | 2.500 | missing | 2.500 | missing | 1.00 | – | – | 2.500 | 1.000 | 0.714 |"
    )


@torch.inference_mode()
def test_flash_attention_4_is_called_as_sdpa_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_ttft

    calls = []

    def stand_in(*tensors: torch.Tensor, softmax_scale: float, causal: bool) -> tuple[Any, None]:
        calls.append(tensors[0].shape)
        assert causal
        query, key, value = (tensor.transpose(1, 2) for tensor in tensors)
        out = scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True, scale=softmax_scale
        )
        return out.transpose(1, 2), None

    module = SimpleNamespace(flash_attn_func=stand_in)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    model, ids = model_of(2), torch.arange(50)[None]
    wanted = model(ids).logits
    bench_ttft.Lengths(model, bench_ttft.parse([]))
    model.set_attn_implementation("fa4")
    torch.testing.assert_close(model(ids).logits, wanted)
    assert calls == [(1, 50, 32, 128)] * 2


def test_layers_stand_for_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    import bench_ttft

    for layers, reason in (("1", "for each of --tokens"), ("1 2", "must not rise")):
        with pytest.raises(SystemExit):
            bench_ttft.parse(["--tokens", "512", "640", "--layers", *layers.split()])
        assert reason in capsys.readouterr().err
