"""Statistics of the blocks that this process calibrated last, for layers that it quantizes next:
they are neither read from the store nor hashed once more.

As many blocks' are kept as a calibration task passes, and an input's are gone once its layers have
taken them.
"""

from collections.abc import Mapping
from threading import Lock

from dpq_core.layer.hessian import InputStatistics
from infra.store import ArtifactRef

_kept: list[dict[str, InputStatistics]] = []  # by block, the oldest first
_changing = Lock()


def keep(statistics: Mapping[ArtifactRef, InputStatistics], blocks: int) -> None:
    """A block's, besides those of the blocks before it: so many in all."""
    with _changing:
        _kept.append({artifact.sha256: each for artifact, each in statistics.items()})
        del _kept[:-blocks]


def take(artifact: ArtifactRef) -> InputStatistics | None:
    """What an artifact holds, if it is here; it is not here any more then."""
    with _changing:
        found = (block.pop(artifact.sha256, None) for block in _kept)
        return next((statistics for statistics in found if statistics), None)


def forget() -> None:
    """All of it."""
    with _changing:
        _kept.clear()
