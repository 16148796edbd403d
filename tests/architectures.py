"""Small random instances of decoders of transformers: what is quantized, and what is refused.

An instance is the class of an architecture with a configuration that has what is special about it.
`reads`: of each kind of block, in order, the linears that read one input.
"""

from dataclasses import dataclass
from typing import Any

import torch
from model_families import LLAMA3_ROPE, SIZES, VOCABULARY
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    BambaConfig,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    Qwen3VLConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

BASE = SIZES | {"pad_token_id": None}
FOUR = BASE | {"num_hidden_layers": 4}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")
LLAMA = (QKV, ("self_attn.o_proj",), GATED, ("mlp.down_proj",))
EXPERTS = (("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"), ("mlp.experts.*.down_proj",))
ATTENTION = LLAMA[:2]
LATENT = (
    ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    ("self_attn.q_b_proj",),
    ("self_attn.kv_b_proj",),
    ("self_attn.o_proj",),
)
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}


@dataclass(frozen=True)
class Architecture:
    """name: of models that people use. why: what is special about it."""

    name: str
    config: Any
    reads: tuple[tuple[tuple[str, ...], ...], ...]
    why: str = ""


def _opt(name: str, why: str, **changes: Any) -> Architecture:
    sizes = {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        init_std=0.15,
        pad_token_id=1,
        **sizes,
        **changes,
    )
    return Architecture(name, config, ((QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)),), why)


ARCHITECTURES = [
    Architecture("Llama 2", LlamaConfig(**BASE), (LLAMA,)),
    Architecture(
        "Llama 3, 3.1",
        LlamaConfig(**BASE, rope_parameters=LLAMA3_ROPE),
        (LLAMA,),
        "rotary frequencies by wavelength",
    ),
    Architecture(
        "Llama 3.2, SmolLM2",
        LlamaConfig(**BASE, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
        (LLAMA,),
        "tied head",
    ),
    Architecture("Mistral", MistralConfig(**BASE, sliding_window=16), (LLAMA,), "sliding windows"),
    Architecture("Qwen2, Qwen2.5", Qwen2Config(**BASE), (LLAMA,), "biases of q, k and v"),
    Architecture(
        "Qwen3",
        Qwen3Config(**BASE, head_dim=32, tie_word_embeddings=True),
        (LLAMA,),
        "norms of q and k",
    ),
    Architecture(
        "SmolLM3",
        SmolLM3Config(**FOUR, no_rope_layer_interval=4),
        (LLAMA,),
        "a block of four without positions",
    ),
    Architecture("Gemma", GemmaConfig(**BASE, head_dim=32), (LLAMA,), "scaled embedding"),
    Architecture(
        "Gemma 2",
        Gemma2Config(**FOUR, head_dim=32, **SLIDING, query_pre_attn_scalar=32),
        (LLAMA,),
        "soft caps, windows in every second block, norms on both sides",
    ),
    Architecture(
        "Gemma 3",
        Gemma3TextConfig(**FOUR, head_dim=32, **SLIDING, query_pre_attn_scalar=32),
        (LLAMA,),
        "rotary settings by kind of attention",
    ),
    Architecture(
        "Phi-1.5, Phi-2",
        PhiConfig(**BASE, partial_rotary_factor=0.5),
        (
            (
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"),
                ("self_attn.dense",),
                ("mlp.fc2",),
            ),
        ),
        "attention and MLP in parallel",
    ),
    Architecture(
        "Phi-3, Phi-4",
        Phi3Config(**BASE, sliding_window=16),
        (
            (
                ("self_attn.qkv_proj",),
                ("self_attn.o_proj",),
                ("mlp.gate_up_proj",),
                ("mlp.down_proj",),
            ),
        ),
        "fused qkv_proj and gate_up_proj",
    ),
    Architecture("OLMo 2", Olmo2Config(**BASE), (LLAMA,), "norms after attention and MLP"),
    Architecture(
        "Granite 3",
        GraniteConfig(
            **BASE,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            attention_multiplier=0.1,
            logits_scaling=8.0,
            tie_word_embeddings=True,
        ),
        (LLAMA,),
        "multipliers of embedding, residuals and logits",
    ),
    Architecture(
        "StableLM",
        StableLmConfig(**BASE, use_parallel_residual=True, qk_layernorm=True),
        ((QKV + GATED, ("self_attn.o_proj",), ("mlp.down_proj",)),),
        "parallel residual, a norm a head",
    ),
    Architecture(
        "Falcon 7B",
        FalconConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            multi_query=True,
            parallel_attn=True,
            bias=False,
            initializer_range=0.15,
        ),
        (
            (
                ("self_attention.query_key_value", "mlp.dense_h_to_4h"),
                ("self_attention.dense",),
                ("mlp.dense_4h_to_h",),
            ),
        ),
        "one norm for attention and MLP, fused q/k/v",
    ),
    Architecture(
        "Falcon 40B",
        FalconConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
            bias=False,
            initializer_range=0.15,
        ),
        (
            (
                ("self_attention.query_key_value",),
                ("self_attention.dense",),
                ("mlp.dense_h_to_4h",),
                ("mlp.dense_4h_to_h",),
            ),
        ),
        "a norm each for attention and MLP in parallel",
    ),
    Architecture(
        "StarCoder2",
        Starcoder2Config(**BASE, sliding_window=16),
        ((*ATTENTION, ("mlp.c_fc",), ("mlp.c_proj",)),),
        "biases everywhere",
    ),
    Architecture(
        "GLM-4 (9B, 2024)",
        GlmConfig(**BASE, head_dim=16),
        ((*ATTENTION, ("mlp.gate_up_proj",), ("mlp.down_proj",)),),
        "half a head rotates",
    ),
    Architecture(
        "GLM-4 (0414)",
        Glm4Config(**BASE, head_dim=16),
        ((*ATTENTION, ("mlp.gate_up_proj",), ("mlp.down_proj",)),),
        "norms on both sides",
    ),
    Architecture(
        "Cohere Command R",
        CohereConfig(**BASE),
        ((QKV + GATED, ("self_attn.o_proj",), ("mlp.down_proj",)),),
        "attention and MLP in parallel, scaled logits",
    ),
    Architecture(
        "Cohere Command R7B",
        Cohere2Config(**FOUR, **SLIDING),
        ((QKV + GATED, ("self_attn.o_proj",), ("mlp.down_proj",)),),
        "windows, and positions only there",
    ),
    Architecture(
        "GPT-NeoX, Pythia",
        GPTNeoXConfig(**BASE, use_parallel_residual=True),
        (
            (
                ("attention.query_key_value",),
                ("attention.dense",),
                ("mlp.dense_h_to_4h",),
                ("mlp.dense_4h_to_h",),
            ),
        ),
        "parallel residual",
    ),
    _opt("OPT", "learned positions", word_embed_proj_dim=64),
    _opt(
        "OPT 350M",
        "projections before and after the blocks",
        word_embed_proj_dim=48,
        do_layer_norm_before=False,
    ),
    Architecture(
        "BLOOM",
        BloomConfig(
            vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.15
        ),
        (
            (
                ("self_attention.query_key_value",),
                ("self_attention.dense",),
                ("mlp.dense_h_to_4h",),
                ("mlp.dense_4h_to_h",),
            ),
        ),
        "a norm after the embedding, linear biases for positions",
    ),
    Architecture(
        "Mixtral",
        MixtralConfig(**BASE, num_local_experts=4, num_experts_per_tok=2),
        ((*ATTENTION, ("mlp.experts.*.w1", "mlp.experts.*.w3"), ("mlp.experts.*.w2",)),),
        "experts",
    ),
    Architecture(
        "Qwen2-MoE",
        Qwen2MoeConfig(**BASE, **MOE, num_experts=4, shared_expert_intermediate_size=48),
        (
            (
                *ATTENTION,
                (
                    "mlp.shared_expert.gate_proj",
                    "mlp.shared_expert.up_proj",
                    "mlp.shared_expert_gate",
                ),
                ("mlp.shared_expert.down_proj",),
                *EXPERTS,
            ),
        ),
        "a shared expert with a gate of its own",
    ),
    Architecture(
        "Qwen3-MoE",
        Qwen3MoeConfig(**BASE, **MOE, head_dim=16, num_experts=4, mlp_only_layers=[0]),
        (LLAMA, (*ATTENTION, *EXPERTS)),
        "blocks with and without experts",
    ),
    Architecture(
        "OLMoE",
        OlmoeConfig(**BASE, num_experts=4, num_experts_per_tok=2),
        ((*ATTENTION, *EXPERTS),),
        "experts",
    ),
    Architecture(
        "DeepSeek-V3",
        DeepseekV3Config(
            **(FOUR | {"num_key_value_heads": 4}),
            **MOE,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            n_shared_experts=1,
            first_k_dense_replace=1,
            kv_lora_rank=32,
            q_lora_rank=32,
            qk_rope_head_dim=16,
            qk_nope_head_dim=16,
            v_head_dim=16,
        ),
        (
            (*LATENT, *LLAMA[2:]),
            (
                *LATENT,
                *EXPERTS,
                ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
                ("mlp.shared_experts.down_proj",),
            ),
        ),
        "latent attention, corrected routing, a shared expert",
    ),
]

VISION = {"depth": 2, "num_heads": 2, "hidden_size": 48, "intermediate_size": 72}
ARCHITECTURES += [
    Architecture(
        "Qwen3-VL",
        Qwen3VLConfig(
            text_config=BASE
            | {
                "head_dim": 16,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [2, 3, 3],
                },
            },
            vision_config=VISION | {"out_hidden_size": 64, "deepstack_visual_indexes": [0, 1]},
        ),
        (LLAMA,),
        "text alone: the tower stays in 16 bits",
    ),
    Architecture(
        "Gemma 3 (4B and larger)",
        Gemma3Config(
            text_config=FOUR | SLIDING | {"head_dim": 32},
            vision_config={
                "hidden_size": 48,
                "intermediate_size": 72,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            mm_tokens_per_image=4,
        ),
        (LLAMA,),
        "text alone: the tower stays in 16 bits",
    ),
]

REFUSED = {
    "GPT-2": (
        GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4),
        r"transformer\.h\.0\.attn\.c_attn \(Conv1D\)",
    ),
    "Mamba": (
        MambaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2),
        r"backbone\.layers\.0\.mixer",
    ),
    "Bamba": (BambaConfig(**BASE), r"model\.layers\.0\.mamba"),
    "Qwen3-Next": (Qwen3NextConfig(**FOUR), r"model\.layers\.0\.linear_attn\.conv1d"),
    "GPT-OSS": (
        GptOssConfig(**BASE, num_local_experts=4),
        r"model\.layers\.0\.mlp\.experts \(GptOssExperts\)",
    ),
}


def class_of(config):
    """The class of transformers that a checkpoint of this configuration is run as."""
    kind = type(config)
    of_text = kind in MODEL_FOR_CAUSAL_LM_MAPPING
    return (MODEL_FOR_CAUSAL_LM_MAPPING if of_text else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)[kind]


def random_model(config):
    """A model whose biases and norms are random too."""
    torch.manual_seed(0)
    model = class_of(config)._from_config(config, dtype=torch.float32)
    for parameter in [*model.parameters(), *model.buffers()]:
        if parameter.ndim == 1 and parameter.is_floating_point() and len(parameter) > 8:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
