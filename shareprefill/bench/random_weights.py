"""Random weights of an engine that was started without any, on the scale of fresh models."""

# vLLM lives in an environment of its own: it is not there where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import torch

from shareprefill.vllm.report import ReportExtension

# What transformers' models of these shapes are initialised with.
_DEVIATION = 0.02


class RandomWeights(ReportExtension):
    """A worker's report, and weights by which attention is not exactly even.

    vLLM's own random weights are so small, those of norms too, that every key gets the same weight.
    Then a pattern reads every block of some rows and none of the others, which no model does.
    """

    # Of the worker that this extends.
    get_model: Any

    @torch.no_grad()
    def shareprefill_randomize(self) -> None:
        """Gives what queries and keys are made of the scale that it has in fresh models."""
        for name, weight in self.get_model().named_parameters():
            if name.endswith("norm.weight"):
                weight.fill_(1)
            elif name.endswith(("embed_tokens.weight", "qkv_proj.weight")):
                weight.normal_(std=_DEVIATION)
