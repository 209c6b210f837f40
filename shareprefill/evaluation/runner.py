"""A loaded model that is measured: prompt after prompt, under dense attention and every variant."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from shareprefill.artifact import Artifact, artifact_bytes
from shareprefill.config import DECODE_DENSITY, RuntimeConfig
from shareprefill.errors import ConfigError
from shareprefill.evaluation.config import DENSE, PERPLEXITY, EvalConfig
from shareprefill.evaluation.questions import Question
from shareprefill.models import (
    Fingerprint,
    fingerprint,
    load_model,
    load_tokenizer,
    max_length,
    model_digest,
)
from shareprefill.runtime.fidelity import compare_predictions, final_states, token_losses
from shareprefill.runtime.generation import follow, generate, prefill, relative_error
from shareprefill.runtime.interface import AttentionCall, dense_attention
from shareprefill.runtime.plan import require_read, what_is_read
from shareprefill.runtime.session import Session, SessionReport
from shareprefill.version import __version__

# Enough to tell figures apart, few enough for a line a prompt.
_DIGITS = 5


@dataclass(frozen=True)
class Outcome:
    """What was measured of one prompt under one variant.

    Attributes:
        score: The benchmark's score; for perplexity the mean negative log likelihood, in nats.
        text: The completion; empty for perplexity.
        tokens: Tokens of the prompt.
        ttft_s: Seconds to the first token, median of its repetitions; None unless measured.
        dense_ttft_s: The same of dense attention, in turns with it.
        density: Computed blocks over causal blocks.
        selection_work: Share of dense attention's work.
        heads: Heads by policy taken.
        recalls: By layer and head, in order; empty unless measured.
        layer_errors: Relative errors of the attention outputs; empty unless measured.
        hidden_error: Relative error of the last hidden state.
        kl: Mean KL divergence from dense attention's predictions over all positions, in nats; None
            unless measured.
        top1_agreement: Share of the positions whose most likely next token is dense attention's.
        bins: Mean negative log likelihood by position, None where no token is; empty for questions.
        answer_kl: With sparse decode steps, mean KL divergence of the steps that follow dense
            attention's answer, prefill and all, from dense attention's; None unless measured, or
            where the answer is one token.
        answer_agreement: Share of these steps with dense attention's most likely next token.
        decode_density: Blocks that the answer's steps read over all; None of dense ones.
    """

    score: float
    text: str
    tokens: int
    ttft_s: float | None
    dense_ttft_s: float | None
    density: float = 1.0
    selection_work: float = 0.0
    heads: dict[str, int] | None = None
    recalls: tuple[float, ...] = ()
    layer_errors: tuple[float, ...] = ()
    hidden_error: float = 0.0
    kl: float | None = None
    top1_agreement: float | None = None
    bins: tuple[float | None, ...] = ()
    answer_kl: float | None = None
    answer_agreement: float | None = None
    decode_density: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Outcome:
        """The inverse of `to_dict`."""
        lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        return cls(**{**values, **lists})


@dataclass(frozen=True, eq=False)
class Variant:
    """One attention to measure.

    Attributes:
        policy: Policy of its session; `dense`: no session at all.
        settings: What tells it from others of its policy.
        artifact: Artifact of its session; None for none, and for `dense`.
        runtime: Options of its session; None for `dense`.
    """

    policy: str
    settings: dict[str, Any]
    artifact: Artifact | None
    runtime: RuntimeConfig | None


DENSE_VARIANT = Variant(DENSE, {}, None, None)


@dataclass(frozen=True)
class _Answer:
    """What one timed prefill, and what followed it, gave.

    Attributes:
        score: As in `Outcome`.
        text: As in `Outcome`.
        seconds: To the first token.
        hidden: Last hidden state of the prompt's last token, float32 `[hidden_size]`.
        states: Final states of the prompt `[N, hidden_size]`; None unless measured.
        bins: As in `Outcome`.
        steps: Final states of the answer's steps `[T, hidden_size]`; None unless measured.
        tokens: That the steps read, int64 `[T]`.
    """

    score: float
    text: str
    seconds: float
    hidden: Tensor
    states: Tensor | None
    bins: tuple[float | None, ...] = ()
    steps: Tensor | None = None
    tokens: Tensor | None = None


class PromptMeasurement:
    """Measures variants of one prompt; dense attention answers once, with the first variant.

    Args:
        model: A transformers decoder, in eval mode.
        tokenizer: Its tokenizer.
        question: The prompt.
        length: Tokens a prompt, at most: what the bins divide.
        bins: Ranges of position that perplexity is told for.
        measure: Whether recall, the attention's errors and the distance of the predictions from
            dense attention's are measured; the former two take a prefill of their own.
        repeats: Timed prefills of each variant, each beside one of dense attention; 0 for no times:
            one prefill then measures all.
        warm_up: Run dense attention once more before it is timed: kernels may be new at this
            length.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        question: Question,
        *,
        length: int,
        bins: int,
        measure: bool,
        repeats: int,
        warm_up: bool,
    ) -> None:
        self.model, self.tokenizer, self.question = model, tokenizer, question
        self.length, self.bins, self.measure, self.repeats = length, bins, measure, repeats
        self.warm_up = warm_up
        self._dense: _Answer | None = None

    def run(self, variant: Variant) -> Outcome:
        """The outcome of one variant."""
        dense, tokens = self._dense_answer(), len(self.question.input_ids)
        if variant.runtime is None:
            median = None
            if self.repeats:
                more = (self._prefill() for _ in range(self.repeats - 1))
                median = statistics.median([dense.seconds, *more])
            return Outcome(dense.score, dense.text, tokens, median, median, bins=dense.bins)
        measuring = self._measuring(variant.artifact, variant.runtime)
        seconds = dense_seconds = None
        if self.repeats:
            # First the prefill that measures: it warms up the ones that are timed.
            with measuring:
                self._prefill()
            session = Session(self.model, variant.artifact, variant.runtime)
            answer, report, seconds, dense_seconds = self._timed(session)
        else:
            with measuring:
                answer = self._answer()
            report = measuring.report()
        recalls, errors = (), ()
        if isinstance(measuring, _ComparingSession):
            recalls, errors = _recalls(measuring.report()), measuring.layer_errors()
        kl, agreement = self._fidelity(dense, answer)
        answer_kl, answer_agreement = self._followed(dense, variant)
        return Outcome(
            score=answer.score,
            text=answer.text,
            tokens=tokens,
            ttft_s=seconds,
            dense_ttft_s=dense_seconds,
            density=report.density,
            selection_work=report.selection_work,
            heads=dict(report.policies),
            recalls=recalls,
            layer_errors=errors,
            hidden_error=relative_error(answer.hidden, dense.hidden),
            kl=kl,
            top1_agreement=agreement,
            bins=answer.bins,
            answer_kl=answer_kl,
            answer_agreement=answer_agreement,
            decode_density=None if report.decoding is None else report.decoding.density,
        )

    def _dense_answer(self) -> _Answer:
        if self._dense is None:
            if self.warm_up and self.repeats:
                self._prefill()
            self._dense = self._answer()
        return self._dense

    def _answer(self) -> _Answer:
        if self.question.metric == PERPLEXITY:
            return self._reading()
        with final_states(self.model) as states:
            found = generate(
                self.model,
                self.tokenizer,
                self.question.input_ids,
                max_new_tokens=self.question.new_tokens,
            )
        score = self.question.score(found.text)
        if not self.measure:
            return _Answer(score, found.text, found.ttft_s, found.hidden, None)
        # Off the device, where those of a long prompt would stand in the next variant's way.
        kept, steps = states().cpu().tensor_split([found.prompt_tokens])
        read = torch.tensor(found.tokens[:-1], dtype=torch.int64, device="cpu")
        hidden = found.hidden
        return _Answer(score, found.text, found.ttft_s, hidden, kept, steps=steps, tokens=read)

    def _reading(self) -> _Answer:
        """The losses of a text, which answers nothing."""
        ids = self.question.input_ids
        with final_states(self.model) as states:
            seconds = self._prefill()
        kept = states()
        losses = token_losses(self.model, kept, ids)
        place = torch.arange(1, len(ids), device="cpu") * self.bins // self.length
        sums = torch.zeros(self.bins, dtype=torch.float64, device="cpu")
        sums = sums.index_add(0, place, losses)
        counts = place.bincount(minlength=self.bins)
        bins = tuple(
            total / count if count else None
            for total, count in zip(sums.tolist(), counts.tolist(), strict=True)
        )
        hidden = kept[-1].float().cpu()
        return _Answer(losses.mean().item(), "", seconds, hidden, kept.cpu(), bins)

    def _fidelity(self, dense: _Answer, answer: _Answer) -> tuple[float | None, float | None]:
        """Mean KL divergence from dense attention, and the share of equal first choices."""
        if not self.measure:
            return None, None
        assert dense.states is not None
        assert answer.states is not None
        found = compare_predictions(self.model, dense.states, answer.states)
        return found.mean_kl, found.top1_agreement

    def _followed(self, dense: _Answer, variant: Variant) -> tuple[float | None, float | None]:
        """The same of sparse steps that follow dense attention's answer."""
        assert variant.runtime is not None
        if variant.runtime.decode != "sparse" or dense.steps is None or not len(dense.steps):
            return None, None
        assert dense.tokens is not None
        session = Session(self.model, variant.artifact, variant.runtime)
        with session, final_states(self.model) as states:
            follow(self.model, self.question.input_ids, dense.tokens)
        steps = states()[len(self.question.input_ids) :]
        found = compare_predictions(self.model, dense.steps, steps)
        return found.mean_kl, found.top1_agreement

    def _measuring(self, artifact: Artifact | None, runtime: RuntimeConfig) -> Session:
        """A session that measures recall and the attention's errors, where they are asked for."""
        # Dense prefills, whose steps alone are sparse, have no patterns.
        if not self.measure or runtime.policy == DENSE:
            return Session(self.model, artifact, runtime)
        return _ComparingSession(self.model, artifact, runtime, measure_recall=True)

    def _timed(self, session: Session) -> tuple[_Answer, SessionReport, float, float]:
        """An answer, its report, and the median seconds of a session and of dense attention.

        They take turns, so that whatever else the device does slows both, and no variant's speed-up
        rests on another one's dense time.
        """
        dense_seconds = [self._prefill()]
        with session:
            answer = self._answer()
        report, seconds = session.report(), [answer.seconds]
        for _ in range(self.repeats - 1):
            dense_seconds.append(self._prefill())
            with session:
                seconds.append(self._prefill())
        return answer, report, statistics.median(seconds), statistics.median(dense_seconds)

    def _prefill(self) -> float:
        """Seconds of a prefill, to the prompt's next token."""
        start = time.perf_counter()
        # Reading the token waits for the device.
        int(prefill(self.model, self.question.input_ids).logits[0, -1].argmax())
        return time.perf_counter() - start


class _ComparingSession(Session):
    """A session that runs dense attention beside its own, on the same inputs of every layer."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._errors: dict[int, list[Tensor]] = defaultdict(list)

    def _attend(self, call: AttentionCall) -> Tensor:
        out = super()._attend(call)
        if call.query.shape[2] == 1:
            # A decode step has no pattern.
            return out
        dense = dense_attention(call)
        difference = torch.linalg.vector_norm(out - dense, dtype=torch.float32)
        self._errors[call.layer].append(
            difference / torch.linalg.vector_norm(dense, dtype=torch.float32)
        )
        return out

    def layer_errors(self) -> tuple[float, ...]:
        """Relative errors `||out - dense|| / ||dense||` of the layers, in their order."""
        return tuple(
            round(torch.stack(errors).mean().item(), _DIGITS + 2)
            for _, errors in sorted(self._errors.items())
        )


def _recalls(report: SessionReport) -> tuple[float, ...]:
    """Recall of every head of the layers that have patterns."""
    return tuple(round(recall, _DIGITS) for layer in report.layers for recall in layer.recall or ())


@dataclass(frozen=True)
class ModelContext:
    """What is known of a loaded model without having it.

    Attributes:
        values: The model, the device and the versions that the figures belong to.
        fingerprint: Of its weights.
        longest: Tokens that it reads at most; None: any number.
    """

    values: dict[str, Any]
    fingerprint: Fingerprint
    longest: int | None


@dataclass(frozen=True, eq=False)
class PromptJob:
    """The outcomes of one prompt that are not known yet.

    Attributes:
        question: The prompt.
        length: Tokens a prompt, at most.
        columns: Numbers of the variants to run, dense attention's being 0.
        warm_up: Run dense attention once more before it is timed.
    """

    question: Question
    length: int
    columns: tuple[int, ...]
    warm_up: bool


Result = tuple[PromptJob, int, Outcome]
"""A job, the number of a variant, and what was measured."""
Run = Callable[[Iterable[PromptJob]], Iterator[Result]]
"""Runs jobs, and gives their outcomes as they become known, in any order."""


@dataclass(frozen=True, eq=False)
class ModelRunner:
    """A model with its tokenizer, and what is measured of its prompts.

    Attributes:
        name: The model's name.
        model: A transformers decoder, in eval mode.
        tokenizer: Its tokenizer.
        config: Tasks, lengths, number of prompts and seed.
    """

    name: str
    model: Any
    tokenizer: Any
    config: EvalConfig

    @classmethod
    def load(cls, name: str, config: EvalConfig, *, trust_remote_code: bool = False) -> ModelRunner:
        """Loads the model of a configuration.

        Raises:
            ConfigError: device or dtype is no such thing.
            ModelError: the model cannot be loaded.
        """
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        model = load_model(
            name, device=config.device, dtype=config.dtype, trust_remote_code=trust_remote_code
        )
        return cls(name, model, tokenizer, config)

    @cached_property
    def context(self) -> ModelContext:
        """What the figures belong to."""
        import transformers

        device = next(self.model.parameters()).device
        cuda = device.type == "cuda"
        print_ = fingerprint(self.model)
        values = {
            "model": self.name,
            "weights": print_.weights,
            "model_digest": model_digest(self.model),
            "device": torch.cuda.get_device_name(device) if cuda else "CPU",
            "threads": torch.get_num_threads(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "shareprefill": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        return ModelContext(values, print_, max_length(self.model))

    def run(self, variants: list[Variant], jobs: Iterable[PromptJob]) -> Iterator[Result]:
        """Runs jobs in this process, one after the other.

        Raises:
            ConfigError: the device has too little memory.
            ShareprefillError: a session refuses the model or its artifact.
        """
        every = [DENSE_VARIANT, *variants]
        for variant in variants:
            # What a session refuses is told before dense attention takes its time.
            assert variant.runtime is not None
            Session(self.model, variant.artifact, variant.runtime)
        for job in jobs:
            measurement = PromptMeasurement(
                self.model,
                self.tokenizer,
                job.question,
                length=job.length,
                bins=self.config.bins,
                measure=self.config.measure,
                repeats=self.config.repeats,
                warm_up=job.warm_up,
            )
            for column in job.columns:
                outcome = _run(measurement, every[column], len(job.question.input_ids))
                yield job, column, outcome


def _run(measurement: PromptMeasurement, variant: Variant, tokens: int) -> Outcome:
    try:
        return measurement.run(variant)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the device has too little memory for a prompt of {tokens} tokens under policy "
            f"{variant.policy}: lower --lengths, choose a smaller --dtype, or leave out recall and "
            "errors with --no-measure"
        ) from error


def variants_of(config: EvalConfig, artifacts: Sequence[Artifact]) -> list[Variant]:
    """What a configuration compares with dense attention, in order.

    Args:
        config: Policies and gammas.
        artifacts: Those that it names, in its order; none where no policy needs one.

    Raises:
        ConfigError: there is an option that neither a policy nor a head of an artifact reads.
    """
    variants: list[Variant] = []
    named = list(zip(config.names or [""], artifacts or [None], strict=True))
    for asked in config.runtimes():
        of_all = asked.policy == "auto" and config.others
        for name, artifact in named if of_all else named[:1]:
            runtime = asked if artifact is None else what_is_read(artifact, asked)
            settings: dict[str, Any] = {"artifact": name} if of_all else {}
            if runtime.gamma is not None:
                settings["gamma"] = runtime.gamma
            if all((v.artifact, v.runtime) != (artifact, runtime) for v in variants):
                variants.append(Variant(runtime.policy, settings, artifact, runtime))
    for name in ("gamma", "max_density"):
        given = [asked for asked in config.runtimes() if getattr(asked, name) is not None]
        if given and all(getattr(variant.runtime, name) is None for variant in variants):
            require_read(artifacts[0], given[0])
    if config.decode == "sparse":
        steps = {"decode": config.decode_density or DECODE_DENSITY}
        variants = [replace(variant, settings=variant.settings | steps) for variant in variants]
    return variants


def model_name(config: EvalConfig, artifacts: Sequence[Artifact]) -> str:
    """The model of a configuration: the one named, or the artifact's."""
    # A configuration without an artifact names a model.
    return config.model or artifacts[0].model


def artifact_digest(artifact: Artifact) -> str:
    """SHA-256 of an artifact's content."""
    return hashlib.sha256(artifact_bytes(artifact)).hexdigest()
