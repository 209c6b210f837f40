from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def vllm_turns(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import vllm_turns

    return vllm_turns


def test_engines_are_named_by_kind_and_size(vllm_turns: Any) -> None:
    names = ("shared", "plain", "shared:2", "shared:pp2", "shared:2@128")
    engines = [vllm_turns.Engine.read(name) for name in names]
    assert [engine[:3] for engine in engines] == [
        *(("shared", 1, 1), ("plain", 1, 1), ("shared", 2, 1), ("shared", 1, 2), ("shared", 2, 1))
    ]
    assert [engine.page for engine in engines] == [0, 0, 0, 0, 128]
    assert [engine.name for engine in engines] == [
        *("shared:1", "plain:1", "shared:2", "shared:pp2", "shared:2@128")
    ]
    for text in ("dense", "shared:", "shared@", "shared:2:2"):
        with pytest.raises(SystemExit, match=f"'{text}' is none of shared"):
            vllm_turns.Engine.read(text)


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
