"""A tiny model with a byte-level tokenizer as a GGUF file, as llama.cpp would have written it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.tiny import tiny_llama

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_gguf(path: Path, *, quantised: bool = False, **options: Any) -> Any:
    """Writes a tiny Llama to `path`; returns the model.

    Args:
        path: Of the file.
        quantised: Whether its matrices are stored in blocks of 8 bits (Q8_0).
        options: Of `tiny_llama`.
    """
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    words = ["<|end|>", "<|start|>", *sorted(ByteLevel.alphabet()), "th", "Ġa"]
    options = {"eos_token_id": 0, "bos_token_id": 1, "pad_token_id": 0, **options}
    model = tiny_llama(**{"vocab_size": len(words), **options})
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * (len(words) - 2))
    writer.add_token_merges(["t h", "Ġ a"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    for name, weight in _tensors(model):
        data = weight.float().numpy()
        if quantised and data.ndim == 2 and data.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _tensors(model: Any) -> list[tuple[str, Tensor]]:
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    config = model.config
    found = [
        ("token_embd.weight", weights["model.embed_tokens.weight"]),
        ("output_norm.weight", weights["model.norm.weight"]),
        ("output.weight", weights["lm_head.weight"]),
    ]
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for short, name in _LAYER_NAMES.items():
            weight = weights[f"model.layers.{layer}.{name}.weight"]
            if short in heads:
                weight = _interleaved(weight, heads[short])
            found.append((f"blk.{layer}.{short}.weight", weight))
    return found


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """The rows of a query or key projection in llama.cpp's order: a rotated pair side by side."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return torch.stack((halves[:, 0], halves[:, 1]), dim=2).reshape(weight.shape)
