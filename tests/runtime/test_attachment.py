"""Sessions entered and left in any order, copies of a model made inside, and dense calls."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import pickle
import threading
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from shareprefill import share_prefill
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ConfigError, UnsupportedError
from shareprefill.runtime.generation import cache_of
from shareprefill.runtime.interface import AttentionCall, attached, dense_attention
from shareprefill.runtime.session import Session
from tests.support.tiny import tiny_artifact, tiny_llama, token_ids

GAMMAS = (0.4, 0.6, 0.8)


@pytest.fixture
def model() -> Any:
    own = tiny_llama()
    own.set_attn_implementation("sdpa")
    return own


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def sessions(model: Any, count: int = 3) -> list[Session]:
    """Sessions whose patterns, and with them the logits, differ."""
    artifact = tiny_artifact(model)
    configs = [RuntimeConfig(min_tokens=0, max_density=1.0, gamma=gamma) for gamma in GAMMAS]
    return [share_prefill(model, artifact, config) for config in configs[:count]]


def alone(session: Session, ids: torch.Tensor) -> torch.Tensor:
    with session:
        return logits(session.model, ids)


def is_as_before(model: Any, hooks: int = 0) -> bool:
    decoder = model.get_decoder()
    name = model.config._attn_implementation
    return type(name) is str and name == "sdpa" and len(decoder._forward_pre_hooks) == hooks


def test_the_last_entered_session_that_is_still_in_holds_whatever_the_order_of_leaving() -> None:
    for order in permutations(range(3)):
        model = tiny_llama()
        model.set_attn_implementation("sdpa")
        ids, ours = token_ids(1, 120), sessions(model)
        own, expected = logits(model, ids), [alone(s, ids) for s in ours]
        assert not any(torch.allclose(own, e) for e in expected)
        for session in ours:
            session.__enter__()
        present = [0, 1, 2]
        for number in order:
            assert torch.equal(logits(model, ids), expected[present[-1]])
            ours[number].__exit__(None, None, None)
            present.remove(number)
        assert is_as_before(model)
        assert torch.equal(logits(model, ids), own)


def test_generators_may_hold_sessions_and_be_dropped(model: Any) -> None:
    ids, (x, y) = token_ids(1, 120), sessions(model, 2)
    own, of_x, of_y = logits(model, ids), alone(x, ids), alone(y, ids)

    def under(session: Session) -> Iterator[torch.Tensor]:
        with session:
            while True:
                yield logits(model, ids)

    first, second = under(x), under(y)
    assert torch.equal(next(first), of_x)
    assert torch.equal(next(second), of_y)
    assert torch.equal(next(first), of_y)
    first.close()
    assert torch.equal(next(second), of_y)
    del second
    gc.collect()
    assert is_as_before(model)
    assert torch.equal(logits(model, ids), own)


def test_a_generator_may_be_closed_by_another_thread(model: Any) -> None:
    (x,) = sessions(model, 1)

    def under() -> Iterator[None]:
        with x:
            yield

    held = under()
    next(held)
    in_thread(held.close)  # pyright: ignore[reportAttributeAccessIssue]
    assert is_as_before(model)
    assert torch.equal(alone(x, ids := token_ids(1, 120)), alone(x, ids))


def in_thread(work: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def test_every_thread_has_its_own_session_of_one_model(model: Any) -> None:
    ids, ours = token_ids(1, 120), sessions(model)
    own, expected = logits(model, ids), [alone(s, ids) for s in ours]
    found: list[list[torch.Tensor]] = [[], [], []]
    meet = threading.Barrier(3)

    def work(number: int) -> None:
        for _ in range(3):
            meet.wait(60)
            with ours[number]:
                meet.wait(60)
                found[number].append(logits(model, ids))
                meet.wait(60)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, one in zip(found, expected, strict=True):
        assert len(outputs) == 3
        assert all(torch.equal(output, one) for output in outputs)
    assert is_as_before(model)
    assert torch.equal(logits(model, ids), own)


def test_a_thread_without_a_session_takes_the_last_one_of_another(model: Any) -> None:
    ids, (x, y) = token_ids(1, 120), sessions(model, 2)
    of_x, of_y = alone(x, ids), alone(y, ids)
    with x:
        assert torch.equal(in_thread(lambda: logits(model, ids)), of_x)
        with y:
            assert torch.equal(in_thread(lambda: logits(model, ids)), of_y)
            assert torch.equal(in_thread(lambda: alone(x, ids)), of_x)
        assert torch.equal(in_thread(lambda: logits(model, ids)), of_x)
    assert is_as_before(model)


def test_every_asyncio_task_has_its_own_session(model: Any) -> None:
    ids, ours = token_ids(1, 120), sessions(model)
    expected = [alone(s, ids) for s in ours]

    async def work(session: Session) -> list[torch.Tensor]:
        outputs = []
        with session:
            for _ in range(2):
                await asyncio.sleep(0)
                outputs.append(logits(model, ids))
                outputs.append(await asyncio.to_thread(logits, model, ids))
        return outputs

    async def together() -> list[list[torch.Tensor]]:
        return await asyncio.gather(*(work(s) for s in ours))

    for outputs, one in zip(asyncio.run(together()), expected, strict=True):
        assert all(torch.equal(output, one) for output in outputs)
    assert is_as_before(model)


def test_one_session_may_be_entered_twice_and_again(model: Any) -> None:
    ids, (x, y) = token_ids(1, 120), sessions(model, 2)
    of_x, of_y = alone(x, ids), alone(y, ids)
    for _ in range(2):
        with x:
            with y, x:
                assert torch.equal(logits(model, ids), of_x)
            with y:
                assert torch.equal(logits(model, ids), of_y)
            assert torch.equal(logits(model, ids), of_x)
        assert is_as_before(model)


def test_an_exception_leaves_the_other_sessions_in(model: Any) -> None:
    ids, (x, y) = token_ids(1, 120), sessions(model, 2)
    of_x = alone(x, ids)

    def stopped() -> None:
        with y:
            raise KeyboardInterrupt

    with x:
        with pytest.raises(KeyboardInterrupt):
            stopped()
        assert torch.equal(logits(model, ids), of_x)
    assert is_as_before(model)


def test_models_of_one_configuration_object_may_be_left_in_any_order() -> None:
    one = tiny_llama()
    one.set_attn_implementation("sdpa")
    other = type(one)(one.config).eval()
    ids, (x,), (y,) = token_ids(1, 120), sessions(one, 1), sessions(other, 1)
    expected = logits(one, ids), logits(other, ids), alone(x, ids), alone(y, ids)
    x.__enter__()
    y.__enter__()
    assert torch.equal(logits(one, ids), expected[2])
    assert torch.equal(logits(other, ids), expected[3])
    x.__exit__(None, None, None)
    assert torch.equal(logits(other, ids), expected[3])
    with pytest.raises(UnsupportedError, match="outside a session"):
        logits(one, ids)
    y.__exit__(None, None, None)
    assert torch.equal(logits(one, ids), expected[0])
    assert torch.equal(logits(other, ids), expected[1])


def test_a_family_that_is_refused_stays_as_it_was() -> None:
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    own = GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=64,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global"], 2]],
            intermediate_size=48,
        )
    ).eval()
    before, expected = own.config._attn_implementation, logits(own, ids := token_ids(1, 8) % 64)
    with pytest.raises(UnsupportedError), attached(own, dense_attention):
        pass
    assert own.config._attn_implementation == before
    assert torch.equal(logits(own, ids), expected)


def in_memory(model: Any, _path: Path) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any, _path: Path) -> Any:
    return pickle.loads(pickle.dumps(model))  # noqa: S301


def torch_saved(model: Any, path: Path) -> Any:
    torch.save(model, path / "model.pt")
    return torch.load(path / "model.pt", weights_only=False)


def saved(model: Any, path: Path) -> Any:
    model.save_pretrained(path / "saved")
    written = json.loads((path / "saved" / "config.json").read_text())
    assert "shareprefill" not in json.dumps(written)
    return type(model).from_pretrained(path / "saved").eval()


def of_copied_config(model: Any, _path: Path) -> Any:
    made = type(model)(copy.deepcopy(model.config)).eval()
    made.load_state_dict(model.state_dict())
    return made


@pytest.mark.parametrize("duplicate", [in_memory, pickled, torch_saved, saved, of_copied_config])
def test_a_copy_made_inside_a_session_is_of_none(
    model: Any, duplicate: Callable[[Any, Path], Any], tmp_path: Path
) -> None:
    ids, (x,) = token_ids(1, 120), sessions(model, 1)
    own, of_x = logits(model, ids), alone(x, ids)
    with x:
        other = duplicate(model, tmp_path)
        assert type(other.config._attn_implementation) is str
        assert other.config._attn_implementation == "sdpa"
        assert torch.equal(logits(other, ids), own)
        assert torch.equal(logits(model, ids), of_x)
        # A copy may have a session of its own.
        (of_copy,) = sessions(other, 1)
        assert torch.equal(alone(of_copy, ids), of_x)
        assert torch.equal(logits(other, ids), own)
    assert torch.equal(logits(other, ids), own)
    assert is_as_before(model)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("inputs", ["plain", "padded", "packed", "generated", "chunks"])
def test_a_dense_call_is_the_models_own_bit_for_bit(name: str, inputs: str) -> None:
    model = tiny_llama()
    model.set_attn_implementation(name)
    ids, (x,) = token_ids(2, 120), sessions(model, 1)
    mask = torch.ones(2, 120, dtype=torch.int64)
    mask[1, :37] = 0
    positions = torch.cat([torch.arange(50), torch.arange(70)])[None]

    @torch.no_grad()
    def run() -> torch.Tensor:
        match inputs:
            case "plain":
                return model(input_ids=ids).logits
            case "padded":
                return model(input_ids=ids, attention_mask=mask).logits
            case "packed":
                packed = {"input_ids": ids[:1], "position_ids": positions, "use_cache": False}
                return model(**packed).logits
            case "generated":
                options = {"return_dict_in_generate": True, "output_logits": True}
                made = model.generate(ids, max_new_tokens=4, do_sample=False, **options)
                return torch.stack(made.logits)
        first = model(input_ids=ids[:, :70], use_cache=True)
        second = model(input_ids=ids[:, 70:], **cache_of(first)).logits
        return torch.cat([first.logits, second], 1)

    expected = run()
    with x:
        sparse = run()
        with x.dense():
            found = run()
        again = run()
    assert torch.equal(found, expected)
    assert not torch.equal(sparse, expected)
    assert torch.equal(again, sparse)


def test_a_dense_call_is_counted_apart(model: Any) -> None:
    ids, (x,) = token_ids(1, 120), sessions(model, 1)
    with x:
        logits(model, ids)
        before = x.report()
        with x.dense():
            logits(model, ids)
            model.generate(ids, max_new_tokens=3, do_sample=False)
        after = x.report()
    assert (before.requested_dense, after.requested_dense) == (0, 2)
    assert (after.prefills, after.dense_prefills) == (1, 0)
    assert after.density == before.density < 1
    x.reset()
    assert x.report().requested_dense == 0


def test_a_dense_call_of_one_thread_leaves_the_others_sparse(model: Any) -> None:
    ids, (x,) = token_ids(1, 120), sessions(model, 1)
    own, of_x = logits(model, ids), alone(x, ids)
    with x:
        with x.dense():
            assert torch.equal(in_thread(lambda: logits(model, ids)), of_x)
            assert torch.equal(logits(model, ids), own)

        def dense() -> torch.Tensor:
            with x.dense():
                return logits(model, ids)

        assert torch.equal(in_thread(dense), own)
        assert torch.equal(logits(model, ids), of_x)


def test_a_session_entered_inside_a_dense_call_holds(model: Any) -> None:
    ids, (x, y) = token_ids(1, 120), sessions(model, 2)
    own, of_y = logits(model, ids), alone(y, ids)
    with x, x.dense():
        with y:
            assert torch.equal(logits(model, ids), of_y)
        assert torch.equal(logits(model, ids), own)
    assert is_as_before(model)


def test_a_dense_call_outside_the_session_is_refused(model: Any) -> None:
    (x,) = sessions(model, 1)
    with pytest.raises(ConfigError, match="enter that first"), x.dense():
        pass


def test_soft_capping_is_the_models_own_in_a_dense_call() -> None:
    from tests.support.families import FAMILIES, build

    model = build(next(family for family in FAMILIES if family.name == "gemma2"))
    model.set_attn_implementation("eager")
    calls: list[int] = []

    def handler(call: AttentionCall) -> torch.Tensor:
        calls.append(call.layer)
        return dense_attention(call)

    from shareprefill.runtime.interface import computing_itself

    own = logits(model, ids := token_ids(1, 40))
    with attached(model, handler), computing_itself(model, lambda *_: None):
        found = logits(model, ids)
    assert torch.equal(found, own)
    assert not calls
