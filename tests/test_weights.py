"""Fingerprints of models whose weights are packed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from shareprefill import share_prefill
from shareprefill.artifact import NEAR_WEIGHTS, check_fingerprint
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ArtifactError, UnsupportedError
from shareprefill.models import attention_layers, fingerprint, model_digest, warn_once
from shareprefill.weights import SKETCH_SIZE, base_weights, sketch, sketch_distances
from tests.support.tiny import tiny_artifact, tiny_llama, token_ids


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
    plain = dict(base_weights(attention_layers(tiny_llama(0))[1].module))
    packed = dict(base_weights(attention_layers(WAYS[way](tiny_llama(0)))[1].module))
    for name, weight in plain.items():
        assert packed[name].shape == weight.shape
        assert (packed[name].float() - weight).norm() < 0.15 * weight.norm()


@pytest.mark.parametrize("way", WAYS)
def test_an_artifact_fits_the_quantised_model_and_no_other(way: str) -> None:
    artifact = tiny_artifact(tiny_llama(0))
    assert 0 < check_fingerprint(artifact, fingerprint(WAYS[way](tiny_llama(0)))) < NEAR_WEIGHTS / 2
    with pytest.raises(ArtifactError, match=r"weights differ .*relative distance 1\.\d"):
        check_fingerprint(artifact, fingerprint(WAYS[way](tiny_llama(1))))


def test_a_float32_checkpoint_fits_in_every_dtype(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)  # more digits than bfloat16 and float16 hold
    artifact = tiny_artifact(model)
    half = copy.deepcopy(model).half()
    assert fingerprint(half) != artifact.fingerprint
    assert check_fingerprint(artifact, fingerprint(half)) < 0.01
    assert "near to those that the artifact was made for" in caplog.text
    assert check_fingerprint(artifact, fingerprint(copy.deepcopy(model).bfloat16())) < 0.01


def test_one_layer_of_another_model_is_refused() -> None:
    model = copy.deepcopy(tiny_llama(0))
    artifact = tiny_artifact(model)
    last = attention_layers(model)[-1].module
    last.load_state_dict(attention_layers(tiny_llama(1))[-1].module.state_dict())
    with pytest.raises(ArtifactError, match="weights differ .*relative distance 1"):
        check_fingerprint(artifact, fingerprint(model))


@pytest.mark.parametrize("share", [0.0, 0.03, 0.1, 0.5, 1.0])
def test_distances_of_sketches_are_those_of_the_weights(share: float) -> None:
    torch.manual_seed(0)
    # Larger than a piece, with a width that the buckets divide, and an odd rest.
    weights = [torch.randn(1100, 1024), torch.randn(7, 3)]
    others = [weight + share * torch.randn_like(weight) for weight in weights]
    one, other = (torch.cat([w.flatten() for w in every]) for every in (weights, others))
    exact = (one / one.norm() - other / other.norm()).norm().item()
    distances = sketch_distances(sketch(weights), sketch(others))
    assert distances is not None
    assert distances.tolist() == [pytest.approx(exact, rel=0.35, abs=0.02)]
    # Neither scale, nor dtype, nor layout is a difference; order is.
    assert sketch([2 * weight.double() for weight in weights]) == sketch(weights)
    assert sketch([weight.t().contiguous().t() for weight in weights]) == sketch(weights)
    swapped = sketch_distances(sketch(weights), sketch(weights[::-1]))
    assert swapped is not None
    assert swapped.item() > 1


def test_sketches_of_odd_weights() -> None:
    assert sketch([torch.zeros(3, 3)]) == "00" * SKETCH_SIZE
    assert sketch([torch.tensor([[float("nan"), 1.0]])]) == "00" * SKETCH_SIZE
    assert sketch([torch.full((2, 2), float("inf"))]) == "00" * SKETCH_SIZE
    assert sketch([torch.ones(3, 3), torch.ones(3, 3, dtype=torch.int8)]) == ""
    assert sketch([torch.ones(3, 3).to(torch.float8_e4m3fn)]) == ""
    assert sketch_distances("", "") is None


class _Adapted(nn.Module):
    """A layer with an adapter, as PEFT builds it."""

    adapter_layer_names = ("lora_A",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.lora_A = base_layer, nn.Linear(2, 2)
        self.scaling, self._active_adapter, self._disable_adapters = {"a": 2.0}, ["a"], False


def test_adapters_leave_the_fingerprint_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    model = copy.deepcopy(tiny_llama(0))
    before = fingerprint(model)
    for layer in attention_layers(model):
        layer.module.q_proj = _Adapted(layer.module.q_proj)  # type: ignore[assignment]
    after = fingerprint(model)
    assert (after, after.sketch) == (before, before.sketch)
    assert "adapters that are not merged" in caplog.text


@torch.no_grad()
def test_a_digest_is_of_the_adapters_too() -> None:
    model = copy.deepcopy(tiny_llama(0))
    found = [model_digest(model)]
    adapted: Any = _Adapted(model.model.layers[1].mlp.up_proj)
    model.model.layers[1].mlp.up_proj = adapted
    found.append(model_digest(model))
    assert model_digest(copy.deepcopy(model)) == found[-1]
    adapted.lora_A.weight[0, 0] += 1
    found.append(model_digest(model))
    for name, value in (
        ("scaling", {"a": 4.0}),
        ("_active_adapter", ["b"]),
        ("_disable_adapters", True),
    ):
        setattr(adapted, name, value)
        found.append(model_digest(model))
    assert len({*found}) == 6


@torch.no_grad()
def test_a_digest_is_of_buffers_beside_weights() -> None:
    # As the biases of DeepSeek's routers.
    model = copy.deepcopy(tiny_llama(0))
    model.model.norm.register_buffer("bias", torch.zeros(4))
    model.model.norm.register_buffer("cache", torch.zeros(4), persistent=False)
    before = model_digest(model)
    model.model.norm.cache += 1
    assert model_digest(model) == before
    model.model.norm.bias += 1
    assert model_digest(model) != before


@pytest.mark.parametrize("dora", [False, True])
def test_models_with_adapters_run(dora: bool) -> None:
    peft = pytest.importorskip("peft", reason="peft is missing")
    base = tiny_llama(0)
    artifact, config = tiny_artifact(base), RuntimeConfig(min_tokens=0)
    ids = token_ids(1, 200)
    options = peft.LoraConfig(r=4, use_dora=dora, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(copy.deepcopy(base), options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert fingerprint(model) == fingerprint(base)
    whole = model_digest(model)
    assert whole != model_digest(base)
    with model.disable_adapter():
        assert model_digest(model) != whole
    assert model_digest(model) == whole
    with torch.no_grad(), share_prefill(model, artifact, config) as session:
        adapted = model(input_ids=ids).logits
    assert session.report().prefills == 1
    merged = model.merge_and_unload()
    assert 0 < check_fingerprint(artifact, fingerprint(merged)) < NEAR_WEIGHTS
    with torch.no_grad(), share_prefill(merged, artifact, config):
        torch.testing.assert_close(merged(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-4)


class _Buffers(nn.Module):
    """Weights as GPTQ and AWQ keep them: integers in buffers."""

    def __init__(self, linear: Any) -> None:
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
    # Integers that only their library can read: nothing is said of their distance.
    assert fingerprint(packed(0)).sketch == ""


def test_attention_without_weights_is_refused() -> None:
    model = copy.deepcopy(tiny_llama())
    for part in attention_layers(model)[1].module.children():
        part.register_parameter("weight", None)
    with pytest.raises(UnsupportedError, match="no weights were found .* of layer 1"):
        fingerprint(model)
