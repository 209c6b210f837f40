"""Principal components: where the autoencoder starts, and what it is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrincipalComponents:
    """The best linear code of its data.

    Attributes:
        mean: float32 `[S]`.
        basis: float32 `[S, Z]`, orthonormal columns by falling variance; zero columns where the
            data has fewer directions than Z.
        scale: float32 `[Z]`, standard deviation along each column; 1 for zero columns.
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor

    def reconstruct(self, data: Tensor) -> Tensor:
        """Projects `[N, S]` on the components."""
        return self.mean + (data - self.mean) @ self.basis @ self.basis.T


def fit_pca(batches: Sequence[Tensor], components: int) -> PrincipalComponents:
    """Exact principal components, from the smaller of the two Gram matrices.

    Args:
        batches: Rows of data, float32 `[N_i, S]` each.
        components: Columns Z of the basis.
    """
    from scipy.linalg import eigh

    count = sum(len(batch) for batch in batches)
    mean = (torch.stack([batch.double().sum(0) for batch in batches]).sum(0) / count).float()
    size = mean.numel()
    kept = min(components, size, count - 1)
    basis = torch.zeros(size, components, dtype=torch.float32, device="cpu")
    scale = torch.ones(components, dtype=torch.float32, device="cpu")
    if kept < 1:
        return PrincipalComponents(mean, basis, scale)
    # The smaller matrix has the same eigenvalues; its eigenvectors lead to the directions.
    data = torch.cat(list(batches)) - mean if count < size else None
    if data is not None:
        gram = (data @ data.T).double()
    else:
        gram = torch.zeros(size, size, dtype=torch.float64, device="cpu")
        for batch in batches:
            centred = batch - mean
            gram += centred.T @ centred
    side = len(gram)
    values, vectors = eigh(gram.numpy(), subset_by_index=[side - kept, side - 1])
    variances = torch.from_numpy(values).flip(0)
    directions = torch.from_numpy(vectors).flip(1)
    # Below this an eigenvalue is rounding, and its direction arbitrary.
    kept = int((variances > (1e-6 * variances[0]).clamp_min(1e-9)).sum())
    directions, variances = directions[:, :kept], variances[:kept]
    if data is not None:
        directions = (data.T.double() @ directions) / variances.sqrt()
    basis[:, :kept] = directions.float()
    scale[:kept] = (variances / count).sqrt().float()
    return PrincipalComponents(mean, basis, scale)
