"""Room is checked before a run, and what was used stands beside what was predicted."""

from dataclasses import replace

import pytest
import torch
from conftest import run_flow
from test_same_bytes import in_store

from dpq_core.evaluation.chunk_files import save_states
from dpq_core.evaluation.forest import chunks_of
from dpq_core.evaluation.requests import asked_of_windows
from dpq_core.evaluation.room import Room, Sizes
from dpq_core.evaluation.scorer import last_states
from dpq_core.evaluation.subject import subject_of
from flows.quantize import quantize
from flows.release.release import release
from infra.care import stored
from infra.store import Store
from tasks.support import memory
from tasks.support.memory import RoomError, check_scoring_room
from tasks.support.worker import Worker


def test_too_little_memory_ends_a_run_before_it_starts(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 10_000_000)
    fresh = in_store(recipe, tmp_path / "store", workers=3)
    with pytest.raises(RoomError, match=r"execution.workers: 3: .* and 10.0 MB are available"):
        run_flow(quantize, fresh)
    assert not (tmp_path / "store" / "statistics").exists()


@pytest.mark.parametrize(
    ("room", "there", "message"),
    [
        (Room(own=3 << 30, device=0), None, "evaluating takes 3.8 GB each, 7.0 GB in all"),
        (Room(own=0, device=3 << 30), 1 << 30, "execution.device: cuda:0: evaluating takes 3.2 GB"),
    ],
)
def test_too_little_memory_for_an_evaluation(recipe, monkeypatch, room, there, message):
    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 30)
    worker = Worker("cuda:0", "a card", torch.device("cpu"), "cuda-sm_90", there)
    with pytest.raises(RoomError, match=message):
        check_scoring_room(recipe.execution, room, worker)
    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 40)
    check_scoring_room(recipe.execution, room, replace(worker, memory=None))


def test_too_little_disk_unless_the_store_has_it_all(recipe, tmp_path, monkeypatch):
    done = run_flow(quantize, recipe)
    monkeypatch.setattr(memory, "_free", lambda folder: 1000)
    with pytest.raises(RoomError, match=r"execution.store: .* and 1.0 kB are free: .*dpq store gc"):
        run_flow(quantize, in_store(recipe, tmp_path / "store"))
    assert run_flow(quantize, recipe).checkpoint == done.checkpoint


def test_too_little_disk_for_the_kept_states(recipe, tmp_path, monkeypatch):
    """What layers and checkpoint take is there, and not much more."""
    needed = run_flow(quantize, recipe).inputs.footprint
    monkeypatch.setattr(memory, "_free", lambda folder: needed.disk + 1000)
    what = r"execution.store: .*: last hidden states of the perplexity text \(\d.*\), layers and"
    with pytest.raises(RoomError, match=what + ".*are free: .*dpq store gc"):
        run_flow(release, in_store(recipe, tmp_path / "store"))
    assert not (tmp_path / "store" / "statistics").exists()


def test_kept_states_take_what_is_predicted(quickstart_model, tmp_path):
    subject = subject_of(quickstart_model)
    chunks = chunks_of(asked_of_windows(torch.arange(600).remainder(250).reshape(2, 300)))
    (chunk,) = chunks
    (states,) = last_states(subject, [chunk])
    save_states(tmp_path, states)
    (file,) = tmp_path.iterdir()
    predicted = Sizes.of(subject.stream).kept(len(chunk))
    assert predicted <= file.stat().st_size <= predicted + 1000  # its header


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
