"""Artifacts by the digest of what they were computed from: the folder, and who works in it."""

from infra.store.store import (
    COLLECTOR,
    ArtifactRef,
    Store,
    StoreError,
    StoreFullError,
    artifact_around,
    artifact_at,
)

__all__ = [
    "COLLECTOR",
    "ArtifactRef",
    "Store",
    "StoreError",
    "StoreFullError",
    "artifact_around",
    "artifact_at",
]
