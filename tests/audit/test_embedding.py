from __future__ import annotations

import pytest
import torch

from shareprefill.audit.embedding import embed_in_plane


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
