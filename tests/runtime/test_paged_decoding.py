"""Decode steps of an engine's requests, whose keys and values lie in pages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from shareprefill.errors import UnsupportedError
from shareprefill.runtime import paged_decoding
from shareprefill.runtime.decoding import BLOCK, SparseDecoding
from shareprefill.runtime.ops.pages import PagedTokens
from shareprefill.runtime.ops.sketched_selection import sketch_keys
from shareprefill.runtime.paged_decoding import PagedDecoding

L, H, G, D, SIZE, SCALE = 2, 4, 2, 16, 32, 0.25


class Engine:
    """Requests of random tokens in pages, which come, go and share the pages of a prefix.

    Attributes:
        lengths: Tokens of each request so far.
        tables: Its pages.
    """

    def __init__(self, decoding: PagedDecoding, pages: int = 200, device: str = "cpu") -> None:
        self.decoding, self.device = decoding, device
        shape = L, pages, G, SIZE, D
        self.keys = torch.full(shape, torch.nan, device=device)
        self.values = torch.full(shape, torch.nan, device=device)
        self.free = torch.randperm(pages).tolist()
        self.lengths: list[int] = []
        self.tables: list[list[int]] = []

    def numbers(self, tokens: int, *heads: int) -> torch.Tensor:
        """Random `[*heads, tokens, D]` of unequal directions."""
        return torch.randn(*heads, tokens, D, device=self.device) * torch.linspace(
            2, 0.2, D, device=self.device
        )

    def append(self, row: int, tokens: int) -> None:
        """Writes tokens of a request, in every layer."""
        first = self.lengths[row]
        self.lengths[row] += tokens
        while len(self.tables[row]) * SIZE < self.lengths[row]:
            self.tables[row].append(self.free.pop())
        place = torch.arange(first, self.lengths[row], dtype=torch.int64, device=self.device)
        pages = torch.tensor(self.tables[row], device=self.device)[place // SIZE]
        slots = pages * SIZE + place % SIZE
        for layer in range(L):
            keys = self.numbers(tokens, G)
            # What steps look for lies in a few runs of keys.
            keys[..., 100:140, :2] += 4.0
            self.keys[layer, pages, :, place % SIZE] = keys.transpose(0, 1)
            self.values[layer, pages, :, place % SIZE] = self.numbers(tokens, G).transpose(0, 1)
            padded = F.pad(slots, (0, 2), value=-1)
            self.decoding.write(layer, self.keys[layer], padded)

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
        query = self.numbers(tokens, H)
        query[..., :2] += 2.0
        return query

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
        most = max(len(table) for table in self.tables) + 1
        tables = torch.full((len(rows), most), -1, dtype=torch.int32, device=self.device)
        lengths = torch.zeros(len(rows), dtype=torch.int32, device=self.device)
        for place, row in enumerate(rows):
            if row >= 0:
                lengths[place] = self.lengths[row]
                mine = torch.tensor(self.tables[row], dtype=torch.int32, device=self.device)
                tables[place, : len(mine)] = mine
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


def made(density: float, device: str = "cpu", **options: Any) -> PagedDecoding:
    sizes = {"n_heads": H, "n_groups": G, "head_dim": D, "max_rows": 8}
    sizes |= {"device": torch.device(device)}
    return PagedDecoding(layers=range(L), density=density, **{**sizes, **options})


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
        queries = torch.stack([engine.queries(len(rows)).transpose(0, 1) for _ in range(L)])
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
        queries = torch.stack([engine.queries(1).transpose(0, 1) for _ in range(L)])
        out = engine.step([row], queries)
        for layer in range(L):
            expected, record = session.attend(
                layer, state, queries[layer], *engine.sequence(row, layer), scale=SCALE
            )
            torch.testing.assert_close(out[layer], expected, rtol=0, atol=1e-5)
            assert torch.equal(engine.decoding._price.counts[layer, :1], record.counts)


def test_rows_may_be_dense_beside_sparse_ones() -> None:
    engine = Engine(made(0.2))
    # Before a prompt was read, too.
    rows = [engine.prompt(tokens, learn=False) for tokens in (500, 700)]
    for number in range(12):
        if number == 1:
            engine.learn(1, [engine.queries(700) for _ in range(L)])
        for row in rows:
            engine.append(row, 1)
        queries = torch.stack([engine.queries(2).transpose(0, 1) for _ in range(L)])
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
        engine.step(now, torch.stack([engine.queries(len(now)).transpose(0, 1) for _ in range(L)]))
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
    queries = torch.stack([engine.queries(3).transpose(0, 1) for _ in range(L)])
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
    out = engine.step([0], torch.stack([engine.queries(1).transpose(0, 1) for _ in range(L)]))
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
        query = torch.stack([whole.queries(1).transpose(0, 1) for _ in range(L)])
        expected = whole.step([0], query)
        lengths = torch.tensor([700], dtype=torch.int32)
        for part in parts:
            # What both have read, as a collective gives it to each.
            read = sum(float(p._price.counts.sum()) for p in parts if p._price.counts.any())
            total[0] = read if part is parts[0] else total[0]
            total[1] = sum(float(p._price._there) for p in parts) if part is parts[0] else total[1]
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


def test_devices_that_were_not_tried_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="not found to be right on cuda yet"):
        made(0.3, "cuda")


@pytest.mark.gpu
def test_a_gpu_reads_what_a_cpu_reads_and_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paged_decoding, "TRIED_ON", ("cpu", "cuda"))
    torch.manual_seed(5)
    on_cpu, on_gpu = Engine(made(0.3)), Engine(made(0.3, "cuda"), device="cuda")
    prompt = [on_cpu.queries(700) for _ in range(L)]
    on_cpu.prompt(700, learn=False)
    for step in range(30):
        if step:
            on_cpu.append(0, 1)
        on_gpu.keys.copy_(on_cpu.keys)
        on_gpu.values.copy_(on_cpu.values)
        on_gpu.lengths, on_gpu.tables = list(on_cpu.lengths), [list(t) for t in on_cpu.tables]
        if step == 0:
            on_cpu.learn(0, prompt)
            on_gpu.learn(0, [query.cuda() for query in prompt])
            continue
        last = on_cpu.lengths[0] - 1
        slot = torch.tensor([on_cpu.tables[0][last // SIZE] * SIZE + last % SIZE], device="cuda")
        queries = torch.stack([on_cpu.queries(1).transpose(0, 1) for _ in range(L)])
        expected = on_cpu.step([0], queries)
        given = queries.cuda()
        tables = torch.tensor([on_cpu.tables[0]], dtype=torch.int32, device="cuda")
        lengths = torch.tensor(on_cpu.lengths, dtype=torch.int32, device="cuda")
        runs: list[list[torch.Tensor]] = [[], []]
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            on_gpu.decoding.begin_step(lengths)
            # The same twice: nothing may depend on when kernels run.
            for outs in runs:
                for layer in range(L):
                    pools = on_gpu.keys[layer], on_gpu.values[layer]
                    on_gpu.decoding.write(layer, pools[0], slot)
                    outs.append(
                        on_gpu.decoding.attend(
                            *(layer, given[layer], *pools, tables, lengths),
                            most_tokens=len(on_cpu.tables[0]) * SIZE,
                            scale=SCALE,
                        )
                    )
        finally:
            torch.cuda.set_sync_debug_mode("default")
        first, again = map(torch.stack, runs)
        assert torch.equal(first, again), step
        # No list of these numbers is near a threshold: the CPU's stay the same if queries, or the
        # coordinates, change by a ten-thousandth.
        prices = [engine.decoding._price for engine in (on_cpu, on_gpu)]
        torch.testing.assert_close(prices[1].worth.cpu(), prices[0].worth, rtol=1e-4, atol=0)
        assert torch.equal(prices[1].counts.cpu(), prices[0].counts), step
        torch.testing.assert_close(first.cpu(), expected, rtol=0, atol=1e-3)
