"""The model registry: one registered model a product, one version a released checkpoint.

The alias `champion` names the version in use. Promotion moves it, rejection never does; tags on the
version keep the verdict, the reasons, and the champion that was replaced, to which `roll_back`
returns.

MLflow has no compare-and-set for aliases. So whoever promotes or rolls back does it inside
`exclusive`, and a release is promoted only where the champion is still the one that it saw when it
began. The lease lies beside the database where that is a file, and in the artifact store where the
registry is a server: releases of one model that use one server and different stores are then not
kept apart.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from infra.registry.tracking import is_server, mlflow_client
from infra.store import Store
from infra.store.leases import Leases

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
BASE_MODEL = "base_model"  # tag: what a version was made of
_TAG_LENGTH = 5000  # of the oldest servers we may meet; 3.16 itself takes 100,000


class RegistryError(RuntimeError):
    """A registration that the registry cannot take, with the way out."""


@dataclass(frozen=True)
class Rollback:
    """A champion that was taken back: versions, before and now."""

    name: str
    taken_back: int
    champion: int


class Registry:
    """Versions and their verdicts, in the store or server behind `tracking_uri`."""

    def __init__(self, tracking_uri: str) -> None:
        self.tracking_uri = tracking_uri

    @cached_property
    def _client(self) -> "MlflowClient":
        return mlflow_client(self.tracking_uri)

    @property
    def is_remote(self) -> bool:
        """A server, which takes no folder of this machine as a version's source."""
        return is_server(self.tracking_uri)

    @staticmethod
    def uri(name: str, version: int | None = None) -> str:
        """What MLflow's tools take; without a version, the champion.

        They look in the registry that `MLFLOW_TRACKING_URI` names, whatever is passed to them.
        """
        return f"models:/{name}@{CHAMPION}" if version is None else f"models:/{name}/{version}"

    def register(self, name: str, source: str, run_id: str, tags: Mapping[str, str]) -> int:
        """Add a version whose files stay where they are, at `source` (`file://…`, `s3://…`).

        Always a new version: ask `find` first where the same release may be registered again.

        Raises:
            RegistryError: a local folder and a remote server, which would not find it.
        """
        if self.is_remote and "://" not in source.replace("file://", ""):
            raise RegistryError(
                f"{self.tracking_uri} takes no local folder as a model's source ({source}): "
                "publish it (registry.destination: s3://…), or leave MLFLOW_TRACKING_URI unset"
            )
        self._ensure_model(name)
        version = self._client.create_model_version(
            name, source, run_id, tags={key: _tag(value) for key, value in tags.items()}
        )
        return int(version.version)

    def find(self, name: str, tags: Mapping[str, str]) -> int | None:
        """Newest version that carries all of `tags`, such as a release's digest."""
        wanted = {key: _tag(value) for key, value in tags.items()}
        versions = self.versions(name)
        return max(
            (int(v.version) for v in versions if wanted.items() <= v.tags.items()), default=None
        )

    def tags(self, name: str, version: int) -> dict[str, str]:
        """What a version says of itself.

        Raises:
            RegistryError: no such version.
        """
        from mlflow.exceptions import MlflowException

        try:
            tags: dict[str, str] = self._client.get_model_version(name, str(version)).tags
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise RegistryError(f"{name}: version {version} not found") from error
        return tags

    def champion(self, name: str) -> int | None:
        """The version in use; None before the first promotion."""
        from mlflow.exceptions import MlflowException

        try:
            aliases = self._client.get_registered_model(name).aliases
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return int(aliases[CHAMPION]) if CHAMPION in aliases else None

    def versions(self, name: str) -> "Iterator[ModelVersion]":
        """All versions of a registered model, in no particular order; none where it is unknown."""
        token: str | None = None
        while True:
            page = self._client.search_model_versions(f"name = {_quoted(name)}", page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def exclusive(self, name: str, store: Store) -> AbstractContextManager[None]:
        """Held by whoever decides who is champion; the others wait."""
        about = hashlib.sha256(f"{self.tracking_uri}\n{name}".encode()).hexdigest()[:16]
        lease = f"champion-{about}"
        if self.tracking_uri.startswith("sqlite:///"):
            database = Path(self.tracking_uri.removeprefix("sqlite:///"))
            return Leases(database.parent / "leases").held(lease)
        return store.lease(lease)

    def obstacle(self, name: str, version: int, seen: int | None) -> str | None:
        """Why a version that passed its gates is not to be promoted; None: nothing is in its way.

        Args:
            seen: the champion when its release began.
        """
        tags = self.tags(name, version)
        if "rolled_back" in tags:
            return (
                f"version {version} of {name} is this very release, and was rolled back"
                f" ({tags['rolled_back']}): delete its tag rolled_back to let it be promoted again"
            )
        champion = self.champion(name)
        if champion in (seen, version):
            return None
        before = "there was none" if seen is None else f"it was version {seen}"
        after = "there is none" if champion is None else f"version {champion} is champion"
        return (
            f"{after} of {name} now, and {before} when this release began: run it again to"
            " put it in that place knowingly (nothing is computed twice)"
        )

    def base_model(self, name: str, version: int) -> str | None:
        """What a version was made of, as it or its run says; None where neither does."""
        from mlflow.exceptions import MlflowException

        tags = self.tags(name, version)
        if BASE_MODEL in tags:
            return tags[BASE_MODEL]
        run = self._client.get_model_version(name, str(version)).run_id
        try:
            found: str | None = self._client.get_run(run).data.params.get("model.id")
        except MlflowException:  # of a run that was deleted
            return None
        return found

    def promote(self, name: str, version: int) -> int | None:
        """Make `version` the champion and return the one that it replaced; to be called inside of
        `exclusive`, where `obstacle` sees none.

        Tags go first: a champion without its verdict is never visible. Promoting the champion
        again changes nothing, and returns what it replaced then.
        """
        tags = self.tags(name, version)
        previous = self.champion(name)
        if previous == version:
            replaced = tags.get("previous_champion")
            return int(replaced) if replaced else None
        if previous is not None:
            self._set_tag(name, version, "previous_champion", str(previous))
        if "reasons" in tags:  # of an earlier rejection
            self._client.delete_model_version_tag(name, str(version), "reasons")
        self._set_tag(name, version, "verdict", "promoted")
        self._client.set_registered_model_alias(name, CHAMPION, str(version))
        return previous

    def annotate(self, name: str, version: int, tags: Mapping[str, str]) -> None:
        """Set tags of a version, replacing those of the same name."""
        for key, value in tags.items():
            self._set_tag(name, version, key, value)

    def withhold(self, name: str, version: int, verdict: str, reasons: Sequence[str]) -> None:
        """Record that `version` was not promoted (`verdict`: rejected, inspected) and why, a
        numbered line a reason. The alias stays."""
        lines = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
        self._set_tag(name, version, "reasons", "\n".join(lines))
        self._set_tag(name, version, "verdict", verdict)

    def roll_back(self, name: str, about: str, check: Callable[[str], None]) -> Rollback:
        """Make the champion before the present one champion again, of those that were not rolled
        back themselves; inside of `exclusive`.

        Args:
            about: by whom and why; kept in the tag `rolled_back` of the version, with the time.
            check: called with the source of the version to return to; raises where it is unusable.

        Raises:
            RegistryError: nothing to go back to.
        """
        champion = self.champion(name)
        if champion is None:
            known = ", ".join(sorted(self._names())) or "none"
            raise RegistryError(f"{name}: no champion to roll back; models with versions: {known}")
        target = self._before(name, champion)
        check(self._client.get_model_version(name, str(target)).source)
        # The tag first: killed in between, the next rollback goes on from here.
        time = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        self._set_tag(name, champion, "rolled_back", f"{time} {about}")
        self._client.set_registered_model_alias(name, CHAMPION, str(target))
        return Rollback(name, champion, target)

    def references(self) -> Iterator[str]:
        """All that any version says: where its files are, and its tags."""
        for name in self._names():
            for version in self.versions(name):
                yield version.source
                yield from version.tags.values()

    def _before(self, name: str, champion: int) -> int:
        passed, version = {champion}, champion
        while True:
            before = self.tags(name, version).get("previous_champion")
            if before is None or int(before) in passed:
                raise RegistryError(
                    f"{name}: version {champion} is champion, and no version before it is left to"
                    " roll back to"
                )
            version = int(before)
            passed.add(version)
            try:
                tags = self.tags(name, version)
            except RegistryError as error:
                raise RegistryError(
                    f"{name}: version {version}, a former champion, was deleted:"
                    " set the alias champion by hand"
                ) from error
            if "rolled_back" not in tags:
                return version

    def _names(self) -> Iterator[str]:
        token: str | None = None
        while True:
            page = self._client.search_registered_models(page_token=token)
            yield from (model.name for model in page)
            token = page.token
            if not token:
                return

    def _ensure_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _set_tag(self, name: str, version: int, key: str, value: str) -> None:
        self._client.set_model_version_tag(name, str(version), key, _tag(value))


def _quoted(text: str) -> str:
    """A string of MLflow's filter language, which knows no escapes: a quote stands in others."""
    quote = '"' if "'" in text else "'"
    return f"{quote}{text}{quote}"


def _tag(value: str) -> str:
    return value[:_TAG_LENGTH]
