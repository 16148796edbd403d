"""Layers on Dask workers, and what a worker that dies leaves."""

import time

import psutil
import pytest
from conftest import PATIENCE, dpq_process, run_flow
from forked import dask_cluster
from test_same_bytes import contents, in_store, layer_artifacts

from dpq_core.recipe import RecipeError, parse_recipe
from flows.quantize import quantize
from flows.running import dask_runner
from flows.running.dask_runner import ClusterError


@pytest.fixture
def undisturbed(recipe):
    return contents(run_flow(quantize, recipe).checkpoint.folder)


@pytest.fixture
def cluster(services_home):
    """One worker that has a GPU, or says so."""
    with dask_cluster(n_workers=1, resources={"GPU": 1}) as cluster:
        yield cluster


def test_an_existing_cluster_gives_the_same_bytes(recipe, undisturbed, cluster, tmp_path):
    address = {"runner": "dask", "dask_address": cluster.scheduler_address}
    asking = in_store(recipe, tmp_path / "store", resources={"GPU": 1}, **address)
    assert contents(run_flow(quantize, asking).checkpoint.folder) == undisturbed
    with pytest.raises(ClusterError, match=r"takes GPU: 2, .* declares is 1: .*--resources GPU=2"):
        run_flow(quantize, in_store(recipe, tmp_path / "other", resources={"GPU": 2}, **address))
    assert not (tmp_path / "other").exists()


def test_no_scheduler_at_the_address(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(dask_runner, "_CONNECTING", 1)
    nowhere = {"runner": "dask", "dask_address": "tcp://127.0.0.1:9"}
    with pytest.raises(ClusterError, match=r"tcp://127.0.0.1:9: .*start `dask scheduler`"):
        run_flow(quantize, in_store(recipe, tmp_path / "store", **nowhere))


@pytest.mark.parametrize("field", [{"resources": {"GPU": 1}}, {"dask_address": "tcp://x:1"}])
def test_what_only_dask_honours_needs_dask(content, field):
    with pytest.raises(RecipeError, match=f"{next(iter(field))} needs runner: dask"):
        parse_recipe(content | {"execution": content["execution"] | field})


@pytest.mark.parametrize("runner", ["dask", "processes"])
def test_a_worker_is_killed(recipe_file, dpq, undisturbed, tmp_path, runner):
    store = tmp_path / "store"
    settings = [f"execution.store={store}", f"execution.runner={runner}", "execution.workers=2"]
    options = [f"--set={setting}" for setting in settings]
    run = dpq_process("quantize", recipe_file, *options)
    worker = a_worker_at_work(run, store)
    family = psutil.Process(run.pid).children(recursive=True)
    worker.kill()
    finished = layer_artifacts(store)
    output, errors = run.communicate(timeout=PATIENCE)
    if runner == "processes":  # its pool is broken; Dask starts another worker
        assert run.returncode == 1, output
        assert "the worker that had it was killed" in errors
        assert "lower execution.workers" in errors
        again = dpq("quantize", *options, "--set=execution.workers=1")
        assert again.exit_code == 0, again.stderr
    else:
        assert run.returncode == 0, errors
    now = layer_artifacts(store)
    assert {key: now[key] for key in finished} == finished
    checkpoint = next((store / "checkpoints").iterdir())
    assert contents(checkpoint) == undisturbed
    psutil.wait_procs(family, timeout=PATIENCE)
    assert not [process for process in family if process.is_running()]


def a_worker_at_work(run, store):
    """A child of `run` that has a layer in work, once five are done."""
    deadline = time.monotonic() + PATIENCE
    while len(layer_artifacts(store)) < 5:
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = [
        process
        for process in psutil.Process(run.pid).children(recursive=True)
        if any("spawn_main" in argument for argument in process.cmdline())
    ]
    return max(workers, key=lambda process: sum(process.cpu_times()[:2]))
