from __future__ import annotations

import pytest
import torch

from shareprefill.runtime.ops.devices import on_device


def test_only_another_gpu_is_made_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", entered.append)
    for name in ("cpu", "cuda:1", "cuda:0"):
        on_device(torch.device(name))
    assert entered == [torch.device("cuda:0")]
