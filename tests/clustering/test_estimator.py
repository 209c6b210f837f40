from __future__ import annotations

from dataclasses import astuple

import pytest
import torch

from shareprefill.calib.lines import line_products
from shareprefill.clustering.effects import effects_of
from shareprefill.clustering.estimator import fit_weights
from shareprefill.runtime.ops.block_selection import LineWeights, smooth_maps
from tests.support.maps import random_maps

SHAPE = (640, 640, 32)
SIZES = {"n_query": 640, "n_key": 640, "block_size": 32}


@pytest.mark.parametrize(
    "weights",
    [
        LineWeights(itself=1.0),
        LineWeights(itself=0.5, vertical1=0.5),
        LineWeights(itself=0.2, vertical1=0.1, diagonal2=0.3, column=0.1, diagonal=0.3),
    ],
)
def test_the_weights_that_made_the_exact_maps_are_found(weights: LineWeights) -> None:
    sampled = random_maps(20, SHAPE)
    exact = smooth_maps(sampled, weights, **SIZES)
    found = fit_weights(line_products(sampled, exact, 640, 32))
    torch.testing.assert_close(
        torch.tensor(astuple(found)), torch.tensor(astuple(weights)), atol=2e-3, rtol=0
    )


def test_noisier_samples_are_trusted_less() -> None:
    truth = smooth_maps(random_maps(20, SHAPE), LineWeights(itself=0.3, column=0.7), **SIZES)
    found = []
    for noise in (0.1, 1.0):
        sampled = truth * torch.exp(noise * torch.randn_like(truth))
        found.append(fit_weights(line_products(sampled, truth, 640, 32)).itself)
    assert found[1] < 0.8 * found[0]


def test_blocks_that_are_always_read_say_nothing() -> None:
    sampled = random_maps(6, SHAPE)
    exact = random_maps(6, SHAPE)
    before = line_products(sampled, exact, 640, 32)
    exact[:, :, 0] += 5.0
    exact.diagonal(dim1=1, dim2=2).add_(5.0)
    assert torch.equal(line_products(sampled, exact, 640, 32), before)


def test_maps_that_hold_nothing_give_a_block_its_own_sample() -> None:
    assert fit_weights(torch.zeros(8, 8)) == LineWeights(itself=1.0)


def test_effects_are_relative_by_derivatives_and_in_sum_as_measured() -> None:
    lost = torch.rand(5, 3, 4).double() + 0.1
    true = torch.rand(3, 4).double() + 0.5
    found = effects_of(lost * true, lost, 7 * (lost * true).sum((1, 2))[:, None])
    # The factor of all heads is measured; a head's own figure is drawn to its layer's.
    torch.testing.assert_close(found.view(3, 4), 7 * true, rtol=0.4, atol=0)
    predicted = (found * lost.sum(0).flatten()).sum()
    torch.testing.assert_close(predicted, 7 * (lost * true).sum())


def test_a_head_that_loses_nothing_has_its_layers_effect() -> None:
    lost = torch.ones(1, 2, 4).double()
    change = torch.tensor([[[2.0, 2, 2, 0], [6.0, 6, 6, 0]]]).double()
    lost[0, :, 3] = 0
    found = effects_of(change, lost, change.sum((1, 2))[:, None]).view(2, 4)
    torch.testing.assert_close(found[:, 3], found[:, 0])
    torch.testing.assert_close(found[1], 3 * found[0])
