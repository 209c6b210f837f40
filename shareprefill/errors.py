"""The errors a user can cause; the command line turns each into one line on stderr."""


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
