"""One prompt under one attention: its answer, its time, and how far it is from dense attention."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shareprefill.artifact import Artifact
from shareprefill.config import RuntimeConfig
from shareprefill.evaluation.config import DENSE
from shareprefill.evaluation.outcomes import Outcome
from shareprefill.evaluation.questions import Question
from shareprefill.evaluation.results import PERPLEXITY
from shareprefill.runtime.fidelity import compare_predictions, final_states, token_losses
from shareprefill.runtime.generation import generate, prefill, relative_error
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
class _Answer:
    """What one timed prefill, and what followed it, gave.

    Attributes:
        score: As in `Outcome`.
        text: As in `Outcome`.
        seconds: To the first token.
        hidden: Last hidden state of the prompt's last token, float32 `[hidden_size]`.
        states: Final states of the prompt `[N, hidden_size]`; None unless measured.
        bins: As in `Outcome`.
    """

    score: float
    text: str
    seconds: float
    hidden: Tensor
    states: Tensor | None
    bins: tuple[float, ...] = ()


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
        repeats: Timed prefills of each variant, each beside one of dense attention.
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
        if variant.artifact is None or variant.runtime is None:
            seconds = [dense.seconds, *(self._prefill() for _ in range(self.repeats - 1))]
            median = statistics.median(seconds)
            return Outcome(dense.score, dense.text, tokens, median, median, bins=dense.bins)
        # First the prefill that measures: it warms up the ones that are timed.
        recalls, errors = self._measured(variant.artifact, variant.runtime)
        # Dense attention and ours take turns, so that whatever else the device does slows both, and
        # no variant's speed-up rests on another one's dense time.
        session = Session(self.model, variant.artifact, variant.runtime)
        dense_seconds = [self._prefill()]
        with session:
            answer = self._answer()
        report = session.report()
        seconds = [answer.seconds]
        for _ in range(self.repeats - 1):
            dense_seconds.append(self._prefill())
            with session:
                seconds.append(self._prefill())
        kl, agreement = self._fidelity(dense, answer)
        return Outcome(
            score=answer.score,
            text=answer.text,
            tokens=tokens,
            ttft_s=statistics.median(seconds),
            dense_ttft_s=statistics.median(dense_seconds),
            density=report.density,
            selection_work=report.selection_work,
            heads=dict(report.policies),
            recalls=recalls,
            layer_errors=errors,
            hidden_error=relative_error(answer.hidden, dense.hidden),
            kl=kl,
            top1_agreement=agreement,
            bins=answer.bins,
        )

    def _dense_answer(self) -> _Answer:
        if self._dense is None:
            if self.warm_up:
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
        # Off the device, where those of a long prompt would stand in the next variant's way.
        kept = states()[: found.prompt_tokens].cpu() if self.measure else None
        score = self.question.score(found.text)
        return _Answer(score, found.text, found.ttft_s, found.hidden, kept)

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
        means = sums / place.bincount(minlength=self.bins).clamp(min=1)
        hidden, bins = kept[-1].float().cpu(), tuple(means.tolist())
        return _Answer(losses.mean().item(), "", seconds, hidden, kept.cpu(), bins)

    def _fidelity(self, dense: _Answer, answer: _Answer) -> tuple[float | None, float | None]:
        """Mean KL divergence from dense attention, and the share of equal first choices."""
        if not self.measure:
            return None, None
        assert dense.states is not None
        assert answer.states is not None
        found = compare_predictions(self.model, dense.states, answer.states)
        return found.mean_kl, found.top1_agreement

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
