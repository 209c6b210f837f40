"""`sp eval`: an artifact's policies against dense attention, on tasks."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shareprefill.commands.known import artifact_here, model_of
from shareprefill.commands.options import (
    JsonOption,
    OtherModelOption,
    RemoteCodeOption,
    Written,
    lengths_option,
    named,
    options_of,
    repeated,
    require_own,
    require_same,
    with_commas,
)
from shareprefill.errors import ConfigError, DataError
from shareprefill.evaluation.config import EvalConfig
from shareprefill.files import kind_of, printable
from shareprefill.policy_names import POLICIES, listed_policies

if TYPE_CHECKING:
    from shareprefill.evaluation.results import Evaluation

OutOption = Annotated[
    Path | None, typer.Option(help="Folder that keeps every outcome, to go on with, and results.")
]
FreshOption = Annotated[
    bool, typer.Option("--resume/--fresh", help="Use the outcomes in the folder, or start anew.")
]
HtmlOption = Annotated[
    bool, typer.Option("--html", help="Write a self-contained page into the folder too.")
]

ReplaceOption = Annotated[
    bool, typer.Option("--force", help="Replace files of another model, or of another kind.")
]


def policies_option(option: Written) -> Written:
    """Names with commas, or `all`."""

    def read(text: str) -> tuple[str, ...]:
        return POLICIES if text == "all" else listed_policies(text)

    text = f"{option.help} Either all, or some of {', '.join(POLICIES)}."
    return replace(with_commas(option), help=text, words=("all", *POLICIES), read=read)


@options_of(
    EvalConfig,
    leave_out=("artifact", "others", "model"),
    tasks=with_commas,
    policies=policies_option,
    lengths=lengths_option,
    gammas=repeated("--gamma"),
    samples=named("--samples-per-task", "--samples"),
    cut_middle=named("--cut-middle"),
)
def eval_command(
    options: dict[str, Any],
    artifact: Annotated[
        list[Path] | None,
        typer.Option(
            help="Artifact of the model; clusters.st by default, if it is needed. Repeated, auto "
            "is run as each plans it, and all else comes from the first."
        ),
    ] = None,
    model: OtherModelOption = None,
    out: OutOption = None,
    resume: FreshOption = True,
    html: HtmlOption = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write the frontiers of all policies as a figure: .svg or .png."),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the tables as Markdown into this file.")
    ] = None,
    force: ReplaceOption = False,
    trust_remote_code: RemoteCodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure accuracy, fidelity, recall, density and time of policies against dense attention.

    Examples:
      sp eval --policies auto,streaming --tasks retr_kv --lengths 4K --out results
      sp eval --policies all --lengths 8K,32K --plot frontier.svg
    """
    first, *others = artifact or [artifact_here(model, options["policies"])]
    name = model_of(first, model, trust_remote_code=trust_remote_code)
    config = EvalConfig(
        **options,
        artifact=None if first is None else str(first),
        others=tuple(map(str, others)),
        model=name,
    )
    require_folder(out, html=html)
    require_plot(plot, measure=config.measure)
    from shareprefill.report.marks import EVALUATION, mark_of

    if not force:
        require_own_results(out, EVALUATION, first, name, html=html)
    if plot is not None:
        require_same(plot, EVALUATION, name, force=force)
    if markdown is not None:
        require_own(markdown, (f"{config.model}: ".encode(errors="surrogatepass"),), force=force)
    from shareprefill.console import progress
    from shareprefill.evaluation.pages import evaluation_page, frontier_figure
    from shareprefill.evaluation.suite import evaluate
    from shareprefill.evaluation.tables import markdown as as_markdown
    from shareprefill.files import atomic_write_bytes, atomic_write_text, locked_output
    from shareprefill.report.drawing import figure_file

    with ExitStack() as stack:
        # Now, not after hours: whether the files can be written.
        for path in (plot, markdown):
            if path is not None:
                stack.enter_context(locked_output(path))
        advance = stack.enter_context(progress("outcomes"))
        found = evaluate(
            config,
            out=out,
            fresh=not resume,
            trust_remote_code=trust_remote_code,
            progress=advance,
        )
    write_results(out, EVALUATION, found.to_json(), evaluation_page(found) if html else None)
    if plot is not None:
        mark = mark_of(EVALUATION, name)
        drawn = figure_file(frontier_figure(found), plot.suffix[1:], mark)
        atomic_write_bytes(plot, drawn)
    if markdown is not None:
        atomic_write_text(markdown, as_markdown(found))
    if as_json:
        typer.echo(found.to_json(), nl=False)
        return
    show_evaluation(found)


def show_evaluation(found: Evaluation) -> None:
    """The tables of an evaluation that a terminal has room for."""
    from shareprefill.console import show_table
    from shareprefill.evaluation import tables
    from shareprefill.evaluation.frontier import TARGET_RECALL

    for title, (columns, rows) in (
        ("policies, over all tasks and lengths", tables.summary_table(found)),
        (f"at a mean recall of {TARGET_RECALL}", tables.reached_table(found)),
        ("at equal effective density", tables.density_table(found)),
        ("by task, with 95 % intervals over prompts", tables.short_table(found.cells)),
    ):
        if rows:
            show_table(title, columns, rows, less_important=tables.LESS_IMPORTANT)


def write_results(out: Path | None, name: str, json_text: str, page: str | None) -> None:
    """Writes results, and a page of them, into the folder of the outcomes, where there is one."""
    from shareprefill.files import atomic_write_text

    if out is not None:
        atomic_write_text(out / f"{name}.json", json_text)
        if page is not None:
            atomic_write_text(out / f"{name}.html", page)


def require_folder(out: Path | None, *, html: bool) -> None:
    """Refuses to make a page that has no place.

    Raises:
        ConfigError: a page is asked for without a folder.
    """
    if html and out is None:
        raise ConfigError("--html needs a folder to write the page into: name it with --out")


def require_own_results(
    out: Path | None, name: str, artifact: Path | None, model: str, *, html: bool
) -> None:
    """Refuses to replace results of another model.

    Args:
        out: The folder that holds them.
        name: Of their files, without the ending.
        artifact: Of the model to be measured; None for none.
        model: Its name.
        html: Whether a page is to be written, too.

    Raises:
        DataError: there are such results, or files of these names that hold none, or folders.
    """
    path = None if out is None else out / f"{name}.json"
    if path is None:
        return
    for written in (path, path.with_suffix(".html"))[: 1 + html]:
        # Now, not after the work: whether it can be written.
        if kind_of(written) == "folder":
            raise DataError(
                f"{printable(written)} is a folder: move it away, or choose another --out"
            )
    if kind_of(path) != "file":
        if html:
            require_same(path.with_suffix(".html"), name, model, force=False)
        return
    from shareprefill.artifact import load_artifact

    try:
        context = json.loads(path.read_text(encoding="utf-8"))["context"]
        there, weights = str(context["model"]), context["weights"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{printable(path)} is there and holds no results that can be read: use --force to "
            "replace it, or another --out"
        ) from error
    # A quantised model has other weights than its artifact was made of.
    is_other = artifact is None or weights != load_artifact(artifact).fingerprint.weights
    if there != model and is_other:
        raise DataError(
            f"{printable(path)} holds results of another model, {printable(there)}: use --force "
            "to replace it, or another --out"
        )


def require_plot(plot: Path | None, *, measure: bool) -> None:
    """Refuses a plot that could not be drawn.

    Raises:
        ConfigError: its file is of no known kind, or recall is not measured.
    """
    if plot is None:
        return
    from shareprefill.report.drawing import FILE_KINDS

    if plot.suffix[1:] not in FILE_KINDS:
        raise ConfigError(f"plot = {str(plot)!r} is not allowed: it must end in .svg or .png")
    if not measure:
        raise ConfigError("--plot shows recall, which --no-measure leaves out: drop one of them")
