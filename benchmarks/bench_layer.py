"""Times one layer, selection and attention together, against dense SDPA on structured inputs.

    python benchmarks/bench_layer.py --json layer.json

A few key blocks and the first tokens attract all queries. Every plan treats all heads alike but
`mixed`: 2 pivots, 16 sharing heads, 10 vertical-slash ones and 4 row-sampled ones of 32. A layer is
timed as sessions run it, after the geometry of the forward pass is made: with the host's time, and
in a CUDA graph, where the choice of patterns is timed by itself too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bench_kernels import dense_baseline, median_ms

from shareprefill.artifact import Policy
from shareprefill.runtime.orders import Orders
from shareprefill.runtime.plan import HeadPlan, RuntimePlan
from shareprefill.runtime.policies.base import LayerInputs
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
            found = layer_time(plan, query, key, value, args.repeats)
            row = {
                "tokens": tokens,
                "plan": name,
                "sdpa_ms": dense,
                **asdict(found),
                "eager_speedup": dense / found.eager,
                "graph_speedup": dense / found.graph,
                "choice_to_sdpa": found.choice / dense,
            }
            row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
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
        labels=tuple(policy.label for policy in Policy),
        selectors={},
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
        refuse_nonfinite=False,
    )


@dataclass(frozen=True)
class LayerTime:
    """Median milliseconds, and what the layer did.

    `eager` counts the host's time, as a model's forward pass meets it when nothing else keeps the
    device busy; `graph` is the same layer in a CUDA graph; `choice` is its part before attention.
    """

    eager: float
    graph: float
    choice: float
    density: float
    recall: float
    sharing: float


def layer_time(
    plan: RuntimePlan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, repeats: int
) -> LayerTime:
    orders = Orders(plan)
    geometry = Geometry(query.shape[1], key.shape[1], plan, query.device)
    inputs = LayerInputs(query, key, query.shape[2] ** -0.5, geometry)

    def layer() -> LayerPass:
        return LayerPass(plan, 0, ForwardState(geometry, orders), inputs, value)

    record = layer().run(measure_recall=True)[1]
    assert record.recall is not None
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        layer().run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    heads = len(plan.layers[0])
    return LayerTime(
        eager=statistics.median(times) * 1e3,
        graph=graph_time(lambda: layer().run(), repeats),
        choice=graph_time(lambda: layer().choose(), repeats),
        density=record.blocks.sum().item() / record.causal / heads,
        recall=float(record.recall.mean()),
        sharing=(record.policies == int(S)).sum().item() / heads,
    )


def graph_time(work: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of a captured CUDA graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


if __name__ == "__main__":
    main()
