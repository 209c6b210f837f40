"""The backend over vLLM's FlashAttention kernels."""

# vLLM lives in an environment of its own: it is not there where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from shareprefill.vllm.backend import (
    SharePrefillBackend,
    SharePrefillBuilder,
    SharePrefillImpl,
)


class FlashBuilder(SharePrefillBuilder, FlashAttentionMetadataBuilder):
    """Finds sparse rows; else vLLM's builder."""


class FlashImpl(SharePrefillImpl, FlashAttentionImpl):
    """Computes sparse rows; else vLLM's implementation."""


class SharePrefillFlashBackend(SharePrefillBackend, FlashAttentionBackend):
    """vLLM's backend, with long prefills taken out of it; its name stays the inner one's."""

    is_of_shareprefill = True

    @staticmethod
    def get_impl_cls() -> type[FlashImpl]:
        """The implementation."""
        return FlashImpl

    @staticmethod
    def get_builder_cls() -> type[FlashBuilder]:
        """The metadata builder."""
        return FlashBuilder
