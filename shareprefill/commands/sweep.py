"""`sp sweep`: what each parameter buys, and where more of it stops paying."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from shareprefill.commands.evaluate import (
    FreshOption,
    HtmlOption,
    OutOption,
    ReplaceOption,
    require_folder,
    require_own_results,
    write_results,
)
from shareprefill.commands.known import ArtifactOption, artifact_here, model_of
from shareprefill.commands.options import (
    POLICY_HELP,
    JsonOption,
    OtherModelOption,
    RemoteCodeOption,
    explained,
    length_option,
    named,
    options_of,
    repeated,
    with_commas,
)
from shareprefill.evaluation.config import SweepConfig
from shareprefill.policy_names import POLICIES

if TYPE_CHECKING:
    from shareprefill.evaluation.sweep import Sweep


@options_of(
    SweepConfig,
    leave_out=("artifact", "model"),
    slacks=repeated("--slack"),
    taus=repeated("--tau"),
    deltas=repeated("--delta"),
    gammas=repeated("--gamma"),
    block_sizes=repeated("--block-size"),
    ks=repeated("--k"),
    calibrations=repeated("--calibration"),
    policy=explained(POLICY_HELP, *POLICIES),
    tasks=with_commas,
    length=length_option,
    samples=named("--samples-per-task", "--samples"),
)
def sweep_command(
    options: dict[str, Any],
    artifact: ArtifactOption = None,
    model: OtherModelOption = None,
    out: OutOption = None,
    resume: FreshOption = True,
    html: HtmlOption = False,
    force: ReplaceOption = False,
    trust_remote_code: RemoteCodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure accuracy and recall against density and time, one parameter changed at a time.

    Example:
      sp sweep --gamma 0.8 --gamma 0.9 --tasks retr_kv --out results
    """
    path = artifact or artifact_here(model, [options["policy"]])
    name = model_of(path, model, trust_remote_code=trust_remote_code)
    config = SweepConfig(
        **options,
        artifact=None if path is None else str(path),
        model=name,
    )
    require_folder(out, html=html)
    from shareprefill.report.marks import SWEEP

    if not force:
        require_own_results(out, SWEEP, path, name, html=html)
    from shareprefill.console import progress
    from shareprefill.evaluation.pages import sweep_page
    from shareprefill.evaluation.sweep import sweep

    with progress("outcomes") as advance:
        found = sweep(
            config,
            out=out,
            fresh=not resume,
            trust_remote_code=trust_remote_code,
            progress=advance,
        )
    write_results(out, SWEEP, found.to_json(), sweep_page(found) if html else None)
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
