"""The evaluation: an artifact and a configuration in, a cell for every task and policy out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shareprefill import __version__
from shareprefill.artifact import (
    Artifact,
    artifact_bytes,
    check_fingerprint,
    load_artifact,
)
from shareprefill.errors import ConfigError
from shareprefill.evaluation.cells import make_cell
from shareprefill.evaluation.config import EvalConfig
from shareprefill.evaluation.ledger import Ledger
from shareprefill.evaluation.measurement import DENSE_VARIANT, Meter, Outcome, Variant
from shareprefill.evaluation.questions import Question, check_task, make_questions
from shareprefill.evaluation.results import Cell, Evaluation
from shareprefill.files import locked_folder
from shareprefill.models import fingerprint, load_model, load_tokenizer, max_length

Progress = Callable[[int, int], None]


def evaluate(
    config: EvalConfig,
    *,
    out: Path | None = None,
    fresh: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures an artifact's policies against dense attention on prompts that it has not seen.

    Artifact and model are loaded once; dense attention is run once for every prompt. With `out`,
    every outcome is kept in a file there as soon as it is known, and used again by a later call
    that needs the same one.

    Args:
        config: Tasks, lengths, policies and gammas.
        out: Folder of the outcomes; another process that writes there is refused. None keeps none.
        fresh: Forget the outcomes that are there.
        trust_remote_code: Run the model repository's own code.
        progress: Called with (outcomes done, outcomes in all).

    Returns:
        A cell for every task, length, policy and gamma, and for dense attention.

    Raises:
        ConfigError: a task is unknown, or a length beyond the model's maximum.
        DataError: a file of prompts or the folder cannot be used.
        ArtifactError: the artifact cannot be read, or is of another model.
        ModelError: the model cannot be loaded.
        UnsupportedError: the model's family is not supported.
    """
    for task in config.tasks:
        check_task(task)
    artifact = load_artifact(config.artifact)
    model = config.model or artifact.model
    bench = Bench.load(model, config, trust_remote_code=trust_remote_code)
    variants = [
        Variant(
            runtime.policy,
            {} if runtime.gamma is None else {"gamma": runtime.gamma},
            artifact,
            runtime,
        )
        for runtime in config.runtimes()
    ]
    with output_folder(out) as folder:
        cells = bench.measure(variants, Ledger(folder, fresh=fresh), progress)
    return Evaluation(config, {**bench.context(), "artifact": digest(artifact)}, tuple(cells))


def digest(artifact: Artifact) -> str:
    """SHA-256 of an artifact's content."""
    return hashlib.sha256(artifact_bytes(artifact)).hexdigest()


@dataclass(frozen=True, eq=False)
class Bench:
    """A model with its tokenizer, and what is asked of it.

    Attributes:
        name: The model's name.
        model: A transformers decoder, in eval mode.
        tokenizer: Its tokenizer.
        config: Tasks, lengths, number of prompts and seed.
    """

    name: str
    model: Any
    tokenizer: Any
    config: EvalConfig

    @classmethod
    def load(cls, name: str, config: EvalConfig, *, trust_remote_code: bool = False) -> Bench:
        """Loads the model of a configuration.

        Raises:
            ConfigError: device or dtype is no such thing.
            ModelError: the model cannot be loaded.
        """
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        model = load_model(
            name, device=config.device, dtype=config.dtype, trust_remote_code=trust_remote_code
        )
        return cls(name, model, tokenizer, config)

    def context(self) -> dict[str, Any]:
        """The model, the device and the versions that the figures belong to."""
        import transformers

        device = next(self.model.parameters()).device
        cuda = device.type == "cuda"
        return {
            "model": self.name,
            "weights": fingerprint(self.model).weights,
            "device": torch.cuda.get_device_name(device) if cuda else "CPU",
            "threads": torch.get_num_threads(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "shareprefill": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def measure(
        self, variants: list[Variant], ledger: Ledger, progress: Progress | None = None
    ) -> list[Cell]:
        """A cell for dense attention and every variant, task by task and length by length.

        Args:
            variants: What is compared with dense attention.
            ledger: Outcomes that are there already; new ones are added.
            progress: Called with (outcomes done, outcomes in all).

        Raises:
            ArtifactError: an artifact is of another model.
            ShareprefillError: see `evaluate`.
        """
        print_ = fingerprint(self.model)
        for artifact in {id(v.artifact): v.artifact for v in variants}.values():
            if artifact is not None:
                check_fingerprint(artifact, print_)
        every = [DENSE_VARIANT, *variants]
        # All prompts first: a task that cannot be used is known before an hour has passed.
        asked = {
            (task, length): self._questions(task, length)
            for task in self.config.tasks
            for length in self.config.lengths
        }
        total = sum(map(len, asked.values())) * len(every)
        facts = self._facts(every)
        done = 0
        cells = []
        for (task, length), questions in asked.items():
            outcomes: list[list[Outcome]] = [[] for _ in every]
            for number, question in enumerate(questions):
                if progress is not None:
                    progress(done, total)
                meter = self._meter(question, length, warm_up=number == 0)
                for column, variant in enumerate(every):
                    key = {**facts[column], **self._prompt_facts(question, length)}
                    outcome = ledger.get(key)
                    if outcome is None:
                        outcome = _run(meter, variant, len(question.input_ids))
                        ledger.add(key, outcome)
                    outcomes[column].append(outcome)
                done += len(every)
            metrics = {question.metric for question in questions}
            metric = metrics.pop() if len(metrics) == 1 else "mixed"
            cells += [
                make_cell(task, metric, length, variant, found, outcomes[0])
                for variant, found in zip(every, outcomes, strict=True)
            ]
        if progress is not None:
            progress(total, total)
        return cells

    def _questions(self, task: str, length: int) -> list[Question]:
        return make_questions(task, length, self.config, self.tokenizer, max_length(self.model))

    def _facts(self, variants: list[Variant]) -> list[dict[str, Any]]:
        """What an outcome depends on besides its prompt, by variant."""
        context = self.context()
        del context["threads"], context["model"]
        digests = {id(v.artifact): digest(v.artifact) for v in variants if v.artifact is not None}
        return [
            {
                **context,
                "measure": self.config.measure,
                "artifact": digests.get(id(variant.artifact)),
                "runtime": None if variant.runtime is None else variant.runtime.to_dict(),
            }
            for variant in variants
        ]

    def _prompt_facts(self, question: Question, length: int) -> dict[str, Any]:
        return {"prompt": question.digest, "length": length, "bins": self.config.bins}

    def _meter(self, question: Question, length: int, *, warm_up: bool) -> Meter:
        return Meter(
            self.model,
            self.tokenizer,
            question,
            length=length,
            bins=self.config.bins,
            measure=self.config.measure,
            warm_up=warm_up,
        )


def _run(meter: Meter, variant: Variant, tokens: int) -> Outcome:
    try:
        return meter.run(variant)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the device has too little memory for a prompt of {tokens} tokens under policy "
            f"{variant.policy}: lower --lengths, choose a smaller --dtype, or leave out recall and "
            "errors with --no-measure"
        ) from error


@contextmanager
def output_folder(out: Path | None) -> Iterator[Path | None]:
    """Holds the folder of the outcomes for this process alone; None for none.

    Raises:
        DataError: another process holds it, or it cannot be written.
    """
    if out is None:
        yield None
    else:
        with locked_folder(out) as folder:
            yield folder
