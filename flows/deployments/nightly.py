"""On a schedule: release what changed since its champion, of a list of recipes to watch.

A release is due where neither the champion nor the newest version came of this model (by content:
weights, configuration, tokenizer) and this recipe, as it was asked for. What was rejected is thus
not tried again every night; by hand it is: `dpq trigger release`. Each release is a run of its own,
at most one a day for the same model and recipe, so that a night does not start what is under way.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from dpq_core.digests import digest
from dpq_core.errors import one_line
from dpq_core.recipe import Recipe, RecipeError
from flows.deployments.form import Asked, admitted
from infra.orchestration.client import launch
from infra.registry import Registry
from infra.registry.tracking import tracking_store
from infra.settings import home
from infra.store import Store

_WATCHED = [Asked(recipe="quickstart")]


@dataclass(frozen=True)
class Row:
    """What was done about an entry of the list, and why. run: of the release that was started."""

    recipe: str
    model: str
    done: str
    why: str
    run: str = ""


@flow(name="nightly")
def nightly(watch: list[Asked] = _WATCHED, queue: str | None = None) -> State[None]:
    """Release those of a watch list whose model or recipe changed since their champion.

    Args:
        watch: recipes, each with its settings; one for each registered model
        queue: of the work pool, for the releases: cpu, gpu or gaudi
    """
    rows = list(_rows(watch, queue))
    create_table_artifact([asdict(row) for row in rows], key="watch", description="Watch list")
    message = "\n".join(f"{row.recipe}: {row.done}: {row.why}" for row in rows)
    if any(row.done == "error" for row in rows):
        return Failed(message=message)
    return Completed(message=message)


def why_due(recipe: Recipe, registry: Registry) -> tuple[bool, str, str]:
    """Whether a release is due, why or why not, and the digest of model and recipe.

    Raises:
        CheckpointError: no such model, or a damaged one.
    """
    from tasks.support.model import inspect  # imported late: slow, and nobody who deploys needs it

    name, store = recipe.registered_name, Store(recipe.execution.store)
    with store.in_use():
        model = inspect(recipe.model, store, recipe.scheme.keeps)
    wanted = {"asked_digest": recipe.digest, "model_digest": model.digest}
    identity = digest(wanted)
    newest, champion = registry.find(name, {}), registry.champion(name)
    if newest is None:
        return True, f"{name} has no version yet", identity
    for version in (champion, newest):
        if version is not None and wanted.items() <= (tags := registry.tags(name, version)).items():
            verdict = "champion" if version == champion else tags.get("verdict", "unjudged")
            return False, f"unchanged since version {version} of {name} ({verdict})", identity
    about = registry.tags(name, champion or newest)
    parts = {"recipe": "asked_digest", "model": "model_digest"}
    changed = [part for part, tag in parts.items() if about.get(tag) != wanted[tag]]
    return True, f"{' and '.join(changed)} changed since version {champion or newest}", identity


def _rows(watch: list[Asked], queue: str | None) -> Iterator[Row]:
    registry, seen = Registry(tracking_store(home())[0]), set[str]()
    day = datetime.now(UTC).date()
    for asked in watch:
        model = ""
        try:
            recipe = admitted(asked.recipe, asked.settings)
            model, name = recipe.model.id, recipe.registered_name
            if name in seen:
                raise RecipeError(f"{name} is watched twice: give one of them a registry.name")
            seen.add(name)
            due, why, identity = why_due(recipe, registry)
            run = ""
            if due:
                key = f"nightly {day} {identity}"
                run = str(launch("release/release", asked.model_dump(), key, queue))
        except Exception as error:  # of any entry: the others go on
            yield Row(asked.recipe, model, "error", one_line(error))
            continue
        yield Row(asked.recipe, model, "released" if due else "left alone", why, run)
