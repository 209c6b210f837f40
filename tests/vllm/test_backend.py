"""What of a step goes to the inner backend, with vLLM's own types: `make test-vllm`."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from vllm.v1.attention.backend import (  # pyright: ignore
    AttentionCGSupport,
    CommonAttentionMetadata,
)

from shareprefill.errors import UnsupportedError
from shareprefill.vllm import backend
from shareprefill.vllm.backend import (
    SharePrefillBackend,
    SharePrefillBuilder,
    SharePrefillImpl,
    _why_dense,
    rows_of,
)
from shareprefill.vllm.rows import Run


def step(**changes: Any) -> CommonAttentionMetadata:
    """Three rows of 1, 300 and 2 tokens."""
    starts = torch.tensor([0, 1, 301, 303], dtype=torch.int32)
    lengths = torch.tensor([9, 300, 40], dtype=torch.int32)
    values = {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts,
        "seq_lens": lengths,
        "seq_lens_cpu_upper_bound": lengths,
        "num_reqs": 3,
        "num_actual_tokens": 303,
        "max_query_len": 300,
        "max_seq_len": 300,
        "block_table_tensor": torch.arange(12).view(3, 4),
        "slot_mapping": torch.arange(303),
        "causal": True,
    }
    known = {field.name for field in fields(CommonAttentionMetadata)}
    assert values.keys() <= known
    return CommonAttentionMetadata(**values | changes)


def test_a_plainly_causal_step_may_be_sparse_and_others_say_why():
    assert _why_dense(0, step()) is None
    assert _why_dense(128, step()) == "cascade attention"
    assert _why_dense(0, step(causal=False)) == "attention that is not causal"
    assert _why_dense(0, step(mm_req_doc_ranges={0: [(0, 4)]})) == (
        "images whose tokens see each other"
    )
    assert _why_dense(0, step(logits_indices_padded=torch.zeros(1))) == "fast prefill"
    assert "lengths" in str(_why_dense(0, step(seq_lens_cpu_upper_bound=None)))


def test_a_run_has_the_metadata_of_its_rows():
    part = rows_of(step(), Run(slice(2, 3), slice(301, 303)))
    assert part.query_start_loc.tolist() == part.query_start_loc_cpu.tolist() == [0, 2]
    assert (part.num_reqs, part.num_actual_tokens, part.max_query_len) == (1, 2, 2)
    assert part.seq_lens.tolist() == [40]
    assert part.block_table_tensor.tolist() == [[8, 9, 10, 11]]
    assert part.slot_mapping.tolist() == [301, 302]


def builder_of_nothing() -> Any:
    """Our builder, whose inner one makes empty metadata; it has no core yet."""

    class Inner:
        def build(self, *arguments: Any, **options: Any) -> Any:
            return SimpleNamespace()

    class Builder(SharePrefillBuilder, Inner):
        pass

    return object.__new__(Builder)


def test_a_row_that_is_sparse_has_a_table_for_which_kernels_are_compiled():
    builder, tables = builder_of_nothing(), torch.arange(15, dtype=torch.int32).view(3, 5)
    core: Any = SimpleNamespace(
        least_rows=2,
        decoding=None,
        switches={},
        is_new_step=lambda starts: False,
        is_sparse=lambda n_query, n_key, switch: n_query == 300,
    )
    builder.core = core
    work = builder.build(0, step(block_table_tensor=tables)).shareprefill
    ((prefill, _, table),) = work.prefills
    assert (prefill.row, len(work.runs)) == (1, 2)
    assert tables[1].data_ptr() % 16
    assert table.data_ptr() % 16 == 0
    assert torch.equal(table, tables[1])


def test_what_vllm_fuses_into_attention_takes_no_rows_from_us():
    class Inner:
        def fused_output_quant_supported(self, quant_key: Any) -> bool:
            return quant_key == "fp8"

        def fused_rope_kvcache_supported(self) -> bool:
            return True

    class Impl(SharePrefillImpl, Inner):
        pass

    def fused(core: Any, why_dense: str | None) -> tuple[bool, ...]:
        impl = object.__new__(Impl)
        impl.core, impl.why_dense = core, why_dense
        quantised = (impl.fused_output_quant_supported(key) for key in ("fp8", "fp4"))
        return *quantised, impl.fused_rope_kvcache_supported()

    prefills, steps = SimpleNamespace(decoding=None), SimpleNamespace(decoding=object())
    assert fused(None, None) == (True, False, True)
    assert fused(prefills, "a sliding window") == (True, False, True)
    assert fused(prefills, None) == (False, False, True)
    assert fused(steps, None) == (False, False, False)


def test_metadata_that_nobody_here_knows_is_refused():
    with pytest.raises(UnsupportedError, match="'encoder_seq_lens', which this version"):
        rows_of(step(encoder_seq_lens=torch.ones(3)), Run(slice(0, 1), slice(0, 1)))


class Inner:
    """A backend with pages of a multiple of so many tokens."""

    multiple = 1

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return max(cls.multiple, default_block_size)


@pytest.mark.parametrize(
    ("in_place", "multiple", "wanted"), [(128, 1, 128), (128, 256, 256), (128, 48, 384), (1, 1, 16)]
)
def test_pages_are_such_that_kernels_read_them_in_place(
    monkeypatch: pytest.MonkeyPatch, in_place: int, multiple: int, wanted: int
):
    class Backend(SharePrefillBackend, Inner):
        pass

    monkeypatch.setattr(Inner, "multiple", multiple)
    monkeypatch.setattr(backend, "page_in_place", lambda device: in_place)
    core = SimpleNamespace(device="cuda", is_alone=True)
    monkeypatch.setattr(backend, "current_core", lambda: core)
    assert Backend.get_preferred_block_size(16) == wanted
    # Where heads are over several processes, and in an engine that runs without us.
    core.is_alone = False
    assert Backend.get_preferred_block_size(16) == max(16, multiple)
    monkeypatch.setattr(backend, "current_core", lambda: None)
    assert Backend.get_preferred_block_size(16) == max(16, multiple)


def test_decode_steps_are_sparse_in_layers_of_plain_attention_alone(
    monkeypatch: pytest.MonkeyPatch,
):
    def layer(index: int, **attributes: Any) -> tuple[Any, Any]:
        plain = {"why_dense": None, "logits_soft_cap": 0, "sinks": None}
        name = f"model.layers.{index}.self_attn.attn"
        return SimpleNamespace(layer_name=name), SimpleNamespace(**plain | attributes)

    def found(*layers: tuple[Any, Any]) -> list[int]:
        monkeypatch.setattr(backend, "_impls", lambda _: layers)
        return backend._decoded_layers(None, 4)

    # The last one is a draft model's.
    window = layer(1, why_dense="a sliding window", logits_soft_cap=50.0)
    assert found(layer(2), layer(0), window, layer(4)) == [0, 2]
    with pytest.raises(UnsupportedError, match="a soft-cap"):
        found(layer(0), layer(1, logits_soft_cap=50.0))
    with pytest.raises(UnsupportedError, match="attention sinks"):
        found(layer(0, sinks=torch.zeros(4)))


def config_of(*layers: tuple[str, Any]) -> Any:
    """A configuration with layers by name, each with its implementation."""
    found = {name: SimpleNamespace(layer_name=name, impl=impl) for name, impl in layers}
    return SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=found),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
    )


def impl_of(core: Any, **attributes: Any) -> SharePrefillImpl:
    impl = object.__new__(SharePrefillImpl)
    plain = {"why_dense": None, "num_heads": 4, "logits_soft_cap": 0, "sinks": None}
    vars(impl).update(plain | {"core": core} | attributes)
    return impl


def test_a_draft_model_with_layers_of_its_own_is_not_taken_for_the_model():
    """Its layers count from 0, too; it has no core."""
    core, window = object(), {"why_dense": "a sliding window"}
    layers = [(f"model.layers.{n}.self_attn.attn", impl_of(core)) for n in (0, 1)]
    drafts = [(f"draft_model.layers.{n}.self_attn.attn", impl_of(None)) for n in (0, 1)]
    assert backend._decoded_layers(config_of(*layers, *drafts), 2) == [0, 1]
    dense = [(name, impl_of(core, **window)) for name, _ in layers]
    with pytest.raises(UnsupportedError, match="every layer has a sliding window"):
        backend._check_layers(config_of(*dense, *drafts), 4)


def test_layers_with_unlike_heads_are_refused_at_the_start():
    core, window = object(), {"why_dense": "a sliding window"}
    names = [f"model.layers.{n}.self_attn.attn" for n in range(3)]
    alike, unlike = impl_of(core), impl_of(core, num_heads=6)
    backend._check_layers(config_of((names[0], alike), (names[1], impl_of(core, **window))), 4)
    with pytest.raises(UnsupportedError, match="plans 4 query heads .* layers have 6"):
        backend._check_layers(config_of((names[0], alike), (names[1], unlike)), 4)


def test_rows_of_a_step_that_is_dense_as_a_whole_are_counted_once():
    builder, booked, new = builder_of_nothing(), [], [True, False]
    core: Any = SimpleNamespace(
        least_rows=2,
        decoding=None,
        is_new_step=lambda starts: new.pop(0),
        book_dense=lambda n_query, reason: booked.append((n_query, reason)),
    )
    builder.core = core
    for _ in range(2):
        assert not hasattr(builder.build(0, step(causal=False)), "shareprefill")
    assert booked == [(n, "attention that is not causal") for n in (1, 300, 2)]


def test_graphs_hold_rows_of_one_token_where_decode_steps_may_be_sparse(
    monkeypatch: pytest.MonkeyPatch,
):
    class Inner:
        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
            return AttentionCGSupport.ALWAYS

    class Builder(backend.SharePrefillBuilder, Inner):
        pass

    core = SimpleNamespace(decoding=None)
    for found, wanted in ((None, "ALWAYS"), (core, "UNIFORM_BATCH")):
        monkeypatch.setattr(backend, "core_of", lambda _, found=found: found)
        assert Builder.get_cudagraph_support(None, None).name == wanted
    for most, wanted in ((1 << 20, "UNIFORM_SINGLE_TOKEN_DECODE"), ((1 << 20) + 1, "NEVER")):
        core.decoding = SimpleNamespace(max_keys=most)
        assert Builder.get_cudagraph_support(None, None).name == wanted
