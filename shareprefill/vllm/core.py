"""What one process of an engine does with its rows: plans, states and counts, on plain tensors.

Nothing here knows vLLM: another engine's adapter would call the same.
"""

from __future__ import annotations

import hashlib
import logging
import time
import weakref
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shareprefill.config import RuntimeConfig
from shareprefill.errors import ConfigError
from shareprefill.runtime.core import SequenceState, SparsePrefill
from shareprefill.runtime.crossover import LayerSizes, crossover
from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.ops.pages import Tokens
from shareprefill.runtime.plan import RuntimePlan
from shareprefill.runtime.records import LayerRecord
from shareprefill.runtime.report import SessionReport, make_report
from shareprefill.runtime.rules.base import Exchange
from shareprefill.vllm.decoding import ServingDecoding
from shareprefill.vllm.options import OFF
from shareprefill.vllm.pages import split_pages
from shareprefill.vllm.rows import Prefill

# vLLM prints what goes to its own logger and those below.
logger = logging.getLogger("vllm.shareprefill")

# Rows whose records are kept for a report. That of a layer is 3 KiB, but 8,192 of them took 180
# MiB of a CPU's memory: what is freed between records that stay cannot be given back.
_RECENT_ROWS = 64
# Blocks of the prefill that compiles the kernels: enough for every part of a pattern.
_WARM_BLOCKS = 16


class _Others:
    """The other processes of a tensor-parallel group.

    Attributes:
        are_met: Whether what they found is added. Else this process goes on by itself, and what
            the others have is empty.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange, self.are_met = exchange, True

    def sum(self, tensor: Tensor) -> None:
        """Adds the tensors of all processes, in place in each."""
        if self.are_met:
            self._exchange.sum(tensor)

    def agree(self, told: str, device: torch.device) -> None:
        """Makes sure that all processes were told the same; waits for them.

        Those that were not would sum at other steps than the rest, and all would stand still. NCCL
        makes a group's communicator at its first sum: here, while nothing else runs.

        Args:
            told: What must be alike, in words.
            device: Where they compute.

        Raises:
            ConfigError: in every process, where one of them was told something else.
        """
        numbers = [1, *hashlib.sha256(told.encode()).digest()]
        squares = [number * number for number in numbers]
        sums = torch.tensor([numbers, squares], dtype=torch.int64, device=device)
        self._exchange.sum(sums)
        # The mean of squares is the square of the mean where all numbers are alike, there alone.
        if bool((sums[0, 0] * sums[1] != sums[0] ** 2).any()):
            raise ConfigError(
                f"the {int(sums[0, 0])} processes were started with unlike options: give all of "
                "them the same options, artifact, version of shareprefill and table of crossovers"
            )


@dataclass(frozen=True)
class RowRecord:
    """What was done for one row: a report's, which must not keep its patterns alive.

    Attributes:
        policy: The policy that the request asked for; None for the engine's own.
        n_query: Query rows.
        n_key: Keys of the request.
        layers: Of every layer that was computed.
    """

    policy: str | None
    n_query: int
    n_key: int
    layers: list[LayerRecord] = field(default_factory=list)


@dataclass(frozen=True)
class RowState:
    """One row's state over the layers of a forward pass.

    Attributes:
        prefill: What its heads are to do.
        sequence: Its blocks and pivots.
        record: What was done for it so far.
    """

    prefill: SparsePrefill
    sequence: SequenceState
    record: RowRecord


class ServingCore:
    """One model's plans in one process of an engine.

    Args:
        make_plan: The plan of a policy; None asks for the engine's own.
        config: The engine's own options.
        heads: Query heads of every layer that this process holds; None for all.
        exchange: Of the other processes' heads; None where this one holds all of them.
        head_dim: Of queries and keys.
        device: Where attention is computed.
        backend: What computes dense attention there, as `sp tune` names it.
        max_rows: Query rows of one step at most.
        max_keys: Keys of one request at most.
        told: What else the other processes must have been told alike, in words.
        count: Is told of every row of at least a block: `sparse` or `dense`, its policy or the
            reason, and its query rows.

    Raises:
        ConfigError: the other processes were started with other options.

    Attributes:
        n_layers: Layers of the plan.
        least_rows: Query rows from which on a row may be sparse: a block.
        switches: Of requests that carry one, by their places in the engine's batch.
        check_files: What is still to be checked once the model is loaded; None for nothing.
        decoding: Sparse decode steps; None where the engine leaves them all to the inner backend.
        is_called: Whether any layer of the engine calls us.
    """

    def __init__(
        self,
        make_plan: Callable[[str | None], RuntimePlan],
        config: RuntimeConfig,
        *,
        heads: range | None,
        exchange: Exchange | None,
        head_dim: int,
        device: torch.device,
        backend: str,
        max_rows: int,
        max_keys: int,
        told: str = "",
        count: Callable[[str, str, int], None] = lambda *_: None,
    ) -> None:
        self._make_plan, self.config = make_plan, config
        self._heads, self._head_dim, self._count = heads, head_dim, count
        self._others = None if exchange is None else _Others(exchange)
        self.device, self.max_rows, self.max_keys = device, max_rows, max_keys
        # Read here, so that a table that cannot be read stops the engine's start.
        self.crossover = crossover(device, backend).or_from(config.min_tokens)
        if self._others is not None:
            told = repr((told, config, self.crossover, max_rows, max_keys))
            self._others.agree(told, device)
        self._prefills: dict[str | None, SparsePrefill] = {}
        self._counts: Counter[tuple[str, str]] = Counter()
        self._is_prepared = False
        self._last_step: weakref.ref[Tensor] | None = None
        self.switches: dict[int, str] = {}
        self.check_files: Callable[[], None] | None = None
        self.decoding: ServingDecoding | None = None
        self.is_called = False
        plan = self._prefill(None).plan
        self.n_layers, self.least_rows = len(plan.layers), plan.block_size
        self._recent: deque[RowRecord] = deque(maxlen=_RECENT_ROWS)

    @property
    def is_alone(self) -> bool:
        """Whether this process holds all heads."""
        return self._others is None

    @property
    def n_heads(self) -> int:
        """Query heads of a layer that this process holds."""
        return len(self._prefill(None).heads)

    @property
    def min_tokens(self) -> int:
        """Keys from which on a whole prompt runs sparse."""
        return self.crossover.tokens_of(self._sizes)

    def keys_of_chunk(self, rows: int) -> int | None:
        """Keys from which on a prompt's last rows are sparse; None where those of none are.

        Args:
            rows: Of a step at most.
        """
        keys = range(self.least_rows, self.max_keys + 1)
        place = bisect_left(keys, True, key=lambda n: self.is_sparse(min(rows, n), n, None))
        return keys[place] if place < len(keys) else None

    def is_new_step(self, starts: Tensor) -> bool:
        """True once a step, however many groups of layers ask.

        Args:
            starts: The step's offsets on the host, one object for all groups.
        """
        is_new = self._last_step is None or self._last_step() is not starts
        self._last_step = weakref.ref(starts)
        return is_new

    def is_sparse(self, n_query: int, n_key: int, switch: str | None) -> bool:
        """Whether a row is computed sparsely."""
        if n_query == 1 and self.decoding is not None:
            return self.decoding.is_sparse(n_key, switch)
        return n_query >= self.least_rows and self._reason(n_query, n_key, switch) is None

    def book(self, n_query: int, n_key: int, switch: str | None) -> None:
        """Counts a row of a step that is computed, once for all of its layers."""
        if n_query == 1 and self.decoding is not None:
            self.decoding.book(n_key, switch)
        if n_query < self.least_rows:
            return
        reason = self._reason(n_query, n_key, switch)
        if reason is not None:
            self.book_dense(n_query, reason)
            return
        name = self._name(switch)
        self._counts["sparse", name] += 1
        self._count("sparse", name, n_query)

    def book_dense(self, n_query: int, reason: str) -> None:
        """Counts a row that the inner backend computes, if it has at least a block."""
        if n_query >= self.least_rows:
            self._counts["dense", reason] += 1
            self._count("dense", reason, n_query)

    def begin(self, row: Prefill, switch: str | None, device: torch.device) -> RowState:
        """The state of a row before the first layer of a forward pass."""
        policy = self._own(switch)
        prefill = self._prefill(policy)
        geometry = prefill.plan.geometry(row.n_query, row.n_key, device)
        record = RowRecord(policy, row.n_query, row.n_key)
        return RowState(prefill, prefill.begin(geometry), record)

    def attend(
        self,
        layer: int,
        row: RowState,
        query: Tensor,
        key: Tokens,
        value: Tokens,
        *,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of one layer's heads on one row.

        Args:
            layer: Layer index in the model.
            row: The row's state.
            query: `[H, Nq, D]`, this process's heads.
            key: `[G, Nk, D]`, or in pages; query row i is at position Nk - Nq + i.
            value: `[G, Nk, Dv]`, as keys lie.
            scale: The model's factor on the logits.
            softcap: Its soft-cap of the logits, or None.
            sinks: Its attention sinks `[H]`, or None.

        Returns:
            `[H, Nq, Dv]`.
        """
        out, record = row.prefill.attend(
            layer, row.sequence, query, key, value, scale=scale, softcap=softcap, sinks=sinks
        )
        if not row.record.layers:
            self._recent.append(row.record)
        row.record.layers.append(record)
        return out

    def worst_case_bytes(self, n_heads: int, n_groups: int, head_dim: int, itemsize: int) -> int:
        """Memory that a step's sparse rows hold at most beside queries, cache and output.

        Maps, candidate patterns and lists of all heads of a layer, pivots' patterns of all layers,
        and keys, values and an output beside the pages.

        Args:
            n_heads: Query heads of this process.
            n_groups: Its KV heads.
            head_dim: Of keys and values.
            itemsize: Bytes of a number of theirs.
        """
        block, plan = self.least_rows, self._prefill(None).plan
        blocks = count_blocks(self.max_rows, block) * count_blocks(self.max_keys, block)
        # float32 maps of two estimates, a bitmap, and int32 lists.
        of_layer = blocks * n_heads * (2 * 4 + 1 + 4)
        of_pivots = blocks * len({(h.pivot, h.gamma) for layer in plan.layers for h in layer})
        copies = 2 * n_groups * self.max_keys * head_dim + n_heads * self.max_rows * head_dim
        return of_layer + of_pivots + copies * itemsize

    def prepare(
        self,
        query: Tensor,
        n_groups: int,
        page_size: int,
        *,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> None:
        """Once, in the run in which an engine measures its memory: reserves, and compiles kernels.

        The worst case is held for a moment, so that the engine leaves room for it. On a CPU there
        is nothing to do: the room for the cache is given there, and nothing is compiled.

        Args:
            query: `[T, H, D]` of that run.
            n_groups: KV heads of this process.
            page_size: Tokens of a page of the cache.
            scale: See `attend`.
            softcap: See `attend`.
            sinks: See `attend`.
        """
        if self._is_prepared or query.device.type == "cpu":
            return
        self._is_prepared = True
        _, n_heads, head_dim = query.shape
        size = self.worst_case_bytes(n_heads, n_groups, head_dim, query.element_size())
        if self.decoding is not None:
            size += self.decoding.sketch_bytes(n_groups, head_dim, query.element_size())
        torch.empty(size, dtype=torch.uint8, device=query.device)
        # Where an engine of several processes stands still, these lines tell in which part.
        logger.info("shareprefill: compiles kernels")
        begun = time.perf_counter()
        # Loading a kernel may wait for the device. A collective that still ran there would wait for
        # a process which may need this one's answer to go on: so none runs while kernels load.
        torch.cuda.synchronize(query.device)
        self.warm(query, n_groups, page_size, scale=scale, softcap=softcap, sinks=sinks)
        torch.cuda.synchronize(query.device)
        logger.info("shareprefill: kernels are there (%.1f s)", time.perf_counter() - begun)

    def warm(
        self,
        query: Tensor,
        n_groups: int,
        page_size: int,
        *,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> None:
        """Runs every layer on random numbers, whole and as a chunk in pages; nothing is counted.

        Every process does so by itself, and meets the others once, when all kernels are there.

        Args:
            query: `[T, H, D]`, whose sizes, dtype and device are taken.
            n_groups: KV heads of this process.
            page_size: Tokens of a page of the cache.
            scale: See `attend`.
            softcap: See `attend`.
            sinks: See `attend`.
        """
        _, n_heads, head_dim = query.shape
        n_key = _WARM_BLOCKS * self.least_rows
        n_pages = count_blocks(n_key, page_size)
        table = torch.arange(n_pages, dtype=torch.int32, device=query.device)
        shape = (n_pages, 2, page_size, n_groups, head_dim)
        cache = torch.randn(shape, dtype=query.dtype, device=query.device)
        pages = split_pages(cache, table, n_key)
        if self._others is not None:
            self._others.are_met = False
        for n_query in (n_key, n_key // 2):
            # As an engine's tensors lie: heads inside tokens.
            rows = torch.randn(
                n_query, n_heads, head_dim, dtype=query.dtype, device=query.device
            ).transpose(0, 1)
            keys, values = pages if n_query < n_key else (tokens.gathered for tokens in pages)
            state = self.begin(Prefill(0, slice(0, n_query), n_key), None, query.device)
            for layer in range(self.n_layers):
                state.prefill.attend(
                    layer, state.sequence, rows, keys, values,
                    scale=scale, softcap=softcap, sinks=sinks,
                )  # fmt: skip
        if self.decoding is not None:
            self.decoding.warm(query, n_groups, page_size, scale=scale)
        if self._others is not None:
            logger.info("shareprefill: has compiled, and waits for the other processes")
            self._others.are_met = True
            self._others.sum(torch.zeros(1, dtype=torch.uint8, device=query.device))

    def report(self) -> dict[str, Any]:
        """What was done since the start; waits for the device.

        Returns:
            JSON-ready. `rows`: rows of at least a block, `sparse` by policy and `dense` by reason.
            `recent`: of the last 64 sparse rows, by policy, what a session's report says of them
            (`density`, `selection_work`, `policies`, ...). `latest`: the same of each of these rows
            alone, the newest last, with its `policy`, query `rows` and `keys`: a whole prompt, or a
            chunk of one. `decoding`, where decode steps may be sparse: see `ServingDecoding`.
        """
        rows: dict[str, dict[str, int]] = {"sparse": {}, "dense": {}}
        for (kind, name), number in self._counts.items():
            rows[kind][name] = number
        kept = list(self._recent)
        recent = {
            self._name(policy): self._report(policy, [row for row in kept if row.policy == policy])
            for policy in dict.fromkeys(row.policy for row in kept)
        }
        latest = [
            {"policy": self._name(row.policy), "rows": row.n_query, "keys": row.n_key}
            | self._report(row.policy, [row])
            for row in kept
        ]
        found = {"rows": rows, "recent": recent, "latest": latest}
        if self.decoding is not None:
            found["decoding"] = self.decoding.report()
        return found

    def reset(self) -> None:
        """Forgets what the report says."""
        self._recent.clear()
        self._counts.clear()
        if self.decoding is not None:
            self.decoding.reset()

    def _name(self, policy: str | None) -> str:
        return policy or self.config.policy

    def _report(self, policy: str | None, rows: list[RowRecord]) -> dict[str, Any]:
        prefill = self._prefill(policy)
        records = [record for row in rows for record in row.layers]
        report: SessionReport = make_report(
            prefill.plan, prefill.heads, records, dense=Counter(), requested_dense=0, thresholds={}
        )
        names = ("prefills", "density", "selection_work", "policies")
        return {name: getattr(report, name) for name in names}

    def _own(self, policy: str | None) -> str | None:
        """None where a request names the engine's own policy, whose options hold for it, too."""
        return None if policy == self.config.policy else policy

    def _prefill(self, policy: str | None) -> SparsePrefill:
        if policy not in self._prefills:
            plan = self._make_plan(policy)
            self._prefills[policy] = SparsePrefill(plan, self._heads, self._others)
        return self._prefills[policy]

    @property
    def _sizes(self) -> LayerSizes:
        """A layer's, as far as this process computes it."""
        return LayerSizes(self.n_heads, self._head_dim)

    def _reason(self, n_query: int, n_key: int, switch: str | None) -> str | None:
        """Why a row of at least a block runs dense; None where it does not."""
        if switch == OFF:
            return "request"
        is_long = self.crossover.is_worth_it(n_query, n_key, self._sizes)
        return None if is_long else "length"
