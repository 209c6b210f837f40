"""The heads' codes: their places in the plane, and heads that clusters say nothing about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shareprefill.audit.heads import Calibration, Heads

# Share of heads from which the page warns.
TOO_MUCH = 0.3
# Spread of a head's codes over prompts, over the spread of the heads' mean codes.
UNSTABLE = 1.0
_FEWEST = 4
_PERPLEXITY = 30.0
_SEED = 0
# A step takes time with the heads; thousands of them have found their places in half as many.
_STEPS, _MANY = 1000, 1500


@dataclass(frozen=True, eq=False)
class Plane:
    """Where each head lies.

    Attributes:
        pca: float64 `[K, 2]`, the codes' two main directions.
        explained: Share of the codes' variance along each of them.
        tsne: float64 `[K, 2]`; None where there are fewer than four different codes.
        perplexity: Of t-SNE.
    """

    pca: Tensor
    explained: tuple[float, float]
    tsne: Tensor | None
    perplexity: float


def embed_in_plane(codes: Tensor) -> Plane:
    """Principal components and t-SNE (van der Maaten and Hinton, 2008) of codes.

    The perplexity is 30, or a third of the heads where there are fewer than 90. t-SNE starts at the
    principal components, so that the places of far-apart groups mean something too. Equal codes
    have equal places, whatever the machine's threads.

    Args:
        codes: float64 `[K, Z]`.
    """
    pca, explained = _principal(codes)
    different = len(codes.unique(dim=0))
    perplexity = min(_PERPLEXITY, max(1.0, (different - 1) / 3))
    tsne = _tsne(codes, pca, perplexity) if different >= _FEWEST else None
    return Plane(pca, explained, tsne, perplexity)


def _principal(codes: Tensor) -> tuple[Tensor, tuple[float, float]]:
    centred = codes - codes.mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    plane = torch.zeros(len(codes), 2, dtype=codes.dtype, device="cpu")
    shares = [0.0, 0.0]
    total = float(values.square().sum())
    for axis in range(min(2, len(values))):
        if total == 0:
            break
        direction = directions[axis]
        # A direction's sign is arbitrary: its largest part is made positive.
        sign = torch.sign(direction[direction.abs().argmax()])
        plane[:, axis] = centred @ direction * sign
        shares[axis] = float(values[axis].square()) / total
    return plane, (shares[0], shares[1])


def _tsne(codes: Tensor, start: Tensor, perplexity: float) -> Tensor:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    initial = (start / start[:, 0].std() * 1e-4).float().numpy()
    options: dict[str, Any] = {"init": initial, "learning_rate": "auto", "random_state": _SEED}
    steps = _STEPS if len(codes) <= _MANY else _STEPS // 2
    tsne = TSNE(n_components=2, perplexity=perplexity, max_iter=steps, **options)
    # Sums over threads come out in another order each time, and t-SNE magnifies the last bit.
    scaled = (codes / codes.abs().max()).float().numpy()
    with threadpool_limits(limits=1):
        return torch.from_numpy(tsne.fit_transform(scaled)).double()


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


def spread_by_source(calibration: Calibration) -> list[SourceSpread]:
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
