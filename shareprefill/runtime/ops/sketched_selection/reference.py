"""Blocks that a decode step reads, written to be believed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from shareprefill.runtime.ops.pages import Cached, PagedBatch, batch_gathered
from shareprefill.runtime.ops.sketched_selection.sketch import (
    Basis,
    coordinates,
    query_coordinates,
    sketch_keys,
)

# Thresholds on a block's share of the attention are powers of 1 / sqrt(2), the first to so many.
THRESHOLDS = 63
# Blocks of a list that one program of the kernels holds.
MOST_BLOCKS = 32768


def select(
    query: Tensor,
    key: Cached,
    words: Tensor,
    basis: Basis,
    share: Tensor,
    worth: Tensor,
    block_size: int,
    local: int,
    lengths: Tensor | None,
    starts: Tensor | None,
    scale: float,
    blocks: Tensor,
    counts: Tensor,
) -> None:
    """Fill `blocks` and `counts`; arguments as in `select_blocks`, lists and `worth` of each."""
    groups, tokens = key.shape[1:3]
    if isinstance(key, PagedBatch):
        # As if the last dim were the head's.
        words = replace(key, pool=words.mT).gathered().mT
    key = batch_gathered(key)
    for batch in range(len(query)):
        stop = tokens if lengths is None else int(lengths[batch])
        start = 0 if starts is None else int(starts[batch])
        if stop <= start:
            counts[batch] = 0
            continue
        length = stop - start
        n = -(-length // block_size)
        for group in range(groups):
            place, base = (batch, group), (batch % len(basis.mean), group)
            mass = block_mass(
                query[batch].unflatten(0, (groups, -1))[group],
                *(key[place][start:stop], words[place][:, :length]),
                *(basis.mean[base], basis.query[base], share.view(groups, -1)[group]),
                *(block_size, local, scale),
            )
            always = always_read(length, block_size, local, key.device)
            places = places_of(mass).masked_fill(always, 0)
            # Where reading costs nothing, what a sketch says does not count.
            read = (worth[place] <= 0) | (places <= last_place(places, worth[place] / n))
            listed = read.nonzero()[:, 0]
            counts[place] = len(listed)
            blocks[place][: len(listed)] = listed


def write(key: Tensor, slots: Tensor, basis: Basis, words: Tensor) -> None:
    """Fill `words`; arguments as in `write_codes`."""
    slots = slots[slots >= 0]
    pages, rows = slots // key.shape[2], slots % key.shape[2]
    codes = sketch_keys(key[pages, :, rows].transpose(0, 1), basis)  # [G, r / 8, T]
    words[pages, :, :, rows] = codes.permute(2, 0, 1)


def always_read(length: int, block_size: int, local: int, device: torch.device) -> Tensor:
    """The first block and those of the newest tokens, bool `[n]`."""
    starts = torch.arange(0, length, block_size, device=device)
    return (starts == 0) | (starts + block_size > length - local)


def block_mass(
    query: Tensor,
    key: Tensor,
    words: Tensor,
    mean: Tensor,
    of_query: Tensor,
    share: Tensor,
    block_size: int,
    local: int,
    scale: float,
) -> Tensor:
    """Attention of one KV head's query heads by key block, as far as it is known, `[n]`.

    Keys of blocks that are always read are known; of others, their codes.
    """
    query, key = query.float(), key.float()
    parts = query_coordinates(query, of_query)
    guessed = query @ mean[:, None] + parts @ coordinates(words).T  # [R, N]
    always = always_read(len(key), block_size, local, key.device)
    known = always.repeat_interleave(block_size)[: len(key)]
    logits = torch.where(known, query @ key.T, guessed) * scale
    weights = share @ logits.softmax(-1)  # [N]
    missing = -len(key) % block_size
    return torch.nn.functional.pad(weights, (0, missing)).unflatten(0, (-1, block_size)).sum(1)


def places_of(mass: Tensor) -> Tensor:
    """The first threshold that each block's share reaches, from 1 on; `THRESHOLDS` + 1: none."""
    return (-2 * mass.log2()).ceil().clamp(1, THRESHOLDS + 1).int()


def last_place(places: Tensor, worth: Tensor) -> Tensor:
    """The last threshold whose blocks are still worth reading; 0 where none is.

    Those that reach it, and none before, take away as much as their number times the threshold
    times the mean of what is lost before and after. A block counts with the geometric mean of its
    threshold and the one before.

    Args:
        places: Of all blocks, 0 for those that are always read, int32 `[n]`.
        worth: Least product of lost attention and a block's own that pays for reading it.
    """
    numbers = torch.arange(1, THRESHOLDS + 1, device=places.device)
    counts = (places == numbers[:, None]).sum(1)
    mass = counts * torch.exp2(0.25 - numbers.float() / 2)
    lost = mass.flip(0).cumsum(0).flip(0) - mass / 2
    return (lost * torch.exp2(-numbers.float() / 2) >= worth).sum()
