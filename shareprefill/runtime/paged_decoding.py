"""Decode steps of an engine's requests, whose keys and values lie in pages.

As `decoding`, whose sketch and prices these are, with nothing that belongs to a request: codes of
keys lie beside their pages, in coordinates that hold for all requests, and one price holds for all
rows. So requests may come, go, share pages and change places as an engine likes. It calls

    decoding = PagedDecoding(layers=range(32), ..., density=0.2)
    decoding.write(layer, keys, slots)  # at every step, once the new keys lie in their pages
    decoding.learn(layer, query, key, keys)  # with the rows of long prompts
    if decoding.ready:
        decoding.begin_step(lengths)  # before the first layer of a step with decode rows
        out = decoding.attend(layer, query, keys, values, tables, lengths, most_tokens=N, scale=s)

All but `learn` may be in a CUDA graph, which holds for all later steps of as many rows, and nothing
waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shareprefill.errors import UnsupportedError
from shareprefill.runtime.decoding import (
    BLOCK,
    LEAST_COORDINATES,
    LOCAL,
    Price,
    basis_rows,
    basis_step,
    head_weights,
    moments_of,
    rank_of,
    relative_effect,
)
from shareprefill.runtime.ops.block_sparse_decoding import block_sparse_decoding
from shareprefill.runtime.ops.pages import PagedBatch, PagedTokens, Tokens
from shareprefill.runtime.ops.sketched_selection import (
    Basis,
    Moments,
    make_basis,
    select_blocks,
    write_codes,
)
from shareprefill.runtime.rules.base import Exchange

# Calls of `learn` that count: the coordinates are chosen anew at the first, second, fourth, ...
MOST_PROMPTS = 64
# Keys that are sketched at once: bounds the memory of their numbers, and of a CPU's copies.
_PIECE = 1 << 16


class _LayerCodes:
    """Coordinates of one layer's keys, and the codes beside its pages.

    Args:
        groups: G.
        dim: Of keys.
        device: Of the pages.

    Attributes:
        basis: Its tensors `[G, ...]`, always the same ones, where graphs find them.
        words: int32 `[pages, G, r / 8, page size]`; None before keys were written.
        is_chosen: Whether a prompt has chosen the basis: before, it is of zeros.
    """

    def __init__(self, groups: int, dim: int, device: torch.device) -> None:
        make = {"dtype": torch.float32, "device": device}
        axes = (torch.zeros(groups, rank_of(dim), dim, **make) for _ in range(2))
        self.basis = Basis(torch.zeros(groups, dim, **make), *axes)
        self.words: Tensor | None = None
        self.is_chosen = False
        self._moments: Moments | None = None
        self._prompts = 0

    def learn(self, query: Tensor, key: Tokens) -> bool:
        """Notes a prompt, and says whether the coordinates were chosen anew."""
        self._prompts += 1
        if self._prompts > MOST_PROMPTS:
            return False
        found = moments_of(basis_rows(query), _some_keys(key), key.shape[0])
        before = self._moments or Moments(*(torch.zeros_like(t) for t in vars(found).values()))
        # Numbers that are not finite would stay for all requests to come.
        sums = torch.stack([t.sum() for t in vars(found).values()])
        is_finite = sums.isfinite().all()
        pairs = zip(vars(found).values(), vars(before).values(), strict=True)
        found = Moments(*(torch.where(is_finite, new, old) for new, old in pairs))
        if self._moments is not None:
            found = self._moments.with_another(found, self._prompts)
        self._moments = found
        if self._prompts & (self._prompts - 1):
            return False
        basis = make_basis(found, rank_of(key.shape[2]))
        self.basis.mean.copy_(basis.mean)
        self.basis.query.copy_(basis.query)
        self.basis.key.copy_(basis.key)
        self.is_chosen = True
        return True

    def write(self, pool: Tensor, slots: Tensor) -> None:
        """Writes codes of some keys."""
        pages, groups, size, _ = pool.shape
        shape = pages, groups, self.basis.key.shape[1] // 8, size
        if self.words is None or self.words.shape != shape:
            self.words = torch.zeros(shape, dtype=torch.int32, device=pool.device)
            if self.is_chosen:  # Another cache than before.
                self.write_all(pool)
        write_codes(pool, slots, self.basis, self.words)

    def write_all(self, pool: Tensor) -> None:
        """Writes codes of all that lies in the pages, written or not."""
        slots = torch.arange(pool.shape[0] * pool.shape[2], dtype=torch.int64, device=pool.device)
        for piece in slots.split(_PIECE):
            self.write(pool, piece)


def _some_keys(key: Tokens) -> Tensor:
    """Those of a prompt's keys that choose the coordinates, `[G, M, D]`."""
    step = basis_step(key.shape[1])
    if not isinstance(key, PagedTokens):
        return key[:, ::step]
    places = torch.arange(0, key.n_tokens, step, dtype=torch.int64, device=key.device)
    pages = key.table[places // key.page_size].long()
    return key.pool[pages, :, places % key.page_size].transpose(0, 1)


class _Budget:
    """What the rows of a step read, and may read next, at one price.

    Args:
        density: Asked for.
        harm: What lost attention of KV heads does, float32 `[L, G]`.
        rows: Of a step at most.

    Attributes:
        counts: Blocks that rows read in this step, int32 `[L, rows, G]`; 0 of rows that are none.
        worth: What blocks must be worth in this step, float32 `[L, rows, G]`.
    """

    def __init__(self, density: float, harm: Tensor, rows: int) -> None:
        self._price, self._harm = Price(density, (1,), harm.device), harm
        layers, groups = harm.shape
        device = harm.device
        self.counts = torch.zeros((layers, rows, groups), dtype=torch.int32, device=device)
        make = {"dtype": torch.float32, "device": device}
        self.worth = torch.zeros((layers, rows, groups), **make)
        # Rows whose reading counts, and the blocks that they have.
        self._counted = torch.zeros(rows, **make)
        self._there = torch.zeros(1, **make)
        # Steps of rows, blocks read, and blocks that there were.
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)
        self._rows = torch.zeros(1, **make)

    def settle(self, exchange: Exchange | None) -> None:
        """Changes the price by what the last step read, and forgets the step."""
        read = self.counts.sum((0, 2), dtype=torch.float32) @ self._counted
        read = torch.stack((read[None], self._there))  # [2, 1]
        if exchange is not None:
            exchange.sum(read)
        read, there = read
        self._price.settle(read / there.clamp(min=1), there > 0)
        self.totals.add_(torch.cat((self._rows, read, there)))
        self.counts.zero_()

    def begin(self, lengths: Tensor, sparse: Tensor | None) -> None:
        """Sets what blocks must be worth in a step; arguments as in `PagedDecoding.begin_step`."""
        counted = lengths > 0
        if sparse is not None:
            counted = counted & sparse
        blocks = (lengths + (BLOCK - 1)) // BLOCK * counted
        layers, _, groups = self.counts.shape
        self._there.copy_(blocks.sum() * (layers * groups))
        self._rows.copy_(counted.sum())
        self._counted.zero_()
        rows = len(lengths)
        self._counted[:rows] = counted
        worth = self._price.over(self._harm)
        # Whatever its worth, every block is read where none need be worth anything.
        self.worth[:, :rows] = worth[:, None] * self._counted[:rows, None]


class PagedDecoding:
    """Decode steps over pages that read a share of the key blocks.

    Args:
        layers: Those that this process decodes sparsely, ascending.
        n_heads: Query heads of this process.
        n_groups: KV heads of this process.
        head_dim: Of keys.
        max_rows: Requests of a step at most.
        device: Of the pages.
        density: Blocks to be read over all blocks, in (0, 1], mean over rows, layers and KV heads.
        effect: What lost attention of a head changes, of all layers and heads of the model, float
            `[L, H]`; None where it is not known, and all heads count alike.
        heads: The model's heads that this process holds; None: all.
        exchange: Of the processes that share the heads; None: this one has all.

    Raises:
        UnsupportedError: heads are too small for a sketch.
    """

    def __init__(
        self,
        *,
        layers: Sequence[int],
        n_heads: int,
        n_groups: int,
        head_dim: int,
        max_rows: int,
        device: torch.device,
        density: float,
        effect: Tensor | None = None,
        heads: range | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        if head_dim < LEAST_COORDINATES:
            raise UnsupportedError(
                f"sparse decode steps need heads of at least {LEAST_COORDINATES} dims, got "
                f"{head_dim}: decode densely"
            )
        if effect is None:
            mine = torch.ones((len(layers), n_heads), dtype=torch.float64, device="cpu")
        else:
            mine = relative_effect(effect[list(layers)])
            mine = mine if heads is None else mine[:, heads.start : heads.stop]
        share, harm = (t.to(device) for t in head_weights(mine, n_groups))
        self._share, self._budget = share, _Budget(density, harm, max_rows)
        self._places = {layer: place for place, layer in enumerate(layers)}
        self._codes = [_LayerCodes(n_groups, head_dim, device) for _ in layers]
        self._exchange = exchange
        self._token_bytes = n_groups * rank_of(head_dim) // 2

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the codes of one token in one layer."""
        return self._token_bytes

    @property
    def ready(self) -> bool:
        """Whether every layer has coordinates, which the first prompt gives it."""
        return all(codes.is_chosen for codes in self._codes)

    def write(self, layer: int, pool: Tensor, slots: Tensor) -> None:
        """Writes codes of keys that were written into pages.

        Args:
            layer: Layer index in the model.
            pool: Pages of keys `[pages, G, page size, D]`, in any strides.
            slots: int64 `[T]`: page times page size plus the place in it; negative: none.
        """
        self._codes[self._places[layer]].write(pool, slots)

    def learn(self, layer: int, query: Tensor, key: Tokens, pool: Tensor) -> None:
        """Notes a long prompt, or a chunk of it: after 1, 2, 4, ... the coordinates are chosen.

        Coordinates are those of the prompts so far, whoever sent them, and fixed after the last of
        `MOST_PROMPTS`.

        Args:
            layer: Layer index in the model.
            query: `[H, Nq, D]`.
            key: `[G, Nk, D]`, up to the last of these rows.
            pool: Pages of keys, in which all keys of the requests lie.
        """
        codes = self._codes[self._places[layer]]
        if codes.learn(query, key):
            codes.write_all(pool)

    def begin_step(self, lengths: Tensor, sparse: Tensor | None = None) -> None:
        """Begins a step, before its first layer: settles what the last one read.

        It may be in the graph of the step, or before it.

        Args:
            lengths: Keys of the rows that `attend` is given in the step, the newest among them,
                int32 `[rows]`; 0 for a row that is none.
            sparse: Rows that are to be read sparsely, bool `[rows]`; the others read every block,
                in the same kernels, and count for nothing. None: all.
        """
        self._budget.settle(self._exchange)
        self._budget.begin(lengths, sparse)

    def attend(
        self,
        layer: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        lengths: Tensor,
        *,
        most_tokens: int,
        scale: float,
        out: Tensor | None = None,
    ) -> Tensor:
        """One layer's attention of the newest token of every request.

        Args:
            layer: Layer index in the model.
            query: `[rows, H, D]`.
            keys: Pages `[pages, G, page size, D]`; what lies behind a request's last token may be
                anything.
            values: Pages `[pages, G, page size, Dv]`.
            tables: Each request's pages in the order of its tokens, int32 `[rows, m]`.
            lengths: As in `begin_step`.
            most_tokens: At least the longest, known without asking the device.
            scale: The model's factor on the logits.
            out: `[rows, H, Dv]`, contiguous, written in place; None: a new one.

        Returns:
            `[rows, H, Dv]`; zeros for rows of length 0.
        """
        place = self._places[layer]
        codes, rows = self._codes[place], len(query)
        assert codes.words is not None, "keys are written first"
        basis = Basis(*(t[None] for t in (codes.basis.mean, codes.basis.query, codes.basis.key)))
        key, value = (PagedBatch(pool, tables, most_tokens) for pool in (keys, values))
        blocks, counts = select_blocks(
            *(query, key, codes.words, basis, self._share[place], self._budget.worth[place, :rows]),
            block_size=BLOCK,
            local=LOCAL,
            lengths=lengths,
            scale=scale,
            counts=self._budget.counts[place, :rows],
        )
        return block_sparse_decoding(
            *(query, key, value, blocks, counts),
            block_size=BLOCK,
            lengths=lengths,
            scale=scale,
            out=out,
        )

    def report(self) -> tuple[int, float]:
        """Steps of rows since the beginning, and the density that they read; waits for the device.

        The newest step counts with the next one.
        """
        rows, read, there = self._budget.totals.tolist()
        return int(rows), read / there if there else 1.0

    def reset(self) -> None:
        """Forgets what the report says."""
        self._budget.totals.zero_()
