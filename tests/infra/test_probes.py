"""Addresses of services that the environment names, right and wrong: seconds, and a sentence."""

import socket

import pytest
from prefect.context import refresh_global_settings_context
from prefect.settings import PREFECT_API_URL, temporary_settings
from typer.testing import CliRunner
from web_server import MLFLOW, PREFECT, web_server

from flows.cli.main import app
from infra import probes
from infra.orchestration.services import connected, services
from infra.probes import ProbeError, check_mlflow, check_prefect
from infra.registry.tracking import tracking_store

PAGE = {"*": (200, "<html>")}  # Prefect's own page answers so everywhere


@pytest.fixture
def _settings_read_again():
    """Once the environment is what it was: what asks for it before `monkeypatch` ends before it."""
    yield
    refresh_global_settings_context()


@pytest.fixture(autouse=True)
def _impatient(_settings_read_again, monkeypatch):
    monkeypatch.setattr(probes, "_PATIENCE", 0.2)
    monkeypatch.setattr(probes, "_PAUSE", 0.05)
    monkeypatch.setattr(probes, "_CONNECTION", 0.5)
    monkeypatch.setattr(probes, "_ANSWER", 0.5)
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        yield


@pytest.fixture
def nobody():
    """An address at which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture
def silent():
    """An address at which somebody listens and never answers."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen(50)
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


def said_by(check, address):
    with pytest.raises(ProbeError) as caught:
        check(address)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_services_that_answer():
    with web_server(PREFECT) as prefect, web_server(MLFLOW) as mlflow:
        check_prefect(f"{prefect}/api")
        check_mlflow(mlflow)


@pytest.mark.parametrize("kind", ["nobody", "silent"])
def test_nobody_answers(kind, request):
    address = request.getfixturevalue(kind)
    said = said_by(check_prefect, f"{address}/api")
    assert said.startswith(f"PREFECT_API_URL is {address}/api, and nothing answers there (")
    assert "unset it" in said
    said = said_by(check_mlflow, address)
    assert said.startswith(f"MLFLOW_TRACKING_URI is {address}, and nothing answers there (")
    assert "unset it" in said


@pytest.mark.parametrize("answers", [PREFECT, PAGE, PREFECT | PAGE])
def test_prefects_page_in_place_of_its_api(answers):
    with web_server(answers) as address:
        said = said_by(check_prefect, address)
        assert said.endswith(f"is not Prefect's API, which ends in /api: set {address}/api")


def test_something_else_at_the_right_path():
    with web_server(PAGE) as address:
        assert said_by(check_prefect, f"{address}/api").endswith("which ends in /api")


def test_a_password_that_is_missing():
    with web_server(PREFECT | {"/api/admin/version": (401, "{}")}) as address:
        assert "refuses us (401): set PREFECT_API_AUTH_STRING" in said_by(
            check_prefect, f"{address}/api"
        )


@pytest.mark.parametrize("url", ["nonsense", "http://[::1", "http://no-such-host.invalid/api"])
def test_what_is_no_address(url):
    assert f"PREFECT_API_URL is {url}, and" in said_by(check_prefect, url)


def test_a_users_password_is_not_shown(nobody):
    with_password = f"{nobody}/api".replace("://", "://someone:planted@")
    assert "planted" not in said_by(check_prefect, with_password)


@pytest.mark.parametrize(
    ("uri", "part"),
    [
        ("sqlite:////no/such/folder/mlflow.db", "/no/such/folder: no folder to write in"),
        ("postgresql+psycopg2://dpq@127.0.0.1:9/mlflow", "refused"),
        ("mysql://no-such-host.invalid/mlflow", "nothing answers there"),
    ],
)
def test_databases_that_are_not_there(uri, part):
    assert part in said_by(check_mlflow, uri)


@pytest.mark.parametrize(
    "answers", [MLFLOW | {"/api/2.0/mlflow/experiments/search": (401, "{}")}, PAGE, {}]
)
def test_what_answers_is_not_mlflow_or_does_not_let_us_in(answers, tmp_path, monkeypatch):
    with web_server(answers) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with pytest.raises(ProbeError, match=f"MLFLOW_TRACKING_URI is {address}, and it does not"):
            tracking_store(tmp_path)


def test_a_driver_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "oracle://host/mlflow")
    with pytest.raises(ProbeError, match="MLFLOW_TRACKING_URI is oracle://host/mlflow"):
        tracking_store(tmp_path)


@pytest.mark.parametrize("name", ["PREFECT_API_URL", "MLFLOW_TRACKING_URI"])
def test_nothing_is_started_before_both_have_answered(nobody, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, nobody)
    with pytest.raises(ProbeError, match=name), services(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_commands_that_ask_a_server_say_which(nobody, tmp_path, monkeypatch):
    monkeypatch.setenv("DPQ_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_API_URL", nobody)
    with pytest.raises(ProbeError, match="PREFECT_API_URL"), connected(tmp_path):
        pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nobody)
    for command, variable in (
        (["trigger", "release", "--recipe", "quickstart"], "PREFECT_API_URL"),
        (["deploy"], "PREFECT_API_URL"),
        (["rollback", "model"], "MLFLOW_TRACKING_URI"),
        (["store", "gc", "--store", str(tmp_path)], "MLFLOW_TRACKING_URI"),
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 1
        assert done.stderr.startswith(f"error: {variable} is {nobody}")


def test_a_server_of_this_machine_is_asked_without_the_proxy(nobody, tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, nobody)
    with web_server(PREFECT) as prefect, web_server(MLFLOW) as mlflow:
        monkeypatch.setenv("PREFECT_API_URL", f"{prefect}/api")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow)
        with services(tmp_path) as running:
            assert running.prefect_api_url == f"{prefect}/api"
        with connected(tmp_path) as url:
            assert url == f"{prefect}/api"
