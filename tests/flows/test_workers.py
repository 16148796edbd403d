"""A worker has a device of its own; what recipes name, on machines that have other devices."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dpq_core.convnet.recipe import ConvRecipe
from dpq_core.machine import device_kinds
from dpq_core.machine.device import DeviceError, resolve_device
from dpq_core.machine.device_kinds import FAKE_DEVICES, KINDS
from dpq_core.recipe import ExecutionSection
from flows.running import dask_runner
from flows.running.dask_runner import LayersOnDask
from tasks.support import worker
from tasks.support.worker import (
    OwnDevices,
    become_sole_worker,
    become_worker,
    this_worker,
    visible_devices,
    workers_here,
)


@pytest.fixture(autouse=True)
def four(monkeypatch, tmp_path):
    """Fake devices, and claims of this test's own."""
    monkeypatch.setenv(FAKE_DEVICES, "4")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(worker, "_of_process", None)
    monkeypatch.setattr(worker, "_own", None)


def asking(**execution):
    return ExecutionSection(**{"device": "fake", **execution})


@pytest.mark.parametrize(
    ("execution", "names"),
    [
        ({}, ["fake:0", "fake:1", "fake:2", "fake:3"]),
        ({"workers": 2}, ["fake:0", "fake:1"]),
        ({"workers": 9}, ["fake:0", "fake:1", "fake:2", "fake:3"]),
        ({"devices": 3}, ["fake:0", "fake:1", "fake:2"]),
        ({"devices": 3, "workers": 2}, ["fake:0", "fake:1"]),
        ({"device": "auto", "devices": ["fake:3", "fake:1"]}, ["fake:3", "fake:1"]),
        ({"device": "fake:2"}, ["fake:2"]),
        ({"device": "cpu"}, ["cpu", "cpu"]),
        ({"device": "cpu", "workers": 3}, ["cpu", "cpu", "cpu"]),
    ],
)
def test_one_a_worker(execution, names):
    devices = OwnDevices(asking(**execution))
    assert devices.names == names
    assert workers_here(asking(**execution)) == len(names)
    devices.release()


@pytest.mark.parametrize(
    ("execution", "said"),
    [
        ({"devices": 5}, r"execution.devices: 5, and of fake this machine has 4: lower it"),
        ({"device": "cpu", "devices": 1}, r"execution.devices: 1, and of cpu .*execution.workers"),
        ({"device": "auto", "devices": ["fake:4"]}, r"fake:4 is not available on this machine"),
        ({"device": "cuda"}, r"execution.device: cuda is not available"),
        ({"device": "fake:x"}, r"execution.device: fake:x is not available"),
    ],
)
def test_what_is_not_here_is_refused(execution, said):
    with pytest.raises(DeviceError, match=said):
        OwnDevices(asking(**execution))


@pytest.mark.parametrize(
    ("devices", "said"),
    [([], "empty list"), (["cuda:0", "cuda:0"], "names cuda:0 twice"), (0, "greater than")],
)
def test_a_recipe_names_several(devices, said):
    with pytest.raises(ValueError, match=said):
        ExecutionSection(devices=devices)
    with pytest.raises(ValueError, match="device is cpu, and devices names others"):
        ExecutionSection(device="cpu", devices=["cuda:0"])


def test_other_runs_devices_are_left_alone():
    first = OwnDevices(asking(devices=3))
    second = OwnDevices(asking())  # whatever there is
    assert second.names == ["fake:3"]
    with pytest.raises(DeviceError, match=r"of fake:0, .* have all but 0: wait"):
        OwnDevices(asking())
    second.release()
    with pytest.raises(DeviceError, match="have all but 1"):
        OwnDevices(asking(devices=2))
    first.release()
    assert OwnDevices(asking(devices=2)).names == ["fake:0", "fake:1"]


def test_devices_of_different_arithmetic_are_not_mixed(monkeypatch):
    mixed = replace(KINDS["fake"], arithmetic=lambda index: f"fake-sm_{80 + index // 2}")
    monkeypatch.setitem(KINDS, "fake", mixed)
    with pytest.raises(DeviceError, match=r"fake:0 computes as fake-sm_80 and fake:2 as fake-sm_8"):
        OwnDevices(asking())
    assert OwnDevices(asking(workers=2)).names == ["fake:0", "fake:1"]


def test_a_thread_has_its_own_and_others_the_recipe_s():
    found = []

    def work():
        become_worker("fake:3", of_process=False)
        found.append(this_worker(asking()).name)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ["fake:3"]
    assert this_worker(asking(device="auto", devices=["fake:2"])).name == "fake:2"
    assert this_worker(asking(device="cpu")).arithmetic.startswith("cpu-")


def test_a_process_that_is_asked_again_keeps_its_device_or_takes_another():
    held = next(worker.claims(["fake-0"]))  # another worker of this machine
    assert become_sole_worker(asking()).name == "fake:1"
    assert become_sole_worker(asking()).name == "fake:1"
    assert this_worker(asking()).name == "fake:1"
    assert become_sole_worker(asking(device="cpu")).name == "cpu"
    assert next(worker.claims(["fake-1"])).name == "fake-1"  # it was given back
    held.release()


@pytest.fixture
def cuda(monkeypatch):
    """Two GPUs, of which torch is not really told: calls of set_device."""
    calls = []
    module = SimpleNamespace(is_initialized=lambda: False, set_device=calls.append)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    kind = replace(
        KINDS["cuda"],
        count=lambda: 2,
        arithmetic=lambda index: "cuda-sm_90",
        title=lambda index: "H100",
        memory=lambda index: 80 << 30,
    )
    monkeypatch.setitem(device_kinds.KINDS, "cuda", kind)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    return calls


def test_a_process_sees_its_own_gpu_alone(cuda, monkeypatch):
    taken = become_worker("cuda:1", of_process=True)
    assert worker.os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    assert (taken.name, taken.device) == ("cuda:1", torch.device("cuda", 0))
    assert taken.memory == 80 << 30
    assert cuda == []
    thread = threading.Thread(target=this_worker, args=[asking(device="cuda")])
    thread.start()
    thread.join()
    assert cuda == [torch.device("cuda", 0)]  # whichever thread a task runs in


def test_a_process_that_claims_for_itself_sees_its_gpu_alone(cuda, monkeypatch):
    started = []
    kind = replace(KINDS["cuda"], arithmetic=lambda index: started.append(index) or "cuda-sm_90")
    monkeypatch.setitem(KINDS, "cuda", kind)
    held = next(worker.claims(["cuda-5"]))  # another worker's
    assert become_sole_worker(asking(device="cuda")).name == "cuda:1"
    assert worker.os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    assert started == [0]  # torch is asked of nothing before
    held.release()


def test_a_thread_selects_its_gpu_among_all(cuda):
    taken = become_worker("cuda:1", of_process=False)
    assert worker.os.environ["CUDA_VISIBLE_DEVICES"] == "5,7"
    assert taken.device == torch.device("cuda", 1)
    assert cuda == [1]
    worker._of_thread.__dict__.clear()


def test_what_processes_claim_is_the_gpu_whatever_they_call_it(cuda, monkeypatch):
    one = OwnDevices(asking(device="cuda:1"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5")
    other = OwnDevices(asking(device="cuda"))
    assert (one.names, other.names) == (["cuda:1"], ["cuda:1"])  # 7, and then 5
    assert [claim.name for claim in (*one.claims, *other.claims)] == ["cuda-7", "cuda-5"]
    assert visible_devices(asking(device="cuda")) == ["7", "5"]
    assert resolve_device("cuda") == torch.device("cuda", 0)


@pytest.mark.parametrize("installed", [False, True])
def test_dask_s_own_cluster_for_gpus_where_it_is_installed(cuda, monkeypatch, installed):
    cluster = type("LocalCUDACluster", (), {})
    monkeypatch.setattr(dask_runner, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(
        dask_runner, "import_module", lambda name: SimpleNamespace(LocalCUDACluster=cluster)
    )
    runner = LayersOnDask.of(asking(device="cuda", runner="dask"))
    runner._plan_cluster()
    assert runner.cluster_kwargs["n_workers"] == 2
    if installed:
        assert runner.resolved_cluster_class is cluster
        assert runner.cluster_kwargs["CUDA_VISIBLE_DEVICES"] == ["5", "7"]
    else:
        assert runner.resolved_cluster_class.__name__ == "LocalCluster"
        assert "CUDA_VISIBLE_DEVICES" not in runner.cluster_kwargs


def test_convolutional_networks_leave_accelerators_to_others():
    assert OwnDevices(ConvRecipe(execution={"workers": 3}).execution).names == ["cpu"] * 3
    with pytest.raises(ValueError, match="devices is 2, and convolutional networks run on the CPU"):
        ConvRecipe(execution={"devices": 2})
