"""How vLLM's kernel for CPUs turns numbers into FP8 for its cache: all of BF16 between 2⁻⁸ and 448,
by a scale of 1. Runs in vLLM's environment, and knows nothing of this project.

    python vllm_fp8_cache.py

Prints, as JSON, the share of numbers whose stored value is the nearest one of E4M3, and the share
whose stored value is the next one towards zero.
"""

import json

import torch
from vllm import _custom_ops as ops

BLOCK, SIZE = 128, 64  # tokens of a block, numbers of a head


def stored(x):
    """What the cache has of BF16 numbers [at most BLOCK], as FP32."""
    values = x[:, None, None].expand(len(x), 1, SIZE).contiguous()
    cache = torch.zeros(1, 1, 2 * BLOCK, SIZE, dtype=torch.uint8)
    keys, kept = cache.chunk(2, dim=2)
    about = {"k_scale": 1.0, "v_scale": 1.0, "kv_cache_dtype": "fp8"}
    ops.cpu_attn_reshape_and_cache(values, values, keys, kept, torch.arange(len(x)), "vec", **about)
    ascending = kept.flatten().sort()[0][-len(x) * SIZE :]  # whatever the layout
    return ascending.view(len(x), SIZE)[:, 0].view(torch.float8_e4m3fn).float()


def main():
    x = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)
    x = x[(x >= 2**-8) & (x <= 448)]
    found = torch.cat([stored(part) for part in x.split(BLOCK)])
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    below = grid[torch.searchsorted(grid, x.float(), right=True) - 1]
    nearest = x.float().to(torch.float8_e4m3fn).float()
    shares = {"nearest": found == nearest, "truncated": found == below}
    print(json.dumps({name: same.float().mean().item() for name, same in shares.items()}))


if __name__ == "__main__":
    main()
