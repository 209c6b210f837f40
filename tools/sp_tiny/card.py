"""Renders the model card of sp-tiny from the results of a training run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

_CARD = """# sp-tiny

A small `LlamaForCausalLM` that really retrieves: {parameters:.1f} M parameters, 6 layers of 8 query
and 4 KV heads of 64 dimensions (48 query heads in all), hidden size 320, MLP 800, tied embeddings,
bfloat16. It exists so that calibration, clustering and the runtime can be tried on a CPU without a
download. It is no assistant and knows next to nothing.

- Text: the Python 3.11 standard library and its documentation (PSF-2.0), and generated
  key-value, needle, pass-key, digit-sequence and variable-tracking tasks. Nothing else.
- Held out: every documentation file of `shareprefill/assets/text`.
- Lengths: trained up to {longest} tokens. The configuration allows longer prompts; nothing is
  claimed for them.
- Tokenizer: byte-level BPE of 4096 tokens, every digit a token, `<|bos|>` added in front.
- Math.Find and Code.Run were not trained. Variable tracking was, and stays near guessing: one of a
  prompt's values at random would be right in about a third of the questions.
- Licence: Apache-2.0, as the repository; of the text it was trained on, PSF-2.0.

{results}
Made by `tools/sp_tiny` (its README has the commands).
"""

_RESULTS = """## Results

Dense attention, weights as shipped, exact match of the whole greedy answer: right / questions.

{table}

One run: {device}, torch {torch}, {seconds:.0f} s of training, {steps} steps of AdamW (peak rate
{peak_rate}), {tokens:.0f} M tokens, seed {seed}; lengths {lengths}.

"""


def results_table(results: dict[str, dict]) -> str:
    """Markdown table with a row a task and a column a prompt length."""
    lengths = list(results)
    lines = [
        "| task | " + " | ".join(f"{int(length) // 1024}K" for length in lengths) + " |",
        "| --- |" + " --- |" * len(lengths),
    ]
    for task in (task for task in results[lengths[0]] if task != "text_loss"):
        counts = [results[length][task] for length in lengths]
        cells = [f"{count['right']}/{count['questions']}" for count in counts]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    losses = [f"{results[length]['text_loss']:.2f}" for length in lengths]
    lines.append("| held-out text, nats per token | " + " | ".join(losses) + " |")
    return "\n".join(lines)


def render_card(report: dict) -> str:
    """The card of the run that `results.json` reports."""
    facts = report["training"]
    stages = [f"{length} from {share:.0%}" for share, length in facts["lengths"]]
    numbers = facts | {
        "lengths": ", ".join(stages) + " of the time",
        "tokens": facts["tokens"] / 1e6,
        "table": results_table(report["results"]),
    }
    return _CARD.format(
        parameters=facts["parameters"] / 1e6,
        longest=max(length for _, length in facts["lengths"]),
        results=_RESULTS.format(**numbers),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="results.json of a training run")
    parser.add_argument("--out", type=Path, default=Path("shareprefill/assets/sp-tiny/README.md"))
    args = parser.parse_args()
    report = json.loads(args.results.read_text(encoding="utf-8"))
    args.out.write_text(render_card(report), encoding="utf-8")


if __name__ == "__main__":
    main()
