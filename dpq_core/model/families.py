"""What a model does not show by itself: a row where an architecture has any of it.

Blocks, embedding, norm, head, and which linears read the same input are found in the model
(`dpq_core.model`). A row names the parts of a vision tower, which no text reaches; the linears of
an expert, which transformers keeps fused; tensors that checkpoints on the hub call otherwise than
the model does; and how a text must begin. Names are module paths of the transformers model;
`renames` are applied by `reader.CheckpointReader`: nothing else in this package knows about them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    """How checkpoints call an expert's linears."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class Family:
    """renames: (pattern, replacement) for tensors that checkpoints name otherwise than the model
    does. opened: trained with a begin-of-text token before every text, whatever the tokenizer's
    files say."""

    vision: Vision | None = None
    experts: Experts = Experts()
    renames: tuple[tuple[str, str], ...] = ()
    opened: bool = False

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


def _qwen_vl(vision_mlp: Groups) -> Family:
    return Family(
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


# A language model beside towers that nothing here streams.
_BESIDE_TOWERS = Family(
    renames=(
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    )
)
_OPENED = Family(opened=True)

FAMILIES = {  # by transformers' model_type
    "gemma": _OPENED,
    "gemma2": _OPENED,
    "gemma3_text": _OPENED,
    "gemma3": replace(_BESIDE_TOWERS, opened=True),
    "gpt_neox": Family(renames=((r"^embed_out\.", "lm_head."),)),
    "mistral3": _BESIDE_TOWERS,
    "mixtral": Family(
        experts=Experts("w1", "w3", "w2"), renames=((r"\.block_sparse_moe\.", ".mlp."),)
    ),
    "qwen2_vl": _qwen_vl((("mlp.fc1",), ("mlp.fc2",))),
    "qwen2_5_vl": _qwen_vl((("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))),
}


def family_of(model_type: str) -> Family:
    """The row of an architecture; one that says nothing where it has none."""
    return FAMILIES.get(model_type, Family())
