"""The demo: three commands on the built-in model, and a question with a known answer.

Calibrates sp-tiny, clusters its heads, and asks for one of some hundred key-value pairs in a
prompt of 8K tokens, with shared sparse attention and with dense attention.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

MODEL = "sp-tiny"
FOLDER = Path("artifacts/demo")
LENGTH = 8192
# Not a prompt of the calibration: those have other seeds and half the length.
SEED = 2026
NEXT = """The same for your own model, a hub id or a folder, on your own prompts (.jsonl or .txt):
  {sp} calibrate --model MODEL --data prompts.jsonl
  {sp} cluster
  {sp} run prompt.txt --compare-dense"""


def sp(*arguments: str, show: bool = True) -> str:
    """Runs `sp` as a user would; returns what it printed."""
    print(f"$ sp {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "shareprefill.cli", *arguments]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        # `sp` has said why.
        print(f"the demo ends here: sp {arguments[0]} failed", file=sys.stderr)
        sys.exit(found.returncode)
    if show:
        print(found.stdout, flush=True)
    return found.stdout


def main() -> int:
    """Runs the demo; the exit status says whether the answer was right."""
    # Here, as they take seconds, in which somebody may press Ctrl-C.
    from shareprefill.calib.tasks import generate, score
    from shareprefill.models import load_tokenizer

    started = time.monotonic()
    FOLDER.mkdir(parents=True, exist_ok=True)
    calibration, clusters = str(FOLDER / "calibration"), str(FOLDER / "clusters.st")
    # Effects serve --budget and --max-kl, and cost as much as the maps.
    sp(
        *("calibrate", "--model", MODEL, "--data", "mixture", "--samples", "24"),
        *("--length", "4096", "--effect-tokens", "0", "--out", calibration),
    )
    sp("cluster", calibration, "--k", "auto", "--out", clusters)
    example = generate("retr_kv", load_tokenizer(MODEL), LENGTH, SEED)
    prompt = FOLDER / "prompt.txt"
    prompt.write_text(example.prompt, encoding="utf-8")
    print(f"{prompt} ends: {example.prompt[-120:]!r}\n")
    run = ("run", "--artifact", clusters, str(prompt), "--max-new-tokens", "48")
    found = json.loads(sp(*run, "--compare-dense", "--json", show=False))
    right = score(example, found["text"])
    print(f"answer:       {found['text'].strip()!r}")
    print(f"right answer: {example.answer.strip()!r}")
    print(f"dense answer: {found['dense_text'].strip()!r}")
    speedup = "nothing was sparse"
    if found["speedup"] is not None:
        speedup = f"speed-up {found['speedup']:.2f}"
    print(
        f"{found['prompt_tokens']} prompt tokens, density {found['density']:.3f}, "
        f"heads {found['policies']}, first token {found['ttft_s']:.2f} s, "
        f"dense {found['dense_ttft_s']:.2f} s, {speedup}, "
        f"relative error of the last hidden state {found['hidden_error']:.1e}"
    )
    verdict = "right" if right else "WRONG"
    print(f"the answer is {verdict}; the demo took {time.monotonic() - started:.0f} s\n")
    print(NEXT.format(sp=Path(sys.executable).with_name("sp")))
    return 0 if right else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"\nstopped; what is done is kept in {FOLDER}: make demo goes on", file=sys.stderr)
        sys.exit(130)
