"""The versions of a registered model, and what was measured of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from infra.registry import Registry
from infra.registry.tracking import mlflow_client


@dataclass(frozen=True)
class PastVersion:
    """A version as the registry knows it. metrics: of the run that registered it, by name; empty
    where that run was deleted."""

    number: int
    created: datetime
    verdict: str
    rolled_back: bool
    metrics: Mapping[str, float]


def newest_versions(tracking_uri: str, name: str, most: int) -> list[PastVersion]:
    """The newest `most` versions of a registered model, the oldest of them first."""
    versions = sorted(Registry(tracking_uri).versions(name), key=lambda v: int(v.version))
    return [
        PastVersion(
            int(version.version),
            datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
            version.tags.get("verdict", "unknown"),
            "rolled_back" in version.tags,
            _metrics(tracking_uri, version.run_id),
        )
        for version in versions[-most:]
    ]


def _metrics(tracking_uri: str, run_id: str | None) -> dict[str, float]:
    from mlflow.exceptions import MlflowException

    if not run_id:
        return {}
    try:
        return dict(mlflow_client(tracking_uri).get_run(run_id).data.metrics)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}
