"""lm-evaluation-harness under a policy: any of its tasks, on a model whose prefill is sparse."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shareprefill.artifact import Artifact
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ConfigError, UnsupportedError
from shareprefill.runtime.session import share_prefill
from shareprefill.tokens import without_end

if TYPE_CHECKING:
    from torch import Tensor


def harness_model(
    model: Any,
    tokenizer: Any,
    artifact: str | Path | Artifact | None,
    config: RuntimeConfig | None = None,
    **options: Any,
) -> Any:
    """A model for lm-evaluation-harness whose prefills run under a session.

    ::

        lm = harness_model(model, tokenizer, "clusters.st", RuntimeConfig(policy="auto"))
        lm_eval.simple_evaluate(model=lm, tasks=["ruler"])
        print(lm.session.report().density)

    Both of the harness's ways to a model are covered: log likelihoods of given continuations, and
    generation. Requests run one at a time, since the harness pads log-likelihood requests at the
    right without a mask, and patterns would be chosen on the padding too.

    Args:
        model: A transformers decoder, in eval mode.
        tokenizer: Its tokenizer.
        artifact: Path of an artifact, or a loaded one; None for a policy that plans nothing.
        config: Options of the session. Prompts below the crossover run dense, as everywhere:
            `min_tokens=0` makes all of them sparse.
        options: Further arguments of the harness's `HFLM`, `max_length` for one.

    Returns:
        An `lm_eval.models.huggingface.HFLM`; its `session` counts what was done.

    Raises:
        ArtifactError: the artifact cannot be read, or is of another model.
        ConfigError: `batch_size` is another than 1.
        UnsupportedError: lm-evaluation-harness is not installed, or the model is not supported.
    """
    if options.setdefault("batch_size", 1) != 1:
        raise ConfigError(
            f"batch_size = {options['batch_size']!r} is not allowed: it must be 1, since the "
            "harness pads batches without a mask"
        )
    try:
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UnsupportedError(
            f"lm-evaluation-harness cannot be imported ({error}): install it with "
            "pip install 'shareprefill[lm-eval]'"
        ) from error
    session = share_prefill(model, artifact, config)

    class SharedPrefillLM(HFLM):
        """An HFLM that enters the session around each of its model's calls, and ends no prompt."""

        def tok_encode(self, string: str, *arguments: Any, **options: Any) -> list[int]:
            ids = super().tok_encode(string, *arguments, **options)
            return without_end(tokenizer, string, ids)

        def tok_batch_encode(
            self, strings: list[str], *arguments: Any, **options: Any
        ) -> tuple[Tensor, Tensor]:
            ids, mask = super().tok_batch_encode(strings, *arguments, **options)
            kept = len(without_end(tokenizer, strings[0], ids[0].tolist()))
            return ids[:, :kept], mask[:, :kept]

        def _model_call(self, *arguments: Any, **call: Any) -> Tensor:
            with session:
                return super()._model_call(*arguments, **call)

        def _model_generate(self, *arguments: Any, **call: Any) -> Tensor:
            with session:
                return super()._model_generate(*arguments, **call)

    lm = SharedPrefillLM(pretrained=model, tokenizer=tokenizer, **options)
    lm.session = session
    return lm
