"""Decoder families of transformers as tiny random models, built in memory."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch

# Sizes of a small decoder under the names that families have for them.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim"), 48),
    **dict.fromkeys(("d_ff", "inner_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 512),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "v_head_dim": 12,
    "word_embed_proj_dim": 32,
    "sliding_window": 24,
    "vocab_size": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# What most families call the sizes of a small decoder.
_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_HEAD = {"head_dim": 16}
_MIXED = {"num_hidden_layers": 3, "sliding_window": 24}
_ALTERNATING = {
    **_MIXED,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
_GPT = {
    "vocab_size": 128,
    "n_positions": 512,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.2,
}
# A tower whose image makes 16 tokens, and 4 where the model pools them.
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
IMAGE_TOKEN = 127
_IMAGES = {"image_token_id": IMAGE_TOKEN, "mm_tokens_per_image": 4, "vision_feature_layer": -1}
_MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}

_MAMBA2 = {**_MAMBA, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 16}
_STATE = {"mamba_d_state": 8, "mamba_d_ssm": 64}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# Sinks in its window layers alone.
_MIMO = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}


@dataclass(frozen=True)
class Family:
    """A family of decoders.

    Attributes:
        name: Its name in transformers (a folder under `models`).
        prefix: Prefix of its classes: `<prefix>Config` and `<prefix>ForCausalLM`.
        options: What its tiny configuration changes of the common sizes.
        sizes: The common sizes, for families that name them otherwise.
        config: Prefix of its configuration class, where it differs.
        model: Its class, where that is not `<prefix>ForCausalLM`.
        vision: Prefix and options of its vision tower's configuration, for a multimodal family; its
            text decoder is then Llama, or what `text` says.
        text: Prefix of the text decoder's configuration.
    """

    name: str
    prefix: str
    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=lambda: _SIZES)
    config: str = ""
    model: str = ""
    vision: str = ""
    text: str = ""

    @property
    def class_name(self) -> str:
        """Name of its decoder class."""
        return self.model or f"{self.prefix}ForCausalLM"


FAMILIES: tuple[Family, ...] = (
    Family("apertus", "Apertus"),
    Family("arcee", "Arcee", _HEAD),
    Family("bamba", "Bamba", {**_MAMBA2, "attn_layer_indices": [1]}),
    Family("bloom", "Bloom", {"n_layer": 2, "n_head": 4}),
    Family("codegen", "CodeGen", {"rotary_dim": 4}, sizes=_GPT),
    Family("cohere", "Cohere"),
    Family("cohere2", "Cohere2", _ALTERNATING),
    Family("deepseek_v2", "DeepseekV2", {**_MLA, "first_k_dense_replace": 2, "head_dim": 8}),
    Family("deepseek_v3", "DeepseekV3", {**_MLA, "first_k_dense_replace": 2, "head_dim": 8}),
    Family("deepseek_v32", "DeepseekV32", {**_MLA, "first_k_dense_replace": 2, "head_dim": 8}),
    Family(
        "deepseek_v4",
        "DeepseekV4",
        {
            **{name: value for name, value in _MLA.items() if name != "num_key_value_heads"},
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 4,
            "num_key_value_heads": 1,
            "sliding_window": 24,
        },
    ),
    Family("diffllama", "DiffLlama", {"head_dim": 8}),
    Family("ernie4_5", "Ernie4_5", _HEAD),
    Family("ernie4_5_moe", "Ernie4_5_Moe", {"moe_num_experts": 4, "moe_k": 2}),
    Family("exaone4", "Exaone4", _ALTERNATING),
    Family("falcon", "Falcon", {"new_decoder_architecture": False, "alibi": False}),
    Family("falcon_h1", "FalconH1", {**_HEAD, "mamba_n_heads": 8, "mamba_d_head": 8, **_STATE}),
    Family("gemma", "Gemma", _HEAD),
    Family(
        "gemma2",
        "Gemma2",
        {
            **_HEAD,
            **_ALTERNATING,
            "query_pre_attn_scalar": 1,
            # Low enough for random logits to reach it.
            "attn_logit_softcapping": 2.0,
        },
    ),
    Family("gemma3_text", "Gemma3", {**_HEAD, **_ALTERNATING}, config="Gemma3Text"),
    Family(
        "gemma4_text",
        "Gemma4",
        {
            **_HEAD,
            **_MIXED,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "global_head_dim": 32,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 128,
        },
        config="Gemma4Text",
    ),
    Family(
        "gemma3 (with images)",
        "Gemma3",
        {**_HEAD, **_ALTERNATING},
        model="Gemma3ForConditionalGeneration",
        vision="SiglipVision",
        text="Gemma3Text",
    ),
    Family("glm", "Glm", _HEAD),
    Family("glm4", "Glm4", _HEAD),
    Family(
        "glm4_moe",
        "Glm4Moe",
        {**_HEAD, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 2},
    ),
    Family("gpt2", "GPT2", sizes=_GPT, model="GPT2LMHeadModel"),
    Family(
        "gpt_neo",
        "GPTNeo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
    ),
    Family("gpt_neox", "GPTNeoX"),
    Family("gpt_oss", "GptOss", {**_HEAD, **_ALTERNATING, **_LOCAL_EXPERTS}),
    Family("gptj", "GPTJ", {"rotary_dim": 4}, sizes=_GPT),
    Family("granite", "Granite"),
    Family("granitemoe", "GraniteMoe", _LOCAL_EXPERTS),
    Family(
        "granitemoehybrid",
        "GraniteMoeHybrid",
        {**_LOCAL_EXPERTS, **_MAMBA2, "layer_types": ["linear_attention", "full_attention"]},
    ),
    Family(
        "granitemoehybrid (all Mamba)",
        "GraniteMoeHybrid",
        {**_LOCAL_EXPERTS, **_MAMBA2, "layer_types": ["linear_attention"] * 2},
    ),
    Family("hunyuan_v1_dense", "HunYuanDenseV1", _HEAD),
    Family(
        "jamba",
        "Jamba",
        {
            **_MAMBA,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    Family(
        "kimi_linear",
        "KimiLinear",
        {
            **_MLA,
            "q_lora_rank": None,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 2,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    Family("lfm2", "Lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    Family("llama", "Llama", _HEAD),
    Family(
        "llama4_text",
        "Llama4",
        {
            **_HEAD,
            **_LOCAL_EXPERTS,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 24,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
        config="Llama4Text",
    ),
    Family(
        "llava (with images)",
        "Llava",
        _HEAD,
        model="LlavaForConditionalGeneration",
        vision="CLIPVision",
        text="Llama",
    ),
    Family("mimo_v2_flash", "MiMoV2Flash", {**_HEAD, **_MIMO}),
    Family(
        "minimax",
        "MiniMax",
        {
            **_HEAD,
            **_LOCAL_EXPERTS,
            "sliding_window": None,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    Family("minimax_m2", "MiniMaxM2", {**_HEAD, **_LOCAL_EXPERTS, "rotary_dim": 8}),
    Family("mistral", "Mistral", {**_HEAD, "sliding_window": None}),
    Family("mistral (sliding window)", "Mistral", {**_HEAD, "sliding_window": 24}),
    Family("mixtral", "Mixtral", {**_LOCAL_EXPERTS, "sliding_window": None}),
    Family(
        "mpt",
        "Mpt",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512, "expansion_ratio": 1},
        sizes={"vocab_size": 128, "initializer_range": 0.2},
    ),
    Family("nemotron", "Nemotron"),
    Family(
        "nemotron_h",
        "NemotronH",
        {
            "layers_block_type": ["mamba", "attention", "mlp", "attention"],
            "num_hidden_layers": 4,
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "use_mamba_kernels": False,
        },
    ),
    Family("olmo", "Olmo"),
    Family("olmo2", "Olmo2"),
    Family("olmo_hybrid", "OlmoHybrid", _DELTA),
    Family("olmo3", "Olmo3", _ALTERNATING),
    Family("opt", "OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    Family("phi", "Phi"),
    Family("phi3", "Phi3", {"sliding_window": None}),
    Family("qwen2", "Qwen2"),
    Family("qwen2_moe", "Qwen2Moe", {**_EXPERTS, "shared_expert_intermediate_size": 24}),
    Family("qwen3", "Qwen3", _HEAD),
    Family("qwen3_5_text", "Qwen3_5", {**_HEAD, **_DELTA}, config="Qwen3_5Text"),
    Family("qwen3_moe", "Qwen3Moe", {**_HEAD, **_EXPERTS}),
    Family(
        "qwen3_next",
        "Qwen3Next",
        {
            **_HEAD,
            **_EXPERTS,
            **_DELTA,
            "shared_expert_intermediate_size": 24,
        },
    ),
    Family("seed_oss", "SeedOss", _HEAD),
    Family("smollm3", "SmolLM3", {"no_rope_layers": [1, 0]}),
    Family("stablelm", "StableLm"),
    Family("starcoder2", "Starcoder2", {"sliding_window": None}),
    Family(
        "zamba",
        "Zamba",
        {
            **_MAMBA,
            "use_mamba_kernels": False,
            "num_hidden_layers": 3,
            "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        },
    ),
    Family(
        "zamba2",
        "Zamba2",
        {
            **_MAMBA,
            "use_mamba_kernels": False,
            "chunk_size": 16,
            "num_hidden_layers": 3,
            "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        },
    ),
    Family("vaultgemma", "VaultGemma", {**_HEAD, **_ALTERNATING, "attn_logit_softcapping": 2.0}),
)


def is_installed(family: Family) -> bool:
    """Whether the installed transformers has this family."""
    import transformers

    return hasattr(transformers, family.class_name)


def build(family: Family, **changes: Any) -> Any:
    """A random model of a family in float32, with its own eager attention."""
    transformers = importlib.import_module("transformers")
    prefix = family.config or family.prefix
    options = {**family.sizes, **family.options, **changes}
    if family.vision:
        options = {
            "text_config": getattr(transformers, f"{family.text}Config")(**options),
            "vision_config": getattr(transformers, f"{family.vision}Config")(**_VISION),
            **_IMAGES,
        }
    config = getattr(transformers, f"{prefix}Config")(**options)
    torch.manual_seed(0)
    model = getattr(transformers, family.class_name)(config)
    return model.float().eval()
