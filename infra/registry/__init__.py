"""MLflow: the registry of released models, their history, and the tracking of runs."""

from infra.registry.registry import BASE_MODEL, Registry, RegistryError, Rollback

__all__ = ["BASE_MODEL", "Registry", "RegistryError", "Rollback"]
