from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from matplotlib.figure import Figure
from typer.testing import CliRunner, Result

from shareprefill.bench import serving
from shareprefill.commands.bench_serve import bench_serve_command
from shareprefill.errors import ConfigError, DataError, UnsupportedError
from shareprefill.report.drawing import figure_file, figure_style
from shareprefill.report.marks import LOAD, mark_of

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(bench_serve_command)
SMALL = ("--model", "m", "--lengths", "1K,2K", "--rate", 0.5, "--rate", 2, "--prompts", 3)


def bench_serve(*options: object) -> Result:
    return CliRunner().invoke(app, list(map(str, options)))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What vLLM's benchmark was asked for; it answers as vLLM 0.32 does."""
    found: list[dict[str, str]] = []

    def run(arguments: list[str]) -> None:
        options = dict(zip(arguments[3::2], arguments[4::2], strict=True))
        found.append(options)
        slower = 2 if "vllm_xargs" in options["--extra-body"] else 1
        result: dict[str, Any] = {"completed": int(options["--num-prompts"])}
        result |= {"median_ttft_ms": 1000 * slower, "p99_ttft_ms": 3000, "median_itl_ms": 20}
        result |= {"p99_itl_ms": 50, "request_throughput": 1.5, "output_throughput": 96 / slower}
        Path(options["--result-dir"], options["--result-filename"]).write_text(json.dumps(result))

    monkeypatch.setattr(serving, "_vllm", lambda: run)
    monkeypatch.setattr(serving, "_metrics", lambda url: "")
    return found


def counters(monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, str]], sparse: int) -> None:
    """A server that shows counters from its first request on, so many sparse rows a load."""

    def metrics(url: str) -> str:
        shared = sum("vllm_xargs" not in call["--extra-body"] for call in calls)
        rows = f'{{kind="sparse",name="auto"}} {float(shared * sparse)}\n'
        dense = '{kind="dense",name="request"} 3.0\n'
        text = f"shareprefill_rows_total{dense}"
        return (
            text + f"shareprefill_rows_total{rows}" * bool(shared) if calls else "vllm:other 1.0\n"
        )

    monkeypatch.setattr(serving, "_metrics", metrics)


def test_a_load_tells_how_many_rows_were_sparse(
    calls: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = bench_serve(*SMALL)
    assert "whether shared prompts were sparse is not known" in unknown.stderr
    calls.clear()
    counters(monkeypatch, calls, 5)
    known = bench_serve(*SMALL, "--json")
    assert "not known" not in known.stderr
    assert [row["sparse_rows"] for row in json.loads(known.stdout)] == [0, 5] * 4


def test_a_load_of_which_nothing_was_sparse_is_no_result(
    calls: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    counters(monkeypatch, calls, 0)
    with pytest.raises(DataError, match="computed no prompt of 1024 tokens sparsely"):
        raise bench_serve(*SMALL).exception or AssertionError


def test_every_load_is_sent_dense_and_shared(calls: list[dict[str, str]], tmp_path: Path) -> None:
    picture = tmp_path / "load.svg"
    served = ("--url", "http://there:1", "--served-name", "n")
    result = bench_serve(*SMALL, *served, "--plot", picture)
    assert result.exit_code == 0, result.output
    loads = [(call["--random-input-len"], call["--request-rate"]) for call in calls]
    assert loads == [(n, r) for n in ("1024", "2048") for r in ("0.5", "2.0") for _ in (0, 1)]
    bodies = [json.loads(call["--extra-body"]) for call in calls]
    # Nothing is found in the prefix cache, not by a second call either.
    salts = [body.pop("cache_salt") for body in bodies]
    assert len(set(salts)) == len(calls)
    assert bodies == [{"vllm_xargs": {"shareprefill": "off"}}, {}] * 4
    for dense, shared in zip(calls[::2], calls[1::2], strict=True):
        # The same prompts at the same times.
        assert dense["--seed"] == shared["--seed"]
        assert shared["--served-model-name"] == "n"
        assert (shared["--model"], shared["--base-url"]) == ("m", "http://there:1")
    assert len({call["--seed"] for call in calls}) == 4
    rows = [line.split() for line in result.stdout.splitlines() if "dense" in line]
    assert [row[3] for row in rows] == ["2.000"] * 4
    assert "<svg" in picture.read_text()
    for label in ("1024 tokens, dense", "2048 tokens, shared", "requests a second"):
        assert label in picture.read_text()
    values = json.loads(bench_serve(*SMALL, "--json").stdout)
    assert json.loads(calls[8]["--extra-body"])["cache_salt"] not in salts
    assert [v["first_token_ms"] for v in values] == [2000, 1000] * 4


@pytest.mark.parametrize("end", [KeyboardInterrupt(), DataError("a load failed")])
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_loads_that_ended_are_told_where_a_later_one_does_not(
    calls: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    end: BaseException,
    form: tuple[str, ...],
) -> None:
    run = serving._vllm()

    def ends(arguments: list[str]) -> None:
        if len(calls) == 3:
            raise end
        run(arguments)

    monkeypatch.setattr(serving, "_vllm", lambda: ends)
    result = bench_serve(*SMALL, *form)
    assert result.exit_code != 0
    assert sum(word in result.stdout for word in ("dense", "shared")) == 2
    if form:
        assert len(json.loads(result.stdout[: result.stdout.rindex("]") + 1])) == 3
    else:
        assert len([line for line in result.stdout.splitlines() if line.startswith("1024")]) == 3


def test_what_fails_is_said(
    calls: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(match: str, kind: type, *options: object) -> None:
        with pytest.raises(kind, match=match):
            raise bench_serve(*options).exception or AssertionError

    fails("rates = .* at least one number above 0", ConfigError, "--model", "m", "--rate", 0)
    fails("url = 'there'", ConfigError, "--model", "m", "--url", "there")
    (tmp_path / "notes.svg").write_text("text")
    fails("of another kind", DataError, *SMALL, "--plot", tmp_path / "notes.svg")
    with figure_style():
        drawn = figure_file(Figure(figsize=(1, 1)), "svg", mark_of(LOAD, "other"))
    (tmp_path / "load.svg").write_bytes(drawn)
    fails("another one: load of other", DataError, *SMALL, "--plot", tmp_path / "load.svg")
    assert not calls
    read = json.loads
    monkeypatch.setattr(serving.json, "loads", lambda text: read(text) | {"completed": 1})
    fails(r"2 of 3 requests of 1024 tokens failed \(dense\)", DataError, *SMALL)
    monkeypatch.undo()
    monkeypatch.setattr(serving, "_vllm", lambda: None)
    nobody = "http://127.0.0.1:9"
    fails(f"no server answers at {nobody}", DataError, *SMALL, "--url", nobody)
    monkeypatch.undo()
    monkeypatch.setattr(serving, "_metrics", lambda url: "")
    is_there: list[object] = [None, True]
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda _: is_there.pop(0))
    fails("not installed here", UnsupportedError, *SMALL)
    program = tmp_path / "python"
    monkeypatch.setattr(serving.sys, "executable", str(program))
    program.write_text("#!/bin/sh\necho no such host\nexit 3\n")
    program.chmod(0o755)
    fails("vllm bench serve failed: no such host: is a server there", DataError, *SMALL)
