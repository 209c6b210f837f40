"""A loaded model that is measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from shareprefill import __version__
from shareprefill.errors import ConfigError
from shareprefill.evaluation.config import EvalConfig
from shareprefill.evaluation.jobs import Job, Progress, Result, Subject, ask, measure_all
from shareprefill.evaluation.ledger import Ledger
from shareprefill.evaluation.measurement import DENSE_VARIANT, Meter, Outcome, Variant
from shareprefill.evaluation.results import Cell
from shareprefill.models import fingerprint, load_model, load_tokenizer, max_length


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

    @cached_property
    def subject(self) -> Subject:
        """What the figures belong to."""
        import transformers

        device = next(self.model.parameters()).device
        cuda = device.type == "cuda"
        print_ = fingerprint(self.model)
        context = {
            "model": self.name,
            "weights": print_.weights,
            "device": torch.cuda.get_device_name(device) if cuda else "CPU",
            "threads": torch.get_num_threads(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "shareprefill": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        return Subject(context, print_, max_length(self.model))

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
            ShareprefillError: see `pipeline.evaluate`.
        """
        # All prompts first: a task that cannot be used is known before an hour has passed.
        asked = ask(self.config, self.tokenizer, self.subject.longest)
        return measure_all(
            self.subject,
            asked,
            variants,
            self.config,
            ledger,
            partial(self.run, variants),
            progress,
        )

    def run(self, variants: list[Variant], jobs: Iterable[Job]) -> Iterator[Result]:
        """Runs jobs in this process, one after the other.

        Raises:
            ConfigError: the device has too little memory.
        """
        every = [DENSE_VARIANT, *variants]
        for job in jobs:
            meter = Meter(
                self.model,
                self.tokenizer,
                job.question,
                length=job.length,
                bins=self.config.bins,
                measure=self.config.measure,
                warm_up=job.warm_up,
            )
            for column in job.columns:
                yield job, column, _run(meter, every[column], len(job.question.input_ids))


def _run(meter: Meter, variant: Variant, tokens: int) -> Outcome:
    try:
        return meter.run(variant)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the device has too little memory for a prompt of {tokens} tokens under policy "
            f"{variant.policy}: lower --lengths, choose a smaller --dtype, or leave out recall and "
            "errors with --no-measure"
        ) from error
