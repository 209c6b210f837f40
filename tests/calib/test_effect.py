from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch

from shareprefill.calib import effect
from shareprefill.calib.capture import capture
from shareprefill.calib.effect import measure_effect
from shareprefill.runtime.fidelity import compare_predictions, final_states
from shareprefill.runtime.interface import AttentionCall, attached, dense_attention
from shareprefill.runtime.ops.block_sparse_attention import reference
from shareprefill.runtime.ops.blocks import causal_lists
from shareprefill.runtime.ops.fp8_attention import reference as fp8_reference
from tests.support.families import FAMILIES, build
from tests.support.tiny import tiny_llama, token_ids

TOKENS, BLOCK = 224, 16


@pytest.fixture(scope="module")
def model() -> Any:
    found = tiny_llama()
    # A cut changes little, as in a trained model: where it changes much, no derivative tells.
    with torch.no_grad():
        for layer in found.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
    return found


@cache
def prompt() -> torch.Tensor:
    return token_ids(TOKENS)


def effect_of(model: Any, seed: int, tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    return measure_effect(model, prompt(), (0, 1, 2), block_size=BLOCK, tokens=tokens, seed=seed)


def states_with(model: Any, handler: Any) -> torch.Tensor:
    with torch.no_grad(), attached(model, handler), final_states(model) as get:
        model(input_ids=prompt()[None], use_cache=False)
    return get()


class LosingOne:
    """Dense attention in which one head reads its pattern alone."""

    def __init__(self, layer: int, head: int, patterns: dict[int, torch.Tensor]) -> None:
        self.layer, self.head, self.patterns = layer, head, patterns

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        out = dense_attention(call)
        if call.layer == self.layer:
            pattern = self.patterns[call.layer][self.head]
            keep = pattern.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            group = call.query.shape[1] // call.key.shape[1]
            query, key = call.query[0, self.head], call.key[0, self.head // group]
            logits = query @ key.T * call.scale
            logits = logits.masked_fill(~(keep & torch.ones_like(keep).tril()), -torch.inf)
            out = out.clone()
            out[0, self.head] = logits.softmax(-1) @ call.value[0, self.head // group]
        return out


def test_a_heads_change_goes_with_the_divergence_that_it_causes_alone(model: Any) -> None:
    patterns: dict[int, torch.Tensor] = {}
    made = effect._cut

    def kept(call: AttentionCall, *rest: Any) -> Any:
        patterns[call.layer] = (cut := made(call, *rest)).pattern
        return cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(effect, "_cut", kept)
        found = torch.stack([effect_of(model, seed)["effect_change"] for seed in range(6)]).mean(0)
    dense = states_with(model, dense_attention)
    measured = torch.tensor(
        [
            [
                compare_predictions(
                    model, dense, states_with(model, LosingOne(layer, head, patterns))
                ).mean_kl
                for head in range(found.shape[1])
            ]
            for layer in range(3)
        ]
    )
    ratio = (found / measured).log()
    # One factor is common to all heads: the changes of a head's query blocks are somewhat alike.
    assert ratio.mean().abs() < 1.6, (found, measured)
    assert (ratio - ratio.mean()).abs().max() < 1, (found, measured)
    order = torch.corrcoef(torch.stack([found.flatten().log(), measured.flatten().log()]))[0, 1]
    assert order > 0.8, (found, measured)


def test_all_heads_together_diverge_about_as_their_changes_sum_up_to(model: Any) -> None:
    found = effect_of(model, 0)
    ratio = found["effect_divergence"].item() / found["effect_change"].sum().item()
    assert 0.3 < ratio < 3, ratio
    assert found["effect_lost"].min() > 0
    assert found["effect_lost"].max() < 0.1


def test_long_prompts_are_cut_in_the_middle_and_equal_seeds_give_equal_bytes(model: Any) -> None:
    short = effect_of(model, 1, tokens=96)
    again = effect_of(model, 1, tokens=96)
    other = effect_of(model, 2, tokens=96)
    assert all(torch.equal(short[name], again[name]) for name in short)
    assert not torch.equal(short["effect_change"], other["effect_change"])
    assert torch.equal(short["effect_lost"], other["effect_lost"])
    cut = torch.cat([prompt()[:48], prompt()[-48:]])
    own = measure_effect(model, cut, (0, 1, 2), block_size=BLOCK, tokens=96, seed=1)
    assert all(torch.equal(short[name], own[name]) for name in short)


def test_blocks_lose_what_their_patterns_leave_out(model: Any) -> None:
    given, cuts = list[Any](), list[Any]()
    made = effect._cut

    def noted(*call: Any) -> Any:
        given.append(call)
        cuts.append(made(*call))
        return cuts[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(effect, "_cut", noted)
        effect_of(model, 0)
    (call, output, gradient, _), cut = given[1], cuts[1]
    heads, group = call.query.shape[1], call.query.shape[1] // call.key.shape[1]
    for head in (0, heads - 1):
        block = int(cut.lost[head].argmax())
        rows = torch.arange(block * BLOCK, (block + 1) * BLOCK)
        key, value = call.key[0, head // group], call.value[0, head // group]
        logits = call.query[0, head, rows] @ key.T * call.scale
        logits = logits.masked_fill(torch.arange(TOKENS) > rows[:, None], -torch.inf)
        outside = logits.softmax(-1) * ~cut.pattern[head, block].repeat_interleave(BLOCK)
        lost = outside.sum(1).mean().item()
        assert cut.lost[head, block] == pytest.approx(lost, rel=1e-4)
        own = outside.sum(1, keepdim=True) * output[0, head, rows]
        moved = ((outside @ value - own) * gradient[0, head, rows]).sum() / (1 - lost)
        assert lost > 0.01
        assert cut.change[head, block] == pytest.approx(moved.item(), rel=1e-3)


def test_last_rows_lose_what_few_blocks_of_32_do_not_hold(model: Any) -> None:
    given: list[tuple[AttentionCall, torch.Tensor, torch.Tensor]] = []
    made, lost = effect._lost_steps, []

    def noted(*call: Any) -> Any:
        given.append(call)
        lost.append(made(*call))
        return lost[-1]

    ids = token_ids(1100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(effect, "_lost_steps", noted)
        patch.setattr(effect, "_STRIP", 8 * 1100)
        found = measure_effect(model, ids, (0, 1, 2), block_size=16, tokens=2048, seed=0)
    call, output, gradient = given[1]
    change, missed = lost[1]
    heads, group = call.query.shape[1], call.query.shape[1] // call.key.shape[1]
    rows = torch.arange(1100 - 256, 1100)
    assert missed.shape == change.shape == (heads, 256)
    for head in (0, heads - 1):
        key, value = call.key[0, head // group], call.value[0, head // group]
        logits = call.query[0, head, rows] @ key.T * call.scale
        logits = logits.masked_fill(torch.arange(1100) > rows[:, None], -torch.inf)
        weights = logits.softmax(-1)
        mass = torch.nn.functional.pad(weights, (0, 20)).unflatten(1, (-1, 32)).sum(-1)
        for row in (0, 100, 255):
            newest = int(rows[row]) - 63
            always = [0, *range(newest // 32, 35)]
            others = [n for n in mass[row].argsort(descending=True).tolist() if n not in always]
            read = sorted(set(always) | set(others[: max(0, 3 - len(set(always)))]))
            # A tenth of 35 blocks are as many as are always read.
            keep = torch.isin(torch.arange(1100) // 32, torch.tensor(read))
            assert missed[head, row] == pytest.approx(1 - weights[row, keep].sum().item(), abs=1e-5)
            few = (weights[row] * keep) @ value / (weights[row] * keep).sum()
            moved = (output[0, head, rows[row]] - few) @ gradient[0, head, rows[row]]
            assert change[head, row] == pytest.approx(moved.item(), rel=5e-3, abs=1e-4)
    torch.testing.assert_close(found["step_lost"][1].double(), missed.square().mean(1))
    torch.testing.assert_close(found["step_change"][1].double(), change.square().mean(1) / 2)


def test_errors_in_fp8_are_those_of_its_reference(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every row; of more rows some are taken."""
    calls: dict[int, AttentionCall] = {}

    def keep(call: AttentionCall) -> torch.Tensor:
        calls[call.layer] = call
        return dense_attention(call)

    states_with(model, keep)
    query, key, value = (tensor[0] for tensor in (calls[1].query, calls[1].key, calls[1].value))
    lists = causal_lists(TOKENS, 0, 128, len(query), query.device)
    found, exact = torch.empty_like(query), torch.empty_like(query)
    fp8_reference.attend(query, key, value, lists, calls[1].scale, found)
    reference.attend(query, key, value, lists, calls[1].scale, exact, None)
    wanted = (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    errors = effect_of(model, 0)["fp8_error"]
    assert errors.shape == (3, len(query))
    torch.testing.assert_close(errors[1], wanted, rtol=0.05, atol=0.0)
    monkeypatch.setattr(effect, "_FP8_ROWS", TOKENS // 2)
    torch.testing.assert_close(effect_of(model, 0)["fp8_error"], errors, rtol=0.3, atol=0.0)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_models_with_soft_caps_or_sinks_have_no_errors_in_fp8(name: str) -> None:
    model = build(next(family for family in FAMILIES if family.name == name))
    layers = capture(model, prompt(), block_size=BLOCK, rows=(1, 2, 4)).layers
    found = measure_effect(model, prompt(), layers, block_size=BLOCK, tokens=TOKENS, seed=0)
    assert "effect_change" in found
    assert "fp8_error" not in found


def test_layers_keep_no_activations_and_give_the_same_gradients(model: Any) -> None:
    saved = list[int]()

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.untyped_storage().nbytes())
        return tensor

    def measured() -> tuple[dict[str, torch.Tensor], int]:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(counted, lambda tensor: tensor):
            return effect_of(model, 3), sum(saved)

    first, *others = model.model.layers
    # As where a model is loaded over several devices.
    hooked = first.forward = first.forward
    found, few = measured()
    assert vars(first).pop("forward") is hooked
    assert not any("forward" in vars(layer) for layer in others)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(effect, "_recomputed", lambda _: nullcontext())
        kept, many = measured()
    assert few < many / 3, (few, many)
    for name, value in kept.items():
        torch.testing.assert_close(found[name], value)
