"""Statistics that a process made stay in its memory for its layers, so many blocks' and no more."""

import pytest
from conftest import run_flow
from test_same_bytes import in_store

from dpq_core.layer.hessian import InputStatistics
from flows.quantize import quantize
from infra.store import ArtifactRef
from tasks.support import kept_statistics, tensor_files


@pytest.fixture(autouse=True)
def _nothing_left():
    kept_statistics.forget()
    yield
    kept_statistics.forget()


def artifact(name):
    return ArtifactRef(f"file:///{name}", name, 1)


def block(*names):
    return {artifact(name): InputStatistics.empty(2) for name in names}


def test_taken_once():
    made = block("a", "b")
    kept_statistics.keep(made, 1)
    assert kept_statistics.take(artifact("a")) is made[artifact("a")]
    assert kept_statistics.take(artifact("a")) is None
    assert kept_statistics.take(artifact("b")) is made[artifact("b")]


def test_the_oldest_block_makes_room():
    for names in ("a", "b", "c"):
        kept_statistics.keep(block(names), 2)
    assert [name for name in "abc" if kept_statistics.take(artifact(name))] == ["b", "c"]


@pytest.mark.parametrize("blocks", [1, 5])
def test_layers_read_none_from_the_store_in_the_process_that_made_them(
    recipe, tmp_path, monkeypatch, blocks
):
    read, load = [], tensor_files.load
    monkeypatch.setattr(tensor_files, "load", lambda folder: read.append(folder) or load(folder))
    run_flow(quantize, in_store(recipe, tmp_path / "store", blocks_per_task=blocks))
    statistics = {folder.name for folder in read if folder.parent.name == "statistics"}
    assert len(list((tmp_path / "store" / "statistics").iterdir())) == 4 * 5
    if blocks == 5:
        assert statistics == set()
    else:  # the last block's, at least: one that is behind another has lost its own
        assert len(statistics) <= 4 * 4
    assert kept_statistics._kept == []
