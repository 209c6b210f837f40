"""Decode steps of the core: blocks chosen by a sketch, on plain tensors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from shareprefill.runtime import decoding as decoding_module
from shareprefill.runtime.decoding import (
    BLOCK,
    LOCAL,
    DecodeState,
    SparseDecoding,
    head_weights,
    relative_effect,
)
from tests.support.decode_steps import WatchedSteps

B, H, G, D, PROMPT, SCALE = 3, 4, 2, 16, 700, 0.25
STARTS = (0, 37, 300)


class Cache:
    """Random queries, keys and values of some layers, some keys of which most queries look for."""

    def __init__(self, layers: int, tokens: int, device: str = "cpu") -> None:
        sizes = torch.linspace(2, 0.2, D, device=device)
        shape = layers, B, G, tokens, D
        self.key = torch.randn(shape, device=device) * sizes
        self.value = torch.randn(shape, device=device)
        self.query = torch.randn(layers, B, H, tokens, D, device=device) * sizes
        # What steps look for lies in a few runs of keys.
        self.key[..., 350:400, :2] += 4.0
        self.query[..., :2] += 2.0

    def run(
        self,
        decoding: SparseDecoding,
        starts: tuple[int, ...],
        steps: int,
        rows: slice,
        watched: WatchedSteps | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, DecodeState]:
        """Outputs `[steps, L, B, H, D]` and blocks read `[steps, L, B, G]`."""
        state = decoding.begin(starts)
        for layer, query in enumerate(self.query):
            decoding.read_prompt(layer, state, query[rows, :, :PROMPT])
        outputs, counts = [], []
        for place in range(PROMPT, PROMPT + steps):
            for layer in range(len(self.key)):
                key, value = (t[layer, rows, :, : place + 1] for t in (self.key, self.value))
                query = self.query[layer, rows, :, place]
                out, record = decoding.attend(layer, state, query, key, value, scale=SCALE)
                outputs.append(out)
                counts.append(record.counts)
                there = sum(-(-(place + 1 - start) // BLOCK) for start in starts)
                assert record.blocks == there * G
            if watched is not None:
                watched.keep()
        of = (steps, len(self.key))
        return torch.stack(outputs).unflatten(0, of), torch.stack(counts).unflatten(0, of), state


def test_at_density_1_it_is_dense_attention() -> None:
    cache = Cache(2, PROMPT + 20)
    out, _, _ = cache.run(SparseDecoding(density=1.0), STARTS, 20, slice(None))
    for step in (0, 19):
        for layer in range(2):
            for row, start in enumerate(STARTS):
                keys = slice(start, PROMPT + step + 1)
                key, value = (t[layer, row, :, keys] for t in (cache.key, cache.value))
                query = cache.query[layer, row, :, None, PROMPT + step]
                expected = F.scaled_dot_product_attention(
                    query, key, value, scale=SCALE, enable_gqa=True
                )[:, 0]
                torch.testing.assert_close(out[step, layer, row], expected, rtol=0, atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    cache, decoding = Cache(2, PROMPT + 15), SparseDecoding(density=0.3)
    out, counts, _ = cache.run(decoding, STARTS, 15, slice(None))
    for row, start in enumerate(STARTS):
        alone, read, _ = cache.run(decoding, (start,), 15, slice(row, row + 1))
        torch.testing.assert_close(out[:, :, row : row + 1], alone, rtol=0, atol=1e-5)
        assert torch.equal(counts[:, :, row : row + 1], read)


def test_steps_come_to_read_what_is_asked_for() -> None:
    cache = Cache(2, PROMPT + 90)
    for density in (0.25, 0.5):
        counts = cache.run(SparseDecoding(density=density), (0,), 90, slice(0, 1))[1]
        there = (PROMPT + 1 + torch.arange(90) + BLOCK - 1) // BLOCK
        read = (counts.double().mean((1, 2, 3)) / there)[30:].mean()
        assert read == pytest.approx(density, rel=0.04)
        # The first steps read more, not less.
        assert (counts[0].double().mean() / there[0]) > density


def test_heads_of_more_effect_read_more() -> None:
    cache = Cache(2, PROMPT + 60)
    cache.key[1], cache.query[1] = cache.key[0], cache.query[0]
    effect = torch.tensor([[1.0] * H, [100.0] * H])
    counts = cache.run(SparseDecoding(density=0.4, effect=effect), (0,), 60, slice(0, 1))[1]
    first, second = counts[20:].double().mean((0, 2, 3))
    assert second > 1.2 * first


def test_heads_of_unknown_effect_count_as_the_mean_of_the_others() -> None:
    effect = torch.tensor([[1.0, 3.0], [torch.nan, torch.nan], [0.0, 0.0]])
    found = relative_effect(effect)
    torch.testing.assert_close(found, torch.tensor([[1, 3], [1, 1], [1e-3, 1e-3]]).double())
    assert (relative_effect(effect[1:2]) == 1).all()


def test_query_heads_count_by_their_effect_in_their_kv_head() -> None:
    share, harm = head_weights(torch.tensor([[1.0, 3.0, 2.0, 2.0], [0.5, 0.5, 9.0, 1.0]]), 2)
    expected = [[0.25, 0.75, 0.5, 0.5], [0.5, 0.5, 0.9, 0.1]]
    torch.testing.assert_close(share, torch.tensor(expected))
    torch.testing.assert_close(harm, torch.tensor([[2.0, 2.0], [0.5, 5.0]]))


@pytest.mark.parametrize("room", [decoding_module._ROOM, 1])
def test_a_sketch_that_grew_is_the_one_of_all_keys(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there was no room for the tokens, so that its codes are copied."""
    monkeypatch.setattr(decoding_module, "_ROOM", room)
    monkeypatch.setattr(decoding_module, "_ROOM_SHARE", PROMPT)
    cache, decoding = Cache(1, PROMPT + 100), SparseDecoding(density=0.3)
    state = cache.run(decoding, STARTS, 100, slice(None))[2]
    grown = state._sketches[0]
    basis, words = grown.basis, grown.words
    assert basis is not None
    assert words is not None
    at_once = decoding.begin(STARTS)
    decoding.read_prompt(0, at_once, cache.query[0, :, :, :PROMPT])
    other = at_once._sketches[0]
    # By the same coordinates: those of a prompt's keys are not those of more keys.
    other.basis, other.done = basis, [0] * B
    _, expected = other.grow(cache.key[0], at_once.pieces)
    for row, start in enumerate(STARTS):
        older = (PROMPT + 100 - start - LOCAL) // BLOCK * BLOCK
        assert grown.done[row] == other.done[row] == older
        assert torch.equal(words[row, ..., :older], expected[row, ..., :older])


def test_a_read_prompt_begins_anew() -> None:
    cache, decoding = Cache(1, PROMPT + 10), SparseDecoding(density=0.3)
    state = cache.run(decoding, (0,) * B, 5, slice(None))[2]
    assert decoding.knows(0, state)
    before = state._sketches[0].basis
    decoding.read_prompt(0, state, cache.query[0, :, :, 300:PROMPT])
    assert state._sketches[0].basis is None
    key, value = cache.key[0, :, :, : PROMPT + 6], cache.value[0, :, :, : PROMPT + 6]
    decoding.attend(0, state, cache.query[0, :, :, PROMPT + 5], key, value, scale=SCALE)
    assert state._sketches[0].basis is not before
    state.forget(0)
    assert not decoding.knows(0, state)


@pytest.mark.gpu
def test_cuda_reads_what_a_cpu_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, decoding = Cache(2, PROMPT + 60), SparseDecoding(density=0.3)
    expected, read, _ = cache.run(decoding, STARTS, 60, slice(None))
    for name in ("key", "value", "query"):
        setattr(cache, name, getattr(cache, name).cuda())
    watched = WatchedSteps(monkeypatch, decoding_module)
    out, counts, _ = cache.run(SparseDecoding(density=0.3), STARTS, 60, slice(None), watched)
    assert watched.check("cpu") == 60 * 2 * B * G
    # A block at a threshold may be on either side, and the price follows what was read.
    assert (counts.cpu() != read).double().mean() < 0.2
    assert (counts.cpu() - read).double().mean().abs() < 0.1
    assert (out.cpu() - expected).norm() / expected.norm() < 0.05
