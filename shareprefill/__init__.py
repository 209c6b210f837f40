"""Shared sparse attention patterns for the prefill of long prompts.

    from shareprefill import calibrate, cluster, share_prefill

    folder = calibrate("sp-tiny", samples=4, length=1024, out="calibration")
    artifact = cluster(folder, out="clusters.st")
    with share_prefill(model, artifact) as session:
        model.generate(**inputs)
    print(session.report())

Importing the package has no effects and loads neither torch nor transformers: each name is
resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shareprefill.version import __version__

if TYPE_CHECKING:
    from shareprefill import errors, policies, testing
    from shareprefill.artifact import Artifact, load_artifact, save_artifact
    from shareprefill.config import RuntimeConfig
    from shareprefill.library import calibrate, cluster, evaluate
    from shareprefill.runtime.session import share_prefill

__all__ = [
    "Artifact",
    "RuntimeConfig",
    "__version__",
    "calibrate",
    "cluster",
    "errors",
    "evaluate",
    "load_artifact",
    "policies",
    "save_artifact",
    "share_prefill",
    "testing",
]

# Name -> the module that has it.
_PLACES = {
    "Artifact": "artifact",
    "RuntimeConfig": "config",
    "calibrate": "library",
    "cluster": "library",
    "evaluate": "library",
    "load_artifact": "artifact",
    "save_artifact": "artifact",
    "share_prefill": "runtime.session",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
