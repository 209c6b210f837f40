"""The Hopper kernels: they compile without a GPU; the block-sparse one refuses with a reason, and
matches float64. What the pooled one computes is tested with the other implementations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from shareprefill.runtime.ops.block_sparse_attention import (
    block_sparse_attention,
    hopper,
    reference,
)
from shareprefill.runtime.ops.blocks import BlockLists, causal_blocks
from shareprefill.runtime.ops.hopper import launch
from tests.support.attention import DEVICE, HOPPER_SIZES, random_inputs, random_lists

REFUSAL = launch.unavailable(torch.device(DEVICE))
needs_hopper = pytest.mark.skipif(REFUSAL is not None, reason=f"the Hopper kernel {REFUSAL}")
# Relative to float64; about what rounding the weights and the output costs.
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4}
SHARED_LIMIT = 232_448


def attend(query, key, value, lists, scale, out, lse, softcap=None, sinks=None) -> None:
    options = {"scale": scale, "softcap": softcap, "sinks": sinks, "out": out, "lse": lse}
    block_sparse_attention(query, key, value, lists, **options, impl="hopper")


# Kernels decorated under the interpreter cannot be compiled: a fresh process does it.
COMPILE = """
import json
import math
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from shareprefill.runtime.ops.block_sparse_attention import hopper as sparse
from shareprefill.runtime.ops.block_sparse_attention.hopper_kernel import block_sparse_hopper_kernel
from shareprefill.runtime.ops.fp8_attention import hopper as fp8
from shareprefill.runtime.ops.fp8_attention.hopper_kernel import fp8_attention_kernel
from shareprefill.runtime.ops.pooled_attention import hopper as pooled
from shareprefill.runtime.ops.pooled_attention import triton as pooling
from shareprefill.runtime.ops.pooled_attention.hopper_kernel import pooled_hopper_kernel
from shareprefill.runtime.ops.pooled_attention.hopper_mass_kernel import mass_hopper_kernel
from shareprefill.runtime.ops.triton_tiles import Tiles

ALIGNED = (
    "p_out", "p_maps", "p_mass", "p_peaks", "p_q", "stride_oh", "stride_on", "stride_qh",
    "stride_qn",
)

def tile(dtype, rows, columns):
    size = 1 if dtype == "fp8e4nv" else 2
    layout = gl.NVMMASharedLayout(
        swizzle_byte_width=min(128, columns * size), element_bitwidth=8 * size, rank=3
    )
    return f"tensordesc<{dtype}[1, {rows}, {columns}],{layout!r}>"

def build(kernel, constants, dtype, **options):
    dim = constants["BLOCK_D"]
    size = constants.get("PAGE_SIZE", 0)
    keys = tile(dtype, math.gcd(size, 128), 64) if size % 128 else tile(dtype, 128, dim)
    types = {
        "q_desc": tile(dtype, 64, dim), "k_desc": keys, "v_desc": keys, "p_out": "*" + dtype,
        "p_q": "*" + dtype, "p_rows": "*i64",
        "p_sinks": "*" + dtype, "scale_log2": "fp32", "softcap_log2": "fp32", "p_heads": "*i64",
        **dict.fromkeys(["p_lse", "p_maps", "p_mass", "p_peaks"], "*fp32"),
        **dict.fromkeys(["p_offsets", "p_indices", "p_head_to_list", "p_table", "p_next"], "*i32"),
    }
    if kernel is fp8_attention_kernel:
        small = "fp8e4nv"
        types |= {"k_desc": tile(small, 128, dim), "v_desc": tile(small, dim, 128),
                  "p_scales": "*fp32"}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32")
                 for name in names}
    # As at run time: rows of the output and of the maps are multiples of 16 bytes.
    attrs = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names)
             if name in ALIGNED}
    built = compile(
        GluonASTSource(kernel, signature, constants, attrs),
        target=GPUTarget("cuda", 90, 32),
        options=options,
    )
    return {"shared": built.metadata.shared, "ptx": built.asm["ptx"]}

built = {}
KINDS = (
    (128, "bf16", 0), (128, "bf16", 16), (64, "fp16", 32), (64, "fp16", 256), (128, "bf16", 272),
)
for dim, dtype, page_size in KINDS:
    kind = f"{dtype} {dim} {page_size}"
    constants = sparse.kernel_constants(dim, has_lse=True, page_size=page_size)
    built["sparse " + kind] = build(
        block_sparse_hopper_kernel, constants, dtype, **sparse.launch_options()
    )
    if page_size in (0, 256):
        built["fp8 " + kind] = build(
            fp8_attention_kernel, fp8.kernel_constants(dim), dtype, **sparse.launch_options()
        )
    constants = pooled.kernel_constants(
        dim, has_heads=dim == 64, has_sinks=dim == 64, page_size=page_size
    )
    built["pooled " + kind] = build(pooled_hopper_kernel, constants, dtype, num_warps=4)
    constants = pooling.mass_constants(
        dim, 4, 8, 128, Tiles(128, 64, 8, 2), None, has_rows=True, has_heads=dim == 64
    )
    constants = pooled.mass_constants(constants, page_size)
    built["mass " + kind] = build(mass_hopper_kernel, constants, dtype, num_warps=4)
constants |= {"ROWS": 0, "PARTS": 1, "SEGMENTS": 1, "HAS_ROWS": True, "HAS_HEADS": True}
built["mass of a table"] = build(mass_hopper_kernel, constants, dtype, num_warps=4)
print(json.dumps(built))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="needs the triton package")
def test_compiles_for_hopper_without_a_gpu(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # A cached kernel would print no report.
    environment |= {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for kind, built in json.loads(run.stdout.splitlines()[-1]).items():
        assert built["shared"] <= SHARED_LIMIT, kind
        for instruction in ("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg"):
            assert instruction in built["ptx"], kind
        assert (".f32.e4m3.e4m3" in built["ptx"]) == kind.startswith("fp8"), kind
    reports = run.stdout + run.stderr
    assert reports.count("spill stores") == 18
    # ptxas says so where it lets no two products be under way at one time.
    assert "serialized" not in reports


class TestRefusals:
    @pytest.fixture(autouse=True)
    def on_hopper(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launch, "unavailable", lambda device: None)

    @staticmethod
    def refusal(
        dim: int = 128, dtype: torch.dtype = torch.float16, block_size: int = 128
    ) -> str | None:
        query, key = torch.zeros(4, 300, dim, dtype=dtype), torch.zeros(2, 300, dim, dtype=dtype)
        return hopper.supports(query, key, key, block_size)

    def test_takes_what_it_is_made_for(self) -> None:
        for dim in (64, 96, 128):
            assert self.refusal(dim) is None

    def test_names_what_does_not_fit(self) -> None:
        assert "float32" in (self.refusal(dtype=torch.float32) or "")
        assert "head_dim of 64, 96 or 128, got 80" in (self.refusal(80) or "")
        assert "block_size of 128 tokens, got 64" in (self.refusal(block_size=64) or "")

    def test_names_rows_that_the_copy_engine_cannot_read(self) -> None:
        query = torch.zeros(2, 100, 128, dtype=torch.float16)
        key = torch.zeros(2, 100, 132, dtype=torch.float16)[:, :, :128]
        assert "takes key in rows" in (hopper.supports(query, key, query, 128) or "")
        shifted = torch.zeros(2 * 100 * 128 + 4, dtype=torch.float16)[4:].view(2, 100, 128)
        assert "takes value in rows" in (hopper.supports(query, query, shifted, 128) or "")
        # Strides of a dim of one element do not matter.
        one = torch.zeros(1, 128, dtype=torch.float16).as_strided((1, 1, 128), (3, 5, 1))
        assert hopper.supports(one, one, one, 128) is None


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the triton package")
def test_descriptors_are_those_that_triton_makes() -> None:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    query = torch.zeros(6, 300, 96, dtype=torch.float16)
    key = torch.zeros(700, 2, 96, dtype=torch.float16).transpose(0, 1)
    value = torch.zeros(2, 1, 64, dtype=torch.bfloat16)
    for columns, tensors in ((128, (query, key, key)), (64, (value, value, value))):
        for tensor, rows in zip(tensors, (64, 128, 128), strict=True):
            descriptor = launch.describe_tiles(tensor, rows)
            strides = launch.tile_strides(tensor)
            own = TensorDescriptor(
                tensor, list(tensor.shape), strides, [1, rows, columns], descriptor.layout
            )
            assert descriptor.base is tensor
            assert vars(descriptor) | {"base": None} == vars(own) | {"base": None}


def test_heads_run_together_while_their_keys_fit() -> None:
    key = torch.zeros(8, 1024, 128, dtype=torch.float16)  # 512 KiB of keys and values a head
    together = [launch.heads_at_once(key, 32, budget << 10) for budget in (1, 512, 1100, 1 << 20)]
    assert together == [4, 4, 8, 32]


def test_a_cpu_is_refused() -> None:
    assert "needs a Hopper GPU" in (launch.unavailable(torch.device("cpu")) or "")


def check(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    lists: BlockLists,
    *,
    out: torch.Tensor | None = None,
    with_lse: bool = True,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compare a call on poisoned outputs with float64, and return the output."""
    query, key, value = inputs
    assert hopper.supports(query, key, value, lists.block_size) is None
    scale = query.shape[2] ** -0.5
    out = torch.empty_like(query) if out is None else out
    lse = torch.empty(query.shape[:2], device=DEVICE) if with_lse else None
    exact = torch.full(query.shape, torch.nan, dtype=torch.float64, device=DEVICE)
    exact_lse = torch.full(query.shape[:2], torch.nan, device=DEVICE)
    out.fill_(torch.nan)
    if lse is not None:
        lse.fill_(torch.nan)
    attend(query, key, value, lists, scale, out, lse, softcap, sinks)
    doubles = (tensor.double() for tensor in inputs)
    reference.attend(*doubles, lists, scale, exact, exact_lse, softcap, sinks)
    computed = lists.head_to_list >= 0
    assert out[~computed].isnan().all()
    got, want = out[computed].double(), exact[computed]
    assert (got - want).norm() <= TOLERANCE[out.dtype] * want.norm()
    assert not got.isnan().any()
    if lse is not None:
        assert lse[~computed].eq(-torch.inf).all()
        torch.testing.assert_close(lse[computed], exact_lse[computed], rtol=1e-5, atol=1e-5)
    return out


@needs_hopper
@pytest.mark.gpu
class TestOnHopper:
    @pytest.mark.parametrize(("heads", "groups", "n_q", "n_k", "dim", "dtype"), HOPPER_SIZES)
    @pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
    def test_matches_float64(
        self, heads: int, groups: int, n_q: int, n_k: int, dim: int, dtype: torch.dtype,
        density: float,
    ) -> None:  # fmt: skip
        inputs = random_inputs(heads, groups, n_q, n_k, dim, dtype)
        check(inputs, random_lists(heads, n_q, n_k, density))

    def test_full_lists_are_as_exact_as_dense_attention(self) -> None:
        query, key, value = random_inputs(8, 2, 1500, 1500, 128, torch.bfloat16)
        bitmap = causal_blocks(1500, 0, 128, device=DEVICE)[None]
        lists = BlockLists.from_bitmap(bitmap, torch.zeros(8, device=DEVICE), 128)
        out = check((query, key, value), lists).double()

        def dense(*tensors: torch.Tensor) -> torch.Tensor:
            batch = (tensor[None] for tensor in tensors)
            return scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True)[0].double()

        exact = dense(query.double(), key.double(), value.double())
        theirs = (dense(query, key, value) - exact).norm()
        assert (out - exact).norm() <= 1.2 * theirs

    def test_strided_inputs_and_output(self) -> None:
        heads, groups, n_q, n_k = 8, 2, 500, 900
        inputs = random_inputs(heads, groups, n_q, n_k, 128, torch.bfloat16)
        query, key, value = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs)
        rows = torch.empty(n_q, heads, 3 * 128, dtype=torch.bfloat16, device=DEVICE)
        out = rows[..., 128:256].transpose(0, 1)
        rows.fill_(7.0)
        check((query, key, value), random_lists(heads, n_q, n_k, 0.4, 2), out=out, with_lse=False)
        assert (rows[..., :128] == 7.0).all()
        assert (rows[..., 256:] == 7.0).all()

    def test_output_at_odd_addresses(self) -> None:
        inputs = random_inputs(4, 2, 300, 300, 128, torch.bfloat16)
        out = torch.empty(4, 300, 131, dtype=torch.bfloat16, device=DEVICE)[:, :, 3:]
        check(inputs, random_lists(4, 300, 300, 0.7, 2), out=out)

    def test_softcap_and_sinks(self) -> None:
        inputs = random_inputs(6, 3, 700, 1001, 64, torch.float16)
        sinks = torch.tensor([-30.0, -1.0, 0.0, 2.0, 8.0, 90.0], device=DEVICE)
        for density in (0.1, 0.6):
            lists = random_lists(6, 700, 1001, density, 4)
            check(inputs, lists, softcap=3.0, sinks=sinks)

    def test_a_graph_reads_new_lists_when_replayed(self) -> None:
        query, key, value = random_inputs(8, 2, 900, 900, 128, torch.bfloat16)
        bitmap = causal_blocks(900, 0, 128, device=DEVICE).expand(8, -1, -1)
        pattern = torch.arange(8, device=DEVICE)
        lists = BlockLists.from_bitmap(bitmap, pattern, 128)
        out = torch.empty_like(query)
        expected = torch.empty_like(query)
        attend(query, key, value, lists, 0.1, out, None)  # compiled before capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            attend(query, key, value, lists, 0.1, out, None)
        for density in (0.2, 0.7):
            chosen = bitmap & (torch.rand(bitmap.shape, device=DEVICE) < density)
            other = BlockLists.from_bitmap(chosen, pattern, 128, capacity=len(lists.indices))
            lists.offsets.copy_(other.offsets)
            lists.indices.copy_(other.indices)
            out.fill_(torch.nan)
            graph.replay()
            attend(query, key, value, other, 0.1, expected, None)
            assert torch.equal(out, expected)

    def test_streams_do_not_share_their_work(self) -> None:
        inputs = random_inputs(32, 8, 4096, 4096, 128, torch.bfloat16)
        bitmap = causal_blocks(4096, 0, 128, device=DEVICE)[None]
        lists = BlockLists.from_bitmap(bitmap, torch.zeros(32, device=DEVICE), 128)
        outs = [torch.empty_like(inputs[0]) for _ in range(12)]
        streams = [torch.cuda.Stream() for _ in range(3)]
        torch.cuda.synchronize()
        for place, out in enumerate(outs):
            with torch.cuda.stream(streams[place % 3]):
                attend(*inputs, lists, 0.1, out, None)
        torch.cuda.synchronize()
        for out in outs[1:]:
            assert torch.equal(out, outs[0])

    def test_a_new_size_compiles_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import triton

        check(random_inputs(4, 2, 256, 256, 128, torch.bfloat16), random_lists(4, 256, 256, 0.5, 2))
        compiled = []
        monkeypatch.setattr(
            triton.knobs.runtime, "jit_post_compile_hook", lambda **call: compiled.append(call)
        )
        for heads, groups, n_q, n_k in ((4, 2, 1, 1), (7, 7, 255, 1111), (16, 2, 640, 641)):
            inputs = random_inputs(heads, groups, n_q, n_k, 128, torch.bfloat16)
            check(inputs, random_lists(heads, n_q, n_k, 0.5, 2))
        assert not compiled
