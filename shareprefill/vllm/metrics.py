"""Counters beside vLLM's own.

They live in the workers. A server whose environment has `PROMETHEUS_MULTIPROC_DIR` (an empty
folder) shows them at `/metrics` beside vLLM's; `ReportExtension` gives a worker's report anywhere.
"""

# vLLM lives in an environment of its own: it is not there where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

from functools import cache
from typing import Any

from prometheus_client import Counter


@cache
def _counters() -> tuple[Counter, Counter]:
    labels = ("kind", "name")
    what = "Rows of a step with at least a block of query rows, sparse by policy, dense by reason"
    return (
        Counter("shareprefill_rows", what, labels),
        Counter("shareprefill_tokens", f"Query rows. {what}", labels),
    )


def count(kind: str, name: str, tokens: int) -> None:
    """Books one row.

    Args:
        kind: `sparse` or `dense`.
        name: Its policy, or why it is dense.
        tokens: Its query rows.
    """
    rows, query_rows = _counters()
    rows.labels(kind, name).inc()
    query_rows.labels(kind, name).inc(tokens)


class ReportExtension:
    """For `--worker-extension-cls shareprefill.vllm.metrics.ReportExtension`."""

    # Of the worker that this extends.
    vllm_config: Any

    def shareprefill_report(self, reset: bool = False) -> dict[str, Any]:
        """A worker's report, by `LLM.collective_rpc("shareprefill_report")`; waits for the device.

        Args:
            reset: Also forgets what it says.

        Raises:
            UnsupportedError: the engine runs without shareprefill.
        """
        from shareprefill.errors import UnsupportedError
        from shareprefill.vllm.engine import core_of

        core = core_of(self.vllm_config)
        if core is None:
            raise UnsupportedError("this engine runs without shareprefill: there is no report")
        report = core.report()
        if reset:
            core.reset()
        return report
