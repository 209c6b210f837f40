from __future__ import annotations

import pytest
import torch

from shareprefill.diagnosis import _crossover
from shareprefill.runtime.crossover import crossover


def test_kinds_of_devices_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = {"cuda:0": (9, 0), "cuda:1": (10, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capability[str(d)])
    crossover.cache_clear()
    try:
        cpu, hopper, other, meta = map(
            crossover, map(torch.device, ("cpu", "cuda:0", "cuda:1", "meta"))
        )
    finally:
        crossover.cache_clear()
    assert cpu != hopper
    assert cpu.is_measured
    assert hopper.is_measured
    assert not other.is_measured
    assert meta == other
    assert (other.tokens, other.density) == (hopper.tokens, hopper.density)
    assert "H100" in hopper.source
    for check in _crossover(hopper):
        assert check.detail.endswith(f"measured on {hopper.source}")
    for check in _crossover(other):
        assert check.detail.endswith("not on this kind of device")
