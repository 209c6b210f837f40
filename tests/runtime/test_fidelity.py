from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shareprefill.errors import ModelError, UnsupportedError
from shareprefill.runtime import fidelity
from shareprefill.runtime.fidelity import compare_predictions, final_states, token_losses
from shareprefill.runtime.generation import generate, prefill
from tests.support.families import FAMILIES, build
from tests.support.tiny import tiny_llama, token_ids


def states_of(model: Any, ids: Tensor, chunk: int = 0) -> Tensor:
    with final_states(model) as states:
        prefill(model, ids, chunk)
    return states()


@torch.no_grad()
def all_logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids[None]).logits[0].double()


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere"])
def test_figures_are_those_of_all_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "_LOGITS", 13 * 128)
    changes = {"gemma2": {"final_logit_softcapping": 0.5}, "granite": {"logits_scaling": 3.0}}
    changes |= {"cohere": {"logit_scale": 0.25}}
    model = build(next(f for f in FAMILIES if f.name == name), **changes.get(name, {}))
    one, other = token_ids(61), token_ids(61)
    seen = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[-2]))
    dense, sparse = states_of(model, one), states_of(model, other)
    found = compare_predictions(model, dense, sparse)
    losses = token_losses(model, dense, one)
    handle.remove()
    assert max(seen) <= 13
    p, q = (all_logits(model, ids).log_softmax(-1) for ids in (one, other))
    torch.testing.assert_close(found.kl, (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-5)
    assert found.agrees.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    assert found.mean_kl == pytest.approx(found.kl.mean().item())
    assert found.top1_agreement == sum(found.agrees.tolist()) / 61
    expected = torch.nn.functional.cross_entropy(p[:-1], one[1:], reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


def test_equal_states_have_no_divergence() -> None:
    model = tiny_llama()
    states = states_of(model, token_ids(40))
    found = compare_predictions(model, states, states.clone())
    assert found.kl.tolist() == [0.0] * 40
    assert found.top1_agreement == 1


def test_the_divergence_is_that_of_dense_from_sparse() -> None:
    """KL is not symmetric: dense attention's distribution weighs."""
    model = tiny_llama()
    dense, sparse = states_of(model, token_ids(30)), states_of(model, token_ids(30))
    there, back = (compare_predictions(model, *s) for s in ((dense, sparse), (sparse, dense)))
    assert not torch.allclose(there.kl, back.kl, rtol=1e-2)
    assert bool((there.kl > 0).all())


def test_chunks_and_generated_tokens_are_joined() -> None:
    model = tiny_llama()
    ids = token_ids(50)
    whole = states_of(model, ids)
    torch.testing.assert_close(states_of(model, ids, chunk=16), whole, rtol=1e-4, atol=1e-5)

    class Words:
        def decode(self, tokens: list[int], **_options: object) -> str:
            return " ".join(map(str, tokens))

    with final_states(model) as states:
        generation = generate(model, Words(), ids, max_new_tokens=3)
    torch.testing.assert_close(states()[:50], whole)
    assert len(states()) == 50 + generation.new_tokens - 1
    torch.testing.assert_close(generation.hidden, whole[-1])
    # Outside the block the model is as it was.
    assert model(ids[None]).logits.shape[1] == 50
    assert model(ids[None], logits_to_keep=1).logits.shape[1] == 1


def test_tokens_that_are_ruled_out_and_predictions_that_are_no_numbers() -> None:
    model = tiny_llama()
    head = model.get_output_embeddings()
    states, others = states_of(model, token_ids(20)), states_of(model, token_ids(20))
    plain = compare_predictions(model, states, others)

    def rule_out(_module: Any, _inputs: Any, logits: Tensor) -> Tensor:
        return logits.masked_fill(torch.arange(logits.shape[-1]) == 7, -torch.inf)

    handle = head.register_forward_hook(rule_out)
    ruled = compare_predictions(model, states, others)
    handle.remove()
    assert bool(ruled.kl.isfinite().all())
    assert not torch.equal(ruled.kl, plain.kl)
    for broken in ((states * torch.nan, others), (states, others * torch.nan)):
        with pytest.raises(ModelError, match="predictions are not finite"):
            compare_predictions(model, *broken)
    with pytest.raises(ModelError, match="predictions are not finite, so the text has no perpl"):
        token_losses(model, states * torch.nan, token_ids(20))


def test_logits_of_an_unknown_kind_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    forward = model.forward

    def scaled(*arguments: Any, **options: Any) -> Any:
        out = forward(*arguments, **options)
        out.logits = out.logits * 2
        return out

    monkeypatch.setattr(model, "forward", scaled)
    with pytest.raises(UnsupportedError, match="leave out the task perplexity"):
        states_of(model, token_ids(40))


def check_draws(device: str) -> None:
    """As often as their probability, whatever the runs that they are added up in."""
    losses = torch.full((20_000, 700), -torch.inf)
    tokens, shares = [0, 255, 256, 600, 699], torch.tensor([0.4, 0.1, 0.3, 0.15, 0.05])
    losses[:, tokens] = shares.log()
    reached = torch.rand(20_000, 1, dtype=torch.float64)
    drawn = fidelity._draw(losses.to(device), reached)
    assert drawn.device.type == device
    counts = torch.bincount(drawn[:, 0].cpu(), minlength=700)
    torch.testing.assert_close(counts[tokens] / 20_000, shares, atol=0.02, rtol=0)
    assert counts.sum() == counts[tokens].sum() == 20_000
    # In the tokens' order.
    wanted = torch.tensor(tokens)[torch.searchsorted(shares.double().cumsum(0), reached[:, 0])]
    near = (shares.double().cumsum(0) - reached).abs().amin(1) < 1e-6
    assert torch.equal(drawn[:, 0].cpu()[~near], wanted[~near])


def test_tokens_are_drawn_by_their_probability() -> None:
    check_draws("cpu")


@pytest.mark.gpu
def test_a_gpu_draws_what_a_cpu_draws() -> None:
    check_draws("cuda")
