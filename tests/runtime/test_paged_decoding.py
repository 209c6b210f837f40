"""Decode steps of an engine's requests, whose keys and values lie in pages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional as F

from shareprefill.errors import UnsupportedError
from shareprefill.runtime import paged_decoding
from shareprefill.runtime.decoding import (
    BLOCK,
    SparseDecoding,
    basis_rows,
    basis_step,
    moments_of,
)
from shareprefill.runtime.ops.pages import PagedBatch, PagedTokens
from shareprefill.runtime.ops.sketched_selection import Moments, make_basis, sketch_keys
from shareprefill.runtime.ops.sketched_selection.sketch import coordinates
from shareprefill.runtime.paged_decoding import PagedDecoding
from tests.support.decode_steps import WatchedSteps

L, H, G, D, SIZE, SCALE = 2, 4, 2, 16, 32, 0.25


class Sizes(NamedTuple):
    """Of a model and its pages."""

    heads: int = H
    groups: int = G
    dim: int = D
    page: int = SIZE
    pages: int = 200
    dtype: torch.dtype = torch.float32


SMALL, LARGE = Sizes(), Sizes(32, 8, 128, 16, 900, torch.bfloat16)


class Engine:
    """Requests of random tokens in pages, which come, go and share the pages of a prefix.

    Attributes:
        lengths: Tokens of each request so far.
        tables: Its pages.
    """

    def __init__(self, decoding: PagedDecoding, device: str = "cpu", sizes: Sizes = SMALL) -> None:
        self.decoding, self.device, self.sizes = decoding, device, sizes
        pages = sizes.pages
        shape = L, pages, sizes.groups, sizes.page, sizes.dim
        self.keys = torch.full(shape, torch.nan, dtype=sizes.dtype, device=device)
        self.values = torch.full(shape, torch.nan, dtype=sizes.dtype, device=device)
        self.free = torch.randperm(pages).tolist()
        self.lengths: list[int] = []
        self.tables: list[list[int]] = []

    def numbers(self, tokens: int, *heads: int) -> torch.Tensor:
        """Random `[*heads, tokens, D]` of unequal directions."""
        dim, device = self.sizes.dim, self.device
        sizes = torch.linspace(2, 0.2, dim, device=device) * (D / dim) ** 0.5
        return (torch.randn(*heads, tokens, dim, device=device) * sizes).to(self.sizes.dtype)

    def append(self, row: int, tokens: int, *, write: bool = True) -> torch.Tensor:
        """Puts tokens of a request into pages of every layer, and gives their slots."""
        size, groups = self.sizes.page, self.sizes.groups
        first = self.lengths[row]
        self.lengths[row] += tokens
        while len(self.tables[row]) * size < self.lengths[row]:
            self.tables[row].append(self.free.pop())
        place = torch.arange(first, self.lengths[row], dtype=torch.int64, device=self.device)
        pages = torch.tensor(self.tables[row], device=self.device)[place // size]
        slots = pages * size + place % size
        for layer in range(L):
            keys = self.numbers(tokens, groups)
            # What steps look for lies in a few runs of keys.
            keys[..., 100:140, :2] += 4.0
            self.keys[layer, pages, :, place % size] = keys.transpose(0, 1)
            values = self.numbers(tokens, groups)
            self.values[layer, pages, :, place % size] = values.transpose(0, 1)
            if write:
                self.decoding.write(layer, self.keys[layer], F.pad(slots, (0, 2), value=-1))
        return slots

    def prompt(self, tokens: int, prefix: Sequence[int] = (), *, learn: bool = True) -> int:
        """A new request, some of whose first pages are another's; gives its row."""
        self.lengths.append(len(prefix) * SIZE)
        self.tables.append(list(prefix))
        row = len(self.tables) - 1
        self.append(row, tokens - self.lengths[row])
        if learn:
            self.learn(row, [self.queries(tokens) for _ in range(L)])
        return row

    def queries(self, tokens: int) -> torch.Tensor:
        """Random queries that look for the same keys, `[H, tokens, D]`."""
        query = self.numbers(tokens, self.sizes.heads)
        query[..., :2] += 2.0
        return query

    def step_queries(self, rows: int) -> torch.Tensor:
        """Of one token of each of some rows, `[L, rows, H, D]`."""
        return torch.stack([self.queries(rows).transpose(0, 1) for _ in range(L)])

    def given(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables and lengths of a step of some rows, -1 for none."""
        most = max(len(table) for table in self.tables) + 1
        tables = torch.full((len(rows), most), -1, dtype=torch.int32, device=self.device)
        lengths = torch.zeros(len(rows), dtype=torch.int32, device=self.device)
        for place, row in enumerate(rows):
            if row >= 0:
                lengths[place] = self.lengths[row]
                mine = torch.tensor(self.tables[row], dtype=torch.int32, device=self.device)
                tables[place, : len(mine)] = mine
        return tables, lengths

    def learn(self, row: int, queries: Sequence[torch.Tensor]) -> None:
        table = torch.tensor(self.tables[row], device=self.device)
        for layer, query in enumerate(queries):
            key = PagedTokens(self.keys[layer], table, self.lengths[row])
            self.decoding.learn(layer, query, key, self.keys[layer])

    def sequence(self, row: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a request, `[1, G, N, D]`."""
        table = torch.tensor(self.tables[row], device=self.device)
        pools = (self.keys[layer], self.values[layer])
        found = [PagedTokens(pool, table, self.lengths[row]).gathered[None] for pool in pools]
        return found[0], found[1]

    def step(
        self, rows: Sequence[int], queries: torch.Tensor, sparse: list[bool] | None = None
    ) -> torch.Tensor:
        """One step of some rows, -1 for none, `[L, rows, H, D]`."""
        tables, lengths = self.given(rows)
        self.decoding.begin_step(lengths, None if sparse is None else torch.tensor(sparse))
        return torch.stack(
            [
                self.decoding.attend(
                    *(layer, queries[layer], self.keys[layer], self.values[layer]),
                    *(tables, lengths),
                    most_tokens=max(self.lengths),
                    scale=SCALE,
                )
                for layer in range(L)
            ]
        )


def made(
    density: float, device: str = "cpu", sizes: Sizes = SMALL, **options: Any
) -> PagedDecoding:
    heads, groups, dim = sizes[:3]
    given = {"n_heads": heads, "n_groups": groups, "head_dim": dim, "max_rows": 8}
    given |= {"device": torch.device(device)}
    return PagedDecoding(layers=range(L), density=density, **{**given, **options})


def test_at_density_1_it_is_dense_attention() -> None:
    engine = Engine(made(1.0))
    assert not engine.decoding.ready
    first = engine.prompt(700)
    assert engine.decoding.ready
    engine.prompt(433, prefix=engine.tables[first][:9], learn=False)
    engine.prompt(40, learn=False)
    for rows in ([0, 1, 2], [2, -1, 0]):
        for row in rows:
            if row >= 0:
                engine.append(row, 1)
        queries = engine.step_queries(len(rows))
        out = engine.step(rows, queries)
        for place, row in enumerate(rows):
            if row < 0:
                assert not out[:, place].any()
                continue
            for layer in range(L):
                expected = F.scaled_dot_product_attention(
                    queries[layer, place, None, :, None],
                    *engine.sequence(row, layer),
                    scale=SCALE,
                    enable_gqa=True,
                )[0, :, 0]
                torch.testing.assert_close(out[layer, place], expected, rtol=0, atol=1e-5)
    # The newest step is not settled.
    assert engine.decoding.report() == (3, 1.0)


def test_one_request_reads_what_it_would_in_a_session() -> None:
    effect = torch.rand(L, H) + 0.1
    engine, session = Engine(made(0.3, effect=effect)), SparseDecoding(density=0.3, effect=effect)
    row = engine.prompt(700, learn=False)
    prompt = [engine.queries(700) for _ in range(L)]
    engine.learn(row, prompt)
    state = session.begin([0])
    for layer, query in enumerate(prompt):
        session.read_prompt(layer, state, query[None])
    for _ in range(25):
        engine.append(row, 1)
        queries = engine.step_queries(1)
        out = engine.step([row], queries)
        for layer in range(L):
            expected, record = session.attend(
                layer, state, queries[layer], *engine.sequence(row, layer), scale=SCALE
            )
            torch.testing.assert_close(out[layer], expected, rtol=0, atol=1e-5)
            assert torch.equal(engine.decoding._budget.counts[layer, :1], record.counts)


def test_rows_may_be_dense_beside_sparse_ones() -> None:
    engine = Engine(made(0.2))
    # Before a prompt was read, too.
    rows = [engine.prompt(tokens, learn=False) for tokens in (500, 700)]
    for number in range(12):
        if number == 1:
            engine.learn(1, [engine.queries(700) for _ in range(L)])
        for row in rows:
            engine.append(row, 1)
        queries = engine.step_queries(2)
        out = engine.step(rows, queries, sparse=[False, number > 0])
        for layer in range(L):
            expected = F.scaled_dot_product_attention(
                queries[layer, 0, None, :, None],
                *engine.sequence(0, layer),
                scale=SCALE,
                enable_gqa=True,
            )[0, :, 0]
            torch.testing.assert_close(out[layer, 0], expected, rtol=0, atol=1e-5)
    engine.decoding.begin_step(torch.zeros(1, dtype=torch.int32))
    steps, density = engine.decoding.report()
    assert steps == 11
    assert density < 0.9


def test_steps_come_to_read_what_is_asked_for() -> None:
    engine = Engine(made(0.3))
    rows = [engine.prompt(600), engine.prompt(900), engine.prompt(333)]
    for number in range(70):
        if number == 40:
            engine.decoding.begin_step(torch.zeros(1, dtype=torch.int32))
            engine.decoding.reset()
        now = rows if number % 3 else [rows[number % 2]]
        for row in now:
            engine.append(row, 1)
        engine.step(now, engine.step_queries(len(now)))
    engine.decoding.begin_step(torch.zeros(1, dtype=torch.int32))
    steps, density = engine.decoding.report()
    assert steps == 20 * 3 + 10
    assert density == pytest.approx(0.3, rel=0.06)


def test_where_pages_are_and_who_has_them_does_not_matter() -> None:
    engine = Engine(made(0.3))
    for tokens in (500, 620, 700):
        engine.prompt(tokens)
    # The second one goes, and its pages become another's.
    engine.free += engine.tables[1][::-1]
    engine.lengths[1], engine.tables[1] = 0, []
    engine.append(1, 530)
    twin = Engine(made(0.3))
    order = torch.randperm(200)
    twin.lengths, twin.tables = list(engine.lengths), []
    twin.keys[:, order], twin.values[:, order] = engine.keys.clone(), engine.values.clone()
    twin.tables = [order[table].tolist() for table in engine.tables]
    twin.decoding._codes = engine.decoding._codes
    queries = engine.step_queries(3)
    out = engine.step([0, 1, 2], queries)
    for codes, keys in zip(twin.decoding._codes, twin.keys, strict=True):
        # Of another cache: all is written anew.
        codes.words = None
        codes.write(keys, torch.empty(0, dtype=torch.int64))
    moved = twin.step([2, 0, -1, 1], F.pad(queries, (0, 0, 0, 0, 0, 1))[:, [2, 0, 3, 1]])
    assert torch.equal(moved[:, [1, 3, 0]], out)


def test_coordinates_of_more_prompts_hold_for_all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_decoding, "MOST_PROMPTS", 4)
    engine = Engine(made(0.3))
    bases = []
    for number in range(6):
        engine.prompt(300 + number, learn=number != 1)
        codes = engine.decoding._codes[0]
        assert codes.words is not None
        bases.append(codes.basis.key.clone())
        for row in range(number + 1):
            key, _ = engine.sequence(row, 0)
            expected = sketch_keys(key[0], codes.basis)  # [G, r / 8, N]
            table = torch.tensor(engine.tables[row])
            found = codes.words[table].permute(1, 2, 0, 3).flatten(2)[..., : key.shape[2]]
            assert torch.equal(found, expected)
    changed = [not torch.equal(*pair) for pair in pairwise(bases)]
    # After the second prompt and the fourth; the second request's was not noted.
    assert changed == [False, True, False, True, False]


def test_coordinates_are_of_all_prompts_that_were_noted() -> None:
    engine = Engine(made(0.3))
    noted = []
    for row in range(2):
        engine.prompt(300 + row, learn=False)
        queries = [engine.queries(300 + row) for _ in range(L)]
        engine.learn(row, queries)
        key, _ = engine.sequence(row, 0)
        noted.append(moments_of(basis_rows(queries[0]), key[0], G))
    means = (torch.stack(pair).mean(0) for pair in zip(*map(_of, noted), strict=True))
    query, mean, square = means
    square = square - mean[..., None] * mean[..., None, :]
    found = engine.decoding._codes[0].basis
    expected = make_basis(Moments(query, mean, square), found.key.shape[1])
    for mine, theirs in zip(vars(found).values(), vars(expected).values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def _of(moments: Moments) -> tuple[torch.Tensor, ...]:
    """Means over prompts of these are those of all together: squares about zero."""
    mean = moments.mean
    return moments.query, mean, moments.key + mean[..., None] * mean[..., None, :]


def test_a_broken_prompt_spoils_no_other() -> None:
    engine = Engine(made(0.3))
    for broken in (torch.nan, torch.inf):
        engine.prompt(300, learn=False)
        row = len(engine.tables) - 1
        queries = [engine.queries(300) for _ in range(L)]
        queries[0][:, 200:] = broken
        engine.learn(row, queries)
    basis = engine.decoding._codes[0].basis
    assert all(tensor.isfinite().all() for tensor in vars(basis).values())
    for _ in range(2):
        engine.prompt(300)
    engine.append(0, 1)
    out = engine.step([0], engine.step_queries(1))
    assert out.isfinite().all()
    assert basis.key.abs().max() > 1e-3


def test_processes_that_share_heads_read_what_one_reads() -> None:
    effect = torch.rand(L, H) + 0.1
    whole = Engine(made(0.3, effect=effect))
    whole.prompt(700)
    sums: list[torch.Tensor] = []

    class Others:
        def sum(self, tensor: torch.Tensor) -> None:
            sums.append(tensor.clone())
            tensor.copy_(total)

    total = torch.zeros(2, 1)
    parts = [
        made(
            *(0.3,),
            effect=effect,
            n_heads=H // 2,
            n_groups=1,
            heads=range(rank * H // 2, (rank + 1) * H // 2),
            exchange=Others(),
        )
        for rank in range(2)
    ]
    for rank, part in enumerate(parts):
        for mine, codes in zip(part._codes, whole.decoding._codes, strict=True):
            assert codes.words is not None
            mine.basis = type(codes.basis)(
                *(t[rank : rank + 1].contiguous() for t in vars(codes.basis).values())
            )
            mine.words = codes.words[:, rank : rank + 1].contiguous()
    table = torch.tensor([whole.tables[0]], dtype=torch.int32)
    for _ in range(5):
        query = whole.step_queries(1)
        expected = whole.step([0], query)
        lengths = torch.tensor([700], dtype=torch.int32)
        for part in parts:
            # What both have read, as a collective gives it to each.
            read = sum(float(p._budget.counts.sum()) for p in parts if p._budget.counts.any())
            total[0] = read if part is parts[0] else total[0]
            total[1] = sum(float(p._budget._there) for p in parts) if part is parts[0] else total[1]
            part.begin_step(lengths)
        for layer in range(L):
            halves = [
                part.attend(
                    *(layer, query[layer, :, rank * 2 : rank * 2 + 2]),
                    *(
                        whole.keys[layer][:, rank : rank + 1],
                        whole.values[layer][:, rank : rank + 1],
                    ),
                    *(table, lengths),
                    most_tokens=700,
                    scale=SCALE,
                )
                for rank, part in enumerate(parts)
            ]
            torch.testing.assert_close(torch.cat(halves, 1), expected[layer], rtol=0, atol=1e-5)
    assert len(sums) == 10


def test_small_heads_are_refused_and_codes_are_small() -> None:
    with pytest.raises(UnsupportedError, match="at least 8 dims, got 4"):
        made(0.3, head_dim=4)
    assert made(0.3).bytes_per_token == G * 16 // 2
    assert made(0.3, head_dim=128).bytes_per_token == G * 12
    assert BLOCK == SIZE


def test_one_block_that_lacks_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    select, lacks = paged_decoding.select_blocks, torch.zeros(1, G, dtype=torch.int32)

    def choose(*given: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        blocks, counts = select(*given, **options)
        return blocks, counts.sub_(lacks)

    monkeypatch.setattr(paged_decoding, "select_blocks", choose)
    steps, engine = WatchedSteps(monkeypatch, paged_decoding), Engine(made(0.3))
    engine.prompt(300)
    for last in (False, True):
        lacks[0, 1] = int(last)
        engine.append(0, 1)
        engine.step([0], engine.step_queries(1))
        steps.keep()
        if not last:
            assert steps.check("cpu") == L * G
    with pytest.raises(AssertionError):
        steps.check("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "tokens"), [(SMALL, 700), (LARGE, 9000)], ids=["small", "large"])
def test_a_gpu_reads_what_the_reference_reads_and_waits_for_nothing(
    sizes: Sizes, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of what the device itself has: coordinates of two devices differ by rounding, and a code at
    # an edge by a whole step then.
    watched = WatchedSteps(monkeypatch, paged_decoding)
    engine = Engine(made(0.3, "cuda", sizes=sizes), device="cuda", sizes=sizes)
    budget = paged_decoding._Budget(0.3, torch.ones(L, sizes.groups), 8)
    rows = [engine.prompt(tokens, learn=False), engine.prompt(tokens // 2, learn=False)]
    prompt = [engine.queries(tokens) for _ in range(L)]
    engine.learn(0, prompt)
    for layer, query in enumerate(prompt):
        check_basis(engine, layer, query)
    for step in range(1, 30):
        slots = torch.cat([engine.append(row, 1, write=False) for row in rows])
        queries, (tables, lengths) = engine.step_queries(2), engine.given(rows)
        most = max(engine.lengths)
        runs: list[list[torch.Tensor]] = [[], []]
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            engine.decoding.begin_step(lengths)
            # The same twice: nothing may depend on when kernels run.
            for outs in runs:
                for layer in range(L):
                    pools = engine.keys[layer], engine.values[layer]
                    engine.decoding.write(layer, pools[0], slots)
                    outs.append(
                        engine.decoding.attend(
                            *(layer, queries[layer], *pools, tables, lengths),
                            most_tokens=most,
                            scale=SCALE,
                        )
                    )
        finally:
            torch.cuda.set_sync_debug_mode("default")
        watched.keep()
        assert torch.equal(*map(torch.stack, runs)), step
        found = engine.decoding._budget
        budget.settle(None)
        budget.begin(lengths.cpu(), None)
        torch.testing.assert_close(found.worth.cpu(), budget.worth, rtol=1e-4, atol=0)
        budget.counts.copy_(found.counts)
    for layer in range(L):
        check_codes(engine, layer)
    assert watched.check("cpu" if sizes is SMALL else "cuda") == 29 * 2 * L * 2 * sizes.groups


def check_basis(engine: Engine, layer: int, query: torch.Tensor) -> None:
    """The coordinates that the first request's prompt has chosen are those that a CPU chooses."""
    key, _ = engine.sequence(0, layer)
    moments = moments_of(
        basis_rows(query).cpu(), key[0, :, :: basis_step(key.shape[2])].cpu(), engine.sizes.groups
    )
    found = engine.decoding._codes[layer].basis
    expected = make_basis(moments, found.key.shape[1])
    for mine, theirs in zip(vars(found).values(), vars(expected).values(), strict=True):
        assert (mine.cpu() - theirs).norm() / theirs.norm() < 1e-3


def check_codes(engine: Engine, layer: int) -> None:
    """Codes beside the pages are those of the keys in the device's own coordinates."""
    codes = engine.decoding._codes[layer]
    assert codes.words is not None
    for row in range(len(engine.tables)):
        key, _ = engine.sequence(row, layer)
        steps = (key[0].double() - codes.basis.mean[:, None]) @ codes.basis.key.double().mT
        pages = PagedBatch(codes.words.mT, engine.given([row])[0], engine.lengths[row])
        found = coordinates(pages.gathered()[0].mT) + 7.5  # [G, N, r]
        # A step at an edge to a float32's last bits may have either code.
        lowest, highest = ((steps + 8 + e).floor().clamp(0, 15) for e in (-1e-3, 1e-3))
        assert ((found == lowest) | (found == highest)).all()
