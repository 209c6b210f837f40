"""A worker's report, on request."""

# vLLM lives in an environment of its own: it is not there where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

from shareprefill.errors import UnsupportedError
from shareprefill.vllm.engine import core_of


class ReportExtension:
    """For `--worker-extension-cls shareprefill.vllm.report.ReportExtension`."""

    # Of the worker that this extends.
    vllm_config: Any

    def shareprefill_report(self, reset: bool = False) -> dict[str, Any]:
        """A worker's report, by `LLM.collective_rpc("shareprefill_report")`; waits for the device.

        Args:
            reset: Also forgets what it says.

        Raises:
            UnsupportedError: the engine runs without shareprefill.
        """
        core = core_of(self.vllm_config)
        if core is None:
            raise UnsupportedError("this engine runs without shareprefill: there is no report")
        report = core.report()
        if reset:
            core.reset()
        return report
