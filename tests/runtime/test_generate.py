"""What transformers does around a model, under a session: its ways to generate, and to place it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from shareprefill import share_prefill
from shareprefill.artifact import Policy
from shareprefill.config import RuntimeConfig
from shareprefill.runtime.generation import cache_of
from tests.support.checkpoint import save_checkpoint
from tests.support.families import FAMILIES, build
from tests.support.tiny import tiny_artifact, tiny_llama, token_ids

P, S, R, V = Policy.PIVOT, Policy.SHARE, Policy.SAMPLED, Policy.VERTICAL_SLASH
POLICIES = [[P, S, R, V], [S, S, P, R], [V, R, S, S]]
EVERYTHING = RuntimeConfig(gamma=1.0, slack=1.0, min_tokens=0, max_density=1.0)
SPARSE = RuntimeConfig(gamma=0.6, slack=0.05, min_tokens=0, max_density=1.0)
CLOSE: Any = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@torch.no_grad()
def logits(model: Any, config: RuntimeConfig, **inputs: Any) -> torch.Tensor:
    with share_prefill(model, tiny_artifact(model, POLICIES), config):
        return model(**inputs).logits


# Options of generate(), and the sparse and the dense prefills that a prompt of 150 tokens makes:
# pieces below a block of 16 run dense, and so does the verification of drafted tokens.
WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "greedy": ({}, 1),
    "sampling": ({"do_sample": True, "top_k": 20}, 1),
    "beams": ({"num_beams": 3}, 3),
    "chunks": ({"prefill_chunk_size": 40}, 4),
    "short chunks": ({"prefill_chunk_size": 7}, 0),
    "static cache": ({"cache_implementation": "static"}, 1),
    "no cache": ({"use_cache": False}, 6),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, 1),
    "assisted": ({"assistant": True}, 1),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate(model: Any, way: str) -> None:
    options, prefills = WAYS[way]
    options = {"do_sample": False, **options}
    if options.pop("assistant", False):
        options["assistant_model"] = tiny_llama(seed=1, num_hidden_layers=1)
    ids = token_ids(1, 75).repeat(1, 2)
    with share_prefill(model, tiny_artifact(model, POLICIES), EVERYTHING) as session:
        torch.manual_seed(0)
        found = model.generate(ids, max_new_tokens=6, **options)
    torch.manual_seed(0)
    assert torch.equal(found, model.generate(ids, max_new_tokens=6, **options))
    assert session.report().prefills == prefills


def test_a_prefix_is_continued(model: Any) -> None:
    """A cache from an earlier turn, dense or not, and the next turn after it."""
    first, second = token_ids(1, 60), token_ids(1, 90)
    with torch.no_grad():
        own = model(input_ids=torch.cat([first, second], 1)).logits[:, 60:]
        cache = cache_of(model(input_ids=first, use_cache=True))
        with share_prefill(model, tiny_artifact(model, POLICIES), EVERYTHING) as session:
            ids = torch.cat([first, second], 1)
            found = model(input_ids=second, **copy.deepcopy(cache)).logits
            generated = model.generate(ids, **cache, max_new_tokens=4)
    torch.testing.assert_close(found, own, **CLOSE)
    assert torch.equal(generated, model.generate(ids, max_new_tokens=4))
    assert session.report().prefills == 2


def test_a_pipeline(tmp_path: Any) -> None:
    from transformers import pipeline

    folder = str(save_checkpoint(tmp_path / "model"))
    generator = pipeline("text-generation", model=folder)
    prompts = ["The first of many words. " * 20, "Fewer words. " * 9]
    options = {"max_new_tokens": 5, "do_sample": False, "batch_size": 2}
    generator.tokenizer.pad_token = generator.tokenizer.eos_token
    generator.tokenizer.padding_side = "left"
    artifact = tiny_artifact(generator.model, POLICIES)
    with share_prefill(generator.model, artifact, EVERYTHING) as session:
        found = generator(prompts, **options)
    assert found == generator(prompts, **options)
    assert session.report().prefills == 2


def test_continuous_batching_is_refused(model: Any) -> None:
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=1, pad_token_id=2)
    with (
        share_prefill(model, tiny_artifact(model, POLICIES), EVERYTHING),
        pytest.raises(ValueError, match="shareprefill.* is not supported"),
    ):
        model.generate_batch(inputs=[[5, 6, 7]], generation_config=config)


@pytest.mark.parametrize("varlen", [False, True])
def test_packed_sequences_give_what_each_gives_alone(model: Any, varlen: bool) -> None:
    lengths = [100, 17, 5, 133]
    ids = token_ids(1, sum(lengths))
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "use_cache": varlen,
    }
    if varlen:
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    found = logits(model, SPARSE, **inputs)
    alone = [logits(model, SPARSE, input_ids=piece) for piece in ids.split(lengths, dim=1)]
    torch.testing.assert_close(found, torch.cat(alone, 1), **CLOSE)
    assert not torch.allclose(found, logits(model, EVERYTHING, **inputs), **CLOSE)


def test_rows_of_one_batch_may_be_short_beside_soft_capping() -> None:
    """A row below `min_tokens` is dense, by the family's own function; the other one is sparse."""
    model = build(next(family for family in FAMILIES if family.name == "gemma2"))
    model.set_attn_implementation("eager")
    ids = token_ids(2, 90)
    mask = torch.ones_like(ids)
    mask[1, :50] = 0
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }
    policies = [[Policy.DENSE] * 4, [R] * 4, [Policy.DENSE] * 4]
    config = RuntimeConfig(gamma=1.0, min_tokens=60, max_density=1.0)
    with torch.no_grad():
        own = model(**inputs).logits
        with share_prefill(model, tiny_artifact(model, policies), config) as session:
            found = model(**inputs).logits
    torch.testing.assert_close(found[mask.bool()], own[mask.bool()], **CLOSE)
    report = session.report()
    assert [layer.layer for layer in report.layers] == [1]
    assert report.layers[0].policies == ("sampled",) * 4


def test_differential_attention_asks_twice_and_shares_once() -> None:
    model = build(next(family for family in FAMILIES if family.name == "diffllama"))
    ids = token_ids(1, 120)
    artifact = tiny_artifact(model, [[P, S, R, V], [S, S, S, S]])
    with share_prefill(model, artifact, EVERYTHING) as session, torch.no_grad():
        found = model(input_ids=ids).logits
        report = session.report()
    torch.testing.assert_close(found, model(input_ids=ids).logits, **CLOSE)
    assert report.prefills == 1
    assert sum(report.policies.values()) == 2 * 4


def test_the_report_says_why(model: Any) -> None:
    artifact = tiny_artifact(model, POLICIES)
    with share_prefill(model, artifact, SPARSE) as session, torch.no_grad():
        model(input_ids=token_ids(1, 160))
    for layer, row in zip(session.report().layers, POLICIES, strict=True):
        assert layer.first_head == 0
        assert layer.planned == tuple(policy.label for policy in row)
        assert layer.tau is None
        for head, (policy, taken) in enumerate(zip(row, layer.policies, strict=True)):
            assert math.isnan(layer.distance[head])
            if policy is S:
                assert layer.min_coverage[head] == pytest.approx(0.55)
                assert taken == ("share" if layer.covered[head] >= 0.55 else "smoothed")
            else:
                assert math.isnan(layer.covered[head])
                assert math.isnan(layer.min_coverage[head])


def test_the_report_of_the_papers_rule_says_why(model: Any) -> None:
    thresholds = {"delta": 0.9, "tau": 0.42, "max_density": 1.0}
    config = RuntimeConfig(policy="shareprefill", min_tokens=0, **thresholds)
    with share_prefill(model, tiny_artifact(model, POLICIES), config) as session, torch.no_grad():
        model(input_ids=token_ids(1, 160))
    report = session.report()
    assert report.thresholds == {"gamma": None, "tau": 0.42, "delta": 0.9}
    compared = 0
    for layer in report.layers:
        assert layer.tau == 0.42
        for head, taken in enumerate(layer.policies):
            assert math.isnan(layer.covered[head])
            assert math.isnan(layer.min_coverage[head])
            if not math.isnan(layer.distance[head]):
                compared += 1
                assert taken == ("share" if layer.distance[head] < 0.42 else "vertical-slash")
    assert compared > 0


def test_weights_that_are_offloaded(model: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason="offloading needs accelerate")
    ids = token_ids(1, 120)
    expected = logits(model, SPARSE, input_ids=ids)
    artifact = tiny_artifact(model, POLICIES)
    offloaded = accelerate.cpu_offload(tiny_llama(), execution_device="cpu")
    assert next(offloaded.parameters()).is_meta
    with share_prefill(offloaded, artifact, SPARSE), torch.no_grad():
        found = offloaded(input_ids=ids).logits
    torch.testing.assert_close(found, expected, **CLOSE)
