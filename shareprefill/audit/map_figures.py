"""The maps that a page shows of a cluster, and how well the autoencoder gives maps back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shareprefill.artifact import Policy
from shareprefill.audit.heads import Calibration, Heads
from shareprefill.autoencoder.dataset import resample_maps
from shareprefill.calib.capture import FULL
from shareprefill.report.drawing import value_png
from shareprefill.report.page import Picture

CLUSTERS_SHOWN = 12
MEMBERS_SHOWN = 4
_PIXELS = 128


@dataclass(frozen=True)
class Picked:
    """The heads whose maps stand for a cluster, by index into `Heads`.

    Attributes:
        cluster: Its number.
        size: Its heads.
        sharing: Heads of it that share a pivot's pattern.
        head: Its pivot, the one with most sharers; where it has none, the head nearest to the rest.
        is_pivot: Whether `head` is a pivot.
        members: Other heads: the nearest to `head`, the farthest, and some between.
    """

    cluster: int
    size: int
    sharing: int
    head: int
    is_pivot: bool
    members: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ClusterMaps:
    """Maps of a cluster, float32 `[R, R]` each, rows summing to 1.

    Attributes:
        picked: Whose they are.
        head: The head's map, mean over the prompts that are not held out.
        members: The members' maps, likewise.
        decoded: The head's consensus map: its mean code, decoded.
        consensus: The mean of all members' consensus maps.
        unseen: The head's map in a held-out prompt.
        reconstruction: What the autoencoder makes of it.
        loss: Mean squared Hellinger distance per row of all heads of the cluster and what the
            autoencoder makes of them, on all held-out prompts, between 0 and 1.
    """

    picked: Picked
    head: Tensor
    members: tuple[Tensor, ...]
    decoded: Tensor
    consensus: Tensor
    unseen: Tensor
    reconstruction: Tensor
    loss: float


@dataclass(frozen=True, eq=False)
class Thumbnails:
    """Maps of the clusters that are shown.

    Attributes:
        clusters: One entry a cluster, the sharing ones first, the larger ones first.
        left_out: Clusters of at least two heads that are not shown.
        heads_left_out: Their heads.
        source: Data set of the held-out prompt that is shown.
    """

    clusters: tuple[ClusterMaps, ...]
    left_out: int
    heads_left_out: int
    source: str


def pick_heads(heads: Heads, distances: Tensor) -> list[Picked]:
    """The heads that stand for each cluster of at least two, sharing and larger clusters first."""
    index = {head: i for i, head in enumerate(heads.ids.tolist())}
    found = []
    for cluster, size in heads.sizes().items():
        if size < 2:
            continue
        members = (heads.cluster == cluster).nonzero()[:, 0]
        sharing = members[heads.policy[members] == int(Policy.SHARE)]
        pivots = heads.pivot[sharing]
        is_pivot = len(pivots) > 0
        if is_pivot:
            head = index[int(pivots.mode().values)]
        else:
            head = int(members[distances[members][:, members].sum(1).argmin()])
        others = members[members != head]
        others = others[distances[head, others].argsort(stable=True)]
        shown = min(MEMBERS_SHOWN, len(others))
        places = (
            torch.linspace(0, len(others) - 1, shown, dtype=torch.float32, device="cpu")
            .round()
            .long()
        )
        picked = tuple(others[places].tolist())
        found.append(Picked(cluster, size, len(sharing), head, is_pivot, picked))
    return sorted(found, key=lambda p: (p.sharing == 0, -p.size, p.cluster))


@torch.no_grad()
def load_thumbnails(heads: Heads, calibration: Calibration, distances: Tensor) -> Thumbnails:
    """Loads the maps of the clusters to show, one prompt in memory at a time."""
    picked = pick_heads(heads, distances)
    shown, hidden = picked[:CLUSTERS_SHOWN], picked[CLUSTERS_SHOWN:]
    wanted = sorted({i for p in shown for i in (p.head, *p.members)})
    means = dict(zip(wanted, _means(calibration, wanted), strict=True))
    losses, unseen, remade = _reconstructed(calibration)
    clusters = []
    for p in shown:
        members = heads.cluster == p.cluster
        clusters.append(
            ClusterMaps(
                picked=p,
                head=means[p.head],
                members=tuple(means[i] for i in p.members),
                decoded=calibration.agreed.maps[p.head],
                consensus=calibration.agreed.maps[members].mean(0),
                unseen=unseen[p.head],
                reconstruction=remade[p.head],
                loss=float(losses[members].mean()),
            )
        )
    first = calibration.training.split.held_out[0]
    return Thumbnails(
        clusters=tuple(clusters),
        left_out=len(hidden),
        heads_left_out=sum(p.size for p in hidden),
        source=calibration.store.prompts[first].source,
    )


def _prompt(calibration: Calibration, number: int) -> Tensor:
    return calibration.store.load(number, FULL)[FULL].flatten(0, 1)  # [K, n, n]


def _means(calibration: Calibration, wanted: list[int]) -> Tensor:
    """float32 `[W, R, R]`, the mean maps of some heads over the known prompts."""
    side = calibration.training.config.resolution
    total: Any = 0
    for number in calibration.known:
        total = total + resample_maps(_prompt(calibration, number)[wanted], side)
    return total / len(calibration.known)


def _reconstructed(calibration: Calibration) -> tuple[Tensor, Tensor, Tensor]:
    """Losses `[K]` over held-out prompts, the first one's maps `[K, R, R]`, and them remade."""
    network = calibration.network
    side = calibration.training.config.resolution
    total: Any = 0
    first: tuple[Tensor, Tensor] | None = None
    for number in calibration.training.split.held_out:
        maps = resample_maps(_prompt(calibration, number), side)
        remade = network(maps)
        total = total + (maps.sqrt() - remade.sqrt()).square().sum(-1).mean(-1) / 2  # [K]
        first = first or (maps, remade)
    assert first is not None
    return total / len(calibration.training.split.held_out), *first


def map_pictures(heads: Heads, maps: ClusterMaps) -> list[Picture]:
    """The maps that stand for a cluster; roots of the attention mass, 0 to 1."""
    picked = maps.picked
    role = "pivot" if picked.is_pivot else "centre"
    name = f"{role} {heads.name(picked.head)}"
    pairs = [
        (f"{name}: mean, and its decoded code", (maps.head, maps.decoded)),
        (f"{name}: an unseen prompt, and its reconstruction", (maps.unseen, maps.reconstruction)),
        ("cluster: consensus", (maps.consensus,)),
    ]
    for index, map_ in zip(picked.members, maps.members, strict=True):
        pairs.append((f"member {heads.name(index)}: mean", (map_,)))
    return [Picture(caption, [(_png(map_), caption) for map_ in shown]) for caption, shown in pairs]


def _png(map_: Tensor) -> bytes:
    """Square roots, as the autoencoder sees them; what lies in the future is transparent."""
    if len(map_) > _PIXELS:
        map_ = resample_maps(map_, _PIXELS)
    future = torch.ones_like(map_, dtype=torch.bool).triu(1) & (map_ < 1e-6)
    return value_png(map_.clamp_min(0).sqrt().numpy(), future.numpy())
