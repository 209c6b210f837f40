"""Tiny random models and artifacts for them, built in memory."""

from __future__ import annotations

from typing import Any

import torch

from shareprefill.artifact import Artifact, Policy, Rows, Thresholds
from shareprefill.models import fingerprint, geometry

BLOCK = 16


def tiny_llama(seed: int = 0, **options: Any) -> Any:
    """A random Llama of 3 layers, 4 query heads and 2 KV heads, in float32.

    Its logits are scaled up so that attention has structure: some blocks hold most of the mass.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    defaults = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "initializer_range": 0.3,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **options})).eval()


def tiny_artifact(
    model: Any, policies: list[list[Policy]] | None = None, **changes: Any
) -> Artifact:
    """An artifact for a model: per layer the heads' policies, all sampled by default.

    Sharing heads share the last pivot before them.
    """
    sizes = geometry(model)
    shape = (sizes.layers, sizes.heads)
    rows = policies or [[Policy.SAMPLED] * sizes.heads] * sizes.layers
    pivot = torch.full(shape, -1, dtype=torch.int32)
    current = -1
    # A pivot may come after its sharers within a layer, so pivots of a layer are found first.
    for layer, row in enumerate(rows):
        for head, policy in enumerate(row):
            if policy is Policy.PIVOT:
                current = layer * sizes.heads + head
                pivot[layer, head] = current
        for head, policy in enumerate(row):
            if policy is Policy.SHARE:
                pivot[layer, head] = current
    policy = torch.tensor([[int(p) for p in row] for row in rows], dtype=torch.int8)
    fallback = torch.where(policy == Policy.SHARE, int(Policy.SMOOTHED), policy).to(torch.int8)
    fields: dict[str, Any] = {
        "model": "tiny",
        "fingerprint": fingerprint(model),
        "cluster": torch.zeros(shape, dtype=torch.int32),
        "policy": policy,
        "pivot": pivot,
        "fallback": fallback,
        "gamma": torch.full(shape, 0.9),
        "fallback_gamma": torch.full(shape, 0.9),
        "slack": torch.full(shape, 0.04),
        "recall": torch.full(shape, 0.95),
        "density": torch.full(shape, 0.3),
        "instability": torch.zeros(shape),
        "code": torch.zeros(*shape, 8),
        "block_size": BLOCK,
        "thresholds": Thresholds(gamma=0.9, tau=0.2, delta=0.3),
        "rows": Rows(pivot=4, sample=8, check=1),
        "configuration": {},
        "summary": {},
    }
    return Artifact(**{**fields, **changes})


def token_ids(*shape: int, vocabulary: int = 128) -> torch.Tensor:
    """Random ordinary tokens (no special ones)."""
    return torch.randint(3, vocabulary, shape)
