"""The backend over vLLM's Triton kernels."""

# vLLM lives in an environment of its own: it is not there where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from shareprefill.vllm.backend import (
    SharePrefillBackend,
    SharePrefillBuilder,
    SharePrefillImpl,
)


class TritonBuilder(SharePrefillBuilder, TritonAttentionMetadataBuilder):
    """Finds sparse rows; else vLLM's builder."""


class TritonImpl(SharePrefillImpl, TritonAttentionImpl):
    """Computes sparse rows; else vLLM's implementation."""


class SharePrefillTritonBackend(SharePrefillBackend, TritonAttentionBackend):
    """vLLM's backend, with long prefills taken out of it; its name stays the inner one's."""

    is_of_shareprefill = True

    @staticmethod
    def get_impl_cls() -> type[TritonImpl]:
        """The implementation."""
        return TritonImpl

    @staticmethod
    def get_builder_cls() -> type[TritonBuilder]:
        """The metadata builder."""
        return TritonBuilder
