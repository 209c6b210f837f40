"""One prompt answered under an artifact, and beside it under dense attention."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from shareprefill.artifact import Artifact, model_to_load
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ConfigError
from shareprefill.models import load_model, load_tokenizer, max_length
from shareprefill.policy_names import require_no_plan
from shareprefill.runtime.fidelity import Fidelity, compare_predictions, final_states
from shareprefill.runtime.generation import (
    Generation,
    check_positions,
    encode_prompt,
    follow,
    generate,
    prefill,
    relative_error,
    warm_up,
)
from shareprefill.runtime.plan import require_read
from shareprefill.runtime.policies import require_policy
from shareprefill.runtime.records import Sketch
from shareprefill.runtime.session import SessionReport, share_prefill
from shareprefill.tokens import Messages

logger = logging.getLogger(__name__)


# Timed prefills of each attention: one of both that answers, and more in turns.
_REPEATS = 3


@dataclass(frozen=True)
class Answer:
    """What `answer` found.

    Attributes:
        generation: The continuation with shared sparse attention.
        report: What the session did.
        dense: The continuation with dense attention, where it was asked for.
        seconds: To the first token: of the answer, and of more prefills in turns with dense ones.
        dense_seconds: The same of dense attention; empty where it was not asked for.
        fidelity: Predictions at every position against dense attention's, where asked for.
        steps: With sparse decode steps, predictions of those that follow dense attention's answer,
            against its own, where asked for.
        recalls: Of every head that has a pattern; None where not asked for.
        measured: Of the prefill that measured recall; None where not asked for.
        sketches: Its maps and patterns by layer, where asked for.
        device: Where the model reads its prompt.
        least_tokens: Tokens from which on a prompt is computed sparsely there.
        weights_distance: Relative distance of the model's attention weights from those that the
            artifact was made for, in the worst layer; 0 where they are equal.
    """

    generation: Generation
    report: SessionReport
    dense: Generation | None = None
    seconds: tuple[float, ...] = ()
    dense_seconds: tuple[float, ...] = ()
    fidelity: Fidelity | None = None
    steps: Fidelity | None = None
    recalls: tuple[float, ...] | None = None
    measured: SessionReport | None = None
    sketches: dict[int, Sketch] | None = None
    device: str = "cpu"
    least_tokens: int = 0
    weights_distance: float = 0.0

    @property
    def speedup(self) -> float | None:
        """Median dense time to first token over ours; None where nothing was sparse."""
        if not self.dense_seconds or self.report.density == 1:
            return None
        return median(self.dense_seconds) / median(self.seconds)

    @property
    def hidden_error(self) -> float | None:
        """Relative error of the last hidden state of the prompt's last token."""
        if self.dense is None:
            return None
        return relative_error(self.generation.hidden, self.dense.hidden)

    @property
    def same_answer(self) -> bool | None:
        """Whether both texts are equal."""
        return None if self.dense is None else self.generation.text == self.dense.text


def answer(
    artifact: Artifact | None,
    prompt: str | Messages,
    config: RuntimeConfig,
    *,
    model: str | None = None,
    max_new_tokens: int = 64,
    compare_dense: bool = False,
    measure_recall: bool = False,
    keep_maps: bool = False,
    prefill_chunk: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    on_text: Callable[[str], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> Answer:
    """Loads a model and continues a prompt greedily under its artifact.

    Args:
        artifact: Names the model and says what its heads do; None for a policy that plans nothing.
        prompt: The text to continue, taken as it is; or messages, by the model's chat template.
        config: Options of the session.
        model: The model to load, None for the artifact's if that is built in. It must be given
            where there is no artifact.
        max_new_tokens: Tokens at most.
        compare_dense: Run dense attention on the same prompt afterwards, compare the predictions at
            every position, and time both in turns.
        measure_recall: Measure the recall of the patterns, in a prefill of its own.
        keep_maps: Measure it, and keep that prefill's maps and patterns.
        prefill_chunk: Tokens of the prompt at a time; 0 for all at once, None for as many as memory
            allows.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        trust_remote_code: Run the model repository's own code.
        on_text: Called with each new piece of text, and with a line's end after the last.
        on_stage: Called with what begins and takes a while: "loading the model", ...

    Raises:
        ShareprefillError: prompt, artifact or model cannot be used; see `share_prefill`,
            `load_model`.
    """
    require_policy(config.policy)
    if artifact is not None:
        require_read(artifact, config)
    begin = on_stage or _nothing
    begin("loading the model")
    name = _model_of(artifact, model, config, trust_remote_code)
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    network = load_model(name, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    input_ids = encode_prompt(network, tokenizer, prompt)
    check_positions(network, len(input_ids), max_new_tokens)
    longest, needed = max_length(network), len(input_ids) + max_new_tokens - 1
    if longest is not None and needed > longest:
        logger.warning(
            "prompt and new tokens are %d, beyond the %d that the model was made for: "
            "what comes after them may be worse",
            *(needed, longest),
        )
    measured = None if artifact is None else artifact.measured_tokens
    # Generated prompts come close to their length.
    if artifact is None or measured is None:
        known = len(input_ids)
    else:
        known = measured + artifact.block_size
    if config.policy == "auto" and len(input_ids) > known:
        logger.warning(
            "the prompt has %d tokens, and the artifact was measured on prompts of %d at most: how "
            "much attention its patterns cover of longer ones is not known; --recall measures it, "
            "and sp calibrate --length makes an artifact of longer prompts",
            *(len(input_ids), measured),
        )
    session = share_prefill(network, artifact, config)
    begin(f"reading {len(input_ids)} tokens")
    warm_up(network, input_ids)

    def generation(told: Callable[[str], None] | None) -> tuple[Generation, Tensor | None]:
        options = {"max_new_tokens": max_new_tokens, "prefill_chunk": prefill_chunk}
        if not compare_dense:
            return generate(network, tokenizer, input_ids, on_text=told, **options), None
        with final_states(network) as states:
            found = generate(network, tokenizer, input_ids, on_text=told, **options)
        # Off the device, where those of a long prompt would stand in the other's way.
        return found, states().cpu()

    with session:
        if network.device.type == "cuda":
            session.warm_up()
        ours, states = generation(on_text)
    if on_text is not None:
        on_text("\n")
    report = session.report()
    where = str(network.get_input_embeddings().weight.device)
    recalls, measured, sketches = None, None, None
    if measure_recall or keep_maps:
        begin("measuring recall")
        # In a prefill of its own, so that no time includes it.
        measuring = share_prefill(
            network, artifact, config, measure_recall=True, keep_maps=keep_maps
        )
        with measuring:
            prefill(network, input_ids, prefill_chunk)
        measured, sketches = measuring.report(), measuring.sketches()
        recalls = tuple(value for layer in measured.layers for value in layer.recall or ())
    if not compare_dense:
        return Answer(
            ours,
            report,
            seconds=(ours.ttft_s,),
            recalls=recalls,
            measured=measured,
            sketches=sketches,
            device=where,
            least_tokens=session.least_tokens(torch.device(where)),
            weights_distance=session.weights_distance,
        )
    begin("running dense attention")
    dense, dense_states = generation(None)
    assert states is not None
    assert dense_states is not None
    seconds, dense_seconds = [ours.ttft_s], [dense.ttft_s]
    # In turns, so that whatever else the device does slows both.
    for number in range(2, _REPEATS + 1 if report.density < 1 else 0):
        begin(f"timing sparse and dense attention, {number} of {_REPEATS}")
        with session:
            seconds.append(_time_prefill(network, input_ids, prefill_chunk))
        dense_seconds.append(_time_prefill(network, input_ids, prefill_chunk))
    tokens = len(input_ids)
    fidelity = compare_predictions(network, dense_states[:tokens], states[:tokens])
    steps = None
    if config.decode == "sparse" and dense.new_tokens > 1:
        begin("following the dense answer")
        read = torch.tensor(dense.tokens[:-1], dtype=torch.int64, device="cpu")
        with session, final_states(network) as followed:
            follow(network, input_ids, read, prefill_chunk)
        steps = compare_predictions(network, dense_states[tokens:], followed()[tokens:])
    return Answer(
        generation=ours,
        report=report,
        dense=dense,
        seconds=tuple(seconds),
        dense_seconds=tuple(dense_seconds),
        fidelity=fidelity,
        steps=steps,
        recalls=recalls,
        measured=measured,
        sketches=sketches,
        device=where,
        least_tokens=session.least_tokens(torch.device(where)),
        weights_distance=session.weights_distance,
    )


def _nothing(stage: str) -> None:
    """Where nobody asks what is done."""


def _model_of(
    artifact: Artifact | None, given: str | None, config: RuntimeConfig, trust_remote_code: bool
) -> str:
    if artifact is not None:
        return model_to_load(artifact, given, trust_remote_code=trust_remote_code)
    require_no_plan(config.policy)
    if given is None:
        raise ConfigError("without an artifact the model must be named")
    return given


def _time_prefill(model: Any, input_ids: Tensor, chunk: int | None) -> float:
    start = time.perf_counter()
    int(prefill(model, input_ids, chunk).logits[0, -1].argmax())  # waits for the device
    return time.perf_counter() - start
