"""Artifacts and calibrations made up in memory: heads of a few families, no model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from shareprefill.artifact import Artifact, Policy, Rows, Thresholds
from shareprefill.autoencoder.pipeline import train
from shareprefill.calib.capture import FULL, LINES, SLASH, VERTICAL, PromptMaps, rows_key
from shareprefill.calib.effect import (
    CHANGE,
    DIVERGENCE,
    FP8_ERROR,
    LOST,
    STEP_CHANGE,
    STEP_LOST,
)
from shareprefill.calib.lines import line_products
from shareprefill.calib.store import MapStore
from shareprefill.clustering.pipeline import cluster
from shareprefill.config import CalibrateConfig, ClusterConfig, TrainConfig
from shareprefill.models import Fingerprint, ModelGeometry

BLOCK = 32
_BLOCKS = 12
_PROMPTS = 6
_SOURCES = ("retr_kv", "text")


def made_up_fingerprint(layers: int, heads: int, weights: str = "ab") -> Fingerprint:
    """Of a model that is nowhere."""
    return Fingerprint("llama", ModelGeometry(layers, heads, 1, 16), weights * 32)


def made_up_artifact(layers: int, heads: int, *, families: int = 3, **changes: Any) -> Artifact:
    """Heads of a few families, one cluster each; the first head of a family is its pivot."""
    generator = torch.Generator().manual_seed(7 * layers + heads)
    shape, count = (layers, heads), layers * heads
    family = torch.arange(count) % families
    centres = torch.randn(families, 8, generator=generator)
    code = centres[family] + 0.1 * torch.randn(count, 8, generator=generator)
    policy = torch.full((count,), int(Policy.SHARE))
    policy[:families] = int(Policy.PIVOT)
    policy[families::7] = int(Policy.SAMPLED)
    policy[families + 1 :: 11] = int(Policy.DENSE)
    shares = (policy == int(Policy.SHARE)) | (policy == int(Policy.PIVOT))
    fallback = torch.where(policy == int(Policy.SHARE), int(Policy.SAMPLED), policy)
    fields: dict[str, Any] = {
        "model": "made-up",
        "fingerprint": made_up_fingerprint(layers, heads),
        "cluster": family.int().view(shape),
        "policy": policy.to(torch.int8).view(shape),
        "pivot": torch.where(shares, family, -1).int().view(shape),
        "fallback": fallback.to(torch.int8).view(shape),
        "gamma": torch.full(shape, 0.9),
        "fallback_gamma": torch.full(shape, 0.9),
        "slack": torch.full(shape, 0.04),
        "recall": 0.9 + 0.1 * torch.rand(shape, generator=generator),
        "density": torch.rand(shape, generator=generator),
        "instability": 0.5 * torch.rand(shape, generator=generator),
        "code": code.view(*shape, 8),
        "block_size": BLOCK,
        "thresholds": Thresholds(gamma=0.9, tau=0.2, delta=0.3),
        "rows": Rows(pivot=8, sample=8, check=2),
        "configuration": {"cluster": {"metric": "jaccard", "target_recall": 0.9}},
        "summary": {"cost": 0.5, "held_out_prompts": ["text"], "held_out_tokens": [384]},
    }
    return Artifact(**{**fields, **changes})


def made_up_calibration(
    folder: Path,
    layers: int = 4,
    heads: int = 5,
    *,
    captured: Sequence[int] | None = None,
    weights: str = "ab",
    seed: int = 0,
) -> Path:
    """A trained calibration of heads that look back, to the sink, or to the neighbours.

    Args:
        folder: Where it is written.
        layers: Of the model.
        heads: Of a layer.
        captured: Layers with full causal attention; None: all.
        weights: What the model's weights are told from others' by.
        seed: Of maps and training.
    """
    captured = range(layers) if captured is None else captured
    config = CalibrateConfig(
        model="made-up",
        data=_SOURCES,
        samples=_PROMPTS,
        length=_BLOCKS * BLOCK,
        block_size=BLOCK,
        seed=seed,
        rows=(2, 8, 16),
    )
    store = MapStore.begin(
        folder, config, made_up_fingerprint(layers, heads, weights), resume=False
    )
    generator = torch.Generator().manual_seed(seed)
    back = torch.arange(_BLOCKS)[:, None] - torch.arange(_BLOCKS)
    families = torch.stack([-1.0 * back, -0.1 * back + 4.0 * (back == 5), 3.0 * back.clamp(-1, 0)])
    families[2, :, 0] += 3.0
    own = families[torch.arange(len(captured) * heads) % 3]
    own = own + 0.3 * torch.randn(own.shape, generator=generator)
    for number in range(_PROMPTS):
        logits = own + 0.4 * torch.randn(len(own), 1, _BLOCKS, generator=generator)
        maps = logits.masked_fill(back < 0, -torch.inf).softmax(-1).half()
        maps = maps.view(len(captured), heads, _BLOCKS, _BLOCKS)
        tensors = {FULL: maps} | {rows_key(rows): maps.clone() for rows in config.rows}
        tensors[VERTICAL] = maps[:, :, -1].clone()
        tensors[SLASH] = torch.nn.functional.pad(maps[:, :, -1].flip(-1), (0, 1))
        exact = maps.flatten(0, 1).float()
        products = line_products(exact, exact, _BLOCKS * BLOCK, BLOCK)
        tensors[LINES] = torch.stack([products] * len(config.rows))
        of_heads = (CHANGE, LOST, STEP_CHANGE, STEP_LOST, FP8_ERROR)
        tensors |= {name: torch.full(maps.shape[:2], 0.01) for name in of_heads}
        tensors[DIVERGENCE] = torch.ones(1)
        ids = torch.zeros(_BLOCKS * BLOCK - 3, dtype=torch.int64)
        digest = hashlib.sha256(bytes([number])).hexdigest()
        source = _SOURCES[number % len(_SOURCES)]
        store.add(source, ids, digest, PromptMaps(tuple(captured), tensors))
    train(folder, TrainConfig(code_size=8, resolution=12, hidden=16, epochs=2, seed=seed))
    return folder


MEASURED = ("recall", "density", "instability", "effect", "step_effect", "fp8_error", "code")


def with_gaps(artifact: Artifact, *layers: int) -> Artifact:
    """The same artifact, of a model in which these layers were not captured."""
    changes: dict[str, Any] = {
        name: tensor.clone()
        for name, tensor in vars(artifact).items()
        if isinstance(tensor, torch.Tensor)
    }
    for name, tensor in changes.items():
        is_ids = name in {"cluster", "pivot"}
        if name in MEASURED or is_ids or name in {"policy", "fallback"}:
            tensor[[*layers]] = torch.nan if name in MEASURED else -1 if is_ids else 0
    return replace(artifact, **changes)


def clustered(folder: Path, k: int = 3, **options: Any) -> Artifact:
    """The artifact of a calibration."""
    return cluster(folder, ClusterConfig(k=k, target_recall=0.8, **options))[0]
