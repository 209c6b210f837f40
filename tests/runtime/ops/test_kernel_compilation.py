"""Block-sparse attention compiles for the GPU generations we serve, on a machine without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs the triton package")

# Kernels decorated under the interpreter cannot be compiled: a fresh process does it.
COMPILE = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from shareprefill.runtime.ops.block_sparse_attention import triton_kernel
from shareprefill.runtime.ops.block_sparse_attention import triton as sparse

dim, dtype, capability = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
generation = divmod(capability, 10)
types = {
    "p_q": "*" + dtype, "p_k": "*" + dtype, "p_v": "*" + dtype, "p_out": "*" + dtype,
    "p_lse": "*fp32", "p_offsets": "*i32", "p_indices": "*i32", "p_head_to_list": "*i32",
    "p_table": "*i32",
    "scale_log2": "fp32", "softcap_log2": "fp32", "p_sinks": "*fp32",
}

def build(function, options, constants):
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in function.arg_names
    }
    # As at run time: pointers and strides are multiples of 16.
    attrs = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(function.arg_names)
        if name.startswith(("p_", "stride_"))
    }
    built = compile(
        ASTSource(function, signature, constants, attrs),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    return {"shared": built.metadata.shared, "ptx": built.asm["ptx"]}

result = {}
tiles = sparse.select_tiles(sparse.padded_dim(dim), torch_dtype, generation).within(128)
for kind, capped in (("plain", False), ("capped", True)):
    constants = sparse.kernel_constants(
        dim, dim, 4, 128, tiles, torch_dtype,
        has_lse=True, has_softcap=capped, has_sinks=capped, page_size=16 if capped else 0,
    )
    result[kind] = build(triton_kernel.block_sparse_kernel, tiles.launch_options(), constants)
print(json.dumps(result))
"""
# Shared memory of a program, in bytes, by compute capability.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448}


def build(dim: int, dtype: str, capability: int) -> dict[str, dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, str(dim), dtype, str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "dtype", "capability"),
    [
        (128, "bf16", 90),
        (256, "fp16", 90),
        (128, "bf16", 100),
        (96, "fp16", 80),
        (256, "bf16", 86),
        (64, "fp32", 80),
    ],
)
def test_kernels_compile_and_fit(dim: int, dtype: str, capability: int) -> None:
    matrix_unit = {90: "wgmma", 100: "tcgen05", 80: "mma.sync", 86: "mma.sync"}[capability]
    for kind, built in build(dim, dtype, capability).items():
        assert built["shared"] <= SHARED_LIMIT[capability], kind
        if dtype == "fp32":
            assert "mma.sync" not in built["ptx"], kind  # exact products, no tf32
        else:
            assert matrix_unit in built["ptx"], kind
