from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from shareprefill.errors import UnsupportedError
from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
from shareprefill.runtime.ops.blocks import BlockLists, causal_blocks
from shareprefill.runtime.ops.pooled_attention import pooled_attention
from shareprefill.runtime.ops.vertical_slash import vertical_slash_profile

query, key = torch.randn(2, 40, 16), torch.randn(1, 40, 16)
lists = BlockLists.from_bitmap(causal_blocks(40, 0, 16)[None], torch.zeros(2), 16)
for impl in ("auto", "reference"):
    block_sparse_attention(query, key, key, lists, impl=impl)
    pooled_attention(query, key, key, block_size=16, impl=impl)
    vertical_slash_profile(query, key, block_size=16, impl=impl)
try:
    block_sparse_attention(query, key, key, lists, impl="triton")
except UnsupportedError as error:
    print(error)
"""


def test_operators_run_and_refuse_triton_without_the_package() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert "needs the triton package" in run.stdout
