"""Real services, a small recipe on the shipped model, and ways to run it: here, or deployed on a
worker."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest
from forked import Forked
from model_families import save
from typer.testing import CliRunner

from dpq_core.recipe import parse_recipe
from flows.cli import forecast
from flows.cli.main import app
from flows.running.runners import task_runner
from infra.orchestration.services import services

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 900  # s, for a run on a machine as busy as it likes


@pytest.fixture(scope="session", autouse=True)
def _rates_of_one_product():
    """Every command first times products, for half a second; nothing here asks what it found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast, "_TIMING", 0)
        yield


@pytest.fixture(scope="package")
def services_home(tmp_path_factory):
    """A running Prefect server, and MLflow on SQLite: all flows of these tests use them, and they
    are gone before other tests start servers of their own."""
    home = tmp_path_factory.mktemp("services")
    os.environ["DPQ_HOME"] = str(home)
    try:
        with services(home):
            yield home
    finally:
        del os.environ["DPQ_HOME"]


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """One store for the session: what an earlier test computed is found again."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def content(quickstart_model, text_file, store):
    """A recipe as a mapping: real model, little data."""
    dataset = {"path": "json", "data_files": str(text_file)}
    return {
        "model": {"id": str(quickstart_model)},
        "scheme": {"max_passes": 2},
        "calibration": {
            "dataset": dataset,
            "samples": 8,
            "sequence_length": 128,
            "batch_size": 4,
            "required_tokens_per_input": 0,  # 1.6 here: of quality nothing is said
        },
        "evaluation": {"perplexity": {"dataset": dataset, "sequence_length": 128}},
        "gates": {"perplexity_increase": 10},
        "registry": {"name": "flow-tests"},
        "execution": {"store": str(store), "device": "cpu"},
    }


@pytest.fixture(scope="session")
def two_blocks(content, tmp_path_factory):
    """A recipe as a mapping: a random model of two small blocks, short windows."""
    calibration = {"samples": 16, "sequence_length": 16}
    return content | {
        "model": {"id": str(save("llama-2", tmp_path_factory.mktemp("two-blocks")))},
        "scheme": {"group_size": 32, "rounding": "nearest"},
        "calibration": content["calibration"] | calibration,
    }


@pytest.fixture
def recipe(content, services_home):
    return parse_recipe(content)


@pytest.fixture
def recipe_file(content, services_home, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


@pytest.fixture(scope="session")
def brief(text_file, tmp_path_factory):
    """Setting of a recipe whose evaluation is over in a moment."""
    path = tmp_path_factory.mktemp("brief") / "brief.jsonl"
    text = json.loads(text_file.read_text().splitlines()[0])["text"]
    path.write_text(json.dumps({"text": text[:400]}))
    return f"evaluation.perplexity.dataset.data_files={path}"


@pytest.fixture
def dpq(recipe_file):
    """Run `dpq COMMAND RECIPE …` in this process: exit code, stdout, stderr."""

    def run(command, *arguments):
        return CliRunner().invoke(app, [command, str(recipe_file), *arguments])

    return run


@pytest.fixture(scope="module")
def notified():
    """Address of a web server, and the bodies that it was sent."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"json://127.0.0.1:{server.server_port}/", bodies
        server.shutdown()


@pytest.fixture(scope="module")
def workplace(services_home, tmp_path_factory):
    """The folder in which `dpq deploy` is called and runs work, and the environment of both."""
    folder = tmp_path_factory.mktemp("workplace")
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    dpq = bin_folder / "dpq"
    dpq.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "from flows.cli.main import main; main()" "$@"'
    )
    dpq.chmod(0o755)
    (folder / "recipes").mkdir()
    environment = {
        **os.environ,
        "DPQ_RECIPE_ROOTS": str(folder / "recipes"),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "RELEASE_TIMEOUT": str(PATIENCE),
    }
    return folder, environment


@pytest.fixture(scope="module")
def call(workplace):
    """Run a command there: exit code, stdout, stderr."""
    folder, environment = workplace

    def run(*command, **more):
        return subprocess.run(
            list(map(str, command)),
            cwd=folder,
            env={**environment, **more},
            capture_output=True,
            text=True,
            timeout=PATIENCE + 60,
        )

    return run


@pytest.fixture(scope="module")
def deployed(call, notified):
    done = call("dpq", "deploy", "--json", "--notify", notified[0])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["made"]


@pytest.fixture(scope="module")
def worker(deployed, workplace):
    """`prefect worker start`, and all that it started, until the module's end."""
    folder, environment = workplace
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "dpq"]
    with (folder / "worker.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        # Asked to stop it would first end its runs, in its own time. Halted it starts no other.
        stopped = psutil.Process(process.pid)
        with suppress(psutil.NoSuchProcess):
            stopped.suspend()
            for each in [*stopped.children(recursive=True), stopped]:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
        process.wait()


@pytest.fixture(scope="module")
def recipes(workplace, content):
    """Write a recipe where deployments take them from; returns its file's name."""
    folder, _ = workplace

    def write(name, **changes):
        (folder / "recipes" / f"{name}.yaml").write_text(json.dumps({**content, **changes}))
        return f"{name}.yaml"

    return write


def run_flow(flow, recipe, *arguments):
    return flow.with_options(task_runner=task_runner(recipe.execution))(recipe, *arguments)


def dpq_process(*arguments):
    """`dpq …` as a process of its own, on the session's services."""
    return Forked(*arguments)
