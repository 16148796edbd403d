"""What a report tells of a release."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from dpq_core.benchmark.throughput import Times
from dpq_core.evaluation.text_divergence import Spot
from dpq_core.recipe import Recipe
from dpq_core.verdict.gates import Verdict
from dpq_core.verdict.ratios import THROUGHPUT_RATIO
from infra.registry.history import PastVersion


@dataclass(frozen=True)
class ReportData:
    """What a report tells of a release. sizes: bytes of weights, 16-bit model and candidate.
    past: versions of the registered model with this one, the oldest first. parts: tables of suites'
    categories and subjects. checks: of integrity, None where passed. spots: of the text, the
    farthest from the 16-bit model first. attested: what an engine computes, in a line.
    bytes_by_part: of the candidate (`dpq_core.checkpoint.bytes_by_part`)."""

    made: datetime
    recipe: Recipe
    name: str
    version: int
    verdict: Verdict
    previous_champion: int | None
    manifest: Mapping[str, Any]
    checkpoint: str
    checkpoint_sha256: str
    run: str
    sizes: tuple[int, int]
    checks: Mapping[str, str | None]
    past: Sequence[PastVersion]
    exports: Sequence[Mapping[str, Any]] = ()
    rounds: Sequence[Mapping[str, Any]] = ()
    parts: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    speeds: Sequence[Times] = ()
    spots: Sequence[Spot] = ()
    attested: str | None = None
    bytes_by_part: Mapping[str, int] = field(default_factory=dict)

    @property
    def errors(self) -> dict[str, float]:
        """The relative error of each layer's output."""
        return {row["name"]: row["error"] for row in self.manifest["layers"]}

    @property
    def judged(self) -> list[str]:
        """Metrics of quality that have a limit; speed has a column of its own."""
        return [
            name
            for name, metric in self.verdict.metrics.items()
            if metric.limit is not None and not name.startswith(THROUGHPUT_RATIO)
        ]
