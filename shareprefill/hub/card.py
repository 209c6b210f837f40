"""The model card of an artifact: its own facts, and nothing else."""

from __future__ import annotations

import json
import re

import torch

from shareprefill.artifact import FORMAT_VERSION, Artifact, Policy
from shareprefill.files import printable
from shareprefill.models import BUILT_IN
from shareprefill.version import __version__

# What a model's name must look like to be called the base model: a local path is nobody's else.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_TAGS = ("shareprefill", "sparse-attention", "prefill", "long-context")
_RUNS = re.compile(r"`+")


def model_card(artifact: Artifact, file: str, repository: str) -> str:
    """The text of `README.md` for an artifact.

    What stands in the artifact may be anybody's: names and texts are shown as code, so that they
    are neither YAML nor Markdown nor HTML.

    Args:
        artifact: What it describes.
        file: The artifact's name in the repository.
        repository: The repository's id.
    """
    model = artifact.model
    head = ["---", "library_name: shareprefill", "tags:", *(f"- {tag}" for tag in _TAGS)]
    if _HUB_ID.fullmatch(model):
        # JSON's strings are YAML's.
        head.append(f"base_model: {json.dumps(model)}")
    named = model if _HUB_ID.fullmatch(model) or model in BUILT_IN else "MODEL"
    facts = json.dumps(
        {"configuration": artifact.configuration, "summary": artifact.summary},
        indent=1,
        sort_keys=True,
    )
    return "\n".join(
        [
            *head,
            "---",
            "",
            f"# Attention patterns for {code(model)}",
            "",
            f"An artifact of shareprefill (file format {FORMAT_VERSION}, pushed by version "
            f"{__version__}): for every attention head of one model, the policy by which its "
            "prefill of long prompts is made sparse. It holds no weights and no code. It fits the "
            "model with the attention weights of the hash below, and no other.",
            "",
            *_table(("", ""), _model_rows(artifact)),
            "",
            "## Heads by policy",
            "",
            "Recall is the attention mass inside the patterns, density the share of causal blocks "
            "that are computed, both expected from the calibration's held-out prompts: measure "
            "yours.",
            "",
            *_table(("policy", "heads", "recall", "density"), _policy_rows(artifact)),
            "",
            "## Use",
            "",
            *_fenced(
                f"sp pull {repository} --file {file} --out {file}\n"
                f"sp run --artifact {file} --model {named} prompt.txt",
                "sh",
            ),
            "",
            "## How it was made",
            "",
            *_fenced(facts, "json"),
            "",
        ]
    )


def code(value: object) -> str:
    """A text as a Markdown code span on one line, whatever is in it."""
    text = printable(value, 512)
    fence = "`" * (_longest_run(text) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _model_rows(artifact: Artifact) -> list[tuple[str, ...]]:
    sizes, thresholds = artifact.fingerprint.geometry, artifact.thresholds
    return [
        ("model, as its maker named it", code(artifact.model)),
        ("architecture", code(artifact.fingerprint.model_type)),
        (
            "attention",
            f"{sizes.layers} layers, {sizes.heads} heads, {sizes.kv_heads} KV heads, head_dim "
            f"{sizes.head_dim}",
        ),
        ("hash of the attention weights", code(artifact.fingerprint.weights)),
        ("tokens a block", str(artifact.block_size)),
        (
            "thresholds",
            f"gamma {thresholds.gamma:g}, tau {thresholds.tau:g}, delta {thresholds.delta:g}",
        ),
        ("expected density, mean of all heads", f"{artifact.expected('density'):.4f}"),
        ("expected recall, mean of all heads", f"{artifact.expected('recall'):.4f}"),
    ]


def _policy_rows(artifact: Artifact) -> list[tuple[str, ...]]:
    rows, measured = list[tuple[str, ...]](), (artifact.recall, artifact.density)
    for policy in Policy:
        chosen: torch.Tensor = artifact.policy == policy
        if chosen.any():
            means = [values[chosen].double().nanmean() for values in measured]
            # Heads of layers that were not captured are dense, and may be the only ones.
            cells = ["not measured" if mean.isnan() else f"{mean.item():.4f}" for mean in means]
            rows.append((policy.label, str(int(chosen.sum())), *cells))
    return rows


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = (headings, ("---",) * len(headings), *rows)
    return ["| " + " | ".join(map(_cell, cells)) + " |" for cells in lines]


def _cell(text: str) -> str:
    # A cell ends at a bar, even inside code.
    return text.replace("|", "\\|")


def _fenced(text: str, language: str) -> list[str]:
    fence = "`" * max(3, _longest_run(text) + 1)
    return [fence + language, text, fence]


def _longest_run(text: str) -> int:
    return max(map(len, _RUNS.findall(text)), default=0)
