"""benchmarks/measure_layers.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shareprefill.runtime.crossover import LayerSizes, LayerTimes
from shareprefill.runtime.layers import layer_sizes

ROOT = Path(__file__).parents[2]
TIMES = LayerTimes(host=0.0, parameter=2e-15, channel=1e-10, pair=7e-15)


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def row(heads: int, hidden: int, parameters: int, tokens: int, slower: float = 1.0) -> Any:
    from measure_layers import DeviceRow

    seconds = TIMES.dense(LayerSizes(heads, 64, parameters, hidden), tokens, tokens)
    return DeviceRow("s", tokens, parameters, hidden, heads * 64, slower * seconds * 1e3)


def test_rates_are_those_that_sessions_go_by() -> None:
    from measure_layers import fit

    sizes = [(9, 576, 3 * 10**6), (32, 2048, 6 * 10**7)]
    rows = [row(*of, tokens) for of in sizes for tokens in (4096, 16384, 32768)]
    rates, errors = fit(rows)
    assert rates == pytest.approx([TIMES.parameter, TIMES.channel, TIMES.pair], rel=1e-6)
    assert errors == pytest.approx([0] * 6, abs=1e-6)
    rates, errors = fit([*rows[:-1], row(*sizes[1], 32768, slower=1.1)])
    # As much as it was measured slower, it is predicted faster, less what the fit takes of it.
    assert -0.1 < errors[-1] < -0.02
    assert rates[2] > TIMES.pair


@pytest.mark.slow
def test_passes_have_lengths_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import measure_layers

    taken: list[tuple[int, int]] = []
    run = measure_layers.Model.run

    def watch(model: Any, tokens: int) -> None:
        taken.append((tokens, model.model.config.num_hidden_layers))
        run(model, tokens)

    monkeypatch.setattr(measure_layers.Model, "run", watch)
    options = ("--device", "cpu", "--shapes", "tiny", "--tokens", "130", "200", "260")
    end = ("--host-tokens", "400", "--end-tokens", "--repeats", "2", "--commit", "c")
    monkeypatch.setattr(sys, "argv", ["", *options, *end, "--json", str(tmp_path / "l.json")])
    measure_layers.main()
    passes = [tokens for tokens, _ in taken[-18:]]
    # Three of each length: two turns of three kinds.
    assert len(set(passes)) == 6
    assert passes == [tokens for tokens in passes[::3] for _ in range(3)]
    assert {layers for _, layers in taken} == {1, 2}
    numbers = json.loads((tmp_path / "l.json").read_text())
    assert set(numbers["tiny"]["400"]) == {measure_layers.OWN, "session, dense", "session, sparse"}
    assert "token and parameter" in capsys.readouterr().out
    meta = torch.device("meta")
    tiny = measure_layers.build_shape(
        "tiny", layers=2, tokens=64, device=meta, dtype=torch.bfloat16
    )
    assert numbers["rows"][0]["parameters"] == layer_sizes(tiny).parameters
