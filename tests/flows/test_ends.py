"""Ends before the end: signals, kills, a full disk; real processes on real services."""

import asyncio
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import PATIENCE, dpq_process, run_flow
from prefect import flow, task
from prefect.client.orchestration import get_client
from test_same_bytes import in_store, layer_artifacts
from typer.testing import CliRunner

from dpq_core.recipe import ExecutionSection
from flows.cli.main import app
from flows.quantize import quantize
from flows.running.runners import TaskInterruptedError, task_runner
from infra.orchestration.services import services
from infra.registry.tracking import mlflow_client, tracking_store
from infra.store.owners import PROCESS, Owner
from tasks.support import memory

PROMPT = 30.0  # s, on a machine as busy as it likes: the grace that Kubernetes gives


def started(command, recipe_file, store, *settings, layers=3):
    """`dpq release` or `quantize` that is at its layers."""
    options = [f"execution.store={store}", *settings]
    arguments = [part for each in options for part in ("--set", each)]
    process = dpq_process(command, recipe_file, "--json", *arguments)
    deadline = time.monotonic() + PATIENCE
    while len(layer_artifacts(store)) < layers:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def ended(process, number):
    """Send a signal: seconds until the end, the JSON object, the line of the error."""
    began = time.monotonic()
    process.send_signal(number)
    output, errors = process.communicate(timeout=PATIENCE)
    seconds = time.monotonic() - began
    (error,) = (line for line in errors.splitlines() if line.startswith("error: "))
    return seconds, json.loads(output), error


def mlflow_runs(uri, pid):
    client = mlflow_client(uri)
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs = client.search_runs(experiments)
    return [run for run in runs if Owner.parse(run.data.tags[PROCESS]).pid == pid]


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    """Services that nobody else uses."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("DPQ_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_sigterm_ends_promptly_with_everything_marked_and_the_server_stopped(
    recipe, recipe_file, brief, own_home, tmp_path
):
    store = tmp_path / "store"
    process = started("release", recipe_file, store, brief)
    server = psutil.Process(json.loads((own_home / "prefect" / "server.json").read_text())["pid"])
    seconds, said, error = ended(process, signal.SIGTERM)
    assert process.returncode == 143
    assert seconds < PROMPT
    assert said["verdict"] == "error"
    assert error.startswith("error: ended by SIGTERM: ")
    assert not server.is_running()
    assert not (own_home / "prefect" / "server.json").exists()
    (run,) = mlflow_runs(f"sqlite:///{own_home / 'mlflow' / 'mlflow.db'}", process.pid)
    assert run.info.status == "KILLED"
    with sqlite3.connect(own_home / "prefect" / "prefect.db") as database:
        states = database.execute("select state_type from flow_run").fetchall()
    assert states == [("CRASHED",)]

    before = layer_artifacts(store)
    run_flow(quantize, in_store(recipe, store))
    after = layer_artifacts(store)
    assert len(after) == 35
    assert {key: after[key] for key in before} == before
    assert list((store / "tmp").iterdir()) == list((store / "leases").iterdir()) == []


def test_ctrl_c_ends_worker_processes_too(recipe_file, tmp_path):
    store, runner = tmp_path / "store", "execution.runner=processes"
    process = started("quantize", recipe_file, store, runner)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    seconds, _, error = ended(process, signal.SIGINT)
    assert process.returncode == 130
    assert seconds < PROMPT
    assert error.startswith("error: ended by SIGINT: ")
    assert psutil.wait_procs(workers, timeout=PATIENCE)[1] == []


def test_what_a_killed_process_left_is_marked_by_the_next_run(recipe, recipe_file, brief, tmp_path):
    store, one = tmp_path / "store", ("execution.runner=processes", "execution.workers=1")
    process = started("release", recipe_file, store, *one, brief)
    workers = psutil.Process(process.pid).children(recursive=True)
    uri = tracking_store(Path(os.environ["DPQ_HOME"]))[0]
    process.kill()
    process.communicate()
    assert psutil.wait_procs(workers, timeout=PATIENCE)[1] == []  # nobody works on for a dead run
    (run,) = mlflow_runs(uri, process.pid)
    assert run.info.status == "RUNNING"
    assert flow_states(process.pid) == ["RUNNING"]

    run_flow(quantize, recipe)
    (run,) = mlflow_runs(uri, process.pid)
    assert run.info.status == "FAILED"
    assert run.data.tags["died"].startswith(f"process {process.pid} on ")
    assert flow_states(process.pid) == ["CRASHED"]


def flow_states(pid):
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(limit=200)
    owners = [(Owner.parse(run.labels.get(PROCESS, "")), run.state_type.value) for run in runs]
    return [state for owner, state in owners if owner and owner.pid == pid]


@pytest.mark.slow
def test_a_prefect_server_that_is_gone_for_good_is_an_error_soon(
    recipe_file, own_home, tmp_path, monkeypatch
):
    monkeypatch.setenv("PREFECT_CLIENT_MAX_RETRIES", "1")
    process = started("quantize", recipe_file, tmp_path / "store")
    server = json.loads((own_home / "prefect" / "server.json").read_text())
    for child in psutil.Process(process.pid).children():
        if "infra.orchestration.server_watch" in child.cmdline():
            child.kill()  # it would start the server again
    psutil.Process(server["pid"]).kill()
    output, errors = process.communicate(timeout=6 * PROMPT)  # not ten seconds an event
    assert process.returncode == 1, errors
    (reason,) = json.loads(output)["reasons"]
    assert f"http://127.0.0.1:{server['port']} does not answer" in reason
    assert "run again" in reason


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs root to mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)  # files may still be mapped


# What is gone, and what a run then writes first.
STAGES = {
    "model": "model",
    "windows": "windows",
    "scores": "scores",
    "statistics": "hidden",
    "layers": "layers",
    "checkpoints": "checkpoints",
    "integrity": "integrity",
}


@pytest.fixture
def small_recipe(two_blocks, services_home, tmp_path):
    """Of two blocks, which are random: anything passes its gate."""
    path = tmp_path / "small.yaml"
    own = {"gates": {"perplexity_increase": 1000}, "registry": {"name": "two-blocks"}}
    path.write_text(json.dumps(two_blocks | own))
    return path


def test_a_disk_that_is_full_in_any_stage_is_an_error_and_the_next_run_goes_on(
    small_recipe, small_disk, brief, monkeypatch
):
    monkeypatch.setattr(memory, "_free", lambda folder: 1 << 40)  # it fills up after preflight
    store, filler = small_disk / "store", small_disk / "filler"
    sets = [f"execution.store={store}", "calibration.sequence_length=128", brief]

    def released():
        settings = [word for each in sets for word in ("--set", each)]
        return CliRunner().invoke(app, ["release", str(small_recipe), "--json", *settings])

    whole = released()
    assert whole.exit_code == 0, whole.stderr
    for stage, first in STAGES.items():
        shutil.rmtree(store / stage)
        fill(filler, leave=8192)  # a page to say that we are here, and one to begin
        full = released()
        assert full.exit_code == 1
        (reason,) = json.loads(full.stdout)["reasons"]
        assert f"{store}: " in reason
        assert f"too little for {first}/" in reason
        filler.unlink()
        again = released()
        assert again.exit_code == 0, again.stderr
        assert json.loads(again.stdout)["metrics"] == json.loads(whole.stdout)["metrics"]
    assert list((store / "tmp").iterdir()) == list((store / "leases").iterdir()) == []


def fill(path, leave):
    """Write until the disk is full, and give back a few bytes."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    os.truncate(path, path.stat().st_size // 4096 * 4096 - leave)


@task
def away():
    raise asyncio.CancelledError("the server is away")


@flow
def waits_for_one():
    return away.submit().result()


def test_a_task_that_is_cancelled_from_within_ends_the_wait_for_it(services_home):
    """As Prefect's engine is where its server goes away: the pool's own thread would die of it."""
    with services(services_home):
        runner = task_runner(ExecutionSection(runner="processes", workers=1))
        with pytest.raises(TaskInterruptedError, match=r"interrupted \(CancelledError"):
            waits_for_one.with_options(task_runner=runner)()


_LOCK_NEVER_LET_GO = """
from dpq_core.recipe import ExecutionSection
from flows.running.runners import task_runner

if __name__ == "__main__":
    with task_runner(ExecutionSection(runner="processes", workers=1)) as runner:
        runner._subprocess_message_queue._wlock.acquire()
    print("ended")
"""


def test_a_worker_killed_while_it_sends_something_does_not_keep_the_run(tmp_path):
    """It takes the lock of the queue with it that all send through, the run's own end too."""
    script = tmp_path / "lock.py"
    script.write_text(_LOCK_NEVER_LET_GO)
    command = [sys.executable, script]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (run.returncode, run.stdout) == (0, "ended\n"), run.stderr
