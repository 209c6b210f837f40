"""The autoencoder of block maps: a linear map that starts as PCA, and a nonlinear branch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Least root of an entry: a row that is clamped to nothing becomes uniform instead of NaN.
_FLOOR = 1e-6


def band_of(maps: Tensor) -> int:
    """The number of columns right of the diagonal that hold mass in any of `[..., R, R]` maps.

    Zero for causal maps of R blocks; resampling from n blocks smears the diagonal blocks over
    about R / n columns.

    >>> band_of(torch.tensor([[0.6, 0.4, 0.0], [0.3, 0.3, 0.4], [0.2, 0.4, 0.4]]))
    1
    """
    used = (maps > 0).flatten(0, -3).any(0) if maps.dim() > 2 else maps > 0
    rows, columns = used.nonzero(as_tuple=True)
    return max(0, int((columns - rows).max())) if rows.numel() else 0


def _blank_linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """A linear layer of zeros; the global random state is not touched."""
    layer = nn.Linear(inputs, outputs, bias=bias, device="meta").to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _branch(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_blank_linear(inputs, hidden), nn.GELU(), _blank_linear(hidden, outputs))


class MapAutoencoder(nn.Module):
    """Maps a block map to a code and back.

    It works on the square roots of the entries: there each row has length 1, and half the squared
    error of a row is the squared Hellinger distance of two distributions. Encoder and decoder are
    each a linear map plus a small nonlinear branch whose last layer starts at zero, so after
    `start_from` the network is PCA. Decoded rows are clamped and normalised: they are
    distributions whatever the code. Before `start_from` or a loaded state all weights are zero.

    Args:
        resolution: Side R of the maps.
        code_size: Dimensions Z of a code.
        hidden: Width of the nonlinear branches.
        band: Columns right of the diagonal that can hold mass (`band_of`); mass beyond them is
            not seen.
    """

    entries: Tensor
    row_of: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, resolution: int, code_size: int, hidden: int, band: int = 0) -> None:
        super().__init__()
        self.resolution = resolution
        self.code_size = code_size
        self.hidden = hidden
        self.band = band
        seen = torch.ones(resolution, resolution, dtype=torch.bool, device="cpu").tril(band)
        rows = seen.nonzero()[:, 0]
        size = rows.numel()  # S, the entries that can hold mass
        self.register_buffer("entries", seen.flatten().nonzero()[:, 0], persistent=False)
        self.register_buffer(
            "row_of", nn.functional.one_hot(rows, resolution).float(), persistent=False
        )  # [S, R]
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float32, device="cpu"))
        self.register_buffer("scale", torch.ones(code_size, dtype=torch.float32, device="cpu"))
        self.encode_linear = _blank_linear(size, code_size, bias=False)
        self.encode_branch = _branch(size, hidden, code_size)
        self.decode_linear = _blank_linear(code_size, size, bias=False)
        self.decode_branch = _branch(code_size, hidden, size)

    @torch.no_grad()
    def start_from(
        self, mean: Tensor, basis: Tensor, scale: Tensor, generator: torch.Generator
    ) -> None:
        """Sets the weights to a PCA, and the first layers of the branches to random ones.

        Args:
            mean: `[S]`, the mean of the training roots.
            basis: `[S, Z]`, orthonormal directions (zero where the data has fewer).
            scale: `[Z]`, standard deviation of the codes, above 0; the decoder's branch reads
                codes in these units.
            generator: Source of the random weights.
        """
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        self.encode_linear.weight.copy_(basis.T)
        self.decode_linear.weight.copy_(basis)
        for branch in (self.encode_branch, self.decode_branch):
            first, last = branch[0], branch[2]
            assert isinstance(first, nn.Linear)
            assert isinstance(last, nn.Linear)
            bound = first.in_features**-0.5
            nn.init.uniform_(first.weight, -bound, bound, generator=generator)
            nn.init.uniform_(first.bias, -bound, bound, generator=generator)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def roots(self, maps: Tensor) -> Tensor:
        """Square roots of the entries that can hold mass: `[..., R, R]` to float32 `[..., S]`."""
        return maps.float().flatten(-2).index_select(-1, self.entries).sqrt()

    def normalise(self, roots: Tensor) -> Tensor:
        """Clamps `[..., S]` roots above 0 and brings each row of the map to length 1."""
        positive = roots.clamp_min(_FLOOR)
        lengths = (positive.square() @ self.row_of).sqrt()  # [..., R]
        return positive / (lengths @ self.row_of.T)

    def encode_roots(self, roots: Tensor) -> Tensor:
        """Codes `[..., Z]` of roots `[..., S]`."""
        centred = roots - self.mean
        return self.encode_linear(centred) + self.encode_branch(centred)

    def decode_roots(self, codes: Tensor) -> Tensor:
        """Roots `[..., S]`, normalised, of codes `[..., Z]`."""
        linear = self.mean + self.decode_linear(codes)
        return self.normalise(linear + self.decode_branch(codes / self.scale))

    def encode(self, maps: Tensor) -> Tensor:
        """Codes float32 `[..., Z]` of maps `[..., R, R]`, whose rows sum to 1."""
        return self.encode_roots(self.roots(maps))

    def decode(self, codes: Tensor) -> Tensor:
        """Maps float32 `[..., R, R]`, rows summing to 1, of codes `[..., Z]`."""
        side = self.resolution
        flat = codes.new_zeros(*codes.shape[:-1], side * side)
        flat.index_copy_(-1, self.entries, self.decode_roots(codes).square())
        return flat.unflatten(-1, (side, side))

    def forward(self, maps: Tensor) -> Tensor:
        """Reconstructed maps `[..., R, R]`."""
        return self.decode(self.encode(maps))
