"""One at a time, whoever dies: real processes, killed for real."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from infra.store.leases import Leases, telling_of_waits
from infra.store.owners import LIMIT, Attendance, Owner

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 300  # s, on a machine as busy as it likes

HOLD = """
import sys, time
from pathlib import Path
from infra.store.leases import Leases
with Leases(Path(sys.argv[1])).held("key"):
    print("held", flush=True)
    sys.stdin.read()
"""
COUNT = """
import sys
from pathlib import Path
from test_leases import count
count(Path(sys.argv[1]))
"""


def count(folder):
    """Add 1, 40 times, with a moment in between at which the number is lost."""
    leases, counter = Leases(folder / "leases"), folder / "counter"
    for _ in range(40):
        with leases.held("counter"):
            value = int(counter.read_text())
            counter.write_text("")
            counter.write_text(str(value + 1))


@pytest.fixture
def leases(tmp_path):
    return Leases(tmp_path / "leases")


def process(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{Path(__file__).parent}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def holder(leases):
    """Another process that has the lease `key`."""
    with process(HOLD, leases.folder) as other:
        assert other.stdout.readline() == "held\n"
        yield other
        other.kill()


def let_go(leases, name="key"):
    """Who had a lease has it no more, and left nothing."""
    return leases.holder(name) is None and not list(leases.folder.iterdir())


def test_processes_and_threads_take_turns(tmp_path):
    (tmp_path / "counter").write_text("0")
    others = [process(COUNT, tmp_path) for _ in range(3)]
    threads = [threading.Thread(target=count, args=(tmp_path,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [other.wait(timeout=PATIENCE) for other in others] == [0, 0, 0]
    assert (tmp_path / "counter").read_text() == "200"
    assert let_go(Leases(tmp_path / "leases"), "counter")


def test_whoever_waits_says_for_whom_and_goes_on_when_it_is_done(leases, holder, monkeypatch):
    monkeypatch.setattr("infra.store.leases._SILENT", 0.1)
    told = []

    def tell(line):
        told.append(line)
        holder.stdin.close()

    with telling_of_waits(tell), leases.held("key"):
        assert holder.wait(timeout=PATIENCE) == 0
    assert told == [f"waiting for key: {owner_of(holder)} makes it"]
    assert let_go(leases)


def owner_of(holder):
    return f"process {holder.pid} on {Owner.new().host}"


def test_a_killed_holder_is_followed_at_once(leases, holder, monkeypatch):
    monkeypatch.setattr("infra.store.leases.LIMIT", math.inf)  # its silence is not what tells
    holder.send_signal(signal.SIGKILL)  # a zombie until it is waited for
    with leases.held("key"):
        assert leases.holder("key").pid == os.getpid()
    assert let_go(leases)


def test_a_stopped_holder_of_this_machine_keeps_its_lease(leases, holder, monkeypatch):
    monkeypatch.setattr("infra.store.leases.LIMIT", 0.1)
    monkeypatch.setattr("infra.store.leases._SILENT", 0.5)
    holder.send_signal(signal.SIGSTOP)
    held_by = []

    def tell(_line):
        held_by.append(leases.holder("key").pid)
        holder.stdin.close()
        holder.send_signal(signal.SIGCONT)

    with telling_of_waits(tell), leases.held("key"):
        assert held_by == [holder.pid]
        assert holder.wait(timeout=PATIENCE) == 0


def test_a_holder_of_another_machine_is_followed_when_it_gives_no_sign(leases, monkeypatch):
    theirs = leases.folder / "key" / "17.1700000000.e15e47e2.0123456789abcdef.gpu-9.example.org"
    theirs.parent.mkdir(parents=True)
    theirs.touch()

    now, last = 0.0, 100.0

    def sleep(seconds):  # the clock of this test: signs until the last, then none
        nonlocal now
        now += seconds
        if now < last:
            os.utime(theirs, (now, now))

    monkeypatch.setattr(
        "infra.store.leases.time", SimpleNamespace(monotonic=lambda: now, sleep=sleep)
    )
    with leases.held("key"):
        assert last + LIMIT - 1 < now < last + LIMIT + 1
        assert not theirs.exists()


def test_of_many_that_follow_a_dead_one_a_single_one_does_at_a_time(leases, holder):
    holder.kill()
    holder.wait()
    inside, most, lock = 0, 0, threading.Lock()

    def follow():
        nonlocal inside, most
        with leases.held("key"):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.02)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=follow) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=PATIENCE)
    assert most == 1
    assert let_go(leases)


def test_an_error_lets_go(leases):
    with pytest.raises(ZeroDivisionError), leases.held("key"):
        _ = 1 / 0
    assert let_go(leases)


def test_cleaning_leaves_what_the_living_hold(leases, holder):
    with leases.held("mine"):
        leases.clean()
        assert leases.holder("key").pid == holder.pid
        assert leases.holder("mine").pid == os.getpid()
        holder.kill()
        holder.wait()
        leases.clean()
        assert leases.holder("key") is None
        assert leases.holder("mine").pid == os.getpid()


def test_a_sign_of_life_comes_while_a_lease_is_held(leases, monkeypatch):
    monkeypatch.setattr("infra.store.owners._BEAT", 0.05)
    with leases.held("key"):
        (path,) = (leases.folder / "key").iterdir()
        os.utime(path, (0, 0))
        deadline = time.monotonic() + PATIENCE
        while path.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_name_is_read_back_and_a_reused_pid_is_nobody():
    me = Owner.new()
    assert Owner.parse(str(me)) == me
    assert me.gone is False
    assert Owner.parse(str(me).replace(f".{me.started}.", f".{me.started - 100}.")).gone is True
    assert Owner.parse("12.34.e15e47e2.0123456789abcdef.host.of.others").gone is None
    for another in ("readme.txt", "12.34.elsewhere.0.host", "2024.01.report.final.tar"):
        assert Owner.parse(another) is None


@pytest.mark.skipif(not psutil.LINUX, reason="start times of processes are the clock's elsewhere")
def test_a_clock_that_is_set_kills_nobody(monkeypatch):
    me, booted = Owner.new(), psutil.boot_time()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: booted + 3600)
    assert psutil.boot_time() == booted + 3600
    assert me.gone is False


def test_attendance_lists_the_living(tmp_path, monkeypatch):
    attendance = Attendance(tmp_path / "runs")
    assert attendance.living() == {}
    with attendance.present() as me, attendance.present() as again:
        assert set(attendance.living()) == {me, again}
        gone = (
            tmp_path / "runs" / f"{me.pid}.{me.started - 100}.{me.place}.{me.tag[::-1]}.{me.host}"
        )
        gone.touch()
        far = tmp_path / "runs" / "12.34.e15e47e2.0123456789abcdef.host.of.others"
        far.touch()
        assert set(attendance.living()) == {me, again, Owner.parse(far.name)}
        os.utime(far, (0, 0))
        assert set(attendance.living()) == {me, again}
        attendance.forget_the_dead()
        assert {path.name for path in (tmp_path / "runs").iterdir()} == {str(me), str(again)}
    assert list((tmp_path / "runs").iterdir()) == []
