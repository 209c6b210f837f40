"""The backend over vLLM's CPU kernels."""

# vLLM lives in an environment of its own: it is not there where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from shareprefill.vllm.backend import SharePrefillBuilder, SharePrefillImpl
from shareprefill.vllm.pages import gather_ordered, ordered_pages, page_order


class CPUBuilder(SharePrefillBuilder, CPUAttentionMetadataBuilder):
    """Finds sparse rows; else vLLM's builder."""


class CPUImpl(SharePrefillImpl, CPUAttentionBackendImpl):
    """Computes sparse rows; else vLLM's implementation."""

    def keys_and_values(
        self, layer: Any, kv_cache: Tensor, table: Tensor, n_key: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of a request out of its pages, as the instruction set laid them out."""
        return gather_ordered(kv_cache, table, n_key, self._orders(layer, kv_cache))

    def pages(self, layer: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole cache, as the instruction set laid them out."""
        return ordered_pages(kv_cache, self._orders(layer, kv_cache))

    def _orders(self, layer: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        # 0.24 keeps the instruction set in the implementation, newer versions in the layer.
        kind = layer.isa if hasattr(layer, "isa") else self.isa
        _, _, size, width = kv_cache.shape
        return _page_orders(kind, size, width // 2, kv_cache.dtype)


class SharePrefillCPUBackend(CPUAttentionBackend):
    """vLLM's CPU backend, with long prefills taken out of it; its name stays the inner one's."""

    is_of_shareprefill = True

    @staticmethod
    def get_impl_cls() -> type[CPUImpl]:
        """The implementation."""
        return CPUImpl

    @staticmethod
    def get_builder_cls() -> type[CPUBuilder]:
        """The metadata builder."""
        return CPUBuilder


@lru_cache(maxsize=8)
def _page_orders(kind: str, size: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """How a page holds keys and values under an instruction set: one is written and looked at."""
    place = torch.arange(size, dtype=torch.float32, device="cpu")[:, None].expand(size, dim)
    column = torch.arange(dim, dtype=torch.float32, device="cpu").expand(size, dim)
    found = []
    for numbers in (place, column):
        page = torch.zeros(1, 1, 2 * size, dim, dtype=dtype, device="cpu")
        keys, values = page.chunk(2, dim=2)
        rows = numbers.to(dtype)[:, None].contiguous()
        slots = torch.arange(size, dtype=torch.int64, device="cpu")
        ops.cpu_attn_reshape_and_cache(rows, rows, keys, values, slots, kind)
        found.append(page.view(2, size * dim))
    return page_order(found[0][0], found[1][0]), page_order(found[0][1], found[1][1])
