"""Copy a release to where others find it: a promoted one, and for a registry that is a server any,
since a server takes no folder of ours as a version's source; and to a model hub, a promoted one."""

from collections.abc import Sequence
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from dpq_core.checkpoint import exports
from dpq_core.checkpoint.exports.card import CARD
from dpq_core.checkpoint.native import MANIFEST
from dpq_core.convnet import files as classifier
from dpq_core.recipe import Recipe
from dpq_core.verdict.gates import Verdict
from infra import remote, settings
from infra.hub import HubError, HubRepository
from infra.outgoing import files_to_send
from infra.registry import Registry, RegistryError
from infra.remote import RemoteError
from infra.store import ArtifactRef
from tasks.export import Export
from tasks.register import Registration
from tasks.support.hub_card import HubCardError, hub_card
from tasks.support.model import Model

# Sent last: a folder without its manifest is not whole.
_LAST = (MANIFEST, exports.MANIFEST, classifier.MANIFEST)


def destination_of(asked: str | None, registry: Registry) -> str | None:
    """Where a release will be copied to, tried out: what its recipe asks for, or `DPQ_DESTINATION`.

    Raises:
        RegistryError: none, and the registry is a server.
        RemoteError: it takes nothing.
    """
    destination = asked or settings.destination()
    if destination is None:
        if registry.is_remote:
            raise RegistryError(
                f"{registry.tracking_uri} takes no local folder as a model's source: say where"
                " releases are copied to, registry.destination: s3://… in the recipe or"
                " DPQ_DESTINATION=s3://…, or leave MLFLOW_TRACKING_URI unset"
            )
        return None
    if not remote.is_remote(destination):
        raise RemoteError(f"DPQ_DESTINATION is {destination!r}: it must be s3://bucket/…")
    remote.check_writable(destination)
    return destination


def published(
    destination: str | None,
    registry: Registry,
    verdict: Verdict,
    name: str,
    checkpoint: ArtifactRef,
    written: Sequence[Export] = (),
) -> str | None:
    """Address of what `publish_release` copies: a promoted release, and for a registry that is a
    server any; None where there is no destination, and of others."""
    if destination and (registry.is_remote or verdict.verdict == "promoted"):
        return publish_release(destination, name, checkpoint, written)
    return None


@task(name="publish", cache_policy=NO_CACHE)
def publish_release(
    destination: str, name: str, checkpoint: ArtifactRef, written: Sequence[Export] = ()
) -> str:
    """Checkpoint and exports to `<destination>/<registered model>/<digest>/<format>`, the
    checkpoint as `native`; returns its address. What is there already is not sent again.

    Raises:
        RemoteError: the destination takes nothing.
    """
    root = f"{destination.rstrip('/')}/{name}/{checkpoint.sha256[:16]}"
    for form, artifact in [("native", checkpoint), *((e.name, e.artifact) for e in written)]:
        remote.upload(artifact.folder, f"{root}/{form}", _names(artifact.folder))
    return f"{root}/native"


def check_hub(recipe: Recipe) -> None:
    """Whether the hub that the recipe names, if it does, would take a release.

    Raises:
        HubError: why not.
    """
    if hub := recipe.registry.hub:
        HubRepository(hub.repo, hub.private).check()


def pushed(
    recipe: Recipe,
    model: Model,
    registry: Registry,
    registration: Registration,
    checkpoint: ArtifactRef,
    written: Sequence[Export],
) -> str | None:
    """Address of the commit of what `push_release` pushes: the champion alone, so that a hub never
    shows what the registry did not promote. None of others, and where no hub is asked for.

    Raises:
        HubError: it was not pushed; the registry is as the verdict left it, which this says.
    """
    if recipe.registry.hub is None or registration.verdict.verdict != "promoted":
        return None
    name, version = registration.name, registration.version
    try:
        if registry.champion(name) != version:
            raise HubError(f"version {registry.champion(name)} took its place meanwhile")
        address = push_release(recipe, model, registration, checkpoint, written)
    except (HubError, HubCardError) as error:
        raise HubError(
            f"version {version} of {name} is promoted, and the hub does not show it: {error}; run"
            " again when it can: nothing is computed twice, and no finished file is sent again"
        ) from error
    registry.annotate(name, version, {"hub": address})
    return address


@task(name="push", cache_policy=NO_CACHE)
def push_release(
    recipe: Recipe,
    model: Model,
    registration: Registration,
    checkpoint: ArtifactRef,
    written: Sequence[Export],
) -> str:
    """The first export to the branch that the recipe names, which is what engines load; the other
    exports and the native checkpoint to branches `<branch>-<format>`. Without exports the native
    checkpoint is what the branch holds. The named branch moves last; returns its commit's address.

    Raises:
        HubError: the hub does not take all of it.
    """
    hub = recipe.registry.hub
    assert hub is not None
    repository, address = HubRepository(hub.repo, hub.private), ""
    forms = [*((each.name, each.artifact) for each in written), ("native", checkpoint)]
    for number, (form, artifact) in reversed(list(enumerate(forms))):
        card = (artifact.folder / CARD).read_text("utf-8")
        card = hub_card(card, recipe, model.revision, registration.verdict.metrics)
        address = repository.push(
            artifact.folder,
            f"{hub.branch}-{form}" if number else hub.branch,
            f"{registration.name} {registration.version}, {form} {artifact.sha256[:16]}",
            {CARD: card.encode()},
        )
    return address


def _names(folder: Path) -> list[str]:
    names = files_to_send(folder)
    last = [name for name in _LAST if name in names]
    return [name for name in names if name not in last] + last
