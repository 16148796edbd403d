"""Model families: where the parts of a model are, and which linears read the same input.

A family is a row. Everything else about an architecture comes from transformers.

Names are module paths of the transformers model. Where checkpoints on the hub call a tensor
otherwise, the row's `renames` say so, and `reader.CheckpointReader` applies them: nothing else in
this package knows about it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch

# Linears of a block by their path inside it, those that read the same input together. A `*` stands
# for an expert's number.
Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Vision:
    """The parts of a vision tower, a module that is called with patches and `grid_thw`.

    patches: embeds them. merger: gives the language model its features, after the last block.
    """

    tower: str
    patches: str
    blocks: str
    merger: str
    block_groups: Groups
    merger_groups: Groups


@dataclass(frozen=True)
class Experts:
    """Experts of a block, which transformers keeps fused and checkpoints keep one by one.

    path: of their module inside a block. gate, up, down: names of an expert's linears.
    """

    path: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Family:
    """Module paths of an architecture.

    groups: their order is the order of the layer reports. renames: (pattern, replacement) for
    tensors that checkpoints name otherwise than the model does.
    """

    embedding: str
    blocks: str
    norm: str
    head: str
    groups: Groups
    vision: Vision | None = None
    experts: Experts | None = None
    renames: tuple[tuple[str, str], ...] = ()

    def module_name(self, stored: str) -> str:
        """The model's name for a tensor of a checkpoint. Names that are the model's stay."""
        for pattern, replacement in self.renames:
            stored = re.sub(pattern, replacement, stored)
        return stored


def members_of(groups: Groups, linears: list[str]) -> Iterator[tuple[str, ...]]:
    """The groups that a block has, by the names of its linears, a group for each expert."""
    for group in groups:
        before, _, after = group[0].partition("*")
        for first in linears:
            if fnmatch(first, group[0]):
                number = first[len(before) : len(first) - len(after)]
                yield tuple(member.replace("*", number) for member in group)


_ATTENTION: Groups = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
)
_MLP: Groups = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))

_LLAMA = Family(
    embedding="model.embed_tokens",
    blocks="model.layers",
    norm="model.norm",
    head="lm_head",
    groups=_ATTENTION + _MLP,
)

_QWEN3_MOE = Family(
    embedding="model.embed_tokens",
    blocks="model.layers",
    norm="model.norm",
    head="lm_head",
    groups=_ATTENTION
    + _MLP  # of blocks without experts
    + (("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"), ("mlp.experts.*.down_proj",)),
    experts=Experts("mlp.experts", "gate_proj", "up_proj", "down_proj"),
)

_MIXTRAL = Family(
    embedding="model.embed_tokens",
    blocks="model.layers",
    norm="model.norm",
    head="lm_head",
    groups=(*_ATTENTION, ("mlp.experts.*.w1", "mlp.experts.*.w3"), ("mlp.experts.*.w2",)),
    experts=Experts("mlp.experts", "w1", "w3", "w2"),
    renames=((r"\.block_sparse_moe\.", ".mlp."),),
)


def _qwen_vl(vision_mlp: Groups) -> Family:
    return Family(
        embedding="model.language_model.embed_tokens",
        blocks="model.language_model.layers",
        norm="model.language_model.norm",
        head="lm_head",
        groups=_ATTENTION + _MLP,
        vision=Vision(
            tower="model.visual",
            patches="model.visual.patch_embed",
            blocks="model.visual.blocks",
            merger="model.visual.merger",
            block_groups=(("attn.qkv",), ("attn.proj",), *vision_mlp),
            merger_groups=(("mlp.0",), ("mlp.2",)),
        ),
        renames=(
            (r"^visual\.", "model.visual."),
            (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
        ),
    )


FAMILIES = {  # by transformers' model_type
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3_text": _LLAMA,  # its embedding scales, its norms are transformers'
    "qwen3_moe": _QWEN3_MOE,
    "mixtral": _MIXTRAL,
    "qwen2_vl": _qwen_vl((("mlp.fc1",), ("mlp.fc2",))),
    "qwen2_5_vl": _qwen_vl(_MLP),
}
