"""What bench_layer.py and measure_crossover.py time: inputs with structure, and plans of one layer.

Queries are attracted by the first tokens and by some key blocks, which half as many queries as not
see. Of every eight heads, seven look at the same blocks, a little more or less sharply, and one at
others: it does not look like its pivot. How many blocks attract decides the density.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from shareprefill.artifact import Policy
from shareprefill.runtime.core import LayerChoice, SequenceState, SparsePrefill
from shareprefill.runtime.ops.block_selection import covered_mass
from shareprefill.runtime.ops.pooled_attention import pooled_attention
from shareprefill.runtime.plan import HeadPlan, RuntimePlan
from shareprefill.runtime.policies.base import LayerInputs
from shareprefill.runtime.records import LayerRecord

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 128
HOT_TOKENS, STRENGTH = 32, 11.0
# First tokens that attract heads, and those that attract unlike heads.
SINK_TOKENS = (64, 8)
# One head of so many is unlike the others.
UNLIKE = 8
# Density of the plan `mixed` at which the goals are set.
DENSITIES = {8192: 0.30, 32768: 0.11, 131072: 0.10}

P, S, R, V, M = (
    Policy.PIVOT,
    Policy.SHARE,
    Policy.SAMPLED,
    Policy.VERTICAL_SLASH,
    Policy.SMOOTHED,
)
PLANS = {
    "mixed": (P,) * 2 + (S,) * 16 + (V,) * 10 + (R,) * 4,
    "shared": (P,) * 4 + (S,) * 28,
    "smoothed": (M,) * 32,
    "sampled": (R,) * 32,
    "vertical-slash": (V,) * 32,
}
# Longer inputs take their attracting blocks and gammas from so many tokens: exact maps take long.
LONGEST_TUNED = 131072
_GAMMA_STEPS = 8
# What a head does that does not look like its pivot.
FALLBACK = M


def gammas_of(policies: tuple[Policy, ...]) -> set[Policy]:
    """The policies whose gammas a plan reads: sharing heads have their pivot's."""
    found = {P if policy is S else policy for policy in policies}
    return found | {FALLBACK} if S in policies else found


def uniform_plan(
    policies: tuple[Policy, ...],
    gammas: Mapping[Policy, float],
    layers: int = 1,
    *,
    in_fp8: bool = False,
) -> RuntimePlan:
    """A plan of layers that are alike; sharing heads take turns at the pivots of their layer.

    Args:
        policies: Of every head of a layer, pivots first.
        gammas: Attention mass that patterns cover, by policy.
        layers: Layers.
        in_fp8: Whether the sparse attention of all heads has operands of e4m3.
    """
    pivots, heads = policies.count(P), len(policies)

    def head_plan(layer: int, head: int, policy: Policy) -> HeadPlan:
        pivot = head if policy is P else head % pivots if policy is S else None
        return HeadPlan(
            head=layer * heads + head,
            policy=policy,
            pivot=-1 if pivot is None else layer * heads + pivot,
            fallback=FALLBACK if policy is S else policy,
            gamma=gammas[P if policy is S else policy],
            fallback_gamma=gammas[FALLBACK if policy is S else policy],
            coverage_slack=0.04,
            cluster=layer,
            is_fp8=in_fp8,
        )

    return RuntimePlan(
        layers=tuple(
            tuple(head_plan(layer, head, policy) for head, policy in enumerate(policies))
            for layer in range(layers)
        ),
        labels=tuple(policy.label for policy in Policy),
        selectors={},
        estimator={},
        online=False,
        slash_needs_sparsity=False,
        block_size=BLOCK,
        tau=0.2,
        delta=0.3,
        pivot_rows=4,
        sample_rows=8,
        check_rows=1,
        sink_blocks=1,
        local_blocks=2,
        max_density=1.0,
        refuse_nonfinite=False,
    )


@dataclass(frozen=True)
class Tuning:
    """What gives a plan a density and a recall.

    Attributes:
        hot: Blocks that attract each kind of heads.
        gammas: Attention mass that patterns cover, by policy.
        density: Reached.
    """

    hot: int
    gammas: dict[Policy, float]
    density: float


class Structured:
    """Inputs of one layer whose attracting blocks can be placed anew.

    Attributes:
        query: `[32, N, 128]`; bfloat16 on a GPU, float32 on a CPU.
        key: `[8, N, 128]`.
        value: `[8, N, 128]`.
        unlike: Heads that do not look like their pivot, bool `[32]`.
    """

    def __init__(self, tokens: int, device: str, seed: int = 0) -> None:
        self.tokens = tokens
        self._generator = torch.Generator(device).manual_seed(seed)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.query, self.key, self.value = (
            torch.randn((heads, tokens, DIM), generator=self._generator, device=device, dtype=dtype)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        head = torch.arange(HEADS, device=device)
        self.unlike = head % UNLIKE == UNLIKE - 1
        strength = STRENGTH * (1 + 0.02 * (head % 4 - 1.5))
        for feature, mine in enumerate((~self.unlike, self.unlike)):
            self.query[..., feature] += (strength * mine).to(dtype)[:, None]
        blocks = tokens // BLOCK
        self._order = [
            torch.randperm(blocks, generator=self._generator, device=device) for _ in range(2)
        ]
        self._noise = self.key[..., :2].clone()

    def place(self, hot: int) -> None:
        """Lets `hot` key blocks attract each of the two kinds of heads.

        Args:
            hot: Blocks, at most `tokens // 128`; those of a larger number hold a smaller one's.
        """
        for feature, (order, sink) in enumerate(zip(self._order, SINK_TOKENS, strict=True)):
            attracts = torch.zeros(self.tokens, device=self.key.device, dtype=self.key.dtype)
            whole = attracts[: len(order) * BLOCK].view(-1, BLOCK)
            whole[order[:hot], :HOT_TOKENS] = 1
            attracts[:sink] = 1
            self.key[..., feature] = self._noise[..., feature] + STRENGTH * attracts

    def tune(self, density: float, recall: float, policies: tuple[Policy, ...]) -> Tuning:
        """Lets as many blocks attract as a plan needs to be nearest to a density.

        Above `LONGEST_TUNED` tokens it is found at so many, and the share of the blocks is kept.

        Args:
            density: Wanted.
            recall: That gammas are to give.
            policies: Of the plan's heads.

        Returns:
            What was found.
        """
        if self.tokens > LONGEST_TUNED:
            found = _tuned_shorter(self.query.device.type, density, recall, policies)
            found = replace(found, hot=found.hot * self.tokens // LONGEST_TUNED)
            self.place(found.hot)
            return found
        low, high = 1, max(1, self.tokens // BLOCK // 2)
        tried: list[Tuning] = []
        while low <= high:
            middle = (low + high) // 2
            self.place(middle)
            gammas = self.gammas_for(recall, policies)
            reached = chosen_density(self.layer(uniform_plan(policies, gammas))())
            tried.append(Tuning(middle, gammas, reached))
            if reached < density:
                low = middle + 1
            else:
                high = middle - 1
        best = min(tried, key=lambda tuning: abs(tuning.density - density))
        self.place(best.hot)
        return best

    def gammas_for(self, recall: float, policies: tuple[Policy, ...]) -> dict[Policy, float]:
        """The least gamma at which heads of each policy reach a mean recall, as calibrated.

        Args:
            recall: To be reached; of sharing heads, by those that look like their pivot.
            policies: Of a plan's heads.
        """
        _, maps = pooled_attention(self.query, self.key, block_size=BLOCK, scale=DIM**-0.5)
        return {policy: self._gamma_for(recall, policy, maps) for policy in gammas_of(policies)}

    def _gamma_for(self, recall: float, policy: Policy, maps: torch.Tensor) -> float:
        policies = PLANS["shared"] if policy is P else (policy,) * HEADS
        counted = ~self.unlike if policy is P else torch.ones_like(self.unlike)
        low, high = 0.0, 0.999
        for _ in range(_GAMMA_STEPS):
            middle = (low + high) / 2
            plan = uniform_plan(policies, dict.fromkeys(gammas_of(policies), middle))
            choice = self.layer(plan)().choose()
            covered = covered_mass(maps, choice.selection.patterns, choice.head_to_pattern)
            enough = covered[counted].mean().item() >= recall
            low, high = (low, middle) if enough else (middle, high)
        return high

    def layer(self, plan: RuntimePlan) -> Callable[[], LayerCall]:
        """Begins forward passes of one layer, after the geometry is made."""
        prefill = SparsePrefill(plan)
        geometry = plan.geometry(self.tokens, self.tokens, self.query.device)
        return lambda: LayerCall(prefill, prefill.begin(geometry), self.query, self.key, self.value)


@lru_cache(maxsize=8)
def _tuned_shorter(
    device: str, density: float, recall: float, policies: tuple[Policy, ...]
) -> Tuning:
    """What the longest tuned inputs need."""
    return Structured(LONGEST_TUNED, device).tune(density, recall, policies)


@dataclass(frozen=True)
class LayerCall:
    """One layer's tensors, and the state of their sequence before it.

    Attributes:
        prefill: Computes it.
        state: Of the sequence.
        query: `[32, N, 128]`.
        key: `[8, N, 128]`.
        value: `[8, N, 128]`.
    """

    prefill: SparsePrefill
    state: SequenceState
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def choose(self) -> LayerChoice:
        """All but attention."""
        inputs = LayerInputs(self.query, self.key, DIM**-0.5, self.state.geometry)
        return self.prefill.choose(0, self.state, inputs, self.value)

    def run(self, *, measure_recall: bool = False) -> tuple[torch.Tensor, LayerRecord]:
        """All of it, as sessions run it."""
        return self.prefill.attend(
            0,
            self.state,
            self.query,
            self.key,
            self.value,
            scale=DIM**-0.5,
            measure_recall=measure_recall,
        )


def chosen_density(layer: LayerCall) -> float:
    """Chosen blocks over causal blocks, before attention."""
    record = layer.choose().record
    return record.blocks.double().mean().item() / record.causal


def wanted_density(tokens: int) -> float:
    """The density at which a length is measured: that of the nearest length with a goal."""
    return DENSITIES[min(DENSITIES, key=lambda known: abs(known - tokens))]


@dataclass(frozen=True)
class Facts:
    """What a layer did.

    Attributes:
        density: Computed blocks over causal blocks.
        recall: Attention mass inside the patterns, mean over heads.
        worst_recall: Of the worst head.
        sharing: Heads that share, of those that may.
    """

    density: float
    recall: float
    worst_recall: float
    sharing: float


def facts_of(layer: LayerCall) -> Facts:
    """Runs a layer and looks at what it did."""
    may = sum(head.policy == S for head in layer.prefill.plan.layers[0])
    record = layer.run(measure_recall=True)[1]
    assert record.recall is not None
    shared = (record.policies == int(S)).sum().item()
    return Facts(
        record.blocks.sum().item() / record.causal / len(record.blocks),
        record.recall.mean().item(),
        record.recall.min().item(),
        shared / max(1, may),
    )
