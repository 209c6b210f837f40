"""Fingerprints of models whose weights are packed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from shareprefill.errors import UnsupportedError
from shareprefill.models import attention_layers, fingerprint
from shareprefill.weights import attention_weights
from tests.support.tiny import tiny_llama, token_ids


def _dynamic(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def _torchao(model: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is missing")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def _quanto(model: Any) -> Any:
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is missing")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def _bitsandbytes(model: Any) -> Any:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing")
    for layer in attention_layers(model):
        for name, part in list(layer.module.named_children()):
            if isinstance(part, nn.Linear):
                packed = bnb.nn.Linear4bit(
                    part.in_features, part.out_features, bias=False, quant_type="nf4"
                )
                packed.load_state_dict(part.state_dict())
                setattr(layer.module, name, packed.to("cpu"))
    return model


WAYS = {
    "torch": _dynamic, "torchao": _torchao, "quanto": _quanto, "bitsandbytes": _bitsandbytes,
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_quantised_models_have_fingerprints_of_their_own(way: str) -> None:
    one, other = WAYS[way](tiny_llama(0)), WAYS[way](tiny_llama(1))
    assert fingerprint(one) == fingerprint(WAYS[way](tiny_llama(0)))
    assert fingerprint(one).weights != fingerprint(other).weights
    assert fingerprint(one).weights != fingerprint(tiny_llama(0)).weights
    before = fingerprint(one)
    with torch.no_grad():
        one(input_ids=token_ids(1, 20))
    assert fingerprint(one) == before


@pytest.mark.parametrize("way", WAYS)
def test_packed_weights_count_with_their_values(way: str) -> None:
    plain = dict(attention_weights(attention_layers(tiny_llama(0))[1].module))
    packed = dict(attention_weights(attention_layers(WAYS[way](tiny_llama(0)))[1].module))
    for name, weight in plain.items():
        assert packed[name].shape == weight.shape
        assert (packed[name].float() - weight).norm() < 0.15 * weight.norm()


class _Buffers(nn.Module):
    """Weights as GPTQ and AWQ keep them: integers in buffers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", (linear.weight * 100).int())
        self.register_buffer("cache", torch.zeros(1), persistent=False)


def test_weights_in_buffers_count() -> None:
    def packed(seed: int) -> Any:
        model = tiny_llama(seed)
        for layer in attention_layers(model):
            for name, part in list(layer.module.named_children()):
                setattr(layer.module, name, _Buffers(part))
        return model

    assert fingerprint(packed(0)) == fingerprint(packed(0))
    assert fingerprint(packed(0)).weights != fingerprint(packed(1)).weights


def test_attention_without_weights_is_refused() -> None:
    model = copy.deepcopy(tiny_llama())
    for part in attention_layers(model)[1].module.children():
        part.register_parameter("weight", None)
    with pytest.raises(UnsupportedError, match="no weights were found .* of layer 1"):
        fingerprint(model)
