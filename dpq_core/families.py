"""Model families: where the parts of a decoder are, and which linears read the same input.

A family is a row. Everything else about an architecture comes from transformers.
"""

from dataclasses import dataclass

from dpq_core.reader import CheckpointError


@dataclass(frozen=True)
class Family:
    """Module paths of a decoder-only architecture.

    shared_inputs: the linears of a block by their path inside it, those that read the same input
    together. Their order is the order of the layer reports.
    """

    embedding: str
    blocks: str
    norm: str
    head: str
    shared_inputs: tuple[tuple[str, ...], ...]


_LLAMA = Family(
    embedding="model.embed_tokens",
    blocks="model.layers",
    norm="model.norm",
    head="lm_head",
    shared_inputs=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
)

FAMILIES = {"llama": _LLAMA, "qwen2": _LLAMA}  # by transformers' model_type


def family_of(model_type: str) -> Family:
    """The row for a `model_type`.

    Raises:
        CheckpointError: the family is not in the table.
    """
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"model_type {model_type!r} is not supported: known are {', '.join(FAMILIES)}; "
            "a new family is a row in dpq_core/families.py"
        )
    return FAMILIES[model_type]
