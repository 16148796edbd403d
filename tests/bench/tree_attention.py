"""Attention over trees of shared prefixes: our kernel beside torch's masked product, span by span.

    python tests/bench/tree_attention.py [--tokens 1024] [--repeats 15]

Trees are questions of 40 tokens with four answers of 20; a text is one sequence. Both make what the
scorer asks of a pack, from keys and what sees them on; CPU ms of one thread, the least of the
repeats, spans of 128 queries by masks made before.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention

from dpq_core.kernels.tree_attention import LANES, Seen, attend

HEADS = ((8, 4, 8), (4, 2, 64), (9, 3, 64), (32, 8, 128))  # heads, key heads, size
SHAPES = {"trees": (40, 4, 20), "a text": (1 << 20, 0, 0)}  # of a question, answers, of an answer
SPAN = 128


def seen_by(tokens: int, question: int, answers: int, answer: int) -> NDArray[np.bool_]:
    """[queries, keys]."""
    ends, start = np.empty(tokens, int), 0
    while start < tokens:
        ends[start : start + question] = start + question + answers * answer
        for number in range(answers):
            first = start + question + number * answer
            ends[first : first + answer] = first + answer
        start += question + answers * answer
    places = np.arange(tokens)
    return (places <= places[:, None]) & (places[:, None] < ends)


def least(function: Callable[[], object], repeats: int) -> float:
    """CPU ms."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        found.append(time.process_time() - start)
    return 1e3 * min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokens = arguments.tokens
    print("| heads × size | | ours | torch, FP32 | torch, BF16 | BF16 / ours | GFLOP/s of ours |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for heads, key_heads, size in HEADS:
        for title, shape in SHAPES.items():
            seen = seen_by(tokens, *shape)
            listed = Seen.of(np.ascontiguousarray(seen.T))
            query = torch.randn(heads, tokens, size)
            key, value = torch.randn(2, key_heads, tokens, size)
            operands = query, key, value
            masks = []
            for start in range(0, tokens, SPAN):
                mine = seen[start : start + SPAN, : start + SPAN]
                first = int(mine.any(0).argmax())
                mask = torch.zeros(mine[:, first:].shape)
                hidden = ~torch.from_numpy(mine[:, first:])
                masks.append((start, first, mask.masked_fill_(hidden, -torch.inf)))

            def by_torch(dtype: torch.dtype, operands=operands, masks=masks) -> None:
                q, k, v = (each[None].to(dtype) for each in operands)
                for start, first, mask in masks:
                    keys = slice(first, start + SPAN)
                    scaled_dot_product_attention(
                        q[:, :, start : start + SPAN],
                        k[:, :, keys],
                        v[:, :, keys],
                        attn_mask=mask.to(dtype),
                        enable_gqa=True,
                    )

            ours = least(
                lambda q=query, k=key, v=value, listed=listed: attend(q, k, v, listed, 0.1),
                arguments.repeats,
            )
            theirs = [
                least(lambda dtype=dtype, call=by_torch: call(dtype), arguments.repeats)
                for dtype in (torch.float32, torch.bfloat16)
            ]
            rate = 4 * len(listed.keys) * LANES * heads * size / ours / 1e6
            cells = (*(f"{each:.2f}" for each in (ours, *theirs)), f"{theirs[1] / ours:.1f}")
            print(f"| {heads} × {size} | {title} | {' | '.join(cells)} | {rate:.0f} |", flush=True)


if __name__ == "__main__":
    main()
