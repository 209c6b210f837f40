"""Compares a model over several GPUs with the same model on one: policies, logits, times.

    python benchmarks/check_parallel.py --model sp-ref --artifact clusters.st --out one.pt
    torchrun --nproc-per-node 2 benchmarks/check_parallel.py --model sp-ref --artifact clusters.st \
        --against one.pt
    python benchmarks/check_parallel.py ... --device-map balanced --against one.pt

A prompt of key-value retrieval, its prefill dense and shared (`min_tokens=0`), the median of three
after one. Under torchrun the model is divided by its heads, and the first process prints what
all found together.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from shareprefill import share_prefill
from shareprefill.calib.tasks import generate as make_example
from shareprefill.config import RuntimeConfig
from shareprefill.models import load_tokenizer, resolve_model
from shareprefill.runtime.generation import relative_error
from shareprefill.tokens import encode

REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device-map", help="layers over several devices, as transformers has it")
    parser.add_argument("--out", type=Path, help="keep what was found, to compare with")
    parser.add_argument("--against", type=Path, help="what one process has kept")
    options = parser.parse_args()
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    found = gathered(measured(options, size), size)
    if rank == 0:
        if options.out is not None:
            torch.save(found, options.out)
        known = found if options.against is None else torch.load(options.against)
        print(json.dumps(comparison(found, known, size), indent=1))
    if size > 1:
        torch.distributed.destroy_process_group()


@torch.no_grad()
def measured(options: argparse.Namespace, size: int) -> dict[str, Any]:
    """Logits, times, and what this process's heads did."""
    model = load(options, size)
    tokenizer = load_tokenizer(options.model)
    example = make_example("retr_kv", tokenizer, options.length, seed=1001)
    ids = encode(tokenizer, example.prompt)[None].to(model.device)

    def run() -> torch.Tensor:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float().cpu()

    dense, dense_s = timed(run)
    config = RuntimeConfig(min_tokens=0)
    with share_prefill(model, options.artifact, config) as session:
        shared, shared_s = timed(run)
        session.reset()
        run()
        layers = session.report().layers
    return {
        "tokens": ids.shape[1],
        "dense": dense,
        "shared": shared,
        "dense_s": dense_s,
        "shared_s": shared_s,
        "policies": [layer.policies for layer in layers],
        "density": [layer.density for layer in layers],
    }


def load(options: argparse.Namespace, size: int) -> Any:
    """The model on one device, or divided by heads, or by layers."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    where: dict[str, Any] = {"device_map": options.device_map or "cuda:0"}
    if size > 1:
        where = {"distributed_config": DistributedConfig(tp_plan="auto")}
    dtype = getattr(torch, options.dtype)
    path = resolve_model(options.model)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **where).eval()


def timed(run: Any) -> tuple[torch.Tensor, float]:
    """What a call returns, and its median time in seconds after a first one."""
    logits, times = run(), []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        logits = run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return logits, statistics.median(times)


def gathered(mine: dict[str, Any], size: int) -> dict[str, Any]:
    """The heads of all processes, in order, with the rest of this process's findings."""
    if size == 1:
        return mine
    parts: list[Any] = [None] * size
    torch.distributed.all_gather_object(parts, {k: mine[k] for k in ("policies", "density")})
    for name in ("policies", "density"):
        layers = zip(*(part[name] for part in parts), strict=True)
        mine[name] = [tuple(value for part in layer for value in part) for layer in layers]
    return mine


def comparison(found: dict[str, Any], known: dict[str, Any], size: int) -> dict[str, Any]:
    """What several devices did, beside what one did."""
    pairs = [
        (mine, other)
        for layer, before in zip(found["policies"], known["policies"], strict=True)
        for mine, other in zip(layer, before, strict=True)
    ]
    density = [
        abs(mine - other)
        for layer, before in zip(found["density"], known["density"], strict=True)
        for mine, other in zip(layer, before, strict=True)
    ]
    return {
        "device": torch.cuda.get_device_name(),
        "processes": size,
        "tokens": found["tokens"],
        "heads": len(pairs),
        "same_policy": sum(mine == other for mine, other in pairs),
        "shared_heads": sum(mine == "share" for mine, _ in pairs),
        "logits_error": relative_error(found["shared"], known["shared"]),
        "dense_logits_error": relative_error(found["dense"], known["dense"]),
        "density_difference": max(density),
        "dense_s": found["dense_s"],
        "shared_s": found["shared_s"],
    }


if __name__ == "__main__":
    main()
