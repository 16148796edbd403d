"""MLflow's registry webhooks: its own sender, a relay over HTTP, runs on a Prefect server."""

import asyncio
import json
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
import uvicorn
from conftest import PATIENCE
from cryptography.fernet import Fernet
from mlflow.entities.webhook import WebhookEvent
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore
from mlflow.webhooks.delivery import _generate_hmac_signature, deliver_webhook
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterIdempotencyKey
from typer.testing import CliRunner

from dpq_core.recipe import load_recipe
from flows.cli.main import app
from infra.orchestration.deployments import PREFECT_YAML, deploy
from infra.orchestration.webhook import PATH, application, requested

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
SECRET = "a secret of the tests"
CREATED = WebhookEvent.from_str("model_version.created")


@pytest.fixture(scope="module")
def address(services_home):
    """Of the relay; the deployments are there."""
    deploy(None, PREFECT_YAML)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(application(SECRET), port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}{PATH}"
    server.should_exit = True
    thread.join()


def version(name, tags, source="file:///models/new", number="1"):
    about = {"run_id": None, "description": None}
    return {"name": name, "version": number, "source": source, "tags": tags, **about}


def runs(key):
    with get_client(sync_client=True) as client:
        wanted = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=[key]))
        return client.read_flow_runs(flow_run_filter=wanted)


def test_mlflow_delivers_a_version_and_one_run_begins(address, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "http")
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    monkeypatch.setenv("MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY", Fernet.generate_key().decode())
    store = SqlAlchemyStore(f"sqlite:///{tmp_path}/mlflow.db")
    store.create_webhook("dpq", address, [CREATED], secret=SECRET)
    for _ in range(2):  # the second is a repetition
        payload = version("base", {"dpq.recipe": "quickstart"})
        deliver_webhook(event=CREATED, payload=payload, store=store)
    deadline = time.monotonic() + PATIENCE
    while not (found := runs("mlflow/base/1")) and time.monotonic() < deadline:
        time.sleep(0.1)
    (run,) = found
    assert run.parameters["recipe"] == "quickstart"
    assert run.parameters["settings"] == [
        'model.id="/models/new"',
        'registry.name="base-w4a8"',
        "registry.any_base_model=true",
    ]


def post(address, body, secret=SECRET, age=0):
    stamp = str(int(time.time()) - age)
    headers = {
        "X-MLflow-Delivery-Id": "1",
        "X-MLflow-Timestamp": stamp,
        "X-MLflow-Signature": _generate_hmac_signature(secret, "1", stamp, body),
    }
    return httpx.post(address, content=body, headers=headers)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-MLflow-Signature", "v1,Ünicode"),
        ("X-MLflow-Signature", "v1,\x00"),
        ("X-MLflow-Signature", ""),
        ("X-MLflow-Timestamp", "²"),
        ("X-MLflow-Timestamp", "9" * 5000),
        ("X-MLflow-Timestamp", "-1"),
        ("X-MLflow-Timestamp", ""),
        ("X-MLflow-Delivery-Id", "Ü"),
    ],
)
def test_whatever_a_header_holds_it_is_an_answer(name, value):
    """Below HTTP, whose servers refuse some of these, and others may not."""
    stamp = str(int(time.time()))
    headers = {
        "X-MLflow-Delivery-Id": "1",
        "X-MLflow-Timestamp": stamp,
        "X-MLflow-Signature": _generate_hmac_signature(SECRET, "1", stamp, WANTED),
    }
    status, read, said = answered({**headers, name: value}, [WANTED.encode()])
    assert status == 401, said
    assert read <= 1
    assert "Timestamp" not in name or not read


def answered(headers, parts):
    """Status of an application's answer to a request, how many parts of its body it read, and its
    words."""
    scope = {"type": "http", "method": "POST", "path": PATH, "query_string": b""}
    scope["headers"] = [(k.lower().encode(), v.encode("utf-8")) for k, v in headers.items()]
    left, said = list(parts), []

    async def receive():
        body = left.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(left)}

    async def send(message):
        said.append(message)

    asyncio.run(application(SECRET)(scope, receive, send))
    return said[0]["status"], len(parts) - len(left), said[-1].get("body")


def test_no_more_is_read_of_a_body_than_a_delivery_has():
    parts = [bytes(100_000)] * 1000
    stamp = str(int(time.time()))
    status, read, _ = answered({"X-MLflow-Timestamp": stamp}, parts)
    assert status == 413
    assert read < 20
    assert answered({}, parts)[:2] == (401, 0)


def delivery(tags, entity="model_version", source="s3://bucket/model", number="7"):
    data = version("other", tags, source, number)
    return json.dumps({"entity": entity, "action": "created", "data": data})


WANTED = delivery({"dpq.recipe": "quickstart"})


@pytest.mark.parametrize(
    ("body", "how", "status", "said"),
    [
        (WANTED, {"secret": "another"}, 401, "signature"),
        (WANTED, {"age": 301}, 401, "300 s"),
        ("{}", {}, 400, "no delivery of MLflow's"),
        ("[" * 100_000, {}, 400, "no delivery of MLflow's"),
        (delivery({"dpq.recipe": "quickstart"}, source=5), {}, 400, "no delivery of MLflow's"),
        (delivery({}), {}, 204, ""),
        (delivery({"dpq.recipe": "quickstart"}, entity="prompt"), {}, 204, ""),
        (delivery({"dpq.recipe": "quickstart"}, source="models:/m-1"), {}, 422, "s3:// address"),
    ],
)
def test_what_is_no_release_starts_none(address, body, how, status, said):
    response = post(address, body, **how)
    assert response.status_code == status
    assert said in response.text
    assert not runs("mlflow/other/7")


def test_the_same_version_is_the_same_run(address):
    first, second = (post(address, WANTED.replace('"7"', '"8"')) for _ in range(2))
    assert first.json() == second.json()
    (run,) = runs("mlflow/other/8")
    assert first.json() == {"run": str(run.id)}
    assert run.parameters["settings"][0] == 'model.id="s3://bucket/model"'


def test_what_is_released_is_named_after_the_model_that_is_watched():
    body = delivery({"dpq.recipe": "quickstart"}, source="file:///models/n%20%231/artifacts/model")
    _, parameters = requested(body.encode())
    recipe = load_recipe(QUICKSTART, parameters["settings"])
    assert recipe.model.id == "/models/n #1/artifacts/model"
    assert recipe.registered_name == "other-w4a8"
    assert recipe.registry.any_base_model  # a version's folder is its own: the name says the rest


def test_without_a_secret_there_is_no_relay(monkeypatch):
    monkeypatch.delenv("DPQ_WEBHOOK_SECRET", raising=False)
    result = CliRunner().invoke(app, ["webhook"])
    assert result.exit_code == 1
    assert "DPQ_WEBHOOK_SECRET is not set" in result.stderr
