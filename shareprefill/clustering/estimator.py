"""The weights of the estimator of block maps, fitted to a model's own exact maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

import numpy as np
import torch
from torch import Tensor

from shareprefill.calib.capture import LINES
from shareprefill.calib.lines import LINE_NAMES
from shareprefill.calib.store import MapStore
from shareprefill.runtime.ops.block_selection import LineWeights

# Of the lines' own scale: keeps lines that are sums of others from making the equations singular.
_RIDGE = 1e-7


def fit_weights(products: Tensor) -> LineWeights:
    """The weights, none negative, that come nearest to the exact maps in squares.

    Args:
        products: float64 `[8, 8]`, sums of `line_products`.

    Returns:
        The weights, which add up to 1; a block's own mass alone where the maps hold nothing.
    """
    from scipy.optimize import nnls

    sums = products.double().numpy()
    matrix, right = sums[:-1, :-1], sums[:-1, -1]
    scale = np.sqrt(np.diag(matrix))
    scale[scale == 0] = 1.0
    scaled = matrix / np.outer(scale, scale) + _RIDGE * np.eye(len(scale))
    # |C^T x - b| with C C^T the scaled matrix is what the sums of squares come to.
    factor = np.linalg.cholesky(scaled)
    found = nnls(factor.T, np.linalg.solve(factor, right / scale))[0] / scale
    if not found.sum() > 0:
        return LineWeights(itself=1.0)
    shares = (found / found.sum()).round(6).tolist()
    return LineWeights(**dict(zip(LINE_NAMES, shares, strict=True)))


def fit_estimator(store: MapStore, prompts: Sequence[int]) -> dict[str, list[float]]:
    """The weights of every count of sampled rows, as an artifact has them.

    Args:
        store: A complete calibration.
        prompts: Numbers of the prompts to fit to: those that are not held out.
    """
    products = torch.stack([store.load(number, LINES)[LINES] for number in prompts]).sum(0)
    return {
        str(rows): list(astuple(fit_weights(sums)))
        for rows, sums in zip(store.config.rows, products, strict=True)
    }
