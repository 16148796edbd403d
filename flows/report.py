"""Prefect artifacts of a release: the verdict, the gate table, the per-layer table, links."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from dpq_core.gates import Verdict
from tasks.register import Registration, layer_rows


def publish(
    verdict: Verdict,
    manifest: Mapping[str, Any],
    checkpoint: Path,
    registration: Registration,
    run_url: str,
) -> None:
    """Put a release on its Prefect run page."""
    create_markdown_artifact(
        _summary(verdict, registration, run_url), key="verdict", description="Verdict"
    )
    create_table_artifact(gate_rows(verdict), key="gates", description="Baseline and candidate")
    create_table_artifact(layer_rows(manifest), key="layers", description="Error of each layer")
    create_link_artifact(checkpoint.as_uri(), "checkpoint", key="checkpoint")


def gate_rows(verdict: Verdict) -> list[dict[str, Any]]:
    """The gate table: a row a metric, numbers as they are shown."""
    return [
        {
            "metric": name,
            "baseline": _number(metric.baseline),
            "candidate": _number(metric.candidate),
            "delta": _number(metric.delta, sign="+"),
            "limit": "–" if metric.limit is None else f"{metric.limit:g}",
            "result": "shown" if metric.limit is None else ("pass" if metric.passed else "FAIL"),
        }
        for name, metric in verdict.metrics.items()
    ]


def _number(value: float | None, sign: str = "") -> str:
    return "missing" if value is None else f"{value:{sign}.4f}"


def _summary(verdict: Verdict, registration: Registration, run_url: str) -> str:
    previous = registration.previous_champion
    lines = [
        f"# {verdict.verdict}",
        "",
        f"`{registration.name}` version {registration.version}, MLflow run `{run_url}`. "
        + ("No champion before." if previous is None else f"Champion before: {previous}."),
        "",
        *(f"- {reason}" for reason in verdict.reasons),
    ]
    return "\n".join(lines)
