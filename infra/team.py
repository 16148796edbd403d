"""A team's services without Docker: `python -m infra.team up|down`, from docker-compose.yml itself.

    <home>/<volume>/          what is a volume there: postgres, redis, work
    <home>/logs/<service>.log; tmp, home: of the processes
    <home>/processes.json     what was started; `down` ends it, however `up` came to its end
    <home>/.dpq-team          that `up` has made the folder: what it has in it may be deleted

Commands, environment, order and health checks are the file's; images are what is installed here:
Debian's PostgreSQL and Redis (`make system`), and the packages of this Python. What stands for the
S3 server's image is moto, which keeps objects in its memory and checks no credentials; with
`S3_ENDPOINT` set, that one is used and none is started.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil
from dotenv import dotenv_values

from infra import compose
from infra.compose import Service

REPOSITORY = compose.COMPOSE_FILE.parent
_HOST = "127.0.0.1"
_HERE = dict.fromkeys(
    ("POSTGRES_HOST", "REDIS_HOST", "PREFECT_HOST", "MLFLOW_HOST", "TEAM_BIND"), _HOST
)
# In tmp, Prefect hands each run its environment.
_FOLDERS = {"logs": 0o755, "home": 0o700, "tmp": 0o700}
_MARKER, _PROCESSES = ".dpq-team", "processes.json"
_START_TIMEOUT = 180.0  # s for one service to be healthy, or to run to its end
_STOP_TIMEOUT = 30.0  # s before SIGKILL
_POSTGRES_USER = "postgres"  # whom the server runs as where we are root, which it refuses to be


class TeamError(RuntimeError):
    """A service that does not come up, with its log and the last line in it."""


def up(home: Path, profiles: tuple[str, ...] = ()) -> None:
    """Start all services and return once they are healthy; on an error none is left.

    Raises:
        ComposeError: a secret is not set.
        TeamError: something is not installed, a port is taken, the home is somebody's folder, or a
            service does not come up.
    """
    home = home.resolve()
    variables = _variables()
    wanted = list(compose.services(compose.read(variables), profiles))
    if variables["S3_ENDPOINT"] != _own_s3(variables):
        wanted = [service for service in wanted if service.name != "s3"]
    if _processes(home):
        raise TeamError(f"{home}: is up already: python -m infra.team down --home {home}")
    _check_ports(variables)
    if absent := missing():
        raise TeamError(f"not installed: {', '.join(absent)}: make system, as root")
    _claim(home)
    for name, mode in _FOLDERS.items():
        (home / name).mkdir(mode, parents=True, exist_ok=True)
    try:
        for service in wanted:
            print(service.name, file=sys.stderr)
            _start(service, home, variables)
    except BaseException:
        down(home)
        raise
    for name in ("PREFECT", "MLFLOW"):
        print(f"{name.lower()} http://{_HOST}:{variables[f'{name}_PORT']}")


def down(home: Path, volumes: bool = False) -> None:
    """Stop all that `up` started, the last first. volumes: delete what it wrote, too.

    Raises:
        TeamError: volumes of a folder that `up` has not made.
    """
    home = home.resolve()
    if volumes and home.is_dir():
        _claim(home)
    for process, stop_signal in reversed(_processes(home)):
        with suppress(psutil.NoSuchProcess):
            family = process.children(recursive=True)
            process.send_signal(signal.Signals[stop_signal])
            psutil.wait_procs([process], _STOP_TIMEOUT)
            for each in (process, *family):
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs([process, *family], _STOP_TIMEOUT)
    (home / _PROCESSES).unlink(missing_ok=True)
    if volumes:
        for name in (*_FOLDERS, *compose.volumes()):
            shutil.rmtree(home / name, ignore_errors=True)
        (home / _MARKER).unlink(missing_ok=True)
        with suppress(OSError):  # something else lies there
            home.rmdir()


def _claim(home: Path) -> None:
    """Mark a home that is empty, or has nothing but what `up` makes."""
    home.mkdir(parents=True, exist_ok=True)
    known = {*_FOLDERS, *compose.volumes(), "postgres.new", _PROCESSES}
    others = sorted({path.name for path in home.iterdir()} - known)
    if others and not (home / _MARKER).is_file():
        raise TeamError(
            f"{home}: not made by `up` ({others[0]} is in it, and no {_MARKER}), so nothing is"
            f" written or deleted there: name a new folder by --home, or touch '{home / _MARKER}'"
        )
    (home / _MARKER).touch()


def missing() -> list[str]:
    """Programs of Debian's packages that are not installed."""
    needed = ("initdb", "postgres", "pg_isready", "redis-server", "redis-cli")
    return [name for name in needed if not shutil.which(name, path=_path())]


def _variables() -> dict[str, str]:
    """What the file's variables stand for: as in Compose, the environment wins over .env."""
    written = {k: v for k, v in dotenv_values(REPOSITORY / ".env").items() if v is not None}
    known = {name: str(port) for name, port in compose.ports().items()}
    variables = {**known, **written, **os.environ, **_HERE}
    return {"S3_ENDPOINT": _own_s3(variables), **variables}


def _own_s3(variables: Mapping[str, str]) -> str:
    return f"http://{_HOST}:{variables['S3_PORT']}"


def _check_ports(variables: Mapping[str, str]) -> None:
    for name in compose.ports():
        with socket.socket() as probe:
            if probe.connect_ex((_HOST, int(variables[name]))) == 0:
                raise TeamError(f"port {variables[name]} is taken: set {name} to another")


def _start(service: Service, home: Path, variables: Mapping[str, str]) -> None:
    """Start a service and wait until it is healthy, or has run to its end."""
    command, health = list(service.command), list(service.health)
    user = None
    if service.name == "postgres":
        user = _POSTGRES_USER if os.geteuid() == 0 else None
        _create_databases(service, home, user)
        command += ["-D", str(home / "postgres"), "-c", "unix_socket_directories="]
    elif service.name == "s3":
        command = ["moto_server", "--host", _HOST, "--port", variables["S3_PORT"]]
        page = f"{_own_s3(variables)}/moto-api/"
        health = ["CMD", "python", "-c", f"import urllib.request as r; r.urlopen('{page}')"]
    environment = _environment(service, home)
    folder = home / "work" if service.working_dir else REPOSITORY
    log = home / "logs" / f"{service.name}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [_local(word, service, home) for word in command],
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it outlives us
            user=user,
        )
    _remember(home, process.pid, service.stop_signal)
    _await(service, process, health, environment, log)


def _await(
    service: Service,
    process: "subprocess.Popen[bytes]",
    health: list[str],
    environment: Mapping[str, str],
    log: Path,
) -> None:
    check = ["sh", "-c", *health[1:]] if health[:1] == ["CMD-SHELL"] else health[1:]
    deadline = time.monotonic() + _START_TIMEOUT
    while True:
        code = process.poll()
        if code == 0 and service.once:
            return
        if code is not None:
            problem = f"ended with code {code} while starting"
        elif time.monotonic() > deadline:
            problem = f"was not ready within {_START_TIMEOUT:.0f} s"
        elif not service.once and _passes(check, environment):
            return
        else:
            time.sleep(0.2)
            continue
        lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        raise TeamError(f"{service.name} {problem}; {log}: {lines[-1] if lines else 'empty'}")


def _passes(check: list[str], environment: Mapping[str, str]) -> bool:
    quiet = subprocess.DEVNULL
    try:
        done = subprocess.run(
            check, env=environment, cwd=REPOSITORY, stdout=quiet, stderr=quiet, timeout=20
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _create_databases(service: Service, home: Path, user: str | None) -> None:
    """What the image does at its first start: a cluster, its superuser, its databases."""
    data, new = home / "postgres", home / "postgres.new"
    if data.exists():
        return
    settings = service.environment
    scripts = [REPOSITORY / source for source, _ in service.volumes if source.endswith(".sql")]
    sql = [f"CREATE DATABASE {settings['POSTGRES_DB']};", *(p.read_text("utf-8") for p in scripts)]
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode=0o700)
    password = new.with_suffix(".password")
    password.touch(mode=0o600)
    password.write_text(settings["POSTGRES_PASSWORD"], "utf-8")
    if user:
        for path in (new, password):
            shutil.chown(path, user)
    account = ["--username", settings["POSTGRES_USER"], "--pwfile", str(password)]
    kind = ["--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C.UTF-8"]
    try:
        _run(["initdb", "--pgdata", str(new), *account, *kind], service, home, user)
        single = ["postgres", "--single", "-D", str(new), "postgres"]
        _run(single, service, home, user, "\n".join(sql))
        new.rename(data)
    finally:
        password.unlink()
        shutil.rmtree(new, ignore_errors=True)


def _run(
    command: list[str], service: Service, home: Path, user: str | None, typed: str = ""
) -> None:
    done = subprocess.run(
        command,
        env=_environment(service, home),
        cwd="/",
        input=typed,
        capture_output=True,
        text=True,
        user=user,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        who = f"; user {user} must be able to enter {home}: choose another --home" if user else ""
        raise TeamError(f"{command[0]}: {' '.join(lines[:1])}{who}")


def _environment(service: Service, home: Path) -> dict[str, str]:
    """As in a container: nothing of ours but what a process cannot do without."""
    code = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    needed = {
        "PATH": _path(),
        "HOME": str(home / "home"),
        "TMPDIR": str(home / "tmp"),
        "LANG": "C.UTF-8",
        "PYTHONPATH": os.pathsep.join(filter(None, code)),
        "no_proxy": _HOST,
        "NO_PROXY": _HOST,
    }
    given = {name: _local(value, service, home) for name, value in service.environment.items()}
    return needed | given


def _path() -> str:
    """Where programs are: those of this Python, Debian's PostgreSQL (the newest), the rest."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name))
    folders = [str(Path(sys.executable).parent), *map(str, versions[-1:]), os.environ["PATH"]]
    return os.pathsep.join(folders)


def _local(text: str, service: Service, home: Path) -> str:
    """A word of a command or of the environment, with our folders in place of its volumes."""
    for source, target in service.volumes:
        if not source.startswith("."):
            (home / source).mkdir(exist_ok=True)
            text = text.replace(target, str(home / source))
    return text


def _remember(home: Path, pid: int, stop_signal: str) -> None:
    path = home / _PROCESSES
    known = json.loads(path.read_text("utf-8")) if path.exists() else []
    with suppress(psutil.NoSuchProcess):
        known.append([pid, psutil.Process(pid).create_time(), stop_signal])
    path.write_text(json.dumps(known), "utf-8")


def _processes(home: Path) -> list[tuple[psutil.Process, str]]:
    """Those of `up` that still run, and the signal that ends each."""
    path, found = home / _PROCESSES, []
    for pid, started, stop_signal in json.loads(path.read_text("utf-8")) if path.exists() else []:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            another = abs(process.create_time() - started) > 2  # s: clocks are set now and then
            if not another and process.status() != psutil.STATUS_ZOMBIE:
                found.append((process, stop_signal))
    return found


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m infra.team", description=__doc__)
    parser.add_argument("action", choices=["up", "down"])
    parser.add_argument("--home", type=Path, default=Path(".dpq/team"))
    parser.add_argument("--profile", action="append", default=[], help="up: gpu, gaudi")
    parser.add_argument("--volumes", action="store_true", help="down: delete all data")
    asked = parser.parse_args()
    try:
        if asked.action == "up":
            up(asked.home, tuple(asked.profile))
        else:
            down(asked.home, asked.volumes)
    except (compose.ComposeError, TeamError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    _main()
