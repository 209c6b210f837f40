from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shareprefill.autoencoder.losses import Losses, hellinger_loss

LOSSES = Losses(autoencoder=0.1, start=0.3, pca=0.2, pca_linear=0.2, mean=0.5, head_mean=0.4)


def test_beats_pca_wants_both_forms_beaten() -> None:
    assert LOSSES.beats_pca is True
    assert not replace(LOSSES, pca=LOSSES.autoencoder).beats_pca
    assert not replace(LOSSES, pca_linear=LOSSES.autoencoder).beats_pca
    assert replace(LOSSES, start=0.0).beats_pca


def test_the_loss_is_one_for_maps_that_share_no_block() -> None:
    left = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    right = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    assert float(hellinger_loss(left, right, 2)) == 1
    half = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    assert float(hellinger_loss(torch.cat([left, left]), torch.cat([left, half]), 2)) == (
        pytest.approx(0.25)
    )
