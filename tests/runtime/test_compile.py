"""Models compiled with torch.compile in any way, before a session or inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from shareprefill import share_prefill
from shareprefill.artifact import Policy
from shareprefill.config import RuntimeConfig
from shareprefill.runtime.generation import cache_of
from shareprefill.runtime.session import Session
from tests.support.tiny import tiny_artifact, tiny_llama, token_ids

P, S, R, V = Policy.PIVOT, Policy.SHARE, Policy.SAMPLED, Policy.VERTICAL_SLASH
# Two layers and few tokens: every layer is compiled anew, for each length and each session.
POLICIES = [[P, S, R, V], [S, R, P, V]]
LAYERS, TOKENS = 2, 60
SPARSE = RuntimeConfig(gamma=0.6, min_tokens=0, max_density=1.0)
CLOSE: Any = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def fresh() -> Any:
    model = tiny_llama(num_hidden_layers=LAYERS)
    model.set_attn_implementation("sdpa")
    return model


def session_of(model: Any) -> Session:
    return share_prefill(model, tiny_artifact(model, POLICIES), SPARSE)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def whole(model: Any, **options: Any) -> Any:
    return torch.compile(model, **options)


def in_place(model: Any, **options: Any) -> Any:
    model.compile(**options)
    return model


def layers(model: Any, **options: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(**options)
    return model


def attention(model: Any, **options: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn = torch.compile(layer.self_attn, **options)
    return model


def mlps(model: Any, **options: Any) -> Any:
    for layer in model.model.layers:
        layer.mlp = torch.compile(layer.mlp, **options)
    return model


# Compiled in place, and by its `forward`: in the tests of caches and of generation.
WAYS = [whole, layers, attention, mlps]


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_gives_what_an_uncompiled_one_gives(way: Callable[..., Any]) -> None:
    plain, model, ids = fresh(), fresh(), token_ids(1, TOKENS)
    own = logits(plain, ids)
    with session_of(plain) as session:
        sparse = logits(plain, ids)
    expected = session.report()
    ours = session_of(model)
    compiled = way(model, backend="eager")
    # Graphs of dense attention are there when the session begins.
    torch.testing.assert_close(logits(compiled, ids), own, **CLOSE)
    with ours:
        for _ in range(2):
            torch.testing.assert_close(logits(compiled, ids), sparse, **CLOSE)
    torch.testing.assert_close(logits(compiled, ids), own, **CLOSE)
    report = ours.report()
    assert (report.prefills, report.dense_prefills) == (2, 0)
    assert report.density == pytest.approx(expected.density)
    assert report.policies == {name: 2 * n for name, n in expected.policies.items()}


def test_a_model_compiled_inside_a_session_may_leave_it() -> None:
    model, ids = fresh(), token_ids(1, TOKENS)
    own = logits(model, ids)
    with session_of(model) as session:
        sparse = logits(model, ids)
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(logits(compiled, ids), sparse, **CLOSE)
        with session.dense():
            torch.testing.assert_close(logits(compiled, ids), own, **CLOSE)
    torch.testing.assert_close(logits(compiled, ids), own, **CLOSE)


def test_lengths_may_change_in_a_dynamically_compiled_model() -> None:
    plain, model = fresh(), fresh()
    compiled = torch.compile(model, backend="eager", dynamic=True)
    with session_of(plain) as expected, session_of(model) as session:
        for tokens in (40, 60, 5):
            ids = token_ids(2, tokens)
            torch.testing.assert_close(logits(compiled, ids), logits(plain, ids), **CLOSE)
    found, wanted = session.report(), expected.report()
    assert (found.prefills, found.dense_prefills) == (wanted.prefills, wanted.dense_prefills)
    assert found.density == pytest.approx(wanted.density)


@torch.no_grad()
def test_a_compiled_model_takes_padding_chunks_and_caches() -> None:
    plain, model = fresh(), fresh()
    compiled = in_place(model, backend="eager")
    ids, mask = token_ids(2, TOKENS), torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, :17] = 0

    def run(runner: Any) -> list[torch.Tensor]:
        padded = runner(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        step = runner(input_ids=ids[:, :32], use_cache=True)
        rest = runner(input_ids=ids[:, 32:], **cache_of(step)).logits
        return [padded, step.logits, rest]

    with session_of(plain), session_of(model):
        for found, expected in zip(run(compiled), run(plain), strict=True):
            torch.testing.assert_close(found, expected, **CLOSE)


def test_generation_of_a_compiled_model_with_a_static_cache() -> None:
    plain, model = fresh(), fresh()
    ids, options = token_ids(1, TOKENS), {"max_new_tokens": 5, "do_sample": False}
    with session_of(plain):
        expected = plain.generate(ids, cache_implementation="static", **options)
    model.forward = torch.compile(model.forward, backend="eager")
    with session_of(model):
        found = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("inside", [False, True])
def test_a_whole_graph_is_refused_with_what_to_do(inside: bool) -> None:
    model, ids = fresh(), token_ids(1, TOKENS)
    own = logits(model, ids)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    if not inside:
        torch.testing.assert_close(logits(compiled, ids), own, **CLOSE)
    # torch raises it, while it compiles: an error of ours would not get through.
    with (
        session_of(model),
        pytest.raises(torch._dynamo.exc.Unsupported, match=r"compile .* without fullgraph=True"),
    ):
        logits(compiled, ids)
    torch.testing.assert_close(logits(compiled, ids), own, **CLOSE)


@pytest.mark.slow
def test_a_model_compiled_by_inductor_with_less_overhead() -> None:
    plain, model, ids = fresh(), fresh(), token_ids(1, TOKENS)
    compiled = torch.compile(model, mode="reduce-overhead")
    with session_of(plain), session_of(model):
        torch.testing.assert_close(logits(compiled, ids), logits(plain, ids), **CLOSE)
    torch.testing.assert_close(logits(compiled, ids), logits(plain, ids), **CLOSE)


@torch.no_grad()
def test_a_compiled_model_decodes_sparsely() -> None:
    config = RuntimeConfig(min_tokens=0, max_density=1e-9, decode="sparse", decode_density=0.3)
    plain, model, ids = fresh(), fresh(), token_ids(1, 122)
    compiled = attention(model, backend="eager")
    found = []
    for runs in (plain, compiled):
        with share_prefill(runs, tiny_artifact(runs, POLICIES), config) as session:
            out = runs(input_ids=ids[:, :120], use_cache=True)
            for place in (120, 121):
                out = runs(input_ids=ids[:, place : place + 1], **cache_of(out))
                found.append(out.logits)
        report = session.report().decoding
        assert report is not None
        assert (report.steps, report.dense_steps) == (2, {})
    torch.testing.assert_close(torch.cat(found[2:]), torch.cat(found[:2]), **CLOSE)
