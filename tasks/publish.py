"""Copy a promoted release to where it is served from."""

from collections.abc import Sequence
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from dpq_core import exports
from dpq_core.checkpoint import MANIFEST
from dpq_core.recipe import Recipe
from infra import remote
from infra.store import ArtifactRef
from tasks.export import Export

_LAST = (MANIFEST, exports.MANIFEST)  # a folder without its manifest is not whole


@task(name="publish", cache_policy=NO_CACHE)
def publish_release(recipe: Recipe, checkpoint: ArtifactRef, written: Sequence[Export]) -> str:
    """Checkpoint and exports to `<registry.destination>/<registered model>/<digest>/<format>`, the
    checkpoint as `native`; returns its address. What is there already is not sent again.

    Raises:
        RemoteError: the destination takes nothing.
    """
    destination = (recipe.registry.destination or "").rstrip("/")
    root = f"{destination}/{recipe.registered_name}/{checkpoint.sha256[:16]}"
    for name, artifact in [("native", checkpoint), *((e.name, e.artifact) for e in written)]:
        remote.upload(artifact.folder, f"{root}/{name}", _names(artifact.folder))
    return f"{root}/native"


def _names(folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {str(path.relative_to(folder)) for path in files if not path.name.startswith(".")}
    last = [name for name in _LAST if name in names]
    return sorted(names.difference(last)) + last
