"""What the commands conclude from their figures, and what to do next."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shareprefill.config import DATA_SETS
from shareprefill.files import printable
from shareprefill.plain_tables import prompt_count

if TYPE_CHECKING:
    from shareprefill.artifact import Artifact
    from shareprefill.autoencoder.pipeline import Training
    from shareprefill.calib.store import MapStore
    from shareprefill.config import RuntimeConfig
    from shareprefill.models import ModelGeometry
    from shareprefill.runtime.answering import Answer
    from shareprefill.runtime.report import SessionReport

# The next prompt lies below the worst of n alike ones with a chance of 1 in n + 1.
_FEWEST_HELD_OUT = 4
# A share of the length that was asked for, under which prompts count as shorter.
_SHORTER = 0.75
_LITTLE_GAIN = 0.9  # of dense attention's time
_MISSED = 0.02  # of the attention mass that was promised


@dataclass(frozen=True)
class Verdict:
    """A conclusion.

    Attributes:
        sentences: What was found, and what it rests on.
        warnings: Why it may not hold.
        next: A command to go on with.
    """

    sentences: tuple[str, ...]
    warnings: tuple[str, ...]
    next: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "sentences": list(self.sentences),
            "warnings": list(self.warnings),
            "next": self.next,
        }

    def show(self) -> None:
        """Prints it."""
        from shareprefill.console import show_line

        show_line(f"Verdict: {' '.join(self.sentences)}", bold=not self.warnings)
        for warning in self.warnings:
            show_line(f"Warning: {warning}")
        show_line(f"Next: {self.next}")


def judge_artifact(artifact: Artifact, path: Path) -> Verdict:
    """What an artifact is predicted to give, on how much that rests, and where that is thin."""
    summary, calibration = artifact.summary, artifact.configuration.get("calibrate", {})
    cost, worst = summary.get("cost"), summary.get("recall_worst_5_percent")
    sentences, warnings = [], []
    mean = artifact.expected("recall")
    if isinstance(cost, float):
        sentences.append(f"attention is predicted to take {cost:.0%} of dense attention's time.")
        if cost > _LITTLE_GAIN:
            warnings.append(
                f"there is little to gain: {_cheaper(artifact)}, or calibrate on longer prompts"
            )
    sentences.append(f"Patterns cover {mean:.1%} of the attention on average")
    if isinstance(worst, float):
        sentences[-1] += f", those of the worst 5% of heads {worst:.1%}"
    tokens = [n for n in summary.get("held_out_tokens", ()) if type(n) is int]
    if tokens:
        held_out, further = (
            [str(source) for source in summary.get(name, ())]
            for name in ("held_out_prompts", "further_prompts")
        )
        sentences[-1] += (
            f", measured on {prompt_count(len(tokens))} held out, {_range(tokens)} tokens long "
            f"({_listed(held_out)})"
        )
        if further:
            are = "is" if len(further) == 1 else "are"
            more = f"{prompt_count(len(further))} that {are} not ({_listed(further)})"
            sentences[-1] += f", and {more}"
        sentences[-1] += "."
        thin = _thin(tokens, artifact.fingerprint.geometry)
        warnings += [*thin, *_narrow(calibration.get("data", ()))]
    else:
        sentences[-1] += "; on which prompts, the artifact does not say."
    run = f"sp run PROMPT.txt --artifact {shlex.quote(printable(path))} --compare-dense --recall"
    return Verdict(tuple(sentences), tuple(warnings), run)


def judge_calibration(store: MapStore, training: Training, folder: Path) -> Verdict:
    """Whether a calibration's data was enough to cluster on."""
    tokens = [prompt.tokens for prompt in store.prompts]
    held_out = [tokens[number] for number in training.split.held_out]
    sources = [prompt.source for prompt in store.prompts]
    warnings = [*_thin(held_out, store.fingerprint.geometry), *_narrow(store.config.data)]
    short = sum(n < _SHORTER * store.config.length for n in tokens)
    if short:
        warnings.append(
            f"{short} of {prompt_count(len(tokens))} are much shorter than --length "
            f"{store.config.length:,}: give longer rows, or lower --length"
        )
    if training.losses.autoencoder >= training.losses.head_mean:
        warnings.append(
            "the autoencoder tells no prompt from another: its maps of held-out prompts are no "
            "better than each head's mean map; give more prompts with --samples"
        )
    enough = "the data is thin" if warnings else "the data is enough"
    sentence = (
        f"{enough}: {prompt_count(len(tokens))}, {_range(tokens)} tokens long "
        f"({_listed(sources)}), {len(held_out)} of them held out."
    )
    return Verdict((sentence,), tuple(warnings), f"sp cluster {shlex.quote(printable(folder))}")


def why_dense(result: Answer, config: RuntimeConfig) -> str | None:
    """Why a run had no sparse prefill; None where it had one."""
    report = result.report
    if report.prefills:
        return None
    if config.policy == "dense":
        return "as --policy dense says"
    least, source = _crossover(result, config)
    if result.generation.prompt_tokens < least:
        return (
            f"the prompt's {result.generation.prompt_tokens:,} tokens are fewer than {least:,}, "
            f"from which on sharing pays here ({source}); --min-tokens 0 shares anyway, sp tune "
            "measures this machine"
        )
    return "no layer of the model took a pattern for this prompt: sp doctor --model says why"


def _crossover(result: Answer, config: RuntimeConfig) -> tuple[int, str]:
    import torch

    from shareprefill.runtime.crossover import crossover

    if config.min_tokens is not None:
        return config.min_tokens, "as --min-tokens says"
    known = crossover(torch.device(result.device))
    return result.least_tokens, f"measured on {known.source}"


def planned_and_taken(
    report: SessionReport, config: RuntimeConfig, device: str, delta: float
) -> list[dict[str, Any]]:
    """Heads by planned and taken policy, with the reason of most of them, most heads first."""
    import torch

    from shareprefill.runtime.crossover import crossover
    from shareprefill.runtime.reasons import reason

    dense_from = config.max_density
    if dense_from is None:
        dense_from = crossover(torch.device(device)).density
    reasons: dict[tuple[str, str], Counter[str]] = {}
    for layer in report.layers:
        for place, (planned, taken) in enumerate(zip(layer.planned, layer.policies, strict=True)):
            # The paper's rule plans nothing.
            was = planned if layer.tau is None else taken
            found = reasons.setdefault((was, taken), Counter())
            found[reason(layer, place, dense_from, delta)] += 1
    rows = [
        {
            "planned": planned,
            "taken": taken,
            "heads": sum(found.values()),
            "why": found.most_common(1)[0][0],
        }
        for (planned, taken), found in reasons.items()
    ]
    return sorted(rows, key=lambda row: (-row["heads"], row["planned"], row["taken"]))


def judge_recall(measured: float, promised: float) -> str:
    """A measured recall beside what held-out prompts had."""
    verdict = "less than promised" if measured < promised - _MISSED else "as promised"
    return f"recall {measured:.3f}, {verdict}: held-out prompts had {promised:.3f}"


def _cheaper(artifact: Artifact) -> str:
    """What makes a plan by the same goal cheaper."""
    name, _ = artifact.goal or ("target_recall", 0.0)
    verb = "raise" if name == "max_kl" else "lower"
    return f"{verb} sp cluster --{name.replace('_', '-')}"


def _thin(tokens: Sequence[int], sizes: ModelGeometry) -> list[str]:
    """Why held-out prompts are few, or too short to say much."""
    import torch

    from shareprefill.runtime.crossover import LayerSizes, crossover

    warnings = []
    if len(tokens) < _FEWEST_HELD_OUT:
        warnings.append(
            f"it rests on {prompt_count(len(tokens))}: in each head about 1 of {len(tokens) + 1} "
            "new ones lies below the worst of them; sp calibrate --samples 24 holds 8 out"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    least = crossover(torch.device(device)).tokens_of(LayerSizes(sizes.heads, sizes.head_dim))
    if max(tokens) < least:
        warnings.append(
            f"prompts this short run dense by themselves here, below {least:,} tokens: calibrate "
            "at the --length that you serve"
        )
    return warnings


def _narrow(data: Sequence[str]) -> list[str]:
    """Whether prompts are of a single generated task."""
    if len(data) != 1 or data[0] not in DATA_SETS[:-1]:
        return []
    return [
        f"all prompts are of the data set {data[0]}, yours may attend otherwise: calibrate on "
        "prompts of your own, or on mixture"
    ]


def _range(tokens: Sequence[int]) -> str:
    low, high = min(tokens), max(tokens)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _listed(sources: Sequence[str]) -> str:
    names = [printable(source, 40) for source in dict.fromkeys(sources)]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
