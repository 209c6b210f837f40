from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from shareprefill import doctor
from shareprefill.artifact import save_artifact
from shareprefill.bench import measure, tuning
from shareprefill.bench.shapes import build_shape
from shareprefill.bench.timings import Timing, crossover_of
from shareprefill.commands.tune import tune_command
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ConfigError, DataError, UnsupportedError
from shareprefill.models import geometry
from shareprefill.runtime import crossover as crossovers
from shareprefill.runtime.crossover import crossover
from shareprefill.runtime.session import share_prefill
from tests.support.checkpoint import save_checkpoint
from tests.support.tiny import tiny_artifact, tiny_llama, token_ids

CPU = torch.device("cpu")
app = typer.Typer(pretty_exceptions_enable=False)
app.command()(tune_command)


def sp_tune(*options: object) -> Result:
    return CliRunner().invoke(app, list(map(str, options)))


@pytest.fixture(autouse=True)
def of_this_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """No other table, and no vLLM."""
    monkeypatch.delenv("SHAREPREFILL_CROSSOVERS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    crossover.cache_clear()
    yield
    crossover.cache_clear()


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, str], float]:
    """Prefills take what a test says, by tokens and attention."""
    found: dict[tuple[int, str], float] = {}

    def timed(bench: Any, prompt: torch.Tensor, attention: str, chunk: int) -> float:
        run(bench, prompt[:300], attention, chunk)
        return found.get((len(prompt), attention), 0.0)

    run = measure._Bench._prefill
    monkeypatch.setattr(measure._Bench, "_prefill", timed)
    return found


SMALL = ("--engine", "session", "--shape", "tiny", "--layers", 2, "--device", "cpu")


def test_the_crossover_is_where_sharing_stays_faster():
    def timings(**speedups: float) -> list[Timing]:
        return [Timing(int(n[1:]), (3 * s, s, s), (1.0,), 0.5) for n, s in speedups.items()]

    assert crossover_of(timings(n1=1.2, n2=0.9, n3=1.1, n4=1.3)) == 3
    assert crossover_of(timings(n4=1.3, n1=1.2, n2=1.1)) == 1
    assert crossover_of(timings(n1=1.2, n2=1.0)) is None
    assert timings(n1=1.0)[0].spread == 2


def test_what_was_measured_holds_for_sessions(
    seconds: dict[tuple[int, str], float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seconds |= {(400, "dense"): 1.0, (400, "share"): 1.5, (600, "dense"): 2.0, (600, "share"): 1.6}
    known = crossover(CPU)
    result = sp_tune(*SMALL, "--lengths", "400,600")
    assert result.exit_code == 0, result.output
    table = tmp_path / "caches" / "shareprefill" / "crossovers.json"
    assert str(table) in result.output
    found = crossover(CPU)
    assert (found.tokens, found.density) == (600, known.density)
    assert "tiny, 2 layers" in found.source
    # Another backend has an entry of its own.
    assert crossover(CPU, "CPU_ATTN") == known
    crossovers.save_crossover(table, CPU, "CPU_ATTN", 700, "by hand", [])
    assert [crossover(CPU).tokens, crossover(CPU, "CPU_ATTN").tokens] == [600, 700]
    monkeypatch.setattr(doctor, "_compare", lambda *_: doctor.Check("", doctor.WORKS, ""))
    checks = {check.name: check for check in doctor._implementations()}
    vllm_s = checks["crossover: CPU_ATTN"]
    assert (vllm_s.state, vllm_s.detail.endswith("by hand")) == ("700 tokens", True)
    (kinds,) = json.loads(table.read_text())["devices"].values()
    rows = kinds["SDPA"]["rows"]
    assert [row["speedup"] for row in rows] == [1 / 1.5, 2.0 / 1.6]
    sizes = geometry(build_shape("tiny", layers=2, tokens=600, device=CPU, dtype=torch.float32))
    assert kinds["SDPA"]["width"] == sizes.heads * sizes.head_dim
    assert "width" not in kinds["CPU_ATTN"]
    model = tiny_llama()
    artifact = tiny_artifact(model)
    for tokens, prefills in ((600, 1), (599, 0)):
        with torch.no_grad(), share_prefill(model, artifact, RuntimeConfig()) as session:
            model(token_ids(1, tokens))
        assert session.report().prefills == prefills


def test_a_model_with_its_artifact_and_a_named_table(
    seconds: dict[tuple[int, str], float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = save_checkpoint(tmp_path / "model")
    network = measure.load_model(str(model))
    save_artifact(tiny_artifact(network), tmp_path / "clusters.st")
    tokens: list[int] = []
    monkeypatch.setattr(
        measure, "encode_prompt", lambda *_: tokens.append(1) or torch.arange(3, 700)
    )
    seconds |= {(697, "dense"): 2.0, (697, "share"): 1.0}
    table = tmp_path / "table.json"
    named = ("--model", model, "--artifact", tmp_path / "clusters.st", "--table", table)
    result = sp_tune("--engine", "session", *named, "--lengths", 900, "--repeats", 2, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["tokens"], answer["backend"], answer["table"]) == (697, "SDPA", str(table))
    assert [len(row["dense_s"]) for row in answer["timings"]] == [2]
    assert crossover(CPU).tokens != 697
    monkeypatch.setenv("SHAREPREFILL_CROSSOVERS", str(table))
    crossover.cache_clear()
    assert crossover(CPU).tokens == 697


def test_where_nothing_is_faster_nothing_is_written(
    seconds: dict[tuple[int, str], float], tmp_path: Path
):
    seconds |= {(400, "dense"): 1.0, (400, "share"): 1.0}
    result = sp_tune(*SMALL, "--lengths", 400)
    assert result.exit_code == 1
    assert "not faster" in result.output
    assert not (tmp_path / "caches").exists()


def test_an_earlier_entry_is_named_where_nothing_is_faster_now(
    seconds: dict[tuple[int, str], float], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    table = tmp_path / "table.json"
    crossovers.save_crossover(table, CPU, "SDPA", 300, "an earlier run", [])
    before = table.read_bytes()
    seconds |= {(400, "dense"): 1.0, (400, "share"): 1.0}
    assert sp_tune(*SMALL, "--lengths", 400, "--table", table).exit_code == 1
    assert "table.json still says 300 tokens" in caplog.text
    assert table.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("damaged.json", "no table of crossovers"),
        (".", "it is a folder"),
        ("damaged.json/table.json", "is a file, not a folder"),
    ],
)
def test_a_table_that_cannot_be_written_is_told_before_anything_is_timed(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "damaged.json").write_text("{}")
    monkeypatch.setattr(tuning, "run_bench", lambda *_, **__: pytest.fail("it was timed"))
    with pytest.raises(DataError, match=message):
        raise sp_tune(*SMALL, "--lengths", 400, "--table", tmp_path / name).exception or SystemExit
    assert (tmp_path / "damaged.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--engine", "tgi"), ConfigError, "engine = 'tgi'.*session, vllm"),
        (("--model", "m"), ConfigError, "go together"),
        (("--model", "m", "--artifact", "a", "--layers", 2), ConfigError, "has its own"),
        (("--model", "m", "--artifact", "a", "--density", 0.3), ConfigError, "has its own"),
        (("--repeats", 0), ConfigError, "repeats = 0"),
        (("--engine", "vllm"), UnsupportedError, "vLLM is not installed.*--engine session"),
    ],
)
def test_wrong_options(options: tuple, error: type, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(error, match=message):
        raise sp_tune(*options).exception or AssertionError
