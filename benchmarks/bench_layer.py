"""Times one layer, selection and attention together, against dense SDPA on structured inputs.

    python benchmarks/bench_layer.py --json layer.json

A few key blocks and the first tokens attract all queries. Every plan treats all heads alike but
`mixed`: 2 pivots, 16 sharing heads, 10 vertical-slash ones and 4 row-sampled ones of 32. A layer is
timed as sessions run it, host time included, after the geometry of the forward pass is made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from bench_kernels import dense_baseline, median_ms

from shareprefill.artifact import Policy
from shareprefill.runtime.plan import HeadPlan, RuntimePlan
from shareprefill.runtime.sharing import LayerPass
from shareprefill.runtime.state import ForwardState, Geometry

BLOCK, HOT_SHARE, HOT_TOKENS, SINK_TOKENS, STRENGTH = 128, 1 / 16, 8, 64, 11.0
P, S, R, V = Policy.PIVOT, Policy.SHARE, Policy.SAMPLED, Policy.VERTICAL_SLASH
PLANS = {
    "sampled": (R,) * 32,
    "vertical-slash": (V,) * 32,
    "mixed": (P,) * 2 + (S,) * 16 + (V,) * 10 + (R,) * 4,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768, 131072])
    parser.add_argument("--gamma", type=float, default=0.95)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, 32/8 heads, D=128")
    rows = []
    for tokens in args.tokens:
        query, key, value = structured(tokens)
        sdpa = dense_baseline(query, key)
        tensors = sdpa.inputs(query, key, value)
        _, dense = median_ms(lambda sdpa=sdpa, tensors=tensors: sdpa(*tensors), "cuda")
        for name, policies in PLANS.items():
            plan = uniform_plan(policies, args.gamma)
            milliseconds, density, recall = layer_time(plan, query, key, value, args.repeats)
            row = {
                "tokens": tokens,
                "plan": name,
                "density": round(density, 4),
                "recall": round(recall, 4),
                "ms": round(milliseconds, 3),
                "sdpa_ms": round(dense, 3),
                "speedup": round(dense / milliseconds, 2),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def structured(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries `[32, N, 128]`, keys and values `[8, N, 128]` in bfloat16."""
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(heads, tokens, 128, generator=generator, device="cuda") for heads in (32, 8, 8)
    )
    blocks = tokens // BLOCK
    hot = torch.randperm(blocks, generator=generator, device="cuda")[: int(blocks * HOT_SHARE)]
    attracts = torch.zeros(tokens, device="cuda")
    attracts.view(-1, BLOCK)[hot, :HOT_TOKENS] = 1
    attracts[:SINK_TOKENS] = 1
    query[..., 0] += STRENGTH
    key[..., 0] += STRENGTH * attracts
    return query.bfloat16(), key.bfloat16(), value.bfloat16()


def uniform_plan(policies: tuple[Policy, ...], gamma: float) -> RuntimePlan:
    """A plan of one layer; sharing heads share the first head's pattern."""
    heads = tuple(
        HeadPlan(
            head=head,
            policy=policy,
            pivot=head if policy is P else 0 if policy is S else -1,
            fallback=R if policy is S else policy,
            gamma=gamma,
            fallback_gamma=gamma,
            tau=0.2,
            cluster=0,
        )
        for head, policy in enumerate(policies)
    )
    return RuntimePlan(
        layers=(heads,),
        online=False,
        guarded=False,
        block_size=BLOCK,
        delta=0.3,
        pivot_rows=8,
        sample_rows=8,
        check_rows=2,
        sink_blocks=1,
        local_blocks=2,
        max_density=1.0,
    )


def layer_time(
    plan: RuntimePlan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, repeats: int
) -> tuple[float, float, float]:
    """Median milliseconds of a layer, its density and its recall."""
    sizes = (query.shape[1], key.shape[1])
    geometry = Geometry(*sizes, plan, query.device)

    def layer(measure_recall: bool = False):
        state = ForwardState(geometry)
        layer_pass = LayerPass(plan, 0, state, query, key, value, query.shape[2] ** -0.5)
        return layer_pass.run(measure_recall=measure_recall)[1]

    record = layer(measure_recall=True)
    assert record.recall is not None
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        layer()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    density = sum(record.blocks) / record.causal / len(record.blocks)
    return statistics.median(times) * 1e3, density, float(record.recall.mean())


if __name__ == "__main__":
    main()
