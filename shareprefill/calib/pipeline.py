"""The calibration stage: a model and a configuration in, a complete map store out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shareprefill.calib.capture import capture
from shareprefill.calib.prompts import make_prompts
from shareprefill.calib.store import MapStore
from shareprefill.config import CalibrateConfig
from shareprefill.errors import ConfigError, DataError
from shareprefill.files import locked_folder
from shareprefill.models import fingerprint, load_model, load_tokenizer, max_length

Progress = Callable[[int, int], None]


def capture_maps(
    config: CalibrateConfig,
    folder: Path,
    *,
    resume: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> MapStore:
    """Captures the maps of all prompts of a configuration, or those that are still missing.

    Args:
        config: Model, data, number and length of the prompts.
        folder: Where the store is; another process that writes there is refused.
        resume: Go on with a store of the same configuration; False starts anew.
        trust_remote_code: Run the model repository's own code.
        progress: Called with (prompts done, prompts in all).

    Returns:
        The complete store.

    Raises:
        ConfigError: the length is beyond the model's maximum, or the folder holds a calibration
            with another configuration.
        DataError: data or folder cannot be used.
        ModelError: the model or its tokenizer cannot be loaded.
        UnsupportedError: the model's family is not supported.
    """
    tokenizer = load_tokenizer(config.model, trust_remote_code=trust_remote_code)
    model = load_model(
        config.model,
        device=config.device,
        dtype=config.dtype,
        trust_remote_code=trust_remote_code,
    )
    longest = max_length(model)
    if longest is not None and config.length > longest:
        raise ConfigError(
            f"length = {config.length} is beyond the model's maximum of {longest} tokens; lower "
            "--length"
        )
    prompts = make_prompts(config, tokenizer)
    with locked_folder(folder):
        store = MapStore.begin(folder, config, fingerprint(model), resume=resume)
        store.verify()
        for number, record in enumerate(store.prompts):
            if record.digest != prompts[number].digest:
                raise DataError(
                    f"prompt {number} ({record.source}) is not the one that {folder} was begun "
                    "with: the data changed; use --fresh to start anew"
                )
        for number in range(len(store.prompts), len(prompts)):
            if progress is not None:
                progress(number, len(prompts))
            prompt = prompts[number]
            maps = capture(model, prompt.input_ids, block_size=config.block_size, rows=config.rows)
            store.add(prompt.source, prompt.input_ids, prompt.digest, maps)
        if progress is not None:
            progress(len(prompts), len(prompts))
    return store
