"""One prompt answered under an artifact, and beside it under dense attention."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from shareprefill.artifact import Artifact, model_to_load
from shareprefill.config import RuntimeConfig
from shareprefill.models import load_model, load_tokenizer, max_length
from shareprefill.runtime.generation import (
    Generation,
    check_positions,
    encode_prompt,
    generate,
    relative_error,
    warm_up,
)
from shareprefill.runtime.session import SessionReport, share_prefill

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What `answer` found.

    Attributes:
        generation: The continuation with shared sparse attention.
        report: What the session did.
        dense: The continuation with dense attention, where it was asked for.
    """

    generation: Generation
    report: SessionReport
    dense: Generation | None

    @property
    def speedup(self) -> float | None:
        """Dense time to first token over ours."""
        return None if self.dense is None else self.dense.ttft_s / self.generation.ttft_s

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
    artifact: Artifact,
    prompt: str,
    config: RuntimeConfig,
    *,
    model: str | None = None,
    max_new_tokens: int = 64,
    compare_dense: bool = False,
    measure_recall: bool = False,
    prefill_chunk: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Loads a model and continues a prompt greedily under its artifact.

    Args:
        artifact: Names the model and says what its heads do.
        prompt: The text to continue, taken as it is (no chat template).
        config: Options of the session.
        model: The model to load, None for the artifact's if that is built in.
        max_new_tokens: Tokens at most.
        compare_dense: Run dense attention on the same prompt afterwards.
        measure_recall: Measure the recall of the patterns; the timings then include it.
        prefill_chunk: Tokens of the prompt at a time; 0 for all at once, None for as many as memory
            allows.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        trust_remote_code: Run the model repository's own code.
        on_text: Called with each new piece of text.

    Raises:
        ShareprefillError: prompt, artifact or model cannot be used; see `share_prefill`,
            `load_model`.
    """
    name = model_to_load(artifact, model)
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
    session = share_prefill(network, artifact, config, measure_recall=measure_recall)
    warm_up(network, input_ids)
    with session:
        generation = generate(
            network,
            tokenizer,
            input_ids,
            max_new_tokens=max_new_tokens,
            prefill_chunk=prefill_chunk,
            on_text=on_text,
        )
    dense = None
    if compare_dense:
        dense = generate(
            network,
            tokenizer,
            input_ids,
            max_new_tokens=max_new_tokens,
            prefill_chunk=prefill_chunk,
        )
    return Answer(generation, session.report(), dense)
