"""The calibration stage: a model and a configuration in, a complete map store out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shareprefill.calib.capture import PromptMaps, capture
from shareprefill.calib.effect import measure_effect
from shareprefill.calib.prompts import Prompt, check_data, make_prompts
from shareprefill.calib.store import INDEX, MapStore
from shareprefill.checkpoint import checkpoint_fingerprint
from shareprefill.config import CalibrateConfig
from shareprefill.errors import ConfigError, DataError
from shareprefill.files import locked_folder
from shareprefill.models import (
    Fingerprint,
    fingerprint,
    load_model,
    load_tokenizer,
    max_length,
    model_digest,
)
from shareprefill.processes import Processes, launched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def capture_maps(
    config: CalibrateConfig,
    folder: Path,
    *,
    resume: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> MapStore | None:
    """Captures the maps of all prompts of a configuration, or those that are still missing.

    Under torchrun the prompts are spread over the processes, each with a model of its own (on a GPU
    of its own, where `device` is auto). The first process collects and writes, so the store is the
    same as one process makes.

    Args:
        config: Model, data, number and length of the prompts.
        folder: Where the store is; another process that writes there is refused.
        resume: Go on with a store of the same configuration; False starts anew.
        trust_remote_code: Run the model repository's own code.
        progress: Called with (prompts done, prompts in all), by the first process.

    Returns:
        The complete store; None in the other processes of a torchrun, whose work is then done.

    Raises:
        ConfigError: the length is beyond the model's maximum, or the folder holds a calibration
            with another configuration.
        DataError: data or folder cannot be used.
        ModelError: the model or its tokenizer cannot be loaded.
        UnsupportedError: the model's family is not supported.
    """
    check_data(config)
    with launched() as processes:
        model, prompts, made_for = load_for_capture(config, processes, trust_remote_code)
        return capture_prompts(
            model,
            prompts,
            made_for,
            config,
            folder,
            processes=processes,
            resume=resume,
            progress=progress,
        )


def capture_prompts(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    made_for: Fingerprint,
    config: CalibrateConfig,
    folder: Path,
    *,
    processes: Processes | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> MapStore | None:
    """The same for a model and prompts that are loaded.

    Args:
        model: In eval mode.
        prompts: All prompts of the calibration.
        made_for: The model's fingerprint.
        config: What is captured.
        folder: Where the store is.
        processes: Those that share the work; None for this one alone.
        resume: Go on with a store of the same configuration; False starts anew.
        progress: Called with (prompts done, prompts in all), by the first process.

    Returns:
        The complete store; None in the other processes.
    """
    processes = processes or Processes()

    def captured(number: int) -> PromptMaps:
        ids = prompts[number].input_ids
        maps = capture(
            model,
            ids,
            block_size=config.block_size,
            rows=config.rows,
            map_block=MapStore(folder, config, made_for, []).map_block(len(ids)),
        )
        if not config.effect_tokens:
            return maps
        effect = measure_effect(
            model,
            ids,
            maps.layers,
            block_size=config.block_size,
            tokens=config.effect_tokens,
            seed=config.seed * 1_000_003 + number,
        )
        return PromptMaps(maps.layers, {**maps.tensors, **effect})

    if processes.rank > 0:
        for number in range(processes.tell() + processes.rank, len(prompts), processes.size):
            processes.send(captured(number))
        return None
    with locked_folder(folder):
        digest = model_digest(model)
        store = MapStore.begin(folder, config, made_for, resume=resume, digest=digest)
        check_prompts(store, prompts)
        begun = processes.tell(len(store.prompts))
        for number in range(begun, len(prompts)):
            if progress is not None:
                progress(number, len(prompts))
            turn = (number - begun) % processes.size
            maps = captured(number) if turn == 0 else processes.receive(turn)
            prompt = prompts[number]
            logger.info("prompt %d: %s, %d tokens", number, prompt.source, len(prompt.input_ids))
            store.add(prompt.source, prompt.input_ids, prompt.digest, maps)
        if progress is not None:
            progress(len(prompts), len(prompts))
    return store


def load_for_capture(
    config: CalibrateConfig, processes: Processes, trust_remote_code: bool
) -> tuple[PreTrainedModel, list[Prompt], Fingerprint]:
    """Loads what a capture reads: the model, the prompts, and the model's fingerprint.

    Raises:
        As `capture_maps`.
    """
    tokenizer = load_tokenizer(config.model, trust_remote_code=trust_remote_code)
    model = load_model(
        config.model,
        device=processes.device(config.device),
        dtype=config.dtype,
        trust_remote_code=trust_remote_code,
    )
    longest = max_length(model)
    if longest is not None and config.length > longest:
        raise ConfigError(
            f"length = {config.length} is beyond the model's maximum of {longest} tokens; "
            "lower --length"
        )
    prompts = make_prompts(config, tokenizer)
    made_for = replace(fingerprint(model), checkpoint=checkpoint_fingerprint(config.model))
    return model, prompts, made_for


def open_for_capture(
    folder: Path,
    config: CalibrateConfig,
    model: PreTrainedModel,
    made_for: Fingerprint,
    prompts: Sequence[Prompt],
    *,
    resume: bool,
) -> MapStore:
    """The store that a capture would go on with, to read: an empty one where it would start anew.

    Raises:
        As `capture_maps`.
    """
    if not resume or not (folder / INDEX).exists():
        return MapStore(folder, config, made_for, [])
    store = MapStore.open(folder)
    store.refuse_other(config, made_for, model_digest(model))
    check_prompts(store, prompts)
    return store


def check_prompts(store: MapStore, prompts: Sequence[Prompt]) -> None:
    """Refuses to go on with a store that is damaged, or that other prompts are in."""
    store.verify()
    for number, record in enumerate(store.prompts):
        if record.digest != prompts[number].digest:
            raise DataError(
                f"prompt {number} ({record.source}) is not the one that {store.folder} was begun "
                "with: the data changed; use --fresh to start anew"
            )
