"""`sp sweep`: what each parameter buys, and where more of it stops paying."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shareprefill.commands.evaluate import (
    ArtifactOption,
    FreshOption,
    HtmlOption,
    OtherModelOption,
    OutOption,
    TasksOption,
    listed,
    require_folder,
)
from shareprefill.commands.known import model_of
from shareprefill.commands.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    RemoteCodeOption,
    parse_length,
)
from shareprefill.config import POLICIES
from shareprefill.evaluation.config import SweepConfig

if TYPE_CHECKING:
    from shareprefill.evaluation.sweep import Sweep

# Defaults are read off the configuration, where alone they live.
_SWEEP = SweepConfig(artifact="-", gammas=(0.9,))
_TASKS = ",".join(_SWEEP.tasks)


def sweep_command(
    artifact: ArtifactOption = Path("clusters.st"),
    model: OtherModelOption = None,
    slack: Annotated[
        list[float] | None,
        typer.Option(help="Mass below gamma at which a head still shares; may be repeated."),
    ] = None,
    tau: Annotated[
        list[float] | None,
        typer.Option(help="JS distance to share, with policy shareprefill; may be repeated."),
    ] = None,
    delta: Annotated[
        list[float] | None, typer.Option(help="JS distance to uniform; may be repeated.")
    ] = None,
    gamma: Annotated[
        list[float] | None, typer.Option(help="Attention mass to cover; may be repeated.")
    ] = None,
    block_size: Annotated[
        list[int] | None,
        typer.Option(help="Tokens a block, of a calibration that is named; may be repeated."),
    ] = None,
    k: Annotated[
        list[int] | None,
        typer.Option("--k", help="Clusters, from a calibration that is named; may be repeated."),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(help="Calibration folder, for --k and --block-size; may be repeated."),
    ] = None,
    policy: Annotated[str, typer.Option(help=f"One of {', '.join(POLICIES)}.")] = _SWEEP.policy,
    tasks: TasksOption = _TASKS,
    length: Annotated[
        int, typer.Option(parser=parse_length, metavar="LENGTH", help="Tokens a prompt at most.")
    ] = _SWEEP.length,
    samples: Annotated[int, typer.Option(help="Prompts of each task.")] = _SWEEP.samples,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = _SWEEP.seed,
    max_density: Annotated[
        float | None,
        typer.Option(help="Compute heads of denser patterns densely; the device's by default."),
    ] = _SWEEP.max_density,
    device: DeviceOption = _SWEEP.device,
    dtype: DtypeOption = _SWEEP.dtype,
    out: OutOption = None,
    resume: FreshOption = True,
    html: HtmlOption = False,
    trust_remote_code: RemoteCodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure accuracy and recall against density and time, one parameter changed at a time."""
    config = SweepConfig(
        artifact=str(artifact),
        model=model,
        slacks=tuple(slack or ()),
        taus=tuple(tau or ()),
        deltas=tuple(delta or ()),
        gammas=tuple(gamma or ()),
        block_sizes=tuple(block_size or ()),
        ks=tuple(k or ()),
        calibrations=tuple(calibration or ()),
        policy=policy,
        tasks=listed(tasks),
        length=length,
        samples=samples,
        seed=seed,
        device=device,
        dtype=dtype,
        max_density=max_density,
    )
    config = replace(config, model=model_of(artifact, model))
    require_folder(out, html=html)
    from shareprefill.console import progress
    from shareprefill.evaluation.pages import sweep_page
    from shareprefill.evaluation.sweep import sweep
    from shareprefill.files import atomic_write_text

    with progress("outcomes") as advance:
        found = sweep(
            config,
            out=out,
            fresh=not resume,
            trust_remote_code=trust_remote_code,
            progress=advance,
        )
    if out is not None:
        atomic_write_text(out / "sweep.json", found.to_json())
        if html:
            atomic_write_text(out / "sweep.html", sweep_page(found))
    if as_json:
        typer.echo(found.to_json(), nl=False)
        return
    show_sweep(found)


def show_sweep(found: Sweep) -> None:
    """The curve and the knees of every parameter."""
    from shareprefill.console import show_table
    from shareprefill.evaluation.tables import LESS_IMPORTANT, curve_table, knee_table

    for curve in found.curves:
        columns, rows = curve_table(curve, found.dense)
        title = f"{curve.parameter}, over all tasks"
        show_table(title, columns, rows, less_important=LESS_IMPORTANT)
        show_table("knees", *knee_table(curve), prose=("knee of",))
