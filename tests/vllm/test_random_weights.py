from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
from shareprefill.bench.random_weights import RandomWeights


def test_queries_and_keys_get_the_scale_of_fresh_models():
    names = ("embed_tokens", "layers.0.self_attn.qkv_proj", "layers.0.mlp.down_proj")
    weights = {f"model.{name}.weight": nn.Parameter(torch.zeros(128, 64)) for name in names}
    weights["model.layers.0.input_layernorm.weight"] = nn.Parameter(torch.zeros(64))
    weights["model.layers.0.self_attn.qkv_proj.bias"] = nn.Parameter(torch.zeros(64))
    worker = RandomWeights()
    worker.get_model = lambda: SimpleNamespace(named_parameters=weights.items)
    worker.shareprefill_randomize()
    found = {name.split(".", 1)[1]: weight.detach() for name, weight in weights.items()}
    for name in names[:2]:
        assert found[f"{name}.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert (found["layers.0.input_layernorm.weight"] == 1).all()
    assert not found["layers.0.mlp.down_proj.weight"].any()
    assert not found["layers.0.self_attn.qkv_proj.bias"].any()
