"""`sp eval`: an artifact's policies against dense attention, on tasks."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shareprefill.commands.known import model_of
from shareprefill.commands.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    RemoteCodeOption,
    parse_lengths,
)
from shareprefill.config import POLICIES
from shareprefill.errors import ConfigError
from shareprefill.evaluation.config import EvalConfig

if TYPE_CHECKING:
    from shareprefill.evaluation.results import Evaluation

# Defaults are read off the configuration, where alone they live.
_EVAL = EvalConfig(artifact="-")
_TASKS, _POLICIES = ",".join(_EVAL.tasks), ",".join(_EVAL.policies)
_LENGTHS = ",".join(map(str, _EVAL.lengths))

ArtifactOption = Annotated[Path, typer.Option(help="Artifact of the model.")]
OtherModelOption = Annotated[
    str | None,
    typer.Option("--model", help="The model; by default the artifact's, if calibrated here."),
]
TasksOption = Annotated[
    str,
    typer.Option(
        help="Generated tasks, perplexity, perplexity:<file>, or ruler:, infinitebench: or "
        "longbench:<file or hub:...>, with commas between them."
    ),
]
OutOption = Annotated[
    Path | None, typer.Option(help="Folder that keeps every outcome, to go on with, and results.")
]
FreshOption = Annotated[
    bool, typer.Option("--resume/--fresh", help="Use the outcomes in the folder, or start anew.")
]
HtmlOption = Annotated[
    bool, typer.Option("--html", help="Write a self-contained page into the folder too.")
]


def eval_command(
    artifact: Annotated[
        list[Path] | None,
        typer.Option(
            help="Artifact of the model, clusters.st by default; repeated, auto is run as each "
            "plans it, and all else comes from the first."
        ),
    ] = None,
    model: OtherModelOption = None,
    tasks: TasksOption = _TASKS,
    policies: Annotated[
        str, typer.Option(help=f"Policies with commas between them, or all: {', '.join(POLICIES)}.")
    ] = _POLICIES,
    lengths: Annotated[
        str, typer.Option(help="Tokens a prompt at most, with commas between them; 8K is 8192.")
    ] = _LENGTHS,
    samples: Annotated[int, typer.Option(help="Prompts of each task and length.")] = _EVAL.samples,
    gamma: Annotated[
        list[float] | None,
        typer.Option(help="Attention mass to cover; may be repeated. By head by default."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = _EVAL.seed,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure",
            help="Measure recall, the attention's errors and KL from dense attention.",
        ),
    ] = _EVAL.measure,
    max_density: Annotated[
        float | None,
        typer.Option(help="Compute heads of denser patterns densely; the device's by default."),
    ] = _EVAL.max_density,
    bins: Annotated[int, typer.Option(help="Ranges of position of perplexity.")] = _EVAL.bins,
    cut_middle: Annotated[
        bool, typer.Option("--cut-middle", help="Cut the middle out of rows that are too long.")
    ] = _EVAL.cut_middle,
    device: DeviceOption = _EVAL.device,
    dtype: DtypeOption = _EVAL.dtype,
    workers: Annotated[
        int,
        typer.Option(help="Processes with a model each that divide the prompts on the device."),
    ] = _EVAL.workers,
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
    trust_remote_code: RemoteCodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure accuracy, fidelity, recall, density and time of policies against dense attention."""
    first, *others = artifact or [Path("clusters.st")]
    config = EvalConfig(
        artifact=str(first),
        others=tuple(map(str, others)),
        model=model,
        tasks=listed(tasks),
        policies=POLICIES if policies == "all" else listed(policies),
        lengths=parse_lengths(lengths),
        gammas=tuple(gamma or ()),
        samples=samples,
        seed=seed,
        device=device,
        dtype=dtype,
        measure=measure,
        max_density=max_density,
        bins=bins,
        cut_middle=cut_middle,
        workers=workers,
    )
    config = replace(config, model=model_of(first, model))
    require_folder(out, html=html)
    require_plot(plot, measure=measure)
    from shareprefill.console import progress
    from shareprefill.evaluation.figures import frontier_figure
    from shareprefill.evaluation.pages import evaluation_page
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
    if out is not None:
        atomic_write_text(out / "evaluation.json", found.to_json())
        if html:
            atomic_write_text(out / "evaluation.html", evaluation_page(found))
    if plot is not None:
        atomic_write_bytes(plot, figure_file(frontier_figure(found), plot.suffix[1:]))
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


def listed(text: str) -> tuple[str, ...]:
    """The parts of a list with commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def require_folder(out: Path | None, *, html: bool) -> None:
    """Refuses to make a page that has no place.

    Raises:
        ConfigError: a page is asked for without a folder.
    """
    if html and out is None:
        raise ConfigError("--html needs a folder to write the page into: name it with --out")


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
