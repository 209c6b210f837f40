"""Sparse decode steps of a session: what they do as dense ones do, and what is dense, and said."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import StaticCache

from shareprefill import share_prefill
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ConfigError
from shareprefill.runtime import passes
from shareprefill.runtime import steps as decode_steps
from shareprefill.runtime.generation import cache_of, generate
from shareprefill.runtime.session import Session
from shareprefill.runtime.steps import (
    NO_PROMPT,
    NOT_CAUSAL,
    OTHER_MASK,
    PADDED_INSIDE,
    TOO_LONG,
    TOO_SHORT,
)
from tests.support.families import FAMILIES, build
from tests.support.tiny import tiny_artifact, tiny_llama, token_ids

# All blocks are read, prompts are dense: answers are the model's own.
ALL = RuntimeConfig(min_tokens=0, max_density=1e-9, decode="sparse", decode_density=1.0)
FEW = RuntimeConfig(min_tokens=0, max_density=1e-9, decode="sparse", decode_density=0.3)
CLOSE: Any = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


def session_of(model: Any, config: RuntimeConfig) -> Session:
    return share_prefill(model, tiny_artifact(model), config)


def test_steps_go_by_their_own_effects_where_they_are_known() -> None:
    model = tiny_llama()
    artifact = tiny_artifact(model)
    shape = artifact.policy.shape
    for of_steps in (None, torch.rand(shape)):
        effects: dict[str, Any] = {"effect": torch.rand(shape), "step_effect": of_steps}
        session = share_prefill(model, replace(artifact, **effects), FEW)
        with session:
            assert session.steps is not None
            expected = effects["effect"] if of_steps is None else of_steps
            found = session.steps.decoding.effect
            assert found is not None
            assert torch.equal(found, expected)


# Options of generate(), and the sparse steps and the dense ones, by the reason, after 150 tokens.
WAYS: dict[str, tuple[dict[str, Any], int, dict[str, int]]] = {
    "greedy": ({}, 5, {}),
    "static cache": ({"cache_implementation": "static"}, 5, {}),
    "chunks": ({"prefill_chunk_size": 40}, 5, {}),
    "beams": ({"num_beams": 3}, 0, {NO_PROMPT: 15}),
    "no cache": ({"use_cache": False}, 0, {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate(model: Any, way: str) -> None:
    options, steps, dense = WAYS[way]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **options}
    ids = token_ids(1, 75).repeat(1, 2)
    with session_of(model, ALL) as session:
        found = model.generate(ids, **options)
    assert torch.equal(found, model.generate(ids, **options))
    report = session.report().decoding
    assert report is not None
    density = 1.0 if steps or dense else None
    assert (report.steps, report.dense_steps, report.density) == (steps, dense, density)


@pytest.mark.parametrize("drafts", ["prompt lookup", "assistant"])
def test_drafts_are_verified_densely(model: Any, drafts: str) -> None:
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if drafts == "assistant":
        options = {"assistant_model": tiny_llama(seed=1, num_hidden_layers=1)}
    ids = token_ids(1, 75).repeat(1, 2)
    with session_of(model, ALL) as session:
        found = model.generate(ids, max_new_tokens=6, do_sample=False, **options)
    assert torch.equal(found, model.generate(ids, max_new_tokens=6, do_sample=False, **options))
    report = session.report()
    assert report.decoding is not None
    # Passes of several tokens are prefills; a cache that was cropped is not the one that was read.
    assert report.decoding.steps == 0
    assert set(report.decoding.dense_steps) <= {NO_PROMPT}
    assert report.dense_prefills >= 1


@torch.no_grad()
def test_few_blocks_are_read_and_counted(model: Any) -> None:
    ids = token_ids(1, 900)
    with session_of(model, FEW) as session:
        out = model(input_ids=ids[:, :-30], use_cache=True)
        logits = []
        for place in range(870, 900):
            out = model(input_ids=ids[:, place : place + 1], **cache_of(out))
            logits.append(out.logits[:, -1])
    own = model(input_ids=ids).logits[:, -30:]
    error = (torch.stack(logits, 1) - own).norm() / own.norm()
    assert 1e-4 < error < 0.5
    report = session.report()
    assert report.decoding is not None
    assert report.decoding.steps == 30
    assert report.decoding.density is not None
    assert 0.25 < report.decoding.density < 0.6
    assert report.summary().splitlines()[-1] == (
        f"decoding: 30 sparse steps; density {report.decoding.density:.3f}"
    )
    assert json.loads(json.dumps(report.to_dict()))["decoding"]["dense_steps"] == {}
    session.reset()
    assert session.report().decoding.steps == 0  # pyright: ignore[reportOptionalMemberAccess]


def test_a_report_without_steps_tells_no_density(model: Any) -> None:
    with session_of(model, FEW) as session:
        model.generate(token_ids(1, 75), max_new_tokens=1)
    found = session.report()
    assert found.decoding is not None
    assert (found.decoding.steps, found.decoding.dense_steps) == (0, {})
    assert found.decoding.density is None
    assert found.summary().endswith("\ndecoding: no steps")
    assert found.to_dict()["decoding"]["density"] is None


@torch.no_grad()
def test_a_mask_that_is_written_over_is_read_anew(model: Any) -> None:
    ids, mask = token_ids(1, 160), torch.zeros(1, 1, 1, 200, dtype=torch.bool)
    cache = StaticCache(config=model.config, max_cache_len=200)
    with session_of(model, ALL) as session:
        model(input_ids=ids[:, :150], past_key_values=cache, use_cache=True)
        logits = []
        for place in range(150, 160):
            mask[..., : place + 1] = True
            step = {"input_ids": ids[:, place : place + 1], "attention_mask": mask}
            logits.append(model(**step, past_key_values=cache, use_cache=True).logits[:, -1])
    torch.testing.assert_close(
        torch.stack(logits, 1), model(input_ids=ids).logits[:, 150:], **CLOSE
    )
    assert session.report().decoding.steps == 10  # pyright: ignore[reportOptionalMemberAccess]


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_rows_of_a_padded_batch_equal_their_own_steps(model: Any, static: bool) -> None:
    lengths, steps = (400, 333, 90), 12
    ids = [token_ids(1, length + steps) for length in lengths]

    def run(rows: list[int]) -> torch.Tensor:
        longest = max(lengths[row] for row in rows)
        pads = [longest - lengths[row] for row in rows]
        batch = torch.cat(
            [torch.nn.functional.pad(ids[r], (pad, 0)) for r, pad in zip(rows, pads, strict=True)]
        )
        mask = torch.ones_like(batch)
        for row, pad in enumerate(pads):
            mask[row, :pad] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        given = {}
        if static:
            from transformers import StaticCache

            given = {"past_key_values": StaticCache(model.config, max_cache_len=longest + 100)}
        out = model(
            input_ids=batch[:, :longest],
            attention_mask=mask[:, :longest],
            position_ids=positions[:, :longest],
            use_cache=True,
            **given,
        )
        found = []
        for place in range(longest, longest + steps):
            out = model(
                input_ids=batch[:, place : place + 1],
                attention_mask=mask[:, : place + 1],
                position_ids=positions[:, place : place + 1],
                **cache_of(out),
            )
            found.append(out.logits[:, -1])
        return torch.stack(found, 1)

    with session_of(model, FEW) as session:
        together = run([0, 1, 2])
        report = session.report().decoding
        assert report is not None
        assert (report.steps, report.dense_steps) == (3 * steps, {})
        alone = torch.cat([run([row]) for row in range(3)])
    torch.testing.assert_close(together, alone, **CLOSE)


@torch.no_grad()
def test_conversations_keep_apart(model: Any) -> None:
    ids = [token_ids(1, 420) for _ in range(2)]

    def turns(session: Session, order: list[int]) -> list[torch.Tensor]:
        found: list[list[torch.Tensor]] = [[], []]
        with session:
            outs = {n: model(input_ids=ids[n][:, :400], use_cache=True) for n in set(order)}
            for n in order:
                place = 400 + len(found[n])
                outs[n] = model(input_ids=ids[n][:, place : place + 1], **cache_of(outs[n]))
                found[n].append(outs[n].logits)
        return [torch.cat(logits, 1) for logits in found if logits]

    session = session_of(model, FEW)
    together = turns(session, [0, 1] * 10)
    (first,), (second,) = (turns(session_of(model, FEW), [n] * 10) for n in (0, 1))
    torch.testing.assert_close(together[0], first, rtol=0, atol=0)
    torch.testing.assert_close(together[1], second, rtol=0, atol=0)
    report = session.report().decoding
    assert report is not None
    assert (report.steps, report.dense_steps) == (20, {})


@torch.no_grad()
def test_a_few_rows_are_no_new_prompt(model: Any) -> None:
    """Drafts that are verified, a word of the user: coordinates are of more rows than these."""
    ids, session = token_ids(1, 520), session_of(model, FEW)
    found = []
    with session:
        out = None
        for start, stop in ((0, 400), (400, 401), (401, 406), (406, 407), (407, 460), (460, 461)):
            cache = {"use_cache": True} if out is None else cache_of(out)
            out = model(input_ids=ids[:, start:stop], **cache)
            assert session.steps is not None
            (known,) = session.steps._known.values()
            found.append(known.state._sketches[0])
    assert found[0] is found[1] is found[2] is found[3]
    assert found[3] is not found[4]
    report = session.report().decoding
    assert report is not None
    assert (report.steps, report.dense_steps) == (3, {})


@torch.no_grad()
@pytest.mark.parametrize("decode", ["dense", "sparse"])
def test_only_sessions_with_sparse_steps_follow_caches(model: Any, decode: str) -> None:
    with session_of(model, RuntimeConfig(min_tokens=0, decode=decode)):
        cache = model(input_ids=token_ids(1, 20), use_cache=True).past_key_values
    assert (cache in passes._conversations) == (decode == "sparse")


def _reorder(cache: Any) -> Any:
    cache.reorder_cache(torch.tensor([0]))
    return cache


def _regrow(cache: Any) -> Any:
    for layer in cache.layers:
        layer.keys = layer.keys[:, :, :-1]
        layer.values = layer.values[:, :, :-1]
    return cache


@torch.no_grad()
@pytest.mark.parametrize("change", [_reorder, _regrow, copy.deepcopy])
def test_a_changed_cache_is_decoded_densely(model: Any, change: Callable[[Any], Any]) -> None:
    ids = token_ids(1, 402)
    with session_of(model, FEW) as session:
        out = model(input_ids=ids[:, :400], use_cache=True)
        out = model(input_ids=ids[:, 400:401], **cache_of(out))
        [(name, cache)] = cache_of(out).items()
        cache = change(cache)
        with session.dense():
            own = model(input_ids=ids[:, 401:402], **{name: copy.deepcopy(cache)}).logits
        found = model(input_ids=ids[:, 401:402], **{name: cache}).logits
        torch.testing.assert_close(found, own, **CLOSE)
        report = session.report().decoding
        assert report is not None
        assert (report.steps, report.dense_steps) == (1, {NO_PROMPT: 1})
        # The next prompt on it is known again.
        out = model(input_ids=ids[:, :64], **{name: cache}, use_cache=True)
        model(input_ids=ids[:, :1], **cache_of(out))
    report = session.report().decoding
    assert report is not None
    assert (report.steps, report.dense_steps) == (2, {NO_PROMPT: 1})


@torch.no_grad()
def test_what_other_passes_filled_is_not_known(model: Any) -> None:
    ids = token_ids(1, 402)
    outside = model(input_ids=ids[:, :400], use_cache=True)
    with session_of(model, FEW) as session:
        model(input_ids=ids[:, 400:401], **cache_of(outside))
        with session.dense():
            out = model(input_ids=ids[:, :400], use_cache=True)
        model(input_ids=ids[:, 400:401], **cache_of(out))
        model(input_ids=ids[:, :1])
    report = session.report().decoding
    assert report is not None
    assert (report.steps, report.dense_steps) == (0, {NO_PROMPT: 3})
    # A dense step of a known cache is no other pass: its key is there for the next one.
    with session_of(model, FEW) as session:
        out = model(input_ids=ids[:, :400], use_cache=True)
        with session.dense():
            out = model(input_ids=ids[:, 400:401], **cache_of(out))
        model(input_ids=ids[:, 401:402], **cache_of(out))
    report = session.report().decoding
    assert report is not None
    assert (report.steps, report.dense_steps) == (1, {})


@torch.no_grad()
def test_a_static_cache_that_other_passes_wrote_to_is_not_known(model: Any) -> None:
    from transformers import StaticCache

    ids = token_ids(1, 404)
    cache = {"past_key_values": StaticCache(model.config, max_cache_len=500)}
    session = session_of(model, FEW)
    with session:
        model(input_ids=ids[:, :400], **cache)
        model(input_ids=ids[:, 400:401], **cache)
    model(input_ids=ids[:, 401:402], **cache)
    with session:
        model(input_ids=ids[:, 402:403], **cache)
    report = session.report().decoding
    assert report is not None
    assert (report.steps, report.dense_steps) == (1, {NO_PROMPT: 1})


def test_a_static_cache_of_inference_mode_is_not_known(model: Any) -> None:
    """Nobody counts what is written into it there, so another prompt would not be noticed."""
    ids = token_ids(1, 402)
    with torch.inference_mode():
        cache = StaticCache(model.config, max_cache_len=500)
        session = session_of(model, FEW)
        with session:
            model(input_ids=ids[:, :400], past_key_values=cache)
        cache.reset()
        model(input_ids=ids[:, :401].flip(1), past_key_values=cache)
        with session:
            model(input_ids=ids[:, 401:], past_key_values=cache)
    report = session.report().decoding
    assert report is not None
    assert (report.steps, report.dense_steps) == (0, {NO_PROMPT: 1})


@torch.no_grad()
def test_masks_that_hide_keys_are_decoded_densely(model: Any) -> None:
    ids = token_ids(2, 402)
    own_mask = torch.ones(2, 401)
    own_mask[1, 200:210] = 0

    def step(first: torch.Tensor | None, later: torch.Tensor | None) -> Any:
        with session_of(model, FEW) as session:
            out = model(input_ids=ids[:, :400], attention_mask=first, use_cache=True)
            found = model(input_ids=ids[:, 400:401], attention_mask=later, **cache_of(out)).logits
        with torch.no_grad():
            out = model(input_ids=ids[:, :400], attention_mask=first, use_cache=True)
            own = model(input_ids=ids[:, 400:401], attention_mask=later, **cache_of(out)).logits
        torch.testing.assert_close(found, own, **CLOSE)
        report = session.report().decoding
        assert report is not None
        assert report.steps == 0
        return report.dense_steps

    assert step(None, own_mask) == {OTHER_MASK: 2}
    first_hidden = torch.ones(2, 401)
    first_hidden[1, :9] = 0
    assert step(None, first_hidden) == {OTHER_MASK: 2}
    last_hidden = torch.ones(2, 401)
    last_hidden[:, 390:] = 0
    assert step(None, last_hidden) == {OTHER_MASK: 2}
    assert step(own_mask[:, :400], own_mask) == {PADDED_INSIDE: 2}
    behind = torch.ones(2, 401)
    behind[1, 390:400] = 0
    assert step(behind[:, :400], behind) == {PADDED_INSIDE: 2}


def test_short_sequences_are_decoded_densely(model: Any) -> None:
    config = RuntimeConfig(min_tokens=403, decode="sparse")
    with session_of(model, config) as session:
        model.generate(token_ids(1, 400), max_new_tokens=6, do_sample=False, eos_token_id=None)
    report = session.report().decoding
    assert report is not None
    assert (report.steps, report.dense_steps) == (3, {TOO_SHORT: 2})
    # Padding is no part of a sequence: the longest has 393 tokens and more.
    ids, mask = token_ids(2, 412), torch.ones(2, 412, dtype=torch.long)
    mask[0, :20], mask[1, :30] = 0, 0
    options = {"max_new_tokens": 13, "do_sample": False, "eos_token_id": None}
    with session_of(model, config) as session:
        model.generate(ids, attention_mask=mask, **options)
    report = session.report().decoding
    assert report is not None
    assert (report.steps, report.dense_steps) == (2 * 2, {TOO_SHORT: 2 * 10})


def test_sequences_beyond_a_list_of_blocks_are_decoded_densely(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_steps, "MOST_BLOCKS", 3)
    with session_of(model, FEW) as session:
        model.generate(token_ids(1, 94), max_new_tokens=6, do_sample=False, eos_token_id=None)
    report = session.report().decoding
    assert report is not None
    # 95 and 96 tokens are three blocks of 32.
    assert (report.steps, report.dense_steps) == (2, {TOO_LONG: 3})


# Steps that are sparse in some layer, and those that are dense in some, by the reason.
KINDS: dict[str, tuple[int, dict[str, int]]] = {
    "qwen3": (2, {}),
    "deepseek_v3": (2, {}),
    "diffllama": (2, {}),
    "gemma3_text": (2, {"sliding window of 24, 2 of 3 layers": 2}),
    "llama4_text": (2, {f"{NOT_CAUSAL}, 1 of 2 layers": 2}),
    "gemma2": (0, {"logit soft-capping": 2}),
    "gpt_oss": (0, {"attention sinks": 2}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_layers_of_another_kind_are_decoded_densely_and_said(name: str) -> None:
    model = build(next(family for family in FAMILIES if family.name == name))
    ids = token_ids(1, 200)

    def run() -> torch.Tensor:
        found = []
        out = model(input_ids=ids[:, :198], use_cache=True)
        for place in (198, 199):
            out = model(input_ids=ids[:, place : place + 1], **cache_of(out))
            found.append(out.logits)
        return torch.cat(found)

    config = replace(ALL, policy="oracle", gamma=1.0)
    with share_prefill(model, config=config) as session:
        found = run()
    torch.testing.assert_close(found, run(), **CLOSE)
    report = session.report().decoding
    assert report is not None
    assert (report.steps, report.dense_steps, report.density) == (*KINDS[name], 1.0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gemma3_text", "sliding window of 24, 2 of 3 layers"),
        ("llama4_text", f"{NOT_CAUSAL}, 1 of 2 layers"),
    ],
)
def test_padding_does_not_change_why_layers_of_another_kind_are_dense(name: str, why: str) -> None:
    model = build(next(family for family in FAMILIES if family.name == name))
    ids, mask = token_ids(2, 100), torch.ones(2, 100, dtype=torch.long)
    mask[0, :30] = 0
    with share_prefill(model, config=replace(ALL, policy="oracle", gamma=1.0)) as session:
        out = model(input_ids=ids[:, :99], attention_mask=mask[:, :99], use_cache=True)
        model(input_ids=ids[:, 99:], attention_mask=mask, **cache_of(out))
    report = session.report().decoding
    assert report is not None
    assert (report.steps, report.dense_steps) == (2, {why: 2})


def test_answers_by_the_greedy_loop_are_the_models_own(model: Any) -> None:
    class Tokenizer:
        def decode(self, ids: Any, **_: Any) -> str:
            return " ".join(map(str, ids))

    ids = token_ids(1, 200)[0]
    own = generate(model, Tokenizer(), ids, max_new_tokens=8)
    with session_of(model, ALL) as session:
        found = generate(model, Tokenizer(), ids, max_new_tokens=8, prefill_chunk=64)
    assert found.text == own.text
    report = session.report().decoding
    assert report is not None
    assert report.steps == found.new_tokens - 1


def test_it_is_off_by_default_and_options_are_checked(model: Any) -> None:
    assert RuntimeConfig().decode == "dense"
    with share_prefill(model, tiny_artifact(model)) as session:
        model.generate(token_ids(1, 40), max_new_tokens=3)
    assert session.report().decoding is None
    with pytest.raises(ConfigError, match="decode = 'few' is not allowed"):
        RuntimeConfig(decode="few")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="decode_density = 0 is not allowed"):
        RuntimeConfig(decode="sparse", decode_density=0)
    with pytest.raises(ConfigError, match="decode_density = 0.3 is for sparse decode steps"):
        RuntimeConfig(decode_density=0.3)


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.parametrize("static", [False, True])
def test_steps_on_a_gpu_are_those_of_a_cpu_and_wait_for_nothing(
    static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import StaticCache

    def watched(attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **options: Any) -> torch.Tensor:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return attend(*args, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    model = tiny_llama(
        hidden_size=256, head_dim=64, max_position_embeddings=2**15, initializer_range=0.1
    )
    ids, steps = token_ids(2, 9040), 40

    def run(device: str, config: RuntimeConfig) -> tuple[torch.Tensor, Session]:
        model.to(device)
        tokens, given = ids.to(device), {}
        if static:
            given = {"past_key_values": StaticCache(model.config, max_cache_len=9100)}
        found = []
        with session_of(model, config) as session:
            out = model(input_ids=tokens[:, :-steps], use_cache=True, logits_to_keep=1, **given)
            for place in range(9000, 9040):
                # A static cache's mask tells the host where it ends.
                if device == "cuda" and place == 9030 and not static and session.steps:
                    monkeypatch.setattr(session.steps, "attend", watched(session.steps.attend))
                out = model(input_ids=tokens[:, place : place + 1], **cache_of(out))
                found.append(out.logits[:, -1].float().cpu())
        return torch.stack(found, 1), session

    own, _ = run("cuda", replace(ALL, decode="dense", decode_density=None))
    everything, session = run("cuda", ALL)
    assert (everything - own).norm() / own.norm() < 1e-3
    few, session = run("cuda", FEW)
    expected, on_cpu = run("cpu", FEW)
    report, other = session.report().decoding, on_cpu.report().decoding
    assert report is not None
    assert other is not None
    assert (report.steps, report.dense_steps) == (2 * steps, {})
    assert report.density == pytest.approx(other.density, rel=0.1)
    # Both are as far from dense steps; blocks at a threshold may be on either side.
    ours, theirs = (((found - own).norm() / own.norm()).item() for found in (few, expected))
    assert ours < 1.5 * theirs + 1e-3
