"""The models that a user has named here: those that were calibrated under `artifacts/`."""

from __future__ import annotations

from pathlib import Path


def known_models(root: Path) -> set[str]:
    """Names of models that `sp calibrate` was given, of the calibrations under `root`.

    What cannot be read names none.
    """
    from shareprefill.calib.store import INDEX, MapStore
    from shareprefill.errors import DataError

    found = set()
    for path in root.glob(f"*/calibration/{INDEX}"):
        try:
            found.add(MapStore.open(path.parent).config.model)
        except DataError:
            continue
    return found
