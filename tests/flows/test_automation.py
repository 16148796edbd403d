"""Releases from automation: deployments on a Prefect worker, launched and awaited by shell scripts,
on a schedule, and by an event; and a person's approval."""

import json
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import pytest
import yaml
from conftest import PATIENCE, dpq_process, run_flow
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
from prefect.context import FlowRunContext
from prefect.settings.models.flows import FlowsSettings
from prefect.states import Crashed, Running
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dpq_core.recipe import GatesSection, RecipeError, load_recipe
from dpq_core.verdict.gates import Verdict
from flows.cli.main import app
from flows.deployments.form import COMMON, Overrides, admitted
from flows.release.approval import approved
from flows.release.release import release
from infra.orchestration import client
from infra.orchestration.automations import automations, crashed_runs, ensure
from infra.orchestration.deployments import QUEUE_OF
from infra.registry import Registry
from infra.registry.tracking import mlflow_client, tracking_store

EXAMPLES = Path(__file__).parents[2] / "examples"


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
    deployments = {"release", "evaluate", "compare", "benchmark", "nightly"}
    assert deployments | {"cpu", "gpu", "gaudi"} <= names.keys()
    assert len(automations) == 3  # two, and the trigger of release
    assert len(schedules["nightly"]) == 1
    assert limit == 1


def test_the_form_has_the_recipe_s_own_bounds_and_refuses_before_a_run_exists(deployed):
    before = len(runs_of("release"))
    for overrides in ({"scheme": {"group_size": 4}}, {"gates": {"no_such_field": 1}}):
        with pytest.raises(client.ClientError, match="release/release: "):
            client.launch("release/release", {"recipe": "quickstart", "overrides": overrides})
    assert len(runs_of("release")) == before


@pytest.mark.parametrize(("device", "queue"), QUEUE_OF.items())
def test_a_benchmark_goes_to_the_queue_of_its_device(deployed, device, queue):
    asked = ["trigger", "benchmark", "--recipe", "quickstart", "--device", device, "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.stderr
    run_id = UUID(json.loads(done.stdout)["run"])
    with get_client(sync_client=True) as prefect:
        run = prefect.read_flow_run(run_id)
        prefect.delete_flow_run(run_id)  # no worker is to take it
    assert (run.work_queue_name, run.parameters["device"]) == (queue, device)


def test_what_is_left_empty_in_the_form_is_not_sent(deployed):
    """Prefect's form sends every default, and `false` for every switch."""
    with get_client(sync_client=True) as prefect:
        form = prefect.read_deployment_by_name("release/release").parameter_openapi_schema
    shown = form["definitions"]
    for section in COMMON:
        for name, field in shown[section]["properties"].items():
            assert field["title"] == name
            assert field["description"]
            assert "default" not in field
            assert field.get("type", "enum") in {"string", "integer", "number", "array", "enum"}
    assert Overrides().settings() == []
    given = Overrides.model_validate({"repair": {"enabled": False}, "scheme": {"order": "gar"}})
    assert given.settings() == ['scheme.order="gar"', "repair.enabled=false"]
    offered = form["properties"]["recipe"]["anyOf"][0]["enum"]
    assert "quickstart" in offered
    assert not [name for name in offered if name.startswith("convnet")]


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
def test_a_benchmark_on_a_worker(worker, call, recipes):
    small = {"variants": ["bf16", "w4a8"], "batches": [1], "new_tokens": 4, "repeats": 1}
    asked = ["trigger", "benchmark", "--recipe", recipes("timed", benchmark=small), "--json"]
    done = call("dpq", *asked, "--wait")
    assert done.returncode == 0, done.stdout
    said = json.loads(done.stdout)
    assert (said["verdict"], said["reasons"]) == ("completed", [])
    assert said["log"].endswith("benchmark.md")


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


def test_no_living_run_falls_silent_for_long_enough_to_be_crashed():
    deployed = yaml.safe_load((EXAMPLES.parent / "prefect.yaml").read_text())["definitions"]["cpu"]
    ours = int(deployed["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
    anyones = FlowsSettings.model_fields["heartbeat_frequency"].default
    (watching,) = automations()
    assert watching.trigger.within >= timedelta(seconds=3 * max(ours, anyones))


def test_a_run_that_was_taken_for_dead_asks_for_approval_all_the_same(services_home):
    gates = GatesSection(approval="required", approval_timeout=1)

    @flow
    def asking():
        run = FlowRunContext.get().flow_run.id
        with get_client(sync_client=True) as prefect:
            prefect.set_flow_run_state(run, Crashed(message="no sign of life"), force=True)
        return approved(Verdict("promoted", (), {}), gates)

    verdict, tags = asking()
    assert verdict.verdict == "rejected"
    assert tags["approval_by"] == "nobody"


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

    paused = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PAUSED]))
    with get_client(sync_client=True) as prefect:

        def waiting():
            assert process.poll() is None, process.communicate()
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
