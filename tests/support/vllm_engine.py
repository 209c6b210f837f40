"""Runs vLLM engines in a process of their own: what to do comes as JSON, what was found goes back.

    python tests/support/vllm_engine.py '{"engines": [{"options": {}, "batches": [[{"n": 300}]]}]}'

A request is `{"seed": S, "n": N}` (N random tokens; the same seed begins with the same tokens) with
`"switch"` for its `extra_args`, and `"tokens"` to generate. An engine is `options` (its entry in
`additional_config`, null for none), `arguments` of `vllm.LLM`, and `batches` of requests.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

MODEL = Path(__file__).parents[2] / "shareprefill" / "assets" / "sp-tiny"
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def prompt_tokens(seed: int, n: int) -> list[int]:
    """Random tokens of sp-tiny's vocabulary, those of a shorter prompt first."""
    draw = random.Random(seed)
    return [1, *(draw.randrange(20, 4000) for _ in range(n - 1))]


def run_engine(engine: dict[str, Any]) -> dict[str, Any]:
    """Starts an engine, runs its batches, and gives it back."""
    from vllm import LLM, SamplingParams

    options = engine.get("options")
    llm = LLM(
        engine.get("model", str(MODEL)),
        dtype="float32",
        seed=0,
        hf_overrides={"architectures": ["LlamaForCausalLM"]},
        additional_config={} if options is None else {"shareprefill": options},
        worker_extension_cls="shareprefill.vllm.metrics.ReportExtension",
        **{"enforce_eager": True, "max_model_len": 4096} | engine.get("arguments", {}),
    )
    batches = []
    for batch in engine["batches"]:
        prompts = [{"prompt_token_ids": prompt_tokens(r.get("seed", 0), r["n"])} for r in batch]
        parameters = [
            SamplingParams(
                temperature=0,
                logprobs=20,
                max_tokens=r.get("tokens", 3),
                n=r.get("samples", 1),
                extra_args={"shareprefill": r["switch"]} if "switch" in r else None,
            )
            for r in batch
        ]
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        batches.append([_found(output) for output in outputs])
    reports = [] if options is None else llm.collective_rpc("shareprefill_report")
    del llm
    gc.collect()
    return {"batches": batches, "reports": reports}


def _found(output: Any) -> dict[str, Any]:
    first = output.outputs[0]
    logprobs = {str(token): found.logprob for token, found in first.logprobs[0].items()}
    return {
        "logprobs": logprobs,
        "tokens": [list(o.token_ids) for o in output.outputs],
        "cached": output.num_cached_tokens,
    }


if __name__ == "__main__":
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    request = json.loads(sys.argv[1])
    Path(request["out"]).write_text(json.dumps([run_engine(e) for e in request["engines"]]))
