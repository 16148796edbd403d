"""Reading ahead fills the kernel's page cache, and no memory of the process."""

import ctypes
import mmap
import os
import time

import pytest
import torch
from safetensors.torch import save_file

from dpq_core.model.reader import CheckpointReader
from dpq_core.model.streaming import StreamedModel

ELEMENTS = 8 << 20


def resident(path):
    """Share of a file's pages that are in the page cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as view:
        pages = -(-len(view) // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        start = ctypes.addressof(ctypes.c_char.from_buffer(view))
        assert not ctypes.CDLL(None).mincore(
            ctypes.c_void_p(start), ctypes.c_size_t(len(view)), found
        )
        return sum(each & 1 for each in found) / pages


def forget(path):
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system does not read ahead")
def test_only_what_is_named_is_read(tmp_path):
    shards = {"first": "a.safetensors", "second": "b.safetensors"}
    for name, shard in shards.items():
        save_file({name: torch.zeros(ELEMENTS, dtype=torch.bfloat16)}, tmp_path / shard)
    index = f'{{"weight_map": {str(shards).replace(chr(39), chr(34))}}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    reader = CheckpointReader(tmp_path)
    for shard in shards.values():
        forget(tmp_path / shard)
    if resident(tmp_path / "b.safetensors") > 0.1:
        pytest.skip("this file system keeps its pages")
    reader.read_ahead(["second"])
    deadline = time.monotonic() + 300
    while resident(tmp_path / "b.safetensors") < 0.9 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert resident(tmp_path / "b.safetensors") >= 0.9
    assert resident(tmp_path / "a.safetensors") < 0.1


def test_every_block_but_the_first_is_read_ahead(quickstart_model, monkeypatch):
    stream, seen = StreamedModel(quickstart_model), []
    monkeypatch.setattr(stream.reader, "read_ahead", lambda names: seen.append(sorted(names)))
    for index in range(stream.block_count + 1):
        stream.read_ahead(index)
    paths = [stream.block_name(index) for index in range(stream.block_count)]
    assert seen == [stream.reader.under(path) for path in paths]
