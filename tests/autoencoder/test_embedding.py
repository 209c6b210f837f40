from __future__ import annotations

import torch

from shareprefill.autoencoder.embedding import consensus, embed
from shareprefill.autoencoder.network import MapAutoencoder
from shareprefill.autoencoder.pca import fit_pca


def small_network(maps: torch.Tensor) -> MapAutoencoder:
    network = MapAutoencoder(maps.shape[-1], 5, 7)
    pca = fit_pca([network.roots(maps).flatten(0, -2)], 5)
    network.start_from(pca.mean, pca.basis, pca.scale, torch.Generator().manual_seed(0))
    return network


def random_maps(prompts: int, heads: int, n: int) -> torch.Tensor:
    scores = torch.randn(prompts, heads, n, n, generator=torch.Generator().manual_seed(n))
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    return scores.masked_fill(~causal, -torch.inf).softmax(-1)


def test_codes_are_those_of_the_encoder() -> None:
    maps = random_maps(4, 6, 9)
    network = small_network(maps)
    codes = embed(network, maps)
    assert codes.shape == (4, 6, 5)
    assert codes.dtype == torch.float32
    assert not codes.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(codes[2], network.encode(maps[2]), rtol=0, atol=0)


def test_consensus_by_hand() -> None:
    network = small_network(random_maps(4, 6, 9))
    codes = torch.zeros(3, 2, 5)
    codes[0, 0, 0], codes[1, 0, 0], codes[2, 0, 0] = 1.0, 3.0, 50.0
    codes[:, 1, 4] = 2.0
    agreed = consensus(network, codes, prompts=(0, 1))
    assert agreed.code[0].tolist() == [2, 0, 0, 0, 0]
    assert agreed.instability.tolist() == [1.0, 0.0]
    with torch.no_grad():
        assert torch.equal(agreed.maps, network.decode(agreed.code))
    torch.testing.assert_close(agreed.maps.sum(-1), torch.ones(2, 9), rtol=0, atol=1e-5)
    assert consensus(network, codes).code[0, 0] == 18


def test_a_head_that_never_changes_has_no_instability() -> None:
    maps = random_maps(1, 6, 9).expand(3, 6, 9, 9)
    network = small_network(maps)
    agreed = consensus(network, embed(network, maps))
    torch.testing.assert_close(agreed.instability, torch.zeros(6), rtol=0, atol=1e-6)
