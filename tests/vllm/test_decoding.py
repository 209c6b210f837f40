"""Decode steps of an engine on plain tensors: rows, pages and reasons, without vLLM."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shareprefill.config import RuntimeConfig
from shareprefill.errors import UnsupportedError
from shareprefill.runtime.ops.pages import PagedTokens
from shareprefill.runtime.paged_decoding import PagedDecoding
from shareprefill.runtime.plan import plan_without_artifact
from shareprefill.vllm.decoding import (
    MOST_TOKENS,
    ServingDecoding,
    decode_step,
    uniform_step,
)
from tests.support.serving import serving_core

LAYERS, H, G, D, PAGE, SCALE = 2, 4, 2, 16, 32, 0.25


def decoding_with(
    density: float = 1.0, least_tokens: int = 100, head_dim: int = D
) -> ServingDecoding:
    counted: Counter[tuple[str, str]] = Counter()

    def make(**changes: object) -> PagedDecoding:
        arguments = {
            "n_heads": H,
            "n_groups": G,
            "head_dim": head_dim,
            "device": torch.device("cpu"),
            "density": density,
        }
        return PagedDecoding(**arguments | changes)  # pyright: ignore[reportArgumentType]

    decoding = ServingDecoding(
        make,
        None,
        least_tokens=least_tokens,
        max_rows=8,
        max_keys=1000,
        room=10_000,
        count=lambda kind, name, steps: counted.update({(kind, name): steps}),
    )
    decoding.use(range(LAYERS))
    decoding.counted = counted  # pyright: ignore[reportAttributeAccessIssue]
    return decoding


class Cache:
    """Pages of all layers, and three requests that lie in them; what nobody wrote is NaN."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths
        needed = [-(-n // PAGE) for n in lengths]
        pages = torch.randperm(sum(needed) + 3)
        self.tables = [t.to(torch.int32) for t in pages[: sum(needed)].split(needed)]
        self.pages = torch.full((LAYERS, 2, len(pages), G, PAGE, D), torch.nan)
        self.query = torch.randn(LAYERS, len(lengths), H, D)
        self.both = [torch.randn(LAYERS, 2, G, n, D) for n in lengths]

    def write(self, decoding: ServingDecoding, request: int, first: int, stop: int) -> None:
        """A step's tokens go into the pages, and are told."""
        tokens = torch.arange(first, stop)
        page, place = self.tables[request].long()[tokens // PAGE], tokens % PAGE
        for layer in range(LAYERS):
            for half in range(2):
                values = self.both[request][layer, half, :, first:stop].transpose(0, 1)
                self.pages[layer, half][page, :, place] = values
            # Padding of a step, as an engine has it.
            slots = torch.cat([page * PAGE + place, torch.tensor([-1])])
            decoding.write(layer, self.pages[layer, 0], slots)

    def read_prompt(self, decoding: ServingDecoding, request: int) -> None:
        for layer in range(LAYERS):
            n = self.lengths[request]
            tokens = PagedTokens(self.pages[layer, 0], self.tables[request], n)
            decoding.read_prompt(layer, torch.randn(H, n, D), tokens, self.pages[layer, 0])

    @property
    def table(self) -> Tensor:
        most = max(len(table) for table in self.tables)
        # Entries behind a request's pages are another one's.
        return torch.stack([F.pad(table, (0, most - len(table))) for table in self.tables])

    def dense(self, layer: int, request: int) -> Tensor:
        key, value = self.both[request][layer]
        query = self.query[layer, request, :, None]
        return F.scaled_dot_product_attention(query, key, value, scale=SCALE, enable_gqa=True)[:, 0]


@pytest.mark.parametrize("rows", [[0, 1, 2], [1, 2], [0, 2], [1]])
def test_rows_of_a_step_are_decoded_as_if_they_were_alone(rows: list[int]) -> None:
    """Their tokens follow each other or not; a prefill stands between them and others."""
    decoding, cache = decoding_with(), Cache((150, 333, 200))
    for request, length in enumerate(cache.lengths):
        cache.write(decoding, request, 0, length - 1)
    assert not decoding.is_sparse(150, None)
    cache.read_prompt(decoding, 1)
    for request, length in enumerate(cache.lengths):
        cache.write(decoding, request, length - 1, length)
    # Rows of one token, but for 7 more of row 1 where it is not decoded.
    sizes = [1, 1 if 1 in rows else 8, 1]
    starts = [sum(sizes[:row]) for row in range(4)]
    lengths = torch.tensor(cache.lengths, dtype=torch.int32)
    most = [n + 5 for n in cache.lengths]
    step = decode_step(rows, starts, most, lengths, cache.table)
    assert step.lengths.tolist() == [cache.lengths[row] for row in rows]
    assert step.lengths.data_ptr() % 16 == step.table.data_ptr() % 16 == 0
    assert step.most_tokens == max(most[row] for row in rows)
    decoding.begin_step(step)
    for layer in range(LAYERS):
        query, output = torch.full((2, starts[3], H, D), torch.nan)
        for row in rows:
            query[starts[row]] = cache.query[layer, row]
        pages = cache.pages[layer, 0], cache.pages[layer, 1]
        decoding.attend(layer, step, query, pages, output, scale=SCALE)
        for row in rows:
            dense = cache.dense(layer, row)
            torch.testing.assert_close(output[starts[row]], dense, rtol=0, atol=1e-5)
        others = set(range(starts[3])) - {starts[row] for row in rows}
        assert output[list(others)].isnan().all()


def test_rows_of_a_step_that_a_graph_may_hold_stand_where_they_do_in_it() -> None:
    """Before a replay it is said which rows are sparse; the others read every block, or nothing."""
    decoding, cache = decoding_with(density=0.2), Cache((650, 333, 800))
    for request, length in enumerate(cache.lengths):
        cache.write(decoding, request, 0, length)
    cache.read_prompt(decoding, 0)
    lengths = torch.tensor([*cache.lengths, 0], dtype=torch.int32)
    # An engine's tables have room for the longest request.
    table = F.pad(torch.cat([cache.table, cache.table[:1]]), (0, 7))
    graph = decoding.graph_step(lengths, table)
    assert graph.most_tokens == decoding.max_keys
    assert graph.lengths.data_ptr() == lengths.data_ptr()
    for rows in ((), (1,), (0, 2), (0, 1, 2)):
        step = uniform_step(rows, 3, [n + 1 for n in cache.lengths], lengths, table)
        assert step.lengths.tolist() == [n * (r in rows) for r, n in enumerate(cache.lengths)]
        assert step.most_tokens == max((cache.lengths[row] + 1 for row in rows), default=1)
        decoding.begin_step(step)
        pages, query = (cache.pages[0, 0], cache.pages[0, 1]), cache.query[0]
        alone, replayed = torch.full((2, 4, H, D), torch.nan)
        decoding.attend(0, step, query, pages, alone[:3], scale=SCALE)
        padded = torch.cat([query, query[:1]])
        decoding.attend(0, graph, padded, pages, replayed, scale=SCALE)
        assert not replayed[3].any()
        for row in range(3):
            if row in rows:
                assert torch.equal(replayed[row], alone[row])
            else:
                assert not alone[row].any()
                torch.testing.assert_close(replayed[row], cache.dense(0, row), rtol=0, atol=1e-5)


def test_steps_come_to_read_the_density_that_was_asked_for() -> None:
    decoding, cache = decoding_with(density=0.4), Cache((700, 900))
    for request, length in enumerate(cache.lengths):
        cache.write(decoding, request, 0, length)
        cache.read_prompt(decoding, request)
    lengths = torch.tensor(cache.lengths, dtype=torch.int32)
    step = decode_step([0, 1], [0, 1], list(cache.lengths), lengths, cache.table)
    for number in range(100):
        if number == 50:
            decoding.reset()
        for length in cache.lengths:
            decoding.book(length, None)
        decoding.begin_step(step)
        for layer in range(LAYERS):
            output = torch.empty(2, H, D)
            pages = cache.pages[layer, 0], cache.pages[layer, 1]
            decoding.attend(layer, step, torch.randn(2, H, D), pages, output, scale=SCALE)
    report = decoding.report()
    assert report["steps"] == 100
    assert report["density"] == pytest.approx(0.4, rel=0.1)


def test_what_is_dense_says_why_and_is_counted() -> None:
    decoding = decoding_with(least_tokens=100)
    cases = {(200, "off"): "request", (99, None): "length", (MOST_TOKENS + 1, None): "length"}
    for (n_key, switch), reason in cases.items():
        assert not decoding.is_sparse(n_key, switch)
        decoding.book(n_key, switch)
        assert decoding.counted["dense", reason]  # pyright: ignore[reportAttributeAccessIssue]
    decoding.book(100, None)
    no_prompt = "no long prompt was read yet"
    assert decoding.report() == {
        "steps": 0,
        "dense_steps": {"request": 1, "length": 2, no_prompt: 1},
        "density": None,
    }
    cache = Cache((128,))
    cache.write(decoding, 0, 0, 128)
    cache.read_prompt(decoding, 0)
    # Any prompt is enough for all requests; another policy of prefills changes nothing.
    assert decoding.is_sparse(100, None)
    assert decoding.is_sparse(MOST_TOKENS, "pooled")
    decoding.reset()
    decoding.book(100, "pooled")
    assert decoding.report() == {"steps": 1, "dense_steps": {}, "density": None}
    # Counters go on, whatever a report forgets.
    counted = decoding.counted  # pyright: ignore[reportAttributeAccessIssue]
    assert counted == {
        **{("dense", reason): n for reason, n in (("request", 1), ("length", 2), (no_prompt, 1))},
        ("sparse", "decode"): 1,
    }


@pytest.mark.parametrize(
    ("least", "sizes"),
    [
        (300, [(1, 300), (1, 600), (1, 1000), (2, 1000), (4, 1000), (8, 1000)]),
        (2000, [(1, 1000), (2, 1000), (4, 1000), (8, 1000)]),
    ],
)
def test_warming_runs_all_sizes_and_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, least: int, sizes: list[tuple[int, int]]
) -> None:
    decoding, seen, attend = decoding_with(least_tokens=least), [], PagedDecoding.attend

    def noted(self: PagedDecoding, *args: Tensor, most_tokens: int, scale: float) -> Tensor:
        out = attend(self, *args, most_tokens=most_tokens, scale=scale)  # pyright: ignore
        assert out.isfinite().all()
        seen.append((len(out), most_tokens))
        return out

    monkeypatch.setattr(PagedDecoding, "attend", noted)
    decoding.warm(torch.empty(5, H, D), G, PAGE, scale=SCALE)
    assert seen == sizes
    assert not decoding.core.ready
    assert decoding.report() == {"steps": 0, "dense_steps": {}, "density": None}


def test_what_the_core_refuses_stops_an_engine_at_its_start() -> None:
    with pytest.raises(UnsupportedError, match="heads of at least 8 dims"):
        decoding_with(head_dim=4)


def test_sketches_of_a_full_cache_have_room_beside_it() -> None:
    decoding = decoding_with()
    of_sketch, of_cache = decoding.core.bytes_per_token, 2 * G * D * 2
    size = decoding.sketch_bytes(G, D, 2)
    tokens = (10_000 - size) // of_cache
    assert 10_000 - of_cache - of_sketch <= tokens * (of_cache + of_sketch) <= 10_000


def test_a_core_takes_rows_of_one_token_where_its_engine_decodes_sparsely() -> None:
    config = RuntimeConfig(policy="pooled", min_tokens=0)
    core = serving_core(lambda _: plan_without_artifact(LAYERS, H, config), config)
    assert not core.is_sparse(1, 500, None)
    core.book(1, 500, None)
    assert "decoding" not in core.report()
    core.decoding = decoding_with()
    core.book(1, 500, None)
    # A prefill is no step, however few rows it has.
    core.book(2, 500, None)
    assert core.report()["decoding"]["dense_steps"] == {"no long prompt was read yet": 1}
    assert core.report()["rows"] == {"sparse": {}, "dense": {}}
    cache = Cache((128,))
    cache.write(core.decoding, 0, 0, 128)
    cache.read_prompt(core.decoding, 0)
    assert core.is_sparse(1, 500, None)
    assert not core.is_sparse(1, 500, "off")
    assert not core.is_sparse(2, 500, None)
    core.reset()
    assert core.report()["decoding"]["dense_steps"] == {}
