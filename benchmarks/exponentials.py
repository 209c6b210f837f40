"""How many base-2 exponentials a GPU computes in a second, with nothing else to do."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PROGRAMS, WIDTH, STEPS = 4096, 1024, 512


@triton.jit
def exponentials_kernel(p_out, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """One program: `STEPS` exponentials in a row of each of `WIDTH` numbers."""
    o_n = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    b_x = o_n.to(tl.float32) * 1e-9
    for _ in range(STEPS):
        b_x = tl.exp2(-b_x)
    tl.store(p_out + o_n, b_x)


def exponentials_per_second() -> float:
    """The measured rate."""
    out = torch.empty(PROGRAMS * WIDTH, device="cuda")
    ms = triton.testing.do_bench(
        lambda: exponentials_kernel[(PROGRAMS,)](out, WIDTH=WIDTH, STEPS=STEPS),
        warmup=10,
        rep=30,
        return_mode="median",
    )
    return PROGRAMS * WIDTH * STEPS / float(ms) * 1e3
