"""benchmarks/measure_all.py."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shareprefill.cli import app

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def step(name: str, code: str = "", **changes: Any) -> Any:
    from measure_all import Step

    return Step(**{"name": name, "commands": (python(code),), "limit_s": 60, **changes})


def test_every_option_that_is_given_exists(tmp_path: Path) -> None:
    from measure_all import steps_of

    given = argparse.Namespace(
        out=tmp_path, model="m", artifact=None, commit="c", workers=2, samples=1
    )
    commands = [command for s in steps_of(given) for command in s.commands]
    scripts = [c for c in commands if any("benchmarks" in word for word in c)]
    ours = [c for c in commands if "shareprefill.cli" in c]
    assert sum(s.name.startswith("memcheck-") for s in steps_of(given)) >= 10
    assert len(scripts) >= 7
    assert len(ours) >= 7
    for command in scripts:
        place = next(n for n, word in enumerate(command) if "benchmarks" in word)
        source = Path(command[place]).read_text()
        for word in command[place + 1 :]:
            assert not word.startswith("--") or f'"{word}"' in source, (command[place], word)
    for command in ours:
        name, *words = command[command.index("shareprefill.cli") + 1 :]
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        for word in words:
            assert not word.startswith("--") or f"{word} " in shown, (name, word)


def test_steps_run_side_by_side_where_they_may(tmp_path: Path) -> None:
    from measure_all import Machine

    show = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(1.5)"
    machine = Machine(tmp_path, gpus=2)
    begun = time.monotonic()
    machine.run([step(name, show) for name in "abcd"], slots=2)
    assert time.monotonic() - begun < 4.5
    assert machine.outcomes == dict.fromkeys("abcd", "ok")
    logs = [(tmp_path / f"{name}.log").read_text().strip() for name in "abcd"]
    assert sorted(logs) == ["0", "0", "1", "1"]
    begun = time.monotonic()
    machine.run([step(name, show) for name in "ef"] + [step("both", show, gpus=2)], slots=1)
    assert time.monotonic() - begun > 3
    assert (tmp_path / "both.log").read_text().strip() == "0,1"


def test_what_fails_is_told_and_what_stands_on_it_does_not_run(tmp_path: Path) -> None:
    from measure_all import Machine

    machine = Machine(tmp_path, gpus=1)
    late = tmp_path / "late"
    slow = f"import subprocess; subprocess.run(['sh', '-c', 'sleep 3; touch {late}'])"
    steps = [
        step("second", after=("first",)),
        step("first", "raise SystemExit(3)"),
        step("two", gpus=2),
        step("slow", slow, limit_s=1),
        step("gone", commands=(("/nowhere/program",),)),
        step("elsewhere", after=("not asked for",)),
        step("chain", commands=(python("print('one')"), python("raise SystemExit(2)"), python(""))),
    ]
    machine.run(steps, slots=1)
    assert machine.outcomes.pop("gone").startswith("cannot be started: ")
    assert machine.outcomes == {
        "first": "failed with exit status 3",
        "second": "not run: first failed",
        "two": "not run: needs 2 GPUs, there are 1",
        "slow": "ended after its limit of 1 s",
        "elsewhere": "ok",
        "chain": "failed with exit status 2",
    }
    # What a later phase stands on is remembered, and a step is ended with all its processes.
    machine.run([step("third", after=("first",))], slots=1)
    assert machine.outcomes["third"] == "not run: first failed"
    time.sleep(3)
    assert not late.exists()


def test_it_says_what_it_does_not_know(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = (sys.executable, "benchmarks/measure_all.py", *arguments)
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert run("--only", "kernels", "layer", "--list").stdout.split() == ["kernels", "layer"]
    wrong = run("--skip", "colonels")
    assert wrong.returncode == 2
    assert "no step colonels" in wrong.stderr
