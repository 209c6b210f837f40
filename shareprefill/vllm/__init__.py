"""Sparse prefills inside an unpatched vLLM, as an attention backend from outside."""

# vLLM lives in an environment of its own: it is not there where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

import os

from shareprefill.vllm.options import (
    ARTIFACT_VARIABLE,
    INNER_VARIABLE,
    POLICY_VARIABLE,
    SWITCH_VARIABLE,
)

# Versions that the plug-in was written for, [first, first that is not].
VERSIONS = ((0, 24), (0, 34))
_BACKENDS = {
    "CPU_ATTN": "shareprefill.vllm.cpu.SharePrefillCPUBackend",
    "FLASH_ATTN": "shareprefill.vllm.flash.SharePrefillFlashBackend",
    "TRITON_ATTN": "shareprefill.vllm.triton.SharePrefillTritonBackend",
}


def inner_backend() -> str:
    """vLLM's name of the backend under ours: what computes all that is dense.

    Raises:
        ConfigError: `SHAREPREFILL_INNER_BACKEND` names no backend.
    """
    from vllm.platforms import current_platform

    from shareprefill.errors import ConfigError

    inner = os.environ.get(
        INNER_VARIABLE, "CPU_ATTN" if current_platform.is_cpu() else "FLASH_ATTN"
    )
    if inner not in _BACKENDS:
        raise ConfigError(
            f"{INNER_VARIABLE} = {inner!r} is not allowed: it must be one of {', '.join(_BACKENDS)}"
        )
    return inner


def register() -> None:
    """Entry point of `vllm.general_plugins`, which every process of an engine calls, maybe twice.

    Registers a class's path under vLLM's name CUSTOM; imports neither the backend nor a kernel. On
    a CPU vLLM passes over CUSTOM, so its own name is taken there: without options the backend under
    it is the inner one. Where the environment asks for us, the inner backend's own name is taken on
    a GPU, too, so that no further option is needed.

    Raises:
        ConfigError: `SHAREPREFILL_INNER_BACKEND` names no backend.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    inner = inner_backend()
    register_backend(AttentionBackendEnum.CUSTOM, _BACKENDS[inner])
    # An engine with the switch turned off makes no `RequestSwitch`, which would find that another
    # backend was chosen: it is to need no choice.
    is_asked = any(
        os.environ.get(name) for name in (ARTIFACT_VARIABLE, POLICY_VARIABLE, SWITCH_VARIABLE)
    )
    if current_platform.is_cpu() or is_asked:
        register_backend(AttentionBackendEnum[inner], _BACKENDS[inner])
