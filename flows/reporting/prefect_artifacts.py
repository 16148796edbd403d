"""Prefect artifacts of a release: the verdict, the gate table, the per-layer table, links."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from dpq_core.calibration.required_tokens import CalibrationTokens
from dpq_core.evaluation.text_divergence import Spot
from dpq_core.layer.unseen import UnseenSummary
from dpq_core.model.plan import kept_lines
from dpq_core.verdict.closeness import NATS
from dpq_core.verdict.gates import Verdict
from dpq_core.verdict.pairing import Difference, Evaluation, Failure
from dpq_core.verdict.standing import Metric
from tasks.log import layer_rows
from tasks.register import Registration


def publish(
    verdict: Verdict,
    manifest: Mapping[str, Any],
    checkpoint: Path,
    registration: Registration,
    run_url: str,
) -> None:
    """Put a release on its Prefect run page."""
    publish_verdict(verdict, checkpoint, registration, run_url, model_notes(manifest))
    create_table_artifact(layer_rows(manifest), key="layers", description="Error of each layer")


def publish_verdict(
    verdict: Verdict,
    checkpoint: Path,
    registration: Registration,
    run_url: str,
    about: Sequence[str] = (),
) -> None:
    """Verdict, gate table and the checkpoint's folder. about: what a reader has to know besides."""
    summary = _summary(verdict, registration, run_url, about)
    create_markdown_artifact(summary, key="verdict", description="Verdict")
    create_table_artifact(
        gate_rows(verdict.metrics), key="gates", description="Baseline and candidate"
    )
    create_link_artifact(
        checkpoint.as_uri(), key="checkpoint", description="The checkpoint's folder"
    )


def publish_parts(tables: Mapping[str, list[dict[str, Any]]]) -> None:
    """Categories and subjects of suites that have them (MMLU), as tables."""
    for suite, rows in tables.items():
        key = suite.lower().replace("_", "-")  # all that Prefect allows
        create_table_artifact(rows, key=key, description=f"Parts of {suite}, percent")


def publish_spots(spots: Sequence[Spot]) -> None:
    """Where the candidate's predictions are farthest from the 16-bit model's, as a table; nothing
    where nothing was measured."""
    if spots:
        description = "Text at which the candidate is farthest from the 16-bit model"
        create_table_artifact(spot_rows(spots), key="spots", description=description)


def spot_rows(spots: Sequence[Spot]) -> list[dict[str, str]]:
    """A row a spot: nats, whether both thought the same most likely, the text around it."""
    return [
        {
            "nats": number(spot.nats, ".3f"),
            "most likely": "the same" if spot.agree else "another",
            "before": printable(spot.before),
            "token": printable(spot.token),
            "after": printable(spot.after),
        }
        for spot in spots
    ]


def printable(text: str) -> str:
    """On one line, and all of it seen: ends of lines as ⏎, what has no shape as ·."""
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in text)


def score_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """A row for each suite of one checkpoint; value None where it failed or is not finite."""
    rows: list[dict[str, Any]] = []
    for suite, scores in evaluation.items():
        if isinstance(scores, Failure):
            rows.append({"suite": suite, "value": None, "wrong": scores.reason})
            continue
        rows.append(
            {
                "suite": suite,
                "metric": scores.metric,
                "value": scores.value if math.isfinite(scores.value) else None,
                "documents": len(scores),
                "truncated": scores.truncated,
            }
        )
    return rows


def gate_rows(metrics: Mapping[str, Metric]) -> list[dict[str, str]]:
    """The gate table: a row a metric, numbers as they are shown."""
    return [
        {
            "metric": shown_name(name, metric),
            "baseline": number(metric.baseline, spec),
            "candidate": number(metric.candidate, spec),
            "delta": number(metric.delta, f"+{spec}"),
            "interval": interval(metric, spec),
            "right/wrong": turned(metric),
            "limit": "–" if metric.limit is None else f"{metric.limit:g}",
            "result": metric.standing or ("failed" if metric.wrong else "no gate"),
        }
        for name, metric in metrics.items()
        for spec in [".5f" if metric.metric == NATS else ".4f"]
    ]


def notes(metrics: Mapping[str, Metric]) -> list[str]:
    """What a reader of the gate table has to know besides."""
    return [
        f"{name}: {metric.truncated} requests were longer than the model's window, and were cut"
        for name, metric in metrics.items()
        if metric.truncated
    ]


def model_notes(manifest: Mapping[str, Any]) -> list[str]:
    """What a reader has to know of the model: what it was calibrated on where that is less than was
    asked, what stayed in 16 bits and why, what did worse than rounding, and whether its own code
    was run."""
    tokens = CalibrationTokens.of_manifest(manifest)
    lines = [f"calibration: {tokens.line}"] if tokens.got < tokens.asked else []
    lines += kept_lines(manifest["skipped"])
    if found := UnseenSummary.of(manifest["layers"]):
        lines += found.warnings
    if manifest["base_model"]["trust_remote_code"]:
        lines.append("the checkpoint's own Python code was run (model.trust_remote_code)")
    return lines


def shown_name(name: str, metric: Difference) -> str:
    """A metric's name with what it counts: `accuracy.piqa (acc_norm)`."""
    return name if metric.metric in (name, "") else f"{name} ({metric.metric})"


def number(value: float | None, spec: str) -> str:
    """A number as text; what is none, as a word."""
    if value is None:
        return "missing"
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    return format(value, spec)


def interval(metric: Metric, spec: str = ".4f") -> str:
    """The interval of the difference, or a dash."""
    if metric.interval is None:
        return "–"
    low, high = metric.interval
    return f"{number(low, f'+{spec}')} … {number(high, f'+{spec}')}"


def turned(metric: Metric, other_too: bool = True) -> str:
    """How many answers turned right, wrong, and into another wrong one where that is known, and how
    likely such a mean is of equals."""
    if metric.turned_right is None:
        return "–"
    known = other_too and metric.turned_other is not None
    other = f" ~{metric.turned_other}" if known else ""
    return f"+{metric.turned_right} −{metric.turned_wrong}{other}, p {metric.p_value:.2g}"


def standings(metrics: Mapping[str, Metric]) -> str:
    """How many gates came out how, in a line; which failed, which are not shown, and how many
    documents would show these."""
    words = []
    for word in ("shown", "not shown", "failed"):
        found = {name: metric for name, metric in metrics.items() if metric.standing == word}
        named = [f"{n}: {m.way_out}" if m.way_out else n for n, m in found.items()]
        which = f" ({'; '.join(named)})" if named and word != "shown" else ""
        words.append(f"{len(found)} {word}{which}")
    return f"gates: {', '.join(words)}"


def _summary(
    verdict: Verdict, registration: Registration, run_url: str, about: Sequence[str]
) -> str:
    previous = registration.previous_champion
    lines = [
        f"# {verdict.verdict}",
        "",
        f"`{registration.name}` version {registration.version}, MLflow run `{run_url}`. "
        + ("No champion before." if previous is None else f"Champion before: {previous}."),
        "",
        *(f"- {line}" for line in [*verdict.reasons, *notes(verdict.metrics)]),
        f"- {standings(verdict.metrics)}; judged on {verdict.judged_on}",
        *(f"- {line}" for line in about),
    ]
    return "\n".join(lines)
