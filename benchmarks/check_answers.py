"""Asks a model generated questions under an artifact and under dense attention, and compares.

    python benchmarks/check_answers.py --artifact clusters.st --task retr_kv --length 8192

Exact match of both, agreement, density, selection work and time to first token; the prompts have
seeds of their own, so none of them is in a calibration.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from shareprefill.artifact import load_artifact
from shareprefill.calib.tasks import TASKS, generate, score
from shareprefill.config import POLICIES, RuntimeConfig
from shareprefill.models import load_model, load_tokenizer
from shareprefill.runtime.generation import encode_prompt, relative_error, warm_up
from shareprefill.runtime.generation import generate as complete
from shareprefill.runtime.session import share_prefill

# Far from the seeds of calibration prompts (`calib.prompts`: seed * 1_000_003 + number).
FIRST_SEED = 500_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--model", help="where the model is, if not where the artifact says")
    parser.add_argument("--task", choices=TASKS, action="append")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--policy", choices=POLICIES, default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--recall", action="store_true", help="measure recall (slower)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    artifact = load_artifact(args.artifact)
    name = args.model or artifact.model
    tokenizer = load_tokenizer(name)
    model = load_model(name, device=args.device, dtype=args.dtype)
    device = next(model.parameters()).device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{model.dtype}, policy {args.policy}"
    )
    rows = []
    for task in args.task or ["retr_kv"]:
        row = ask(args, artifact, model, tokenizer, task)
        rows.append(row)
        print(json.dumps(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def ask(args: argparse.Namespace, artifact, model, tokenizer, task: str) -> dict:
    """All questions of one task under both attentions."""
    session = share_prefill(
        model,
        artifact,
        RuntimeConfig(policy=args.policy, min_tokens=0),
        measure_recall=args.recall,
    )
    right, dense_right, same, errors, times, dense_times = 0, 0, 0, [], [], []
    for number in range(args.questions):
        example = generate(task, tokenizer, args.length, FIRST_SEED + number)
        ids = encode_prompt(model, tokenizer, example.prompt)
        if number == 0:
            warm_up(model, ids)
        new = len(tokenizer(example.answer, add_special_tokens=False).input_ids) + 4
        with session:
            sparse = complete(model, tokenizer, ids, max_new_tokens=new)
        dense = complete(model, tokenizer, ids, max_new_tokens=new)
        right += score(example, sparse.text)
        dense_right += score(example, dense.text)
        same += sparse.text == dense.text
        errors.append(relative_error(sparse.hidden, dense.hidden))
        times.append(sparse.ttft_s)
        dense_times.append(dense.ttft_s)
    report = session.report()
    found = {
        "task": task,
        "length": args.length,
        "questions": args.questions,
        "exact_match": right / args.questions,
        "dense_exact_match": dense_right / args.questions,
        "same_answer": same / args.questions,
        "density": round(report.density, 4),
        "selection_work": round(report.selection_work, 4),
        "policies": report.policies,
        "hidden_error": round(statistics.median(errors), 4),
        "ttft_s": round(statistics.median(times), 3),
        "dense_ttft_s": round(statistics.median(dense_times), 3),
    }
    recalls = [value for layer in report.layers for value in layer.recall or ()]
    if recalls:
        worst = sorted(recalls)[: max(1, len(recalls) // 20)]
        found["recall"] = round(statistics.mean(recalls), 4)
        found["recall_worst_5_percent"] = round(statistics.mean(worst), 4)
    return found


if __name__ == "__main__":
    main()
