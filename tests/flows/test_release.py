"""The release flow on real services: verdicts, registry, store, exit codes."""

import json
import select
import socket
import socketserver
import threading
import time

import pytest
from conftest import PATIENCE, run_flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.sorting import FlowRunSort
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.settings import PREFECT_API_URL, temporary_settings

from dpq_core.recipe import parse_recipe
from flows.release.release import release
from infra.registry import Registry
from infra.registry.tracking import mlflow_client, tracking_store
from tasks.register import promoting

# worker, preflight, 2 perplexities and a divergence, 5 blocks, their 4 inputs, assemble, verify,
# gate, log twice, register, cards, report; and what chunks the store has not: "evaluation of …"
TASK_RUNS = 2 + 3 + 5 + 4 * 5 + 8


@pytest.fixture
def registry(services_home):
    return Registry(tracking_store(services_home)[0])


@pytest.fixture(scope="module")
def promoted(content, services_home):
    return run_flow(release, parse_recipe(content))


def artifacts(store, stage):
    return {folder.name: folder.stat().st_mtime_ns for folder in (store / stage).glob("*")}


def with_gate(recipe, limit):
    gates = recipe.gates.model_copy(update={"perplexity_increase": limit})
    return recipe.model_copy(update={"gates": gates})


def test_promotion_moves_the_champion(promoted, registry):
    assert promoted.verdict.verdict == "promoted"
    assert promoted.verdict.reasons == ()
    assert registry.champion("flow-tests") == promoted.registration.version


def test_metrics_tables_and_verdict_are_in_mlflow(promoted, services_home):
    client = mlflow_client(tracking_store(services_home)[0])
    run = client.get_run(promoted.run_id)
    metric = promoted.verdict.metrics["perplexity_token"]
    assert run.data.metrics["perplexity_token.baseline"] == metric.baseline
    assert run.data.metrics["perplexity_token.candidate"] == metric.candidate
    assert run.data.params["scheme.method"] == "dpq"
    assert run.data.tags["verdict"] == "promoted"
    assert run.info.status == "FINISHED"
    paths = {file.path for file in client.list_artifacts(promoted.run_id)}
    assert {"layers.json", "layers.csv", "layer_error.png", "verdict.json"} <= paths


def test_a_second_run_recomputes_nothing(promoted, recipe, store):
    stages = ("layers", "statistics", "checkpoints", "scores", "integrity")
    before = {stage: artifacts(store, stage) for stage in stages}
    again = run_flow(release, recipe)
    assert {stage: artifacts(store, stage) for stage in stages} == before
    assert again.verdict == promoted.verdict
    assert again.registration.version == promoted.registration.version


def test_a_changed_scheme_reuses_the_calibration(promoted, recipe, store):
    before = artifacts(store, "statistics")
    layers = artifacts(store, "layers")
    changed = recipe.model_copy(
        update={"scheme": recipe.scheme.model_copy(update={"rounding": "nearest"})}
    )
    run_flow(release, changed)
    assert artifacts(store, "statistics") == before
    assert len(artifacts(store, "layers").keys() - layers.keys()) == 35


def test_rejection_leaves_the_champion_and_says_why(promoted, recipe, registry):
    champion = registry.champion("flow-tests")  # of the changed scheme, where that was before
    assert champion >= promoted.registration.version
    result = run_flow(release, with_gate(recipe, 1e-6))
    assert result.verdict.verdict == "rejected"
    assert any("perplexity_token" in reason for reason in result.verdict.reasons)
    assert result.registration.version not in (champion, promoted.registration.version)
    assert registry.champion("flow-tests") == champion


def test_every_task_run_is_recorded_and_complete(promoted, recipe):
    run_flow(release, recipe)  # everything is in the store
    with get_client(sync_client=True) as client:
        releases = FlowFilter(name=FlowFilterName(any_=[release.name]))
        # by their ends: a schedule's coming runs start latest of all
        newest = client.read_flow_runs(
            flow_filter=releases, limit=1, sort=FlowRunSort.END_TIME_DESC
        )[0]
        of_run = FlowRunFilter(id=FlowRunFilterId(any_=[newest.id]))
        deadline = time.monotonic() + PATIENCE  # the server writes task runs a moment later
        while True:
            runs = client.read_task_runs(flow_run_filter=of_run, limit=200)
            runs = [run for run in runs if not run.name.startswith("evaluation")]
            states = [run.state_name for run in runs]
            if states.count("Completed") == TASK_RUNS or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        keys = {artifact.key for artifact in client.read_artifacts(flow_run_filter=of_run)}
    names = [run.name for run in runs]
    assert sum(name.startswith("quantize model.layers") for name in names) == 4 * 5
    assert sum(name.startswith("calibrate block") for name in names) == 5
    assert states == ["Completed"] * TASK_RUNS
    assert {"verdict", "gates", "layers", "checkpoint"} <= keys


class Forwarder(socketserver.ThreadingTCPServer):
    """To another port of this machine."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, port, to):
        self.to = to
        super().__init__(("127.0.0.1", port), ForwardedConnection)


class ForwardedConnection(socketserver.BaseRequestHandler):
    def handle(self):
        with socket.create_connection(("127.0.0.1", self.server.to)) as upstream:
            both = {self.request: upstream, upstream: self.request}
            while True:
                for ready in select.select([*both], [], [])[0]:
                    if not (received := ready.recv(1 << 16)):
                        return
                    both[ready].sendall(received)


def test_a_promotion_waits_for_a_server_that_is_being_started_again(services_home, monkeypatch):
    limit = "asked for here alone"  # Prefect keeps a client for each, with the address of its first
    monkeypatch.setattr("tasks.register.PROMOTION", limit)
    server = json.loads((services_home / "prefect" / "server.json").read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    forwarders = []

    def come_up():
        forwarders.append(Forwarder(port, server["port"]))
        forwarders[0].serve_forever(0.05)

    timer = threading.Timer(4, come_up)
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}):
        with pytest.raises(ConcurrencySlotAcquisitionError), concurrency(limit):
            pass
        timer.start()
        with promoting():
            assert forwarders
    forwarders[0].shutdown()
    forwarders[0].server_close()


def test_json_object_and_exit_codes(dpq, store):
    accepted = dpq("release", "--json")
    assert accepted.exit_code == 0, accepted.stderr
    content = json.loads(accepted.stdout)
    assert content["verdict"] == "promoted"
    assert content["reasons"] == []
    metric = content["metrics"]["perplexity_token"]
    assert {"baseline", "candidate", "delta", "interval", "limit", "passed"} <= set(metric)
    assert content["checkpoint"].startswith(str(store))
    assert content["run_id"]
    assert content["model_version"] >= 1
    rejected = dpq("release", "--json", "--set", "gates.perplexity_increase=0.000001")
    assert rejected.exit_code == 2, rejected.stderr
    assert json.loads(rejected.stdout)["verdict"] == "rejected"
