"""The statistics of the block that this process calibrated last, for layers that it quantizes next:
they are neither read from the store nor hashed once more.

No more than one block's are kept, and an input's are gone once its layers have taken them.
"""

from collections.abc import Mapping
from threading import Lock

from dpq_core.hessian import InputStatistics
from infra.store import ArtifactRef

_kept: dict[str, InputStatistics] = {}
_changing = Lock()


def keep(statistics: Mapping[ArtifactRef, InputStatistics]) -> None:
    """These, in place of all others; none: forget them."""
    with _changing:
        _kept.clear()
        _kept.update({artifact.sha256: each for artifact, each in statistics.items()})


def take(artifact: ArtifactRef) -> InputStatistics | None:
    """What an artifact holds, if it is here; it is not here any more then."""
    with _changing:
        return _kept.pop(artifact.sha256, None)
