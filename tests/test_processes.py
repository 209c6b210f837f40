"""Workers that are started; what torchrun starts is in tests/calib/test_processes.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shareprefill.processes import starting_workers


@pytest.mark.parametrize("before", [None, "1"])
def test_workers_import_nothing_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    (tmp_path / "pickle.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    if before is None:
        monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONSAFEPATH", before)
    with starting_workers() as context:
        process = context.Process(target=int)
        process.start()
    assert os.environ.get("PYTHONSAFEPATH") == before
    process.join()
    assert process.exitcode == 0
