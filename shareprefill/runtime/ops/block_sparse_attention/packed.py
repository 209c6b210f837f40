"""Causal attention over listed key blocks, for sequences that lie one after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.block_sparse_attention import blockwise, reference
from shareprefill.runtime.ops.blocks import BlockLists, count_blocks
from shareprefill.runtime.ops.inputs import (
    check_attention_inputs,
    check_sinks,
    check_softcap,
    resolve_scale,
    select_impl,
    unit_last_stride,
)

IMPLS = ("reference", "blockwise", "triton")


@torch.no_grad()
def packed_block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: Sequence[BlockLists],
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`block_sparse_attention` of sequences of different lengths, on a GPU in one launch.

    Sequence i has the queries `cu_seqlens_q[i] : cu_seqlens_q[i + 1]` and the keys
    `cu_seqlens_k[i] : cu_seqlens_k[i + 1]`, and its queries are the last of its tokens. A CUDA
    device is not waited for; a new layout (block counts of the sequences) copies a few numbers
    to it. No gradients.

    Args:
        query: `[H, T, D]`, as for `block_sparse_attention`; T is the sum of the query lengths.
        key: `[G, S, D]`, S is the sum of the key lengths.
        value: `[G, S, Dv]`.
        lists: one of each sequence, of one block size, on query's device.
        cu_seqlens_q: int32 `[n + 1]` on query's device, from 0 up to T. On CUDA only the shape is
            checked, and that each sequence's blocks are those of its lists is up to the caller.
        cu_seqlens_k: int32 `[n + 1]`, from 0 up to S.
        scale: factor of the logits; None: `1 / sqrt(D)`.
        softcap: bound of the scaled logits, see `block_sparse_attention`.
        sinks: floating-point `[H]`, see `block_sparse_attention`.
        out: `[H, T, Dv]` of query's dtype with a contiguous last dim, written in place; needed
            where a head's pattern is -1, as such a head's rows are left untouched.
        return_lse: also return the log-sum-exp of each row's logits.
        impl: "auto" (Triton on CUDA, blockwise elsewhere), "reference", "blockwise" or "triton".

    Returns:
        `(out, lse)`: `[H, T, Dv]` in query's dtype, and float32 `[H, T]` with `return_lse`, else
        None.

    Raises:
        ConfigError: shapes, dtypes, devices, lengths or lists do not belong together.
        UnsupportedError: the requested implementation cannot run here.
    """
    check_attention_inputs(query, key, value)
    check_softcap(softcap)
    check_sinks(sinks, query)
    _check_lists(query, lists)
    for name, ends in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_ends(name, ends, len(lists), query.device)
    if query.device.type == "cpu":
        _check_lengths(query, key, lists, cu_seqlens_q, cu_seqlens_k)
    impl = select_impl(impl, IMPLS, query, "blockwise")
    out = _output(query, value, lists, out)
    lse = None
    if return_lse:
        lse = torch.full(out.shape[:2], -torch.inf, dtype=torch.float32, device=out.device)
    query, key, value = unit_last_stride(query), unit_last_stride(key), unit_last_stride(value)
    scale = resolve_scale(scale, query.shape[2])
    sinks = None if sinks is None else sinks.detach().float().contiguous()
    if impl == "triton":
        from shareprefill.runtime.ops.block_sparse_attention import triton

        triton.attend_packed(
            query,
            key,
            value,
            lists,
            cu_seqlens_q,
            cu_seqlens_k,
            scale,
            out,
            lse,
            softcap,
            sinks,
        )
        return out, lse
    attend = reference.attend if impl == "reference" else blockwise.attend
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for place, each in enumerate(lists):
        queries = slice(q_ends[place], q_ends[place + 1])
        keys = slice(k_ends[place], k_ends[place + 1])
        attend(
            query[:, queries],
            key[:, keys],
            value[:, keys],
            each,
            scale,
            out[:, queries],
            None if lse is None else lse[:, queries],
            softcap,
            sinks,
        )
    return out, lse


def _check_lists(query: torch.Tensor, lists: Sequence[BlockLists]) -> None:
    if not lists:
        raise ConfigError("lists must hold the BlockLists of at least one sequence")
    for place, each in enumerate(lists):
        if each.block_size != lists[0].block_size:
            raise ConfigError(
                f"all lists must have one block_size, got {lists[0].block_size} for sequence 0 "
                f"and {each.block_size} for sequence {place}"
            )
        if len(each.head_to_list) != len(query) or each.device != query.device:
            raise ConfigError(
                f"lists of sequence {place} must name a pattern for each of {len(query)} query "
                f"heads on {query.device}, got {len(each.head_to_list)} on {each.device}"
            )
        if query.device.type == "cpu":
            each.validate()


def _check_ends(name: str, ends: torch.Tensor, n_sequences: int, device: torch.device) -> None:
    if ends.dtype != torch.int32 or ends.shape != (n_sequences + 1,) or ends.device != device:
        raise ConfigError(
            f"{name} must be int32 [{n_sequences + 1}] on {device} for {n_sequences} lists, "
            f"got {ends.dtype} of shape {tuple(ends.shape)} on {ends.device}"
        )


def _check_lengths(
    query: torch.Tensor,
    key: torch.Tensor,
    lists: Sequence[BlockLists],
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> None:
    for name, ends, total in (
        ("cu_seqlens_q", cu_seqlens_q, query.shape[1]),
        ("cu_seqlens_k", cu_seqlens_k, key.shape[1]),
    ):
        if int(ends[0]) != 0 or int(ends[-1]) != total:
            raise ConfigError(
                f"{name} must run from 0 to {total}, got {int(ends[0])} to {int(ends[-1])}"
            )
    lengths = zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True)
    for place, ((n_q, n_k), each) in enumerate(zip(lengths, lists, strict=True)):
        if not 1 <= n_q <= n_k:
            raise ConfigError(
                f"sequence {place} needs 1 <= queries <= keys, got {n_q} queries and {n_k} keys"
            )
        blocks = (count_blocks(n_q, each.block_size), count_blocks(n_k, each.block_size))
        if (each.n_q, each.n_k) != blocks:
            raise ConfigError(
                f"lists of sequence {place} are for {each.n_q} x {each.n_k} blocks of "
                f"{each.block_size} tokens, its queries and keys make {blocks[0]} x {blocks[1]}"
            )


def _output(
    query: torch.Tensor,
    value: torch.Tensor,
    lists: Sequence[BlockLists],
    out: torch.Tensor | None,
) -> torch.Tensor:
    shape = (*query.shape[:2], value.shape[2])
    if out is None:
        if query.device.type != "cpu":
            return query.new_zeros(shape)
        if any(bool((each.head_to_list < 0).any()) for each in lists):
            raise ConfigError("a pattern leaves heads out (-1); give `out`, whose rows they keep")
        return query.new_empty(shape)
    if out.shape != shape or out.dtype != query.dtype or out.device != query.device:
        raise ConfigError(
            f"out must be {query.dtype} of shape {shape} on {query.device}, "
            f"got {out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )
    if out.stride(-1) != 1:
        raise ConfigError(f"out must have a contiguous last dim, got strides {out.stride()}")
    return out
