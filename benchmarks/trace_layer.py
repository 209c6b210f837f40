"""Files and functions of ours that one planned layer enters once it is warm, plan by plan.

How many places a reader passes who follows a query from the core to its output. Counts are of one
`SparsePrefill.attend` on a CPU, in a second pass of the same length, whose tables are made.

    python benchmarks/trace_layer.py [--names]
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from types import FrameType

import torch
from layer_cases import PLANS, uniform_plan

import shareprefill
from shareprefill.artifact import Policy
from shareprefill.runtime.core import SparsePrefill
from shareprefill.runtime.plan import RuntimePlan

TOKENS, DIM, KV_HEADS = 1024, 16, 2
ROOT = Path(shareprefill.__file__).parent


def trace(plan: RuntimePlan) -> dict[str, set[str]]:
    """The functions of ours that a warm layer enters, by file."""
    entered: dict[str, set[str]] = defaultdict(set)
    prefill, heads = SparsePrefill(plan), len(plan.layers[0])
    geometry = plan.geometry(TOKENS, TOKENS, torch.device("cpu"))
    query, key, value = (torch.randn(h, TOKENS, DIM) for h in (heads, KV_HEADS, KV_HEADS))

    def note(frame: FrameType, event: str, _argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        # A comprehension, or what a dataclass makes, is no place to read.
        if event == "call" and path.is_relative_to(ROOT) and "<" not in frame.f_code.co_name:
            entered[str(path.relative_to(ROOT))].add(frame.f_code.co_qualname)

    prefill.attend(0, prefill.begin(geometry), query, key, value, scale=DIM**-0.5)
    state = prefill.begin(geometry)
    sys.setprofile(note)
    try:
        prefill.attend(0, state, query, key, value, scale=DIM**-0.5)
    finally:
        sys.setprofile(None)
    return entered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", action="store_true", help="also print every function")
    names = parser.parse_args().names
    print("| plan | files | functions | files without ops/ | functions without ops/ |")
    print("| --- | --- | --- | --- | --- |")
    for name, policies in PLANS.items():
        entered = trace(uniform_plan(policies, dict.fromkeys(Policy, 0.9)))
        counts = []
        for outside in (False, True):
            files = [f for f in entered if not (outside and f.startswith("runtime/ops/"))]
            counts += [len(files), sum(len(entered[f]) for f in files)]
        print(f"| {name} | {' | '.join(map(str, counts))} |")
        if names:
            for file, functions in sorted(entered.items()):
                print(f"    {file}: {len(functions)}: {', '.join(sorted(functions))}")


if __name__ == "__main__":
    main()
