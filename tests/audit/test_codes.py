from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shareprefill.audit.codes import embed_in_plane, find_noise, spread_by_source
from shareprefill.audit.heads import Heads, open_calibration
from tests.audit.synthetic import clustered, made_up_artifact, made_up_calibration


def groups(*, per_group: int = 12, count: int = 3) -> torch.Tensor:
    centres = 20.0 * torch.randn(count, 6, dtype=torch.float64)
    codes = centres.repeat_interleave(per_group, 0)
    return codes + 0.1 * torch.randn_like(codes)


def test_principal_components_are_those_of_the_covariance() -> None:
    codes = torch.randn(31, 5, dtype=torch.float64) * torch.tensor([1.0, 9.0, 2.0, 0.1, 4.0])
    plane = embed_in_plane(codes)
    values, vectors = torch.linalg.eigh(torch.cov(codes.T))
    expected = ((codes - codes.mean(0)) @ vectors[:, [4, 3]]).abs()
    torch.testing.assert_close(plane.pca.abs(), expected)
    torch.testing.assert_close(
        torch.tensor(plane.explained), (values[[4, 3]] / values.sum()).float()
    )


def test_the_sign_of_a_component_is_settled() -> None:
    codes = torch.randn(9, 4, dtype=torch.float64)
    flipped = embed_in_plane(codes.flip(0)).pca.flip(0)
    torch.testing.assert_close(embed_in_plane(codes).pca, flipped)


def test_groups_stay_together_in_the_plane() -> None:
    plane = embed_in_plane(groups())
    assert plane.tsne is not None
    assert plane.perplexity == pytest.approx(35 / 3)
    nearest = torch.cdist(plane.tsne, plane.tsne).fill_diagonal_(torch.inf).argmin(1)
    assert torch.equal(nearest // 12, torch.arange(36) // 12)


def test_the_same_codes_give_the_same_picture() -> None:
    codes = groups()
    first, second = embed_in_plane(codes), embed_in_plane(codes.clone())
    assert first.tsne is not None
    assert second.tsne is not None
    assert torch.equal(first.tsne, second.tsne)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_codes_of_any_size(scale: float) -> None:
    plane = embed_in_plane(groups(per_group=4) * scale)
    assert plane.tsne is not None
    assert bool(plane.tsne.isfinite().all())


def test_the_perplexity_is_thirty_for_many_heads() -> None:
    assert embed_in_plane(torch.randn(95, 3, dtype=torch.float64)).perplexity == 30


@pytest.mark.parametrize(
    "codes",
    [
        torch.zeros(7, 3, dtype=torch.float64),
        torch.ones(1, 4, dtype=torch.float64),
        torch.tensor([[1.0], [2.0], [3.0], [3.0], [3.0]], dtype=torch.float64),
    ],
)
def test_fewer_than_four_codes_have_no_tsne(codes: torch.Tensor) -> None:
    plane = embed_in_plane(codes)
    assert plane.tsne is None
    assert bool(plane.pca.isfinite().all())
    assert 0 <= plane.explained[0] <= 1 + 1e-12


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
    found = spread_by_source(calibration)
    assert [(s.source, s.prompts) for s in found] == [("retr_kv", 3), ("text", 3)]
    means = calibration.agreed.code.double()
    between = (means - means.mean(0)).square().sum(1).mean().sqrt()
    texts = (calibration.codes[1::2].double() - means).norm(dim=-1).flatten() / between
    assert found[1].spread == pytest.approx(float(texts.quantile(0.5)))
    assert found[1].worst == pytest.approx(float(texts.quantile(0.95)))
