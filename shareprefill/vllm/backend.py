"""What a vLLM attention backend becomes when long prefills are taken out of it.

Mix-ins go over vLLM's own classes (`cpu.py`, `flash.py`, `triton.py` put them together): its
cache layout, cache writes, metadata and kernels stay. A step's metadata says which rows are long
plain prefills; a layer computes those with `ServingCore`, and hands the others on.
"""

# vLLM lives in an environment of its own: it is not there where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
import vllm
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, CommonAttentionMetadata

from shareprefill.errors import UnsupportedError
from shareprefill.runtime.ops.dispatch import page_in_place
from shareprefill.runtime.ops.pages import Tokens
from shareprefill.vllm.core import RowState, ServingCore
from shareprefill.vllm.decoding import (
    MOST_TOKENS,
    DecodeStep,
    ServingDecoding,
    decode_step,
    uniform_step,
)
from shareprefill.vllm.engine import core_of, current_core
from shareprefill.vllm.options import NAME
from shareprefill.vllm.pages import all_pages, joined_pages, request_table, split_pages
from shareprefill.vllm.rows import Prefill, Run, divide

logger = init_logger("vllm.shareprefill")

# Fields of a step's metadata: one entry a row, one a token, what holds for all rows, and what is
# derived again when it is asked for.
_BY_ROW = frozenset(
    {
        *("seq_lens", "block_table_tensor", "is_prefilling", "seq_lens_cpu_upper_bound"),
        *("req_idx", "rswa_prefix_lens", "dcp_local_seq_lens", "dcp_local_seq_lens_cpu"),
        *("dcp_local_seq_lens_cpu_upper_bound", "replayssm_decode_base_cpu"),
        *("_seq_lens_cpu", "_num_computed_tokens_cpu"),
    }
)
_BY_TOKEN = frozenset({"positions"})
_OF_A_STEP = frozenset({"max_seq_len", "causal"})
_CACHED = frozenset({"_num_computed_tokens_cache", "_token_to_req_indices_cache"})


@dataclass(frozen=True)
class StepWork:
    """What a step's metadata carries for us.

    Attributes:
        prefills: Rows that are computed sparsely, each with its request's switch and its pages.
        decodes: Rows that are decoded sparsely; None where there are none.
        runs: The other rows, each with metadata of the inner backend.
    """

    prefills: tuple[tuple[Prefill, str | None, Tensor], ...]
    decodes: DecodeStep | None
    runs: tuple[tuple[Run, Any], ...]


class SharePrefillBackend:
    """Mix-in of backends with plain pages, which our kernels read where they are."""

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Tokens of a page where the user names none: of pages that our kernels read fastest.

        Where heads are divided over processes the inner backend's size stays: with pages of 128
        some such engines stood still at their start, and nobody knows why (docs/vllm.md).
        """
        core = current_core()
        inner = super().get_preferred_block_size(default_block_size)
        if core is None or not core.is_alone:
            return inner
        return math.lcm(inner, page_in_place(core.device))


class SharePrefillBuilder:
    """Mix-in of metadata builders: finds the rows that are computed sparsely."""

    # vLLM would copy metadata from one KV cache group to the next with another block table; the
    # runs' own metadata has tables as well, so every group builds its own.
    supports_update_block_table: bool = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """At most graphs of uniform batches: a prefill's decisions may not be frozen in one.

        Of one token a row where decode steps may be sparse: such a graph decodes all of its rows.
        Without any where a row may have more tokens than that knows.
        """
        support = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        core = core_of(vllm_config)
        if core is None:
            return support
        most = AttentionCGSupport.UNIFORM_BATCH
        if core.decoding is not None:
            most = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
            if core.decoding.max_keys > MOST_TOKENS:
                most = AttentionCGSupport.NEVER
        return most if support.value > most.value else support

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.core: ServingCore | None = core_of(vllm_config)
        if self.core is not None:
            self.core.is_called = True
            _leave_wrapped(vllm_config)
            _check_layers(vllm_config, self.core.n_heads)
            if self.core.decoding is not None:
                layers = _decoded_layers(vllm_config, self.core.n_layers)
                if layers:
                    self.core.decoding.use(layers)
                else:
                    # A rank of a pipeline may hold dense layers alone.
                    self.core.decoding = None
            if self.core.check_files is not None:
                self.core.check_files()
                self.core.check_files = None
            layers = vllm_config.compilation_config.static_forward_context
            if any(_is_wrapped(layers[name]) for name in layer_names):
                # Such a builder hands on rows of its own, not the requests'.
                self.core = None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """The inner backend's metadata, with the work of a step that has sparse rows."""
        common, inner = common_attn_metadata, super()
        metadata = inner.build(common_prefix_len, common, fast_build)
        core = self.core
        if fast_build or core is None:
            return metadata
        if core.decoding is None and common.max_query_len < core.least_rows:
            return metadata
        why_dense = _why_dense(common_prefix_len, common)
        # Every KV cache group builds metadata of a step; the first one books it.
        books = core.is_new_step(common.query_start_loc_cpu)
        starts = common.query_start_loc_cpu.tolist()[: common.num_reqs + 1]
        if why_dense is not None:
            logger.info_once("shareprefill: steps with %s run dense", why_dense)
            for first, stop in pairwise(starts if books else ()):
                core.book_dense(stop - first, why_dense)
            return metadata

        def is_sparse(row: int, n_query: int, n_key: int) -> bool:
            switch = _switch_of(core, common, row)
            if books:
                core.book(n_query, n_key, switch)
            return core.is_sparse(n_query, n_key, switch)

        lengths = common.seq_lens_cpu_upper_bound.tolist()[: common.num_reqs]
        division = divide(starts, lengths, is_sparse)
        decodes, of_rows = None, (lengths, common.seq_lens, common.block_table_tensor)
        if core.decoding is not None and common.max_query_len == 1:
            decodes = uniform_step(division.decodes, starts[-1], *of_rows)
        elif division.decodes:
            decodes = decode_step(division.decodes, starts, *of_rows)
        if decodes is not None and books:
            assert core.decoding is not None
            core.decoding.begin_step(decodes)
        if not division.prefills and not division.decodes:
            return metadata
        # Without ahead-of-time schedules: they share one buffer, which the whole step's has.
        runs = ((run, inner.build(0, rows_of(common, run), True)) for run in division.rest)
        tables = common.block_table_tensor
        prefills = (
            (row, _switch_of(core, common, row.row), request_table(tables, row.row))
            for row in division.prefills
        )
        metadata.shareprefill = StepWork(tuple(prefills), decodes, tuple(runs))
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """The metadata of a step that a graph is captured of: all rows may be sparse, or none."""
        common, inner = common_attn_metadata, super()
        metadata = inner.build_for_cudagraph_capture(common)
        if self.core is None or self.core.decoding is None:
            return metadata
        assert common.max_query_len == 1, "get_cudagraph_support allows no other graphs"
        n_rows = common.num_reqs
        step = self.core.decoding.graph_step(
            common.seq_lens[:n_rows], common.block_table_tensor[:n_rows]
        )
        metadata.shareprefill = StepWork((), step, ())
        # What sketches lie in may not belong to a graph.
        nowhere = torch.empty(0, dtype=torch.int64, device=common.seq_lens.device)
        for layer, impl in _impls(self.vllm_config):
            decoding = impl.decoding_of(layer)
            if decoding is not None:
                decoding.write(impl.index(layer), impl.pages(layer, layer.kv_cache)[0], nowhere)
        return metadata


class SharePrefillImpl:
    """Mix-in of attention implementations: computes the sparse rows."""

    # Attributes of the inner implementation.
    scale: float
    attn_type: str
    alibi_slopes: Any
    num_heads: int
    num_kv_heads: int
    kv_cache_dtype: str
    kv_sharing_target_layer_name: str | None
    logits_soft_cap: float
    sliding_window: Any
    sinks: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.core = current_core()
        self.cache_config = get_current_vllm_config().cache_config
        self._layer: int | None = None
        self.why_dense = self._why_dense()
        if self.core is not None and self.why_dense is not None:
            logger.info_once("shareprefill: layers with %s run dense", self.why_dense)

    def _why_dense(self) -> str | None:
        """What our kernels do not know of the layer; None where it is plain attention."""
        dtype = str(get_current_vllm_config().model_config.dtype).removeprefix("torch.")
        unknown = {
            f"attention of type {self.attn_type}": self.attn_type != AttentionType.DECODER,
            "a sliding window": self.sliding_window not in (None, -1, (-1, -1)),
            "ALiBi": self.alibi_slopes is not None,
            f"a cache of {self.kv_cache_dtype}": self.kv_cache_dtype not in ("auto", dtype),
            "another layer's keys and values": self.kv_sharing_target_layer_name is not None,
        }
        return next((name for name, holds in unknown.items() if holds), None)

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Never where rows may be sparse: our operators write outputs of the model's dtype.

        vLLM would fuse the output's quantisation into attention, which then runs dense.
        """
        is_ours = self.core is not None and self.why_dense is None
        return not is_ours and super().fused_output_quant_supported(quant_key)

    def fused_rope_kvcache_supported(self) -> bool:
        """Never where decode steps may be sparse: such an operator writes no sketches of keys."""
        is_ours = self.core is not None and self.core.decoding is not None
        return not is_ours and super().fused_rope_kvcache_supported()

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of one layer over a step's tokens, in place.

        Args:
            layer: vLLM's attention layer.
            query: `[T, H, D]`.
            key: `[T, G, D]`, already in the cache; newer versions may leave it out.
            value: `[T, G, D]`, likewise.
            kv_cache: Pages, in the inner backend's layout.
            attn_metadata: Of the step; None in the run that measures memory.
            output: `[T, H, D]`, filled.
            output_scale: Of an output in lower precision, which the inner backend alone writes.
            output_block_scale: Likewise.

        Returns:
            `output`.
        """
        core, inner = self.core, super()
        work: StepWork | None = getattr(attn_metadata, NAME, None)
        if core is not None and attn_metadata is None and self._is_shared(core, layer):
            page_size = self.cache_config.block_size
            core.prepare(query, self.num_kv_heads, page_size, **self._arguments())
        if (
            core is None
            or work is None
            or output_scale is not None
            or not self._is_shared(core, layer)
        ):
            return inner.forward(
                layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip
        decoding, index = core.decoding, self.index(layer)
        if work.decodes is not None:
            assert decoding is not None
            pages = self.pages(layer, kv_cache)
            decoding.attend(
                *(index, work.decodes, query, pages, output.view(query.shape)), scale=self.scale
            )
        # Behind it: it writes zeros for rows of a uniform step that are not sparse.
        for run, metadata in work.runs:
            part = [None if t is None else t[run.tokens] for t in (query, key, value)]
            inner.forward(layer, *part, kv_cache, metadata, output[run.tokens])
        # One object a forward pass, over all KV cache groups.
        states: dict[int, RowState] = get_forward_context().additional_kwargs.setdefault(NAME, {})
        for prefill, switch, table in work.prefills:
            if prefill.row not in states:
                states[prefill.row] = core.begin(prefill, switch, query.device)
            keys: Tokens
            values: Tokens
            if prefill.is_whole and key is not None and value is not None:
                # Nothing lies in the cache that is not here.
                keys, values = (t[prefill.tokens].transpose(0, 1) for t in (key, value))
            else:
                keys, values = self.keys_and_values(layer, kv_cache, table, prefill.n_key)
            rows, queries = output[prefill.tokens], query[prefill.tokens].transpose(0, 1)
            if decoding is not None:
                decoding.read_prompt(index, queries, keys, self.pages(layer, kv_cache)[0])
            out = core.attend(
                index, states[prefill.row], queries, keys, values, **self._arguments()
            )
            rows.copy_(out.transpose(0, 1).reshape(rows.shape))
        return output

    def keys_and_values(
        self, layer: Any, kv_cache: Tensor, table: Tensor, n_key: int
    ) -> tuple[Tokens, Tokens]:
        """Keys and values of a request in its pages, `[G, n_key, D]` each.

        Args:
            layer: vLLM's attention layer.
            kv_cache: Pages: two halves `[pages, 2, page size, G, D]`, or (from 0.3x on) joined
                `[pages, G, page size, 2 D]`.
            table: int, the request's pages.
            n_key: Tokens of the request.
        """
        del layer
        pages = split_pages if kv_cache.ndim == 5 else joined_pages
        return pages(kv_cache, table, n_key)

    def pages(self, layer: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole cache, `[pages, G, page size, D]` each.

        Args:
            layer: vLLM's attention layer.
            kv_cache: As in `keys_and_values`.
        """
        del layer
        return all_pages(kv_cache)

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Writes a step's keys and values, and where decode steps may be sparse, sketches of keys.

        Args:
            layer: vLLM's attention layer.
            key: `[T, G, D]`.
            value: `[T, G, D]`.
            kv_cache: Pages, in the inner backend's layout.
            slot_mapping: Places of the tokens in them, int64; negative for padding.
        """
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        decoding = self.decoding_of(layer)
        if decoding is not None:
            keys = self.pages(layer, kv_cache)[0]
            decoding.write(self.index(layer), keys, slot_mapping)

    def decoding_of(self, layer: Any) -> ServingDecoding | None:
        """What decodes steps of the layer sparsely; None where all are dense."""
        core = self.core
        return None if core is None or not self._is_shared(core, layer) else core.decoding

    def _arguments(self) -> dict[str, Any]:
        """What the model's attention has beside its tensors."""
        softcap = self.logits_soft_cap or None
        return {"scale": self.scale, "softcap": softcap, "sinks": self.sinks}

    def index(self, layer: Any) -> int:
        """The layer's index in the model."""
        if self._layer is None:
            self._layer = int(extract_layer_index(layer.layer_name))
        return self._layer

    def _is_shared(self, core: ServingCore, layer: Any) -> bool:
        """Whether the artifact knows the layer (it knows no draft model's), and it is plain."""
        is_known = self.index(layer) < core.n_layers
        if not is_known:
            logger.info_once("shareprefill: layers of a draft model run dense")
        return is_known and self.why_dense is None


def _why_dense(common_prefix_len: int, common: CommonAttentionMetadata) -> str | None:
    """What our kernels do not know of a step; None where it is plainly causal."""
    unknown = {
        "cascade attention": common_prefix_len > 0,
        "attention that is not causal": common.causal is not True,
        "images whose tokens see each other": bool(common.mm_req_doc_ranges),
        "fast prefill": common.logits_indices_padded is not None,
        "lengths that only the device knows": common.seq_lens_cpu_upper_bound is None,
    }
    return next((name for name, holds in unknown.items() if holds), None)


def _is_wrapped(layer: Any) -> bool:
    """Whether vLLM puts a backend of its own over ours, which divides rows or moves keys.

    As chunks of local attention do, and sinks that are kept in pages.
    """
    return "is_of_shareprefill" not in vars(layer.get_attn_backend())


def _leave_wrapped(vllm_config: Any) -> None:
    """Leaves wrapped layers to the inner backend."""
    for layer, impl in _impls(vllm_config):
        if impl.why_dense is None and _is_wrapped(layer):
            impl.why_dense = f"attention of {layer.get_attn_backend().__name__}"
            logger.info_once("shareprefill: layers with %s run dense", impl.why_dense)


def _check_layers(vllm_config: Any, n_heads: int) -> None:
    """Refuses an engine in which nothing would be sparse, or layers have unlike heads.

    A rank of a pipeline may hold dense layers alone; where there is one rank, it holds them all.

    Args:
        vllm_config: vLLM's configuration.
        n_heads: Query heads of a layer that the plan has for this process.

    Raises:
        UnsupportedError: says why its layers run dense, or which heads they have.
    """
    impls = [impl for _, impl in _impls(vllm_config)]
    found = sorted({impl.num_heads for impl in impls if not impl.why_dense} - {n_heads})
    if found:
        raise UnsupportedError(
            f"shareprefill plans {n_heads} query heads a layer in this process, and layers have "
            f"{', '.join(map(str, found))}: models whose layers differ in that run without it"
        )
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        return
    if all(impl.why_dense for impl in impls):
        reasons = ", ".join(sorted({str(impl.why_dense) for impl in impls}))
        raise UnsupportedError(
            f"shareprefill would compute nothing in this engine: every layer has {reasons}"
        )


def _decoded_layers(vllm_config: Any, n_layers: int) -> list[int]:
    """Layers whose decode steps may be sparse: of plain attention, and not of a draft model.

    Raises:
        UnsupportedError: such layers have what the operators do not know.
    """
    found = []
    for layer, impl in _impls(vllm_config):
        index = int(extract_layer_index(layer.layer_name))
        if impl.why_dense is not None or index >= n_layers:
            continue
        unknown = {"a soft-cap": impl.logits_soft_cap, "attention sinks": impl.sinks is not None}
        for name, holds in unknown.items():
            if holds:
                raise UnsupportedError(
                    f'sparse decode steps do not know layers with {name}: leave out "decode"'
                )
        found.append(index)
    return sorted(found)


def _impls(vllm_config: Any) -> list[tuple[Any, SharePrefillImpl]]:
    """The layers of an engine that are ours, each with its implementation; no draft model's."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    both = ((layer, getattr(layer, "impl", None)) for layer in layers)
    ours = ((layer, impl) for layer, impl in both if isinstance(impl, SharePrefillImpl))
    return [(layer, impl) for layer, impl in ours if impl.core is not None]


def _switch_of(core: ServingCore, common: CommonAttentionMetadata, row: int) -> str | None:
    """The switch of a row's request."""
    # Model Runner V2 sorts rows anew at every step, and says where their requests stand.
    places = getattr(common, "req_idx", None)
    return core.switches.get(row if places is None else int(places[row]))


def rows_of(common: CommonAttentionMetadata, run: Run) -> CommonAttentionMetadata:
    """The metadata of a run of a step's rows.

    Fields that this does not know, and that hold something by row or token, would be wrong: where a
    version of vLLM has one, and it is set, the step is not divided but refused.
    """
    rows, first = run.rows, run.tokens.start
    starts = slice(rows.start, rows.stop + 1)
    starts_cpu = common.query_start_loc_cpu[starts] - first
    changes: dict[str, Any] = {
        "query_start_loc": common.query_start_loc[starts] - first,
        "query_start_loc_cpu": starts_cpu,
        "num_reqs": rows.stop - rows.start,
        "num_actual_tokens": run.tokens.stop - first,
        "max_query_len": int((starts_cpu[1:] - starts_cpu[:-1]).max()),
        "slot_mapping": common.slot_mapping[run.tokens],
    }
    for field in fields(common):
        value = getattr(common, field.name)
        if field.name in changes or field.name in _OF_A_STEP or value is None:
            continue
        if field.name in _BY_TOKEN:
            changes[field.name] = value[run.tokens]
        elif field.name in _BY_ROW:
            changes[field.name] = value[rows]
        elif field.name in _CACHED:
            changes[field.name] = None
        else:
            raise UnsupportedError(
                f"vLLM {vllm.__version__} has metadata {field.name!r}, which this version of "
                "shareprefill cannot divide: use a version of vLLM that docs/vllm.md lists"
            )
    return common.replace(**changes)
