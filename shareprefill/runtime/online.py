"""SharePrefill's own rule: pivots are found at run time (policy `share`)."""

from __future__ import annotations

import torch
from torch import Tensor

from shareprefill.artifact import Policy
from shareprefill.runtime.ops.block_selection import (
    js_distances,
    select_blocks,
    vertical_slash_blocks,
)
from shareprefill.runtime.ops.pooled_attention import pooled_attention
from shareprefill.runtime.orders import LayerOrders
from shareprefill.runtime.plan import RuntimePlan
from shareprefill.runtime.policies.base import LayerInputs
from shareprefill.runtime.policies.vertical_slash import profile_work, profiles
from shareprefill.runtime.records import Choice, Decision
from shareprefill.runtime.state import ForwardState


def choose_online(
    plan: RuntimePlan,
    orders: LayerOrders,
    state: ForwardState,
    inputs: LayerInputs,
    value: Tensor,
) -> tuple[Tensor, Choice]:
    """SharePrefill's rule (arXiv 2505.19578, section 3), heads in ascending order.

    On the last query block's distribution: a highly sparse head takes a vertical-slash pattern; the
    first other head of a cluster is computed densely and gives its pattern; a later one shares it
    where it looks alike, and takes a vertical-slash pattern where not.

    Args:
        plan: Thresholds.
        orders: Of the layer.
        state: Pivots of the earlier layers in this forward pass; this layer's are added.
        inputs: Queries and keys.
        value: `[G, Nk, Dv]`.

    Returns:
        An output `[H, Nq, Dv]` that holds that of the pivots, and the patterns.
    """
    geometry, n_clusters = inputs.geometry, len(orders.clusters)
    every = torch.arange(orders.n_heads, device=geometry.device)
    vertical, slash = profiles(inputs, every)
    spread = js_distances(vertical[:, None], geometry.uniform, orders.no_index)
    clustered = (orders.cluster_of >= 0) & (spread <= plan.delta)
    is_pivot = state.elect(orders, clustered)
    out, maps = pooled_attention(
        inputs.query,
        inputs.key,
        value,
        block_size=geometry.block_size,
        scale=inputs.scale,
        heads=torch.where(is_pivot, every, -1),
        softcap=inputs.softcap,
        sinks=inputs.sinks,
    )
    assert out is not None
    state.keep_elected(orders, is_pivot, maps)
    candidates = clustered & ~is_pivot
    clusters = state.maps[orders.clusters]
    shape = (orders.n_candidates, *geometry.shape)
    bitmap = torch.empty(shape, dtype=torch.bool, device=geometry.device)
    gamma = orders.gamma[:1].expand(n_clusters)
    select_blocks(clusters, gamma, out=bitmap[:n_clusters], **geometry.reads)
    vertical_slash_blocks(vertical, slash, orders.gamma, out=bitmap[n_clusters:], **geometry.reads)
    of_cluster = orders.cluster_of.clamp(min=0)
    distances = torch.full_like(spread, torch.nan)
    if n_clusters:
        distances = js_distances(vertical[:, None], clusters[:, -1:].contiguous(), of_cluster)
        candidates = candidates & clusters.flatten(1).sum(-1).isfinite()[of_cluster]
    passed = candidates & (distances < plan.tau)
    is_sound = vertical.sum(-1).isfinite()
    pattern = torch.where(is_sound, every + n_clusters, orders.everything)
    pattern = torch.where(passed, of_cluster, pattern)
    pattern = torch.where(is_pivot, -1, pattern)
    decision = Decision(
        codes=torch.where(is_pivot, int(Policy.PIVOT), int(Policy.VERTICAL_SLASH)),
        works=(profile_work(inputs),),
        distances=torch.where(candidates, distances, torch.nan),
    )
    return out, Choice(bitmap, pattern, decision)
