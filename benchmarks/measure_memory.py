"""Peak memory of a prefill on the CPU, shared against dense, each in a process of its own.

python benchmarks/measure_memory.py --artifact clusters.st --length 32768
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

SHARED, DENSE, IDLE = "auto", "dense", "idle"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--model", help="where the model is, if not where the artifact says")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--one", choices=(SHARED, DENSE, IDLE), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args)))
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--one"]
    rows = {}
    for policy in (IDLE, SHARED, DENSE):
        found = subprocess.run([*command, policy], capture_output=True, text=True, check=True)
        rows[policy] = json.loads(found.stdout)
        print(policy, rows[policy], flush=True)
    idle = rows[IDLE]["peak_mib"]
    for policy in (SHARED, DENSE):
        print(f"{policy}: {rows[policy]['peak_mib'] - idle:.0f} MiB above the loaded model")


def measure(args: argparse.Namespace) -> dict:
    """One prefill under a policy, or none; the process's peak resident memory."""
    from shareprefill.artifact import load_artifact
    from shareprefill.calib.tasks import generate
    from shareprefill.config import RuntimeConfig
    from shareprefill.models import load_model, load_tokenizer
    from shareprefill.runtime.generation import encode_prompt
    from shareprefill.runtime.generation import generate as complete
    from shareprefill.runtime.session import share_prefill

    artifact = load_artifact(args.artifact)
    name = args.model or artifact.model
    tokenizer, model = load_tokenizer(name), load_model(name, device="cpu")
    ids = encode_prompt(model, tokenizer, generate("retr_kv", tokenizer, args.length, 0).prompt)
    facts = {"tokens": len(ids)}
    if args.one == DENSE:
        # The model's own attention, not a session that runs dense.
        facts["ttft_s"] = complete(model, tokenizer, ids, max_new_tokens=1).ttft_s
    elif args.one == SHARED:
        with share_prefill(model, artifact, RuntimeConfig()) as session:
            facts["ttft_s"] = complete(model, tokenizer, ids, max_new_tokens=1).ttft_s
        facts["density"] = session.report().density
    return {**facts, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


if __name__ == "__main__":
    main()
