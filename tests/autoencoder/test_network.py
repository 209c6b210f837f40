from __future__ import annotations

import pytest
import torch

from shareprefill.autoencoder.dataset import resample_maps
from shareprefill.autoencoder.network import MapAutoencoder, band_of
from shareprefill.autoencoder.pca import fit_pca


def random_maps(seed: int, count: int, n: int) -> torch.Tensor:
    scores = 2 * torch.randn(count, n, n, generator=torch.Generator().manual_seed(seed))
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    return scores.masked_fill(~causal, -torch.inf).softmax(-1)


def started(maps: torch.Tensor, code_size: int) -> MapAutoencoder:
    network = MapAutoencoder(maps.shape[-1], code_size, 13, band_of(maps))
    pca = fit_pca([network.roots(maps)], code_size)
    generator = torch.Generator().manual_seed(1)
    network.start_from(pca.mean, pca.basis, pca.scale, generator)
    return network


@pytest.mark.parametrize(
    ("n", "resolution", "band"), [(9, 9, 0), (3, 9, 2), (10, 9, 1), (18, 9, 0)]
)
def test_band_is_what_resampling_smears(n: int, resolution: int, band: int) -> None:
    maps = resample_maps(random_maps(0, 4, n), resolution)
    assert band_of(maps) == band
    assert band_of(maps.unflatten(0, (2, 2))) == band
    network = MapAutoencoder(resolution, 3, 4, band)
    lengths = network.roots(maps).square().sum(-1)
    torch.testing.assert_close(lengths, torch.full((4,), float(resolution)), rtol=1e-5, atol=0)


def test_network_starts_as_pca() -> None:
    maps = random_maps(0, 40, 9)
    network = started(maps, 6)
    roots = network.roots(maps)
    centred = (roots - roots.mean(0)).double()
    basis = torch.linalg.svd(centred, full_matrices=False)[2][:6].T
    expected = network.normalise((centred @ basis @ basis.T).float() + roots.mean(0))
    with torch.no_grad():
        decoded = network.decode_roots(network.encode(maps))
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)


def test_decoded_rows_are_causal_distributions_whatever_the_code() -> None:
    network = started(random_maps(0, 40, 9), 6)
    codes = 20 * torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2))
    codes[0, 0] = 0
    with torch.no_grad():
        maps = network.decode(codes)
    assert maps.shape == (3, 5, 9, 9)
    assert maps.min() >= 0
    assert torch.equal(maps.triu(1), torch.zeros_like(maps))
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 5, 9), rtol=0, atol=1e-5)


def test_as_many_codes_as_directions_reproduce_the_maps() -> None:
    maps = random_maps(3, 8, 9)
    network = started(maps, 20)
    with torch.no_grad():
        torch.testing.assert_close(network(maps), maps, rtol=0, atol=1e-4)
        assert network.encode(maps[None]).shape == (1, 8, 20)


def test_construction_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    network = MapAutoencoder(9, 4, 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(not parameter.any() for parameter in network.parameters())


@pytest.mark.parametrize(("count", "size"), [(50, 12), (12, 50), (5, 8)])
def test_pca_agrees_with_the_singular_vectors(count: int, size: int) -> None:
    generator = torch.Generator().manual_seed(count)
    data = torch.randn(count, size, generator=generator) * torch.linspace(3, 0.3, size) + 1
    components = min(4, count - 1)
    pca = fit_pca([data[: count // 3], data[count // 3 :]], 4)
    centred = (data - data.mean(0)).double()
    _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
    overlap = (pca.basis.T.double() @ vectors[:components].T).abs()
    torch.testing.assert_close(
        overlap, torch.eye(components, dtype=torch.float64), rtol=0, atol=1e-4
    )
    expected = (values[:components] / count**0.5).float()
    torch.testing.assert_close(pca.scale, expected, rtol=1e-4, atol=0)


def test_pca_of_data_with_fewer_directions_than_components() -> None:
    data = torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 0.0], [5.0, 2.0, 0.0]])
    pca = fit_pca([data], 5)
    assert pca.basis.shape == (3, 5)
    assert pca.basis.abs()[:, 0].tolist() == pytest.approx([1, 0, 0], abs=1e-6)
    assert not pca.basis[:, 1:].any()
    assert pca.scale[1:].tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(pca.reconstruct(data), data, rtol=0, atol=1e-5)
    single = fit_pca([data[:1]], 2)
    assert not single.basis.any()
    assert torch.equal(single.reconstruct(data[1:]), data[:1].expand(2, 3))


def test_negative_roots_hold_no_mass_and_an_empty_row_is_uniform() -> None:
    network = MapAutoencoder(3, 2, 4)
    roots = torch.tensor([-2.0, 3.0, -4.0, -1.0, -5.0, -0.5])
    normalised = network.normalise(roots)
    expected = torch.tensor([1.0, 1.0, 0.0, *[3**-0.5] * 3])
    torch.testing.assert_close(normalised, expected, rtol=0, atol=1e-5)
