"""Texts as streams of tokens, for a machine that has no texts: what `why.py` and
`methods_table.py` carry to a GPU."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def streams_of(
    texts: Mapping[str, tuple[str, str, str | None]],
    tokenizer: Any,
    data: Path,
) -> dict[str, NDArray[Any]]:
    """Token ids by stream, as uint16 or int32, whichever is smaller.

    Args:
        texts: by stream, a file of JSON lines below `data`, its column of text, and what stands
            between rows: None for the tokenizer's end of text after each.
    """
    narrow = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    streams = {}
    for name, (file, column, between) in texts.items():
        with gzip.open(data / file, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line)[column] for line in lines]
        if between is not None:
            ids = tokenizer(between.join(rows), verbose=False, add_special_tokens=False).input_ids
        else:
            ids = []
            for each in tokenizer(rows, verbose=False, add_special_tokens=False).input_ids:
                ids += [*each, tokenizer.eos_token_id]
        streams[name] = np.array(ids, narrow)
        print(f"{name}: {len(ids):,} tokens", flush=True)
    return streams
