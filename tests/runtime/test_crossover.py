from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from shareprefill.doctor import _crossover, _pages
from shareprefill.errors import ConfigError, DataError
from shareprefill.models import geometry
from shareprefill.runtime import crossover as crossovers
from shareprefill.runtime.crossover import LayerSizes, LayerTimes, crossover, save_crossover
from shareprefill.runtime.layers import _met_by_a_token, layer_sizes
from shareprefill.runtime.session import share_prefill
from shareprefill.runtime.tensor_parallel import HeadShard
from tests.support.tiny import tiny_llama, token_ids


def shares_from(known: crossovers.Crossover, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, int]:
    """A small model where that was measured of CPUs, and the tokens its session shares from."""
    monkeypatch.setattr(crossovers, "_CPU", known)
    monkeypatch.setenv("SHAREPREFILL_CROSSOVERS", "")
    crossover.cache_clear()
    try:
        session = share_prefill(tiny_llama(), policy="smoothed")
        least = session.least_tokens(torch.device("cpu"))
        for tokens, sparse in ((least - 1, 0), (least, 1)):
            session.reset()
            with session, torch.no_grad():
                session.model(token_ids(tokens)[None])
            assert session.report().prefills == sparse
    finally:
        crossover.cache_clear()
    return session.model, least


def test_kinds_of_devices_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = {"cuda:0": (9, 0), "cuda:1": (10, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capability[str(d)])
    crossover.cache_clear()
    try:
        cpu, hopper, other, meta = map(
            crossover, map(torch.device, ("cpu", "cuda:0", "cuda:1", "meta"))
        )
        engine, steps = (
            crossover(torch.device("cuda:0"), kind) for kind in ("FLASH_ATTN", crossovers.DECODING)
        )
    finally:
        crossover.cache_clear()
    assert cpu != hopper
    assert cpu.is_measured
    assert hopper.is_measured
    assert not other.is_measured
    assert meta == other
    assert (other.tokens, other.density) == (hopper.tokens, hopper.density)
    assert "6b73ebe" in hopper.source
    assert hopper.tokens < engine.tokens < steps.tokens
    assert "vLLM" in engine.source
    for check in _crossover(hopper):
        assert check.detail.endswith(f"measured on {hopper.source}")
    for check in _crossover(other):
        assert check.detail.endswith("not on this kind of device")


def test_smaller_layers_need_longer_prompts_for_as_much_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = crossovers.Crossover(600, 0.7, "a test", width=4096)
    # Work is heads times dimension times tokens squared.
    sizes = [LayerSizes(*of) for of in ((64, 128), (32, 128), (32, 32), (1, 32))]
    assert [known.tokens_of(of) for of in sizes[:3]] == [600, 600, 1200]
    assert replace(known, width=None).tokens_of(sizes[3]) == 600
    # So many pairs of a row and a key as a whole prompt has, whatever the rows.
    for rows, keys, found in (
        (600, 600, True),
        (599, 599, False),
        (100, 1850, True),
        (100, 1849, False),
    ):
        assert known.is_worth_it(rows, keys, sizes[1]) is found
    assert replace(known, width=None).is_worth_it(1, 600, sizes[1])
    assert not replace(known, width=None).is_worth_it(599, 599, sizes[1])
    known = replace(known, tokens=60)
    model, least = shares_from(known, monkeypatch)
    found = geometry(model)
    assert least == known.tokens_of(LayerSizes(found.heads, found.head_dim)) > 60


def test_a_users_least_tokens_go_before_what_was_measured() -> None:
    times = LayerTimes(host=2e-3, parameter=1e-12, channel=1e-9, pair=1e-9)
    known = crossovers.Crossover(600, 0.7, "a test", width=4096, times=times)
    small = LayerSizes(8, 8, parameters=900_000, hidden=100)
    assert known.or_from(None) == known
    for tokens in (0, 50, 10**6):
        named = known.or_from(tokens)
        assert named.tokens_of(small) == tokens
        # However few of its rows come at a time.
        assert named.is_worth_it(1, max(tokens, 1), small)
        assert not named.is_worth_it(tokens, tokens - 1, small)
        assert (named.density, named.source) == (0.7, "min_tokens")


def test_the_host_is_hidden_by_a_layer_s_whole_work(monkeypatch: pytest.MonkeyPatch) -> None:
    times = LayerTimes(host=2e-3, parameter=1e-12, channel=1e-9, pair=1e-9)
    known = crossovers.Crossover(60, 0.7, "a test", width=64, times=times)
    # By attention alone, 60 tokens; a token takes 1e-6 s, and attention 32e-9 a token squared.
    small = LayerSizes(8, 8, parameters=900_000, hidden=100)
    assert known.tokens_of(replace(small, parameters=None)) == 60
    least = known.tokens_of(small)
    assert least == math.ceil((-1e-6 + math.sqrt(1e-12 + 4 * 32e-9 * 2e-3)) / (2 * 32e-9))
    assert times.dense(small, least, least) >= times.host > times.dense(small, least - 1, least - 1)
    for tokens, found in ((least - 1, False), (least, True)):
        assert known.is_worth_it(tokens, tokens, small) is found
    # Last rows of a prompt have less work, and the host as much.
    assert not known.is_worth_it(least // 2, least, small)
    assert known.is_worth_it(least // 2, 2 * least, small)
    # A large layer keeps the device busy; attention alone says from where on.
    assert known.tokens_of(LayerSizes(8, 8, parameters=10**9, hidden=100)) == 60
    model, least = shares_from(known, monkeypatch)
    assert least == known.tokens_of(layer_sizes(model))
    assert least > known.tokens_of(replace(layer_sizes(model), parameters=None))


def test_parameters_are_those_that_a_token_meets() -> None:
    model = tiny_llama()
    layer = model.model.layers[0]
    sizes = geometry(model)
    known = layer_sizes(model)
    assert known.parameters == sum(p.numel() for p in layer.parameters() if p.dim() > 1)
    assert known.hidden == model.config.hidden_size
    assert layer_sizes(model, HeadShard(0, 2, cast(Any, None))) == LayerSizes(
        sizes.heads // 2, sizes.head_dim, known.parameters // 2, known.hidden
    )


class Listed(torch.nn.Module):
    def __init__(self, experts: torch.nn.Module) -> None:
        super().__init__()
        self.tokens, self.router = torch.nn.Embedding(90, 6), torch.nn.Linear(6, 4, bias=True)
        self.experts, self.shared_experts = experts, torch.nn.Linear(6, 5)


class Stacked(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.bias = (torch.nn.Parameter(torch.ones(4, *n)) for n in ((6, 5), (5,)))


class Packed(torch.nn.Module):
    """A quantised matrix of 6 x 5, two numbers a byte."""

    in_features, out_features = 6, 5

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(15, 1))


@pytest.mark.parametrize(
    "experts", [torch.nn.ModuleList([torch.nn.Linear(6, 5) for _ in range(4)]), Stacked()]
)
def test_of_experts_a_token_meets_a_few(experts: torch.nn.Module) -> None:
    biases = 2 * 5 if isinstance(experts, Stacked) else 0
    assert _met_by_a_token(Listed(experts), 2) == 6 * 4 + 6 * 5 + 2 * 6 * 5 + biases
    assert _met_by_a_token(Packed(), 1) == 30


def test_what_was_tuned_for_a_layer_is_longer_for_smaller_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, cpu = tmp_path / "table.json", torch.device("cpu")
    monkeypatch.setenv("SHAREPREFILL_CROSSOVERS", str(table))
    save_crossover(table, cpu, "SDPA", 600, "a layer of 32 heads", [], width=4096)
    save_crossover(table, cpu, "OTHER", 600, "whatever the layer", [])
    try:
        # Where choosing takes as long for layers of any size, as on GPUs, and where it does not.
        for of_layers in (4096, None):
            known = replace(crossovers._CPU, width=of_layers)
            monkeypatch.setattr(crossovers, "_CPU", known)
            crossover.cache_clear()
            small = [
                crossover(cpu, name).tokens_of(LayerSizes(32, 32)) for name in ("SDPA", "OTHER")
            ]
            assert small == [600 if of_layers is None else 1200, 600]
            assert crossover(cpu).tokens_of(LayerSizes(32, 128)) == 600
    finally:
        crossover.cache_clear()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format": "shareprefill crossovers 2", "devices": {}}',
        '{"format": "shareprefill crossovers 1"}',
        '{"format": "shareprefill crossovers 1", "devices": {"a": 3}}',
        '{"format": "shareprefill crossovers 1", "devices": {"a": {"SDPA": {"tokens": -1}}}}',
        '{"format": "shareprefill crossovers 1", "devices": {"a": {"SDPA": {"tokens": 1}}}}',
        '{"format": "shareprefill crossovers 1", "devices": {"a": {"SDPA": {"tokens": 1, '
        '"source": "", "width": 0}}}}',
        '{"format": "shareprefill crossovers 1", "devices": {"a": {"SDPA": {"tokens": 1, '
        '"source": "", "host_ms": 0.0}}}}',
    ],
)
def test_a_table_that_cannot_be_read_is_an_error(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "table.json"
    table.write_text(text)
    monkeypatch.setenv("SHAREPREFILL_CROSSOVERS", str(table))
    crossover.cache_clear()
    with pytest.raises(DataError, match=r"table\.json is no table of crossovers.*sp tune"):
        crossover(torch.device("cpu"))
    with pytest.raises(DataError, match="no table of crossovers"):
        save_crossover(table, torch.device("cpu"), "SDPA", 1, "", [])
    assert table.read_text() == text


def test_a_table_that_is_named_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    crossover.cache_clear()
    monkeypatch.setenv("SHAREPREFILL_CROSSOVERS", "nowhere.json")
    with pytest.raises(ConfigError, match="SHAREPREFILL_CROSSOVERS = 'nowhere.json'"):
        crossover(torch.device("cpu"))


@pytest.mark.parametrize(
    ("implementation", "size", "state", "why"),
    [
        ("hopper", 128, "in place", "hopper reads"),
        ("hopper", 16, "in place", "hopper reads a vLLM cache of these where it is"),
        ("triton", 16, "in place", "triton reads"),
        ("hopper", 40, "gathered", "a multiple of 16 tokens, got 40"),
        ("triton", 48, "gathered", "a power of two"),
    ],
)
def test_doctor_says_how_pages_are_read(
    implementation: str, size: int, state: str, why: str
) -> None:
    found = _pages(implementation, size)
    assert (found.name, found.state) == (f"pages of {size} tokens", state)
    assert why in found.detail
    assert not found.broken
    assert "an engine takes these" not in found.detail
    chosen = _pages(implementation, size, True).detail
    assert ("an engine takes these by itself" in chosen) == (state == "in place")
