"""Compares a session's ways to run a prompt: rows of a padded batch, and chunks of any size.

    python benchmarks/check_runtime.py --model sp-ref --artifact clusters.st --json runtime.json

`padded`: eight key-value retrieval prompts of different lengths in one left-padded batch, each
compared with its own single run under the same session. `chunks`: one prompt after the other, its
prefill in pieces of every size; the answer, the density and the recall of each.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from shareprefill.artifact import load_artifact
from shareprefill.calib.tasks import generate as make_example
from shareprefill.calib.tasks import score
from shareprefill.config import RuntimeConfig
from shareprefill.models import load_model, load_tokenizer
from shareprefill.runtime.generation import encode_prompt, generate, relative_error
from shareprefill.runtime.session import share_prefill

ROWS, NEW_TOKENS = 8, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--chunks", type=int, nargs="*", default=[1, 7, 128, 1000, 4096, 0])
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", choices=("padded", "chunks"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    artifact = load_artifact(args.artifact)
    model = load_model(args.model, device=args.device, dtype="float32")
    tokenizer = load_tokenizer(args.model)
    found = {}
    if args.only != "chunks":
        found["padded"] = padded(model, tokenizer, artifact, args.length)
        print(json.dumps(found["padded"]), flush=True)
    if args.only != "padded":
        found["chunks"] = []
        for row in chunks(model, tokenizer, artifact, args):
            found["chunks"].append(row)
            print(json.dumps(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def padded(model, tokenizer, artifact, length: int) -> dict:
    """Greedy answers and first logits of a padded batch against single runs."""
    lengths = [length * (number + 2) // (ROWS + 1) for number in range(ROWS)]
    prompts = [
        encode_prompt(model, tokenizer, make_example("retr_kv", tokenizer, tokens, seed).prompt)
        for seed, tokens in enumerate(lengths)
    ]
    width, device = max(map(len, prompts)), model.device
    ids = torch.zeros(ROWS, width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    options = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
    }
    config = RuntimeConfig(min_tokens=0)
    with share_prefill(model, artifact, config) as session:
        batch = model.generate(ids.to(device), attention_mask=mask.to(device), **options)
        density = session.report().density
        alone = [
            # Without a mask, generate() would take token 0 for padding.
            model.generate(row, attention_mask=torch.ones_like(row), **options)
            for row in (prompt[None].to(device) for prompt in prompts)
        ]
    same, errors = [], []
    for row, (prompt, single) in enumerate(zip(prompts, alone, strict=True)):
        expected = single.sequences[0, len(prompt) :].tolist()
        same.append(batch.sequences[row, width:].tolist()[: len(expected)] == expected)
        errors.append(relative_error(batch.logits[0][row], single.logits[0][0]))
    return {
        "tokens": [len(prompt) for prompt in prompts],
        "same_answers": sum(same),
        "largest_logit_error": max(errors),
        "density": density,
    }


def chunks(model, tokenizer, artifact, args):
    """Answers, density and recall of every size of chunk."""
    examples = [
        make_example("retr_kv", tokenizer, args.length, seed) for seed in range(args.questions)
    ]
    prompts = [encode_prompt(model, tokenizer, example.prompt) for example in examples]
    dense = [
        generate(model, tokenizer, prompt, max_new_tokens=NEW_TOKENS, prefill_chunk=0)
        for prompt in prompts
    ]
    right = sum(score(example, run.text) for example, run in zip(examples, dense, strict=True))
    yield {"chunk": "dense", "tokens": len(prompts[0]), "right": right, "of": len(prompts)}
    for chunk in args.chunks:
        config = RuntimeConfig(min_tokens=0)
        with share_prefill(model, artifact, config, measure_recall=True) as session:
            runs = [
                generate(model, tokenizer, prompt, max_new_tokens=NEW_TOKENS, prefill_chunk=chunk)
                for prompt in prompts
            ]
        report = session.report()
        recalls = [r for layer in report.layers for r in layer.recall or ()]
        yield {
            "chunk": chunk or "all",
            "tokens": len(prompts[0]),
            "right": sum(score(e, run.text) for e, run in zip(examples, runs, strict=True)),
            "as_dense": sum(run.text == d.text for run, d in zip(runs, dense, strict=True)),
            "of": len(runs),
            "sparse_prefills": report.prefills,
            "dense_prefills": report.dense_prefills,
            "density": round(report.density, 4),
            "recall": round(sum(recalls) / len(recalls), 4) if recalls else 1.0,
            "hidden_error": max(
                relative_error(run.hidden, d.hidden) for run, d in zip(runs, dense, strict=True)
            ),
        }


if __name__ == "__main__":
    main()
