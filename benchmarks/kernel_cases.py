"""What bench_kernels.py times: block lists, and the kernels of others."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from timing import Call
from torch.nn.attention import SDPBackend, sdpa_kernel

from shareprefill.runtime.ops.blocks import BlockLists, causal_blocks

SINK_BLOCKS, LOCAL_BLOCKS = 1, 2


def structured_lists(
    n_tokens: int, block_size: int, n_heads: int, density: float, device: str, seed: int
) -> BlockLists:
    """A pattern per head with `density` of the causal blocks, sink and window always listed."""
    generator = torch.Generator(device).manual_seed(seed)
    causal = causal_blocks(n_tokens, 0, block_size, device=device)
    n_blocks = len(causal)
    places = torch.arange(n_blocks, device=device)
    shape = (n_heads, n_blocks, n_blocks)
    score = torch.rand(shape, generator=generator, device=device)
    # Half of the freely chosen blocks lie in columns that all rows of the head prefer.
    columns = torch.rand(n_heads, 1, n_blocks, generator=generator, device=device)
    score = torch.maximum(score, columns)
    score[:, :, :SINK_BLOCKS] = 2.0
    distance = places[:, None] - places[None, :]
    score[:, distance.abs() < LOCAL_BLOCKS] = 3.0
    score[:, ~causal] = -1.0
    # Row i of n keeps about density * (i + 1), at least its sink and window.
    wanted = (density * (places + 1)).round().clamp(min=SINK_BLOCKS + LOCAL_BLOCKS)
    kept = torch.minimum(wanted, places + 1).long()
    bitmap = torch.zeros(shape, dtype=torch.bool, device=device)
    for head in range(n_heads):
        order = score[head].argsort(dim=-1, descending=True)
        bitmap[head].scatter_(1, order, places[None, :] < kept[:, None])
    return BlockLists.from_bitmap(bitmap & causal, torch.arange(n_heads, device=device), block_size)


def visible_pairs(lists: BlockLists, n_tokens: int) -> int:
    """Token pairs of the listed causal blocks, summed over heads."""
    bitmap = lists.to_bitmap()[lists.head_to_list.long()].sum(0)
    size = lists.block_size
    positions = torch.arange(n_tokens, device=lists.device)
    starts = torch.arange(lists.n_k, device=lists.device) * size
    by_block = torch.zeros(lists.n_q, lists.n_k, dtype=torch.int64, device=lists.device)
    for first in range(0, n_tokens, 8192):
        some = positions[first : first + 8192]
        seen = (some[:, None] + 1 - starts[None, :]).clamp(0, size)
        by_block.index_add_(0, some // size, seen)
    return int((bitmap * by_block).sum())


def density(lists: BlockLists, n_tokens: int) -> float:
    """Listed blocks divided by causal blocks."""
    bitmap = lists.to_bitmap()[lists.head_to_list.long()]
    causal = causal_blocks(n_tokens, 0, lists.block_size, device=lists.device)
    return float((bitmap & causal).sum() / (causal.sum() * len(bitmap)))


@dataclass(frozen=True)
class Dense:
    """Causal SDPA of one sequence with a fixed backend."""

    name: str
    backend: SDPBackend | None
    expand: bool

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        context = nullcontext() if self.backend is None else sdpa_kernel(self.backend)
        with context:
            return torch.nn.functional.scaled_dot_product_attention(
                query[None], key[None], value[None], is_causal=True, enable_gqa=not self.expand
            )

    def inputs(self, query: torch.Tensor, *keys: torch.Tensor) -> list[torch.Tensor]:
        """Inputs for the call; a backend without GQA gets keys and values of all heads."""
        if not self.expand:
            return [query, *keys]
        return [query, *(key.repeat_interleave(len(query) // len(key), 0) for key in keys)]

    def refusal(self, query: torch.Tensor, key: torch.Tensor) -> str | None:
        """Why the backend does not take such tensors; None where it does."""
        few = key[:, :256]
        try:
            self(*self.inputs(query[:, :256], few, few))
        except RuntimeError as error:
            return str(error).splitlines()[0]
        return None


CUDNN = Dense("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION, False)
CUDNN_EXPANDED = Dense("SDPA cuDNN, KV expanded", SDPBackend.CUDNN_ATTENTION, True)
FLASH = Dense("SDPA flash", SDPBackend.FLASH_ATTENTION, False)


def dense_baseline(query: torch.Tensor, key: torch.Tensor) -> Dense:
    """The fastest SDPA backend that takes these tensors: cuDNN, or flash, named."""
    if query.device.type != "cuda":
        return Dense("SDPA default", None, False)
    for choice in (CUDNN, CUDNN_EXPANDED, FLASH):
        if choice.refusal(query, key) is None:
            return choice
    raise SystemExit("neither SDPA's cuDNN nor its flash backend takes these tensors")


def _causal(_b: object, _h: object, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
    return q_index >= k_index


class Flex:
    """FlexAttention, compiled for each shape, with a BlockMask of the same blocks."""

    name = "FlexAttention"

    def __init__(self) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        self.function = torch.compile(flex_attention, dynamic=False)

    def sparse(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lists: BlockLists
    ) -> Call:
        """The call for lists that hold each row's diagonal block, which alone is masked."""
        from torch.nn.attention.flex_attention import BlockMask

        counts, tiles = _padded(lists)
        diagonal = tiles.gather(3, (counts[..., None] - 1).long()).contiguous()
        mask = BlockMask.from_kv_blocks(
            torch.ones_like(counts),
            diagonal,
            counts - 1,
            tiles,
            BLOCK_SIZE=lists.block_size,
            mask_mod=_causal,
            seq_lengths=(query.shape[1], key.shape[1]),
            compute_q_blocks=False,
        )
        tensors = (query[None], key[None], value[None])
        return lambda: self.function(*tensors, block_mask=mask, enable_gqa=True)


class FlashAttention4:
    """FlashAttention-4's own calls: dense, and with its lists made beforehand."""

    name = "FlashAttention-4"

    def dense(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Call:
        from flash_attn.cute import flash_attn_func

        tensors = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
        return lambda: flash_attn_func(*tensors, causal=True)[0][0].transpose(0, 1)

    def sparse(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lists: BlockLists
    ) -> Call:
        """The call for lists of blocks of 128 tokens."""
        from flash_attn.cute import flash_attn_func
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        counts, tiles = _padded(lists)
        none = torch.zeros(1, 1, lists.n_q, dtype=torch.int32, device=lists.device)
        size = (lists.block_size, lists.block_size)
        blocks = BlockSparseTensorsTorch(counts, tiles, none, none[..., None], block_size=size)
        tensors = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]

        def call() -> torch.Tensor:
            out, _ = flash_attn_func(*tensors, causal=True, block_sparse_tensors=blocks)
            return out[0].transpose(0, 1)

        return call


def _padded(lists: BlockLists) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts `[1, H, n_q]` and blocks `[1, H, n_q, n_k]`, both int32, first the listed ones."""
    bitmap = lists.to_bitmap()[lists.head_to_list.long()]
    # A stable sort: the listed blocks stay in ascending order.
    tiles = torch.stack(
        [head.int().argsort(dim=-1, descending=True, stable=True) for head in bitmap]
    )
    return bitmap.sum(-1, dtype=torch.int32)[None], tiles.int()[None]


def failures() -> tuple[type[Exception], ...]:
    """What the kernels of others raise where they do not take a call, or have no memory for it.

    SDPA and torch.compile raise kinds of RuntimeError, FlashAttention-4 asserts and refuses values,
    and its compiler has an error of its own.
    """
    compiler = getattr(sys.modules.get("cutlass.cutlass_dsl"), "DSLRuntimeError", None)
    found = (RuntimeError, ImportError, AssertionError, ValueError)
    return found if compiler is None else (*found, compiler)


def missing_baseline(name: str, query: torch.Tensor, key: torch.Tensor) -> str | None:
    """Why a baseline cannot be timed on these tensors; None where it can."""
    if query.device.type != "cuda":
        return "needs a CUDA GPU"
    if name == "fa4":
        return _missing_flash_attention_4(query.device)
    if name in ("cudnn", "flash"):
        return (CUDNN if name == "cudnn" else FLASH).refusal(query, key)
    return None


def _missing_flash_attention_4(device: torch.device) -> str | None:
    """Why FlashAttention-4 cannot be timed on a GPU; None where it can."""
    if (
        importlib.util.find_spec("flash_attn") is None
        or importlib.util.find_spec("cutlass") is None
    ):
        return "needs flash-attn-4 and nvidia-cutlass-dsl: pip install --group bench"
    capability = torch.cuda.get_device_capability(device)
    # Its Blackwell kernel takes lists for 256 query rows at a time, its others take none.
    if capability[0] != 9:
        return f"needs compute capability 9, got {capability[0]}.{capability[1]}"
    return None
