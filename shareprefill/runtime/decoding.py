"""Decode steps on plain tensors: a layer reads few key blocks, chosen by a sketch of the keys.

Like `core`, it knows no framework. Who calls it keeps a `DecodeState` for the sequences of a cache,
shows it the prompt's queries, and gives it step after step, layers in ascending order:

    decoding = SparseDecoding(density=0.2)
    state = decoding.begin([0] * batch)
    decoding.read_prompt(layer, state, query)  # of every layer
    output, record = decoding.attend(layer, state, query, key, value, scale=scale)

Nothing is evicted: every step chooses among all keys. All decisions are made on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shareprefill.artifact import Artifact
from shareprefill.config import DECODE_DENSITY, RuntimeConfig
from shareprefill.runtime.ops.block_sparse_decoding import block_sparse_decoding
from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.ops.sketched_selection import (
    Basis,
    Moments,
    make_basis,
    select_blocks,
    sketch_keys,
)

# Tokens of a key block: what a KV head reads of all its keys, or does not.
BLOCK = 32
# The newest tokens, whose blocks every step reads.
LOCAL = 64
# Coordinates of a key in the sketch, of four bits each, and the least that a sketch has.
COORDINATES, LEAST_COORDINATES = 24, 8
# Of the prompt's last rows, one in so many has queries that choose the coordinates.
PROMPT_ROWS, PROMPT_EVERY = 2048, 8
# Keys that the coordinates are chosen by at most, evenly drawn: moments need no more.
_BASIS_KEYS = 8192
# Keys that are sketched at once: bounds the memory of their copies.
_PIECE = 16384
# Room of a sketch for tokens to come: at least so many, and a share of those it has.
_ROOM, _ROOM_SHARE = 1024, 8
# The price of reading that sequences begin with, in powers of 2: most blocks are worth it.
_FIRST_PRICE = -10.0
# What a step reads above the density that was asked for, over it, counts up to here.
_MOST_ABOVE = 2.0


@dataclass(frozen=True, eq=False)
class DecodeRecord:
    """What one layer read at one step.

    Attributes:
        counts: Blocks read, int32 `[B, G]`.
        blocks: Those that there are, of all sequences and KV heads together.
    """

    counts: Tensor
    blocks: int


@dataclass(eq=False)
class _KeySketch:
    """The keys of one layer, as far as they are sketched.

    Attributes:
        query: Some of the prompt's last queries, `[B, H, rows, D]`, one in `PROMPT_EVERY`; None
            once the coordinates are chosen.
        basis: Coordinates, once a step has needed them.
        words: Codes, int32 `[B, G, r / 8, room]`.
        done: Tokens of each piece of `DecodeState.pieces` that are sketched.
    """

    query: Tensor | None
    basis: Basis | None = None
    words: Tensor | None = None
    done: list[int] = field(default_factory=list)

    def grow(self, key: Tensor, pieces: Sequence[tuple[slice, int]]) -> tuple[Basis, Tensor]:
        """Sketches the blocks that no step need read, and gives basis and codes.

        Args:
            key: `[B, G, N, D]`.
            pieces: Rows that begin at one token, and that token.
        """
        batch, groups, tokens, _ = key.shape
        if self.basis is None:
            assert self.query is not None
            self.basis, self.query = _basis_of(self.query, key, pieces), None
            self.done = [0] * len(pieces)
        rank = self.basis.key.shape[2]
        if self.words is None or self.words.shape[3] < tokens:
            room = tokens + max(_ROOM, tokens // _ROOM_SHARE)
            # Rows of whole blocks begin where wide loads may.
            room = count_blocks(room, BLOCK) * BLOCK
            words = torch.empty(
                (batch, groups, rank // 8, room), dtype=torch.int32, device=key.device
            )
            if self.words is not None:
                words[..., : self.words.shape[3]] = self.words
            self.words = words
        for piece, (rows, start) in enumerate(pieces):
            older = (tokens - start - LOCAL) // BLOCK * BLOCK
            basis = Basis(self.basis.mean[rows], self.basis.query[rows], self.basis.key[rows])
            while self.done[piece] < older:
                first = self.done[piece]
                last = min(first + _PIECE, older)
                codes = sketch_keys(key[rows, :, start + first : start + last], basis)
                self.words[rows, ..., first:last] = codes
                self.done[piece] = last
        return self.basis, self.words


def _basis_of(query: Tensor, key: Tensor, pieces: Sequence[tuple[slice, int]]) -> Basis:
    """Coordinates of every sequence, of its own queries and keys but the newest."""
    groups, tokens, dim = key.shape[1:]
    found = []
    for rows, start in pieces:
        prompt = tokens - 1 - start
        # A short sequence has fewer rows than were kept: others are padding.
        mine = query[rows, :, -count_blocks(prompt, PROMPT_EVERY) :]
        keys = key[rows, :, start : -1 : basis_step(prompt)]
        found.append(make_basis(moments_of(mine, keys, groups), rank_of(dim)))
    parts = ([getattr(basis, name) for basis in found] for name in ("mean", "query", "key"))
    return Basis(*(torch.cat(part).contiguous() for part in parts))


def rank_of(dim: int) -> int:
    """Coordinates of a sketch of keys of some dims."""
    return min(COORDINATES, dim // 8 * 8)


def basis_rows(query: Tensor) -> Tensor:
    """Those of a prompt's queries, `[..., N, D]`, that choose the coordinates."""
    last = query[..., -PROMPT_ROWS:, :]
    return last[..., (last.shape[-2] - 1) % PROMPT_EVERY :: PROMPT_EVERY, :]


def basis_step(tokens: int) -> int:
    """One in so many of a prompt's keys chooses the coordinates."""
    return max(1, -(-tokens // _BASIS_KEYS))


def moments_of(query: Tensor, key: Tensor, groups: int) -> Moments:
    """Of queries `[..., H, rows, D]`, a KV head's all together, and keys `[..., G, N, D]`."""
    return Moments.of(query.unflatten(-3, (groups, -1)).flatten(-3, -2), key)


def effect_of(artifact: Artifact | None) -> Tensor | None:
    """What lost attention of a head changes in decode steps, `[L, H]`; None where it is not known.

    Where an artifact knows of prefills alone, it is theirs.
    """
    if artifact is None:
        return None
    return artifact.effect if artifact.step_effect is None else artifact.step_effect


def density_of(config: RuntimeConfig) -> float:
    """Blocks that sparse decode steps are to read over all blocks."""
    return DECODE_DENSITY if config.decode_density is None else config.decode_density


def relative_effect(effect: Tensor) -> Tensor:
    """Effects `[L, H]` over their mean; a head without any counts a little, an unknown one as 1."""
    effect = effect.double().cpu()
    relative = effect / effect.nanmean().clamp(min=1e-30)
    return relative.clamp(min=1e-3).nan_to_num(1.0)


def head_weights(effect: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Weights of query heads in their KV head `[L, H]`, and the harm of KV heads `[L, G]`.

    The harm of a KV head of mean effect is 1.

    Args:
        effect: `[L, H]` (`relative_effect`).
        groups: G.
    """
    effect = effect.float().unflatten(1, (groups, -1))
    return (effect / effect.sum(2, keepdim=True)).flatten(1), effect.mean(2)


class Price:
    """What reading a block costs, so that steps read the density asked for on average.

    It holds for many layers and heads, and changes from step to step by what they have read: so
    blocks are read where they change the predictions most. Its tensors stay where they are, as
    graphs want it.

    Args:
        density: Asked for.
        shape: Of the prices, if each of some has one of its own.
        device: Where steps are.
    """

    def __init__(self, density: float, shape: tuple[int, ...], device: torch.device) -> None:
        self._density = density
        first = _FIRST_PRICE if density < 1 else -torch.inf
        self._log2 = torch.full(shape, first, dtype=torch.float32, device=device)
        self._steps = torch.zeros(1, dtype=torch.float32, device=device)

    def settle(self, share: Tensor, was_step: Tensor | float = 1.0) -> None:
        """Sets the price of the next step.

        Args:
            share: Blocks that the last step read over those that there were, in the prices' shape.
            was_step: 0: there was none, and nothing changes; otherwise 1.
        """
        # Large steps at first, small ones later: a step that needs more than others may have it.
        gain = (8 / (8 + self._steps)).clamp(min=1 / 4)
        # By the difference, not the ratio: it is the mean over steps that is asked for.
        above = (share / self._density - 1).clamp(max=_MOST_ABOVE)
        self._log2.add_(gain * above * was_step).clamp_(max=40)
        self._steps.add_(was_step)

    def over(self, harm: Tensor) -> Tensor:
        """What blocks must be worth to be read: the price by the harm of losing them."""
        return self._log2.exp2() / harm


class _Budget:
    """What the steps of some sequences have read, and may read next.

    Neighbours in a batch have prices of their own.

    Args:
        batch: B, sequences.
        density: Asked for.
        harm: What lost attention of KV heads does, float32 `[L, 1, G]`; one for all layers: `[1]`.

    Attributes:
        worth: What blocks must be worth, float32 `[L, B, G]`.
    """

    def __init__(self, batch: int, density: float, harm: Tensor) -> None:
        self._price, self._harm = Price(density, (batch, 1), harm.device), harm
        self.worth = self._price.over(harm)
        self._counts: list[Tensor] = []
        self._blocks: Tensor | int = 1

    def spend(self, counts: Tensor, blocks: Tensor | int) -> None:
        """Notes what a layer read.

        Args:
            counts: Blocks, int32 `[B, G]`.
            blocks: Those of a KV head of every sequence, `[B, 1]`; a number for one of all.
        """
        self._counts.append(counts)
        self._blocks = blocks

    def settle(self) -> None:
        """Sets the price of the next step."""
        if not self._counts:
            return
        counts = torch.cat(self._counts, 1).float()
        self._price.settle(counts.mean(1, keepdim=True) / self._blocks)
        self.worth = self._price.over(self._harm)
        self._counts = []


@dataclass(eq=False)
class DecodeState:
    """What the steps of the sequences of one cache share.

    Attributes:
        starts: The first token of every sequence in the cache: what is before it is padding.
    """

    starts: tuple[int, ...]
    _sketches: dict[int, _KeySketch] = field(default_factory=dict)
    _budgets: dict[torch.device, _Budget] = field(default_factory=dict)
    _places: dict[torch.device, Tensor] = field(default_factory=dict)
    _tokens: int = -1

    @property
    def pieces(self) -> list[tuple[slice, int]]:
        """Rows that begin at one token, and that token."""
        if not any(self.starts):
            return [(slice(0, len(self.starts)), 0)]
        return [(slice(row, row + 1), start) for row, start in enumerate(self.starts)]

    def forget(self, layer: int) -> None:
        """Forgets what is known of a layer."""
        self._sketches.pop(layer, None)

    def places(self, device: torch.device) -> Tensor | None:
        """`starts` as operators take them, int32 `[B]`; None where all are 0."""
        if not any(self.starts):
            return None
        if device not in self._places:
            self._places[device] = torch.tensor(self.starts, dtype=torch.int32, device=device)
        return self._places[device]


class SparseDecoding:
    """Decode steps that read a share of the key blocks.

    Args:
        density: Blocks to be read over all blocks, in (0, 1], mean over steps, layers and KV heads.
        effect: What lost attention of a head changes (`Artifact.effect`), of the heads that this
            process holds, float `[L, H]`; None where it is not known, and all heads count alike.
    """

    def __init__(self, *, density: float, effect: Tensor | None = None) -> None:
        self.density, self.effect = density, effect
        self._weights: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def begin(self, starts: Sequence[int]) -> DecodeState:
        """The state of the sequences of a cache.

        Args:
            starts: The first token of every sequence in the cache.
        """
        return DecodeState(tuple(starts))

    def read_prompt(self, layer: int, state: DecodeState, query: Tensor) -> None:
        """Keeps queries of the last rows of a prompt, or of a chunk of it: steps look for the like.

        Args:
            layer: Layer index.
            state: Of the sequences; what it knew of the layer's keys is forgotten.
            query: `[B, H, N, D]`.
        """
        state._sketches[layer] = _KeySketch(basis_rows(query).clone())

    def knows(self, layer: int, state: DecodeState) -> bool:
        """Whether a layer's prompt was read."""
        return layer in state._sketches

    def attend(
        self,
        layer: int,
        state: DecodeState,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
    ) -> tuple[Tensor, DecodeRecord]:
        """One layer's attention of the newest token of every sequence.

        Args:
            layer: Layer index.
            state: Of the sequences, which has read the layer's prompt.
            query: `[B, H, D]`.
            key: `[B, G, N, D]`, up to the newest token; those before were in earlier calls, or in
                the prompt.
            value: `[B, G, N, Dv]`.
            scale: The model's factor on the logits.

        Returns:
            `[B, H, Dv]`, and what was read.
        """
        if key.shape[2] != state._tokens:
            for budget in state._budgets.values():
                budget.settle()
        state._tokens = key.shape[2]
        device, (batch, groups, tokens, _) = key.device, key.shape
        budget = state._budgets.get(device)
        if budget is None:
            harm = self._weights_of(groups, query.shape[1], device)[1]
            budget = state._budgets[device] = _Budget(batch, self.density, harm)
        basis, words = state._sketches[layer].grow(key, state.pieces)
        share = self._weights_of(groups, query.shape[1], device)[0]
        place = layer if len(share) > 1 else 0
        starts = state.places(device)
        blocks, counts = select_blocks(
            *(query, key, words, basis, share[place], budget.worth[place]),
            block_size=BLOCK,
            local=LOCAL,
            starts=starts,
            scale=scale,
        )
        out = block_sparse_decoding(
            *(query, key, value, blocks, counts), block_size=BLOCK, starts=starts, scale=scale
        )
        there = count_blocks(tokens, BLOCK)
        if starts is not None:
            there = (tokens - starts[:, None] + BLOCK - 1) // BLOCK
        budget.spend(counts, there)
        of_all = sum(count_blocks(tokens - start, BLOCK) for start in state.starts)
        return out, DecodeRecord(counts, of_all * groups)

    def _weights_of(self, groups: int, heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """As `head_weights`, harm as `[L, 1, G]`; where all heads count alike, L is 1."""
        found = self._weights.get(device)
        if found is None:
            effect = torch.ones((1, heads), dtype=torch.float64, device="cpu")
            if self.effect is not None:
                effect = relative_effect(self.effect)
            share, harm = (t.to(device) for t in head_weights(effect, groups))
            found = self._weights[device] = share, harm[:, None]
        return found
