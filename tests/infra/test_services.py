"""Embedded services, with real processes: a Prefect server once, elsewhere a small web server."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import httpx
import psutil
import pytest
from prefect import flow, task
from prefect.context import refresh_global_settings_context
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings
from web_server import MLFLOW, PREFECT, web_server

from infra.orchestration.services import services, ui
from infra.orchestration.shared_server import ServerKind, ServiceError, shared_server

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 300  # s, on a machine as busy as it likes
USER = """
import sys
from pathlib import Path
from infra.orchestration.services import services
with services(Path(sys.argv[1])) as running:
    print(running.prefect_api_url, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def _settings_read_again():
    """Once the environment is what it was: what asks for it before `monkeypatch` ends before it."""
    yield
    refresh_global_settings_context()


@pytest.fixture(autouse=True)
def _nothing_configured(_settings_read_again, monkeypatch):
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "PREFECT_LOCAL_STORAGE_PATH"):
        monkeypatch.delenv(name, raising=False)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        yield


def eventually(condition: Callable[[], bool], timeout: float = PATIENCE) -> bool:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@contextmanager
def user_process(root: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """Another `dpq` under the same root, and the address that it got; leaves at end of input."""
    inherited = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"}
    process = subprocess.Popen(
        [sys.executable, "-c", USER, str(root)],
        env={**inherited, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, process.stdout.readline().strip()
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode in (0, -signal.SIGKILL)
        assert (out, err) == ("", "")
    finally:
        process.kill()
        process.communicate()


def server_pid(root: Path, name: str = "prefect") -> int:
    return json.loads((root / name / "server.json").read_text())["pid"]


@pytest.fixture(scope="module")
def abandoned(tmp_path_factory) -> Iterator[tuple[Path, int, str]]:
    """Root, pid and address of a Prefect server whose only user was killed with SIGKILL."""
    root = tmp_path_factory.mktemp("dpq")
    pid = None
    try:
        with user_process(root) as (process, url):
            pid = server_pid(root)
            process.kill()
        yield root, pid, url
    finally:
        if pid and psutil.pid_exists(pid):
            psutil.Process(pid).kill()


@task
def double(number: int) -> int:
    return 2 * number


@flow
def doubled() -> int:
    return sum(double.map(list(range(20))).result())


FLOW = """
import sys
from pathlib import Path
sys.path += [sys.argv[1], f"{sys.argv[1]}/tests", f"{sys.argv[1]}/tests/infra"]
from test_services import doubled, services
with services(Path(sys.argv[2])):
    print(doubled())
"""


def run_flow_in_a_process(root: Path) -> str:
    """A user's flow. Not in this process, whose Prefect clients stay with the first server."""
    command = [sys.executable, "-c", FLOW, str(REPOSITORY), str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def task_runs(url: str) -> int:
    return httpx.post(f"{url}/task_runs/count", json={}).json()


def test_an_abandoned_prefect_server_is_adopted_shared_and_stopped_by_its_last_user(
    abandoned, capfd
):
    root, pid, url = abandoned
    assert httpx.get(f"{url}/health").is_success
    before = dict(os.environ)

    with services(root) as running:
        assert running.prefect_api_url == url == get_current_settings().api.url
        assert running.prefect_api_url == os.environ["PREFECT_API_URL"]
        assert running.prefect_ui_url == url.removesuffix("/api")
        assert httpx.get(f"{running.prefect_ui_url}/ui-settings").json()["api_url"] == url
        assert running.mlflow_tracking_uri == f"sqlite:///{root}/mlflow/mlflow.db"
        assert running.artifact_root == root / "mlflow" / "artifacts"
        with user_process(root) as (_, second):
            assert second == url
        assert server_pid(root) == pid
        assert psutil.pid_exists(pid)
        assert run_flow_in_a_process(root) == "380"

    assert not psutil.pid_exists(pid)
    assert not (root / "prefect" / "server.json").exists()
    assert not list((root / "prefect" / "users").iterdir())
    assert get_current_settings().api.url is None
    ignored = {"PYTEST_CURRENT_TEST", *(name for name in os.environ if "MLFLOW" in name)}
    after = dict(os.environ)
    assert {k: v for k, v in after.items() if k not in ignored} == {
        k: v for k, v in before.items() if k not in ignored
    }
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert "WARNING" not in err
    with sqlite3.connect(root / "prefect" / "prefect.db") as database:
        rows = database.execute("select state_type, count(*) from task_run group by 1").fetchall()
    assert rows == [("COMPLETED", 20)]


@pytest.mark.parametrize("how", ["environment", "profile"])
def test_a_configured_prefect_api_is_used_and_nothing_is_started(tmp_path, monkeypatch, how):
    with web_server(PREFECT) as prefect, web_server(MLFLOW) as mlflow:
        url = f"{prefect}/api"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow)
        profile = {PREFECT_API_URL: url} if how == "profile" else {}
        if how == "environment":
            monkeypatch.setenv("PREFECT_API_URL", url)
        with temporary_settings(profile), services(tmp_path) as running:
            assert running.prefect_api_url == url == get_current_settings().api.url
            assert running.prefect_ui_url == prefect
            assert running.mlflow_tracking_uri == mlflow
            assert running.artifact_root is None
    assert not list(tmp_path.iterdir())


def test_services_within_services_change_nothing(tmp_path, monkeypatch):
    """Each added this machine to `no_proxy` once more, and read Prefect's settings again."""
    with web_server(PREFECT) as prefect, web_server(MLFLOW) as mlflow:
        monkeypatch.setenv("PREFECT_API_URL", f"{prefect}/api")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow)
        with services(tmp_path) as outer:
            before, settings = dict(os.environ), get_current_settings()
            with services(tmp_path) as inner:
                assert inner == outer
                assert dict(os.environ) == before
                assert get_current_settings() is settings
            assert dict(os.environ) == before


def test_threads_that_inherit_nothing_get_the_address_again(tmp_path, monkeypatch):
    """As after a test, or a run, that had another server, and gave this one back here alone."""
    with web_server(PREFECT) as prefect, web_server(MLFLOW) as mlflow:
        monkeypatch.setenv("PREFECT_API_URL", f"{prefect}/api")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow)
        with services(tmp_path):
            with mock.patch.dict(os.environ, {"PREFECT_API_URL": "http://elsewhere/api"}):
                refresh_global_settings_context()
            with services(tmp_path), ThreadPoolExecutor() as threads:
                found = threads.submit(lambda: get_current_settings().api.url).result()
            assert found == f"{prefect}/api"


def test_ui_serves_mlflow_on_the_same_store_and_stops_it(tmp_path, monkeypatch):
    with ExitStack() as stack:
        prefect = stack.enter_context(web_server(PREFECT))
        monkeypatch.setenv("PREFECT_API_URL", f"{prefect}/api")
        addresses = stack.enter_context(ui(tmp_path))
        assert addresses.prefect == prefect
        family = psutil.Process(server_pid(tmp_path, "mlflow"))
        family = [family, *family.children(recursive=True)]
        found = httpx.post(
            f"{addresses.mlflow}/api/2.0/mlflow/experiments/search", json={"max_results": 5}
        )
        assert [e["name"] for e in found.json()["experiments"]] == ["Default"]
        assert (tmp_path / "mlflow" / "mlflow.db").is_file()
    assert not any(process.is_running() for process in family)


# The protocol of sharing, with a server that is up at once.


def web(*, command: list[str] | None = None, port: int = 0) -> ServerKind:
    def launch(home: Path, port: int) -> tuple[list[str], dict[str, str]]:
        serve = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
        return command or serve, dict(os.environ)

    return ServerKind("web", port, "/", launch, settle=lambda url: None)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.HTTPError:
        return False


def test_a_dead_server_is_replaced_on_its_port_and_files_of_dead_users_do_not_keep_it(tmp_path):
    with shared_server(web(), tmp_path) as first:
        (tmp_path / "web" / "users" / "4194303-1").touch()
        dead = server_pid(tmp_path, "web")
        os.kill(dead, signal.SIGKILL)
        assert eventually(lambda: not psutil.pid_exists(dead))
        user = tmp_path / "web" / "users" / f"{os.getpid()}-2"
        code = (
            "import sys, pathlib; "
            "sys.path[:0] = [sys.argv[1] + each for each in ('', '/tests', '/tests/infra')]; "
            "from test_services import web, shared_server\n"
            "with shared_server(web(), pathlib.Path(sys.argv[2])) as url: print(url)"
        )
        second = subprocess.run(
            [sys.executable, "-c", code, str(REPOSITORY), str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert second.stdout.strip() == first
        assert not user.exists()
        assert server_pid(tmp_path, "web") != dead
        assert answers(first)  # for the process that is still using it
    assert not answers(first)


def test_a_server_that_dies_is_started_again_while_somebody_uses_it(tmp_path):
    with shared_server(web(), tmp_path) as url:
        for _ in range(2):
            dead = server_pid(tmp_path, "web")
            os.kill(dead, signal.SIGKILL)
            assert eventually(lambda dead=dead: server_pid(tmp_path, "web") != dead)
            assert eventually(lambda: answers(url))
    assert not answers(url)
    assert not (tmp_path / "web" / "server.json").exists()


def test_a_server_that_dies_over_and_over_is_given_up(tmp_path):
    starts = tmp_path / "starts"
    code = (
        "import runpy, sys; starts = open(sys.argv[2], 'a+'); starts.write('.'); starts.flush(); "
        "starts.seek(0); assert starts.read() == '.', 'not again'; "
        "sys.argv[1:] = [sys.argv[1], '--bind', '127.0.0.1']; "
        "runpy.run_module('http.server', run_name='__main__')"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", code, str(port), str(starts)]
    with shared_server(web(port=port, command=command), tmp_path) as url:
        os.kill(server_pid(tmp_path, "web"), signal.SIGKILL)
        assert eventually(lambda: len(starts.read_text()) == 4)
        time.sleep(3)
        assert len(starts.read_text()) == 4
        assert not answers(url)


def test_a_pid_that_now_belongs_to_another_program_is_left_alone(tmp_path):
    home = tmp_path / "web"
    home.mkdir()
    stale = {"pid": os.getpid(), "port": 1, "command": ["python", "-m", "http.server", "1"]}
    (home / "server.json").write_text(json.dumps(stale))
    with shared_server(web(), tmp_path) as url:
        assert answers(url)
        assert server_pid(tmp_path, "web") != os.getpid()


@pytest.mark.parametrize("unnamed", [0, 2])
def test_a_server_that_does_not_answer_is_replaced(tmp_path, monkeypatch, unnamed):
    """One that was started only now has no arguments at the first looks: the kernel's are set
    after the program is loaded."""
    arguments, looks = psutil.Process.cmdline, []

    def cmdline(process):
        looks.append(process)
        return arguments(process) if len(looks) > unnamed else []

    monkeypatch.setattr(psutil.Process, "cmdline", cmdline)
    monkeypatch.setattr("infra.orchestration.shared_server._ADOPT_TIMEOUT", 0.5)
    home = tmp_path / "web"
    home.mkdir()
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with subprocess.Popen(command) as hung:
        stale = {"pid": hung.pid, "port": 1, "command": command}
        (home / "server.json").write_text(json.dumps(stale))
        with shared_server(web(), tmp_path) as url:
            assert answers(url)
            hung.wait(timeout=PATIENCE)


def test_a_taken_port_is_avoided_and_its_owner_is_not_mistaken_for_ours(tmp_path):
    with socket.socket() as owner:
        owner.bind(("127.0.0.1", 0))
        owner.listen()
        port = owner.getsockname()[1]
        with shared_server(web(port=port), tmp_path) as url:
            assert url != f"http://127.0.0.1:{port}"
            assert answers(url)


def test_a_port_that_another_took_and_gave_back_before_we_look_is_no_error(tmp_path):
    kind, starts = web(), []

    def launch(home, port):
        command, environment = kind.launch(home, port)
        starts.append(port)
        beaten = [sys.executable, "-c", "raise SystemExit('address already in use')"]
        return (beaten if len(starts) == 1 else command), environment

    with shared_server(replace(kind, launch=launch), tmp_path) as url:
        assert answers(url)
    assert len(starts) == 2


def test_a_server_that_dies_is_an_error_with_its_log_and_last_line(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no space left on device\\n')"]
    with (
        pytest.raises(ServiceError, match=r"web-server\.log: no space left on device$"),
        shared_server(web(command=command), tmp_path),
    ):
        pass
    assert not (tmp_path / "web" / "server.json").exists()


def test_a_server_that_stays_silent_is_an_error_and_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("infra.orchestration.shared_server._START_TIMEOUT", 1.0)
    pid = tmp_path / "pid"
    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    with (
        pytest.raises(ServiceError, match=r"did not answer within 1 s; .*it is empty"),
        shared_server(web(command=[sys.executable, "-c", code]), tmp_path),
    ):
        pass
    assert not psutil.pid_exists(int(pid.read_text()))


FORSAKING = """
import os, pathlib, sys
import infra.orchestration.shared_server as servers
servers._FORSAKEN = 1.0
def launch(home, port):
    return [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"], dict(os.environ)
web = servers.ServerKind("web", 0, "/", launch, settle=lambda url: None)
with servers.shared_server(web, pathlib.Path(sys.argv[1])) as url:
    print(url, flush=True)
    sys.stdin.read()
"""


def test_a_server_whose_users_were_all_killed_ends_by_itself(tmp_path):
    command = [sys.executable, "-c", FORSAKING, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    pipes["env"] = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, **pipes) as first, subprocess.Popen(command, **pipes) as second:
        url = first.stdout.readline().strip()
        assert second.stdout.readline().strip() == url
        server = psutil.Process(server_pid(tmp_path, "web"))
        first.kill()
        first.wait()
        time.sleep(2)
        assert answers(url)  # for the other
        second.kill()
    assert eventually(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)
    assert eventually(lambda: not (tmp_path / "web" / "server.json").exists())
    assert not answers(url)
