"""A tiny model with its tokenizer in a folder, as a user would have one."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.support.tiny import tiny_llama


@functools.cache
def _saved() -> Path:
    from transformers import AutoTokenizer

    from shareprefill.models import resolve_model

    folder = Path(tempfile.mkdtemp(prefix="sp-checkpoint-"))
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("sp-tiny"))
    tokenizer.save_pretrained(folder)
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


def save_checkpoint(folder: Path) -> Path:
    """Copies a random tiny Llama with sp-tiny's tokenizer to `folder`."""
    shutil.copytree(_saved(), folder, dirs_exist_ok=True)
    return folder


def change_outside_of_attention(folder: Path, part: str) -> None:
    """Changes a saved model without changing an attention weight: `mlp`, or `rope`."""
    if part == "rope":
        values = json.loads((folder / "config.json").read_text())
        values["rope_parameters"]["rope_theta"] *= 8
        (folder / "config.json").write_text(json.dumps(values))
        return
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.5
    save_file(weights, path, metadata={"format": "pt"})


def small_calibration(model: Path, **changes: Any) -> dict[str, Any]:
    """Options of a calibration that takes a second."""
    return {"model": str(model), "samples": 4, "length": 320, "block_size": 32, **changes}
