"""benchmarks/decode_study.py and its policies."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from shareprefill.errors import ConfigError
from shareprefill.runtime.interface import attached

ROOT = Path(__file__).parents[2]
LAYERS, UNITS, STEPS, BLOCKS, BLOCK = 2, 3, 12, 60, 16
PROMPT = BLOCKS * BLOCK - STEPS


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def calibration() -> Any:
    from decode_policies import Calibration, Steps

    draw = torch.Generator().manual_seed(3)

    def maps(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, BLOCKS, generator=draw) * 3).softmax(-1)

    units = LAYERS * UNITS
    sizes = (units, STEPS), (units, STEPS), (units,), (units,)
    steps = Steps(*(maps(*size) for size in sizes), prompt=PROMPT, block=BLOCK)
    return Calibration(LAYERS, [steps], torch.rand(units, generator=draw))


def layer_of(steps: Any, layer: int) -> Any:
    from decode_policies import Steps

    own = slice(layer * UNITS, (layer + 1) * UNITS)
    maps = (steps.mass[own], steps.bounds[own], steps.last[own], steps.vertical[own])
    return Steps(*maps, prompt=steps.prompt, block=steps.block)


def kept(policy: Any, calibration: Any) -> torch.Tensor:
    layers = range(LAYERS)
    steps = calibration.prompts[0]
    return torch.cat([policy.keep(layer, layer_of(steps, layer)) for layer in layers])


@pytest.mark.parametrize(
    "spec",
    [
        *("oracle", "oracle+cuts", "last", "vertical", "quest", "own/4", "own/4+cuts", "own/4>"),
        *("pivots:.2", "pivots:.2/4", "pivots:.2+cuts", "pivots:.2+effect", "planned"),
    ],
)
def test_policies_read_what_they_are_allowed(spec: str, calibration: Any) -> None:
    from decode_policies import make_policy

    policy = make_policy(spec, 0.5, BLOCK, calibration)
    assert policy is not None
    keep = kept(policy, calibration)
    steps = calibration.prompts[0]
    assert keep[:, steps.always()].all()
    reads = keep.sum(-1).double() / steps.visible.sum(-1)
    assert 0.3 < reads.mean() + policy.extra <= 0.5 + 1e-6


def test_a_policy_whose_choosing_takes_all_reads_is_none(calibration: Any) -> None:
    from decode_policies import make_policy

    assert make_policy("own/4", 0.25, BLOCK, calibration) is None
    assert make_policy("quest", 1 / BLOCK, BLOCK, calibration) is None
    with pytest.raises(ConfigError, match="not known"):
        make_policy("guess", 0.2, BLOCK, calibration)


def test_units_read_what_their_pivot_saw_last(calibration: Any) -> None:
    from decode_policies import Shared

    policy = Shared(torch.tensor([1, 1, 1, 1, 4, 4]), every=4, density=0.2)
    keep = kept(policy, calibration)
    steps = calibration.prompts[0]
    dense = torch.zeros(6, STEPS, dtype=torch.bool)
    dense[[1, 4], ::4] = True
    assert torch.equal(keep.sum(-1) == steps.visible.sum(-1), dense)
    assert torch.equal(keep[0], keep[3])
    # Between two refreshes nothing changes; at them it does.
    assert torch.equal(keep[0, 4], keep[0, 7])
    assert not torch.equal(keep[0, 3], keep[0, 4])
    best = steps.mass[1, 4].masked_fill(steps.always()[4], 0).argmax()
    assert keep[0, 4:8, best].all()


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = LlamaConfig(vocab_size=64, max_position_embeddings=512, **sizes, **heads)
    return LlamaForCausalLM(config).eval()


def prompt_of(model: Any, ids: torch.Tensor) -> Any:
    from decode_study import Prefill, Prompt

    prefill = Prefill()
    with torch.no_grad(), attached(model, prefill):
        model(input_ids=ids[None], use_cache=False)
    keys, values = ([t.float() for t in part] for part in (prefill.key, prefill.value))
    return Prompt(keys, values, prefill.last, prefill.vertical)


def test_dense_steps_give_what_the_model_gives(model: Any) -> None:
    from decode_study import Decode, greedy, run_steps

    ids = torch.randint(0, 64, (120,))
    prompt = prompt_of(model, ids[:100])
    with torch.no_grad():
        whole = model.model(input_ids=ids[None]).last_hidden_state[0]
        logits = model(input_ids=ids[None, :100]).logits[0]
        expected = model.generate(ids[None, :100], max_new_tokens=6, do_sample=False)[0, 100:]
    states = run_steps(model, ids, 100, Decode(prompt))
    torch.testing.assert_close(states, whole[100:], rtol=1e-2, atol=1e-2)  # keys are float16
    found = greedy(model, ids[:100], int(logits[-1].argmax()), prompt, 6)
    assert found.tolist() == expected.tolist()


def test_blocks_that_are_not_read_are_hidden() -> None:
    from decode_policies import Steps
    from decode_study import Decode, Prompt

    class Newest:
        extra = 0.25

        def keep(self, layer: int, steps: Steps) -> torch.Tensor:
            return steps.always().expand(steps.mass.shape)

    query, old, new = torch.randn(4, 20, 8), torch.randn(2, 2, 200, 8), torch.randn(2, 2, 20, 8)
    maps = torch.rand(4, 13)
    prompt = Prompt([old[0]], [old[1]], [maps], [maps])
    call = SimpleNamespace(layer=0, query=query[None], key=new[:1], value=new[1:], scale=0.3)
    handler = Decode(prompt, Newest(), 16)
    found = handler(cast(Any, call))
    places, positions = torch.arange(220), torch.arange(200, 220)[:, None]
    read = (places < 16) | (places // 16 >= (positions - 63) // 16)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query,
        *(torch.cat((old[n], new[n]), 1).repeat_interleave(2, 0) for n in (0, 1)),
        attn_mask=read & (places <= positions),
        scale=0.3,
    )
    torch.testing.assert_close(found[0], expected)
    assert handler.kept[0] == pytest.approx(0.25 + 6 / 13.5, abs=0.04)


def test_a_stream_asks_for_what_its_prompt_holds() -> None:
    from decode_study import quotation, stream

    from shareprefill.models import load_tokenizer

    tokenizer = load_tokenizer("sp-tiny")
    for task in ("retr_kv", "needle"):
        prompt, pieces = stream(task, tokenizer, 600, 5)
        assert len(pieces) > 1
        assert all(answer.strip().strip('".') in prompt for answer, _ in pieces)
    words = [f"w{n} " for n in range(100)]
    prompt, answer = quotation(words)
    assert prompt.endswith("w63 ")
    assert answer.startswith("w64 w65")
