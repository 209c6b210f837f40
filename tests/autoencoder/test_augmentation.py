from __future__ import annotations

import pytest
import torch

from shareprefill.autoencoder.augmentation import PromptMixer, vary_key_blocks
from shareprefill.autoencoder.network import MapAutoencoder

SIDE = 11


def random_maps(seed: int, count: int) -> torch.Tensor:
    scores = torch.randn(count, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    causal = torch.ones(SIDE, SIDE, dtype=torch.bool).tril()
    return scores.masked_fill(~causal, -torch.inf).softmax(-1)


def test_key_block_gains_scale_columns_and_keep_distributions() -> None:
    network = MapAutoencoder(SIDE, 4, 5)
    maps = random_maps(0, 16)
    generator = torch.Generator().manual_seed(0)
    varied = vary_key_blocks(network, network.roots(maps), 1.0, generator).square()
    dense = torch.zeros(16, SIDE * SIDE)
    dense[:, network.entries] = varied
    dense = dense.view(16, SIDE, SIDE)
    torch.testing.assert_close(dense.sum(-1), torch.ones(16, SIDE), rtol=0, atol=1e-5)
    # Within a row, one column's gain relative to the first column's is the same in every row.
    gains = (dense / maps)[:, 3:, :4]
    relative = gains / gains[:, :, :1]
    torch.testing.assert_close(relative, relative[:, :1].expand_as(relative), rtol=1e-3, atol=0)
    assert (relative - 1).abs().max() > 0.1


def test_strength_zero_changes_nothing() -> None:
    network = MapAutoencoder(SIDE, 4, 5)
    roots = network.roots(random_maps(0, 7))
    varied = vary_key_blocks(network, roots, 0.0, torch.Generator())
    torch.testing.assert_close(varied, roots, rtol=0, atol=1e-5)


def test_a_mix_lies_between_two_maps_of_its_head() -> None:
    heads = torch.tensor([2, 0, 1, 1, 0, 4, 1])
    roots = torch.eye(7)
    mixer = PromptMixer(roots, heads)
    rows = torch.arange(7).repeat(300)
    mixed = mixer.mix(rows, torch.Generator().manual_seed(0)).square()
    torch.testing.assert_close(mixed.sum(1), torch.ones(len(rows)), rtol=0, atol=1e-5)
    for row in range(7):
        reached = (mixed[rows == row] > 0).any(0)
        assert torch.equal(reached, heads == heads[row])
    others = mixed[rows == 1][:, 4]
    drawn = others[others > 0]
    assert len(drawn) == pytest.approx(150, abs=40)
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.1)
    assert drawn.min() < 0.1
    assert drawn.max() > 0.9


def test_mixed_rows_are_distributions() -> None:
    network = MapAutoencoder(SIDE, 4, 5)
    mixer = PromptMixer(network.roots(random_maps(3, 12)), torch.arange(4).repeat(3))
    mixed = mixer.mix(torch.tensor([0, 5, 11]), torch.Generator().manual_seed(1))
    lengths = mixed.square() @ network.row_of
    torch.testing.assert_close(lengths, torch.ones(3, SIDE), rtol=0, atol=1e-5)
