"""The model registry: one registered model a product, one version a released checkpoint.

The alias `champion` names the version in use. Promotion moves it, rejection never does; tags on the
version keep the verdict, the reasons, and the champion that was replaced, so a release can be taken
back by hand. MLflow has no compare-and-set for aliases: whoever promotes must do it one at a time.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from infra.tracking import mlflow_client

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION = "champion"
_TAG_LENGTH = 5000  # of the oldest servers we may meet; 3.16 itself takes 100,000


class RegistryError(RuntimeError):
    """A registration that the registry cannot take, with the way out."""


class Registry:
    """Versions and their verdicts, in the store or server behind `tracking_uri`."""

    def __init__(self, tracking_uri: str) -> None:
        self.tracking_uri = tracking_uri

    @cached_property
    def _client(self) -> "MlflowClient":
        return mlflow_client(self.tracking_uri)

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
        remote = self.tracking_uri.startswith(("http://", "https://"))
        if remote and "://" not in source.replace("file://", ""):
            raise RegistryError(
                f"{self.tracking_uri} takes no local folder as a model's source ({source}): "
                "keep artifacts in an s3:// store, or leave MLFLOW_TRACKING_URI unset"
            )
        self._ensure_model(name)
        version = self._client.create_model_version(
            name, source, run_id, tags={key: _tag(value) for key, value in tags.items()}
        )
        return int(version.version)

    def find(self, name: str, tags: Mapping[str, str]) -> int | None:
        """Newest version that carries all of `tags`, such as a release's digest."""
        token: str | None = None
        found: list[int] = []
        wanted = {key: _tag(value) for key, value in tags.items()}
        while True:
            page = self._client.search_model_versions(f"name = '{name}'", page_token=token)
            found += [int(v.version) for v in page if wanted.items() <= v.tags.items()]
            token = page.token
            if not token:
                return max(found, default=None)

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

    def promote(self, name: str, version: int) -> int | None:
        """Make `version` the champion and return the one that it replaced.

        Tags go first: a champion without its verdict is never visible. Promoting the champion
        again changes nothing, and returns what it replaced then.
        """
        tags = self._client.get_model_version(name, str(version)).tags
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

    def withhold(self, name: str, version: int, verdict: str, reasons: Sequence[str]) -> None:
        """Record that `version` was not promoted (`verdict`: rejected, inspected) and why, a
        numbered line a reason. The alias stays."""
        lines = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
        self._set_tag(name, version, "reasons", "\n".join(lines))
        self._set_tag(name, version, "verdict", verdict)

    def _ensure_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _set_tag(self, name: str, version: int, key: str, value: str) -> None:
        self._client.set_model_version_tag(name, str(version), key, _tag(value))


def _tag(value: str) -> str:
    return value[:_TAG_LENGTH]
