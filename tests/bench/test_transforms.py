"""Equivalent models give the same logits: in FP32 to 1e-4, in BF16 to its error."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transforms import (
    Heads,
    fold_norms,
    random_rotation,
    read_tensors,
    rotate_stream,
    rotate_values,
    scale_channels,
    spread_values,
    write_tensors,
)

from dpq_core.model.reader import read_config

HIDDEN, INTERMEDIATE = 48, 72  # 16 · 3: no power of two


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.15,
        tie_word_embeddings=request.param,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


def rotated_stream(tensors, heads, generator):
    return rotate_stream(tensors, heads, random_rotation(HIDDEN, generator))


def rotated_values(tensors, heads, generator):
    each = [random_rotation(heads.features, generator) for _ in range(heads.blocks * heads.values)]
    rotations = torch.stack(each).unflatten(0, (heads.blocks, heads.values))
    return rotate_values(tensors, heads, rotations)


def scaled(tensors, heads, generator):
    widths = {
        "self_attn.q_proj": HIDDEN,
        "self_attn.o_proj": heads.values * heads.features,
        "mlp.gate_proj": HIDDEN,
        "mlp.down_proj": INTERMEDIATE,
    }
    factors = {
        f"model.layers.{block}.{member}": torch.rand(width, generator=generator) + 0.5
        for block in range(heads.blocks)
        for member, width in widths.items()
    }
    return scale_channels(tensors, heads, factors)


TRANSFORMS = {
    "fold": lambda tensors, heads, _: fold_norms(tensors, heads),
    "stream": rotated_stream,
    "values": rotated_values,
    "scale": scaled,
    "all": lambda t, h, g: scaled(rotated_values(rotated_stream(t, h, g), h, g), h, g),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_logits_are_equal(base, tmp_path, name, dtype):
    tensors, heads = read_tensors(base), Heads.of(read_config(base))
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    changed = TRANSFORMS[name](tensors, heads, torch.Generator().manual_seed(0))
    assert all(torch.equal(before[key], tensors[key]) for key in before)
    touched = [key for key in before if not torch.equal(before[key], changed[key])]
    assert len(touched) >= 2 * heads.blocks
    write_tensors(changed, base, tmp_path, dtype)
    expected, found = logits(base, torch.float32), logits(tmp_path, dtype)
    error = (found - expected).abs().max() / expected.abs().max()
    own = (logits(base, dtype) - expected).abs().max() / expected.abs().max()
    assert error < max(1e-4, 3 * own)


@torch.inference_mode()
def logits(folder, dtype):
    tokens = torch.randint(61, (3, 20), generator=torch.Generator().manual_seed(1))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()(tokens).logits.float()


@pytest.mark.parametrize("features", [1, 3, 8, 48, 64])
def test_rotations_are_orthogonal_and_differ_by_seed(features):
    rotation, other = (
        random_rotation(features, torch.Generator().manual_seed(seed)) for seed in (0, 5)
    )
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(features), atol=1e-6, rtol=0)
    assert features == 1 or not torch.equal(rotation, other)


def test_query_heads_share_their_value_heads_factors():
    heads = Heads(blocks=1, queries=4, values=2, features=2)
    spread = spread_values(torch.tensor([1.0, 2, 3, 4]), heads)
    assert spread.tolist() == [1, 2, 1, 2, 3, 4, 3, 4]
