"""The divergence of a candidate, where one lies beside its scores."""

from collections.abc import Mapping, Sequence

from dpq_core.evaluation.text_divergence import (
    DIVERGENCE,
    FILE,
    Spot,
    TextDivergence,
    load_divergence,
)
from dpq_core.verdict.halves import windows_of
from dpq_core.verdict.pairing import Failure
from infra.store import ArtifactRef, Store

SPOTS = 10  # that are shown


def divergence_of(
    measured: Mapping[str, ArtifactRef | Failure], store: Store, which: str
) -> TextDivergence | Failure | None:
    """Of the windows that `which` says (`dpq_core.verdict.halves`); None where nobody measured
    it."""
    found = measured.get(DIVERGENCE)
    if found is None or isinstance(found, Failure):
        return found
    return windows_of(load_divergence(store.open(found) / FILE), which)


def spots_of(
    measured: Mapping[str, ArtifactRef | Failure], store: Store, which: str
) -> Sequence[Spot]:
    """The worst spots of those windows."""
    found = divergence_of(measured, store, which)
    return found.spots[:SPOTS] if isinstance(found, TextDivergence) else ()
