"""`sp run`: its options reach the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shareprefill.errors import DataError
from shareprefill.runtime import answering


def test_options_reach_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sp: Any) -> None:
    given: dict[str, Any] = {}

    def answer(artifact: Any, prompt: Any, config: Any, **options: Any) -> None:
        given.update(artifact=artifact, prompt=prompt, gamma=config.gamma, **options)
        raise DataError("enough")

    monkeypatch.setattr(answering, "answer", answer)
    (tmp_path / "prompt.txt").write_text("A line.")
    command = ("run", "prompt.txt", "--model", "m", "--policy", "smoothed", "--gamma", 0.7)
    assert sp(*command)[0] == 1
    plain = {name: given.pop(name) for name in ("artifact", "prompt", "gamma", "model")}
    assert plain == {"artifact": None, "prompt": "A line.", "gamma": 0.7, "model": "m"}
    defaults, on_stage, on_text = dict(given), given["on_stage"], given["on_text"]
    assert on_stage is not None
    assert on_text is not None
    flags = ("--compare-dense", "--recall", "--trust-remote-code", "--json")
    values = (
        "--prefill-chunk",
        512,
        "--max-new-tokens",
        3,
        "--device",
        "cpu",
        "--dtype",
        "float32",
    )
    sp(*command, *flags, *values)
    named = {
        "max_new_tokens": 3,
        "prefill_chunk": 512,
        "compare_dense": True,
        "measure_recall": True,
        "keep_maps": False,
        "device": "cpu",
        "dtype": "float32",
        "trust_remote_code": True,
        "on_text": None,
    }
    assert {name: given[name] for name in named} == named
    assert defaults["keep_maps"] is False
    unchanged = {name for name in named if defaults[name] == named[name]}
    assert unchanged == {"keep_maps"}
