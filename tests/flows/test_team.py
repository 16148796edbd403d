"""The team's services as plain processes: PostgreSQL, Redis, an S3 endpoint, Prefect and MLflow
with passwords, a worker; releases on them; and nothing of them left behind."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import psycopg2
import pytest
import s3fs

from dpq_core.checkpoint.exports import verify
from infra import compose, team
from infra.compose import ComposeError
from infra.team import REPOSITORY, TeamError

EXAMPLE = (REPOSITORY / ".env.example").read_text().splitlines()
SECRETS = [line.removesuffix("=") for line in EXAMPLE if not line.startswith("#")]
PYTHONPATH = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
PATIENCE = 600  # s, for a release on a machine as busy as it likes
WAIT = ("--wait", "--timeout", str(PATIENCE), "--json")

installed = pytest.mark.skipif(
    bool(team.missing()), reason=f"not installed: {', '.join(team.missing())}: make system"
)


@pytest.fixture(scope="module")
def settings():
    """Secrets, and ports that nobody uses."""
    probes = {name: socket.socket() for name in compose.ports()}
    for probe in probes.values():
        probe.bind(("127.0.0.1", 0))
    ports = {name: str(probe.getsockname()[1]) for name, probe in probes.items()}
    for probe in probes.values():
        probe.close()
    return ports | {name: secrets.token_hex(16) for name in SECRETS}


@pytest.fixture(scope="module")
def home():
    """A folder that the user `postgres` can enter, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="dpq-team-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def command(home, settings, tmp_path_factory):
    """Run `python -m infra.team …`."""
    programs = tmp_path_factory.mktemp("bin")
    dpq = programs / "dpq"
    dpq.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "from flows.cli.main import main; main()" "$@"'
    )
    dpq.chmod(0o755)
    environment = {
        **os.environ,
        **settings,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": PYTHONPATH,
    }

    def run(*arguments, folder=home, **more):
        return subprocess.run(
            [sys.executable, "-m", "infra.team", *arguments, "--home", str(folder)],
            env=environment | more,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    return run


@pytest.fixture(scope="module")
def running(home, settings, command, content):
    """The services, up; a recipe where the worker takes them from; and ways to reach all of it."""
    done = command("up")
    assert done.returncode == 0, done.stderr
    try:
        recipes = home / "work" / "recipes"
        recipes.mkdir()
        own = {"registry": {"name": "team"}, "execution": {"device": "cpu"}}
        (recipes / "team.yaml").write_text(json.dumps(content | own))
        prefect, mlflow = settings["PREFECT_PORT"], settings["MLFLOW_PORT"]
        client = {
            "PREFECT_API_URL": f"http://127.0.0.1:{prefect}/api",
            "PREFECT_API_AUTH_STRING": f"dpq:{settings['PREFECT_PASSWORD']}",
        }

        def dpq(*arguments):
            done = subprocess.run(
                [sys.executable, "-c", "from flows.cli.main import main; main()", *arguments],
                env={**os.environ, **client, "PYTHONPATH": PYTHONPATH},
                cwd=home,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
            return done.returncode, json.loads(done.stdout or "{}"), done.stderr

        def query(database, sql):
            with psycopg2.connect(
                host="127.0.0.1",
                port=settings["POSTGRES_PORT"],
                user="dpq",
                password=settings["POSTGRES_PASSWORD"],
                dbname=database,
            ) as connection:
                cursor = connection.cursor()
                cursor.execute(sql)
                return cursor.fetchall()

        yield SimpleNamespace(
            dpq=dpq,
            query=query,
            s3=s3fs.S3FileSystem(
                key=settings["S3_ACCESS_KEY"],
                secret=settings["S3_SECRET_KEY"],
                endpoint_url=f"http://127.0.0.1:{settings['S3_PORT']}",
                client_kwargs={"region_name": "us-east-1"},
            ),
            client=client,
            mlflow=f"http://127.0.0.1:{mlflow}",
            prefect=client["PREFECT_API_URL"],
        )
    finally:
        command("down")


def sources(running):
    rows = running.query("mlflow", "SELECT version, source FROM model_versions WHERE name = 'team'")
    return dict(rows)


def champion(running):
    about = "FROM registered_model_aliases WHERE name = 'team' AND alias = 'champion'"
    return running.query("mlflow", f"SELECT version {about}")[0][0]


@pytest.mark.slow
@installed
def test_a_release_lands_in_postgresql_and_s3(running, tmp_path):
    code, said, error = running.dpq("trigger", "release", "--recipe", "team.yaml", *WAIT)
    assert (code, said.get("verdict")) == (0, "promoted"), error
    assert champion(running) == said["model_version"] == 1
    address = sources(running)[1]
    assert address.startswith("s3://releases/team/")
    running.s3.get(address, str(tmp_path / "native"), recursive=True)
    verify(tmp_path / "native")
    artifacts = running.s3.find(f"mlflow/1/{said['run_id']}/artifacts")
    assert "report.html" in {Path(path).name for path in artifacts}
    sql = "SELECT state_name FROM flow_run WHERE state_type <> 'SCHEDULED'"
    (state,) = running.query("prefect", sql)
    assert state == ("Promoted",)


@pytest.mark.slow
@installed
def test_a_rejected_release_asked_for_with_curl_is_registered_too(running):
    script = REPOSITORY / "examples" / "release_http.sh"
    done = subprocess.run(
        ["sh", str(script), "team.yaml", '"gates.perplexity_increase=0.000001"'],
        env={**os.environ, **running.client, "RELEASE_TIMEOUT": str(PATIENCE)},
        capture_output=True,
        text=True,
    )
    said = done.stdout.splitlines()[-1]
    assert (done.returncode, said) == (2, "Rejected: keep the champion"), done.stderr
    assert sources(running)[2].startswith("s3://releases/team/")
    assert champion(running) == 1


@pytest.mark.slow
@installed
def test_nobody_gets_in_without_a_password(running, settings):
    doors = {
        f"{running.mlflow}/api/2.0/mlflow/experiments/get?experiment_id=0": "MLFLOW_PASSWORD",
        f"{running.prefect}/work_pools/dpq": "PREFECT_PASSWORD",
    }
    with httpx.Client(trust_env=False) as client:
        for url, secret in doors.items():
            assert client.get(url).status_code == 401
            assert client.get(url, auth=("dpq", "wrong")).status_code == 401
            assert client.get(url, auth=("dpq", settings[secret])).status_code == 200


@pytest.mark.slow
@installed
def test_no_secret_is_in_a_log_a_database_or_an_artifact(running, settings, home):
    planted = [settings[name].encode() for name in SECRETS]
    deadline = time.monotonic() + PATIENCE
    while list((home / "tmp").glob("prefect-workspace-*")):  # a run's environment, until its end
        assert time.monotonic() < deadline
        time.sleep(0.5)
    files = [path for path in home.rglob("*") if path.is_file()]
    objects = [*running.s3.find("mlflow"), *running.s3.find("releases")]
    names = {Path(path).name for path in [*files, *objects]}
    assert {"worker.log", "PG_VERSION", "report.html", "dpq.json"} <= names
    contents = {}
    for path in files:
        with suppress(FileNotFoundError):  # PostgreSQL has just removed it
            contents[str(path)] = path.read_bytes()
    contents |= {path: running.s3.cat_file(path) for path in objects}
    found = [p for p, content in contents.items() if any(secret in content for secret in planted)]
    assert found == []


@pytest.mark.slow
@installed
def test_down_leaves_nothing(running, settings, command, home):
    started = [
        psutil.Process(pid)
        for pid, *_ in json.loads((home / "processes.json").read_text())
        if psutil.pid_exists(pid)
    ]
    family = [*started, *(child for each in started for child in each.children(recursive=True))]
    assert {"postgres", "redis-server", "mlflow", "prefect"} <= {each.name() for each in family}
    again = command("up")
    assert again.returncode == 1
    assert "is up already" in again.stderr
    done = command("down", "--volumes")
    assert done.returncode == 0, done.stderr
    assert [each for each in family if each.is_running()] == []
    assert not home.exists()
    for name in compose.ports():
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", int(settings[name]))) != 0


@pytest.mark.slow
@installed
def test_what_does_not_come_up_takes_down_what_did(command, settings):
    nowhere = f"http://localhost:{settings['S3_PORT']}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        done = command("up", folder=folder, S3_ENDPOINT=nowhere)
        assert done.returncode == 1
        assert "buckets ended with code 1 while starting" in done.stderr
        assert {"logs", "postgres"} <= {path.name for path in folder.iterdir()}
        (folder / "notes.txt").touch()
        assert command("down", "--volumes", folder=folder).returncode == 0
        assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    for name in ("POSTGRES_PORT", "REDIS_PORT"):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", int(settings[name]))) != 0


def test_a_port_that_is_taken_and_a_secret_that_is_missing_are_said_first(
    settings, monkeypatch, tmp_path
):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("PREFECT_PORT", port)
        with pytest.raises(TeamError, match=f"port {port} is taken: set PREFECT_PORT"):
            team.up(tmp_path / "team")
    monkeypatch.delenv("REDIS_PASSWORD")
    with pytest.raises(ComposeError, match="REDIS_PASSWORD is empty"):
        team.up(tmp_path / "team")
    assert not (tmp_path / "team").exists()
