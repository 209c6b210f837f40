"""What a session did: the records of its layers, summed up by layer and head."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from shareprefill.artifact import Policy
from shareprefill.plain_tables import html_table
from shareprefill.runtime.ops.blocks import count_causal_blocks
from shareprefill.runtime.plan import RuntimePlan
from shareprefill.runtime.records import LayerRecord, on_host


@dataclass(frozen=True)
class LayerReport:
    """What one layer's heads did, over all prefills of a session.

    Attributes:
        layer: Layer index.
        first_head: Index of the first head that is listed: 0, but under tensor parallelism, where
            a process lists the heads that it holds.
        planned: Name of the policy that each head was to take.
        policies: Name of the policy that each head took most often.
        density: Computed share of the causal blocks, by head.
        covered: Mean attention mass of a sharing head's sampled rows inside its pivot's pattern, by
            head; NaN where none was checked.
        min_coverage: The mass from which on each of them shares; NaN for other heads.
        distance: With policy `shareprefill`, mean JS distance to the pivot, by head; NaN where a
            head was no candidate.
        tau: With policy `shareprefill`, the distance under which a head shares; otherwise None.
        recall: Attention mass inside the patterns, by head; None unless the session measures it.
    """

    layer: int
    first_head: int
    planned: tuple[str, ...]
    policies: tuple[str, ...]
    density: tuple[float, ...]
    covered: tuple[float, ...]
    min_coverage: tuple[float, ...]
    distance: tuple[float, ...]
    tau: float | None
    recall: tuple[float, ...] | None


@dataclass(frozen=True)
class DecodingReport:
    """What decode steps did, where `decode="sparse"`.

    Attributes:
        steps: Sparse steps: a token of one sequence through the model.
        dense_steps: Steps that some layers computed densely, by the reason.
        density: Key blocks read over those that there are, mean over steps, layers and KV heads,
            dense ones included; None where there was no step.
    """

    steps: int
    dense_steps: dict[str, int]
    density: float | None

    def summary(self) -> str:
        """What was done, in a line."""
        if self.density is None:
            return "decoding: no steps"
        parts = [f"{self.steps} sparse steps"]
        parts += [f"{count} dense ({why})" for why, count in self.dense_steps.items()]
        return f"decoding: {', '.join(parts)}; density {self.density:.3f}"


@dataclass(frozen=True)
class SessionReport:
    """What a session did since it began or was last reset.

    Attributes:
        prefills: Sparse prefills: passes of one sequence (or one chunk of it) through the model.
        dense_prefills: Prefills that ran dense by themselves: too short, or with a mask that is
            not plainly causal.
        requested_dense: Prefills inside `session.dense()`, which the other figures leave out.
        density: Share of the causal blocks computed, all heads and layers, dense prefills included.
        selection_work: Work of choosing the patterns, as a share of dense attention's operations.
        policies: Heads by policy taken, over all layers and sparse prefills.
        thresholds: gamma, slack (with policy `shareprefill` tau) and delta in force (None: chosen
            head by head offline).
        layers: The same by layer and head.
        decoding: What decode steps did; None where they are dense as asked for.
        fp8_heads: Heads that ran in FP8, over all layers with sparse prefills; None where that was
            not asked for.
        least_tokens: Of the shortest prompt that is not too short: `min_tokens`, or the device's
            crossover for such a model; None where it is not known.
    """

    prefills: int
    dense_prefills: int
    requested_dense: int
    density: float
    selection_work: float
    policies: dict[str, int]
    thresholds: dict[str, float | None]
    layers: tuple[LayerReport, ...]
    decoding: DecodingReport | None = None
    fp8_heads: int | None = None
    least_tokens: int | None = None

    def __repr__(self) -> str:
        return f"<SessionReport\n{self.summary()}>"

    def summary(self) -> str:
        """What was done, in a few lines."""
        noun = "prefill" if self.prefills == 1 else "prefills"
        parts = [f"{self.prefills} sparse {noun}", f"{self.dense_prefills} dense"]
        if self.requested_dense:
            parts.append(f"{self.requested_dense} dense as asked for")
        lines = [
            ", ".join(parts),
            f"density {self.density:.3f}, selection work {self.selection_work:.3f} of dense "
            "attention's",
        ]
        if self.policies:
            lines.append("heads: " + _counted(self.policies))
        elif self.dense_prefills:
            least = "" if self.least_tokens is None else f" ({self.least_tokens:,})"
            lines.append(
                f"no prefill was sparse: prompts were below min_tokens{least}, or masks not causal"
            )
        if self.fp8_heads is not None and self.policies:
            heads = sum(len(layer.policies) for layer in self.layers)
            lines.append(f"FP8: {self.fp8_heads} of {heads} heads")
        recalls = [
            (recall, layer.layer, layer.first_head + head)
            for layer in self.layers
            for head, recall in enumerate(layer.recall or ())
        ]
        if recalls:
            worst, layer, head = min(recalls)
            mean = sum(recall for recall, _, _ in recalls) / len(recalls)
            lines.append(
                f"recall: mean {mean:.3f}, worst head {worst:.3f} (layer {layer}, head {head})"
            )
        if self.decoding is not None:
            lines.append(self.decoding.summary())
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-ready: None for what is not a number."""
        return _json_ready(asdict(self))

    def _repr_html_(self) -> str:
        """For notebooks: the summary, and a row for every layer."""
        columns = ["layer", "heads", "density", "recall"]
        rows = [
            [
                f"{layer.layer}",
                _counted(Counter(layer.policies)),
                f"{_mean(layer.density):.3f}",
                "-" if layer.recall is None else f"{_mean(layer.recall):.3f}",
            ]
            for layer in self.layers
        ]
        return html_table(self.summary(), columns, rows)


def _counted(policies: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in policies.items())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _json_ready(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _json_ready(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_report(
    plan: RuntimePlan,
    heads: range,
    records: Iterable[LayerRecord],
    *,
    dense: Counter[tuple[int, int, int]],
    requested_dense: int,
    thresholds: dict[str, float | None],
    decoding: DecodingReport | None = None,
    is_fp8: bool = False,
    least_tokens: int | None = None,
) -> SessionReport:
    """Sums up what was done.

    Args:
        plan: What every head was to do.
        heads: The query heads that this process holds.
        records: Of all layers of all sparse prefills.
        dense: Prefills that ran dense, by layer, query rows and keys.
        requested_dense: Prefills that were to be dense.
        thresholds: In force.
        decoding: What decode steps did.
        is_fp8: Whether heads were to run in FP8.
        least_tokens: Of the shortest prompt that is not too short.
    """
    known = on_host([*records])
    totals = [
        _LayerTotals(plan, n, [r for r in known if r.layer == n])
        for n in sorted({r.layer for r in known})
    ]
    computed = sum(t.blocks.sum().item() for t in totals)
    causal = sum(r.causal * len(heads) for r in known)
    skipped_nothing = sum(
        count * len(heads) * count_causal_blocks(n_query, n_key - n_query, plan.block_size)
        for (_, n_query, n_key), count in dense.items()
    )
    taken = sum((t.taken for t in totals), Counter[str]())
    work = sum(t.work for t in totals)
    # The layer with most sparse prefills, as windows and others are dense in every pass.
    sparse = Counter(r.layer for r in known)
    seen = sparse.keys() | {layer for layer, _, _ in dense}
    first = max(sorted(seen), key=lambda layer: sparse[layer], default=0)
    return SessionReport(
        prefills=sum(r.layer == first for r in known),
        dense_prefills=sum(n for (layer, _, _), n in dense.items() if layer == first),
        requested_dense=requested_dense,
        density=_ratio(computed + skipped_nothing, causal + skipped_nothing, none=1.0),
        selection_work=_ratio(work, causal + skipped_nothing, none=0.0),
        policies=dict(sorted(taken.items())),
        thresholds=thresholds,
        layers=tuple(t.report(heads) for t in totals),
        decoding=decoding,
        fp8_heads=sum(t.fp8_heads(heads) for t in totals) if is_fp8 else None,
        least_tokens=least_tokens,
    )


class _LayerTotals:
    """One layer's records, on the host."""

    def __init__(self, plan: RuntimePlan, layer: int, records: list[LayerRecord]) -> None:
        self.plan, self.layer = plan, layer
        policies = torch.stack([r.policies for r in records])
        self.names = [[plan.labels[code] for code in row] for row in policies.T.tolist()]
        self.taken = Counter(name for names in self.names for name in names)
        self.blocks = torch.stack([r.blocks for r in records])
        self.causal = torch.tensor([r.causal for r in records], dtype=torch.float64, device="cpu")
        self.covered, self.distances = (
            torch.stack(values)
            for values in ([r.covered for r in records], [r.distances for r in records])
        )
        shares = torch.stack([r.work for r in records]).double()
        self.work = (shares.sum(-1) * self.causal).sum().item()
        self.read = [r.totals.head_to_list.tolist() for r in records if r.totals is not None]
        recalls = [r.recall for r in records if r.recall is not None]
        self.recall = torch.stack(recalls).mean(0).tolist() if recalls else None

    def fp8_heads(self, heads: range) -> int:
        """Heads that were planned in FP8, and read a list: other outputs come from elsewhere."""
        plans = [self.plan.layers[self.layer][h] for h in heads]
        return sum(
            plan.is_fp8 and any(read[place] >= 0 for read in self.read)
            for place, plan in enumerate(plans)
        )

    def report(self, heads: range) -> LayerReport:
        plans = [self.plan.layers[self.layer][h] for h in heads]
        online = self.plan.online
        return LayerReport(
            layer=self.layer,
            first_head=heads.start,
            planned=tuple(self.plan.labels[plan.policy] for plan in plans),
            policies=tuple(Counter(names).most_common(1)[0][0] for names in self.names),
            density=tuple((self.blocks.double().sum(0) / self.causal.sum()).tolist()),
            covered=tuple(self.covered.nanmean(0).tolist()),
            min_coverage=tuple(
                plan.min_coverage if plan.policy == Policy.SHARE and not online else math.nan
                for plan in plans
            ),
            distance=tuple(self.distances.nanmean(0).tolist()),
            tau=self.plan.tau if online else None,
            recall=None if self.recall is None else tuple(self.recall),
        )


def _ratio(part: float, whole: float, *, none: float) -> float:
    return part / whole if whole else none
