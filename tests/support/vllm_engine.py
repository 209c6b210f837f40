"""Runs vLLM engines in a process of their own: what to do comes as JSON, what was found goes back.

    python tests/support/vllm_engine.py '{"engines": [{"options": {}, "batches": [[{"n": 300}]]}]}'

A request is `{"seed": S, "n": N}` (N random tokens; the same seed begins with the same ones) with
`"switch"` for its `extra_args`, the folder of a LoRA adapter as `"lora"`, `"tokens"` and
`"samples"` to generate at a `"temperature"`, all of them with `"ignore_eos"`, and `"abort"`: the
step after which it is given up. An engine is `options` (its entry in `additional_config`, null for
none), `arguments` of `vllm.LLM`, and `batches` of requests; one that `fails` gives its error.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import weakref
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
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from shareprefill.errors import ShareprefillError

    options = engine.get("options")
    if engine.get("fails"):
        try:
            _start(engine)
        except ShareprefillError as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return {"error": None}
    llm = _start(engine)
    batches = []
    for batch in engine["batches"]:
        prompts = [{"prompt_token_ids": prompt_tokens(r.get("seed", 0), r["n"])} for r in batch]
        parameters = [
            SamplingParams(
                temperature=r.get("temperature", 0),
                logprobs=20,
                max_tokens=r.get("tokens", 3),
                n=r.get("samples", 1),
                ignore_eos=r.get("ignore_eos", False),
                output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args={"shareprefill": r["switch"]} if "switch" in r else None,
            )
            for r in batch
        ]
        if any("abort" in r for r in batch):
            aborts = [r.get("abort") for r in batch]
            outputs = _with_aborts(llm.llm_engine, prompts, parameters, aborts)
        else:
            adapters = [_adapter(r.get("lora")) for r in batch]
            outputs = llm.generate(prompts, parameters, lora_request=adapters, use_tqdm=False)
        batches.append([_found(output) for output in outputs])
    reports = [] if options is None else llm.collective_rpc("shareprefill_report")
    found = {"batches": batches, "reports": reports}
    if not engine.get("arguments", {}).get("disable_log_stats", True):
        found["metrics"] = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    caches = [weakref.ref(layer.kv_cache) for layer in layers if hasattr(layer, "kv_cache")]
    del llm, layers
    gc.collect()
    left = sum(cache() is not None for cache in caches)
    return found | {"caches": len(caches), "left": left}


def _start(engine: dict[str, Any]) -> Any:
    from vllm import LLM

    options = engine.get("options")
    return LLM(
        engine.get("model", str(MODEL)),
        dtype="float32",
        seed=0,
        additional_config={} if options is None else {"shareprefill": options},
        worker_extension_cls="shareprefill.vllm.report.ReportExtension",
        **{"enforce_eager": True, "max_model_len": 4096} | engine.get("arguments", {}),
    )


def _adapter(folder: str | None) -> Any:
    from vllm.lora.request import LoRARequest

    return None if folder is None else LoRARequest("adapter", 1, folder)


def _with_aborts(
    engine: Any, prompts: list[Any], parameters: list[Any], aborts: list[int | None]
) -> list[Any]:
    """What the requests end with that are not given up, in their order."""
    ids = [
        engine.add_request(str(number), prompt, parameter)
        for number, (prompt, parameter) in enumerate(zip(prompts, parameters, strict=True))
    ]
    found, step = {}, 0
    while engine.has_unfinished_requests():
        found |= {output.request_id: output for output in engine.step() if output.finished}
        step += 1
        given_up = [of for of, after in zip(ids, aborts, strict=True) if after == step]
        if given_up:
            engine.abort_request(given_up, internal=True)
    return [found[str(number)] for number, after in enumerate(aborts) if after is None]


def _found(output: Any) -> dict[str, Any]:
    first = output.outputs[0]
    steps = [
        {str(token): found.logprob for token, found in step.items()} for step in first.logprobs
    ]
    return {
        "logprobs": steps[0],
        "steps": steps,
        "tokens": [list(o.token_ids) for o in output.outputs],
        "cached": output.num_cached_tokens,
    }


if __name__ == "__main__":
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    request = json.loads(sys.argv[1])
    Path(request["out"]).write_text(json.dumps([run_engine(e) for e in request["engines"]]))
