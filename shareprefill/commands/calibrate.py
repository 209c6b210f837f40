"""`sp calibrate`: attention maps of a model, and the autoencoder on them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shareprefill.commands.known import ARTIFACTS
from shareprefill.commands.options import (
    JsonOption,
    RemoteCodeOption,
    length_option,
    options_of,
    repeated,
    required,
)
from shareprefill.commands.train import show_training
from shareprefill.commands.verdicts import judge_calibration
from shareprefill.config import DATA_SETS, CalibrateConfig, TrainConfig

if TYPE_CHECKING:
    from shareprefill.calib.forecast import Forecast


@options_of(
    CalibrateConfig,
    leave_out=("rows",),
    model=required("Hub id, local folder, .gguf file, or the built-in sp-tiny."),
    data=repeated(
        "--data",
        f"Data set: {', '.join(DATA_SETS)} (all of these), a .jsonl, .json or .txt file, a folder "
        "of them, or hub:<dataset>:<config>:<split>. A row of them is a text, or has the field "
        "messages (role and content, by the chat template), context with input, prompt, input, "
        "text or content. May be repeated.",
        DATA_SETS,
    ),
    length=length_option,
)
def calibrate_command(
    options: dict[str, Any],
    out: Annotated[
        Path | None, typer.Option(help="Folder; artifacts/<model>/calibration by default.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on with a killed run, or start anew.")
    ] = True,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Time short prompts, and tell time, disk and memory of the whole."
        ),
    ] = False,
    trust_remote_code: RemoteCodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Capture block-pooled attention maps on prompts, and train the autoencoder on them.

    Examples:
      sp calibrate --model sp-tiny --samples 6 --length 4K
      sp calibrate --model Qwen/Qwen3-8B --data prompts.jsonl --length 32K
    """
    config = CalibrateConfig(**options)
    from shareprefill.autoencoder.pipeline import forecast_training, train
    from shareprefill.calib.forecast import forecast
    from shareprefill.calib.pipeline import capture_maps
    from shareprefill.console import progress, status
    from shareprefill.models import model_slug

    folder = out or ARTIFACTS / model_slug(config.model) / "calibration"
    if dry_run:
        with status("timing short prompts"):
            found = forecast(config, folder, resume=resume, trust_remote_code=trust_remote_code)
            if found is None:
                return
            sizes = found.tokens, found.heads, config.block_size
            training = forecast_training(*sizes, TrainConfig(seed=config.seed))
        if as_json:
            facts = {"path": str(folder), **asdict(found), "training_seconds": training}
            typer.echo(json.dumps(facts))
        else:
            show_forecast(found, training, folder)
        return
    with progress("prompts") as advance:
        store = capture_maps(
            config,
            folder,
            resume=resume,
            trust_remote_code=trust_remote_code,
            progress=advance,
        )
    # Under torchrun, the first process has them all.
    if store is None:
        return
    with status("training the autoencoder"):
        training = train(folder, TrainConfig(seed=config.seed))
    verdict = judge_calibration(store, training, folder)
    if as_json:
        facts = {"path": str(folder), "losses": asdict(training.losses), "epochs": training.epochs}
        typer.echo(json.dumps({**facts, "verdict": verdict.to_dict()}))
        return
    show_training(folder, training)
    verdict.show()


def show_forecast(found: Forecast, training: float, folder: Path) -> None:
    """Prints what a calibration would take, with so many seconds of training."""
    from shareprefill.console import duration_of, show_line, size_of

    least, most = min(found.tokens), max(found.tokens)
    short, long = found.probes
    memory = f"{size_of(found.host_memory)} at the peak"
    if found.device_memory is not None:
        memory += f", and {size_of(found.device_memory)} on the GPU"
    each = size_of(found.disk / found.prompts)
    for line in (
        f"prompts: {found.prompts} of {least:,} to {most:,} tokens; {found.done} are done",
        f"time: about {duration_of(found.seconds)}, as {short} and {long} tokens took here; then "
        f"about {duration_of(training)} to train the autoencoder",
        f"disk: {size_of(found.disk)} in {folder}, {each} a prompt",
        f"memory: about {memory}",
    ):
        show_line(line)
