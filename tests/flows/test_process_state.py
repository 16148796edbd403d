"""What is one for the whole process, and several threads that would each set and put it back."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import torch
from test_evaluate import write_suite

from dpq_core.evaluation.suites import definitions
from dpq_core.evaluation.suites.definitions import SuiteSources, loaded_suites
from dpq_core.machine import device
from dpq_core.machine.device import freed_memory_kept, settle_thread, whole_machine
from flows.cli.results import printing_to_stderr

REPOSITORY = Path(__file__).parents[2]
LONG = 300  # s, for a thread on a machine as busy as it likes

COMMAND = """
import os, subprocess, sys, threading
from flows.cli.errors import errors, print_json
with errors(as_json=True):
    print("a library")
    sys.__stdout__.write("a handler that was made before\\n")
    os.write(1, b"a library in C\\n")
    subprocess.run(["echo", "a child"])
    thread = threading.Thread(target=print, args=["a thread"])
    thread.start()
    thread.join()
    print_json({"verdict": "promoted"})
print("afterwards")
with errors(as_json=True):
    raise ValueError("bad")
"""


def test_a_command_s_json_is_all_that_stdout_has(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", COMMAND],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "DPQ_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    first, second, third = run.stdout.splitlines()
    assert (first, second) == ('{"verdict": "promoted"}', "afterwards")
    assert third.startswith('{"verdict": "error", "reasons": ["bad')
    for said in ("a library", "a handler that was", "a library in C", "a child", "a thread"):
        assert said in run.stderr


def interleaved(work):
    """`work(name, enter, leave)` in two threads: the second enters while the first is inside, and
    leaves after it."""
    inside, left = threading.Event(), threading.Event()
    entered = threading.Event()
    failed = []

    def first():
        try:
            work("first", lambda: inside.set() or entered.wait(LONG), left.set)
        except BaseException as error:
            failed.append(error)
            left.set()

    def second():
        try:
            inside.wait(LONG)
            work("second", lambda: entered.set() or left.wait(LONG), lambda: None)
        except BaseException as error:
            failed.append(error)
            entered.set()

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_torch_s_threads_are_afterwards_what_they_were(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    before = torch.get_num_threads()
    seen = {}

    def work(name, enter, leave):
        with whole_machine(parts=2):
            seen[f"{name} at work"] = torch.get_num_threads()
            enter()
            seen[f"{name} still"] = torch.get_num_threads()
        leave()
        seen[f"{name} afterwards"] = torch.get_num_threads()

    try:
        interleaved(work)
        new = threading.Thread(target=lambda: seen.update(new=torch.get_num_threads()))
        new.start()
        new.join()
        at_work = {name for name in seen if "at work" in name or "still" in name}
        assert {name: seen[name] for name in seen} == {
            name: 2 if name in at_work else before for name in seen
        }
        assert torch.get_num_threads() == before
    finally:
        settle_thread(before)


def test_a_thread_that_begins_beside_one_on_the_whole_machine_keeps_its_own(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    seen = []

    def begin():
        settle_thread(1)
        torch.ones(300, 300) @ torch.ones(300, 300)
        seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    with whole_machine():
        thread = threading.Thread(target=begin)
        thread.start()
        thread.join()
    assert seen == [1]
    settle_thread(before)


def test_freed_memory_is_given_back_by_the_last(monkeypatch):
    calls = []
    monkeypatch.setattr(device, "_keep_freed_blocks", lambda below: calls.append(below))
    at_leaving = []

    def work(name, enter, leave):
        with freed_memory_kept():
            enter()
        at_leaving.append(list(calls))
        leave()

    interleaved(work)
    assert at_leaving == [[1 << 30], [1 << 30, 1 << 20]]


def test_data_sets_are_kept_where_they_were(tmp_path, monkeypatch):
    """Of local suites they are loaded into a folder of their own, one for the process meanwhile."""
    import datasets

    for name in ("first", "second"):
        write_suite(tmp_path, name, documents=3)
    usual, load, caches = datasets.config.HF_DATASETS_CACHE, definitions._load, []
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def slowly(manager, name):
        caches.append(datasets.config.HF_DATASETS_CACHE)
        if name == "first":
            first_in.set()
            second_in.wait(2)  # it cannot come in: that is what is tested
        else:
            second_in.set()
            first_out.wait(LONG)
        return load(manager, name)

    monkeypatch.setattr(definitions, "_load", slowly)

    def ask(name):
        if name == "second":
            first_in.wait(LONG)
        with loaded_suites([name], SuiteSources(definitions=tmp_path)):
            pass
        if name == "first":
            first_out.set()

    threads = [threading.Thread(target=ask, args=[name]) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert usual == datasets.config.HF_DATASETS_CACHE
    assert len({*caches, usual}) == 3


def test_a_stdout_that_is_a_test_s_own_is_put_back():
    before = sys.stdout
    with printing_to_stderr() as results:
        assert results is before
        assert sys.stdout is sys.stderr
    assert sys.stdout is before
