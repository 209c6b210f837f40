"""Writes docs/models.md: what a session does with each family of the installed transformers."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers

from tests.support.sweep import DOCUMENT, document, every_family, measure


def main() -> None:
    """Measures the families that are named, or all of them; writes the document of all."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    named = set(sys.argv[1:])
    rows = []
    for family in every_family():
        if named and family.name not in named:
            continue
        rows.append(measure(family))
        print(rows[-1].line, flush=True)
    wrong = [row.family for row in rows if row.is_wrong]
    if wrong:
        sys.exit(f"a session changes the results of {', '.join(wrong)}: no document is written")
    if not named:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
        DOCUMENT.write_text(document(rows, f"commit {commit}, {versions}, CPU"), encoding="utf-8")
        print(f"wrote {DOCUMENT.name}")


if __name__ == "__main__":
    main()
