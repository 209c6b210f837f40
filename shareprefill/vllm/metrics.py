"""Counters beside vLLM's own.

They live in the workers. A server whose environment has `PROMETHEUS_MULTIPROC_DIR` (an empty
folder) shows them at `/metrics` beside vLLM's.
"""

# vLLM lives in an environment of its own: it is not there where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

from functools import cache

from prometheus_client import Counter


@cache
def _counters() -> tuple[Counter, Counter]:
    labels = ("kind", "name")
    what = "Rows of a step with at least a block of query rows, sparse by policy, dense by reason"
    return (
        Counter("shareprefill_rows", what, labels),
        Counter("shareprefill_tokens", f"Query rows. {what}", labels),
    )


@cache
def _steps() -> Counter:
    what = "Decode steps of requests, where they may be sparse: sparse ones, dense ones by reason"
    return Counter("shareprefill_decode_steps", what, ("kind", "name"))


def count_steps(kind: str, name: str, steps: int) -> None:
    """Books decode steps.

    Args:
        kind: `sparse` or `dense`.
        name: `decode`, or why they are dense.
        steps: Their number.
    """
    _steps().labels(kind, name).inc(steps)


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
