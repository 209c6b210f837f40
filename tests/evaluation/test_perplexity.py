from __future__ import annotations

import pytest
import torch

from shareprefill.errors import UnsupportedError
from shareprefill.evaluation import perplexity
from shareprefill.evaluation.perplexity import read_text
from tests.support.families import FAMILIES, build
from tests.support.tiny import tiny_llama, token_ids


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere"])
def test_losses_are_those_of_all_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "_PIECE", 13)
    changes = {"gemma2": {"final_logit_softcapping": 0.5}, "granite": {"logits_scaling": 3.0}}
    changes |= {"cohere": {"logit_scale": 0.25}}
    model = build(next(f for f in FAMILIES if f.name == name), **changes.get(name, {}))
    ids = token_ids(61)
    seen = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
    reading = read_text(model, ids)
    handle.remove()
    assert max(seen) <= 13
    with torch.no_grad():
        out = model(ids[None], output_hidden_states=True)
    expected = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[1:], reduction="none")
    torch.testing.assert_close(reading.losses, expected.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reading.hidden, out.hidden_states[-1][0, -1], rtol=1e-4, atol=1e-5)
    assert reading.ttft_s > 0


def test_logits_of_an_unknown_kind_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    forward = model.forward

    def scaled(*arguments, **options):
        out = forward(*arguments, **options)
        out.logits = out.logits * 2
        return out

    monkeypatch.setattr(model, "forward", scaled)
    with pytest.raises(UnsupportedError, match="leave the task perplexity out"):
        read_text(model, token_ids(40))
