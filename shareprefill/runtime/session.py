"""Sessions: a transformers model whose prefill runs with an artifact's shared patterns."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from shareprefill.artifact import Artifact, check_fingerprint, load_artifact
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ConfigError
from shareprefill.models import fingerprint, geometry, text_decoder
from shareprefill.policy_names import POLICIES, WITHOUT_ARTIFACT
from shareprefill.runtime.attachment import Attachment, latest
from shareprefill.runtime.core import SequenceState, SparsePrefill
from shareprefill.runtime.crossover import DECODING, SDPA, crossover
from shareprefill.runtime.decoding import SparseDecoding, density_of, effect_of
from shareprefill.runtime.interface import (
    AttentionCall,
    Sequence,
    attach,
    by_sequence,
    computing_itself,
    dense_attention,
)
from shareprefill.runtime.layers import head_shard, layer_sizes
from shareprefill.runtime.ops.fp8_attention import refuse as refuse_fp8
from shareprefill.runtime.ops.hopper.launch import refusal_of_kind
from shareprefill.runtime.plan import RuntimePlan, make_plan, plan_without_artifact
from shareprefill.runtime.policies import policy_text
from shareprefill.runtime.records import LayerRecord, Sketch, on_host
from shareprefill.runtime.report import SessionReport, make_report

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shareprefill.runtime.steps import DecodeSteps


class Session:
    """Runs a model's prefills sparse while it is entered; see `share_prefill`."""

    def __init__(
        self,
        model: PreTrainedModel,
        artifact: Artifact | None,
        config: RuntimeConfig,
        *,
        measure_recall: bool = False,
        keep_maps: bool = False,
        weights_distance: float = 0.0,
    ) -> None:
        self.model = model
        # 0 where the model has the artifact's attention weights, see `check_fingerprint`.
        self.weights_distance = weights_distance
        self.artifact = artifact
        self.config = config
        shard = head_shard(model)
        plan = _plan_of(model, artifact, config)
        if config.precision == "fp8":
            _require_fp8(model, plan)
        heads = shard and shard.heads(len(plan.layers[0]))
        self.prefill, self._sizes = SparsePrefill(plan, heads, shard), layer_sizes(model, shard)
        self.steps = _steps_of(model, artifact, config, self)
        self.measure_recall = measure_recall or keep_maps
        self.keep_maps = keep_maps
        self._pass = _Pass()
        self._lock = threading.Lock()
        self._records: list[LayerRecord] = []
        # Prefills that ran dense, by layer, query rows and keys.
        self._dense: Counter[tuple[int, int, int]] = Counter()
        # Calls that were to be dense, by layer.
        self._requested: Counter[int] = Counter()
        self._attachments: list[Attachment] = []

    def __repr__(self) -> str:
        layers = self.plan.layers
        planned = Counter(self.plan.labels[head.policy] for layer in layers for head in layer)
        heads = ", ".join(f"{count} {name}" for name, count in planned.items())
        of = "no artifact" if self.artifact is None else f"artifact of {self.artifact.model!r}"
        state = "entered" if self._attachments else "not entered"
        return (
            f"<Session of {type(self.model).__name__}, {len(layers)} layers of {len(layers[0])} "
            f"heads, {state}\n"
            f"policy {self.config.policy!r}, {of}, blocks of {self.plan.block_size} tokens\n"
            f"planned: {heads}>"
        )

    @property
    def plan(self) -> RuntimePlan:
        """What every head of the model is to do."""
        return self.prefill.plan

    def __enter__(self) -> Self:
        follows_caches = self.steps is not None
        self._attachments.append(attach(self.model, self._attend, follows_caches=follows_caches))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        attachment = latest(self._attachments)
        self._attachments.remove(attachment)
        decoder = attachment.modules[0]
        attachment.detach()
        # Called as `decoder.forward(...)`, a pass goes past the check at its end.
        if kind is None and attachment.unwatched and not attachment.joined:
            from shareprefill.runtime.passes import no_effect

            raise no_effect(decoder)

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

    def warm_up(self) -> None:
        """Makes what prompts of all lengths need, so that the first of them does not wait for it.

        A few blocks of tokens go through the model, sparse whatever the crossover; the report does
        not count them. Kernels are compiled then, and are kept on disk for later processes.

        ::

            with share_prefill(model, "clusters.st") as session:
                session.warm_up()

        Raises:
            ConfigError: the session is not entered.
        """
        if not self._attachments:
            raise ConfigError("session.warm_up() is for inside `with session:`; enter that first")
        sizes = (1, 3 * self.plan.block_size)
        ids = torch.zeros(sizes, dtype=torch.long, device=self.model.device)
        self._pass.is_warm_up = True
        try:
            with torch.no_grad():
                self.model(input_ids=ids, use_cache=False)
        finally:
            self._pass.is_warm_up = False

    def reset(self) -> None:
        """Forgets what the report counts, and frees what is kept for it of every sparse prefill."""
        with self._lock:
            self._records.clear()
            self._dense.clear()
            self._requested.clear()
        if self.steps is not None:
            self.steps.reset()

    def report(self) -> SessionReport:
        """What was done since the session began or was last reset."""
        with self._lock:
            records, dense = list(self._records), self._dense.copy()
            requested = max(self._requested.values(), default=0)
        rule = {"tau": self.plan.tau} if self.plan.online else {"slack": self.config.slack}
        thresholds = {"gamma": self.config.gamma, **rule, "delta": self.plan.delta}
        return make_report(
            self.plan,
            self.prefill.heads,
            records,
            dense=dense,
            requested_dense=requested,
            thresholds=thresholds,
            decoding=None if self.steps is None else self.steps.report(),
            is_fp8=self.config.precision == "fp8",
            least_tokens=self.least_tokens(self.model.device),
        )

    def sketches(self) -> dict[int, Sketch]:
        """Maps and patterns of the last sparse prefill, or its last chunk, by layer.

        Empty unless the session keeps maps.
        """
        with self._lock:
            last = {record.layer: record for record in self._records}
        found = on_host([*last.values()])
        return {record.layer: record.sketch for record in found if record.sketch is not None}

    def _attend(self, call: AttentionCall) -> Tensor:
        n_query, n_key = call.query.shape[2], call.key.shape[2]
        device = call.query.device
        if self.steps is not None:
            if n_query == 1:
                return self.steps.attend(call, again=self._pass.states(call)[1])
            if not self._pass.is_warm_up:
                self.steps.read_prompt(call)
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
        state = states.get(sequence.place)
        if state is None:
            geometry = self.plan.geometry(query.shape[1], key.shape[1], query.device)
            state = states[sequence.place] = self.prefill.begin(geometry)
        out, record = self.prefill.attend(
            call.layer,
            state,
            query,
            key,
            value,
            scale=call.scale,
            softcap=call.softcap,
            sinks=call.sinks,
            measure_recall=self.measure_recall,
            keep_maps=self.keep_maps,
        )
        if not again and not self._pass.is_warm_up:
            with self._lock:
                self._records.append(record)
        return out

    def _is_worth_it(self, rows: int, keys: int, device: torch.device) -> bool:
        """Whether so many query rows and keys are enough for patterns to pay for their choice."""
        if rows < self.plan.block_size:
            return False
        least = 0 if self._pass.is_warm_up else self.config.min_tokens
        return crossover(device).or_from(least).is_worth_it(rows, keys, self._sizes)

    def least_tokens(self, device: torch.device, backend: str = SDPA) -> int:
        """Tokens from which on a sequence is computed sparsely, rather than by such attention."""
        return crossover(device, backend).or_from(self.config.min_tokens).tokens_of(self._sizes)

    def _book_requested(self, layer: int, n_query: int) -> None:
        if n_query > 1:
            with self._lock:
                self._requested[layer] += 1

    def _book_dense(self, layer: int, n_query: int, n_key: int) -> None:
        if not self._pass.is_warm_up:
            with self._lock:
                self._dense[layer, n_query, n_key] += 1


def _plan_of(
    model: PreTrainedModel, artifact: Artifact | None, config: RuntimeConfig
) -> RuntimePlan:
    if artifact is not None:
        return make_plan(artifact, config)
    sizes = geometry(model)
    return plan_without_artifact(sizes.layers, sizes.heads, config)


def _require_fp8(model: PreTrainedModel, plan: RuntimePlan) -> None:
    """Refuses a model that FP8 attention cannot compute where it is, before its first prefill.

    Raises:
        UnsupportedError: says why, and what to do.
    """
    dim = geometry(model).head_dim
    refuse_fp8(refusal_of_kind(model.device, model.dtype, (dim, dim), plan.block_size))


def _steps_of(
    model: PreTrainedModel, artifact: Artifact | None, config: RuntimeConfig, session: Session
) -> DecodeSteps | None:
    if config.decode == "dense":
        return None
    # Not at the top: importing it imports torch's compiler, which takes long.
    from shareprefill.runtime.steps import DecodeSteps

    effect = effect_of(artifact)
    if effect is not None:
        effect = effect[:, session.prefill.heads.start : session.prefill.heads.stop]
    decoding = SparseDecoding(density=density_of(config), effect=effect)
    least_tokens = partial(session.least_tokens, backend=DECODING)
    return DecodeSteps(text_decoder(model), decoding, least_tokens)


_States = dict[tuple[int, int], SequenceState]


class _Pass(threading.local):
    """The forward pass that a thread is in: its states, by sequence; and whether it warms up."""

    def __init__(self) -> None:
        self.is_warm_up = False
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


def share_prefill(
    model: PreTrainedModel,
    artifact: str | Path | Artifact | None = None,
    config: RuntimeConfig | None = None,
    *,
    measure_recall: bool = False,
    keep_maps: bool = False,
    **options: Any,
) -> Session:
    """A context in which a model's prefills use the shared sparse patterns of an artifact.

    ::

        with share_prefill(model, "clusters.st") as session:
            model.generate(**inputs)
        print(session.report())

    Without an artifact all heads follow one policy, which needs no calibration and runs on any
    model: `share_prefill(model, policy="smoothed", gamma=0.9)`.

    Prefills of any batch, padding, packing and chunking are taken. Decode steps are dense, unless
    `decode="sparse"` is asked for (docs/runtime.md says when those are dense, too). Prompts below
    the crossover run dense, and so do calls inside `with session.dense()`. The model's attention
    implementation is restored when the last context ends, also after an exception. Several threads
    may use one session at a time. Contexts of one model may overlap, and end in any order: the last
    that the thread or asyncio task entered holds there; one that entered none takes the last that
    any entered. Copies and saved models are of no session. A compiled model (`torch.compile`,
    without fullgraph=True) calls attention outside its graphs. A model may be spread over devices,
    or over processes by its heads (tensor parallelism).

    Args:
        model: A transformers decoder, in eval mode.
        artifact: Path of an artifact, or a loaded one; None for a policy that plans nothing.
        config: Options; those that are None take the artifact's values.
        measure_recall: Also measure the recall of every pattern (about one dense attention more).
        keep_maps: Measure it, and keep a sketch of every map and pattern: `Session.sketches`.
        options: Fields of `RuntimeConfig` instead of `config`. `policy` may be an object, too; it
            is `smoothed` where neither it nor an artifact is given.

    Returns:
        The session, to be entered with `with`.

    Raises:
        ArtifactError: the artifact cannot be read, or is of another model.
        ConfigError: an argument is of another kind, an option is not allowed or does nothing to
            the policy, the policy needs an artifact, a row count is above the block size, or the
            processes of a tensor-parallel group do not divide the heads.
        UnsupportedError: the model's family is not supported, or FP8 attention cannot compute it.
    """
    _require_kinds(model, artifact, config)
    config = _config_of(config, options, is_planned=artifact is not None)
    if isinstance(artifact, (str, Path)):
        if artifact in POLICIES and not Path(artifact).exists():
            raise ConfigError(f"{artifact!r} is a policy, not an artifact: use policy={artifact!r}")
        artifact = load_artifact(artifact)
    shard = head_shard(model)
    if shard is not None:
        sizes = geometry(model)
        shard.check(sizes.heads, sizes.kv_heads)
    distance = 0.0 if artifact is None else check_fingerprint(artifact, fingerprint(model))
    return Session(
        model,
        artifact,
        config,
        measure_recall=measure_recall,
        keep_maps=keep_maps,
        weights_distance=distance,
    )


def _require_kinds(model: object, artifact: object, config: object) -> None:
    """Refuses what is no model, artifact or configuration, before its parts are asked for."""
    if not (isinstance(model, torch.nn.Module) and hasattr(model, "config")):
        # A pipeline holds a model, and what is parallel over its data wraps one.
        held = [n for n in ("model", "module") if hasattr(getattr(model, n, None), "config")]
        way_out = f"give its .{held[0]}" if held else "load one, as with AutoModelForCausalLM"
        raise ConfigError(f"{type(model).__name__} is no model of transformers: {way_out}")
    for name, value, kinds, expected in (
        ("artifact", artifact, (str, Path, Artifact), "a path, or what load_artifact gives"),
        ("config", config, (RuntimeConfig,), "a RuntimeConfig; or give its fields by name"),
    ):
        if value is not None and not isinstance(value, kinds):
            raise ConfigError(
                f"{name} = {type(value).__name__} is not allowed: it must be {expected}"
            )


def _config_of(
    config: RuntimeConfig | None, options: dict[str, Any], *, is_planned: bool
) -> RuntimeConfig:
    if config is not None and options:
        raise ConfigError(
            f"give config or {', '.join(options)}, not both: the latter are fields of the former"
        )
    if config is not None:
        return config
    if "policy" in options:
        options["policy"] = policy_text(options["policy"])
    elif not is_planned:
        options["policy"] = WITHOUT_ARTIFACT
    return RuntimeConfig.from_dict(options)
