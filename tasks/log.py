"""Log to MLflow: a release, and an evaluation down to the documents."""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
from prefect import task
from prefect.cache_policies import NO_CACHE
from pyarrow import parquet

from dpq_core.checkpoint.exports.card import cache_bytes
from dpq_core.evaluation.scores import Scores
from dpq_core.evaluation.text_divergence import DIVERGENCE, FILE
from dpq_core.recipe import Recipe
from dpq_core.verdict.gates import Verdict
from dpq_core.verdict.pairing import Difference, Evaluation, Failure, breakdown
from dpq_core.verdict.standing import Metric
from infra.registry.tracking import TrackedRun
from infra.store import ArtifactRef, Store
from tasks.evaluate import Measured, load_evaluation
from tasks.support.model import Model


@task(name="log", cache_policy=NO_CACHE)
def log_release(
    run: TrackedRun,
    recipe: Recipe,
    model: Model,
    manifest: Mapping[str, Any],
    metrics: Mapping[str, Difference],
) -> None:
    """Parameters, metrics, the per-layer table and plot."""
    from tasks.support.figures import layer_error_figure  # matplotlib: a second

    run.log_params(recipe.model_dump(mode="json", exclude={"variants"}))
    run.set_tags({"model_digest": model.digest, "recipe_digest": recipe.digest})
    log_metrics(run, metrics)
    run.log_metrics({"bytes_per_weight": manifest["bytes_per_weight"]})
    if (taken := cache_bytes(manifest)) is not None:
        run.log_metrics({"cache_bytes_per_token": taken})
    run.log_table(layer_rows(manifest), "layers")
    run.log_figure(layer_error_figure(manifest), "layer_error.png")


def log_verdict(run: TrackedRun, verdict: Verdict) -> None:
    """The verdict, in place of an earlier one."""
    run.log_dict(verdict.as_dict(), "verdict.json")
    reasons = "; ".join(verdict.reasons)
    tags = {"verdict": verdict.verdict, "reasons": reasons, "judged_on": verdict.judged_on}
    for name, metric in verdict.metrics.items():
        if metric.standing:
            tags[f"gate.{name}"] = "; ".join(filter(None, (metric.standing, metric.way_out)))
    run.set_tags(tags)


def log_metrics(run: TrackedRun, metrics: Mapping[str, Difference]) -> None:
    """Differences: `<name>.baseline`, `.candidate` and `.delta`, `.needed` of what is not shown,
    and all that is known as a table; `metric` is acc, acc_norm, …"""
    for name, metric in metrics.items():
        values = {"baseline": metric.baseline, "candidate": metric.candidate, "delta": metric.delta}
        if isinstance(metric, Metric) and metric.needed is not None:
            values["needed"] = metric.needed
        run.log_metrics({f"{name}.{side}": value for side, value in values.items()})
    rows = [
        {"name": name, **asdict(metric) | {"interval": str(metric.interval or "")}}
        for name, metric in metrics.items()
    ]
    if rows:
        run.log_table(rows, "metrics")


def log_divergence(run: TrackedRun, recipe: Recipe, measured: Measured) -> None:
    """The candidate's divergence of every token, a row a window, as `divergence.parquet`; nothing
    where it was not measured."""
    found = measured.get(DIVERGENCE)
    if isinstance(found, ArtifactRef):
        run.log_file(Store(recipe.execution.store).open(found) / FILE)


def log_scores(run: TrackedRun, evaluations: Mapping[str, Evaluation]) -> None:
    """Each suite's number as the metric `<suite>.<role>`; a failure as a tag."""
    for role, evaluation in evaluations.items():
        for suite, scores in evaluation.items():
            if isinstance(scores, Failure):
                run.set_tags({f"failed.{suite}.{role}": scores.reason})
            else:
                run.log_metrics({f"{suite}.{role}": scores.value})


@task(name="log evaluation", cache_policy=NO_CACHE)
def log_evaluation(
    run: TrackedRun, recipe: Recipe, evaluations: Mapping[str, Measured]
) -> dict[str, list[dict[str, Any]]]:
    """Every document's score as `documents.parquet`, a column for each of `evaluations` (by role),
    and, where there is a baseline, the parts of suites that have any (MMLU's subjects) as tables,
    which are returned by suite."""
    store = Store(recipe.execution.store)
    log_divergence(run, recipe, evaluations["candidate"])
    loaded = {role: load_evaluation(measured, store) for role, measured in evaluations.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "documents.parquet"
        parquet.write_table(document_table(loaded), path)
        run.log_file(path)
    if "baseline" not in loaded:
        return {}
    tables = _parts(loaded["baseline"], loaded["candidate"])
    for suite, rows in tables.items():
        run.log_table(rows, suite)
    return tables


def document_table(evaluations: Mapping[str, Evaluation]) -> pyarrow.Table:
    """A row for every document of every suite that has scores: `<role>` is its value, null where
    that role has none for it; `<role>.pick` and `<role>.margin` the number of the choice that was
    picked and its margin above the next in nats, where there are choices."""
    columns = ("suite", "metric", "part", "group", "document", "weight")
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    for role, evaluation in evaluations.items():
        for suite, scores in evaluation.items():
            if not isinstance(scores, Scores):
                continue
            seen: dict[str, int] = {}  # a document may occur twice
            columns_of = (scores.documents, scores.parts, scores.groups, scores.values)
            for place, (document, part, group, value, weight) in enumerate(
                zip(*columns_of, scores.weights, strict=True)
            ):
                seen[document] = seen.get(document, 0) + 1
                about = (suite, scores.metric, part, group, document, weight)
                row = rows.setdefault(
                    (suite, document, seen[document]), dict(zip(columns, about, strict=True))
                )
                row[role] = value
                if place < len(scores.picks):
                    row[f"{role}.pick"] = scores.picks[place]
                    row[f"{role}.margin"] = scores.margins[place]
    chosen = [f"{role}.{kind}" for role in evaluations for kind in ("pick", "margin")]
    known = {name for row in rows.values() for name in row}
    names = [*columns, *evaluations, *(name for name in chosen if name in known)]
    return pyarrow.table({name: [row.get(name) for row in rows.values()] for name in names})


def layer_rows(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The per-layer table of a checkpoint's manifest."""
    corrected = any("corrected" in row for row in manifest["layers"])
    unseen = any("unseen" in row for row in manifest["layers"])
    return [
        {
            "layer": row["name"],
            "shape": "×".join(str(side) for side in row["shape"]),
            "error": row["error"],
            "bits per weight": 8 * row["bytes"] / (row["shape"][0] * row["shape"][1]),
            "damping": row["damp_frac"],
            "codes moved": row["codes_moved"],
            "tokens": row["tokens"],
            **({"corrected": row.get("corrected", 0.0)} if corrected else {}),
            **(_unseen(row.get("unseen")) if unseen else {}),
        }
        for row in manifest["layers"]
    ]


def _unseen(errors: Mapping[str, float] | None) -> dict[str, float | None]:
    """Errors on tokens that no Hessian has seen; None of a layer whose codes were not chosen."""
    own = errors or {}
    return {"unseen": own.get("chosen"), "unseen, rounded": own.get("nearest")}


def _parts(baseline: Evaluation, candidate: Evaluation) -> dict[str, list[dict[str, Any]]]:
    """Categories and subjects of each suite that has them, where both have the same documents."""
    tables = {}
    for suite, before in baseline.items():
        after = candidate.get(suite)
        if not isinstance(before, Scores) or not isinstance(after, Scores):
            continue
        if before.documents == after.documents and (rows := breakdown(before, after)):
            tables[suite] = rows
    return tables
