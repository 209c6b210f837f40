"""Block maps of many prompts at one resolution, and which prompts serve which purpose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from shareprefill.errors import DataError

_FEWEST_PROMPTS = 3


@dataclass(frozen=True)
class Split:
    """Which prompts, by index in ascending order, serve which purpose.

    Attributes:
        train: Prompts that the weights are fitted to.
        validation: Prompts that decide when to stop; empty if all others are needed (three
            prompts), in which case a tenth of the training maps decides.
        held_out: Prompts that only the reported losses and recalls are measured on.
    """

    train: tuple[int, ...]
    validation: tuple[int, ...]
    held_out: tuple[int, ...]


def split_prompts(prompts: int, sources: Sequence[str] | None = None) -> Split:
    """Every third prompt is held out; of the rest every fifth is for validation.

    Prompts alternate between data sets, so a period of three meets one data set only if there
    are three of them. With `sources` the prompts are counted data set by data set, and each
    purpose gets its share of every data set that has the prompts for it.

    Args:
        prompts: Number of prompts.
        sources: The data set of each prompt.

    Raises:
        DataError: there are fewer than three prompts.

    >>> split_prompts(6)
    Split(train=(0, 1, 4), validation=(3,), held_out=(2, 5))
    """
    if prompts < _FEWEST_PROMPTS:
        raise DataError(
            f"{prompts} prompt(s) cannot be split into training and held-out prompts: at least "
            f"{_FEWEST_PROMPTS} are needed; calibrate with more samples"
        )
    order = list(range(prompts))
    if sources is not None:
        assert len(sources) == prompts
        order.sort(key=lambda prompt: sources[prompt])
    held_out = order[2::3]
    rest = [prompt for i, prompt in enumerate(order) if i % 3 != 2]
    validation = rest[2::5]
    train = [prompt for i, prompt in enumerate(rest) if i % 5 != 2]
    return Split(tuple(sorted(train)), tuple(sorted(validation)), tuple(sorted(held_out)))


def resample_maps(maps: Tensor, resolution: int) -> Tensor:
    """Area resampling of block maps to one resolution, finer or coarser.

    A target row is the mean of the source rows under it, weighted by overlap; a source column's
    mass is spread evenly over its width. Each row keeps its sum.

    Args:
        maps: `[..., n, n]`, attention mass of each block.
        resolution: Side R of the result.

    Returns:
        float32 `[..., R, R]`.

    >>> resample_maps(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), 3)
    tensor([[0.6667, 0.3333, 0.0000],
            [0.5000, 0.3333, 0.1667],
            [0.3333, 0.3333, 0.3333]])
    """
    n = maps.shape[-1]
    assert maps.shape[-2] == n
    if n == resolution:
        return maps.float()
    # Bin edges in units of 1 / (n * resolution) are whole numbers, so overlaps are exact.
    coarse = torch.arange(n, device="cpu") * resolution
    fine = torch.arange(resolution, device="cpu") * n
    starts = torch.maximum(fine[:, None], coarse[None, :])
    ends = torch.minimum(fine[:, None] + n, coarse[None, :] + resolution)
    overlap = (ends - starts).clamp_min(0).to(device=maps.device, dtype=torch.float32)
    return (overlap / n) @ maps.float() @ (overlap / resolution).T


@dataclass(frozen=True)
class MapDataset:
    """The maps of P prompts and K heads at one resolution.

    Attributes:
        maps: float32 `[P, K, R, R]` on the CPU, rows sum to 1.
    """

    maps: Tensor

    @classmethod
    def from_prompts(cls, prompts: Sequence[Tensor], resolution: int) -> Self:
        """Resamples each prompt's `[K, n, n]` maps, whose n may differ, and stacks them.

        Raises:
            DataError: there is no prompt, prompts have different numbers of heads, or a map holds
                a value that is not finite.
        """
        if not prompts:
            raise DataError("there are no maps: calibrate the model first")
        heads = {int(maps.shape[0]) for maps in prompts}
        if len(heads) > 1:
            raise DataError(
                f"maps of one model were expected, but prompts have {sorted(heads)} heads: "
                "calibrate again"
            )
        stacked = torch.stack([resample_maps(maps, resolution).cpu() for maps in prompts])
        if not bool(stacked.isfinite().all()):
            raise DataError("a block map holds NaN or infinity: calibrate again with dtype float32")
        return cls(stacked)

    def split(self, sources: Sequence[str] | None = None) -> Split:
        """`split_prompts` of these prompts."""
        return split_prompts(self.maps.shape[0], sources)
