"""What numbers belong to: device, versions, commit, command."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def provenance(device: str, commit: str | None = None) -> dict[str, object]:
    """Device, versions, commit and command, by name.

    Args:
        device: `cuda` or `cpu`.
        commit: The commit, where the sources are a copy without git's own files.
    """
    on_gpu = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "flash-attn-4": package_version("flash-attn-4"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "commit": commit or current_commit(),
        "command": shlex.join(["python", *sys.argv]),
    }


def summary(facts: dict[str, object]) -> str:
    """One sentence for docs/performance.md."""
    versions = [f"torch {facts['torch']}", f"triton {facts['triton']}"]
    if facts["flash-attn-4"] != "none":
        versions.append(f"flash-attn-4 {facts['flash-attn-4']}")
    if facts["cudnn"] is not None:
        versions.append(f"cuDNN {facts['cudnn']}")
    return (
        f"{facts['device']}, {', '.join(versions)}, commit `{facts['commit']}`:\n"
        f"`{facts['command']}`"
    )


def current_commit() -> str:
    """The checkout's commit, with "+ work tree" where files differ; "unknown" without git."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit} + work tree" if changed else commit


def _git(*arguments: str) -> str:
    found = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


def package_version(package: str) -> str:
    """Version of an installed package; "none" where it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
