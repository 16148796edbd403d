"""A model that came from GGUF, in files small enough to carry to a machine without a network.

    python tests/bench/carry_model.py pack MODEL.gguf FOLDER PACKED     # needs the package `gguf`
    python tests/bench/carry_model.py unpack PACKED FOLDER              # torch, numpy, safetensors

`FOLDER` is what `make_real.sh` made of `MODEL.gguf`. Its BF16 weights are the GGUF's blocks of 32,
decoded: a scale d and codes q, w = d q (Q8_0), or with an offset m, w = d q + m (Q4_1), d and m in
FP16. So the blocks are carried, their streams Huffman-coded: `weights-0.safetensors` and
`weights-1.safetensors`, of about equal size. Packing decodes what it has packed and compares all
bits. Of SmolLM2-135M 269 MB become 85.
"""

import argparse
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

FILES = 2
# Bytes of a block of 32: FP16 numbers first, then the codes.
NUMBERS = {"Q4_1": 4, "Q8_0": 2}
CODES = {"Q4_1": 16, "Q8_0": 32}
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=("pack", "unpack"))
    parser.add_argument("folders", nargs="+", type=Path)
    arguments = parser.parse_args()
    {"pack": pack, "unpack": unpack}[arguments.verb](*arguments.folders)


def pack(source: Path, folder: Path, packed: Path) -> None:
    """Both files, and the folder's small ones; raises where a bit of a weight would be lost."""
    from gguf import GGUFReader

    packed.mkdir(parents=True, exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    parts: list[dict[str, Tensor]] = [{} for _ in range(FILES)]
    sizes = [0] * FILES
    with safe_open(folder / "model.safetensors", "pt") as weights:
        for tensor in sorted(GGUFReader(source).tensors, key=lambda each: -each.n_bytes):
            name, kind = hf_name(tensor.name), tensor.tensor_type.name
            raw = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(len(tensor.data), -1)
            if own := [count for short, count in heads.items() if f".{short}." in tensor.name]:
                raw = raw[interleaved(len(raw), own[0])]
            streams = encoded(name, kind, raw)
            original = weights.get_tensor(name)
            if not torch.equal(decoded(name, streams, original.shape), original):
                raise SystemExit(f"{name}: the {kind} blocks do not give the folder's BF16 weights")
            smallest = sizes.index(min(sizes))
            parts[smallest] |= streams
            sizes[smallest] += sum(each.numel() for each in streams.values())
            shape = ",".join(map(str, original.shape))
            parts[smallest][f"{name}|shape|{shape}"] = torch.empty(0, dtype=torch.uint8)
    for number, part in enumerate(parts):
        save_file(part, packed / f"weights-{number}.safetensors")
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            shutil.copy(file, packed)
    print(f"{sum(sizes):,} bytes in {FILES} files, all bits as in {folder}")


def unpack(packed: Path, folder: Path) -> None:
    """The model's folder again."""
    streams: dict[str, Tensor] = {}
    for number in range(FILES):
        streams |= load_file(packed / f"weights-{number}.safetensors")
    shapes = {
        name.split("|")[0]: [int(size) for size in name.split("|")[2].split(",")]
        for name in streams
        if "|shape|" in name
    }
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: decoded(name, streams, shape) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for file in packed.iterdir():
        if not file.name.startswith(("weights-", "tokens")):
            shutil.copy(file, folder)


def hf_name(name: str) -> str:
    """transformers' name of a GGUF tensor."""
    if name.startswith("blk."):
        _, block, short, _ = name.split(".")
        return f"model.layers.{block}.{NAMES[short]}.weight"
    return f"{NAMES[name.split('.')[0]]}.weight"


def interleaved(rows: int, heads: int) -> np.ndarray:
    """Rows of q and k in transformers' order: GGUF pairs the halves that are rotated together."""
    order = np.arange(rows).reshape(heads, rows // heads // 2, 2)
    return order.swapaxes(1, 2).reshape(-1)


def encoded(name: str, kind: str, raw: np.ndarray) -> dict[str, Tensor]:
    """Compressed streams of blocks' bytes [rows, bytes] (numbers' low and high bytes apart)."""
    if kind == "F32":
        return {f"{name}|F32|all": deflated(raw)}
    blocks = raw.reshape(-1, NUMBERS[kind] + CODES[kind])
    numbers = blocks[:, : NUMBERS[kind]]
    return {
        f"{name}|{kind}|low": deflated(numbers[:, ::2]),
        f"{name}|{kind}|high": deflated(numbers[:, 1::2]),
        f"{name}|{kind}|codes": deflated(blocks[:, NUMBERS[kind] :]),
    }


def decoded(name: str, streams: dict[str, Tensor], shape: list[int]) -> Tensor:
    """BF16 weight of a shape, with FP32 arithmetic as the package `gguf` has it."""
    if f"{name}|F32|all" in streams:
        values = inflated(streams[f"{name}|F32|all"]).view(np.float32)
        return torch.from_numpy(values.copy()).to(torch.bfloat16).reshape(shape)
    kind = next(kind for kind in NUMBERS if f"{name}|{kind}|codes" in streams)
    low, high, codes = (inflated(streams[f"{name}|{kind}|{part}"]) for part in PARTS)
    numbers = np.stack([low, high], 1).reshape(-1, NUMBERS[kind]).copy().view(np.float16)
    numbers = numbers.astype(np.float32)
    codes = codes.reshape(-1, CODES[kind])
    if kind == "Q4_1":
        codes = np.concatenate([codes & 15, codes >> 4], 1)
        values = numbers[:, :1] * codes.astype(np.float32) + numbers[:, 1:]
    else:
        values = numbers * codes.view(np.int8).astype(np.float32)
    return torch.from_numpy(values).to(torch.bfloat16).reshape(shape)


PARTS = "low", "high", "codes"


def deflated(values: np.ndarray) -> Tensor:
    """Huffman-coded bytes: there are no repetitions to find."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    data = packer.compress(np.ascontiguousarray(values).tobytes()) + packer.flush()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def inflated(data: Tensor) -> np.ndarray:
    return np.frombuffer(zlib.decompress(data.numpy().tobytes(), -15), np.uint8)


if __name__ == "__main__":
    main()
