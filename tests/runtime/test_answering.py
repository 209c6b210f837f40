from __future__ import annotations

from pathlib import Path

import pytest

from shareprefill.config import RuntimeConfig
from shareprefill.models import load_model
from shareprefill.runtime.answering import answer
from tests.support.checkpoint import save_checkpoint
from tests.support.tiny import BLOCK, tiny_artifact


@pytest.mark.parametrize("beyond", [0, BLOCK, BLOCK + 1])
def test_a_prompt_longer_than_those_of_calibration_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, beyond: int
) -> None:
    """Prompts of calibration come close to their length: a block more is no longer prompt."""
    checkpoint = save_checkpoint(tmp_path)
    model = load_model(str(checkpoint), device="cpu")
    options = {"model": str(checkpoint), "max_new_tokens": 1, "device": "cpu"}
    prompt = "one two three " * 20
    tokens = answer(None, prompt, RuntimeConfig(policy="dense"), **options).generation.prompt_tokens
    artifact = tiny_artifact(model, summary={"held_out_tokens": [7, tokens - beyond]})
    caplog.clear()
    answer(artifact, prompt, RuntimeConfig(), **options)
    told = f"the prompt has {tokens} tokens, and the artifact was measured on prompts of"
    assert (told in caplog.text) == (beyond > BLOCK)
    caplog.clear()
    # What all heads do alike was measured on no prompt.
    answer(artifact, prompt, RuntimeConfig(policy="smoothed"), **options)
    assert told not in caplog.text
