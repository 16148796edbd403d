"""The release report: one page that stands alone, for who has a minute to say whether to ship.

Pure: `ReportData` in, HTML out. Nothing is fetched and nothing runs: the page's own policy
(Content-Security-Policy) forbids both, and Jinja escapes all but the charts, which matplotlib
escapes. Each chart is drawn twice, for a wide window and for a phone, and stands beside a table of
what it shows. A number that there is none of is a word.
"""

from collections.abc import Mapping
from typing import Any

from dpq_core.calibration.data_sets import data_sets
from dpq_core.calibration.required_tokens import CalibrationTokens
from dpq_core.checkpoint.exports.card import shown_cache, shown_scheme
from dpq_core.evaluation.text_divergence import DIVERGENCE
from dpq_core.layer.unseen import UnseenSummary
from dpq_core.verdict.closeness import TOP1
from dpq_core.verdict.ratios import THROUGHPUT_RATIO
from flows.reporting.charts import history_chart, layers_chart, speed_charts
from flows.reporting.html import rendered
from flows.reporting.page_tables import (
    bytes_table,
    divergence_table,
    exports_table,
    flips_lines,
    flips_table,
    gates_table,
    parts_table,
    rounds_table,
    size_table,
    suites_table,
    versions_table,
    worst_table,
)
from flows.reporting.prefect_artifacts import model_notes, notes, number, spot_rows, standings
from flows.reporting.report_data import ReportData
from flows.reporting.tables import table
from tasks.benchmark import THROUGHPUT
from tasks.support.speeds import conditions, shown


def page(data: ReportData) -> str:
    """The report as HTML."""
    return rendered(
        "report.html",
        data=data,
        made=f"{data.made:%Y-%m-%d %H:%M %Z}",
        base=data.manifest["base_model"]["id"],
        bits=number(8 * data.manifest["bytes_per_weight"], ".2f"),
        champion=_champion(data),
        gates=gates_table(data),
        judged=_judged(data),
        divergence=divergence_table(data),
        spots=spot_rows(data.spots),
        suites=suites_table(data),
        flips=flips_table(data),
        changed=flips_lines(data),
        failures={n: m.wrong for n, m in data.verdict.metrics.items() if m.wrong},
        parts=[parts_table(suite, rows) for suite, rows in data.parts.items()],
        layers=layers_chart(data),
        worst=worst_table(data),
        size=size_table(data),
        bytes_by_part=bytes_table(data),
        exports=exports_table(data),
        speeds=table("Variants of the model by device and batch", shown(data.speeds)),
        speed_charts=speed_charts(data),
        conditions=[f"{t.device}: {line}" for t in data.speeds for line in conditions(t)],
        history=history_chart(data),
        versions=versions_table(data),
        measured_throughput=any(THROUGHPUT in past.metrics for past in data.past),
        rounds=rounds_table(data),
        facts=_facts(data),
        skipped=skipped(data),
    )


def skipped(data: ReportData) -> list[str]:
    """What was not quantized, measured, written or tried, and why: a line each."""
    recipe, metrics = data.recipe, data.verdict.metrics
    lines = [_sentence(line) for line in model_notes(data.manifest)]
    lines += [f"{name} failed: {m.wrong}" for name, m in metrics.items() if m.wrong]
    lines += notes(metrics)
    if recipe.evaluation.limit is not None:
        lines.append(
            f"Documents: the first {recipe.evaluation.limit} of each suite alone were scored"
        )
    if not recipe.evaluation.suites:
        lines.append("Accuracy: not measured, the recipe names no suite")
    perplexity = recipe.evaluation.perplexity
    if perplexity and perplexity.dataset == recipe.calibration.dataset:
        lines.append("Other text for calibration: none, it reads the text that perplexity judges")
    if perplexity is None:
        lines.append("Perplexity: not measured, the recipe names no data set")
    if perplexity and DIVERGENCE not in metrics:
        lines.append("Divergence from the 16-bit model: not measured")
    if not any(THROUGHPUT in v.metrics for v in data.past if v.number == data.version):
        lines.append("Throughput: not measured in this release")
    if not recipe.export:
        lines.append("Exports: none, the recipe asks for no other format")
    elif not data.exports:
        lines.append(f"Exports ({', '.join(recipe.export)}): not written, the gates came first")
    if data.exports and data.attested is None:
        lines.append("An engine's arithmetic: not attested in this release")
    if data.verdict.verdict != "promoted" and not recipe.repair.enabled:
        lines.append("Repair: not tried, the recipe does not enable it")
    return lines


def _champion(data: ReportData) -> dict[str, Any]:
    """Who is champion now, and the command that changes it, if any does."""
    name, before = data.name, data.previous_champion
    command = f'dpq rollback {name} --why "…"'
    if data.verdict.verdict != "promoted":
        is_now = (
            f"There is no champion of {name}."
            if before is None
            else f"Version {before} is champion of {name}; this release did not change it."
        )
        return {"is": is_now, "command": None, "does": "There is nothing to roll back."}
    is_now = f"Version {data.version} is champion of {name} now."
    if before is None:
        return {
            "is": f"{is_now} There was none before.",
            "command": None,
            "does": "There is no earlier version to roll back to.",
        }
    return {
        "is": f"{is_now} Before it: version {before}.",
        "command": command,
        "does": f"This makes version {before} champion again, once its files are read and found"
        " whole.",
    }


def _judged(data: ReportData) -> str:
    """How the gates came out, and what the limits are limits of."""
    gates = data.recipe.gates
    what = "the difference itself"
    if gates.confidence is not None:
        what = f"the worse end of the {gates.confidence:.0%} interval"
    unit = "absolute, of accuracies in points"
    if gates.mode == "relative":
        unit = "in percent of the baseline"
    counted = standings(data.verdict.metrics)
    said = (
        f"{counted[:1].upper()}{counted[1:]}. Judged on {data.verdict.judged_on}, by {what}; limits"
        f" are {unit}, and what reaches one fails."
    )
    floors = [n for n in (THROUGHPUT_RATIO, TOP1) if getattr(gates, n) is not None]
    if floors:
        said += f" Of {' and '.join(floors)} what reaches its limit passes."
    return said


def _facts(data: ReportData) -> dict[str, dict[str, str]]:
    """What the release was made of and with, by heading."""
    base, recipe = data.manifest["base_model"], data.recipe
    calibration = recipe.calibration
    return {
        "Model and checkpoint": {
            "base model": base["id"],
            "revision": base["revision"] or "a folder, no revision",
            "content of the base model, digest": base["digest"],
            "scheme": shown_scheme(recipe.scheme),
            **_cache(data.manifest),
            "recipe, digest": recipe.digest,
            "checkpoint": data.checkpoint,
            "checkpoint's manifest, SHA-256": data.checkpoint_sha256,
            "MLflow run": data.run,
        },
        "Calibration": {
            "fingerprint, SHA-256 of its tokens": data.manifest["calibration"]["windows"],
            **data_sets(calibration, data.manifest),
            "windows": f"at most {calibration.samples} of {calibration.sequence_length} tokens",
            "tokens": CalibrationTokens.of_manifest(data.manifest).line,
            "begin-of-text token before each": _bos(calibration.bos, data.manifest),
            "propagation": calibration.propagation,
            **_correction(calibration.correction),
            **_unseen(data.manifest),
            "statistics of inputs in": calibration.hessian_inputs,
            "tokens' weights in them": calibration.token_weights,
            "share of each window's first token": f"{calibration.first_token_share:g}",
        },
        **{heading: dict(facts) for heading, facts in data.environment.items()},
    }


def _cache(manifest: Mapping[str, Any]) -> dict[str, str]:
    found = shown_cache(manifest)
    return {"KV cache": found} if found else {}


def _correction(share: float) -> dict[str, str]:
    name = "correction towards the 16-bit model's outputs"
    return {name: f"{share:g} of it; errors are against the corrected weights"} if share else {}


def _unseen(manifest: Mapping[str, Any]) -> dict[str, str]:
    found = UnseenSummary.of(manifest["layers"])
    return {"chosen codes": found.line} if found else {}


def _bos(asked: str, manifest: Mapping[str, Any]) -> str:
    opening = manifest["calibration"].get("opening")
    return f"{'none' if opening is None else f'token {opening}'} ({asked})"


def _sentence(line: str) -> str:
    return line[:1].upper() + line[1:]
