"""GGUF files, written here, as folders of 16 bits."""

import json

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from dpq_core.checkpoint.gguf import import_gguf
from dpq_core.errors import CheckpointError
from dpq_core.model.proof import prove
from dpq_core.model.streaming import StreamedModel, empty_model
from flows.cli.main import app

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
KIND = gguf.GGMLQuantizationType
HIDDEN, HEADS, WORDS = 64, 2, 40
SHAPES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN, HIDDEN),
    "attn_v": (HIDDEN, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (96, HIDDEN),
    "ffn_up": (96, HIDDEN),
    "ffn_down": (HIDDEN, 96),
}


def write_gguf(path, kind, matrices=KIND.F32, architecture="llama"):
    """A Llama of one block, weights of `kind`'s precision, stored as `matrices`."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "ab", *(chr(97 + n) for n in range(WORDS - 3))])
    writer.add_token_types([3, 3, *[1] * (WORDS - 2)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    generator = torch.Generator().manual_seed(0)
    tensors = {"token_embd": (WORDS, HIDDEN), "output_norm": (HIDDEN,)}
    tensors |= {f"blk.0.{name}": shape for name, shape in SHAPES.items()}
    tensors |= {f"blk.0.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in tensors.items():
        values = (torch.rand(shape, generator=generator) - 0.5).to(kind).float().numpy()
        if len(shape) == 1 or matrices == KIND.F32:
            writer.add_tensor(f"{name}.weight", values)
            continue
        packed = gguf.quants.quantize(values, matrices)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=matrices)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "matrices"),
    [
        (torch.bfloat16, KIND.BF16),
        (torch.bfloat16, KIND.F32),
        (torch.float16, KIND.F16),
    ],
)
def test_the_same_numbers_in_the_type_that_has_them(tmp_path, kind, matrices):
    file = write_gguf(tmp_path / "model.gguf", kind, matrices)
    found = import_gguf(file, tmp_path / "folder")
    assert (found.dtype, found.rounded, found.difference) == (str(kind)[6:], 0, 0)
    stream = StreamedModel(tmp_path / "folder")
    assert stream.dtype == kind
    prove(empty_model(tmp_path / "folder"))
    stored = {each.name: each for each in gguf.GGUFReader(file).tensors}
    for ours, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
        tensor = stored[f"blk.0.{theirs}.weight"]
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        read = stream.reader.tensor(f"model.layers.0.{ours}.weight")
        assert torch.equal(read.float(), values)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "model.gguf"]


@pytest.mark.parametrize("matrices", [KIND.Q8_0, KIND.Q4_0, KIND.F32])
def test_more_than_16_bits_are_refused_or_rounded_by_request(tmp_path, matrices):
    file = write_gguf(tmp_path / "model.gguf", torch.float32, matrices)
    with pytest.raises(CheckpointError, match="is not the same number in 16 bits") as raised:
        import_gguf(file, tmp_path / "folder")
    assert f"the file holds {matrices.name} (" in str(raised.value)
    assert not (tmp_path / "folder").exists()
    found = import_gguf(file, tmp_path / "folder", rounded=True)
    assert found.dtype == "bfloat16"
    assert found.rounded >= len(SHAPES)
    assert 0 < found.difference <= 2**-8
    assert StreamedModel(tmp_path / "folder").dtype == torch.bfloat16


def test_what_cannot_be_imported(tmp_path):
    (tmp_path / "text.gguf").write_text("no model")
    cut = write_gguf(tmp_path / "cut.gguf", torch.bfloat16)
    cut.write_bytes(cut.read_bytes()[:20000])
    other = write_gguf(tmp_path / "other.gguf", torch.bfloat16, architecture="unheard-of")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for file, folder, said in (
        (tmp_path / "none.gguf", "new", "none.gguf: no such file"),
        (tmp_path / "text.gguf", "new", "text.gguf: not a GGUF file that can be read"),
        (cut, "new", "cut.gguf: not a GGUF file that can be read"),
        (other, "new", "other.gguf: transformers does not read it"),
        (other, "full", "full: holds something already"),
    ):
        with pytest.raises(CheckpointError, match=said) as raised:
            import_gguf(file, tmp_path / folder)
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "new").exists()


def test_the_command(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", torch.bfloat16, KIND.BF16)
    arguments = ["import", str(file), str(tmp_path / "folder"), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["model"] == str(tmp_path / "folder")
    assert said["stored_as"] == {"BF16": 8, "F32": 3}
    assert AutoTokenizer.from_pretrained(tmp_path / "folder")("abc").input_ids == [2, 5]
    assert CliRunner().invoke(app, arguments).exit_code == 1  # it is there
