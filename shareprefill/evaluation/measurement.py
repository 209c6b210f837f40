"""One prompt under one attention: its answer, its time, and how far it is from dense attention."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from shareprefill.artifact import Artifact
from shareprefill.config import RuntimeConfig
from shareprefill.evaluation.config import DENSE
from shareprefill.evaluation.perplexity import read_text
from shareprefill.evaluation.questions import Question
from shareprefill.evaluation.results import PERPLEXITY
from shareprefill.runtime.generation import generate, relative_error
from shareprefill.runtime.interface import AttentionCall, dense_attention
from shareprefill.runtime.session import Session, SessionReport

# Enough to tell figures apart, few enough for a line a prompt.
_DIGITS = 5


@dataclass(frozen=True, eq=False)
class Variant:
    """One attention to measure.

    Attributes:
        policy: Policy of its session; `dense`: no session at all.
        settings: What tells it from others of its policy.
        artifact: Artifact of its session; None for `dense`.
        runtime: Options of its session; None for `dense`.
    """

    policy: str
    settings: dict[str, Any]
    artifact: Artifact | None
    runtime: RuntimeConfig | None


DENSE_VARIANT = Variant(DENSE, {}, None, None)


@dataclass(frozen=True)
class Outcome:
    """What was measured of one prompt under one variant.

    Attributes:
        score: The benchmark's score; for perplexity the mean negative log likelihood, in nats.
        text: The completion; empty for perplexity.
        tokens: Tokens of the prompt.
        ttft_s: Seconds to the first token.
        dense_ttft_s: The same of dense attention, beside it.
        density: Computed blocks over causal blocks.
        selection_work: Share of dense attention's work.
        heads: Heads by policy taken.
        recalls: By layer and head, in order; empty unless measured.
        layer_errors: Relative errors of the attention outputs; empty unless measured.
        hidden_error: Relative error of the last hidden state.
        bins: Mean negative log likelihood by position; empty for questions.
    """

    score: float
    text: str
    tokens: int
    ttft_s: float
    dense_ttft_s: float
    density: float = 1.0
    selection_work: float = 0.0
    heads: dict[str, int] | None = None
    recalls: tuple[float, ...] = ()
    layer_errors: tuple[float, ...] = ()
    hidden_error: float = 0.0
    bins: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Outcome:
        """The inverse of `to_dict`."""
        lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        return cls(**{**values, **lists})


@dataclass(frozen=True)
class _Answer:
    score: float
    text: str
    ttft_s: float
    hidden: Tensor
    bins: tuple[float, ...]


class Meter:
    """Measures variants of one prompt; the dense one is run once, with the first that needs it.

    Args:
        model: A transformers decoder, in eval mode.
        tokenizer: Its tokenizer.
        question: The prompt.
        length: Tokens a prompt, at most: what the bins divide.
        bins: Ranges of position that perplexity is told for.
        measure: Whether recall and the attention's errors are measured, in a prefill of their own.
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
        warm_up: bool,
    ) -> None:
        self.model, self.tokenizer, self.question = model, tokenizer, question
        self.length, self.bins, self.measure = length, bins, measure
        self.warm_up = warm_up
        self._dense: _Answer | None = None

    def run(self, variant: Variant) -> Outcome:
        """The outcome of one variant."""
        if self._dense is None:
            if self.warm_up:
                self._prefill()
            self._dense = self._answer()
        dense, tokens = self._dense, len(self.question.input_ids)
        if variant.artifact is None or variant.runtime is None:
            return Outcome(
                dense.score, dense.text, tokens, dense.ttft_s, dense.ttft_s, bins=dense.bins
            )
        # First the prefill that measures: it warms up the one that is timed.
        recalls, errors = self._measured(variant.artifact, variant.runtime)
        session = Session(self.model, variant.artifact, variant.runtime)
        with session:
            answer = self._answer()
        report = session.report()
        return Outcome(
            score=answer.score,
            text=answer.text,
            tokens=tokens,
            ttft_s=answer.ttft_s,
            dense_ttft_s=dense.ttft_s,
            density=report.density,
            selection_work=report.selection_work,
            heads=dict(report.policies),
            recalls=recalls,
            layer_errors=errors,
            hidden_error=relative_error(answer.hidden, dense.hidden),
            bins=answer.bins,
        )

    def _answer(self) -> _Answer:
        if self.question.metric == PERPLEXITY:
            reading = read_text(self.model, self.question.input_ids)
            place = torch.arange(1, len(self.question.input_ids)) * self.bins // self.length
            sums = torch.zeros(self.bins, dtype=torch.float64).index_add(0, place, reading.losses)
            means = sums / place.bincount(minlength=self.bins).clamp(min=1)
            mean = reading.losses.mean().item()
            return _Answer(mean, "", reading.ttft_s, reading.hidden, tuple(means.tolist()))
        generation = generate(
            self.model,
            self.tokenizer,
            self.question.input_ids,
            max_new_tokens=self.question.new_tokens,
        )
        score = self.question.score(generation.text)
        return _Answer(score, generation.text, generation.ttft_s, generation.hidden, ())

    def _measured(
        self, artifact: Artifact, runtime: RuntimeConfig
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Recall of every head, and the attention's error of every layer."""
        if not self.measure:
            with Session(self.model, artifact, runtime):
                self._prefill()
            return (), ()
        session = _ComparingSession(self.model, artifact, runtime, measure_recall=True)
        with session:
            self._prefill()
        return _recalls(session.report()), session.layer_errors()

    @torch.no_grad()
    def _prefill(self) -> None:
        ids = self.question.input_ids[None].to(self.model.get_input_embeddings().weight.device)
        self.model(input_ids=ids, use_cache=False, logits_to_keep=1)


class _ComparingSession(Session):
    """A session that runs dense attention beside its own, on the same inputs of every layer."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._errors: dict[int, list[Tensor]] = defaultdict(list)

    def _attend(self, call: AttentionCall) -> Tensor:
        out = super()._attend(call)
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
