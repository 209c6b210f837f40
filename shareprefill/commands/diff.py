"""`sp diff`: what changed between two artifacts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shareprefill.commands.options import JsonOption

if TYPE_CHECKING:
    from shareprefill.clustering.comparison import Comparison

_MOVED_ROWS = 20
_LONGEST_VALUE = 1000


def diff_command(
    before: Annotated[Path, typer.Argument(help="An artifact.")],
    after: Annotated[Path, typer.Argument(help="Another one of the same model.")],
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 1 where anything differs.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print what changed between two artifacts of one model.

    Example:
      sp diff before.st after.st --exit-code
    """
    from shareprefill.artifact import load_artifact
    from shareprefill.clustering.comparison import compare_artifacts

    comparison = compare_artifacts(load_artifact(before), load_artifact(after))
    if as_json:
        typer.echo(json.dumps(comparison.to_dict(), indent=1))
    else:
        show_comparison(comparison)
    if exit_code and comparison.differs:
        raise typer.Exit(1)


def show_comparison(comparison: Comparison) -> None:
    """What `sp diff` found."""
    from shareprefill.console import show_line, show_table

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
