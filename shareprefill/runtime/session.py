"""Sessions: a transformers model whose prefill runs with an artifact's shared patterns."""

from __future__ import annotations

import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from shareprefill.artifact import Artifact, Policy, check_fingerprint, load_artifact
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ConfigError, UnsupportedError
from shareprefill.models import fingerprint, geometry
from shareprefill.runtime.attachment import Attachment, latest
from shareprefill.runtime.crossover import crossover
from shareprefill.runtime.distributed import HeadShard, head_shard
from shareprefill.runtime.interface import (
    AttentionCall,
    Sequence,
    attach,
    by_sequence,
    computing_itself,
    dense_attention,
)
from shareprefill.runtime.ops.blocks import count_causal_blocks
from shareprefill.runtime.orders import Orders
from shareprefill.runtime.plan import RuntimePlan, make_plan
from shareprefill.runtime.policies.base import LayerInputs
from shareprefill.runtime.records import LayerRecord, on_host
from shareprefill.runtime.sharing import LayerPass
from shareprefill.runtime.state import ForwardState

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        floor: The mass from which on each of them shares; NaN for other heads.
        distance: With policy `share`, mean JS distance to the pivot, by head; NaN where a head was
            no candidate.
        tau: With policy `share`, the distance under which a head shares; otherwise None.
        recall: Attention mass inside the patterns, by head; None unless the session measures it.
    """

    layer: int
    first_head: int
    planned: tuple[str, ...]
    policies: tuple[str, ...]
    density: tuple[float, ...]
    covered: tuple[float, ...]
    floor: tuple[float, ...]
    distance: tuple[float, ...]
    tau: float | None
    recall: tuple[float, ...] | None


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
        thresholds: gamma, slack (with policy `share` tau) and delta in force (None: chosen head by
            head offline).
        layers: The same by layer and head.
    """

    prefills: int
    dense_prefills: int
    requested_dense: int
    density: float
    selection_work: float
    policies: dict[str, int]
    thresholds: dict[str, float | None]
    layers: tuple[LayerReport, ...]


class Session:
    """Runs a model's prefills sparse while it is entered; see `share_prefill`."""

    def __init__(
        self,
        model: torch.nn.Module,
        artifact: Artifact,
        config: RuntimeConfig,
        *,
        measure_recall: bool = False,
    ) -> None:
        self.model = model
        self.artifact = artifact
        self.config = config
        self.plan: RuntimePlan = make_plan(artifact, config)
        self.shard: HeadShard | None = head_shard(model)
        self.orders = Orders(self.plan, self.shard and self.shard.heads(artifact.policy.shape[1]))
        self.measure_recall = measure_recall
        self._pass = _Pass()
        self._lock = threading.Lock()
        self._records: list[LayerRecord] = []
        # Prefills that ran dense, by layer, query rows and keys.
        self._dense: Counter[tuple[int, int, int]] = Counter()
        # Calls that were to be dense, by layer.
        self._requested: Counter[int] = Counter()
        self._attachments: list[Attachment] = []

    def __enter__(self) -> Self:
        self._attachments.append(attach(self.model, self._attend))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        attachment = latest(self._attachments)
        self._attachments.remove(attachment)
        attachment.detach()

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Lets the model compute inside as it would without a session, bit for bit.

        ::

            with session.dense():
                exact = model(**inputs)

        That holds for calls of this thread or asyncio task alone; the report counts them apart.

        Raises:
            ConfigError: the session is not entered.
        """
        if not self._attachments:
            raise ConfigError("session.dense() is for inside `with session:`; enter that first")
        with computing_itself(self.model, self._book_requested):
            yield

    def reset(self) -> None:
        """Forgets what the report counts."""
        with self._lock:
            self._records.clear()
            self._dense.clear()
            self._requested.clear()

    def report(self) -> SessionReport:
        """What was done since the session began or was last reset."""
        with self._lock:
            records, dense = list(self._records), self._dense.copy()
            requested = max(self._requested.values(), default=0)
        records = on_host(records, self.orders)
        totals = [
            _Totals(self.plan, n, [r for r in records if r.layer == n])
            for n in sorted({r.layer for r in records})
        ]
        heads = len(self.orders.heads)
        computed = sum(t.blocks.sum().item() for t in totals)
        causal = sum(r.causal * heads for r in records)
        skipped_nothing = sum(
            count * heads * count_causal_blocks(n_query, n_key - n_query, self.plan.block_size)
            for (_, n_query, n_key), count in dense.items()
        )
        taken = sum((t.taken for t in totals), Counter[str]())
        work = sum(t.work for t in totals)
        # The layer with most sparse prefills, as windows and others are dense in every pass.
        sparse = Counter(r.layer for r in records)
        seen = sparse.keys() | {layer for layer, _, _ in dense}
        first = max(sorted(seen), key=lambda layer: sparse[layer], default=0)
        return SessionReport(
            prefills=sum(r.layer == first for r in records),
            dense_prefills=sum(n for (layer, _, _), n in dense.items() if layer == first),
            requested_dense=requested,
            density=_ratio(computed + skipped_nothing, causal + skipped_nothing),
            selection_work=_ratio(work, causal + skipped_nothing),
            policies=dict(sorted(taken.items())),
            thresholds={
                "gamma": self.config.gamma,
                **({"tau": self.plan.tau} if self.plan.online else {"slack": self.config.slack}),
                "delta": self.plan.delta,
            },
            layers=tuple(t.report(self.orders.heads) for t in totals),
        )

    def _attend(self, call: AttentionCall) -> Tensor:
        n_query, n_key = call.query.shape[2], call.key.shape[2]
        device = call.query.device
        sequences, sparse = None, []
        # No sequence is longer than the call: short ones need not be found.
        if self._is_worth_it(n_query, n_key, device) and call.is_shareable:
            sequences = call.sequences()
            sparse = [s for s in sequences or () if self._is_worth_it(*s.lengths, device)]
        if sequences is None or not sparse:
            if n_query > 1:
                self._book_dense(call.layer, n_query, n_key)
            return dense_attention(call)
        states, again = self._pass.states(call)

        def attend(sequence: Sequence) -> Tensor:
            if sequence in sparse:
                return self._attend_sparse(call, sequence, states, again)
            if not again:
                self._book_dense(call.layer, *sequence.lengths)
            return dense_attention(call.of(sequence))[0]

        return by_sequence(call, sequences, attend)

    def _attend_sparse(
        self, call: AttentionCall, sequence: Sequence, states: _States, again: bool
    ) -> Tensor:
        query, key, value = call.tensors(sequence)
        state = self._state(states, sequence, query, key)
        inputs = LayerInputs(query, key, call.scale, state.geometry, call.softcap, call.sinks)
        layer_pass = LayerPass(self.plan, call.layer, state, inputs, value)
        out, record = layer_pass.run(measure_recall=self.measure_recall)
        if not again:
            with self._lock:
                self._records.append(record)
        return out

    def _is_worth_it(self, rows: int, keys: int, device: torch.device) -> bool:
        """Whether so many query rows and keys are enough for patterns to pay for their choice."""
        if rows < self.plan.block_size:
            return False
        least = self.config.min_tokens
        return keys >= (crossover(device).tokens if least is None else least)

    def _state(
        self, states: _States, sequence: Sequence, query: Tensor, key: Tensor
    ) -> ForwardState:
        """A sequence's state in this forward pass, on the device of the layer at hand."""
        state = states.get(sequence.place)
        if state is None:
            if len(query) != len(self.orders.heads):
                raise UnsupportedError(
                    f"a layer has {len(query)} query heads in this process, {self.orders.heads} "
                    "were expected: use tensor parallelism that divides every attention layer by "
                    "its heads, or none"
                )
            geometry = self.plan.geometry(query.shape[1], key.shape[1], query.device)
            state = ForwardState(geometry, self.orders, self.shard)
        elif state.geometry.device != query.device:
            state = _moved(state, self.plan, query.device)
        states[sequence.place] = state
        return state

    def _book_requested(self, layer: int, n_query: int) -> None:
        if n_query > 1:
            with self._lock:
                self._requested[layer] += 1

    def _book_dense(self, layer: int, n_query: int, n_key: int) -> None:
        with self._lock:
            self._dense[layer, n_query, n_key] += 1


_States = dict[tuple[int, int], ForwardState]


class _Pass(threading.local):
    """The forward pass that a thread is in: its states, by sequence."""

    def __init__(self) -> None:
        self._states: _States = {}
        self._layer = -1
        self._query: Callable[[], Tensor | None] = lambda: None

    def states(self, call: AttentionCall) -> tuple[_States, bool]:
        """The states of the pass that a call belongs to, and whether it repeats the last one.

        Layers come in ascending order, so a layer that is not above the last one begins a new
        pass. Only a call with the very same queries is a second one of its layer (differential
        attention asks twice, with two halves of the values).
        """
        again = call.layer == self._layer and self._query() is call.query
        if call.layer <= self._layer and not again:
            self._states = {}
        self._layer, self._query = call.layer, weakref.ref(call.query)
        return self._states, again


def _moved(state: ForwardState, plan: RuntimePlan, device: torch.device) -> ForwardState:
    """A state on another device: with a device_map, layers are on several."""
    moved = ForwardState(state.geometry.to(device), state.orders, state.exchange)
    if plan.online:
        moved.maps, moved.elected = state.maps.to(device), state.elected.to(device)
    else:
        moved.patterns, moved.sound = state.patterns.to(device), state.sound.to(device)
    return moved


def share_prefill(
    model: PreTrainedModel,
    artifact: str | Path | Artifact,
    config: RuntimeConfig | None = None,
    *,
    measure_recall: bool = False,
) -> Session:
    """A context in which a model's prefills use the shared sparse patterns of an artifact.

    ::

        with share_prefill(model, "clusters.st") as session:
            model.generate(**inputs)
        print(session.report().density)

    Prefills of any batch, padding, packing and chunking are taken; decode steps and prompts below
    the crossover run dense, and so do calls inside `with session.dense()`. The model's attention
    implementation is restored when the last context ends, also after an exception. Several threads
    may use one session at a time. Contexts of one model may overlap, and end in any order: the last
    that the thread or asyncio task entered holds there; one that entered none takes the last that
    any entered. Copies and saved models are of no session. A compiled model (`torch.compile`,
    without fullgraph=True) calls attention outside its graphs. A model may be spread over devices,
    or over processes by its heads (tensor parallelism).

    Args:
        model: A transformers decoder, in eval mode.
        artifact: Path of an artifact, or a loaded one.
        config: Options; those that are None take the artifact's values.
        measure_recall: Also measure the recall of every pattern (about one dense attention more).

    Returns:
        The session, to be entered with `with`.

    Raises:
        ArtifactError: the artifact cannot be read, or is of another model.
        ConfigError: a row count is above the artifact's block size, or the processes of a
            tensor-parallel group do not divide the heads.
        UnsupportedError: the model's family is not supported.
    """
    if not isinstance(artifact, Artifact):
        artifact = load_artifact(artifact)
    shard = head_shard(model)
    if shard is not None:
        shard.check(geometry(model))
    check_fingerprint(artifact, fingerprint(model))
    session = Session(model, artifact, config or RuntimeConfig(), measure_recall=measure_recall)
    for name in ("pivot_rows", "sample_rows", "check_rows"):
        rows = getattr(session.plan, name)
        if rows > artifact.block_size:
            raise ConfigError(
                f"{name} = {rows} is not allowed: a block has {artifact.block_size} rows"
            )
    return session


class _Totals:
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
        recalls = [r.recall for r in records if r.recall is not None]
        self.recall = torch.stack(recalls).mean(0).tolist() if recalls else None

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
            floor=tuple(
                plan.floor if plan.policy == Policy.SHARE and not online else math.nan
                for plan in plans
            ),
            distance=tuple(self.distances.nanmean(0).tolist()),
            tau=self.plan.tau if online else None,
            recall=None if self.recall is None else tuple(self.recall),
        )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0
