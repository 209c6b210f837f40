"""Keeps a vLLM engine with the plug-in busy, and looks at its errors and its memory.

    python tools/soak_vllm.py --minutes 30
    python tools/soak_vllm.py --minutes 30 --plain     # vLLM alone: what it grows by itself

Requests of mixed lengths come and go: some are aborted, some ask for several samples, some carry
the switch, many begin alike. There are too few pages for all of them, so requests are preempted.
Every answer that ends must have as many tokens as it was asked for. The process's memory is read
once a round; after a third of the rounds what is allocated may not grow by more than `--growth`
MiB. What is resident beside that is the heap's free room, and pages of the cache that were not
touched before.
"""

# vLLM lives in an environment of its own: it is not there where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def resident_mib() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class _Mallinfo2(ctypes.Structure):
    """glibc's, of all arenas."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks"),
            *("uordblks", "fordblks", "keepcost"),
        )
    )


def allocated_mib() -> float:
    """Memory that this process has allocated and not freed, of glibc's heap and beside it."""
    gc.collect()
    found = ctypes.CDLL("libc.so.6").mallinfo2
    found.restype = _Mallinfo2
    facts = found()
    return (facts.uordblks + facts.hblkhd) / 2**20


def soak_round(
    llm: Any, draw: random.Random, number: int, counts: Counter[str], *, plain: bool
) -> None:
    """Twelve requests from their arrival to their end or abortion.

    Args:
        llm: The engine.
        draw: Gives the requests.
        number: Of the round.
        counts: Of requests by their end; added to.
        plain: Whether the engine has no plug-in, so that its requests carry no switch.

    Raises:
        RuntimeError: a request that was not aborted did not end as it should.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, wanted, aborts = llm.llm_engine, {}, {}
    for place in range(12):
        name = f"{number}-{place}"
        shared = random.Random(draw.randrange(4))
        # Just under whole pages, so that answers need further ones while others wait for room.
        length = 128 * draw.choice((1, 2, 6, 12, 23)) - draw.randrange(1, 8)
        prompt = [1, *(shared.randrange(20, 4000) for _ in range(length - 1))]
        switch = draw.choice((None, None, "off", "pooled"))
        samples, tokens = draw.choice((1, 1, 3)), draw.randrange(1, 30)
        parameters = SamplingParams(
            n=samples,
            max_tokens=tokens,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=None if switch is None or plain else {"shareprefill": switch},
        )
        internal = engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
        if draw.random() < 0.25:
            aborts[internal] = draw.randrange(1, 8)
        else:
            wanted[name] = (samples, tokens)
    step = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if not output.finished or output.request_id not in wanted:
                continue
            samples, tokens = wanted.pop(output.request_id)
            found = [len(one.token_ids) for one in output.outputs]
            if found != [tokens] * samples:
                raise RuntimeError(f"{output.request_id}: {found} tokens, not {samples} x {tokens}")
            counts["ended"] += 1
        step += 1
        given_up = [internal for internal, after in aborts.items() if after == step]
        if given_up:
            engine.abort_request(given_up, internal=True)
            counts["aborted"] += len(given_up)
    if wanted:
        raise RuntimeError(f"requests without an end: {sorted(wanted)}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--growth", type=float, default=8, help="MiB that are allowed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="without the plug-in")
    args = parser.parse_args()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    options = {"artifact": str(ROOT / "artifacts" / "sp-tiny.st"), "min_tokens": 0}
    if args.plain:
        os.environ["VLLM_PLUGINS"] = ""
    from vllm import LLM, _custom_ops

    # vLLM's linear layers on a CPU keep a compiled product for every new number of tokens, .28 MiB
    # each: that would hide what else grows. Without them it takes torch's.
    _custom_ops._supports_onednn = False
    llm = LLM(
        str(ROOT / "shareprefill" / "assets" / "sp-tiny"),
        dtype="float32",
        max_model_len=3072,
        max_num_batched_tokens=1000,
        max_num_seqs=8,
        num_gpu_blocks_override=30,
        enforce_eager=True,
        disable_log_stats=False,
        worker_extension_cls="shareprefill.vllm.report.ReportExtension",
        additional_config={} if args.plain else {"shareprefill": options},
    )
    draw, counts, sizes = random.Random(args.seed), Counter[str](), []
    end = time.monotonic() + 60 * args.minutes
    while time.monotonic() < end or len(sizes) < 3:
        soak_round(llm, draw, len(sizes), counts, plain=args.plain)
        sizes.append(allocated_mib())
        print(
            f"round {len(sizes)}: {dict(counts)}, {sizes[-1]:.1f} MiB allocated, "
            f"{resident_mib():.0f} resident",
            flush=True,
        )
    metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    rows = None if args.plain else llm.collective_rpc("shareprefill_report")[0]["rows"]
    grown = sizes[-1] - sizes[len(sizes) // 3]
    print(f"preemptions {metrics['vllm:num_preemptions']}, rows {rows}")
    print(f"allocated {grown:+.1f} MiB after round {len(sizes) // 3 + 1}")
    if not metrics["vllm:num_preemptions"] or not counts["aborted"]:
        print("nothing was preempted or aborted: run longer", file=sys.stderr)
        return 1
    if grown > args.growth:
        print(f"it grew by more than {args.growth:g} MiB", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
