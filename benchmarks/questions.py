"""The open questions of sharing patterns, answered on captured maps of one model.

`python benchmarks/questions.py --model DIR --out FOLDER` captures exact block maps on calibration
prompts and on unseen ones (other seeds) of seven tasks, trains the autoencoder on the first, and
prints a table for each question; FOLDER keeps the maps, `questions.json` and `questions.md`.
Figures are means over unseen prompts, with 95 % bootstrap intervals over them.

A head that shares reads its pivot's pattern (4 sampled rows a block, smoothed) if its check passes:
one sampled row a block has at least gamma - slack of its mass inside. Otherwise, and where it has
no pivot, it reads its own pattern (2 rows, smoothed). A *plan* is what `sp cluster` would choose
of seven numbers of clusters, on the calibration prompts that formed no cluster (the last one of
every task): policy, gamma, pivot and slack of every head.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from question_answers import (
    TASKS,
    Study,
    Table,
    autoencoder_question,
    block_question,
    consensus_labels,
    layer_question,
    sharing_question,
    threshold_question,
    transfer_question,
)
from shared_patterns import Captured, Measurement

import shareprefill
from shareprefill.autoencoder.pipeline import train
from shareprefill.calib.capture import capture
from shareprefill.calib.prompts import make_prompts
from shareprefill.calib.store import MapStore
from shareprefill.clustering.measurements import HeldOutMeasurements
from shareprefill.config import CalibrateConfig, TrainConfig
from shareprefill.files import atomic_write_text
from shareprefill.models import fingerprint, load_model, load_tokenizer

UNSEEN_SEED = 1001


def captured(
    folder: Path, config: CalibrateConfig, model: torch.nn.Module, tokenizer: Any
) -> MapStore:
    """The maps of a configuration's prompts; those that are in the folder are used again."""
    store = MapStore.begin(folder, config, fingerprint(model), resume=True)
    for prompt in make_prompts(config, tokenizer)[len(store.prompts) :]:
        maps = capture(model, prompt.input_ids, block_size=config.block_size, rows=config.rows)
        store.add(prompt.source, prompt.input_ids, prompt.digest, maps)
    return store


def measure(store: MapStore, number: int, pivot_rows: int, device: str) -> Measurement:
    """All that is measured of a prompt."""
    prompt = Captured(store, number, pivot_rows, device)
    evidence = HeldOutMeasurements(store, [number], pivot_rows, estimator=prompt.estimator)
    return Measurement(prompt, evidence, prompt.pairs(), prompt.smoothed(), prompt.oracle())


def study_of(options: argparse.Namespace, folder: Path, told: Callable[[str], None]) -> Study:
    """Captures, trains and measures; the finer maps of the unseen prompts are left in `folder`."""
    tokenizer = load_tokenizer(options.model)
    model = load_model(options.model, device=options.device, dtype=options.dtype)
    device = next(model.parameters()).device.type
    told("loaded")
    config = CalibrateConfig(
        model=options.model,
        data=TASKS,
        samples=len(TASKS) * options.calibrate,
        length=options.length,
        block_size=options.block_size,
        rows=options.rows,
    )
    store = captured(folder / "calibration", config, model, tokenizer)
    new = replace(config, samples=len(TASKS) * options.unseen, seed=UNSEEN_SEED)
    unseen = captured(folder / "unseen", new, model, tokenizer)
    finer = replace(new, block_size=options.block_size // 2)
    captured(folder / "finer", finer, model, tokenizer)
    del model
    told("captured")
    training = train(folder / "calibration", TrainConfig(epochs=options.epochs))
    told("trained")
    last = {record.source: number for number, record in enumerate(store.prompts)}
    held_out = sorted(last.values())
    every = partial(measure, pivot_rows=options.pivot_rows, device=device)
    layers = torch.arange(len(store.layers))
    study = Study(
        store=store,
        training=training,
        known=[n for n in range(len(store.prompts)) if n not in held_out],
        held_out=[every(store, n) for n in held_out],
        unseen=[every(unseen, n) for n in range(len(unseen.prompts))],
        layers=layers.repeat_interleave(store.fingerprint.geometry.heads),
        density=options.density,
    )
    told("measured")
    return study


def finer_prompts(options: argparse.Namespace, folder: Path, device: str) -> list[Captured]:
    """The unseen prompts in blocks of half the size."""
    store = MapStore.open(folder / "finer")
    numbers = range(len(store.prompts))
    return [Captured(store, number, options.pivot_rows, device) for number in numbers]


def answers(study: Study, finer: list[Captured], told: Callable[[str], None]) -> list[Table]:
    """All tables."""
    labels = consensus_labels(study)
    tables: list[Table] = []
    for name, answer in (
        ("autoencoder", lambda: autoencoder_question(study)),
        ("sharing on and off", lambda: sharing_question(study, labels)),
        ("transfer", lambda: transfer_question(study)),
        ("thresholds", lambda: threshold_question(study, labels)),
        ("layers", lambda: layer_question(study, labels)),
        ("block sizes", lambda: block_question(study, finer)),
    ):
        found = answer()
        tables += found
        for table in found:
            print(f"\n{table.markdown()}", flush=True)
        told(name)
    return tables


def main() -> None:
    """Answers the questions, prints the tables, writes the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", required=True, help="a folder, a hub id, or sp-tiny")
    parser.add_argument("--length", type=int, default=8192, help="tokens a prompt")
    parser.add_argument("--calibrate", type=int, default=3, help="calibration prompts a task")
    parser.add_argument("--unseen", type=int, default=2, help="unseen prompts a task")
    parser.add_argument("--block-size", type=int, default=128, help="half of it in question 6")
    parser.add_argument("--pivot-rows", type=int, default=4, help="rows a block of a pivot's map")
    parser.add_argument("--density", type=float, default=0.2, help="that recalls are compared at")
    parser.add_argument("--epochs", type=int, default=TrainConfig().epochs, help="of training")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="folder of maps and tables; none keeps none")
    options = parser.parse_args()
    options.rows = (1, 2, 4, 8)
    begun = time.perf_counter()

    def told(what: str) -> None:
        print(f"{time.perf_counter() - begun:7.1f} s  {what}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        study = study_of(options, folder, told)
        device = study.unseen[0].prompt.device
        tables = answers(study, finer_prompts(options, folder, device), told)
    if options.out:
        name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
        context = {
            "model": str(options.model),
            "device": name,
            "torch": torch.__version__,
            "shareprefill": shareprefill.__version__,
            "options": {k: str(v) for k, v in vars(options).items() if k != "out"},
        }
        found = {"context": context, "tables": [table.to_dict() for table in tables]}
        atomic_write_text(options.out / "questions.json", json.dumps(found, indent=1) + "\n")
        text = "\n".join(table.markdown() for table in tables)
        atomic_write_text(options.out / "questions.md", text)


if __name__ == "__main__":
    main()
