from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from shareprefill.report.drawing import MARKERS, SERIES, plain_label

# Simulated colour vision, linear RGB: Machado, Oliveira and Fernandes (2009), severity 1.
VISION = {
    "normal": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = torch.tensor(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
WHITE = torch.tensor([0.95047, 1.0, 1.08883])


def linear(colour: str) -> Tensor:
    parts = torch.tensor([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return torch.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(rgb: Tensor) -> Tensor:
    x, y, z = (TO_XYZ @ rgb.clamp(0, 1) / WHITE).pow(1 / 3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
def test_colours_are_told_apart(vision: str) -> None:
    seen = [lab(torch.tensor(VISION[vision]) @ linear(colour)) for colour in SERIES]
    for (i, one), (j, other) in itertools.combinations(enumerate(seen), 2):
        assert float((one - other).norm()) > 18, (SERIES[i], SERIES[j])


@pytest.mark.parametrize("ground", ["#ffffff", "#15171a"])
def test_colours_are_seen_on_the_ground(ground: str) -> None:
    def luminance(colour: str) -> float:
        return float(TO_XYZ[1] @ linear(colour)) + 0.05

    for colour in SERIES:
        light, dark = sorted((luminance(colour), luminance(ground)), reverse=True)
        assert light / dark > 2.5, colour


def test_every_colour_has_a_shape() -> None:
    assert len(set(SERIES)) == len(set(MARKERS)) == len(SERIES) == len(MARKERS)


def test_labels_are_plain() -> None:
    assert plain_label("$x^2$ and\nmore\u202e") == r"\$x^2\$ and\nmore\u202e"
    assert len(plain_label("x" * 99, 20)) == 20
