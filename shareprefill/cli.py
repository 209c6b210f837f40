"""The command `sp`: parses, builds a configuration, calls one function, prints."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from shareprefill import __version__
from shareprefill.commands.audit import audit_command
from shareprefill.commands.bench import bench_command
from shareprefill.commands.evaluate import eval_command
from shareprefill.commands.hub import pull_command, push_command
from shareprefill.commands.known import ARTIFACTS
from shareprefill.commands.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    RemoteCodeOption,
    parse_length,
)
from shareprefill.commands.regenerate import regenerate_command
from shareprefill.commands.streams import open_streams, read_prompt, written_output
from shareprefill.commands.sweep import sweep_command
from shareprefill.config import (
    LINKAGES,
    METRICS,
    POLICIES,
    CalibrateConfig,
    ClusterConfig,
    RuntimeConfig,
    TrainConfig,
)
from shareprefill.errors import ArtifactError, ConfigError, DataError, ShareprefillError
from shareprefill.files import printable

CLUSTERS = Path("clusters.st")

# Defaults are read off the configurations, where alone they live.
_CALIBRATE = CalibrateConfig(model="-")
_TRAIN = TrainConfig()
_CLUSTER = ClusterConfig()
_RUN = RuntimeConfig()

app = typer.Typer(
    name="sp",
    help="Make long prompts cheap: calibrate a model's attention patterns, cluster its heads, and "
    "run its prefill with shared sparse attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

CalibrationArgument = Annotated[
    Path | None,
    typer.Argument(help="Calibration folder; the newest one under artifacts/ by default."),
]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Shared sparse attention patterns for long prompts."""
    if version:
        typer.echo(f"sp {__version__}")
        raise typer.Exit


@app.command()
def calibrate(
    model: ModelOption,
    data: Annotated[
        list[str],
        typer.Option(
            help="Data set: retr_kv, retr_passkey, retr_number, math_find, code_run, "
            "variable_tracking, needle, text, mixture (all of these), a .jsonl, .json or .txt "
            "file, a folder of them, or hub:<dataset>:<config>:<split>. May be repeated."
        ),
    ] = list(_CALIBRATE.data),  # noqa: B006
    samples: Annotated[int, typer.Option(help="Prompts in all.")] = _CALIBRATE.samples,
    length: Annotated[
        int, typer.Option(parser=parse_length, metavar="LENGTH", help="Tokens a prompt; or 8K.")
    ] = _CALIBRATE.length,
    block_size: Annotated[int, typer.Option(help="Tokens a block.")] = _CALIBRATE.block_size,
    seed: Annotated[int, typer.Option(help="Seed of prompts and training.")] = _CALIBRATE.seed,
    device: DeviceOption = _CALIBRATE.device,
    dtype: DtypeOption = _CALIBRATE.dtype,
    out: Annotated[
        Path | None, typer.Option(help="Folder; artifacts/<model>/calibration by default.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on with a killed run, or start anew.")
    ] = True,
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Capture block-pooled attention maps on prompts, and train the autoencoder on them."""
    config = CalibrateConfig(
        model=model,
        data=tuple(data),
        samples=samples,
        length=length,
        block_size=block_size,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    from shareprefill.autoencoder.pipeline import train as train_stage
    from shareprefill.calib.pipeline import capture_maps
    from shareprefill.console import progress, show_training
    from shareprefill.models import model_slug

    folder = out or ARTIFACTS / model_slug(model) / "calibration"
    with progress("prompts") as advance:
        store = capture_maps(
            config,
            folder,
            resume=resume,
            trust_remote_code=trust_remote_code,
            progress=advance,
        )
    # Under torchrun, the first process has them all.
    if store is not None:
        show_training(folder, train_stage(folder, TrainConfig(seed=seed)))


@app.command()
def train(
    calibration: CalibrationArgument = None,
    code_size: Annotated[int, typer.Option(help="Dimensions of a code.")] = _TRAIN.code_size,
    resolution: Annotated[
        int, typer.Option(help="Side that maps are pooled to.")
    ] = _TRAIN.resolution,
    hidden: Annotated[int, typer.Option(help="Width of the network.")] = _TRAIN.hidden,
    epochs: Annotated[int, typer.Option(help="Epochs at most.")] = _TRAIN.epochs,
    patience: Annotated[
        int, typer.Option(help="Epochs without progress before it stops.")
    ] = _TRAIN.patience,
    batch_size: Annotated[int, typer.Option(help="Maps a step.")] = _TRAIN.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Peak rate.")] = _TRAIN.learning_rate,
    seed: Annotated[int, typer.Option(help="Seed.")] = _TRAIN.seed,
) -> None:
    """Train the autoencoder of a calibration again."""
    config = TrainConfig(
        code_size=code_size,
        resolution=resolution,
        hidden=hidden,
        epochs=epochs,
        patience=patience,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    from shareprefill.autoencoder.pipeline import train as train_stage
    from shareprefill.console import show_training

    folder = _calibration(calibration)
    show_training(folder, train_stage(folder, config))


@app.command()
def cluster(
    calibration: CalibrationArgument = None,
    k: Annotated[str, typer.Option(help="Number of clusters, or auto.")] = "auto",
    metric: Annotated[str, typer.Option(help=f"One of {', '.join(METRICS)}.")] = _CLUSTER.metric,
    linkage: Annotated[str, typer.Option(help=f"One of {', '.join(LINKAGES)}.")] = _CLUSTER.linkage,
    min_size: Annotated[
        int, typer.Option(help="Heads that a sharing cluster needs.")
    ] = _CLUSTER.min_size,
    target_recall: Annotated[
        float, typer.Option(help="Attention mass that every head's pattern must cover.")
    ] = _CLUSTER.target_recall,
    budget: Annotated[
        float | None,
        typer.Option(help="Mean density to spend where it covers most, instead of a target."),
    ] = _CLUSTER.budget,
    gamma: Annotated[
        float, typer.Option(help="Attention mass of the patterns that are compared.")
    ] = _CLUSTER.gamma,
    slack: Annotated[
        float,
        typer.Option(help="Mass less than on held-out prompts with which a head shares."),
    ] = _CLUSTER.slack,
    tau: Annotated[
        float,
        typer.Option(help="JS distance to share by the paper's rule, policy shareprefill."),
    ] = _CLUSTER.tau,
    delta: Annotated[
        float, typer.Option(help="JS distance to uniform above which a head is highly sparse.")
    ] = _CLUSTER.delta,
    pivot_rows: Annotated[
        str,
        typer.Option(help="Query rows a block of a pivot's map: auto, 0 (all rows), or a number."),
    ] = "auto",
    out: Annotated[Path, typer.Option(help="The artifact to write.")] = CLUSTERS,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a file that is of another model, or none.")
    ] = False,
) -> None:
    """Cluster the heads of a calibration, choose every head's policy, and write the artifact."""
    config = ClusterConfig.from_dict(
        {
            "k": _number_or_auto("k", k),
            "metric": metric,
            "linkage": linkage,
            "min_size": min_size,
            "target_recall": target_recall,
            "budget": budget,
            "gamma": gamma,
            "slack": slack,
            "tau": tau,
            "delta": delta,
            "pivot_rows": _number_or_auto("pivot-rows", pivot_rows),
        }
    )
    from shareprefill.artifact import save_artifact
    from shareprefill.clustering.pipeline import cluster as cluster_stage
    from shareprefill.console import show_clusterings, status, summarize
    from shareprefill.files import locked_output, reading_folder

    folder = _calibration(calibration)
    with locked_output(out), reading_folder(folder), status("clustering"):
        if not force:
            _refuse_to_replace(out, folder)
        artifact, trials = cluster_stage(folder, config)
        save_artifact(artifact, out)
    show_clusterings(trials)
    summarize(artifact, out)


@app.command()
def run(
    prompt: Annotated[Path, typer.Argument(help="Text file; - reads standard input.")],
    artifact: Annotated[Path, typer.Option(help="Artifact of the model.")] = CLUSTERS,
    model: Annotated[
        str | None, typer.Option(help="The model; by default the artifact's, if calibrated here.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    policy: Annotated[str, typer.Option(help=f"One of {', '.join(POLICIES)}.")] = _RUN.policy,
    gamma: Annotated[
        float | None,
        typer.Option(help="Attention mass a pattern covers (paper: 0.9); by head by default."),
    ] = None,
    slack: Annotated[
        float | None,
        typer.Option(help="Mass below gamma at which a head still shares; by head by default."),
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(
            help="JS distance to share (paper: 0.2), policy shareprefill; the artifact's."
        ),
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="JS distance to uniform (paper: 0.3); the artifact's.")
    ] = None,
    pivot_rows: Annotated[
        int | None, typer.Option(help="Rows a block of a pivot's map, 0 for all; the artifact's.")
    ] = None,
    min_tokens: Annotated[
        int | None, typer.Option(help="Run shorter prompts dense; measured by default.")
    ] = None,
    nonfinite: Annotated[
        str,
        typer.Option(help="NaN or Inf in a head's queries or keys: dense (that head) or error."),
    ] = _RUN.nonfinite,
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
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: RemoteCodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt, its prefill with shared sparse attention."""
    config = RuntimeConfig.from_dict(
        {
            "policy": policy,
            "gamma": gamma,
            "slack": slack,
            "tau": tau,
            "delta": delta,
            "pivot_rows": pivot_rows,
            "min_tokens": min_tokens,
            "nonfinite": nonfinite,
        }
    )
    text = read_prompt(prompt)
    from shareprefill.artifact import load_artifact, model_to_load
    from shareprefill.commands.known import known_models
    from shareprefill.console import finish_run
    from shareprefill.runtime.answering import answer

    loaded = load_artifact(artifact)
    result = answer(
        loaded,
        text,
        config,
        model=model_to_load(loaded, model, known_models(ARTIFACTS)),
        max_new_tokens=max_new_tokens,
        prefill_chunk=prefill_chunk,
        compare_dense=compare_dense,
        measure_recall=recall,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        on_text=None if as_json else _print_now,
    )
    finish_run(result, as_json=as_json)


@app.command()
def inspect(
    artifact: Annotated[Path, typer.Argument(help="An artifact.")] = CLUSTERS,
    as_json: JsonOption = False,
) -> None:
    """Print what is in an artifact."""
    from shareprefill.artifact import load_artifact
    from shareprefill.console import describe, summarize

    loaded = load_artifact(artifact)
    if as_json:
        typer.echo(json.dumps(describe(loaded), indent=1))
    else:
        summarize(loaded, artifact)


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(help="An artifact.")],
    after: Annotated[Path, typer.Argument(help="Another one of the same model.")],
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 1 where anything differs.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print what changed between two artifacts of one model."""
    from shareprefill.artifact import load_artifact
    from shareprefill.clustering.comparison import compare_artifacts
    from shareprefill.console import show_comparison

    comparison = compare_artifacts(load_artifact(before), load_artifact(after))
    if as_json:
        typer.echo(json.dumps(comparison.to_dict(), indent=1))
    else:
        show_comparison(comparison)
    if exit_code and comparison.differs:
        raise typer.Exit(1)


@app.command()
def doctor(
    model: Annotated[
        str | None,
        typer.Option(help="Print instead what a session does with each layer of this model."),
    ] = None,
    trust_remote_code: RemoteCodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Print versions and the device, and what works here and what does not."""
    from shareprefill.console import show_checks
    from shareprefill.diagnosis import diagnose, diagnose_model

    if model is None:
        checks = diagnose()
    else:
        checks = diagnose_model(model, trust_remote_code=trust_remote_code)
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        show_checks(checks)
    if any(check.broken for check in checks):
        raise typer.Exit(1)


app.command("eval")(eval_command)
app.command("sweep")(sweep_command)
app.command("audit")(audit_command)
app.command("bench")(bench_command)
app.command("regenerate")(regenerate_command)
app.command("push")(push_command)
app.command("pull")(pull_command)


def main() -> None:
    """Runs `sp`: an expected error is one line on stderr and exit status 1."""
    try:
        open_streams()
        with written_output():
            app()
    except ShareprefillError as error:
        with suppress(OSError):
            typer.echo(f"sp: {printable(error, 2000)}", err=True)
        sys.exit(1)


def _calibration(folder: Path | None) -> Path:
    from shareprefill.calib.store import newest_calibration

    if folder is None:
        folder = newest_calibration(ARTIFACTS)
        typer.echo(f"calibration: {folder} (the newest)", err=True)
    return folder


def _refuse_to_replace(out: Path, calibration: Path) -> None:
    """Refuses to write over a file that is no artifact of the calibration's model."""
    from shareprefill.artifact import load_artifact
    from shareprefill.calib.store import MapStore
    from shareprefill.files import kind_of

    if kind_of(out) is None:
        return
    try:
        there = load_artifact(out)
    except ArtifactError:
        raise DataError(
            f"{printable(out)} is there and no artifact that can be read: use --force to replace "
            "it, or --out"
        ) from None
    if there.fingerprint != MapStore.open(calibration).fingerprint:
        raise DataError(
            f"{printable(out)} is an artifact of another model, {printable(there.model)}: use "
            "--force to replace it, or --out"
        )


def _number_or_auto(name: str, value: str) -> int | None:
    if value == "auto":
        return None
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{name} = {value!r} is not allowed: give auto or a number") from None


def _print_now(piece: str) -> None:
    # Not `typer.echo`, which takes sequences that look like a terminal's out of the text.
    print(piece, end="", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
