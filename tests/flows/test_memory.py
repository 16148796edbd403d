"""Room is checked before a run, and what was used stands beside what was predicted."""

import pytest
from conftest import run_flow
from test_same_bytes import in_store

from flows.quantize import quantize
from infra.care import stored
from infra.store import Store
from tasks.support import memory
from tasks.support.memory import RoomError


def test_too_little_memory_ends_a_run_before_it_starts(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 10_000_000)
    fresh = in_store(recipe, tmp_path / "store", workers=3)
    with pytest.raises(RoomError, match=r"execution.workers: 3: .* and 10.0 MB are available"):
        run_flow(quantize, fresh)
    assert not (tmp_path / "store" / "statistics").exists()


def test_too_little_disk_unless_the_store_has_it_all(recipe, tmp_path, monkeypatch):
    done = run_flow(quantize, recipe)
    monkeypatch.setattr(memory, "_free", lambda folder: 1000)
    with pytest.raises(RoomError, match=r"execution.store: .* and 1.0 kB are free: .*dpq store gc"):
        run_flow(quantize, in_store(recipe, tmp_path / "store"))
    assert run_flow(quantize, recipe).checkpoint == done.checkpoint


@pytest.mark.parametrize("runner", ["threads", "processes"])
def test_prediction_and_use(recipe, tmp_path, runner):
    fresh = in_store(recipe, tmp_path / "store", runner=runner)
    candidate = run_flow(quantize, fresh)
    taken = sum(artifact.size for artifact in stored(Store(tmp_path / "store")))
    assert 0.5 < candidate.inputs.footprint.disk / taken <= 1
    use = candidate.memory
    assert use.predicted > 0
    assert use.used > 0
    assert (use.worker_used is not None) == (runner == "processes")
    assert ("a worker" in use.line) == (runner == "processes")
