"""The errors a user can cause; the command line turns each into one line on stderr."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ShareprefillError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(ShareprefillError, ValueError):
    """An option has a value outside its range, or options contradict one another."""


class DataError(ShareprefillError):
    """Calibration data, prompts or stored maps cannot be used."""


class ModelError(ShareprefillError):
    """A model or its tokenizer cannot be found, loaded or used."""


class ArtifactError(ShareprefillError):
    """An artifact is damaged, inconsistent, of a newer format, or of another model."""


class UnsupportedError(ShareprefillError):
    """The request is sound, but this build, device or model family cannot serve it."""


def not_finite(consequence: str) -> ModelError:
    """Of predictions that are NaN or infinite, and what follows from that."""
    return ModelError(
        f"the model's predictions are not finite, so {consequence}: choose a --dtype of a wider "
        "range, or check the model's weights"
    )


def require(holds: bool, name: str, value: object, allowed: str) -> None:
    """Checks an option.

    Raises:
        ConfigError: it does not hold; names the option, its value and what is allowed.
    """
    if not holds:
        raise ConfigError(f"{name} = {value!r} is not allowed: it must be {allowed}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for an error about an unknown word, empty where no known one is near.

    >>> did_you_mean("flux", ["flex", "oracle"])
    " (did you mean 'flex'?)"
    """
    near = get_close_matches(word, [*known], n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
