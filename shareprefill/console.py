"""What the commands print: tables, progress bars and JSON objects."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from shareprefill.artifact import Artifact
    from shareprefill.autoencoder.pipeline import Training
    from shareprefill.clustering.comparison import Comparison
    from shareprefill.clustering.pipeline import Clustering
    from shareprefill.diagnosis import Check
    from shareprefill.runtime.answering import Answer

# A table that is piped into a file or a log keeps its columns.
_PIPED_WIDTH = 100
_MOVED_ROWS = 20


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, silent where that is no terminal; yields its (done, all) setter."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def status(what: str) -> Iterator[None]:
    """A spinner on stderr, silent where that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


def show_training(folder: Path, training: Training) -> None:
    """The autoencoder's loss on held-out prompts, beside what it has to beat."""
    losses = training.losses
    table = _table(f"maps and autoencoder in {folder}", "held-out loss", "mean Hellinger² per row")
    size = training.config.code_size
    for name, loss in (
        (f"autoencoder-{size}", losses.autoencoder),
        (f"PCA-{size}, rows normalised", losses.pca),
        (f"PCA-{size}", losses.pca_linear),
        ("mean map of each head", losses.head_mean),
        ("mean map", losses.mean),
    ):
        table.add_row(name, f"{loss:.5f}")
    _print(table)
    verdict = "beats" if losses.beats_pca else "does not beat"
    _line(
        f"{training.epochs} epochs on {len(training.split.train)} prompts, "
        f"{len(training.split.held_out)} held out: the autoencoder {verdict} PCA"
    )


def show_clusterings(trials: list[Clustering]) -> None:
    """The numbers of clusters that were tried, the one that was taken marked."""
    columns = ("k", "cost", "recall", "silhouette", "sharing heads")
    table = _table("predicted on held-out prompts", *columns)
    for trial in trials:
        score = "-" if math.isnan(trial.silhouette) else f"{trial.silhouette:.3f}"
        mark = " *" if trial.is_best else ""
        figures = (f"{trial.cost:.4f}", f"{trial.recall:.4f}", score, str(trial.sharing))
        table.add_row(f"{trial.k}{mark}", *figures)
    _print(table)


def summarize(artifact: Artifact, path: Path) -> None:
    """An artifact in tables: its origin, its heads by policy, and its sharing clusters."""
    facts = describe(artifact)
    policies = _table("heads by policy", "policy", "heads", "recall", "density")
    for policy in facts["policies"]:
        policies.add_row(
            policy["policy"],
            str(policy["heads"]),
            f"{policy['recall']:.3f}",
            f"{policy['density']:.3f}",
        )
    _print(policies)
    if facts["clusters"]:
        clusters = _table("sharing clusters", "cluster", "heads", "pivots", "sharing", "recall")
        for cluster in facts["clusters"]:
            clusters.add_row(
                str(cluster["cluster"]),
                str(cluster["heads"]),
                " ".join(cluster["pivots"]),
                str(cluster["sharing"]),
                f"{cluster['recall']:.3f}",
            )
        _print(clusters)
    _line(
        f"{path}: {facts['model']}, {facts['heads']} heads, block {facts['block_size']}, "
        f"{facts['sharing_share']:.0%} of heads share; expected density "
        f"{facts['density']:.3f}, recall {facts['recall']:.3f}"
    )


def describe(artifact: Artifact) -> dict[str, Any]:
    """An artifact as a JSON-ready object."""
    from shareprefill.artifact import Policy
    from shareprefill.files import printable

    policy = artifact.policy.flatten()
    recall, density = artifact.recall.flatten().double(), artifact.density.flatten().double()
    rows = []
    for kind in Policy:
        chosen = policy == kind
        if chosen.any():
            rows.append(
                {
                    "policy": kind.label,
                    "heads": int(chosen.sum()),
                    "recall": recall[chosen].mean().item(),
                    "density": density[chosen].mean().item(),
                }
            )
    sharing = policy == Policy.SHARE
    return {
        "model": printable(artifact.model),
        "fingerprint": asdict(artifact.fingerprint),
        "heads": artifact.heads,
        "block_size": artifact.block_size,
        "thresholds": asdict(artifact.thresholds),
        "rows": asdict(artifact.rows),
        "density": density.mean().item(),
        "recall": recall.mean().item(),
        "sharing_share": sharing.double().mean().item(),
        "policies": rows,
        "clusters": _sharing_clusters(artifact),
        "configuration": artifact.configuration,
        "summary": artifact.summary,
    }


def _sharing_clusters(artifact: Artifact) -> list[dict[str, Any]]:
    """The clusters in which a head shares, largest first; pivots as layer.head."""
    from shareprefill.artifact import Policy

    heads = artifact.policy.shape[1]
    cluster, policy = artifact.cluster.flatten(), artifact.policy.flatten()
    found = []
    for label in cluster[policy == Policy.SHARE].unique().tolist():
        members = cluster == label
        pivots = (members & (policy == Policy.PIVOT)).nonzero()[:, 0].tolist()
        sharing = members & (policy == Policy.SHARE)
        found.append(
            {
                "cluster": label,
                "heads": int(members.sum()),
                "pivots": [f"{pivot // heads}.{pivot % heads}" for pivot in pivots],
                "sharing": int(sharing.sum()),
                "recall": artifact.recall.flatten()[sharing].mean().item(),
            }
        )
    return sorted(found, key=lambda row: (-row["sharing"], row["cluster"]))


def show_comparison(comparison: Comparison) -> None:
    """What `sp diff` found."""
    if not comparison.differs:
        _line(f"the artifacts are equal: {comparison.heads} heads of {comparison.models[0]}")
        return
    figures = _table("expected", "figure", "before", "after", "change")
    for name in ("density", "recall", "cost"):
        old, new = getattr(comparison, name)
        texts = ["-" if value is None else f"{value:.4f}" for value in (old, new)]
        change = "-" if old is None or new is None else f"{new - old:+.4f}"
        figures.add_row(name, *texts, change)
    _print(figures)
    if comparison.moved:
        moved = _table("heads that moved", "layer.head", "policy", "pivot", "cluster")
        for head in comparison.moved[:_MOVED_ROWS]:
            pairs = (head.policy, head.pivot, head.cluster)
            moved.add_row(head.head, *(_change(*pair) for pair in pairs))
        _print(moved)
        if len(comparison.moved) > _MOVED_ROWS:
            _line(f"and {len(comparison.moved) - _MOVED_ROWS} more; --json has all")
    if comparison.settings:
        settings = _table("settings", "name", "before", "after")
        for setting in comparison.settings:
            settings.add_row(escape(setting.name), _value(setting.before), _value(setting.after))
        _print(settings)
    if comparison.values:
        counts = ", ".join(f"{name} {count}" for name, count in comparison.values.items())
        _line(f"heads with other values: {counts}")
    _line(
        f"{len(comparison.moved)} of {comparison.heads} heads moved; adjusted Rand index of the "
        f"clusters {comparison.rand_index:.4f}"
    )


def _change(old: object, new: object) -> str:
    texts = ["-" if value is None or value == -1 else str(value) for value in (old, new)]
    return texts[0] if texts[0] == texts[1] else " > ".join(texts)


def _value(value: object) -> str:
    from shareprefill.clustering.comparison import ABSENT
    from shareprefill.files import printable

    # Escaped: a file's text may hold what rich takes for markup.
    return "(absent)" if value is ABSENT else escape(printable(json.dumps(value), 60))


def finish_run(result: Answer, *, as_json: bool) -> None:
    """The last lines of `sp run`, or its JSON object."""
    facts = _run_facts(result)
    if as_json:
        _line(json.dumps(facts, ensure_ascii=False, indent=1))
        return
    speed = facts["decode_tokens_per_s"]
    policies = ", ".join(f"{count} {name}" for name, count in facts["policies"].items())
    parts = [
        f"{facts['prompt_tokens']} prompt tokens, {facts['new_tokens']} new",
        f"density {facts['density']:.3f}",
        f"heads: {policies or 'all dense (prompt below the crossover)'}",
        f"first token {facts['ttft_s']:.2f} s",
        "decode -" if speed is None else f"decode {speed:.1f} tokens/s",
    ]
    if facts.get("recall") is not None:
        parts.insert(2, f"recall {facts['recall']:.3f}")
    _line("\n" + " | ".join(parts))
    if result.dense is not None:
        same = "the same answer" if facts["same_answer"] else f"answer {facts['dense_text']!r}"
        parts = [f"dense: {same}", f"first token {_times(result.dense_seconds)}"]
        if facts["speedup"] is None:
            parts.append("no speed-up: nothing was sparse")
        else:
            parts += [f"sparse {_times(result.seconds)}", f"speed-up {facts['speedup']:.2f}"]
        parts += [
            f"KL from dense {facts['kl']:.2e} nats a token",
            f"the same first choice at {facts['top1_agreement']:.1%} of the positions",
            f"relative error of the last hidden state {facts['hidden_error']:.2e}",
        ]
        _line(" | ".join(parts))


def _times(seconds: Sequence[float]) -> str:
    """The median, and the spread where there are several."""
    if len(seconds) == 1:
        return f"{seconds[0]:.2f} s"
    return f"{median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def _run_facts(result: Answer) -> dict[str, Any]:
    generation, report = result.generation, result.report
    facts: dict[str, Any] = {
        "text": generation.text,
        "prompt_tokens": generation.prompt_tokens,
        "new_tokens": generation.new_tokens,
        "density": report.density,
        "selection_work": report.selection_work,
        "weights_distance": result.weights_distance,
        "policies": report.policies,
        "ttft_s": generation.ttft_s,
        "decode_tokens_per_s": generation.decode_tokens_per_s,
    }
    if result.recalls:
        facts["recall"] = sum(result.recalls) / len(result.recalls)
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
    return facts


def show_checks(checks: list[Check]) -> None:
    """What `sp doctor` found."""
    table = _table("sp doctor", "what", "state", "detail")
    for check in checks:
        table.add_row(check.name, check.state, check.detail)
    _print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    return table


def _print(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPED_WIDTH)
    console.print(table)


def _line(text: str) -> None:
    # Not through rich: model text and paths may hold what it takes for markup.
    print(text)  # noqa: T201
