"""Small random instances of every family's real architecture, as checkpoints on disk."""

from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

# A byte-level tokenizer: 256 bytes, then these.
SPECIAL = (
    "<|endoftext|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
)
IDS = {name: 256 + number for number, name in enumerate(SPECIAL)}
VOCABULARY = 264

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,  # logits that differ
    "bos_token_id": 256,
    "eos_token_id": 256,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TEXT = SIZES | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
}
VISION_TOKENS = {
    "image_token_id": IDS["<|image_pad|>"],
    "video_token_id": IDS["<|video_pad|>"],
    "vision_start_token_id": IDS["<|vision_start|>"],
    "vision_end_token_id": IDS["<|vision_end|>"],
}
TOWER = {"depth": 2, "num_heads": 2, "initializer_range": 0.15}

ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


def experts(count, *names):
    return {f"mlp.experts.{number}.{name}" for number in range(count) for name in names}


@dataclass(frozen=True)
class Instance:
    """linears: of each language block. vision: all linears of tower and merger. matrices: names and
    classes of what is no linear. saving: arguments of save_pretrained."""

    model_class: type
    config: object
    linears: tuple[set[str], ...]
    vision: set[str] = field(default_factory=set)
    matrices: dict[str, str] = field(default_factory=dict)
    saving: dict[str, str] = field(default_factory=dict)

    @property
    def prefix(self):
        return "model.language_model.layers" if self.vision else "model.layers"

    @property
    def language(self):
        return {
            f"{self.prefix}.{block}.{name}"
            for block, names in enumerate(self.linears)
            for name in names
        }


def tower(*names):
    linears = {f"model.visual.blocks.{block}.{name}" for block in range(2) for name in names}
    return linears | {"model.visual.merger.mlp.0", "model.visual.merger.mlp.2"}


DENSE = (ATTENTION | MLP,) * 2
FAMILIES = {
    "llama-2": Instance(LlamaForCausalLM, LlamaConfig(**SIZES), DENSE),
    "llama-3.1": Instance(
        LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE), DENSE
    ),
    "llama-3.2": Instance(
        LlamaForCausalLM,
        LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
        DENSE,
        saving={"max_shard_size": "60KB"},
    ),
    "mistral": Instance(MistralForCausalLM, MistralConfig(**SIZES, sliding_window=16), DENSE),
    "qwen2": Instance(
        Qwen2ForCausalLM, Qwen2Config(**SIZES), DENSE, saving={"max_shard_size": "60KB"}
    ),
    "qwen2-sliding": Instance(
        Qwen2ForCausalLM,
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=1),
        DENSE,
    ),
    "qwen3": Instance(
        Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True), DENSE
    ),
    "gemma3": Instance(
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **SIZES,
            head_dim=32,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        ),
        DENSE,
    ),
    "qwen3-moe": Instance(
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **SIZES,
            head_dim=16,
            moe_intermediate_size=48,
            num_experts=4,
            num_experts_per_tok=2,
            mlp_only_layers=[0],
        ),
        (ATTENTION | MLP, ATTENTION | experts(4, "gate_proj", "up_proj", "down_proj")),
        matrices={"model.layers.1.mlp.gate": "Qwen3MoeTopKRouter"},
    ),
    "mixtral": Instance(
        MixtralForCausalLM,
        MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
        (ATTENTION | experts(4, "w1", "w2", "w3"),) * 2,
        matrices={f"model.layers.{n}.mlp.gate": "MixtralTopKRouter" for n in range(2)},
    ),
    "qwen2-vl": Instance(
        Qwen2VLForConditionalGeneration,
        Qwen2VLConfig(
            text_config=TEXT,
            vision_config={**TOWER, "embed_dim": 48, "hidden_size": 64, "mlp_ratio": 2},
            tie_word_embeddings=True,
            **VISION_TOKENS,
        ),
        DENSE,
        tower("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
        {"model.visual.patch_embed.proj": "Conv3d"},
    ),
    "qwen2.5-vl": Instance(
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig(
            text_config=TEXT,
            vision_config={
                **TOWER,
                "hidden_size": 48,
                "intermediate_size": 72,
                "out_hidden_size": 64,
                "window_size": 56,
                "fullatt_block_indexes": [1],
            },
            **VISION_TOKENS,
        ),
        DENSE,
        tower("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        {"model.visual.patch_embed.proj": "Conv3d"},
    ),
}
MIXTURES = [name for name, family in FAMILIES.items() if len(family.linears[1]) > 7]
WITH_VISION = [name for name, family in FAMILIES.items() if family.vision]


def save(name, folder, dtype=torch.bfloat16, seed=0, **saving):
    """The checkpoint of a family, as `save_pretrained` writes it, with tokenizer and processor."""
    family = FAMILIES[name]
    torch.manual_seed(seed)
    model = family.model_class(family.config)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):  # transformers starts them at zero
            torch.nn.init.normal_(parameter, std=0.5)
    model.to(dtype).save_pretrained(folder, **(family.saving | saving))
    tokenizer().save_pretrained(folder)
    if family.vision:
        size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
        Qwen2VLImageProcessorPil(size=size).save_pretrained(folder)
    return folder


def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        additional_special_tokens=list(SPECIAL[1:]),
    )
