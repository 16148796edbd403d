"""Releases from automation: deployments on a Prefect worker, launched and awaited by shell scripts,
on a schedule, and by an event; and a person's approval."""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from uuid import UUID, uuid4

import httpx
import psutil
import pytest
from conftest import dpq_process, run_flow
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowRunFilter,
    FlowRunFilterIdempotencyKey,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.states import Running
from safetensors.torch import load_file, save_file

from dpq_core.recipe import RecipeError, load_recipe
from flows.deployed_recipe import admitted
from flows.release import release
from infra import client
from infra.automations import crashed_runs, ensure
from infra.registry import Registry
from infra.tracking import mlflow_client, tracking_store

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples"
PATIENCE = 600  # s, for a run on a machine as busy as it likes


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
    dpq.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from flows.cli import main; main()" "$@"')
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
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        try:
            process.wait(timeout=30)
        finally:
            for each in [process, *family]:
                with suppress(psutil.NoSuchProcess):
                    each.kill()


@pytest.fixture(scope="module")
def recipes(workplace, content):
    """Write a recipe where deployments take them from; returns its file's name."""
    folder, _ = workplace

    def write(name, **changes):
        (folder / "recipes" / f"{name}.yaml").write_text(json.dumps({**content, **changes}))
        return f"{name}.yaml"

    return write


@pytest.fixture
def registry(services_home):
    return Registry(tracking_store(services_home)[0])


def runs_of(deployment):
    wanted = DeploymentFilter(name=DeploymentFilterName(any_=[deployment]))
    with get_client(sync_client=True) as prefect:
        return prefect.read_flow_runs(deployment_filter=wanted, limit=200)


def eventually(found, timeout=PATIENCE):
    deadline = time.monotonic() + timeout
    while not (result := found()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return result


def test_deploying_again_changes_nothing(deployed, call, notified):
    def made():
        with get_client(sync_client=True) as prefect:
            deployments = prefect.read_deployments()
            automations = prefect.read_automations()
            queues = prefect.read_work_queues(work_pool_name="dpq")
            limit = prefect.read_global_concurrency_limit_by_name("promotion")
            schedules = {
                each.name: [(s.schedule, s.active) for s in each.schedules] for each in deployments
            }
        found = {each.name: each.id for each in (*deployments, *queues)}
        return found, sorted(each.name for each in automations), schedules, limit.limit

    before = made()
    assert call("dpq", "deploy", "--notify", notified[0]).returncode == 0
    after = made()
    assert after == before
    names, automations, schedules, limit = after
    assert {"release", "evaluate", "compare", "nightly", "cpu", "gpu", "gaudi"} <= names.keys()
    assert len(automations) == 3  # two, and the trigger of release
    assert len(schedules["nightly"]) == 1
    assert limit == 1


def test_the_form_has_the_recipe_s_own_bounds_and_refuses_before_a_run_exists(deployed):
    before = len(runs_of("release"))
    for overrides in ({"scheme": {"group_size": 4}}, {"gates": {"no_such_field": 1}}):
        with pytest.raises(client.ClientError, match="release/release: "):
            client.launch("release/release", {"recipe": "quickstart", "overrides": overrides})
    assert len(runs_of("release")) == before


def test_deployments_take_recipes_from_their_folders_only(
    workplace, recipes, monkeypatch, tmp_path
):
    folder, environment = workplace
    inside, outside = folder / "recipes" / recipes("inside"), tmp_path / "outside.yaml"
    outside.write_text(inside.read_text())
    link = folder / "recipes" / "link.yaml"
    link.symlink_to(outside)
    with pytest.raises(RecipeError, match="DPQ_RECIPE_ROOTS \\(empty\\)"):
        admitted(str(inside), [])
    monkeypatch.setenv("DPQ_RECIPE_ROOTS", environment["DPQ_RECIPE_ROOTS"])
    assert admitted(str(inside), []) == admitted("inside.yaml", []) == load_recipe(inside)
    assert admitted("quickstart", []).registered_name == "quickstart-w4a8"
    above = os.path.relpath(outside, folder / "recipes")
    for name in (str(outside), above, "link.yaml", "../inside.yaml", "no-such"):
        with pytest.raises(RecipeError, match="is none that this deployment takes"):
            admitted(name, [])


def test_a_checkpoint_s_own_code_runs_only_where_the_deployment_permits_it(monkeypatch):
    trusting = ["model.trust_remote_code=true"]
    with pytest.raises(RecipeError, match="DPQ_ALLOW_REMOTE_CODE=1"):
        admitted("quickstart", trusting)
    monkeypatch.setenv("DPQ_ALLOW_REMOTE_CODE", "1")
    assert admitted("quickstart", trusting).model.trust_remote_code


STRICT = "gates.perplexity_increase=0.000001"
ASKING = "gates.approval=required"
WRONG = "gates.no_such=1"


@pytest.mark.slow
def test_shell_scripts_launch_wait_and_branch(worker, call, recipes, registry, notified):
    plain, asking = recipes("plain"), recipes("asking", registry={"name": "asking"})
    curl, dpq = EXAMPLES / "release_http.sh", EXAMPLES / "release.sh"
    cases = {
        (curl, plain, ""): (0, "promoted: deploy it"),
        (curl, plain, STRICT): (2, "Rejected: keep the champion"),
        (dpq, plain, ""): (0, "deploy it"),
        (dpq, asking, ASKING): (3, "ask a person"),
        (dpq, plain, WRONG): (1, "look into it"),
    }

    def run(case):
        script, recipe, setting = case
        given = json.dumps(setting) if script == curl else setting
        return call("sh", script, recipe, *([given] if setting else []))

    with ThreadPoolExecutor(len(cases)) as pool:
        done = dict(zip(cases, pool.map(run, cases), strict=True))
    said = {case: (each.returncode, each.stdout.splitlines()[-1]) for case, each in done.items()}
    assert said == cases, [each.stderr for each in done.values()]

    bodies = eventually(lambda: [b for b in notified[1] if b["title"] == "release: Rejected"])
    assert "is not below the limit of 1e-06" in bodies[0]["message"]

    line = next(
        line for line in done[dpq, asking, ASKING].stdout.splitlines() if line.startswith("waiting")
    )
    run_id = line.rpartition(" ")[2]
    assert registry.champion("asking") is None
    answered = call("dpq", "approve", run_id, "--by", "ada", "--reason", "reads well")
    assert answered.returncode == 0, answered.stderr
    outcome = client.wait(UUID(run_id), PATIENCE)
    assert (outcome.verdict, outcome.exit_code) == ("promoted", 0)
    version = outcome.made["model_version"]
    assert registry.champion("asking") == version
    tags = registry.tags("asking", version)
    about = [tags[key] for key in ("verdict", "approval", "approval_by", "approval_reason")]
    assert about == ["promoted", "approved", "ada", "reads well"]
    again = call("dpq", "reject", run_id, "--by", "bob", "--reason", "too late")
    assert again.returncode == 1
    assert "does not wait for approval: it is promoted" in again.stderr


def test_the_same_key_is_the_same_run_whatever_became_of_the_client(worker, workplace, call):
    folder, environment = workplace
    key = f"commit {uuid4()}"
    asked = ["trigger", "release", "--recipe", "quickstart", "--set", WRONG, "--json"]
    command = ["dpq", *asked, "--idempotency-key", key, "--wait"]
    with_key = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=[key]))
    first = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE)
    with get_client(sync_client=True) as prefect:
        (run,) = eventually(lambda: prefect.read_flow_runs(flow_run_filter=with_key))
        first.kill()
        first.communicate()
        early = call(*command, "--timeout", "0")
        late = call(*command)
        assert len(prefect.read_flow_runs(flow_run_filter=with_key)) == 1
    assert {early.returncode, late.returncode} <= {1, 4}
    assert late.returncode == 1
    said = json.loads(late.stdout)
    assert (said["run"], said["verdict"]) == (str(run.id), "error")
    assert "gates.no_such" in said["reasons"][0]


@pytest.mark.slow
def test_a_schedule_of_a_minute_releases_what_changed_and_leaves_the_rest(
    worker, recipes, workplace, registry, quickstart_model, tmp_path
):
    folder, _ = workplace
    model = shutil.copytree(quickstart_model, tmp_path / "model")
    same = recipes("same", registry={"name": "same"})
    changing = recipes("changing", registry={"name": "changing"}, model={"id": str(model)})
    for name in (same, changing):
        first = run_flow(release, load_recipe(folder / "recipes" / name))
        assert first.verdict.verdict == "promoted"
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1.01
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    started = len(runs_of("release"))

    anchor = datetime.now(UTC) + timedelta(seconds=5)
    schedule = DeploymentScheduleCreate(
        schedule=IntervalSchedule(interval=timedelta(minutes=1), anchor_date=anchor),
        parameters={"watch": [{"recipe": same}, {"recipe": changing}]},
    )
    with get_client(sync_client=True) as prefect:
        nightly = prefect.read_deployment_by_name("nightly/nightly").id
        made = prefect.create_deployment_schedules(nightly, [schedule])[0]
        fired = eventually(lambda: [r for r in runs_of("nightly") if r.state.is_final()][1:])
        prefect.delete_deployment_schedule(nightly, made.id)
    runs = sorted(runs_of("nightly"), key=lambda run: run.expected_start_time)[: len(fired) + 1]
    assert runs[1].expected_start_time - runs[0].expected_start_time == timedelta(minutes=1)
    assert runs[0].state.message.splitlines() == [
        "same.yaml: left alone: unchanged since version 1 of same (champion)",
        "changing.yaml: released: model changed since version 1",
    ]
    assert len(runs_of("release")) == started + 1  # whenever the second fired
    (run,) = [run for run in runs_of("release") if run.parameters["recipe"] == changing]
    assert client.wait(run.id, PATIENCE).verdict == "promoted"
    assert registry.champion("changing") == 2
    assert registry.champion("same") == 1


def event(name, resource, **payload):
    about = {"occurred": datetime.now(UTC).isoformat(), "event": name, "id": str(uuid4())}
    about |= {"resource": {"prefect.resource.id": resource}, "payload": payload}
    url = f"{os.environ['PREFECT_API_URL']}/events"
    assert httpx.post(url, json=[about], trust_env=False).is_success


@pytest.mark.slow
def test_an_event_over_http_starts_a_release(deployed):
    before = {run.id for run in runs_of("release")}
    event("dpq.release.requested", "ci.job", recipe="quickstart", settings=[WRONG])
    (run,) = eventually(lambda: [run for run in runs_of("release") if run.id not in before])
    assert run.parameters["recipe"] == "quickstart"
    assert run.parameters["settings"] == [WRONG]


@pytest.mark.slow
def test_a_run_whose_heartbeats_stop_is_crashed(deployed):
    @flow
    def silent():
        pass

    automation = crashed_runs(timedelta(seconds=10))
    with get_client(sync_client=True) as prefect:
        ensure(prefect, automation.model_copy(update={"name": "soon"}))
        time.sleep(3)  # servers learn of automations by the way
        run = prefect.create_flow_run(silent, state=Running())
        event("prefect.flow-run.heartbeat", f"prefect.flow-run.{run.id}")
        state = eventually(
            lambda: (s := prefect.read_flow_run(run.id).state) and (s.is_final() and s)
        )
    assert state.is_crashed()
    assert state.message.startswith("No sign of life for 10 s")


def test_nobody_s_answer_is_a_rejection(dpq, registry):
    limit = "gates.approval_timeout=1"
    named = ["--set", "registry.name=unanswered", "--set", ASKING]
    done = dpq("release", "--json", *named, "--set", limit)
    assert done.exit_code == 2, done.stderr
    said = json.loads(done.stdout)
    reason = "no answer within 1 s (gates.approval_timeout)"
    assert said["reasons"] == [f"approval: rejected by nobody: {reason}"]
    tags = registry.tags("unanswered", said["model_version"])
    assert (tags["verdict"], tags["approval"]) == ("rejected", "rejected")
    assert registry.champion("unanswered") is None


def test_a_release_of_this_process_waits_for_a_person(recipe_file, call, registry, services_home):
    named = ["--set", "registry.name=refused", "--set", ASKING]
    process = dpq_process("release", recipe_file, "--json", *named)

    def waiting():
        assert process.poll() is None, process.communicate()
        with get_client(sync_client=True) as prefect:
            paused = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PAUSED]))
            return prefect.read_flow_runs(flow_run_filter=FlowRunFilter(state=paused))

    (run,) = eventually(waiting)
    mlflow = mlflow_client(tracking_store(services_home)[0])
    everywhere = [each.experiment_id for each in mlflow.search_experiments()]
    (seen,) = mlflow.search_runs(everywhere, "tags.`mlflow.runName` = 'refused'")
    assert seen.data.metrics["perplexity_token.candidate"] > 1  # whoever decides can read them
    assert "verdict" not in seen.data.tags
    answered = call("dpq", "reject", run.id, "--by", "bob", "--reason", "slow on H100")
    assert answered.returncode == 0, answered.stderr
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    said = json.loads(output)
    assert said["reasons"] == ["approval: rejected by bob: slow on H100"]
    assert registry.tags("refused", said["model_version"])["approval_by"] == "bob"
