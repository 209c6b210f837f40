from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from shareprefill.artifact import load_artifact
from shareprefill.bench.engine import time_prefills


@pytest.fixture
def vllm_turns(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import vllm_turns

    return vllm_turns


def test_engines_are_named_by_kind_and_size(vllm_turns: Any) -> None:
    names = ("shared", "plain", "shared:2", "shared:pp2", "shared:2@128", "shared@16/.05")
    engines = [vllm_turns.Engine.read(name) for name in names]
    assert [engine[:3] for engine in engines] == [
        *(("shared", 1, 1), ("plain", 1, 1), ("shared", 2, 1), ("shared", 1, 2), ("shared", 2, 1)),
        ("shared", 1, 1),
    ]
    assert [engine.page for engine in engines] == [0, 0, 0, 0, 128, 16]
    assert [engine.density for engine in engines] == [0, 0, 0, 0, 0, 0.05]
    assert [engine.name for engine in engines] == [
        *("shared:1", "plain:1", "shared:2", "shared:pp2", "shared:2@128", "shared:1@16/0.05")
    ]
    for text in ("dense", "shared:", "shared@", "shared:2:2", "shared/", "shared/.1.2"):
        with pytest.raises(SystemExit, match=f"'{text}' is none of shared"):
            vllm_turns.Engine.read(text)


def test_engines_have_synthetic_plans_of_their_own_density(
    vllm_turns: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gammas: dict[str, float] = {}

    def measured(args: Namespace, ends: dict[Any, Any]) -> None:
        assert [engine.name for engine in ends] == ["shared:1", "shared:1/0.05"]
        for engine in ends:
            vllm_turns.started(engine, args)

    def start(model: str, artifact: str, **arguments: Any) -> None:
        assert Path(model, "clusters.st") == Path(artifact)
        options = arguments["additional_config"]["shareprefill"]
        assert options == {"artifact": artifact, "min_tokens": 8192, "checkpoint": "unchecked"}
        gammas[Path(model).name] = load_artifact(artifact).thresholds.gamma

    monkeypatch.setattr(vllm_turns, "running", lambda engine, args: nullcontext())
    monkeypatch.setattr(vllm_turns, "measured", measured)
    monkeypatch.setattr(vllm_turns, "start_engine", start)
    options = ["--density", ".2", "--engines", "shared,shared/.05", "--lengths", "16384"]
    monkeypatch.setattr("sys.argv", ["vllm_turns", *options, "--shape", "tiny"])
    vllm_turns.main()
    assert gammas == {"0.2": 0.2, "0.05": 0.05}
    monkeypatch.setattr("sys.argv", ["vllm_turns", *options, "--model", "named"])
    with pytest.raises(SystemExit, match="a density is of a synthetic plan"):
        vllm_turns.main()


def arguments(**changes: Any) -> Namespace:
    values = {"model": None, "lengths": "", "chunks": "0", "throughput": "", "questions": 0}
    return Namespace(**values | {"length": 16384, "min_tokens": None, "repeats": 3} | changes)


def test_each_length_may_have_its_own_repeats(vllm_turns: Any) -> None:
    args = arguments(lengths="16384,131072:2", throughput="1024:128:64")
    vllm_turns.read_tasks(args)
    assert args.lengths == [(16384, 3), (131072, 2)]
    assert (args.min_tokens, args.most) == (8192, 131072)


def test_requests_of_a_load_stay_dense(vllm_turns: Any) -> None:
    args = arguments(throughput="1024:128:64,4096:1:16")
    vllm_turns.read_tasks(args)
    assert (args.min_tokens, args.most) == (4097, 4097)
    with pytest.raises(SystemExit, match="prompts of 1024 tokens would be sparse, from 1000 on"):
        vllm_turns.read_tasks(arguments(throughput="1024:128:64", min_tokens=1000))


def test_engines_take_turns_and_the_first_turn_does_not_count(
    vllm_turns: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    seconds = {"one": iter((9.0, 2.0, 4.0, 3.0)), "two": iter((9.0, 2.9, 2.8, 3.0))}

    def ask(end: str, *task: Any) -> float:
        assert task == ("load", 1024, 128, 64)
        asked.append(end)
        return next(seconds[end])

    monkeypatch.setattr(vllm_turns, "ask", ask)
    args = Namespace(loads=[[1024, 128, 64]], repeats=3)
    engines = [vllm_turns.Engine.read(name) for name in ("shared", "plain")]
    rows = vllm_turns.throughputs(args, dict(zip(engines, ("one", "two"), strict=True)))
    assert asked == ["one", "two"] * 4
    assert [row["seconds"][1:] for row in rows] == [[2.0, 4.0, 3.0], [2.9, 2.8, 3.0]]
    shared, plain = capsys.readouterr().out.splitlines()[-2:]
    assert shared == "| 1024 | 128 | 64 | shared:1 | 3.000 | 66.7% | 0.967 |"
    assert plain.endswith("| plain:1 | 2.900 | 6.9% | 1.000 |")


def test_densities_are_those_of_all_processes(
    vllm_turns: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def report(density: float) -> dict[str, Any]:
        return {"rows": {"sparse": {"auto": 7}}, "recent": {"auto": {"density": density}}}

    llm = Mock(llm_engine=Mock(log_stats=False))
    llm.generate.return_value = []
    monkeypatch.setitem(sys.modules, "vllm", Mock())
    args = Namespace(processor_time=False)
    for densities, mean in (((0.25,), 0.25), ((0.5, 0.25), 0.375)):
        llm.collective_rpc.return_value = list(map(report, densities))
        found = vllm_turns.run_answers(llm, args, [], 9, None)
        assert (found["density"], found["sparse"]) == (mean, 7)
        assert time_prefills(llm, lambda n: [n], 5, 1, warm_ups=0).density == mean
