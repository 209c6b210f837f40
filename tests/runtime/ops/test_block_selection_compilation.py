"""The kernels that choose blocks compile for the GPU generations we serve, without a GPU."""

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
from shareprefill.runtime.ops.pooled_attention import triton_kernel as pooled, triton as pooling
from shareprefill.runtime.ops.block_selection.kernels import cover, head_threshold, heads, lists
from shareprefill.runtime.ops.block_selection.kernels import head_threshold_large, measures
from shareprefill.runtime.ops.block_selection.kernels import smoothing
from shareprefill.runtime.ops.block_selection import triton as selection
from shareprefill.runtime.ops.vertical_slash import triton_kernel as profiles, triton as profiling
from shareprefill.runtime.ops.vertical_slash import pattern_kernel

dim, dtype, capability = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
generation = divmod(capability, 10)
TYPES = {
    **dict.fromkeys(["p_q", "p_k", "p_v", "p_out"], "*" + dtype),
    **dict.fromkeys(["p_rows", "p_heads", "p_index", "p_head_to_list"], "*i64"),
    **dict.fromkeys(["p_counts", "p_offsets", "p_listed", "p_indices"], "*i32"),
    "p_totals": "*i32",
    **dict.fromkeys(["p_bitmap", "p_shared", "p_patterns", "p_finite", "p_flags"], "*u8"),
    **dict.fromkeys(["p_columns", "p_distances"], "*u8"),
    **dict.fromkeys(["p_source", "p_check", "p_on_pass", "p_on_fail", "p_decided"], "*i64"),
    **dict.fromkeys(["p_requested", "p_pattern"], "*i64"),
    **dict.fromkeys(["scale_log2", "softcap_log2", "delta"], "fp32"),
    **dict.fromkeys(["p_table"], "*i64"),
    **dict.fromkeys(smoothing.smooth_kernel.arg_names[7:14], "fp32"),
}

def build(kernel, constants, pointers={}, source=ASTSource, **options):
    def kind(name):
        if name in constants:
            return "constexpr"
        return pointers.get(name) or TYPES.get(name, "*fp32" if name.startswith("p_") else "i32")

    # As at run time: tensors, and strides between heads and tokens, are multiples of 16.
    attrs = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name.startswith(("p_", "stride_")) and name not in constants
    }
    signature = {name: kind(name) for name in kernel.arg_names}
    built = compile(
        source(kernel, signature, constants, attrs),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    return {"shared": built.metadata.shared, "ptx": built.asm["ptx"]}

bits = {"p_out": "*u8"}
row = {"ROUNDING": 1e-6, "CHUNK": selection.CHUNK, "num_warps": 1}

def constants_of(options):
    return {name: value for name, value in options.items() if name.isupper()}

def launch(options):
    return {name: value for name, value in options.items() if not name.isupper()}

result = {}
tiles = pooling.pooled_tiles(dim, dim, torch_dtype, generation)
constants = pooling.kernel_constants(dim, dim, 4, 128, tiles, torch_dtype, has_heads=True,
                                     has_softcap=True, has_sinks=True)
result["dot pooled"] = build(pooled.pooled_kernel, constants, **tiles.launch_options())
tiles = pooling.mass_tiles(dim, torch_dtype, generation)
constants = pooling.mass_constants(dim, 4, 8, 128, tiles, torch_dtype, has_rows=True,
                                   has_heads=False, page_size=128)
result["dot mass"] = build(pooled.mass_kernel, constants, **tiles.launch_options())
table = constants | {"ROWS": 0, "PARTS": 1, "SEGMENTS": 1, "PACKED": 1, "HAS_HEADS": True}
result["dot table mass"] = build(pooled.mass_kernel, table, **tiles.launch_options())
constants = pooling.means_constants(constants)
result["means"] = build(pooled.means_kernel, constants, num_warps=4)
named = ("BLOCK_SIZE", "BLOCK_M", "UNIT", "BLOCK_J", "BLOCK_S")
table = {name: constants[name] for name in named} | {"WIDTH": 8}
result["table means"] = build(pooled.table_means_kernel, table, num_warps=4)
tiles = profiling.profile_tiles(dim, 128, torch_dtype, generation)
constants = profiling.kernel_constants(dim, 4, 128, tiles, torch_dtype, has_heads=True,
                                       page_size=16)
result["dot sums"] = build(profiles.sums_kernel, constants, **tiles.launch_options())
constants = profiling.profile_constants(constants)
result["profiles"] = build(profiles.profiles_kernel, constants, num_warps=4)
constants |= {n: v for n, v in profiling.PATTERN_OPTIONS.items() if n.isupper()}
constants["HAS_GUARD"] = True
result["patterns"] = build(
    pattern_kernel.pattern_kernel, constants, {"p_out": "*u8"}, num_warps=8
)
result["select"] = build(cover.select_kernel, constants_of(row), bits, **launch(row))
result["cover"] = build(cover.cover_profiles_kernel, constants_of(row), **launch(row))
result["vertical slash"] = build(
    cover.vertical_slash_kernel, {"CHUNK": selection.CHUNK}, bits, num_warps=1
)
measure = {"ROWS": selection.MEASURE_ROWS, "CHUNK": selection.MEASURE_CHUNK}
warps = launch(selection.MEASURE_OPTIONS)
result["js"] = build(measures.js_kernel, measure, **warps)
result["covered"] = build(measures.covered_kernel, measure, **warps)
check = selection.CHECK_OPTIONS
result["check"] = build(
    heads.check_kernel, constants_of(check), {"p_found": "*u8"}, **launch(check)
)
sparse = selection.SPARSE_OPTIONS
result["sparse heads"] = build(heads.sparse_heads_kernel, constants_of(sparse), **launch(sparse))
for indexed in (False, True):
    for smooths in (False, True):
        options = selection.HEAD_OPTIONS | {"HAS_INDEX": indexed, "SMOOTHS": smooths}
        result[f"head {indexed} {smooths}"] = build(
            head_threshold.head_kernel, constants_of(options), bits, **launch(options)
        )
    numbers = {**bits, **dict.fromkeys(["p_peaks", "p_before", "p_after"], "*i32")}
    for name, is_first in (("total", False), ("narrow", True), ("narrow", False), ("mark", False)):
        kernel = getattr(head_threshold_large, name + "_kernel")
        options = selection.STRIP_OPTIONS | {"HAS_INDEX": indexed, "IS_FIRST": is_first}
        taken = {n: v for n, v in options.items() if n in kernel.arg_names}
        built = build(kernel, taken, numbers, num_warps=options["num_warps"])
        result[f"{name} {indexed} {is_first}"] = built
fp32 = {"p_out": "*fp32"}
for name, kernel, options in (
    ("lines", smoothing.lines_kernel, selection.SUM_OPTIONS),
    ("smooth", smoothing.smooth_kernel, selection.SMOOTH_OPTIONS),
):
    result[name] = build(kernel, constants_of(options), fp32, **launch(options))
listing = {"CHUNK": selection.LIST_CHUNK}
result["count"] = build(lists.count_kernel, listing | {"HEADS": 32}, num_warps=1)
layout = constants_of(selection.WRITE_OPTIONS) | {"HEADS": 32}
for bounded in (False, True):
    result[f"lists {bounded}"] = build(
        lists.list_kernel, layout | {"HAS_BOUND": bounded}, num_warps=4
    )
if generation == (9, 0) and dtype != "fp32" and dim <= 128:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource
    from shareprefill.runtime.ops.pooled_attention import hopper, hopper_kernel

    constants = hopper.kernel_constants(dim, has_heads=True, has_sinks=True)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    tile = dtype + "[1, {}, " + str(constants["BLOCK_D"]) + "]," + repr(layout)
    kinds = {name: f"tensordesc<{tile.format(128)}>" for name in ("k_desc", "v_desc")}
    kinds["q_desc"] = f"tensordesc<{tile.format(64)}>"
    kinds["p_next"] = "*i32"
    result["dot hopper"] = build(
        hopper_kernel.pooled_hopper_kernel, constants, kinds, GluonASTSource, num_warps=4
    )
print(json.dumps(result))
"""
# Shared memory of a program, in bytes, by compute capability.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "dtype", "capability"),
    [
        (128, "bf16", 90),
        (256, "fp16", 86),
        (128, "fp16", 100),
        (96, "bf16", 80),
        (64, "fp32", 80),
    ],
)
def test_kernels_compile_and_fit(dim: int, dtype: str, capability: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, str(dim), dtype, str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    matrix_unit = {90: "wgmma", 100: "tcgen05", 80: "mma.sync", 86: "mma.sync"}[capability]
    for kind, built in json.loads(run.stdout.splitlines()[-1]).items():
        assert built["shared"] <= SHARED_LIMIT[capability], kind
        if dtype == "fp32":
            assert "mma.sync" not in built["ptx"], kind  # exact products, no tf32
        elif kind.startswith("dot"):
            assert matrix_unit in built["ptx"], kind
