"""`dpq --version` says what is installed."""

from importlib.metadata import version

from typer.testing import CliRunner

from flows.cli.main import app


def test_the_version_is_that_of_the_installed_package():
    said = CliRunner().invoke(app, ["--version"])
    assert said.exit_code == 0, said.output
    assert said.output == f"dpq {version('dpq')}\n"
