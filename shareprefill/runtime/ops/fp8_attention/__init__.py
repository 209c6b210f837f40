"""Block-sparse attention with operands of e4m3, in torch and for Hopper GPUs."""

from shareprefill.runtime.ops.fp8_attention.api import fp8_attention, refuse

__all__ = ["fp8_attention", "refuse"]
