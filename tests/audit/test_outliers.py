from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shareprefill.audit.heads import Heads, open_calibration
from shareprefill.audit.outliers import find_noise, spread_by_source
from tests.audit.synthetic import clustered, made_up_artifact, made_up_calibration


def test_heads_without_company() -> None:
    cluster = torch.tensor([[0, 0, 1], [2, 2, -1]], dtype=torch.int32)
    noise = find_noise(Heads.of(made_up_artifact(2, 3, cluster=cluster)))
    assert noise.alone.tolist() == [False, False, True, False, False, True]


def test_unstable_heads_spread_more_than_heads_differ() -> None:
    code = torch.tensor([[[3.0, 0.0], [-3.0, 0.0]], [[0.0, 3.0], [0.0, -3.0]]])
    instability = torch.tensor([[2.9, 3.1], [0.0, 1.5]])
    noise = find_noise(Heads.of(made_up_artifact(2, 2, code=code, instability=instability)))
    assert noise.spread.tolist() == pytest.approx([2.9 / 3, 3.1 / 3, 0.0, 0.5])
    assert noise.unstable.tolist() == [False, True, False, False]


@pytest.mark.parametrize(("alone", "is_high"), [(3, False), (4, True)])
def test_more_than_thirty_percent_is_too_much(alone: int, is_high: bool) -> None:
    cluster = torch.zeros(1, 10, dtype=torch.int32)
    cluster[0, :alone] = -1
    noise = find_noise(Heads.of(made_up_artifact(1, 10, cluster=cluster)))
    assert noise.share == pytest.approx(alone / 10)
    assert noise.is_high is is_high


def test_a_head_that_is_both_counts_once() -> None:
    cluster = torch.tensor([[0, 0, 1, 2]], dtype=torch.int32)
    instability = torch.tensor([[0.0, 0.0, 1e9, 0.0]])
    noise = find_noise(Heads.of(made_up_artifact(1, 4, cluster=cluster, instability=instability)))
    assert noise.share == 0.5


def test_spread_by_data_set(tmp_path: Path) -> None:
    folder = made_up_calibration(tmp_path)
    artifact = clustered(folder)
    heads = Heads.of(artifact)
    calibration = open_calibration(folder, artifact, heads)
    found = spread_by_source(heads, calibration)
    assert [(s.source, s.prompts) for s in found] == [("retr_kv", 3), ("text", 3)]
    means = calibration.agreed.code.double()
    between = (means - means.mean(0)).square().sum(1).mean().sqrt()
    texts = (calibration.codes[1::2].double() - means).norm(dim=-1).flatten() / between
    assert found[1].spread == pytest.approx(float(texts.quantile(0.5)))
    assert found[1].worst == pytest.approx(float(texts.quantile(0.95)))
