"""The report's tables: gates, suites, layers, sizes, exports, versions, rounds."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpq_core.checkpoint.exports.card import shown_parts, shown_scheme
from dpq_core.evaluation.scores import PERPLEXITIES
from dpq_core.evaluation.text_divergence import DIVERGENCE
from dpq_core.recipe.scheme import Scheme
from dpq_core.verdict.closeness import TOP1
from dpq_core.verdict.flips import FLIPS
from dpq_core.verdict.standing import Metric
from flows.reporting.charts import WORST
from flows.reporting.prefect_artifacts import gate_rows, interval, number, turned
from flows.reporting.report_data import ReportData
from flows.reporting.tables import Table, bits, measured, or_dash, table
from infra.store.disk import shown_bytes
from tasks.benchmark import THROUGHPUT
from tasks.log import layer_rows
from tasks.support.report_figures import worst_layers


def gates_table(data: ReportData) -> Table:
    """What was judged, and what is missing although it was to be shown."""
    judged = {n: m for n, m in data.verdict.metrics.items() if m.limit is not None or m.wrong}
    keys = ("metric", "baseline", "candidate", "delta", "interval", "limit", "result")
    titles = ("metric", "baseline", "candidate", "delta", "interval of delta", "limit", "result")
    return table(
        "Candidate against 16-bit baseline",
        gate_rows(judged),
        dict(zip(keys, titles, strict=True)),
        cards=True,
    )


def divergence_table(data: ReportData) -> Table:
    """How far the predictions are apart; no rows where nobody measured it."""
    rows = [
        {
            "what": what,
            "candidate": number(metric.candidate, ".5f"),
            "interval": _interval_of_the_value(metric),
        }
        for name, what in _DIVERGENCE.items()
        if (metric := data.verdict.metrics.get(name)) and not metric.wrong
    ]
    return table("Over perplexity's text, windows resampled", rows)


_DIVERGENCE = {
    "divergence": "KL in nats a token, mean",
    "divergence.median": "median",
    "divergence.p99": "99 % of the tokens are below",
    "divergence.p99_9": "99.9 % are below",
    "divergence.max": "largest",
    "top1_agreement": "share of tokens with the same most likely",
}


def _interval_of_the_value(metric: Metric) -> str:
    """Of the candidate's value; in a metric it is the difference's."""
    if metric.interval is None:
        return "–"
    return " … ".join(number(end + (metric.baseline or 0), ".5f") for end in metric.interval)


def suites_table(data: ReportData) -> Table:
    """Every suite and data set by itself."""
    rows = []
    for name, metric in data.verdict.metrics.items():
        if not _is_one_suite(name):
            continue
        suite, spec = (
            name.removeprefix("accuracy."),
            ".4f" if metric.metric in PERPLEXITIES else ".2f",
        )
        few_shot = data.recipe.evaluation.num_fewshot.get(suite, 0)
        row = {
            "suite": suite,
            "baseline": number(metric.baseline, spec),
            "candidate": number(metric.candidate, spec),
            "delta": number(metric.delta, f"+{spec}"),
            "interval of delta": interval(metric, spec),
            "answers turned": turned(metric, other_too=False),
            "metric": metric.metric,
            "documents": f"{metric.documents:,}",
            "few-shot": str(few_shot),
        }
        rows.append(row)
    return table("Each suite by itself, accuracies in percent", rows)


def flips_table(data: ReportData) -> Table:
    """The answers that changed, of each suite of choices; no rows where none was measured."""
    rows = [
        {
            "suite": name.removeprefix("accuracy."),
            "to right": str(metric.turned_right),
            "to wrong": str(metric.turned_wrong),
            "to another wrong": str(metric.turned_other),
            "margin of these": _margin(metric.margin_turned),
            "margin of all": _margin(metric.margin),
            "candidate's, of all": _margin(metric.margin_candidate),
        }
        for name, metric in data.verdict.metrics.items()
        if name.startswith("accuracy.") and metric.turned_other is not None
    ]
    return table("Answers that changed", rows)


def _margin(nats: float | None) -> str:
    return "–" if nats is None else number(nats, ".3f")


def flips_lines(data: ReportData) -> list[str]:
    """How many answers changed, a sentence each for the mean over suites and for MMLU."""
    lines = []
    for name, metric in data.verdict.metrics.items():
        if not name.startswith(FLIPS) or metric.candidate is None:
            continue
        of = "MMLU's" if name != FLIPS else "the suites'"
        ends = interval(metric, ".2f").replace("+", "").replace(" … ", " to ")
        lines.append(f"{number(metric.candidate, '.2f')} % of {of} answers changed ({ends}).")
    return lines


def _is_one_suite(name: str) -> bool:
    return name.startswith(("accuracy.", "perplexity_word"))


def parts_table(suite: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    shown = [
        {
            key: number(value, ".2f") if isinstance(value, float) else str(value)
            for key, value in (
                ("name", row["name"]),
                *((k, v) for k, v in row.items() if k != "name"),
            )
        }
        for row in rows
    ]
    return table(f"Categories and subjects of {suite}, percent", shown)


def worst_table(data: ReportData) -> Table:
    layers = {row["layer"]: row for row in layer_rows(data.manifest)}
    rows = [
        {
            "rank": str(rank),
            "layer": name,
            "relative output error": number(layers[name]["error"], ".5f"),
            "bits a weight": number(layers[name]["bits per weight"], ".2f"),
            "shape": layers[name]["shape"],
            "damping": number(layers[name]["damping"], "g"),
            "calibration tokens": f"{layers[name]['tokens']:,}",
        }
        for rank, name in enumerate(worst_layers(data.errors, WORST), 1)
    ]
    return table("The layers with the largest errors", rows)


def size_table(data: ReportData) -> Table:
    before, after = data.sizes
    rows = [
        {"what": "16-bit model", "layers": "–", "bits a weight": "–", "size": shown_bytes(before)},
        *_scheme_rows(data.manifest),
        {
            "what": f"whole checkpoint, {before / after:.2f} times smaller",
            "layers": "–",
            "bits a weight": "–",
            "size": shown_bytes(after),
        },
    ]
    return table("Files of weights, and the layers in them by scheme", rows)


def bytes_table(data: ReportData) -> Table:
    """Which part of the model takes how many bytes; no rows where nobody counted them."""
    parts = data.bytes_by_part
    rows = [
        {"part": row["part"], "size": shown_bytes(parts[row["part"]]), "share": row["share"]}
        for row in shown_parts(parts)
    ]
    return table("The checkpoint's bytes by part of the model", rows)


def _scheme_rows(manifest: Mapping[str, Any]) -> list[dict[str, str]]:
    """The quantized layers, grouped by scheme."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in manifest["layers"]:
        scheme = Scheme.model_validate({**manifest["scheme"], **row["scheme"]})
        groups.setdefault(shown_scheme(scheme), []).append(row)
    shown = []
    for name, rows in groups.items():
        taken = sum(row["bytes"] for row in rows)
        weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
        shown.append(
            {
                "what": name,
                "layers": str(len(rows)),
                "bits a weight": number(8 * taken / weights, ".2f"),
                "size": shown_bytes(taken),
            }
        )
    return shown


def exports_table(data: ReportData) -> Table:
    rows = [
        {
            "format": row["format"],
            "bits a weight": number(row["bits per weight"], ".2f"),
            "size": shown_bytes(row["bytes"]),
            "verification": row["verification"],
            "SHA-256 of its manifest": row["sha256"][:16],
        }
        for row in data.exports
    ]
    return table("Exports", rows)


def versions_table(data: ReportData) -> Table:
    speeds = any(THROUGHPUT in past.metrics for past in data.past)
    judged = data.judged
    unmoved = {DIVERGENCE, TOP1, *(name for name in judged if name.startswith(FLIPS))}  # 0, 1, 0
    champion = data.version if data.verdict.verdict == "promoted" else data.previous_champion
    rows = []
    for past in reversed(data.past):
        also = [
            word
            for word, holds in (
                ("this one", past.number == data.version),
                ("champion", past.number == champion),
                ("rolled back", past.rolled_back),
            )
            if holds
        ]
        row = {
            "version": f"{past.number} ({', '.join(also)})" if also else str(past.number),
            "registered": f"{past.created:%Y-%m-%d}",
            "verdict": past.verdict,
            "bits a weight": bits(past.metrics.get("bytes_per_weight")),
        }
        if speeds:
            row["tokens per second"] = measured(past, THROUGHPUT, ",.0f")
        for side, spec in (("delta", "+.4f"), ("baseline", ".4f")):
            shown = judged if side == "delta" else [n for n in judged if n not in unmoved]
            row |= {f"{n}, {side}": measured(past, f"{n}.{side}", spec) for n in shown}
        rows.append(row)
    return table("Versions, the newest first", rows)


def rounds_table(data: ReportData) -> Table:
    rows = [
        {
            key: number(value, ".4f") if isinstance(value, float) else str(or_dash(value))
            for key, value in row.items()
        }
        for row in data.rounds
    ]
    return table("What each round of repair bought", rows)
