"""Heads that the clusters say nothing about: without company, or unlike themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shareprefill.audit.heads import Calibration, Heads

# Share of heads from which the page warns.
TOO_MUCH = 0.3
# Spread of a head's codes over prompts, over the spread of the heads' mean codes.
UNSTABLE = 1.0


@dataclass(frozen=True, eq=False)
class Noise:
    """How many heads are noise, and which.

    Attributes:
        alone: bool `[K]`, heads in no cluster, or the only one of theirs.
        unstable: bool `[K]`, heads whose codes spread over prompts by more than the mean codes of
            all heads spread around theirs: the prompt says more about such a head's map than which
            head it is.
        spread: float64 `[K]`, that ratio.
    """

    alone: Tensor
    unstable: Tensor
    spread: Tensor

    @property
    def heads(self) -> Tensor:
        """bool `[K]`, heads that are either."""
        return self.alone | self.unstable

    @property
    def share(self) -> float:
        """Share of all heads, between 0 and 1."""
        return float(self.heads.double().mean())

    @property
    def is_high(self) -> bool:
        """Whether it is more than 30 % of the heads."""
        return self.share > TOO_MUCH


def find_noise(heads: Heads) -> Noise:
    """Heads in no cluster, and unstable heads."""
    sizes = heads.sizes()
    alone = torch.tensor(
        [sizes.get(label, 0) < 2 for label in heads.cluster.tolist()], device="cpu"
    )
    spread = heads.instability / _spread_of_heads(heads.code)
    return Noise(alone, spread > UNSTABLE, spread)


@dataclass(frozen=True)
class SourceSpread:
    """How far one data set's prompts move the heads' codes from their means.

    Attributes:
        source: The data set.
        prompts: Its prompts.
        spread: Distance of a head's code to its mean code, over the spread of the heads' mean
            codes; median over its prompts and all heads.
        worst: The same, 95th percentile.
    """

    source: str
    prompts: int
    spread: float
    worst: float


def spread_by_source(heads: Heads, calibration: Calibration) -> list[SourceSpread]:
    """The spread of codes, data set by data set, all prompts counted, held-out ones among them."""
    means = calibration.agreed.code.double()
    distances = (calibration.codes.double() - means).norm(dim=-1)  # [P, K]
    distances = distances / _spread_of_heads(means)
    sources = [record.source for record in calibration.store.prompts]
    found = []
    for source in sorted(set(sources)):
        rows = distances[[name == source for name in sources]].flatten()
        found.append(
            SourceSpread(
                source,
                sources.count(source),
                float(rows.quantile(0.5)),
                float(rows.quantile(0.95)),
            )
        )
    return found


def _spread_of_heads(codes: Tensor) -> Tensor:
    """Root of the mean squared distance of `[K, Z]` codes to their mean, above 0."""
    return (codes - codes.mean(0)).square().sum(1).mean().sqrt().clamp_min(1e-12)
