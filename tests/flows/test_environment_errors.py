"""What the environment can make fail is said in a line that names the variable or the file."""

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from flows.cli.main import app

COMMAND = ["trigger", "release", "--recipe", "quickstart"]


def said_in(environment, folder):
    """The last line of a command in a process of its own, for Prefect is imported once."""
    done = subprocess.run(
        [sys.executable, "-c", "from flows.cli.main import main; main()", *COMMAND],
        env={**os.environ, "DPQ_HOME": str(folder / "home"), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("variable", "value", "part"),
    [
        ("PREFECT_API_URL", "http://[::1", "Invalid IPv6 URL"),
        ("PREFECT_SERVER_API_PORT", "abc", "port: Input should be a valid integer"),
        ("PREFECT_PROFILES_PATH", "broken.toml", "Expected ']'"),
    ],
)
def test_prefects_settings_that_cannot_be_read(tmp_path, variable, value, part):
    (tmp_path / "broken.toml").write_text("[broken")
    value = str(tmp_path / value) if value.endswith(".toml") else value
    line = said_in({variable: value}, tmp_path)
    assert line.startswith("error: Prefect's settings cannot be read: ")
    assert part in line
    assert "PREFECT_…" in line


def test_a_home_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    file = tmp_path / "a file"
    file.touch()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DPQ_HOME", str(file / "home"))
    done = CliRunner().invoke(app, ["rollback", "model"])
    assert done.exit_code == 1
    assert f"{file / 'home'}" in done.stderr
    assert "set DPQ_HOME to a folder that can be written" in done.stderr


def test_a_name_that_no_registered_model_has(tmp_path):
    done = CliRunner().invoke(app, ["rollback", "team/model", "--store", str(tmp_path)])
    assert done.exit_code == 1
    assert done.stderr == "error: 'team/model': MLflow's names and addresses cannot hold '/'\n"
