"""The work pool, its queues and limits, and the deployments of `prefect.yaml`: created where they
are missing, changed where they differ."""

import os
import subprocess
import sys
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

from infra.orchestration.automations import automations, ensure

PREFECT_YAML = Path(__file__).parents[2] / "prefect.yaml"
POOL = "dpq"
QUEUES: dict[str, int | None] = {"cpu": None, "gpu": 1, "gaudi": 1}  # runs at a time
QUEUE_OF = {"cpu": "cpu", "cuda": "gpu", "hpu": "gaudi"}  # by kind of device
LIMITS = {"promotion": 1}  # global concurrency limits; `tasks.register` takes it


class DeployError(RuntimeError):
    """Deployments that Prefect does not take, with its words."""


def deploy(notify: str | None = None, prefect_yaml: Path = PREFECT_YAML) -> list[str]:
    """Create all of it on the server that Prefect's settings name; a line for each part. Runs will
    work in the present folder.

    Args:
        notify: Apprise address for what is rejected, failed or waiting; None leaves the one that
            an earlier call gave, if any.

    Raises:
        DeployError: Prefect refused a deployment.
    """
    with get_client(sync_client=True) as client:
        _ensure_pool(client)
        for name, limit in QUEUES.items():
            _ensure_queue(client, name, limit)
        for name, limit in LIMITS.items():
            client.upsert_global_concurrency_limit_by_name(name, limit)
        _ensure_deployments(prefect_yaml)
        made = [f"work pool {POOL}, queues {', '.join(QUEUES)}", f"limits {', '.join(LIMITS)}"]
        filed = client.read_deployments(limit=200)
        ours = sorted(each.name for each in filed if each.work_pool_name == POOL)
        made.append(f"deployments {', '.join(ours)}")
        for automation in automations(notify):
            made.append(f"automation {automation.name}: {ensure(client, automation)}")
    return made


def _ensure_pool(client: SyncPrefectClient) -> None:
    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        pool = WorkPoolCreate(name=POOL, type=ProcessWorker.type, base_job_template=template)
        client.create_work_pool(pool)


def _ensure_queue(client: SyncPrefectClient, name: str, limit: int | None) -> None:
    try:
        client.read_work_queue_by_name(name, POOL)
    except ObjectNotFound:
        client.create_work_queue(name, concurrency_limit=limit, work_pool_name=POOL)


def _ensure_deployments(prefect_yaml: Path) -> None:
    """Prefect's own command, which knows all that a `prefect.yaml` may say."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    quiet = {
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "NO_COLOR": "1",
        "COLUMNS": "200",
    }
    done = subprocess.run(
        [*command, "--prefect-file", str(prefect_yaml.resolve())],
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = " ".join((done.stderr.strip() or done.stdout.strip()).split())
        raise DeployError(f"{prefect_yaml}: prefect deploy: {said[-500:]}")
