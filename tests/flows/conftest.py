"""Real services, a small recipe on the shipped model, and ways to run it."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from dpq_core.recipe import parse_recipe
from flows.cli import app
from flows.runners import task_runner
from infra.services import services


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
        },
        "evaluation": {"perplexity": {"dataset": dataset, "sequence_length": 128}},
        "gates": {"perplexity_increase": 10},
        "registry": {"name": "flow-tests"},
        "execution": {"store": str(store), "device": "cpu"},
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
    path.write_text(json.dumps({"text": text[:1000]}))
    return f"evaluation.perplexity.dataset.data_files={path}"


@pytest.fixture
def dpq(recipe_file):
    """Run `dpq COMMAND RECIPE …` in this process: exit code, stdout, stderr."""

    def run(command, *arguments):
        return CliRunner().invoke(app, [command, str(recipe_file), *arguments])

    return run


def run_flow(flow, recipe, *arguments):
    return flow.with_options(task_runner=task_runner(recipe.execution))(recipe, *arguments)


def dpq_process(*arguments):
    """`dpq …` as a process of its own, on the session's services."""
    return subprocess.Popen(
        [sys.executable, "-c", "from flows.cli import main; main()", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )
