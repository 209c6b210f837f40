"""KL, agreement, perplexity and density of policies, one prefill each: for a CPU.

`sp eval` measures recall and times too, in three prefills of each prompt and policy. This takes
one, on the same prompts, and dense attention once a prompt. `auto` runs as each artifact plans it.
`--chunk` prefills so many tokens at a time, each of which chooses patterns anew; 0 all at once.
Lines have KL of the prompt's quarters too.

python benchmarks/fidelity.py --model M --artifact A.st --artifact B.st --policy oracle:.9 \
    --policy flex:.9 --task perplexity --task retr_kv --length 8000 --samples 2 --out F.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import torch
from provenance import provenance, summary

from shareprefill.artifact import load_artifact
from shareprefill.config import RuntimeConfig
from shareprefill.evaluation.config import EvalConfig
from shareprefill.evaluation.questions import make_questions
from shareprefill.models import load_model, load_tokenizer
from shareprefill.runtime.fidelity import compare_predictions, final_states, token_losses
from shareprefill.runtime.generation import prefill
from shareprefill.runtime.session import Session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--artifact", action="append", default=[])
    parser.add_argument("--policy", action="append", default=[], help="name:gamma")
    parser.add_argument("--task", action="append", required=True)
    parser.add_argument("--length", type=int, default=8000)
    parser.add_argument("--samples", type=int, default=1, help="prompts of each task")
    parser.add_argument("--chunk", action="append", type=int, help="tokens at a time, 0: all")
    parser.add_argument("--recall", action="store_true", help="measure recall in the same prefill")
    parser.add_argument("--out", type=Path, required=True, help="a line for each prompt and policy")
    args = parser.parse_args()
    print(summary(provenance("cuda" if torch.cuda.is_available() else "cpu")), flush=True)
    run(args)
    show(args.out)


def variants_of(args: argparse.Namespace) -> list[tuple[str, Any, RuntimeConfig, int | None]]:
    """A name, an artifact, options and chunks of each session, every pattern kept."""
    first = load_artifact(args.artifact[0]) if args.artifact else None
    every = {"min_tokens": 0, "max_density": 1.0}
    planned = [
        (f"auto {Path(path).stem}", load_artifact(path), RuntimeConfig(**every))
        for path in args.artifact
    ]
    others = []
    for text in args.policy:
        policy, gamma = text.rsplit(":", 1)
        config = RuntimeConfig(policy=policy, gamma=float(gamma), **every)
        others.append((f"{policy} {gamma}", first, config))
    return [
        (f"{name} in chunks of {chunk}" if chunk else name, artifact, config, chunk)
        for name, artifact, config in planned + others
        for chunk in args.chunk or [None]
    ]


def run(args: argparse.Namespace) -> None:
    """Measures what the file does not hold yet."""
    known = rows_of(args.out)
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    config = EvalConfig(model=args.model, policies=("dense",), samples=args.samples)
    asked = [
        (task, number, question.input_ids)
        for task in args.task
        for number, question in enumerate(
            make_questions(task, args.length, config, tokenizer, None)
        )
    ]
    for task, number, ids in sorted(asked, key=lambda one: one[1]):
        left = [v for v in variants_of(args) if (task, number, v[0]) not in known]
        if not left:
            continue
        dense, seconds = states_of(model, ids)
        loss = token_losses(model, dense, ids).mean().item()
        print(f"{task} {number}: dense {seconds:.0f} s", flush=True)
        for name, artifact, runtime, chunk in left:
            session = Session(model, artifact, runtime, measure_recall=args.recall)
            with session:
                sparse, seconds = states_of(model, ids, chunk)
            report, found = session.report(), compare_predictions(model, dense, sparse)
            row = {
                "task": task,
                "number": number,
                "policy": name,
                "kl": found.mean_kl,
                "kl_quarters": [part.mean().item() for part in found.kl.tensor_split(4)],
                "top1": found.top1_agreement,
                "loss": token_losses(model, sparse, ids).mean().item() - loss,
                "density": report.density,
                "work": report.selection_work,
                "heads": dict(report.policies),
                "seconds": round(seconds, 1),
            }
            if args.recall:
                recalls = [r for layer in report.layers for r in layer.recall or ()]
                row["recall"] = mean(recalls)
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


def states_of(
    model: Any, ids: torch.Tensor, chunk: int | None = None
) -> tuple[torch.Tensor, float]:
    """What the output layer reads at every position, and the seconds that took."""
    begun = perf_counter()
    with torch.no_grad(), final_states(model) as states:
        prefill(model, ids, chunk)
    return states(), perf_counter() - begun


def rows_of(path: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    """What was measured, by task, number of the prompt, and policy."""
    if not path.exists():
        return {}
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {(row["task"], row["number"], row["policy"]): row for row in rows}


def show(path: Path) -> None:
    """Means over prompts that every policy has; the change of perplexity over texts alone."""
    rows = rows_of(path)
    policies = list(dict.fromkeys(policy for *_, policy in rows))
    prompts = {key[:2] for key in rows}
    shared = sorted(p for p in prompts if all((*p, policy) in rows for policy in policies))
    texts = [p for p in shared if p[0].startswith("perplexity")]
    print(f"{len(shared)} prompts, {len(texts)} of them texts: {shared}")
    print("policy | density | work | effective | recall | KL | same top token | perplexity")
    for policy in policies:
        found = [rows[*p, policy] for p in shared]
        if not found:
            continue
        density, work, kl, top = (
            mean(r[k] for r in found) for k in ("density", "work", "kl", "top1")
        )
        recall = f"{mean(r['recall'] for r in found):.3f}" if "recall" in found[0] else "-"
        change = math.expm1(mean(rows[*p, policy]["loss"] for p in texts)) if texts else math.nan
        print(
            f"{policy} | {density:.3f} | {work:.2%} | {density + work:.3f} | {recall} | {kl:.4f} | "
            f"{top:.3f} | {change:+.2%}"
        )


if __name__ == "__main__":
    main()
