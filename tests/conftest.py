"""Session-wide set-up: Triton's interpreter without a GPU, visible skips, seeds."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

# Read when kernels are decorated, so it must be set before any of them is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# What `sp tune` has measured on this machine is not for tests.
os.environ["SHAREPREFILL_CROSSOVERS"] = ""


def interpreter_works() -> bool:
    """Triton's interpreter is there; before 3.8 it breaks on NumPy 2.4's scalars."""
    if importlib.util.find_spec("triton") is None:
        return False
    triton, numpy = (
        tuple(int(part) for part in version(name).split(".")[:2]) for name in ("triton", "numpy")
    )
    return triton >= (3, 8) or numpy < (2, 4)


SKIPS = {
    "gpu": (not torch.cuda.is_available(), "needs a CUDA GPU"),
    "interpreter": (
        torch.cuda.is_available() or not interpreter_works(),
        "needs triton >= 3.8 (3.6 with NumPy < 2.4), and no GPU, for which kernels compile",
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker, (skipped, reason) in SKIPS.items():
            if skipped and marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of torch's generator that differs between tests and repeats between runs."""
    number = sum(ord(letter) * 31**place for place, letter in enumerate(request.node.nodeid))
    number %= 2**31
    torch.manual_seed(number)
    return number


@pytest.fixture
def sp(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Runs `sp` in an empty folder; returns exit status, stdout and stderr."""
    from shareprefill import cli

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sp", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return run
