from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shareprefill.doctor import _crossover, _pages
from shareprefill.errors import ConfigError, DataError
from shareprefill.models import geometry
from shareprefill.runtime import crossover as crossovers
from shareprefill.runtime.crossover import crossover, save_crossover
from shareprefill.runtime.session import share_prefill
from tests.support.tiny import tiny_llama, token_ids


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
    assert [known.tokens_of(*sizes) for sizes in ((64, 128), (32, 128), (32, 32))] == [
        600,
        600,
        1200,
    ]
    assert replace(known, width=None).tokens_of(1, 32) == 600
    # So many pairs of a row and a key as a whole prompt has, whatever the rows.
    for rows, keys, found in (
        (600, 600, True),
        (599, 599, False),
        (100, 1850, True),
        (100, 1849, False),
    ):
        assert known.is_worth_it(rows, keys, 32, 128) is found
    assert replace(known, width=None).is_worth_it(1, 600, 32, 128)
    assert not replace(known, width=None).is_worth_it(599, 599, 32, 128)
    known = replace(known, tokens=60)
    monkeypatch.setattr(crossovers, "_CPU", known)
    monkeypatch.setenv("SHAREPREFILL_CROSSOVERS", "")
    crossover.cache_clear()
    try:
        session = share_prefill(tiny_llama(), policy="smoothed")
        model = geometry(session.model)
        least = session.least_tokens(torch.device("cpu"))
        assert least == known.tokens_of(model.heads, model.head_dim) > 60
        for tokens, sparse in ((least - 1, 0), (least, 1)):
            session.reset()
            with session, torch.no_grad():
                session.model(token_ids(tokens)[None])
            assert session.report().prefills == sparse
    finally:
        crossover.cache_clear()


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
            small = [crossover(cpu, name).tokens_of(32, 32) for name in ("SDPA", "OTHER")]
            assert small == [600 if of_layers is None else 1200, 600]
            assert crossover(cpu).tokens_of(32, 128) == 600
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
        ("hopper", 16, "gathered", "hopper reads pages of a multiple of 128 tokens, got 16"),
        ("triton", 16, "in place", "triton reads"),
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
