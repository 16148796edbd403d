"""Register a release's checkpoint, and move the champion if it was promoted."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import httpx
import tenacity
from prefect import get_client, task
from prefect.cache_policies import NO_CACHE
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

from dpq_core.digests import digest
from dpq_core.errors import InputError
from dpq_core.recipe import Recipe
from dpq_core.verdict.gates import Verdict
from infra.registry import BASE_MODEL, Registry
from infra.store import ArtifactRef, Store
from tasks.support.model import Model

PROMOTION = "promotion"  # a global concurrency limit of Prefect's
_RESTART = 120.0  # s, for a server to be up again


@contextmanager
def promoting() -> Iterator[None]:
    """Within Prefect's limit, which holds for all that use one server, where `dpq deploy` made it.
    Where it did not, no place is asked for: on SQLite the server writes for that too, is refused
    beside other writers, and its client waits two seconds.

    Prefect asks for a place once. A server that is being started again is asked until it answers,
    as Prefect's client does with everything else.

    Raises:
        ConcurrencySlotAcquisitionError, httpx.TransportError: it does not.
    """
    with ExitStack() as stack:
        for attempt in tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(
                (ConcurrencySlotAcquisitionError, httpx.TransportError)
            ),
            wait=tenacity.wait_fixed(2),
            stop=tenacity.stop_after_delay(_RESTART),
            reraise=True,
        ):
            with attempt:
                if _is_limited():
                    stack.enter_context(concurrency(PROMOTION))
        yield


def _is_limited() -> bool:
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(PROMOTION)
        except ObjectNotFound:
            return False
    return True


class BaseModelError(InputError):
    """A release of another model than the champion's."""


@dataclass(frozen=True)
class Base:
    """What a release is made of. digest: of its content, where that is known. any: the champion
    may be of another."""

    model: str
    digest: str | None = None
    any: bool = False

    def obstacle(self, registry: Registry, name: str, champion: int | None) -> str | None:
        """Why a release may not take the alias from this champion; None: it may."""
        if champion is None or self.any:
            return None
        same = self.digest is not None and self.digest == (
            registry.tags(name, champion).get("model_digest")
        )
        theirs = registry.base_model(name, champion)
        if same or theirs in (None, self.model):
            return None
        return (
            f"the champion of {name}, version {champion}, was made of {theirs}, and this is of"
            f" {self.model}: give it a name of its own (registry.name), or set"
            " registry.any_base_model: true to let it take the alias"
        )

    def check(self, registry: Registry, name: str, champion: int | None) -> None:
        """The same before any work.

        Raises:
            BaseModelError: why it may not take the alias.
        """
        if reason := self.obstacle(registry, name, champion):
            raise BaseModelError(reason)


def base_of(recipe: Recipe, model: Model) -> Base:
    """The base model of a release of a language model."""
    return Base(model.id, model.digest, recipe.registry.any_base_model)


@dataclass(frozen=True)
class Registration:
    """Where a release ended up in the registry. verdict: `withheld` in place of `promoted` where
    the champion changed while the release ran or is of another base model, or the release was
    rolled back once."""

    name: str
    version: int
    previous_champion: int | None
    verdict: Verdict


@task(name="register", cache_policy=NO_CACHE)
def register(
    tracking_uri: str,
    run_id: str,
    recipe: Recipe,
    model: Model,
    checkpoint: ArtifactRef,
    verdict: Verdict,
    champion_before: int | None,
    source: str | None = None,
    about: Mapping[str, str] | None = None,
) -> Registration:
    """A model version whose source is the checkpoint, in the store or at `source`; a release that
    is registered already is found again. Promotion moves the alias `champion`, one release at a
    time, and only where it is still `champion_before` or this release; any other verdict leaves it
    where it is. about: further tags of the version."""
    identity = digest([recipe.digest, model.digest, checkpoint.sha256])
    tags = {"recipe_digest": recipe.digest, "model_digest": model.digest}
    tags |= {"checkpoint_sha256": checkpoint.sha256}
    store = Store(recipe.execution.store)
    address = source or checkpoint.uri
    base = base_of(recipe, model)
    entry = Entry(recipe.registered_name, identity, address, run_id, base, tags, about or {})
    return enter(Registry(tracking_uri), store, entry, verdict, champion_before)


@dataclass(frozen=True)
class Entry:
    """What the registry is told of a release. identity: its digest. source: where its files are.
    tags: of a new version. about: further tags, of one that is there already too."""

    name: str
    identity: str
    source: str
    run_id: str
    base: Base
    tags: Mapping[str, str]
    about: Mapping[str, str] = field(default_factory=dict)


def enter(
    registry: Registry,
    store: Store,
    entry: Entry,
    verdict: Verdict,
    champion_before: int | None,
) -> Registration:
    """A release of any pipeline into the registry, as `register` says."""
    name = entry.name
    tags = {"release_digest": entry.identity}
    store.remember_registry(registry.tracking_uri)
    with promoting(), registry.exclusive(name, store):
        version = registry.find(name, tags)
        if version is None:
            new = {**tags, BASE_MODEL: entry.base.model, **entry.tags}
            version = registry.register(name, entry.source, entry.run_id, new)
        registry.annotate(name, version, entry.about)
        if verdict.verdict == "promoted":
            reason = registry.obstacle(name, version, champion_before)
            reason = reason or entry.base.obstacle(registry, name, registry.champion(name))
            if reason is None:
                return Registration(name, version, registry.promote(name, version), verdict)
            verdict = replace(verdict, verdict="withheld", reasons=(reason,))
        registry.withhold(name, version, verdict.verdict, verdict.reasons)
        return Registration(name, version, registry.champion(name), verdict)
