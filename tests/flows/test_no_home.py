"""A user that the machine does not know, as a container's: said at once, and no traceback."""

import pwd

import pytest
from typer.testing import CliRunner

from flows.cli.main import app
from flows.cli.rollback import _user


@pytest.fixture(autouse=True)
def _unknown_user(monkeypatch):
    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.parametrize(
    "command", [["release", "recipe.yaml"], ["rollback", "x"], ["store", "ls"]]
)
def test_without_a_home_folder_every_command_says_so(command):
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: HOME is not set, and this machine knows no user ")
    assert len(done.stderr.splitlines()) == 1


def test_a_user_without_a_name_has_a_number():
    assert _user().removeprefix("user ").isdigit()
