"""`sp run`: the answer to a prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shareprefill.commands.known import ArtifactOption, artifact_here, model_of
from shareprefill.commands.options import (
    POLICY_HELP,
    DeviceOption,
    DtypeOption,
    JsonOption,
    OtherModelOption,
    RemoteCodeOption,
    explained,
    options_of,
    require_same,
)
from shareprefill.commands.streams import print_now, read_chat, read_prompt
from shareprefill.commands.verdicts import judge_recall, planned_and_taken, why_dense
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ConfigError
from shareprefill.policy_names import POLICIES

if TYPE_CHECKING:
    from shareprefill.artifact import Artifact
    from shareprefill.runtime.answering import Answer


@options_of(
    RuntimeConfig,
    leave_out=("sample_rows", "check_rows", "sink_blocks", "local_blocks", "max_density"),
    policy=explained(POLICY_HELP, *POLICIES),
)
def run_command(
    prompt: Annotated[
        Path,
        typer.Argument(
            help="Text file, or with --chat a .json or .jsonl file of messages; - reads standard "
            "input."
        ),
    ],
    options: dict[str, Any],
    artifact: ArtifactOption = None,
    model: OtherModelOption = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Take the prompt as a conversation, by the model's chat template: a text is the "
            "user's message; a file of messages has objects with role and content.",
        ),
    ] = False,
    system: Annotated[str | None, typer.Option(help="The system message, with --chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(help="Prompt tokens at a time, 0 for all; by default what memory allows."),
    ] = None,
    compare_dense: Annotated[
        bool,
        typer.Option("--compare-dense", help="Run dense attention too: speed-up, KL, agreement."),
    ] = False,
    recall: Annotated[
        bool,
        typer.Option("--recall", help="Measure the patterns' recall, in its own prefill."),
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write a page: what each head took and why, with maps. Measures recall."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a file that is no trace, or another model's.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: RemoteCodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt, its prefill with shared sparse attention.

    Examples:
      sp run prompt.txt --compare-dense --recall
      sp run question.txt --chat --system "Answer in one sentence."
    """
    config = RuntimeConfig(**options)
    if system is not None and not chat:
        raise ConfigError("--system is for conversations: give --chat too")
    text = read_chat(prompt, system) if chat else read_prompt(prompt)
    path = artifact or artifact_here(model, [config.policy])
    if trace is not None and path is None:
        raise ConfigError(
            "--trace shows what an artifact planned beside what was done: name one with --artifact"
        )
    from shareprefill.artifact import load_artifact
    from shareprefill.console import status
    from shareprefill.files import atomic_write_text, locked_output
    from shareprefill.report.marks import TRACE
    from shareprefill.runtime.answering import answer

    loaded = None if path is None else load_artifact(path)
    if trace is not None and loaded is not None:
        require_same(trace, TRACE, loaded.model, force=force)
    # Now, not after the run: whether the page can be written.
    with nullcontext() if trace is None else locked_output(trace), status("loading") as say:
        result = answer(
            loaded,
            text,
            config,
            model=model_of(path, model, trust_remote_code=trust_remote_code),
            max_new_tokens=max_new_tokens,
            prefill_chunk=prefill_chunk,
            compare_dense=compare_dense,
            measure_recall=recall,
            keep_maps=trace is not None,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            on_text=None if as_json else _speaking(say),
            on_stage=say,
        )
        if trace is not None:
            assert loaded is not None
            say("writing the page")
            atomic_write_text(trace, trace_of(loaded, config, result))
    finish_run(result, config, loaded, as_json=as_json)


def _speaking(say: Callable[[str | None], None]) -> Callable[[str], None]:
    """Prints an answer piece by piece; the spinner ends before the first one."""

    def speak(text: str) -> None:
        say(None)
        print_now(text)

    return speak


def trace_of(artifact: Artifact, config: RuntimeConfig, result: Answer) -> str:
    """The page of a run that kept its maps."""
    from shareprefill.audit.trace import trace_page

    assert result.measured is not None
    assert result.sketches is not None
    return trace_page(
        artifact,
        config,
        result.measured,
        result.sketches,
        prompt_tokens=result.generation.prompt_tokens,
        least_tokens=result.least_tokens,
        device=result.device,
    )


def finish_run(
    result: Answer, config: RuntimeConfig, artifact: Artifact | None, *, as_json: bool
) -> None:
    """The last lines of `sp run`, or its JSON object."""
    from shareprefill.console import show_line

    facts = _run_facts(result, config, artifact)
    if as_json:
        print_now(json.dumps(facts, ensure_ascii=False, indent=1) + "\n")
        return
    speed = facts["decode_tokens_per_s"]
    policies = ", ".join(f"{count} {name}" for name, count in facts["policies"].items())
    parts = [
        f"{facts['prompt_tokens']} prompt tokens, {facts['new_tokens']} new",
        f"density {facts['density']:.3f}",
        f"heads: {policies or 'all dense'}",
        f"first token {facts['ttft_s']:.2f} s",
        "decode -" if speed is None else f"decode {speed:.1f} tokens/s",
    ]
    if facts.get("promised_recall") is not None:
        parts.insert(2, judge_recall(facts["recall"], facts["promised_recall"]))
    elif facts.get("recall") is not None:
        parts.insert(2, f"recall {facts['recall']:.3f}")
    if result.report.decoding is not None:
        parts.append(result.report.decoding.summary())
    if facts["why_dense"] is not None:
        show_line(f"All heads ran dense: {facts['why_dense']}.")
    otherwise = [row for row in facts["planned"] if row["planned"] != row["taken"]]
    if otherwise:
        _show_otherwise(otherwise)
    show_line(" | ".join(parts))
    if result.dense is not None:
        same = "the same answer" if facts["same_answer"] else f"answer {facts['dense_text']!r}"
        parts = [f"dense: {same}", f"first token {_times(result.dense_seconds)}"]
        if facts["speedup"] is None:
            parts.append("no speed-up: no prefill was sparse")
        else:
            parts += [f"sparse {_times(result.seconds)}", _speedup(facts["speedup"])]
        parts += [
            f"KL from dense {facts['kl']:.2e} nats a token",
            f"the same first choice at {facts['top1_agreement']:.1%} of the positions",
            f"relative error of the last hidden state {facts['hidden_error']:.2e}",
        ]
        if result.steps is not None:
            parts += [
                f"KL of the answer's steps {facts['answer_kl']:.2e} nats",
                f"the same first choice at {facts['answer_top1_agreement']:.1%} of them",
            ]
        show_line(" | ".join(parts))


def _show_otherwise(rows: list[dict[str, Any]]) -> None:
    from shareprefill.console import show_table

    columns = ("planned", "taken", "heads", "why (of most)")
    cells = [(row["planned"], row["taken"], f"{row['heads']}", row["why"]) for row in rows]
    show_table("heads that did otherwise than planned", columns, cells, prose=("why (of most)",))


def _speedup(value: float) -> str:
    return f"speed-up {value:.2f}{'' if value > 1 else ', dense attention is faster here'}"


def _times(seconds: Sequence[float]) -> str:
    """The median, and the spread where there are several."""
    if len(seconds) == 1:
        return f"{seconds[0]:.2f} s"
    return f"{median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def _run_facts(result: Answer, config: RuntimeConfig, artifact: Artifact | None) -> dict[str, Any]:
    generation, report = result.generation, result.report
    facts: dict[str, Any] = {
        "text": generation.text,
        "prompt_tokens": generation.prompt_tokens,
        "new_tokens": generation.new_tokens,
        "density": report.density,
        "selection_work": report.selection_work,
        "weights_distance": result.weights_distance,
        "policies": report.policies,
        "why_dense": why_dense(result, config),
        "planned": planned_and_taken(
            report, config, result.device, report.thresholds["delta"] or 0.0
        ),
        "ttft_s": generation.ttft_s,
        "decode_tokens_per_s": generation.decode_tokens_per_s,
    }
    if report.decoding is not None:
        facts["decoding"] = asdict(report.decoding)
    if result.recalls:
        facts["recall"] = sum(result.recalls) / len(result.recalls)
        if artifact is not None and config.policy == "auto" and config.gamma is None:
            layers = [layer.layer for layer in report.layers]
            promised = artifact.expected("recall", layers)
            if not math.isnan(promised):
                facts["promised_recall"] = promised
    if result.dense is not None:
        assert result.fidelity is not None
        facts |= {
            "ttft_s": median(result.seconds),
            "ttft_s_range": [min(result.seconds), max(result.seconds)],
            "dense_text": result.dense.text,
            "dense_ttft_s": median(result.dense_seconds),
            "dense_ttft_s_range": [min(result.dense_seconds), max(result.dense_seconds)],
            "kl": result.fidelity.mean_kl,
            "top1_agreement": result.fidelity.top1_agreement,
            "speedup": result.speedup,
            "hidden_error": result.hidden_error,
            "same_answer": result.same_answer,
        }
    if result.steps is not None:
        facts |= {
            "answer_kl": result.steps.mean_kl,
            "answer_top1_agreement": result.steps.top1_agreement,
        }
    return facts
