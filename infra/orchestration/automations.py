"""Automations that watch the runs: those that fall silent are crashed, and somebody is told.

A killed flow run stays `Running` on its page. Runs send heartbeat events: deployed ones every
thirty seconds (`prefect.yaml`), `dpq release` and other people's flows on the same server every 180
s, which is Prefect's default. Where neither the next nor an end comes for long, the run is marked.
(Runs of `dpq release` are found sooner, by their process: `infra.orchestration.dead_runs`.)
Prefect's documentation calls it "detect zombie flows".
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from prefect.blocks.notifications import SlackWebhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from pydantic import SecretStr

_HEARTBEAT = "prefect.flow-run.heartbeat"
# Three of Prefect's own heartbeats: less would crash every living run that keeps the default.
_SILENCE = timedelta(seconds=600)
# Names of states; those of verdicts are given by `flows.deployments.deployed`.
_VERDICTS = ("Promoted", "Rejected", "Inspected", "Withheld")
_ENDS = ("Completed", "Failed", "Crashed", "Cancelling", "Cancelled", "TimedOut", *_VERDICTS)
_TOLD = ("Rejected", "Withheld", "Failed", "TimedOut", "Crashed", "Paused")
_FLOW_RUNS: dict[str, Any] = {"prefect.resource.id": "prefect.flow-run.*"}
_BLOCK = "dpq-notify"


def automations(notify: str | None = None) -> Iterator[AutomationCore]:
    """What `dpq deploy` creates. notify: an Apprise address (`mailto://…`, `slack://…`, `json://…`);
    None: whatever an earlier call has set up stays as it is."""
    yield crashed_runs(_SILENCE)
    if notify:
        # The block is named after Slack, and hands any other address to Apprise as it is.
        block = SlackWebhook(url=SecretStr(notify)).save(_BLOCK, overwrite=True)
        yield AutomationCore(
            name="dpq: tell of rejections and failures",
            description=f"The address is in the block {_BLOCK}.",
            trigger=EventTrigger(
                expect={f"prefect.flow-run.{name}" for name in _TOLD}, match=_FLOW_RUNS
            ),
            actions=[
                SendNotification(
                    block_document_id=block,
                    subject="{{ flow.name }}: {{ flow_run.state.name }}",
                    body="{{ flow_run.name }}: {{ flow_run.state.name }}\n"
                    "{{ flow_run.state.message }}\n{{ flow_run|ui_url }}",
                )
            ],
        )


def crashed_runs(silence: timedelta) -> AutomationCore:
    """Mark a run whose heartbeats stopped for so long (10 s at least) without an end."""
    return AutomationCore(
        name="dpq: runs that fell silent are crashed",
        description="The process died without a word, or its machine.",
        trigger=EventTrigger(
            after={_HEARTBEAT},
            expect={_HEARTBEAT, *(f"prefect.flow-run.{name}" for name in _ENDS)},
            match=_FLOW_RUNS,
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            within=silence,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"No sign of life for {silence.total_seconds():.0f} s: its process died.",
            )
        ],
    )


def ensure(client: SyncPrefectClient, automation: AutomationCore) -> str:
    """Create an automation, or bring the one of its name up to date: `created` or `there`. One that
    somebody has paused stays paused."""
    there = client.read_automations_by_name(automation.name)
    if not there:
        client.create_automation(automation)
        return "created"
    content = automation.model_dump(mode="json", exclude={"owner_resource"})
    content["enabled"] = there[0].enabled
    client.update_automation(there[0].id, AutomationCore.model_validate(content))
    return "there"
