"""What the commands print: tables, progress bars and JSON objects."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from shareprefill.artifact import Artifact
    from shareprefill.autoencoder.pipeline import Training
    from shareprefill.clustering.comparison import Comparison
    from shareprefill.clustering.pipeline import Clustering
    from shareprefill.diagnosis import Check
    from shareprefill.runtime.answering import Answer

_MOVED_ROWS = 20
_LONGEST_VALUE = 1000
_GAP = 2  # between two columns
_NARROWEST_PROSE = 16
_FIGURE = re.compile(r"[-+.]?\d|-$")


def show_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    less_important: Sequence[str] = (),
    prose: Sequence[str] = (),
) -> None:
    """Prints a table that breaks no word and cuts no value, however narrow the terminal is.

    Where it does not fit, texts are wrapped between words, then columns are left out, then each row
    is printed as a block of lines. A file or a pipe gets all columns, each as wide as it needs.

    Args:
        title: The line above it.
        columns: Names; the first column says what a row is about.
        rows: A cell a column.
        less_important: Columns that may be left out, the least important first; those that the
            table does not have are passed over.
        prose: Columns of texts that may be wrapped.
    """
    from shareprefill.files import printable

    rows = [[printable(cell, sys.maxsize) for cell in row] for row in rows]
    width, shown = _width(), list(range(len(columns)))
    passed_over = [columns.index(name) for name in less_important if name in columns]
    while (widths := _fit(columns, rows, shown, prose, width)) is None and passed_over:
        shown.remove(passed_over.pop(0))
    show_line(title, bold=True)
    if widths is None:
        _show_blocks(columns, rows)
    else:
        _show_columns(columns, rows, shown, widths)
    show_line("")


def show_line(text: str, *, bold: bool = False) -> None:
    """Prints a line of prose; a terminal gets it wrapped between words."""
    width = _width()
    lines = [text] if width is None else _wrapped(text, width)
    # Text, not markup: names may hold what rich takes for it.
    console = Console(width=max(map(cell_len, lines), default=1) or 1)
    console.print(Text("\n".join(lines), style="bold" if bold else ""), soft_wrap=True)


def _width() -> int | None:
    """The terminal's columns; None where output goes into a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _fit(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    shown: Sequence[int],
    prose: Sequence[str],
    width: int | None,
) -> list[int] | None:
    """Widths of the columns that are shown; None where the terminal is too narrow for them."""
    texts = [[columns[number], *(row[number] for row in rows)] for number in shown]
    widths = [max(map(cell_len, column)) for column in texts]
    least = [
        _least(column, full) if columns[number] in prose else full
        for number, column, full in zip(shown, texts, widths, strict=True)
    ]
    room = None if width is None else width - _GAP * (len(shown) - 1)
    if room is None or sum(widths) <= room:
        return widths
    if sum(least) > room:
        return None
    while sum(widths) > room:
        spare = [full - small for full, small in zip(widths, least, strict=True)]
        widths[spare.index(max(spare))] -= 1
    return widths


def _least(texts: Sequence[str], full: int) -> int:
    """The width that a column of prose needs at least."""
    words = (cell_len(word) for text in texts for word in text.split())
    return max(min(full, _NARROWEST_PROSE), *words)


def _show_columns(
    columns: Sequence[str], rows: Sequence[Sequence[str]], shown: Sequence[int], widths: list[int]
) -> None:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
    for number, size in zip(shown, widths, strict=True):
        is_figure = number > 0 and all(_FIGURE.match(row[number]) for row in rows if row[number])
        table.add_column(
            Text(columns[number]), justify="right" if is_figure else "left", width=size
        )
    for row in rows:
        table.add_row(*(Text(row[number]) for number in shown))
    Console(width=sum(widths) + _GAP * len(widths)).print(table)
    left_out = [name for number, name in enumerate(columns) if number not in shown]
    if left_out:
        show_line(f"not shown for lack of width: {'; '.join(left_out)}")


def _show_blocks(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for row in rows:
        show_line(f"{columns[0]}: {row[0]}")
        for name, cell in zip(columns[1:], row[1:], strict=True):
            if cell not in ("", "-"):
                show_line(f"  {name}: {cell}")


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of whole words; what follows the first is set in as that is, and two more."""
    indent = " " * (len(text) - len(text.lstrip()))
    return [
        line
        for part in text.split("\n")
        for line in textwrap.wrap(
            part,
            max(width, 1),
            subsequent_indent=f"{indent}  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        or [""]
    ]


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
    size = training.config.code_size
    rows = [
        (f"autoencoder-{size}", losses.autoencoder),
        (f"PCA-{size}, rows normalised", losses.pca),
        (f"PCA-{size}", losses.pca_linear),
        ("mean map of each head", losses.head_mean),
        ("mean map", losses.mean),
    ]
    show_table(
        f"maps and autoencoder in {folder}",
        ("held-out loss", "mean Hellinger² per row"),
        [(name, f"{loss:.5f}") for name, loss in rows],
    )
    verdict = "beats" if losses.beats_pca else "does not beat"
    show_line(
        f"{training.epochs} epochs on {len(training.split.train)} prompts, "
        f"{len(training.split.held_out)} held out: the autoencoder {verdict} PCA"
    )


def show_clusterings(trials: list[Clustering]) -> None:
    """The numbers of clusters that were tried, the one that was taken marked."""
    rows = [
        (
            f"{trial.k} *" if trial.is_best else f"{trial.k}",
            f"{trial.cost:.4f}",
            f"{trial.recall:.4f}",
            "-" if math.isnan(trial.silhouette) else f"{trial.silhouette:.3f}",
            f"{trial.sharing}",
        )
        for trial in trials
    ]
    columns = ("k", "cost", "recall", "silhouette", "sharing heads")
    show_table("predicted on held-out prompts", columns, rows, less_important=("silhouette",))


def summarize(artifact: Artifact, path: Path) -> None:
    """An artifact in tables: its origin, its heads by policy, and its sharing clusters."""
    facts = describe(artifact)
    policies = [
        (row["policy"], f"{row['heads']}", f"{row['recall']:.3f}", f"{row['density']:.3f}")
        for row in facts["policies"]
    ]
    show_table("heads by policy", ("policy", "heads", "recall", "density"), policies)
    clusters = [
        (
            f"{row['cluster']}",
            f"{row['heads']}",
            " ".join(row["pivots"]),
            f"{row['sharing']}",
            f"{row['recall']:.3f}",
        )
        for row in facts["clusters"]
    ]
    if clusters:
        columns = ("cluster", "heads", "pivots", "sharing", "recall")
        show_table("sharing clusters", columns, clusters, prose=("pivots",))
    show_line(
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
        show_line(f"the artifacts are equal: {comparison.heads} heads of {comparison.models[0]}")
        return
    figures = [
        (name, *_before_and_after(*getattr(comparison, name)))
        for name in ("density", "recall", "cost")
    ]
    show_table("expected", ("figure", "before", "after", "change"), figures)
    if comparison.moved:
        moved = [
            (head.head, _change(*head.policy), _change(*head.pivot), _change(*head.cluster))
            for head in comparison.moved[:_MOVED_ROWS]
        ]
        columns = ("layer.head", "policy", "pivot", "cluster")
        show_table("heads that moved", columns, moved, prose=("policy",))
        if len(comparison.moved) > _MOVED_ROWS:
            show_line(f"and {len(comparison.moved) - _MOVED_ROWS} more; --json has all")
    if comparison.settings:
        settings = [(s.name, _value(s.before), _value(s.after)) for s in comparison.settings]
        show_table("settings", ("name", "before", "after"), settings, prose=("before", "after"))
    if comparison.values:
        counts = ", ".join(f"{name} {count}" for name, count in comparison.values.items())
        show_line(f"heads with other values: {counts}")
    show_line(
        f"{len(comparison.moved)} of {comparison.heads} heads moved; adjusted Rand index of the "
        f"clusters {comparison.rand_index:.4f}"
    )


def _before_and_after(old: float | None, new: float | None) -> tuple[str, str, str]:
    texts = ["-" if value is None else f"{value:.4f}" for value in (old, new)]
    return texts[0], texts[1], "-" if old is None or new is None else f"{new - old:+.4f}"


def _change(old: object, new: object) -> str:
    texts = ["-" if value is None or value == -1 else str(value) for value in (old, new)]
    return texts[0] if texts[0] == texts[1] else " > ".join(texts)


def _value(value: object) -> str:
    from shareprefill.clustering.comparison import ABSENT
    from shareprefill.files import printable

    if value is ABSENT:
        return "(absent)"
    return printable(json.dumps(value, ensure_ascii=False), _LONGEST_VALUE)


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
    _line("")
    show_line(" | ".join(parts))
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
        show_line(" | ".join(parts))


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
    rows = [(check.name, check.state, check.detail) for check in checks]
    show_table("sp doctor", ("what", "state", "detail"), rows, prose=("state", "detail"))


def _line(text: str) -> None:
    # Not through rich: model text and paths may hold what it takes for markup.
    print(text)  # noqa: T201
