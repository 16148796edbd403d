"""Fake accelerators: every worker has one of its own, all are used, and no byte depends on them."""

import threading
from collections import Counter
from dataclasses import replace

import distributed
import pytest
from conftest import run_flow
from forked import dask_cluster
from model_families import TEXT, save, tokenizer
from test_same_bytes import contents, in_store, plainly
from transformers import LlamaConfig, LlamaForCausalLM

import tasks.quantize
from dpq_core.machine.device_kinds import FAKE_DEVICES, KINDS
from dpq_core.recipe import parse_recipe
from flows.quantize import quantize
from tasks.support.memory import RoomError
from tasks.support.worker import this_worker

DEVICES, BLOCKS, LAYERS = 8, 32, 224
INPUTS = 4 * BLOCKS  # that layers share: tasks

# Notes every leaf whose Hessians are begun, in a worker elsewhere.
NOTED = """
import dpq_core.calibration.statistics as module
statistics = module.BlockPasses.statistics
def noted(self, *arguments):
    with open({log!r}, "a") as file:
        file.write(next(iter(self.inputs)) + "\\n")
    return statistics(self, *arguments)
module.BlockPasses.statistics = noted
"""


@pytest.fixture(autouse=True)
def _own_claims(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture(scope="module")
def deep(content, tmp_path_factory):
    """A recipe's content: small layers, many of them."""
    folder = tmp_path_factory.mktemp("deep")
    config = LlamaConfig(**{**TEXT, "num_hidden_layers": BLOCKS, "rope_parameters": None})
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    calibration = {"samples": 32, "sequence_length": 16}
    return content | {
        "model": {"id": str(folder)},
        "scheme": {"group_size": 32, "rounding": "nearest"},
        "calibration": content["calibration"] | calibration,
    }


@pytest.fixture
def recipe_of_many(deep, services_home):
    return parse_recipe(deep)


@pytest.fixture
def recipe_of_two(deep, services_home, tmp_path):
    return parse_recipe(deep | {"model": {"id": str(save("llama-2", tmp_path / "two"))}})


class Rounds:
    """Layers in rounds: a device begins its next when all have had theirs, as if each took the same
    time. Once every task has been begun, each goes on by itself."""

    def __init__(self, quantize_or_keep):
        self.layers, self.tasks, self.busy = Counter(), Counter(), Counter()
        self.threads = {}  # by device
        self._quantize, self._inputs = quantize_or_keep, set()
        self._barrier, self._counting = threading.Barrier(DEVICES), threading.Lock()

    def __call__(self, weight, inputs, *arguments):
        name = this_worker(None).name
        with self._counting:
            self.layers[name] += 1
            self.threads.setdefault(name, set()).add(threading.get_ident())
            self.busy[name] += 1
            assert self.busy[name] == 1
            if inputs not in self._inputs:
                self._inputs.add(inputs)  # kept, so that no other has its identity
                self.tasks[name] += 1
            if len(self._inputs) == INPUTS:
                self._barrier.abort()
        try:
            self._barrier.wait(timeout=600)
        except threading.BrokenBarrierError:
            assert len(self._inputs) == INPUTS, "fewer than eight work at a time"
        made = self._quantize(weight, inputs, *arguments)
        with self._counting:
            self.busy[name] -= 1
        return made


def test_eight_devices_share_the_layers_and_no_device_is_shared(
    recipe_of_many, tmp_path, monkeypatch
):
    monkeypatch.setenv(FAKE_DEVICES, str(DEVICES))
    recipe = in_store(recipe_of_many, tmp_path / "eight", device="fake", blocks_per_task=8)
    recipe = in_store(recipe, tmp_path / "eight", scratch=str(tmp_path / "scratch"))
    rounds = Rounds(tasks.quantize.quantize_or_keep)
    with monkeypatch.context() as patch:
        patch.setattr(tasks.quantize, "quantize_or_keep", rounds)
        eight = run_flow(quantize, recipe)
    assert eight.inputs.worker.name.startswith("fake:")
    assert rounds.layers.total() == LAYERS
    assert rounds.tasks.total() == INPUTS
    assert set(rounds.layers) == {f"fake:{n}" for n in range(DEVICES)}
    assert all(len(threads) == 1 for threads in rounds.threads.values())
    assert max(rounds.layers.values()) <= 1.1 * min(rounds.layers.values())
    assert len(set.union(*rounds.threads.values())) == DEVICES

    plainly(recipe, tmp_path / "plain")
    assert contents(tmp_path / "plain") == contents(eight.checkpoint.folder)
    assert not (tmp_path / "eight" / "statistics").exists()
    assert len(list((tmp_path / "scratch" / "statistics").iterdir())) == INPUTS
    for spent in ("hidden", "tmp", "leases"):
        assert list((tmp_path / "scratch" / spent).iterdir()) == []


@pytest.fixture
def elsewhere(services_home, monkeypatch, tmp_path):
    """Two workers that have devices, which we have not; and what they note."""
    log = tmp_path / "log"
    environment = {FAKE_DEVICES: "2", "TMPDIR": str(tmp_path)}
    with dask_cluster(n_workers=2, env=environment) as cluster:
        with distributed.Client(cluster) as client:
            client.run(exec, NOTED.format(log=str(log)), {})
        yield cluster, log


def test_a_cpu_s_flow_finds_what_workers_with_devices_made(recipe_of_two, tmp_path, elsewhere):
    cluster, log = elsewhere
    recipe = in_store(
        recipe_of_two,
        tmp_path / "store",
        device="fake",
        runner="dask",
        dask_address=cluster.scheduler_address,
        shards=2,
    )
    run_flow(quantize, recipe)
    begun = Counter(log.read_text().splitlines())
    assert len(begun) == 2
    assert set(begun.values()) == {2}  # each leaf of each block once, by whoever had it
    assert len(list((tmp_path / "store" / "statistics").iterdir())) == 2 * 4
    with distributed.Client(cluster) as client:
        workers = client.run(this_worker, recipe.execution)
    assert {worker.name for worker in workers.values()} == {"fake:0", "fake:1"}


def test_memory_of_a_device_is_checked_before_and_shown_after(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv(FAKE_DEVICES, "2")
    asked = in_store(recipe, tmp_path / "store", device="fake")
    monkeypatch.setitem(KINDS, "fake", replace(KINDS["fake"], memory=lambda index: 70_000_000))
    with pytest.raises(RoomError, match=r"execution.device: fake:\d: .* and 70.0 MB are there"):
        run_flow(quantize, asked)
    assert not (tmp_path / "store" / "statistics").exists()
    enough = replace(
        KINDS["fake"], memory=lambda index: 80 << 30, peak=lambda index: (index + 1) * 1000
    )
    monkeypatch.setitem(KINDS, "fake", enough)
    memory = run_flow(quantize, asked).memory
    assert memory.device_used in (1000, 2000)
    assert f"; a device {memory.device_used / 1000:.1f} kB of " in memory.line
    assert memory.as_metrics()["memory.device_predicted_mb"] > 64
