"""Two releases of one recipe at the same time, as processes of their own, one of them killed."""

import json
import time
from collections import Counter

import pytest
from conftest import run_flow
from forked import Forked
from test_same_bytes import contents

from flows.quantize import quantize
from infra.registry import Registry
from infra.registry.tracking import tracking_store
from infra.store import Store
from tasks.support.worker import workers_here

# `dpq …` that notes when it begins the costly parts of a release.
COUNTED = """
import os, sys
from pathlib import Path
log = Path(sys.argv.pop(1))
def counted(module, name):
    function = getattr(module, name)
    def call(*arguments, **keywords):
        with log.open("a") as file:
            file.write(f"{os.getpid()} {name}\\n")
        return function(*arguments, **keywords)
    setattr(module, name, call)
import tasks.calibrate, tasks.quantize, tasks.score
counted(tasks.calibrate, "block_passes")
counted(tasks.quantize, "quantize_or_keep")
counted(tasks.score, "last_states")
from flows.cli.main import main
main()
"""
PART = "quantize_or_keep"
ONCE = {"block_passes": 5, "quantize_or_keep": 35, "last_states": 2}


@pytest.fixture
def together(recipe_file, brief, tmp_path):
    """Two `dpq release` of one recipe, and what they noted: process → part → how often."""
    log = tmp_path / "log"
    arguments = ["release", recipe_file, "--json", "--set", f"execution.store={tmp_path / 'store'}"]
    arguments += ["--set", f"registry.name={tmp_path.name}", "--set", brief]
    both = [Forked(log, *arguments, program=COUNTED) for _ in range(2)]

    def noted():
        lines = log.read_text().splitlines() if log.exists() else []
        return Counter(tuple(line.split()) for line in lines)

    yield both, noted
    for process in both:
        process.kill()
        process.communicate()


def parts(noted):
    total = Counter()
    for (_, part), count in noted.items():
        total[part] += count
    return dict(total)


def finished(process):
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return json.loads(output)


def undisturbed(recipe):
    return contents(run_flow(quantize, recipe).checkpoint.folder)


def test_they_share_the_work_and_the_version(together, recipe, services_home, tmp_path):
    both, noted = together
    one, two = (finished(process) for process in both)
    assert parts(noted()) == ONCE
    assert one["verdict"] == two["verdict"] == "promoted"
    assert one["model_version"] == two["model_version"] == 1
    assert one["metrics"] == two["metrics"]
    assert Registry(tracking_store(services_home)[0]).champion(tmp_path.name) == 1
    store = Store(tmp_path / "store")
    (checkpoint,) = (store.root / "checkpoints").iterdir()
    assert contents(checkpoint) == undisturbed(recipe)
    assert [folder for folder in store.folders() if store.problems(folder)] == []
    for waste in ("tmp", "leases", "runs"):
        assert list((store.root / waste).iterdir()) == []


def test_when_one_is_killed_the_other_takes_over(together, recipe, tmp_path):
    both, noted = together
    deadline = time.monotonic() + 900
    while not (
        busy := [pid for (pid, part), n in noted().items() if part == "quantize_or_keep" and n >= 3]
    ):
        assert all(process.poll() is None for process in both), both[0].communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    victim = next(process for process in both if str(process.pid) == busy[0])
    (survivor,) = (process for process in both if process is not victim)
    victim.kill()
    assert finished(survivor)["verdict"] == "promoted"
    again = Counter(parts(noted())) - Counter(ONCE)
    workers = workers_here(recipe.execution)
    assert again[PART] <= workers  # what the victim had in work
    assert again.total() <= workers + 1  # and the block that it calibrated
    (checkpoint,) = (tmp_path / "store" / "checkpoints").iterdir()
    assert contents(checkpoint) == undisturbed(recipe)
